"""Tensors in parts: those of one size that fits in a processor's cache, or whole rows, from memory or from files.

Parts are computed in float64, whatever the tensors are stored in, and rounded once: in the cache that costs little.

Shape suffixes: `n` all elements of a tensor, `c` those of one part, `rc` rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_llfc.merging.combination import Combination, Scratch

PART = 1 << 15
"""Elements worked on at a time: enough that calls do not count, few enough for the cache of a processor's core."""

_ROUNDED = Combination((1.0,))

Function = Callable[[Sequence[Tensor], Tensor | None], Tensor]
"""Merges, or measures, the same part of every model's tensor and of the base's."""

Parts = Iterator[tuple[list[Tensor], Tensor | None]]
"""The same elements of every model's tensor, and of the base's, one-dimensional."""


class Stream(Protocol):
    """A tensor of every model and of the base, given out in parts."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor, the same in all."""
        ...

    @property
    def models(self) -> int:
        """How many models there are, the base not counted."""
        ...

    @property
    def has_base(self) -> bool:
        """Whether there is a base."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parts, the same in all."""
        ...

    def parts(self, width: int = 1, *, size: int = PART, only: int | None = None) -> Parts:
        """Gives out all elements from the beginning on, in order; as often as asked, one pass at a time.

        Args:
            width: Elements that belong together: every part holds a whole number of such rows.
            size: Elements of a part, about; one row at least.
            only: The one model that is read; the list has its elements alone then.

        Yields:
            Parts that must not be changed, and are valid until the next one.
        """
        ...


@dataclass(frozen=True)
class Prepared:
    """What is known after the first passes over a tensor.

    Attributes:
        combine: Merges a part, in float64; called for every part of the tensor once, in order.
        width: Elements that belong together in a part.
        size: Elements of a part, about.
        weights: Where all that `combine` does is a weighted sum, its weights: one a model, and before them that of the
            base, if there is one. Who rounds sums himself needs no `combine` then.
    """

    combine: Function
    width: int = 1
    size: int = PART
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class InMemory:
    """A stream of tensors in memory.

    Attributes:
        tensors: Those of the models, of one shape and dtype.
        base: That of the base, if there is one.
    """

    tensors: Sequence[Tensor]
    base: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.tensors[0].shape)

    @property
    def models(self) -> int:
        """How many models there are, the base not counted."""
        return len(self.tensors)

    @property
    def has_base(self) -> bool:
        """Whether there is a base."""
        return self.base is not None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parts."""
        return self.tensors[0].dtype

    def parts(self, width: int = 1, *, size: int = PART, only: int | None = None) -> Parts:
        """See `Stream.parts`."""
        models = [tensor.reshape(-1) for tensor in (self.tensors if only is None else [self.tensors[only]])]
        base = None if self.base is None else self.base.reshape(-1)
        for part in spans(models[0].numel(), width, size):
            yield [model_n[part] for model_n in models], None if base is None else base[part]


def spans(elements: int, width: int, size: int) -> Iterator[slice]:
    """Which elements the parts of a tensor hold, see `Stream.parts`."""
    step = max(1, size // width) * width
    for begin in range(0, elements, step):
        yield slice(begin, min(begin + step, elements))


def merged_parts(prepared: Prepared, stream: Stream) -> Iterator[Tensor]:
    """The merged parts in order, in float64."""
    for models_c, base_c in stream.parts(prepared.width, size=prepared.size):
        yield prepared.combine(models_c, base_c)


def merge_in_parts(prepared: Prepared, stream: Stream, dtype: torch.dtype | None = None) -> Tensor:
    """Merges part by part.

    Args:
        prepared: What merges a part.
        stream: The tensors.
        dtype: Dtype of the result, to which it is rounded once; that of the parts where None.

    Returns:
        A new contiguous tensor.
    """
    merged = torch.empty(stream.shape, dtype=dtype or stream.dtype)
    merged_n = merged.view(-1)
    scratch = Scratch(PART)
    begin = 0
    for merged_c in merged_parts(prepared, stream):
        result_c = merged_n[begin : begin + merged_c.numel()]
        if not scratch.combine(_ROUNDED, [merged_c.reshape(-1)], result_c):
            result_c.copy_(merged_c.reshape(-1))  # not finite: the caller says what that means
        begin += merged_c.numel()
    return merged


def sum_over_parts(function: Function, stream: Stream) -> Tensor:
    """Adds up what is measured part by part, in order.

    Args:
        function: Measures the same part of every tensor; one-dimensional, in float64, of one length.
        stream: The tensors; at least one element.

    Returns:
        The sums.
    """
    sums = torch.zeros(1, dtype=torch.float64)
    for models_c, base_c in stream.parts():
        sums = sums + function(models_c, base_c)
    return sums


def last_dimension(shape: Sequence[int]) -> int:
    """How many elements the vectors along the last dimension have; at least 1."""
    return max(1, shape[-1]) if shape else 1


def each_output(shape: Sequence[int]) -> int:
    """How many elements there are at one place of the first dimension; at least 1."""
    return max(1, math.prod(shape[1:]))


def products(columns: Sequence[Tensor]) -> Tensor:
    """Inner products of all pairs, in float64, additive over parts.

    Args:
        columns: N one-dimensional tensors.

    Returns:
        N·N numbers, row by row.
    """
    wide = [column_c.double() for column_c in columns]
    lower = {(i, j): torch.dot(wide[i], wide[j]).item() for i in range(len(wide)) for j in range(i + 1)}
    return torch.tensor(
        [lower[max(i, j), min(i, j)] for i in range(len(wide)) for j in range(len(wide))], dtype=torch.float64
    )


def combination(columns: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Σ coefficients[i]·columns[i] in float64, summed in this order, as a new tensor."""
    total_c = columns[0].to(torch.float64, copy=True).mul_(coefficients[0])
    for column_c, coefficient in zip(columns[1:], coefficients[1:], strict=True):
        # Not in one step, which would fuse product and sum on some processors and not on others.
        total_c.add_(column_c.to(torch.float64, copy=True).mul_(coefficient))
    return total_c


def weighted(stream: Stream, coefficients: Sequence[float]) -> Prepared:
    """θ₀ + Σ coefficients[i]·(θᵢ − θ₀), or without a base Σ coefficients[i]·θᵢ."""
    return _sum_of([1 - sum(coefficients), *coefficients] if stream.has_base else coefficients)


def weighted_with_base(base: float, coefficients: Sequence[float]) -> Prepared:
    """base·θ₀ + Σ coefficients[i]·θᵢ."""
    return _sum_of([base, *coefficients])


def _sum_of(weights: Sequence[float]) -> Prepared:
    def combine(models_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        return combination(models_c if base_c is None else [base_c, *models_c], weights)

    return Prepared(combine, weights=tuple(weights))


def around_base(models: Sequence[Tensor], base: Tensor | None, coefficients: Sequence[float]) -> Tensor:
    """θ₀ + Σ coefficients[i]·(θᵢ − θ₀) in float64, or without a base Σ coefficients[i]·θᵢ, as a new tensor."""
    if base is None:
        return combination(models, coefficients)
    return combination([base, *models], [1 - sum(coefficients), *coefficients])


def differences(models: Sequence[Tensor], base: Tensor) -> list[Tensor]:
    """τᵢ = θᵢ − θ₀ in float64, new tensors."""
    wide = base.double()
    return [model.double() - wide for model in models]


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Blocks of whole rows of about `PART` elements, at least one row."""
    step = max(1, PART // max(1, columns))
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))
