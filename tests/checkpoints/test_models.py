"""Models from checkpoints: equal to from_pretrained, strict, and with memory of their own."""

import pytest
import torch
import transformers

from hf_llfc.checkpoints import load_model, open_checkpoint, state_dict_on_disk
from hf_llfc.errors import CheckpointError
from tests.checkpoints.test_checkpoint import PlainConfig, PlainNet
from tests.tiny_models import TINY, logits, tiny_inputs, tiny_model


def load_all(checkpoint):
    return dict(checkpoint.state_dict())


@pytest.mark.parametrize(("family", "head"), dict(TINY).items())
def test_the_model_is_the_one_that_was_saved(tmp_path, family, head):
    model = tiny_model(family, head)
    model.save_pretrained(tmp_path, max_shard_size=20_000, save_original_format=False)
    checkpoint = open_checkpoint(tmp_path)
    loaded = load_model(checkpoint)
    assert type(loaded) is type(model) and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    state = state_dict_on_disk(loaded)
    assert list(state) == list(checkpoint.tensors)
    assert open_checkpoint(loaded).fingerprint() == checkpoint.fingerprint()


def test_other_weights_can_be_given_and_give_other_results(save):
    checkpoint = open_checkpoint(save())
    other = tiny_model("bert", "sequence-classification", seed=1)
    loaded = load_model(checkpoint, state_dict=state_dict_on_disk(other))
    inputs = tiny_inputs(other)
    assert torch.equal(logits(loaded, inputs), logits(other, inputs))


def test_the_model_does_not_share_memory_with_what_it_was_made_from(save):
    checkpoint = open_checkpoint(save("a", "gpt2", "causal-lm"))
    fingerprint = open_checkpoint(checkpoint.folder).fingerprint()
    state = load_all(checkpoint)
    before = {name: tensor.clone() for name, tensor in state.items()}
    for model in (load_model(checkpoint), load_model(checkpoint, state_dict=state)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in state.items())
    assert checkpoint.fingerprint() == fingerprint


def test_ties_hold_in_the_loaded_model(save):
    model = load_model(open_checkpoint(save("a", "gpt2", "causal-lm")))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_dtype_is_that_of_the_weights_unless_it_is_asked_for(save):
    checkpoint = open_checkpoint(save())
    state = {name: tensor.half() for name, tensor in checkpoint.state_dict()}
    assert load_model(checkpoint).dtype == torch.float32
    assert load_model(checkpoint, state_dict=state).dtype == torch.float16
    double = load_model(checkpoint, dtype=torch.float64)
    assert {tensor.dtype for tensor in double.state_dict().values()} == {torch.float64}


def test_integers_stay_integers(save):
    checkpoint = open_checkpoint(save("a", "resnet-basic", "image-classification"))
    state = load_model(checkpoint, dtype=torch.float64).state_dict()
    assert {t.dtype for name, t in state.items() if name.endswith("num_batches_tracked")} == {torch.int64}


def test_generation_is_as_the_checkpoint_says(save):
    folder = save("a", "gpt2", "causal-lm")
    generation = transformers.GenerationConfig.from_pretrained(folder)
    generation.max_new_tokens = 3
    generation.save_pretrained(folder)
    assert load_model(open_checkpoint(folder)).generation_config.max_new_tokens == 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.pop("classifier.bias"), "tensor classifier.bias of shape [5] is missing"),
        (lambda state: state.update(extra=torch.ones(2)), "tensor extra is left over"),
        (
            lambda state: state.update({"classifier.bias": torch.ones(4)}),
            "classifier.bias has shape [4], but the config",
        ),
    ],
)
def test_weights_that_do_not_fit_are_one_error(save, change, expected):
    checkpoint = open_checkpoint(save())
    state = load_all(checkpoint)
    change(state)
    with pytest.raises(CheckpointError) as caught:
        load_model(checkpoint, state_dict=state)
    assert str(caught.value).startswith(f"{checkpoint.id}: the tensors are not those of BertForSequenceClassification")
    assert expected in str(caught.value)


def test_a_class_of_ones_own_can_be_given(tmp_path):
    model = PlainNet(PlainConfig())
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"the model class PlainNet is not known.*AutoModel.register"):
        load_model(checkpoint)
    loaded = load_model(checkpoint, model_class=PlainNet)
    assert torch.equal(loaded.layers[10].weight, model.layers[10].weight)


def test_an_adapter_must_be_merged_first():
    model = tiny_model("bert", "base")
    model._hf_peft_config_loaded = True
    with pytest.raises(CheckpointError, match=r"carries adapters; merge them with merge_and_unload"):
        state_dict_on_disk(model)
