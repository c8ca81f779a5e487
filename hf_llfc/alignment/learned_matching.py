"""Learned matching: transforms that minimise a loss of the merge itself, by gradient descent over all groups.

As in Theus et al., *Generalized Linear Mode Connectivity for Transformers*, NeurIPS 2025: the loss of
(1 − λ)·A + λ·T·B with λ ~ U(0.4, 0.6) is minimised over T, started from weight matching. Every T keeps the function of
B, so that nothing is trained but the coordinates. The loss is that of the task, or, where there are no labels, the LLFC
gap itself: how far the features of the merge are from the blend of its parents' features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_llfc.alignment.relaxations import Multiplied, relaxation
from hf_llfc.errors import AlignmentError
from hf_llfc.progress import Progress, silent
from hf_llfc.symmetry.alignment import Alignment
from hf_llfc.symmetry.spec import Binding, PermutationSpec

logger = logging.getLogger(__name__)

LAMBDAS = (0.4, 0.6)
"""Range of λ, the share of B in the merge."""

LEARNING_RATE = 0.02
WARM_UP = 0.05
"""Share of the steps in which the learning rate rises; it falls to zero along a cosine afterwards."""

# What a model answers to a batch, from its outputs or those of its modules.
Batch = Mapping[str, Tensor]
TaskLoss = Callable[[Any, Batch], Tensor]


@dataclass(frozen=True)
class Learning:
    """How transforms are learned.

    Attributes:
        steps: Steps of gradient descent, one batch each.
        learning_rate: Of Adam, at its highest.
        temperature: Of the Sinkhorn normalisation that the gradient of a permutation goes through; None for a
            straight-through gradient.
        seed: Of λ.
    """

    steps: int = 500
    learning_rate: float = LEARNING_RATE
    temperature: float | None = None
    seed: int = 0


def learn_matching(
    reference: nn.Module,
    model: nn.Module,
    batches: Iterator[Batch],
    spec: PermutationSpec,
    start: Alignment,
    *,
    task_loss: TaskLoss | None,
    features: Sequence[str] = (),
    learning: Learning = Learning(),  # noqa: B008
    average: Callable[[Sequence[Tensor]], None] | None = None,
    progress: Progress = silent,
) -> Alignment:
    """Finds transforms of `model` for which its merge with `reference` has a low loss.

    Args:
        reference: The model that stays, A, in evaluation mode.
        model: The model that moves, B, of the same class.
        batches: Inputs of the forward pass, with whatever `task_loss` needs besides; without end.
        spec: Of both.
        start: Where to begin, from weight matching say.
        task_loss: (output, batch) → the loss of the merge; None to minimise the LLFC gap instead.
        features: Names of the modules whose outputs the LLFC gap compares.
        learning: Steps and rates.
        average: Replaces tensors by their mean over processes, in place; None for one process.
        progress: Told the steps done and all steps.

    Returns:
        The alignment; its metadata hold `losses`, the mean loss of each twentieth of the steps.

    Raises:
        AlignmentError: An axis whose entries are separate tensors is to move otherwise than the start says, or the loss
            is not finite.
    """
    if learning.steps < 1:
        raise AlignmentError(f"steps ({learning.steps}) must be at least 1")
    weights_a, weights_b = _weights(reference), _weights(model)
    binding = spec.bind({name: value.shape for name, value in weights_b.items()})
    device = next(iter(weights_a.values())).device
    moved = _moved_axes(binding)
    relaxed = nn.ModuleDict(
        {_key(axis): relaxation(spec, axis, start.transforms[axis], learning.temperature) for axis in moved}
    ).to(device)
    optimiser = torch.optim.Adam(relaxed.parameters(), learning.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, learning.steps))
    generator = torch.Generator().manual_seed(learning.seed)
    losses: list[float] = []
    for step in range(learning.steps):
        low, high = LAMBDAS
        share = low + (high - low) * float(torch.rand((), generator=generator))
        transforms = {**start.transforms, **{axis: Multiplied(relaxed[_key(axis)]()) for axis in moved}}
        present = Alignment(spec, transforms)  # type: ignore[arg-type]  # Multiplied is what tensors need of a transform
        aligned = {name: present.read_aligned(name, binding, weights_b.__getitem__) for name in weights_b}
        merged = {name: torch.lerp(value, aligned[name], share) for name, value in weights_a.items()}
        batch = next(batches)
        if task_loss is not None:
            loss = task_loss(functional_call(reference, merged, kwargs=_inputs(reference, batch)), batch)
        else:
            seen = [_features(reference, weights, batch, features) for weights in (weights_a, aligned, merged)]
            loss = llfc_gap(*seen, share)
        if not bool(loss.isfinite()):
            raise AlignmentError(f"the loss of the merge is not finite in step {step + 1}; lower the learning rate")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if average is not None:
            average([parameter.grad for parameter in relaxed.parameters() if parameter.grad is not None])
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        progress("learned matching", step + 1, learning.steps)
    found = {**start.transforms, **{axis: relaxed[_key(axis)].transform() for axis in moved}}
    every = max(1, learning.steps // 20)
    means = [sum(part) / len(part) for part in (losses[i : i + every] for i in range(0, len(losses), every))]
    logger.info("learned matching: loss %.4g in the first steps, %.4g in the last", means[0], means[-1])
    return Alignment(spec, found, {**start.metadata, "method": "learned_matching", "losses": means})


def llfc_gap(of_a: Sequence[Tensor], of_b: Sequence[Tensor], of_merge: Sequence[Tensor], share: float) -> Tensor:
    """Mean over layers of ‖h_merge − (1 − λ)·h_A − λ·h_B‖² / (½‖h_A‖² + ½‖h_B‖²) (Zhou et al. 2023, LLFC).

    Args:
        of_a: Features of A, one tensor a layer.
        of_b: Of B, in the coordinates of A.
        of_merge: Of the merge.
        share: λ.
    """
    gaps = []
    for a, b, merge in zip(of_a, of_b, of_merge, strict=True):
        gaps.append(2 * (merge - torch.lerp(a, b, share)).square().sum() / (a.square().sum() + b.square().sum()))
    return torch.stack(gaps).mean()


def _key(axis: str) -> str:
    """An axis as the name of a module, which may hold no dot."""
    return axis.replace(".", "/")


def _rate(step: int, steps: int) -> float:
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - warm_up) / max(1, steps - warm_up)))))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters, tied ones once, without a graph."""
    return {name: parameter.detach().float() for name, parameter in model.named_parameters()}


def _moved_axes(binding: Binding) -> list[str]:
    """The axes that are learned: all but those whose entries are separate tensors, which have no gradient."""
    separate = {axis for bound in binding.tensors.values() for axis in bound.spec.name_axes}
    return [axis for axis in binding.symmetric_axes if axis not in separate]


def _inputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def _features(model: nn.Module, weights: Mapping[str, Tensor], batch: Batch, names: Sequence[str]) -> list[Tensor]:
    with _outputs(model, names) as seen:
        output = functional_call(model, dict(weights), kwargs=_inputs(model, batch))
    return [*(seen[name] for name in names), output.logits]


@contextmanager
def _outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collects what modules give out."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for name in names:

        def keep(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
