"""Derived specs: against those written by hand, under every name of a tensor, at every size."""

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_llfc.adapters import known_model_types, spec_for
from hf_llfc.adapters.derived import derived_spec, model_class_for, shrunken, verified_copy
from hf_llfc.alignment import Parameters, match_weights
from hf_llfc.checkpoints.names import disk_state
from tests.properties.invariance import shapes
from tests.zoo import zoo_model

# Structurally different ones; the others run with the whole zoo.
FAST = ("bert", "gpt2", "llama", "mixtral", "resnet", "t5", "vit", "whisper")

_MASKED = "the vector in place of masked frames serves inputs that are not tried: the derived spec leaves it"
_POOLED = "the stream of a pooling head, or a pooler that nothing reads, moves on its own; by hand it goes with another"

# Where the derived spec has a transform that the one by hand does not have, and why.
FINDS_MORE = {
    "big_bird": "the pooler has units of its own; by hand they go with the residual stream",
    "layoutlm": "as big_bird",
    "data2vec-audio": _MASKED,
    "hubert": _MASKED,
    "speech-encoder-decoder": _MASKED,
    "wav2vec2": _MASKED,
    "esm": "the contact head is not part of a forward pass: the derived spec leaves it, and says so",
    "diffllama": "the channels of the λ vectors may move",
    "gemma3": _POOLED,
    "siglip": _POOLED,
    "siglip2": _POOLED,
    "vision-encoder-decoder": _POOLED,
    "pegasus": "the sines of positions lie in the checkpoint and may move with it; older checkpoints lack them",
    "wavlm": "the gate leaves whole blocks of the residual stream free",
}


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(each, marks=() if each in FAST else pytest.mark.zoo)
        for each in known_model_types()
        if each != "blip_text_model"
    ],
)
def test_every_derived_transform_is_one_of_the_spec_by_hand(model_type: str):
    model, _ = zoo_model(model_type, dtype=torch.float64)
    by_hand = spec_for(model.config)
    assert by_hand.origin == "hand-written"
    derived, verification = verified_copy(model_class_for(model.config), model.config)
    assert verification.failed == ()
    on_disk = disk_state(model)
    moved = derived.random_alignment(torch.Generator().manual_seed(0)).apply(on_disk)
    found = match_weights(Parameters.from_state_dict(by_hand, on_disk), Parameters.from_state_dict(by_hand, moved))
    restored = found.apply(moved)
    differ = [name for name, tensor in on_disk.items() if not torch.equal(restored[name], tensor)]
    assert bool(differ) == (model_type in FINDS_MORE), differ


@pytest.mark.parametrize("model_type", FAST)
def test_names_in_memory_and_without_the_head_prefix_bind_to_a_derived_spec(model_type: str):
    model, _ = zoo_model(model_type)
    spec = derived_spec(model.config)
    prefix = f"{model.base_model_prefix}."
    axes = spec.bind(shapes(disk_state(model))).symmetric_axes
    assert axes and spec.bind(shapes(model.state_dict())).symmetric_axes == axes
    assert spec.bind({name.removeprefix(prefix): shape for name, shape in shapes(disk_state(model)).items()})


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "whisper"])
def test_a_model_of_full_size_is_derived_without_its_weights(model_type: str):
    """The default config of mixtral has 47 billion parameters."""
    spec = derived_spec(CONFIG_MAPPING[model_type](num_hidden_layers=3))
    small = derived_spec(shrunken(CONFIG_MAPPING[model_type](num_hidden_layers=3)))
    assert {axis.split(".")[0] for axis in spec.symmetric_axes} == {axis.split(".")[0] for axis in small.symmetric_axes}
    assert max(axis.size for axis in spec.axes.values()) > 1000
    assert not any("fixed" in note for note in spec.notes)


def test_a_note_says_how_a_derived_spec_was_verified_and_what_it_leaves():
    model, _ = zoo_model("xlnet")
    notes = " ".join(derived_spec(model.config).notes)
    assert "verified on a copy of" in notes and "transformer.layer.*.rel_attn.r_s_bias" in notes
