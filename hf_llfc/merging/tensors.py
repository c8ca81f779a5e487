"""Merging whole models tensor by tensor: floating-point tensors linearly, all others on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_llfc.checkpoints import TensorInfo
from hf_llfc.errors import CheckpointError, RecipeError
from hf_llfc.merging.combination import base_weight, linear_combination
from hf_llfc.merging.schedule import WeightSchedule, layer_depths


@dataclass(frozen=True)
class Source:
    """A model to read from.

    Attributes:
        label: What it is called, for messages.
        read: Gives a tensor by name.
    """

    label: str
    read: Callable[[str], Tensor]


def merged_infos(infos: Mapping[str, TensorInfo], out_dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    """Dtype and shape of every merged tensor: floating-point tensors in `out_dtype`, all others as they are."""
    return {
        name: TensorInfo(out_dtype, info.shape) if out_dtype is not None and info.dtype.is_floating_point else info
        for name, info in infos.items()
    }


def merge_tensors(
    sources: Sequence[Source],
    infos: Mapping[str, TensorInfo],
    schedules: Sequence[WeightSchedule],
    *,
    normalize: bool = False,
    base: Source | None = None,
    scale: float = 1.0,
) -> Iterator[tuple[str, Tensor]]:
    """Merges models one tensor at a time.

    Without a base the result is Σ wᵢ θᵢ, with one it is θ₀ + λ Σ wᵢ (θᵢ − θ₀) (task arithmetic). Floating-point tensors
    are combined exactly and rounded once. Integer and boolean tensors must be equal in all models and are kept;
    BatchNorm's count of batches becomes the largest one.

    Args:
        sources: The models, in the coordinates of one reference.
        infos: Name → dtype and shape of what is to be written; see `merged_infos`.
        schedules: One a model.
        normalize: Whether the weights of every tensor are divided by their sum.
        base: θ₀ of task arithmetic.
        scale: λ of task arithmetic.

    Yields:
        Name and merged tensor, in the order of `infos`.

    Raises:
        CheckpointError: A tensor cannot be combined, is not finite, or differs where it must not.
        RecipeError: Weights cannot be normalized, or no rule matches a tensor.
    """
    depths = layer_depths(infos)
    everyone = [base, *sources] if base is not None else list(sources)
    labels = [source.label for source in everyone]
    for name, info in infos.items():
        tensors = [source.read(name) for source in everyone]
        if not info.dtype.is_floating_point:
            yield name, _merged_integers(name, tensors, labels)
            continue
        weights = [scale * schedule.weight(name, depths) for schedule in schedules]
        if normalize:
            weights = _normalized(name, weights)
        if base is not None:
            weights = [base_weight(weights), *weights]
        yield name, linear_combination(tensors, weights, out_dtype=info.dtype, name=name, models=labels)


def _normalized(name: str, weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    if abs(total) < 1e-12:
        raise RecipeError(f"{name}: the weights sum to zero and cannot be normalized")
    return [weight / total for weight in weights]


def _merged_integers(name: str, tensors: Sequence[Tensor], labels: Sequence[str]) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.stack(list(tensors)).amax(dim=0)
    for tensor, label in zip(tensors, labels, strict=True):
        if tensor.shape != tensors[0].shape or not torch.equal(tensor, tensors[0]):
            raise CheckpointError(
                f"{name}: {label} and {labels[0]} hold different {tensor.dtype} values, which cannot be averaged; "
                "make them equal or remove the tensor from both"
            )
    return tensors[0].clone()
