"""Where a family has a spec by hand, the derived one may find less, never something else."""

import pytest
import torch

from hf_llfc.adapters import known_model_types, spec_for
from hf_llfc.adapters.derived import model_class_for, verified_copy
from hf_llfc.alignment import Parameters, match_weights
from hf_llfc.checkpoints.names import disk_state
from tests.zoo import zoo_model

# Structurally different ones; the others run with the whole zoo.
FAST = ("bert", "gpt2", "llama", "mixtral", "resnet", "t5", "vit", "whisper")


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(each, marks=() if each in FAST else pytest.mark.zoo) for each in known_model_types()],
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
    assert [name for name, tensor in on_disk.items() if not torch.equal(restored[name], tensor)] == []
