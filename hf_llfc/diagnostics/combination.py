"""Affine combinations of the weights of several models, taken by one more model in place."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from transformers import PreTrainedModel

from hf_llfc.errors import EvaluationError, raise_all


class MovingModel(Protocol):
    """A model whose weights go from point to point."""

    @property
    def model(self) -> PreTrainedModel:
        """The model, with the weights of the last point."""

    def move_to(self, weights: Sequence[float], buffers: Mapping[str, torch.Tensor] | None = None) -> None:
        """Sets the weights; see `CombinedModel.move_to`."""


class CombinedModel:
    """A model whose weights are Σ cₘθₘ, moved from point to point in place.

    Floating-point buffers, running statistics of batch normalization among them, are combined like weights.
    Integer buffers that are equal stay; a counter of batches takes the largest value; others are an error.

    Args:
        models: Two or more of one architecture, on one device.

    Raises:
        EvaluationError: The models do not have the same tensors.
    """

    def __init__(self, models: Sequence[PreTrainedModel]) -> None:
        first, *others = [tensors_by_name(model) for model in models]
        problems = []
        for number, other in enumerate(others, start=2):
            name = "the second model" if len(models) == 2 else f"model {number}"
            problems += _differences(first, other, name)
        raise_all(problems, EvaluationError, "these models cannot be combined")
        self.model = copy.deepcopy(models[0]).eval().requires_grad_(False)
        self._targets: list[torch.Tensor] = []
        self._parts: list[list[torch.Tensor]] = [[] for _ in models]
        with torch.no_grad():
            for name, target in tensors_by_name(self.model).items():
                parts = [first[name].detach(), *(other[name].detach() for other in others)]
                if target.is_floating_point():
                    self._targets.append(target.detach())
                    for own, part in zip(self._parts, parts, strict=True):
                        own.append(part)
                elif name.endswith("num_batches_tracked"):
                    target.copy_(torch.stack(parts).amax(dim=0))
        self._buffers = dict(self.model.named_buffers())

    @torch.no_grad()
    def move_to(self, weights: Sequence[float], buffers: Mapping[str, torch.Tensor] | None = None) -> None:
        """Sets the weights.

        Args:
            weights: One a model; they sum to one.
            buffers: Values that belong to this point and replace the combined ones, by name.
        """
        if len(self._parts) == 2:
            torch._foreach_copy_(self._targets, self._parts[1])
            torch._foreach_lerp_(self._targets, self._parts[0], weights[0])
        else:
            for index, target in enumerate(self._targets):
                # Half precision would round once a model.
                total = torch.zeros_like(target, dtype=torch.promote_types(target.dtype, torch.float32))
                for own, weight in zip(self._parts, weights, strict=True):
                    if weight:
                        total.add_(own[index], alpha=weight)
                target.copy_(total)
        for name, value in (buffers or {}).items():
            self._buffers[name].copy_(value)


def tensors_by_name(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All parameters and buffers by name, each once however many names it has."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _differences(tensors_a: Mapping[str, torch.Tensor], tensors_b: Mapping[str, torch.Tensor], other: str) -> list[str]:
    problems = [f"tensor {name} is missing in {other}" for name in tensors_a if name not in tensors_b]
    problems += [f"tensor {name} is missing in the first model" for name in tensors_b if name not in tensors_a]
    for name, a in tensors_a.items():
        b = tensors_b.get(name)
        if b is None:
            continue
        if a.shape != b.shape:
            problems.append(
                f"tensor {name} has shape {tuple(a.shape)} in the first model and {tuple(b.shape)} in {other}"
            )
        elif a.dtype != b.dtype:
            problems.append(f"tensor {name} is {a.dtype} in the first model and {b.dtype} in {other}")
        elif not a.is_floating_point() and not name.endswith("num_batches_tracked") and not torch.equal(a, b):
            problems.append(f"integer tensor {name} differs between the first model and {other}, so it has no mean")
    return problems
