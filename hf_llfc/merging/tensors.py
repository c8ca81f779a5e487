"""Merging whole models tensor by tensor: weights linearly, all other tensors on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_llfc.checkpoints import TensorInfo
from hf_llfc.errors import CheckpointError
from hf_llfc.merging.combination import linear_combination, task_arithmetic
from hf_llfc.merging.schedule import WeightSchedule, resolve_weights

COUNTER = "num_batches_tracked"
VARIANCE = "running_var"
CONSTANTS = ("inv_freq", "original_inv_freq", "masked_bias", "position_ids", "token_type_ids")
"""Last parts of the names of buffers that follow from the config and are not trained."""


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
    """Dtype and shape of every merged tensor.

    Args:
        infos: Those of the first model.
        out_dtype: For floating-point weights and statistics; None keeps each one's own. Integers, truth values and
            constants, which a narrower type would damage, always keep theirs.
    """
    return {
        name: info if out_dtype is None or _is_kept(name, info.dtype) else replace(info, dtype=out_dtype)
        for name, info in infos.items()
    }


def merge_tensors(
    sources: Sequence[Source],
    infos: Mapping[str, TensorInfo],
    schedules: Sequence[WeightSchedule],
    *,
    normalize: bool | None = None,
    base: Source | None = None,
    scale: float = 1.0,
    kept: Mapping[str, int] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Merges models one tensor at a time.

    Without a base the result is Σ wᵢ θᵢ, with one it is θ₀ + λ Σ wᵢ (θᵢ − θ₀) (task arithmetic). Floating-point
    tensors, BatchNorm's running statistics among them, are summed in float64 and rounded once. Integers, truth values
    and constants (`CONSTANTS`) must be equal in all models and are kept; BatchNorm's count of batches becomes the
    largest.

    Args:
        sources: The models, in the coordinates of one reference.
        infos: Name → dtype and shape of what is to be written; see `merged_infos`.
        schedules: One a model.
        normalize: Whether the weights of every tensor are divided by their sum. None: they are not, and those of a
            merge without a base must sum to one.
        base: θ₀ of task arithmetic.
        scale: λ of task arithmetic.
        kept: Tensors that are one model's own, by name: its place among the sources.

    Returns:
        An iterator of name and merged tensor, in the order of `infos`; one tensor of each model is in memory at a time.

    Raises:
        RecipeError: At once, before anything is read: weights of a wrong sum, or rules that do not fit the tensors.
        CheckpointError: A tensor cannot be combined, is not finite, differs where it must not, or leaves the range of
            its dtype.
    """
    weights = resolve_weights(list(infos), schedules, normalize=normalize, scale=scale, sum_to_one=base is None)
    for name, place in (kept or {}).items():
        weights[name] = tuple(float(own == place) for own in range(len(sources)))
    return _merged(sources, infos, weights, base)


def _merged(
    sources: Sequence[Source],
    infos: Mapping[str, TensorInfo],
    weights: Mapping[str, Sequence[float]],
    base: Source | None,
) -> Iterator[tuple[str, Tensor]]:
    everyone = [*sources] if base is None else [base, *sources]
    labels = [source.label for source in everyone]
    for name, info in infos.items():
        tensors = [source.read(name) for source in everyone]
        if name.endswith(COUNTER):
            merged = torch.stack(tensors).amax(dim=0)
        elif _is_kept(name, info.dtype):
            merged = _equal_in_all(name, tensors, labels)
        elif base is None:
            merged = linear_combination(tensors, weights[name], out_dtype=info.dtype, name=name, models=labels)
        else:
            merged = task_arithmetic(
                tensors[0],
                tensors[1:],
                weights[name],
                out_dtype=info.dtype,
                name=name,
                base_model=base.label,
                models=labels[1:],
            )
        if name.endswith(VARIANCE) and bool((merged < 0).any()):
            raise CheckpointError(
                f"{name}: the merged variance is {merged.min().item():.6g}, and a variance cannot be negative; "
                "use smaller weights, from 0 to 1"
            )
        yield name, merged


def _is_kept(name: str, dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point or name.rpartition(".")[2] in CONSTANTS


def _equal_in_all(name: str, tensors: Sequence[Tensor], labels: Sequence[str]) -> Tensor:
    first = tensors[0]
    for tensor, label in zip(tensors, labels, strict=True):
        if tensor.shape != first.shape or not torch.equal(tensor.to(first.dtype), first):
            raise CheckpointError(
                f"{name}: {label} and {labels[0]} hold different {str(first.dtype).removeprefix('torch.')} values, "
                "which cannot be averaged; make them equal or remove the tensor from both"
            )
    return first.clone()
