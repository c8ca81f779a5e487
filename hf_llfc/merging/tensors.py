"""Merging whole models tensor by tensor: weights linearly, all other tensors on purpose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from hf_llfc.checkpoints import TensorInfo
from hf_llfc.checkpoints.buffers import COUNTER, VARIANCE, is_constant
from hf_llfc.checkpoints.source import Source
from hf_llfc.errors import CheckpointError
from hf_llfc.merging.combination import DTYPES, Combination, linear_combination, task_arithmetic
from hf_llfc.merging.methods import MergeMethod, Settings
from hf_llfc.merging.schedule import WeightSchedule, resolve_weights


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


@dataclass(frozen=True)
class Merge:
    """What becomes of every tensor: Σ wᵢ θᵢ, θ₀ + λ Σ wᵢ (θᵢ − θ₀) (task arithmetic), or what another method says.

    Floating-point tensors, BatchNorm's running statistics among them, are summed in float64 and rounded once. Integers,
    truth values and constants (`is_constant`) must be equal in all models and are kept; BatchNorm's count of batches
    becomes the largest.

    Attributes:
        sources: The models, in the coordinates of one reference.
        infos: Name → dtype and shape of what is to be written; see `merged_infos`.
        weights: Name → one weight a model.
        base: θ₀ of task arithmetic, or the base model of the method.
        method: How tensors are merged, where they are no sums.
        settings: Name → values of the method's parameters.
        importances: Of every model the importance of its weights, where the method asks for it.
    """

    sources: Sequence[Source]
    infos: Mapping[str, TensorInfo]
    weights: Mapping[str, Sequence[float]]
    base: Source | None = None
    method: MergeMethod | None = None
    settings: Mapping[str, Settings] = field(default_factory=dict)
    importances: Sequence[Source] = ()

    @classmethod
    def copy(cls, source: Source, infos: Mapping[str, TensorInfo]) -> Merge:
        """One model as it is."""
        return cls([source], infos, dict.fromkeys(infos, (1.0,)))

    @classmethod
    def plan(
        cls,
        sources: Sequence[Source],
        infos: Mapping[str, TensorInfo],
        schedules: Sequence[WeightSchedule],
        *,
        normalize: bool = True,
        base: Source | None = None,
        scale: float = 1.0,
        kept: Mapping[str, int] | None = None,
    ) -> Merge:
        """Finds the weights of every tensor; nothing is read.

        Args:
            sources: The models, in the coordinates of one reference.
            infos: Name → dtype and shape of what is to be written.
            schedules: One a model.
            normalize: Whether the weights of every tensor are divided by their sum.
            base: θ₀ of task arithmetic.
            scale: λ of task arithmetic.
            kept: Tensors that are one model's own, by name: its place among the sources.

        Raises:
            RecipeError: Weights that sum to zero, or rules that do not fit the tensors.
        """
        weights = resolve_weights(list(infos), schedules, normalize=normalize, scale=scale)
        for name, place in (kept or {}).items():
            weights[name] = tuple(float(own == place) for own in range(len(sources)))
        return cls(sources, infos, weights, base)

    @property
    def parts(self) -> tuple[Merge, ...]:
        """The merges that it is made of: itself."""
        return (self,)

    @property
    def everyone(self) -> list[Source]:
        """All that are read: the base first, then the models."""
        return [*self.sources] if self.base is None else [self.base, *self.sources]

    @property
    def for_method(self) -> list[Source]:
        """All that the method reads: the base, the models, and the importances."""
        return [*self.everyone, *self.importances]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and merged tensor, in the order of `infos`; one tensor of each model is in memory at a time.

        Raises:
            CheckpointError: See `tensor`.
        """
        for name in self.infos:
            yield name, self.tensor(name)

    def is_sum(self, name: str) -> bool:
        """Whether a tensor is a sum of several, element by element and nothing else."""
        return self.method is None and not self.is_copy(name) and self._is_weight(name)

    def is_by_method(self, name: str) -> bool:
        """Whether a tensor is merged by the method, in parts and passes."""
        return self.method is not None and self._is_weight(name)

    def is_copy(self, name: str) -> bool:
        """Whether a tensor is that of the only model."""
        return (
            self.method is None and self.base is None and len(self.sources) == 1 and tuple(self.weights[name]) == (1.0,)
        )

    def _is_weight(self, name: str) -> bool:
        """Whether a tensor is neither kept, nor counted, nor to be looked at when it is merged."""
        return not (name.endswith(COUNTER) or name.endswith(VARIANCE) or _is_kept(name, self.infos[name].dtype))

    def combination(self, name: str) -> Combination:
        """Which sum a tensor is."""
        return Combination(tuple(self.weights[name]), over_base=self.base is not None)

    def tensor(self, name: str) -> Tensor:
        """One merged tensor.

        Raises:
            CheckpointError: It cannot be combined, is not finite, differs where it must not, or leaves the range of
                its dtype.
        """
        dtype = self.infos[name].dtype
        read = self.for_method if self.method is not None and not _is_kept(name, dtype) else self.everyone
        labels = [source.label for source in read]
        tensors = [source.read(name) for source in read]
        if self.is_copy(name) and (_is_kept(name, dtype) or tensors[0].dtype not in DTYPES):
            return tensors[0].to(dtype)
        if name.endswith(COUNTER):
            return torch.stack(tensors).amax(dim=0)
        if _is_kept(name, dtype):
            return _equal_in_all(name, tensors, labels)
        if self.method is not None:
            models, base = (tensors[1:], tensors[0]) if self.base is not None else (tensors, None)
            merged = merge_by_method(self.method, models, base, self.settings[name], dtype, labels)
        elif self.base is None:
            merged = linear_combination(tensors, self.weights[name], out_dtype=dtype, name=name, models=labels)
        else:
            merged = task_arithmetic(
                tensors[0],
                tensors[1:],
                self.weights[name],
                out_dtype=dtype,
                name=name,
                base_model=self.base.label,
                models=labels[1:],
            )
        if name.endswith(VARIANCE) and bool((merged < 0).any()):
            raise CheckpointError(
                f"{name}: the merged variance is {merged.min().item():.6g}, and a variance cannot be negative; "
                "use smaller weights, from 0 to 1"
            )
        return merged


