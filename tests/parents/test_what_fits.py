"""Files as they are found, in pairs: every command, the recipe and Python give the same answer to each.

A row makes two folders and says what must come of them: the message of the error, or the tensors that are merged and
what is said of them. The sum of what both have is half of each, whatever else the files hold.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_llfc.cli import main
from hf_llfc.errors import CheckpointError
from hf_llfc.parents.opening import open_models, open_recipe
from hf_llfc.recipe import load_recipe
from tests.checkpoints.conftest import quiet, save_tokenizer
from tests.tiny_models import randomise

__all__ = ["quiet"]

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = {**SMALL, "vocab_size": 48, "num_key_value_heads": 1, "tie_word_embeddings": False}
VISION = {"image_size": 8, "patch_size": 4}
SPEECH = {
    "conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 20,
}  # fmt: skip
BART = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 20,
}  # fmt: skip
NEXT = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 4, "linear_value_head_dim": 4,
}  # fmt: skip
QWEN_VL = {
    "text_config": {
        **LLAMA, "num_key_value_heads": 2, "vocab_size": 60,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"},
    },
    "vision_config": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4,
        "fullatt_block_indexes": [0],
    },
    "image_token_id": 50, "video_token_id": 51, "vision_start_token_id": 52, "vision_end_token_id": 53,
    "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK = {
    **SMALL, "vocab_size": 48, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 8,
    "first_k_dense_replace": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 2,
}  # fmt: skip


def model(architecture: str, seed: int, **config) -> transformers.PreTrainedModel:
    """A tiny model with random weights."""
    model_class = getattr(transformers, architecture)
    made = model_class(model_class.config_class(**config))
    randomise(made, torch.Generator().manual_seed(seed))
    return made


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The tensors in the files of a folder."""
    return {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}


