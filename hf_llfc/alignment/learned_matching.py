"""Learned matching: transforms that minimise a loss of the merge itself, by gradient descent over all groups.

As in Theus et al., *Generalized Linear Mode Connectivity for Transformers*, NeurIPS 2025: the loss of
(1 − λ)·A + λ·T·B with λ ~ U(0.4, 0.6) is minimised over T, started from weight matching. Every T keeps the function of
B, so that nothing is trained but the coordinates. The loss is that of the task, or, where there are no labels, the LLFC
gap itself: how far the features of the merge are from the blend of its parents' features.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from hf_llfc.alignment.relaxations import Multiplied, relaxation
from hf_llfc.errors import AlignmentError
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.symmetry.binding import Binding
from hf_llfc.symmetry.spec import Alignment
from hf_llfc.symmetry.transforms import Transform

logger = logging.getLogger(__name__)

LAMBDAS = (0.4, 0.6)
"""Range of λ, the share of B in the merge."""

STEPS = 500
LEARNING_RATE = 0.01
WARM_UP = 0.05
"""Share of the steps in which the learning rate rises; it falls to zero along a cosine afterwards."""

Batch = Mapping[str, Tensor]
Weights = Mapping[str, Tensor]


class Objective(Protocol):
    """Loss to minimise; `hf_llfc.diagnostics.objectives` has the loss of the task and the LLFC gap."""

    def __call__(self, of_a: Weights, of_b: Weights, merged: Weights, share: float, batch: Batch) -> Tensor:
        """The loss of one step.

        Args:
            of_a: The parameters of A, by the names of its class.
            of_b: The parameters of B in the coordinates of A, in the graph of the transforms.
            merged: (1 − λ)·A + λ·B.
            share: λ.
            batch: Inputs, and labels where there are some.

        Returns:
            A scalar with a gradient.
        """
        ...


@dataclass(frozen=True)
class Learning:
    """How transforms are learned.

    Attributes:
        steps: Steps of gradient descent, one batch each.
        learning_rate: Highest learning rate of Adam.
        temperature: Temperature of the Sinkhorn normalisation that the gradient of a permutation goes through; None for
            a straight-through gradient.
        seed: Seed for λ.
        average: Replaces tensors by their mean over processes, in place; None for one process.
    """

    steps: int = STEPS
    learning_rate: float = LEARNING_RATE
    temperature: float | None = None
    seed: int = 0
    average: Callable[[Sequence[Tensor]], None] | None = None


def learn_matching(
    reference: nn.Module,
    model: nn.Module,
    batches: Iterator[Batch],
    start: Alignment,
    objective: Objective,
    *,
    learning: Learning = Learning(),
    progress: Progress = silent,
) -> Alignment:
    """Finds transforms of `model` for which its merge with `reference` has a low loss.

    Args:
        reference: The model that stays, A.
        model: The model that moves, B, of the same class and on the same device.
        batches: Endless batches to measure the objective on.
        start: Transforms to start from, for example those of weight matching. Axes whose entries are separate tensors
            keep them.
        objective: Loss to minimise.
        learning: Steps and rates.
        progress: Told the steps done and all steps.

    Returns:
        The alignment; its metadata hold `learning_steps` and `losses`, the mean loss of each twentieth of the steps.

    Raises:
        AlignmentError: The options are out of range, or the loss is not finite.
    """
    if learning.steps < 1 or not 0 < learning.learning_rate < math.inf:
        raise AlignmentError(
            f"steps ({learning.steps}) must be at least 1, the learning rate ({learning.learning_rate:g}) above 0"
        )
    spec, of_a, of_b = start.spec, _weights(reference), _weights(model)
    binding = spec.bind({name: value.shape for name, value in model.state_dict().items()})
    learned = _learned_axes(binding)
    relaxed = {axis: relaxation(spec, axis, start.transforms[axis], learning.temperature) for axis in learned}
    together = nn.ModuleList(relaxed.values()).to(next(iter(of_a.values())).device)
    optimiser = torch.optim.Adam(together.parameters(), learning.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, learning.steps))
    generator = torch.Generator().manual_seed(learning.seed)
    losses: list[float] = []
    for step in range(learning.steps):
        low, high = LAMBDAS
        share = low + (high - low) * float(torch.rand((), generator=generator))
        # What tensors need of a transform is all that these stand-ins have.
        soft = cast("dict[str, Transform]", {axis: Multiplied(matrix()) for axis, matrix in relaxed.items()})
        present = Alignment(spec, {**start.transforms, **soft})
        moved = {name: present.read_aligned(name, binding, of_b.__getitem__) for name in of_b}
        merged = {name: torch.lerp(value, moved[name], share) for name, value in of_a.items()}
        loss = objective(of_a, moved, merged, share, next(batches))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        mean = loss.detach().clone()
        if learning.average is not None:
            learning.average(
                [mean, *(parameter.grad for parameter in together.parameters() if parameter.grad is not None)]
            )
        # After the average, which every process has to come to.
        if not bool(mean.isfinite()):
            raise AlignmentError(f"the loss of the merge is not finite in step {step + 1}; lower the learning rate")
        optimiser.step()
        schedule.step()
        losses.append(mean.item())
        progress("learned matching", step + 1, learning.steps)
    transforms = {**start.transforms, **{axis: matrix.transform() for axis, matrix in relaxed.items()}}
    every = math.ceil(learning.steps / 20)
    means = [sum(part) / len(part) for part in (losses[i : i + every] for i in range(0, len(losses), every))]
    logger.info("learned matching: loss %.4g in the first steps, %.4g in the last", means[0], means[-1])
    metadata = {**start.metadata, "method": "learned_matching", "learning_steps": learning.steps, "losses": means}
    return Alignment(spec, transforms, metadata)


def _rate(step: int, steps: int) -> float:
    """The learning rate of a step as a part of the highest."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters, tied ones once, without a graph, in float32 or better."""
    return {
        name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
        for name, parameter in model.named_parameters()
    }


def _learned_axes(binding: Binding) -> list[str]:
    """All symmetric axes but those whose entries are separate tensors, which have no gradient."""
    separate = {axis for bound in binding.tensors.values() for axis in bound.spec.name_axes}
    return [axis for axis in binding.symmetric_axes if axis not in separate]
