"""Adapters that bring a head, or rows of embeddings, that their base was saved without."""

from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    ViTForImageClassification,
    ViTModel,
)

import hf_llfc
from hf_llfc.checkpoints import load_model, open_checkpoint, state_dict_on_disk
from tests.checkpoints.views.test_adapted import edit_config, refused
from tests.runs import byte_llama
from tests.tiny_models import logits, tiny_config, tiny_inputs, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


def lora(**changes) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 3, "target_modules": ["q_proj"], "init_lora_weights": False, **changes})


def trained(model: PreTrainedModel, config: peft.PeftConfig, folder: Path, seed: int = 1) -> dict[str, Tensor]:
    """Saves an adapter with everything that is trained moved, and says what peft makes of model and adapter."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return state_dict_on_disk(adapted.merge_and_unload(safe_merge=True))


def folded(base: Path, adapter: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(f"{base}+{adapter}")
    return {name: checkpoint.read_unrounded(name) for name in checkpoint.tensors}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


HEADS = {
    "a decoder's classes": ("llama", "causal-lm", AutoModelForSequenceClassification, "SEQ_CLS", ["q_proj"]),
    "a bare decoder's classes": ("llama", "base", AutoModelForSequenceClassification, "SEQ_CLS", ["q_proj"]),
    "a tied decoder's classes": ("gpt2", "causal-lm", AutoModelForSequenceClassification, "SEQ_CLS", ["c_attn"]),
    "an encoder's classes": ("bert", "base", AutoModelForSequenceClassification, "SEQ_CLS", ["query"]),
    "classes of tokens": ("bert", "base", AutoModelForTokenClassification, "TOKEN_CLS", ["query"]),
    "a head of two layers": ("roberta", "masked-lm", AutoModelForSequenceClassification, "SEQ_CLS", ["query"]),
    "a language model on a bare decoder": ("llama", "base", AutoModelForCausalLM, "CAUSAL_LM", ["q_proj"]),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_that_the_base_lacks_is_taken_from_the_adapter(case, tmp_path):
    family, head, auto_class, task, targets = HEADS[case]
    tiny_model(family, head).save_pretrained(tmp_path / "base")
    labels = {} if task == "CAUSAL_LM" else {"num_labels": 7}
    model = auto_class.from_pretrained(tmp_path / "base", **labels)
    saved = ["lm_head"] if task == "CAUSAL_LM" else None
    config = lora(task_type=task, target_modules=targets, modules_to_save=saved)
    expected = trained(model, config, tmp_path / "adapter")
    checkpoint = open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    assert checkpoint.architecture == type(model).__name__ and checkpoint.config.architectures == [type(model).__name__]
    assert task == "CAUSAL_LM" or checkpoint.config.num_labels == 7
    assert_same(folded(tmp_path / "base", tmp_path / "adapter"), expected)
    # The whole model answers as the one that was trained.
    inputs = tiny_inputs(model)
    alone = PeftModel.from_pretrained(auto_class.from_pretrained(tmp_path / "base", **labels), tmp_path / "adapter")
    torch.testing.assert_close(
        logits(load_model(checkpoint), inputs), logits(alone.eval(), inputs), rtol=1e-4, atol=1e-5
    )


def test_a_class_that_only_the_config_of_the_adapter_names(tmp_path):
    ViTModel(tiny_config("vit")).save_pretrained(tmp_path / "base")
    whole = ViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=4)
    config = lora(modules_to_save=["classifier"])
    expected = trained(whole, config, tmp_path / "adapter")
    assert_same(folded(tmp_path / "base", tmp_path / "adapter"), expected)


def test_two_of_them_are_merged_and_load(tmp_path):
    byte_llama(0).save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("one", "two")):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        trained(model, lora(task_type="SEQ_CLS"), tmp_path / name, seed)
        edit_config(tmp_path / name, base_model_name_or_path=str(tmp_path / "base"))
    hf_llfc.merge([tmp_path / "one", tmp_path / "two"], out=tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert merged.config.num_labels == 3
    one, two = (folded(tmp_path / "base", tmp_path / name) for name in ("one", "two"))
    torch.testing.assert_close(merged.score.weight.detach(), (one["score.weight"] + two["score.weight"]) / 2)


ROWS = {
    "saved because they were resized": {},
    "trained whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "some of them trained": {"trainable_token_indices": [3, 256, 257, 258, 259]},
}


TORN = ("trained whole", "adapted")
"""What makes two weights of one that the base ties."""


@pytest.mark.parametrize(
    ("case", "tied"), [(case, tied) for case in ROWS for tied in (False, True) if not (tied and case in TORN)]
)
def test_rows_that_the_base_lacks_are_taken_from_the_adapter(case, tied, tmp_path):
    byte_llama(0, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(260)
    expected = trained(model, lora(task_type="CAUSAL_LM", **ROWS[case]), tmp_path / "adapter")
    checkpoint = open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    assert checkpoint.config.vocab_size == 260
    assert checkpoint.tensors["model.embed_tokens.weight"].shape[0] == 260
    assert_same(folded(tmp_path / "base", tmp_path / "adapter"), expected)
    hf_llfc.merge([f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"], out=tmp_path / "out")
    assert_same(
        dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()),
        dict(load_model(checkpoint).state_dict()),
    )


@pytest.mark.parametrize("case", TORN)
def test_rows_that_tear_a_tie_apart_are_refused(case, tmp_path):
    byte_llama(0, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(260)
    trained(model, lora(task_type="CAUSAL_LM", **ROWS[case]), tmp_path / "adapter")
    refused(
        f"{tmp_path / 'base'}+{tmp_path / 'adapter'}",
        "the base ties lm_head.weight to model.embed_tokens.weight",
        "merge_and_unload",
    )


def test_rows_for_one_of_two_embeddings_are_refused(tmp_path):
    byte_llama(0).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(260)
    trained(model, lora(task_type="CAUSAL_LM"), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if "lm_head" not in name}
    save_file(kept, path)
    refused(
        f"{tmp_path / 'base'}+{tmp_path / 'adapter'}",
        "260 rows",
        "has 256",
        "of lm_head.weight",
        "save_embedding_layers=True",
    )


def test_what_neither_file_holds_is_not_made_up(tmp_path):
    """The pooler under this head was drawn at random when the adapter was trained, and is in no file."""
    tiny_model("bert", "masked-lm").save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    trained(model, lora(task_type="SEQ_CLS", target_modules=["query"]), tmp_path / "adapter")
    refused(
        f"{tmp_path / 'base'}+{tmp_path / 'adapter'}",
        "with the head that",
        "it is no BertForSequenceClassification",
        "bert.pooler.dense.weight",
        "is missing",
    )


def test_a_head_on_a_base_that_has_one_stays_where_it_is(tmp_path):
    tiny_model("bert", "sequence-classification").save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    expected = trained(model, lora(task_type="SEQ_CLS", target_modules=["query"]), tmp_path / "adapter")
    assert_same(folded(tmp_path / "base", tmp_path / "adapter"), expected)