def store(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Rewrites the only weight file of a folder."""
    held = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


Change = Callable[[Path], None]


def lacking(part: str) -> Change:
    """Takes out the tensors whose name holds a part."""
    return lambda folder: store(folder, {name: each for name, each in tensors_of(folder).items() if part not in name})


def having(**more: Tensor) -> Change:
    """Adds tensors."""
    return lambda folder: store(folder, {**tensors_of(folder), **more})


def renamed(change: Callable[[str], str]) -> Change:
    """Renames tensors."""
    return lambda folder: store(folder, {change(name): each for name, each in tensors_of(folder).items()})


def config(**changes) -> Change:
    """Changes keys of config.json; `...` removes one."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return change


def shards(folder: Path) -> None:
    """Splits the weights into two files."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file(
            {name: tensors[name] for name in files if files[name] == file}, folder / file, metadata={"format": "pt"}
        )
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    """Saves the weights as older versions did."""
    torch.save(tensors_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def words(folder: Path) -> None:
    """Puts a tokenizer beside the weights."""
    save_tokenizer(folder)


@dataclass(frozen=True)
class Row:
    """A pair of folders and what must come of it.

    Attributes:
        architecture: The class of both models.
        config: The values of its config.
        a: Changes to the first folder.
        b: Changes to the second.
        error: What the error says; None where the two fit.
        said: What is said of them, where they fit.
        present: A part of the name of a tensor of the result.
        absent: A part of the names that no tensor of the result has.
    """

    architecture: str
    config: Mapping[str, object]
    a: tuple[Change, ...] = ()
    b: tuple[Change, ...] = ()
    error: str | None = None
    said: str | None = None
    present: str = ""
    absent: str = "\0"


RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
MTP = having(**{"mtp.fc.weight": torch.full((16, 32), 2.0), "mtp.norm.weight": torch.full((16,), 2.0)})
FURTHER = having(**{"model.layers.2.enorm.weight": torch.full((16,), 2.0)})
BERT = {**SMALL, "vocab_size": 48, "max_position_embeddings": 20}
LABELS = {f"L{index}": index for index in range(5)}
FIVE_LABELS = config(id2label={index: name for name, index in LABELS.items()}, label2id=LABELS)
TRIL = torch.tril(torch.ones(1, 1, 20, 20))
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20}
NSP = having(**{"cls.seq_relationship.weight": torch.ones(2, 16), "cls.seq_relationship.bias": torch.ones(2)})
MASKED = {"mask_time_prob": 0.05}
CLASSES = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
TURNED = config(id2label={0: "dog", 1: "cat"}, label2id={"dog": 0, "cat": 1})

ROWS: dict[str, Row] = {
    # what the class needs
    "no head of an untied model": Row("LlamaForCausalLM", LLAMA, (lacking("lm_head"),), error="lm_head.weight of"),
    "no head in the second": Row("LlamaForCausalLM", LLAMA, (), (lacking("lm_head"),), error="lm_head.weight of"),
    "no head in shards": Row("LlamaForCausalLM", LLAMA, (lacking("lm_head"), shards), error="lm_head.weight of"),
    "no biases": Row("Qwen2ForCausalLM", LLAMA, (lacking("_proj.bias"),), error="q_proj.bias of"),
    "no score": Row("LlamaForSequenceClassification", LLAMA, (lacking("score"),), error="score.weight of"),
    "no classifier": Row(
        "BertForSequenceClassification", BERT, (lacking("classifier.w"),), error="classifier.weight of"
    ),
    "no pooler under a classifier": Row(
        "BertForSequenceClassification",
        BERT,
        (lacking("pooler"),),
        (lacking("pooler"),),
        error="pooler.dense.weight of",
    ),
    "no head of images": Row(
        "ViTForImageClassification", {**SMALL, **VISION}, (lacking("classifier"),), error="classifier"
    ),
    "no decoder of images": Row(
        "ViTForMaskedImageModeling", {**SMALL, **VISION, "encoder_stride": 4}, (lacking("decoder"),), error="decoder"
    ),
    "no embed_out": Row("GPTNeoXForCausalLM", {**SMALL, "vocab_size": 40}, (lacking("embed_out"),), error="embed_out"),
    "no norm of keys": Row(
        "Qwen3ForCausalLM", {**LLAMA, "head_dim": 8}, (lacking("k_norm"),), error="k_norm.weight of"
    ),
    "no embedding of T5": Row(
        "T5ForConditionalGeneration",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
        (lacking("shared"),),
        error="shared.weight of",
    ),
    "a head of another size": Row(
        "BertForSequenceClassification", BERT, (FIVE_LABELS,), (FIVE_LABELS,), error="makes it [5]"
    ),
    "embeddings of another size": Row(
        "LlamaForCausalLM", LLAMA, (config(vocab_size=50),), (config(vocab_size=50),), error="makes it [50, 16]"
    ),
    "no expert": Row("MixtralForCausalLM", {**LLAMA, "num_local_experts": 4}, (lacking("experts.2.w1"),), error="2.w1"),
    "no statistics": Row("ResNetForImageClassification", RESNET, (lacking("running_mean"),), error="running_mean of"),
    "no class in one config": Row("LlamaForCausalLM", LLAMA, (config(architectures=...),)),
    "no class and no head": Row(
        "LlamaForCausalLM", LLAMA, (), (config(architectures=...), lacking("lm_head")), error="lm_head.weight of"
    ),
    "no class in any config": Row(
        "LlamaForCausalLM", LLAMA, (config(architectures=...),), (config(architectures=...),), present="lm_head"
    ),
    "no class in any config, a tied head": Row(
        "LlamaForCausalLM",
        {**LLAMA, "tie_word_embeddings": True},
        (config(architectures=...),),
        (config(architectures=...),),
        absent="lm_head",
    ),
    "no class in any config, a base model": Row(
        "BertModel", BERT, (config(architectures=...),), (config(architectures=...),), present="pooler"
    ),
    "no class in any config and no head": Row(
        "LlamaForCausalLM",
        LLAMA,
        (config(architectures=...), lacking("lm_head")),
        (config(architectures=...), lacking("lm_head")),
        error="its tensors are those of none; the nearest is LlamaForCausalLM: tensor lm_head.weight",
    ),
    "no class in any config and half of a head": Row(
        "BertForSequenceClassification",
        BERT,
        (config(architectures=...), lacking("classifier.bias")),
        (config(architectures=...), lacking("classifier.bias")),
        error="the nearest is BertFor",
    ),
    "no class in any config, T5": Row(
        "T5ForConditionalGeneration",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
        (config(architectures=...),),
        (config(architectures=...),),
        present="shared",
    ),
    "no class in any config, a head for pretraining": Row(
        "ElectraForPreTraining", BERT, (config(architectures=...),), (config(architectures=...),), present="discrimin"
    ),
    "no class in any config, a derived type": Row(
        "OPTForCausalLM",
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "ffn_dim": 24,
            "word_embed_proj_dim": 16,
        },
        (config(architectures=...),),
        (config(architectures=...),),
        present="embed_tokens",
    ),
    "no class in any config and no head in one": Row(
        "MistralForCausalLM",
        LLAMA,
        (config(architectures=...),),
        (config(architectures=...), lacking("lm_head")),
        error="lm_head.weight",
    ),
    # what it does not use
    "no counts of batches": Row(
        "ResNetForImageClassification", RESNET, b=(lacking("num_batches"),), said="lends", present="num_batches"
    ),
    "a buffer in one": Row(
        "LlamaForCausalLM",
        LLAMA,
        (having(**{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),),
        absent="inv",
    ),
    "masks in one": Row(
        "GPT2LMHeadModel",
        GPT2,
        (having(**{"transformer.h.0.attn.bias": TRIL, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}),),
        absent="0.attn.bias",
    ),
    "positions in the second": Row(
        "CLIPModel",
        {"text_config": {**SMALL, "vocab_size": 40}, "vision_config": {**SMALL, **VISION}, "projection_dim": 8},
        b=(having(**{"text_model.embeddings.position_ids": torch.arange(20)[None]}),),
        absent="position_ids",
    ),
    "no masked frames in one": Row(
        "Wav2Vec2ForCTC",
        {**SMALL, **SPEECH, **MASKED},
        (),
        (lacking("masked_spec_embed"),),
        said="lends",
        present="masked_s",
    ),
    "no masked frames in the first": Row(
        "HubertForCTC",
        {**SMALL, **SPEECH, **MASKED},
        (lacking("masked_spec_embed"),),
        said="lends",
        present="masked_spec",
    ),
    "no bias of the logits": Row(
        "BartForConditionalGeneration", BART, (), (lacking("final_logits_bias"),), present="final_logits_bias"
    ),
    "no pooler": Row("BertModel", BERT, (lacking("pooler"),), (lacking("pooler"),), absent="pooler"),
    "no pooler in one": Row("RobertaModel", BERT, (), (lacking("pooler"),), said="lends its own", present="pooler"),
    "no pooler of images": Row(
        "ViTModel", {**SMALL, **VISION}, (lacking("pooler"),), (lacking("pooler"),), absent="pooler"
    ),
    "leftovers of pretraining": Row(
        "BertForMaskedLM", BERT, (NSP,), said="does not use 2 tensors cls.seq_relationship", absent="seq_rel"
    ),
    "leftovers in both": Row(
        "BertForMaskedLM", BERT, (NSP,), (NSP,), said="merged like all others", present="cls.seq_rel"
    ),
    "a tensor of nobody": Row(
        "LlamaForCausalLM",
        LLAMA,
        (having(probe=torch.ones(3)),),
        (having(probe=torch.ones(3)),),
        said="probe: left",
        absent="probe",
    ),
    "heads for further tokens": Row(
        "Qwen3NextForCausalLM", NEXT, (MTP,), (MTP,), said="merged like", present="mtp.fc.weight"
    ),
    "heads for further tokens in one": Row(
        "Qwen3NextForCausalLM", NEXT, (MTP,), said="mtp.norm.weight: left out", absent="mtp"
    ),
    "a copy of a tied weight": Row(
        "LlamaForCausalLM",
        {**LLAMA, "tie_word_embeddings": True},
        (
            lambda folder: store(
                folder, tensors_of(folder) | {"lm_head.weight": tensors_of(folder)["model.embed_tokens.weight"]}
            ),
        ),
        absent="lm_head",
    ),
    # names
    "torch.compile": Row("LlamaForCausalLM", LLAMA, b=(renamed("_orig_mod.{}".format),), said="wrapped model"),
    "torch.compile in shards": Row(
        "LlamaForCausalLM", LLAMA, (renamed("_orig_mod.{}".format), shards), said="wrapped model"
    ),
    "DDP around torch.compile": Row(
        "BertForMaskedLM", BERT, (renamed("module._orig_mod.{}".format),), said="wrapped model"
    ),
    "peft": Row("GPT2LMHeadModel", GPT2, b=(renamed("base_model.model.{}".format),), said="wrapped model"),
    "FSDP, layer by layer": Row(
        "LlamaForCausalLM",
        LLAMA,
        (renamed(lambda name: f"_fsdp_wrapped_module.{name.replace('layers.0.', 'layers.0._fsdp_wrapped_module.')}"),),
        said="wrapped model",
    ),
    "pickled and wrapped": Row("LlamaForCausalLM", LLAMA, (renamed("module.{}".format), pickled), said="wrapped model"),
    "a wrapper that nobody knows": Row(
        "LlamaForCausalLM", LLAMA, (renamed("student.{}".format),), error="its tensors have 'student.' before the names"
    ),
    "an adapter beside its base": Row(
        "LlamaForCausalLM",
        LLAMA,
        (having(**{"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)}),),
        error="an adapter that was not merged",
    ),
    "gamma and beta": Row(
        "BertForMaskedLM",
        BERT,
        (
            renamed(
                lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                    "LayerNorm.bias", "LayerNorm.beta"
                )
            ),
        ),
    ),
    "a head prefix too many": Row("BertModel", BERT, b=(renamed("bert.{}".format),)),
    "two layouts of a vision-language model": Row(
        "Qwen2_5_VLForConditionalGeneration",
        QWEN_VL,
        b=(
            renamed(
                lambda name: (
                    f"model.{name}"
                    if name.startswith("visual.")
                    else name.replace("model.", "model.language_model.", 1)
                    if name.startswith("model.")
                    else name
                )
            ),
        ),
    ),
    # configs
    "keys that no class reads": Row(
        "LlamaForCausalLM",
        LLAMA,
        (config(unsloth_version="1", model_max_length=4096),),
        (config(unsloth_version="2", model_max_length=2048),),
        said="unsloth_version '2' against '1'; model_max_length 2048 against 4096",
    ),
    "keys of a section that no class reads": Row(
        "Qwen2_5_VLForConditionalGeneration",
        QWEN_VL,
        (config(note={"by": "a"}),),
        (config(note={"by": "b"}),),
        said="note.by",
    ),
    "windows out of use": Row(
        "Qwen2ForCausalLM",
        LLAMA,
        (config(max_window_layers=28, sliding_window=131072, use_sliding_window=False, layer_types=...),),
        (config(max_window_layers=21, sliding_window=32768, use_sliding_window=False, layer_types=...),),
    ),
    "windows in use": Row(
        "Qwen2ForCausalLM",
        LLAMA,
        (config(max_window_layers=0, sliding_window=4, use_sliding_window=True, layer_types=...),),
        (config(max_window_layers=0, sliding_window=8, use_sliding_window=True, layer_types=...),),
        error="sliding_window in the config is 8, but in that of",
    ),
    "other layers with a window": Row(
        "Qwen2ForCausalLM",
        LLAMA,
        (config(max_window_layers=0, sliding_window=4, use_sliding_window=True, layer_types=...),),
        (config(max_window_layers=1, sliding_window=4, use_sliding_window=True, layer_types=...),),
        error="layer_types in the config is",
    ),
    "another rope": Row(
        "LlamaForCausalLM",
        LLAMA,
        (),
        (config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),),
        error="rope_theta",
    ),
    "another activation": Row(
        "BertForMaskedLM", BERT, (), (config(hidden_act="relu"),), error="hidden_act in the config is 'relu'"
    ),
    "another epsilon": Row(
        "LlamaForCausalLM", LLAMA, (), (config(rms_norm_eps=1e-5),), error="rms_norm_eps in the config is 1e-05"
    ),
    "a quantisation of before": Row(
        "LlamaForCausalLM",
        LLAMA,
        (config(quantization_config={"quant_method": "bitsandbytes"}),),
        said="quantization_config is left",
    ),
    "a quantisation in a section": Row(
        "Qwen2_5_VLForConditionalGeneration",
        QWEN_VL,
        (
            lambda folder: config(
                text_config={
                    **json.loads((folder / "config.json").read_text())["text_config"],
                    "quantization_config": {"bits": 4},
                }
            )(folder),
        ),
        said="quantization_config is left out",
    ),
    "weights of eight bits": Row(
        "LlamaForCausalLM",
        LLAMA,
        (
            config(quantization_config={"quant_method": "compressed-tensors"}),
            having(**{"lm_head.weight": torch.ones(48, 16, dtype=torch.int8)}),
        ),
        error="a quantised layer (compressed-tensors)",
    ),
    "padded rows": Row(
        "LlamaForCausalLM",
        LLAMA,
        (words,),
        (
            config(vocab_size=40),
            lambda folder: store(folder, {n: t[:40] if t.shape[0] == 48 else t for n, t in tensors_of(folder).items()}),
        ),
        error="once both models have their tokenizer",
    ),
    # labels
    "classes of a sequence in another order": Row(
        "BertForSequenceClassification", {**BERT, **CLASSES}, (), (TURNED,), error="class 0 is 'dog'"
    ),
    "classes of segments in another order": Row(
        "SegformerForSemanticSegmentation",
        {
            "hidden_sizes": [8, 8, 8, 8],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 1, 1],
            "decoder_hidden_size": 8,
            **CLASSES,
        },
        (),
        (TURNED,),
        error="class 0 is 'dog'",
    ),
    "classes of boxes in another order": Row(
        "YolosForObjectDetection",
        {**SMALL, "image_size": [16, 16], "patch_size": 8, "num_detection_tokens": 4, **CLASSES},
        (),
        (TURNED,),
        error="class 0 is 'dog'",
    ),
    "labels of a model without any": Row("BertForMaskedLM", {**BERT, **CLASSES}, (), (TURNED,)),
}


@pytest.fixture(params=ROWS)
def row(request) -> Row:
    return ROWS[request.param]


@pytest.fixture
def pair(row, tmp_path) -> tuple[Path, Path]:
    """The two folders of a row; what they held before their changes lies in `before`."""
    folders = tmp_path / "a", tmp_path / "b"
    for seed, (folder, changes) in enumerate(zip(folders, (row.a, row.b), strict=True)):
        model(row.architecture, seed, **row.config).save_pretrained(folder)
        (tmp_path / "before" / folder.name).mkdir(parents=True)
        store(tmp_path / "before" / folder.name, tensors_of(folder))
        for change in changes:
            change(folder)
    return folders


def test_every_command_gives_the_same_answer(row, pair, tmp_path, capsys, caplog):
    a, b = map(str, pair)
    pickles = ["--allow-pickle"] if row.a[-1:] == (pickled,) else []
    code = main(["merge", a, b, "--out", str(tmp_path / "merged"), *pickles])
    told = capsys.readouterr().err
    checked = main(["check", a, b, "--level", "0", *pickles])
    answer = capsys.readouterr()
    settings = {
        "allow_pickle": bool(pickles),
        "output_dir": str(tmp_path / "run"),
        "models": [{"model": a}, {"model": b}],
    }
    recipe = load_recipe(settings)
    data = {"task": "text-generation", "dataset": "none.txt"}
    measured = load_recipe({**settings, "diagnose": data})
    openings = [
        lambda: open_models([a, b], allow_pickle=bool(pickles)).parents,
        lambda: open_recipe(recipe).parents,
        lambda: open_recipe(measured).parents,
    ]
    if row.error is not None:
        assert code == 2 and checked in (1, 2) and not (tmp_path / "merged").exists()
        assert row.error in told and row.error in answer.out + answer.err
        for opening in openings:
            with pytest.raises(CheckpointError) as caught:
                opening()
            assert row.error in str(caught.value)
        return
    assert (code, checked) == (0, 0), told
    assert row.said is None or row.said in caplog.text
    found = tensors_of(tmp_path / "merged")
    for opening in openings:
        opened = opening()
        assert {name: info.shape for name, info in opened[0].tensors.items()} == {n: t.shape for n, t in found.items()}
        assert all(list(each.tensors) == list(opened[0].tensors) for each in opened)
    assert any(row.present in name for name in found) and not any(row.absent in name for name in found)
    before = [tensors_of(tmp_path / "before" / folder.name) for folder in pair]
    for name in before[0].keys() & found.keys():
        lent = row.said is not None and "lends" in row.said and row.present in name
        if not lent:
            torch.testing.assert_close(found[name], (before[0][name] + before[1][name]) / 2)
    _, report = getattr(transformers, row.architecture).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] or "pooler" in row.absent
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
