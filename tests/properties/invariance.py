"""The test of a permutation spec: a random transform of every symmetric axis keeps what the model computes."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llfc.adapters.derived.answers import answers
from hf_llfc.adapters.derived.precision import full_precision
from hf_llfc.symmetry import PermutationSpec

RELATIVE_CHANGE = 1e-9


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shape of every tensor, by its name."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Holds two sets of tensors to the same names and the same bits."""
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def outputs(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a forward pass is for: logits, or the last hidden state of a base model, pooled output, feature maps."""
    with torch.no_grad(), full_precision(model.dtype):
        return answers(model(**inputs))


def relative_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """The largest change of any output, relative to the largest entry of that output."""
    assert before.keys() == after.keys() and before
    return max(float((after[name] - value).abs().max() / value.abs().max()) for name, value in before.items())


def change_by_random_transform(
    model: PreTrainedModel, spec: PermutationSpec, inputs: Mapping[str, Tensor], seed: int = 2
) -> float:
    """How much a random transform of every symmetric axis changes the outputs of a model in float64."""
    alignment = spec.random_alignment(torch.Generator().manual_seed(seed))
    assert not alignment.is_identity
    moved = copy.deepcopy(model)
    moved.load_state_dict(alignment.apply(model.state_dict()))
    return relative_change(outputs(model, inputs), outputs(moved, inputs))