@dataclass(frozen=True)
class Merges:
    """Parts of one result, each merged its own way.

    Attributes:
        infos: Name → dtype and shape of what is to be written.
        parts: The merges; every tensor is of one of them.
    """

    infos: Mapping[str, TensorInfo]
    parts: tuple[Merge, ...]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and merged tensor, in the order of `infos`; see `Merge.tensors`."""
        part_of = {name: part for part in self.parts for name in part.infos}
        for name in self.infos:
            yield name, part_of[name].tensor(name)


def merge_by_method(
    method: MergeMethod,
    models: Sequence[Tensor],
    base: Tensor | None,
    settings: Settings,
    dtype: torch.dtype,
    labels: Sequence[str],
) -> Tensor:
    """One tensor merged by a method that is no sum.

    Args:
        method: The method.
        models: The tensor of every model.
        base: That of the base model, where there is one.
        settings: Values of the method's parameters for this tensor.
        dtype: Dtype of the result, to which it is rounded once.
        labels: What the models are called, the base first, for messages.

    Raises:
        CheckpointError: Shapes differ, a value is not finite, or the result leaves the range of `dtype`.
    """
    everyone = [*models] if base is None else [base, *models]
    # The sum of nothing refuses what cannot be combined: other shapes and dtypes, NaN and infinities.
    linear_combination(everyone, [0.0] * len(everyone), out_dtype=torch.float32, name=settings.tensor, models=labels)
    common = reduce(torch.promote_types, (tensor.dtype for tensor in everyone), dtype)
    given = [tensor.to(common) for tensor in models]
    merged = method.merge(given, None if base is None else base.to(common), settings, dtype)
    if not bool(merged.isfinite().all()):
        raise beyond_range(method, settings, dtype)
    return merged


def beyond_range(method: MergeMethod, settings: Settings, dtype: torch.dtype) -> CheckpointError:
    """The error of a result that leaves the range of its dtype."""
    name = str(dtype).removeprefix("torch.")
    return CheckpointError(
        f"{settings.tensor}: what {method.name} computes is beyond the range of {name}; "
        "set out_dtype to bfloat16 or float32, or lower the weights"
    )


def _is_kept(name: str, dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point or is_constant(name)


def _equal_in_all(name: str, tensors: Sequence[Tensor], labels: Sequence[str]) -> Tensor:
    first = tensors[0]
    for tensor, label in zip(tensors, labels, strict=True):
        if tensor.shape != first.shape or not torch.equal(tensor.to(first.dtype), first):
            raise CheckpointError(
                f"{name}: {label} and {labels[0]} hold different {str(first.dtype).removeprefix('torch.')} values, "
                "which cannot be averaged; make them equal or remove the tensor from both"
            )
    return first.clone()
