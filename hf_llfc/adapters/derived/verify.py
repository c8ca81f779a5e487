"""Does a random transform of every symmetric axis keep what a model computes? In float64, on random weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_llfc.adapters.derived.answers import answers, run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_llfc.symmetry.spec import PermutationSpec

# The largest change of an answer, relative to its largest entry, that counts as rounding in float64.
RELATIVE_CHANGE = 1e-9

# Draws of a transform: one of an axis of two entries moves nothing in half of the draws.
DRAWS = 2


@dataclass(frozen=True)
class Verification:
    """What verifying a spec on a model found.

    Attributes:
        parameters: Of the model.
        change: The largest relative change of an answer under random transforms of the axes that held.
        failed: Symmetric axes of the spec that do not hold.
    """

    parameters: int
    change: float
    failed: tuple[str, ...]


@torch.no_grad()
def randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draws weights of unit gain, norm scales around one, biases, and running statistics.

    Fresh models have norms of ones and biases of zeros, behind which a wrong axis hides.
    """

    def normal(tensor: Tensor, std: float) -> None:
        tensor.copy_(std * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))

    def positive(tensor: Tensor) -> None:
        tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64))

    # A weight of three dimensions is that of a convolution over time, or else a stack of experts' matrices.
    convolutions = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, torch.nn.modules.conv._ConvNd)
    )
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            continue
        if parameter.ndim > 1:
            stacked = parameter.ndim == 3 and not name.startswith(convolutions)
            fan_in = parameter.shape[-1] if stacked else parameter[0].numel()
            normal(parameter, 1 / math.sqrt(max(1, fan_in)))
        elif name.endswith("bias"):
            normal(parameter, 0.3)
        else:
            positive(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "e_score_correction_bias", "expert_bias", "balancing_biases")):
            normal(buffer, 0.3)
        elif name.endswith("running_var"):
            positive(buffer)
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(int(torch.randint(1, 100, (), generator=generator)))


def answer_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model computes, in its own precision; models that draw random numbers draw the same ones every time."""
    return answers(run(model, inputs))


def relative_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """The largest change of an answer, relative to its largest finite entry; infinite where NaN or Inf differ."""
    worst = 0.0
    for name, value in before.items():
        other = after[name]
        finite = value.isfinite()
        if value.shape != other.shape or not torch.equal(finite, other.isfinite()):
            return math.inf
        if finite.any():
            scale = float(value[finite].abs().max())
            worst = max(worst, float((other[finite] - value[finite]).abs().max()) / max(scale, 1e-30))
    return worst


def verify(spec: PermutationSpec, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Verification:
    """Moves a model along every symmetric axis at random and compares its answers.

    Args:
        spec: The spec.
        model: A model with weights, in float64.
        inputs: Inputs for it.

    Returns:
        Whether the axes hold; if not all do together, each is tried alone.
    """
    before = answer_of(model, inputs)
    moved = copy.deepcopy(model)
    state = model.state_dict()

    def change(tried: PermutationSpec, seed: int) -> float:
        alignment = tried.random_alignment(torch.Generator().manual_seed(seed))
        moved.load_state_dict(alignment.apply(state))
        return relative_change(before, answer_of(moved, inputs))

    if not any(value.isfinite().any() for value in before.values()):
        return Verification(model.num_parameters(), math.inf, spec.symmetric_axes)
    worst = max(change(spec, seed) for seed in range(DRAWS))
    if worst <= RELATIVE_CHANGE:
        return Verification(model.num_parameters(), worst, ())
    failed = [
        axis
        for axis in spec.symmetric_axes
        if max(change(spec.keep(axis), seed) for seed in range(DRAWS)) > RELATIVE_CHANGE
    ]
    rest = spec.fix(*failed) if failed else spec
    worst = max(change(rest, seed) for seed in range(DRAWS)) if rest.symmetric_axes else 0.0
    if worst > RELATIVE_CHANGE:
        return Verification(model.num_parameters(), 0.0, spec.symmetric_axes)
    return Verification(model.num_parameters(), worst, tuple(failed))
