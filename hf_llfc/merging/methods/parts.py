"""Tensors in parts: those of one size that fits in a processor's cache, or whole rows.

Parts are computed in float64, whatever the tensors are stored in, and rounded once: in the cache that costs little.

Shape suffixes: `n` all elements of a tensor, `c` those of one part, `rc` rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hf_llfc.merging.combination import Combination, Scratch

PART = 1 << 15
"""Elements worked on at a time: enough that calls do not count, few enough for the cache of a processor's core."""

_ROUNDED = Combination((1.0,))

Function = Callable[[Sequence[Tensor], Tensor | None], Tensor]
"""Merges, or measures, the same part of every model's tensor and of the base's."""


def parts(tensors: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """The same elements of every tensor, part by part, in order.

    Args:
        tensors: At least one, all with as many elements.

    Yields:
        Which elements, and those of every tensor, one-dimensional.
    """
    columns = [tensor.reshape(-1) for tensor in tensors]
    for begin in range(0, columns[0].numel(), PART):
        part = slice(begin, min(begin + PART, columns[0].numel()))
        yield part, [column_n[part] for column_n in columns]


def merge_in_parts(
    function: Function, models: Sequence[Tensor], base: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """Merges part by part.

    Args:
        function: Merges the same part of every tensor, in float64.
        models: Tensors of one shape.
        base: That of the base model, if there is one.
        dtype: Dtype of the result, to which it is rounded once; that of the first model where None.

    Returns:
        A new contiguous tensor.
    """
    merged = torch.empty(models[0].shape, dtype=dtype or models[0].dtype)
    merged_n = merged.view(-1)
    scratch = Scratch(PART)
    for part, columns in parts(models if base is None else [*models, base]):
        merged_c = function(columns[: len(models)], None if base is None else columns[-1])
        if not scratch.combine(_ROUNDED, [merged_c], merged_n[part]):
            merged_n[part] = merged_c  # not finite: the caller says what that means
    return merged


def sum_over_parts(function: Function, models: Sequence[Tensor], base: Tensor | None) -> Tensor:
    """Adds up what is measured part by part, in order.

    Args:
        function: Measures the same part of every tensor; one-dimensional, in float64, of one length.
        models: Tensors of one shape and dtype.
        base: That of the base model, if there is one.

    Returns:
        The sums; what is measured of no element is where they begin.
    """
    sums = function([model.new_empty(0) for model in models], None if base is None else base.new_empty(0))
    for _, columns in parts(models if base is None else [*models, base]):
        sums = sums + function(columns[: len(models)], None if base is None else columns[-1])
    return sums


def products(columns: Sequence[Tensor]) -> Tensor:
    """Inner products of all pairs, in float64, additive over parts.

    Args:
        columns: N one-dimensional tensors.

    Returns:
        N·N numbers, row by row.
    """
    wide = [column_c.double() for column_c in columns]
    gram = torch.empty(len(wide), len(wide), dtype=torch.float64)
    for i, first in enumerate(wide):
        for j, second in enumerate(wide[: i + 1]):
            gram[i, j] = gram[j, i] = torch.dot(first, second)
    return gram.view(-1)


def combination(columns: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Σ coefficients[i]·columns[i] in float64, summed in this order, as a new tensor."""
    total_c = columns[0].to(torch.float64, copy=True).mul_(coefficients[0])
    for column_c, coefficient in zip(columns[1:], coefficients[1:], strict=True):
        # Not in one step, which would fuse product and sum on some processors and not on others.
        total_c.add_(column_c.to(torch.float64, copy=True).mul_(coefficient))
    return total_c


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
