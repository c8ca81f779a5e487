"""Linear combinations of tensors, correctly rounded once, at nearly the speed of memory.

Working precision is float32 where a half type is written and float64 where float32 is written. Chunk by chunk, so
that everything in between stays in the cache, the sum is bracketed: low ≤ exact sum ≤ high. Where both ends round to
the same number, that number is the correctly rounded sum; elsewhere (4 % of the elements for two models at 0.3 and
0.7, whose sums are often tenths of a unit in the last place and so lie close to a tie) it is computed again without
error by `exact_combination`. Averages need another way, because a weight of 0.5 makes every second sum an exact tie:
there the products are exact, the error of each addition is computed too, and where it is zero the sum is exact.

Shape suffixes: `n` all elements of a tensor, `c` those of one chunk, `k` those to compute again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_llfc.errors import CheckpointError
from hf_llfc.merging.rounding import SIGNIFICAND_BITS, exact_combination

_CHUNK_PER_THREAD = 1 << 17
_RECOMPUTE_AT_ONCE = 1 << 14


def linear_combination(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    out_dtype: torch.dtype,
    name: str = "tensor",
    models: Sequence[str] | None = None,
) -> Tensor:
    """Σ weights[i]·tensors[i], as if in exact arithmetic and rounded once to the nearest, ties to even.

    Args:
        tensors: N ≥ 1 floating-point tensors of one shape on the CPU; types may differ.
        weights: N finite numbers, taken as the float64 they are.
        out_dtype: float64, float32, bfloat16 or float16.
        name: What the tensor is called, for messages.
        models: What the N models are called, for messages.

    Returns:
        A new contiguous tensor of `out_dtype`. The sign of a zero is not significant.

    Raises:
        CheckpointError: Shapes or types that cannot be combined, a NaN or infinity in a tensor, or a sum beyond
            the range of `out_dtype`.
    """
    if not tensors or len(tensors) != len(weights):
        raise CheckpointError(f"{name}: {len(weights)} weights for {len(tensors)} tensors; give one weight a tensor")
    labels = list(models) if models is not None else [f"model {i}" for i in range(len(tensors))]
    _check_kinds(tensors, weights, out_dtype, name, labels)
    result = torch.empty(tensors[0].shape, dtype=out_dtype)
    problem = _Problem(
        [tensor.detach().reshape(-1) for tensor in tensors], list(weights), result.view(-1), name, labels
    )
    if out_dtype == torch.float64:
        _check_finite(problem, 0, result.numel())
        _recompute(problem, np.arange(result.numel()))
    else:
        _combine_in_chunks(problem)
    return result


def task_arithmetic(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    out_dtype: torch.dtype,
    name: str = "tensor",
    base_model: str = "base model",
    models: Sequence[str] | None = None,
) -> Tensor:
    """θ₀ + Σ λᵢ(θᵢ − θ₀), computed as (1 − Σλᵢ)θ₀ + Σ λᵢθᵢ and rounded once.

    Follows Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023; a negative λᵢ negates a task.

    Args:
        base: θ₀.
        tensors: θᵢ, N ≥ 1 tensors of the base's shape.
        weights: λᵢ.
        out_dtype: See `linear_combination`.
        name: What the tensor is called, for messages.
        base_model: What the base model is called, for messages.
        models: What the N models are called, for messages.

    Returns:
        A new tensor of `out_dtype`.

    Raises:
        CheckpointError: See `linear_combination`.
    """
    labels = list(models) if models is not None else [f"model {i}" for i in range(len(tensors))]
    return linear_combination(
        [base, *tensors],
        [base_weight(weights), *weights],
        out_dtype=out_dtype,
        name=name,
        models=[base_model, *labels],
    )


def base_weight(weights: Sequence[float]) -> float:
    """What task arithmetic leaves of the base: 1 − Σλᵢ, rounded once."""
    return math.fsum([1.0, *(-weight for weight in weights)])


@dataclass(frozen=True)
class _Problem:
    """What is combined into what, flattened; and what everything is called."""

    columns: list[Tensor]
    weights: list[float]
    result_n: Tensor
    name: str
    labels: list[str]


def _check_kinds(
    tensors: Sequence[Tensor], weights: Sequence[float], out_dtype: torch.dtype, name: str, labels: Sequence[str]
) -> None:
    known = ", ".join(str(dtype).removeprefix("torch.") for dtype in SIGNIFICAND_BITS)
    if out_dtype not in SIGNIFICAND_BITS:
        raise CheckpointError(f"{name}: cannot write a merged tensor as {out_dtype}; choose one of {known}")
    for tensor, weight, label in zip(tensors, weights, labels, strict=True):
        if tensor.dtype not in SIGNIFICAND_BITS:
            raise CheckpointError(
                f"{name} of {label}: {tensor.dtype} cannot be combined linearly (only {known}); "
                "convert the checkpoint to one of these first"
            )
        if tensor.shape != tensors[0].shape:
            raise CheckpointError(
                f"{name}: {label} has shape {tuple(tensor.shape)}, {labels[0]} has {tuple(tensors[0].shape)}; "
                "only models of one architecture and size can be merged"
            )
        if not math.isfinite(weight):
            raise CheckpointError(f"{name}: the weight of {label} is {weight}; weights must be finite numbers")


def _combine_in_chunks(problem: _Problem) -> None:
    out_dtype = problem.result_n.dtype
    work_dtype = torch.float64 if out_dtype == torch.float32 else torch.float32
    exact = _products_are_exact(problem.columns, problem.weights, work_dtype)
    round_chunk = _round_where_sum_is_exact if exact else _round_where_bracket_agrees
    largest = torch.finfo(out_dtype).max
    size = problem.result_n.numel()
    chunk = max(1, min(size, _CHUNK_PER_THREAD * torch.get_num_threads()))
    scratch_sc = torch.empty(4, chunk, dtype=work_dtype)
    waiting: list[np.ndarray] = []
    for start in range(0, size, chunk):
        stop = min(start + chunk, size)
        columns = [column_n[start:stop] for column_n in problem.columns]
        scratch = [scratch_c[: stop - start] for scratch_c in scratch_sc]
        doubtful, greatest = round_chunk(columns, problem.weights, problem.result_n[start:stop], scratch)
        if not greatest <= largest:
            _check_finite(problem, start, stop)
            doubtful = np.arange(stop - start)
        if len(doubtful):
            waiting.append(doubtful + start)
        if sum(map(len, waiting)) >= _RECOMPUTE_AT_ONCE:
            _recompute(problem, np.concatenate(waiting))
            waiting = []
    if waiting:
        _recompute(problem, np.concatenate(waiting))


def _round_where_bracket_agrees(
    columns: Sequence[Tensor], weights: Sequence[float], result_c: Tensor, scratch: Sequence[Tensor]
) -> tuple[np.ndarray, float]:
    """Any weights: brackets the sum by a bound on the error of the computed one.

    With u the unit roundoff of the working precision, the conversion of an element and of its weight, their product,
    N − 1 additions, the error bound's own arithmetic and the ends of the bracket contribute at most u·Σ|wᵢ||tᵢ| each.

    Returns:
        Where the two ends of the bracket round to different numbers, and the greatest absolute value in the chunk
        (NaN if there is one).
    """
    value_c, sum_c, error_c, high_c = scratch
    factor = (len(columns) + 6) * torch.finfo(value_c.dtype).eps / 2
    for i, (column_c, weight) in enumerate(zip(columns, weights, strict=True)):
        value_c.copy_(column_c)
        if i == 0:
            torch.mul(value_c, weight, out=sum_c)
            torch.mul(value_c.abs_(), factor * abs(weight), out=error_c)
        else:
            sum_c.add_(value_c, alpha=weight)
            error_c.add_(value_c.abs_(), alpha=factor * abs(weight))
    if underflow := _underflow(columns, weights, value_c.dtype):
        error_c.add_(underflow)
    torch.add(sum_c, error_c, out=high_c)
    greatest = _greatest(high_c)
    rounded_c = result_c.copy_(high_c).clone()
    result_c.copy_(sum_c.sub_(error_c))

    integers = torch.int16 if result_c.element_size() == 2 else torch.int32
    doubtful = np.flatnonzero(result_c.view(integers).numpy() != rounded_c.view(integers).numpy())
    if len(doubtful):
        # +0 and −0 are one number; without this every zero of a pruned model would be computed again.
        index_k = torch.from_numpy(doubtful)
        doubtful = doubtful[(result_c[index_k] != rounded_c[index_k]).numpy()]
    return doubtful, greatest


def _round_where_sum_is_exact(
    columns: Sequence[Tensor], weights: Sequence[float], result_c: Tensor, scratch: Sequence[Tensor]
) -> tuple[np.ndarray, float]:
    """Weights whose products with the elements are exact: looks at the error of every addition (two-sum).

    Returns:
        Where an addition lost something, and the greatest absolute value in the chunk (NaN if there is one).
    """
    value_c, sum_c, previous_c, part_c = scratch
    torch.mul(sum_c.copy_(columns[0]), weights[0], out=sum_c)
    doubtful = []
    for column_c, weight in zip(columns[1:], weights[1:], strict=True):
        value_c.copy_(column_c).mul_(weight)
        sum_c, previous_c = previous_c, sum_c
        torch.add(previous_c, value_c, out=sum_c)
        torch.sub(sum_c, previous_c, out=part_c)
        value_c.sub_(part_c)
        previous_c.sub_(torch.sub(sum_c, part_c, out=part_c))
        lost_c = value_c.add_(previous_c)
        doubtful.append(np.flatnonzero(lost_c.numpy() != 0))
    result_c.copy_(sum_c)
    return np.unique(np.concatenate(doubtful)) if doubtful else np.arange(0), _greatest(sum_c)


def _products_are_exact(columns: Sequence[Tensor], weights: Sequence[float], work_dtype: torch.dtype) -> bool:
    """Whether the product of every weight with every element of its tensor is a number of the working precision."""
    smallest = _smallest(work_dtype)
    for column, weight in zip(columns, weights, strict=True):
        if weight == 0:
            continue
        numerator, denominator = abs(weight).as_integer_ratio()
        last_bit = (numerator & -numerator) / denominator
        bits = (numerator // (numerator & -numerator)).bit_length()
        product_bits = SIGNIFICAND_BITS[column.dtype] + (bits if bits > 1 else 0)
        if product_bits > SIGNIFICAND_BITS[work_dtype] or last_bit * _smallest(column.dtype) < smallest:
            return False
        if abs(weight) > 2.0**64:
            return False
    return True


def _underflow(columns: Sequence[Tensor], weights: Sequence[float], work_dtype: torch.dtype) -> float:
    """What products may lose below the range of the working precision, in total; 0 if they stay above it."""
    normal = torch.finfo(work_dtype).smallest_normal
    terms = list(zip(columns, weights, strict=True))
    if all(weight == 0 or abs(weight) * _smallest(column.dtype) > 2.0**40 * normal for column, weight in terms):
        return 0.0
    return (2 * len(terms) + 2) * _smallest(work_dtype) * max(1.0, *map(abs, weights))


def _smallest(dtype: torch.dtype) -> float:
    """The smallest positive number of a type; all its numbers are multiples of it."""
    limits = torch.finfo(dtype)
    return limits.smallest_normal * limits.eps


def _greatest(values_c: Tensor) -> float:
    least, most = (extreme.item() for extreme in torch.aminmax(values_c))
    return max(-least, most) if least == least else math.nan


def _check_finite(problem: _Problem, start: int, stop: int) -> None:
    """Raises an error that names the model in which a chunk has a NaN or an infinity, if one has."""
    for column_n, label in zip(problem.columns, problem.labels, strict=True):
        if not torch.isfinite(column_n[start:stop]).all():
            raise CheckpointError(not_finite(column_n, problem.name, label))


def not_finite(tensor: Tensor, name: str, model: str) -> str:
    """The message about a tensor that has NaN or infinite elements."""
    finite = torch.isfinite(tensor).flatten()
    return (
        f"{name} of {model}: {int((~finite).sum())} of {tensor.numel()} elements are NaN or infinite, the first at "
        f"flat index {int((~finite).nonzero()[0])}; the file is damaged or the training diverged: use another "
        "checkpoint or revision"
    )


def _recompute(problem: _Problem, elements: np.ndarray) -> None:
    """Computes elements, all finite in every model, without error and puts them in their places."""
    for start in range(0, len(elements), _RECOMPUTE_AT_ONCE):
        index_k = torch.from_numpy(elements[start : start + _RECOMPUTE_AT_ONCE])
        columns = [column_n[index_k] for column_n in problem.columns]
        sums_k = exact_combination(columns, problem.weights, problem.result_n.dtype)
        if not torch.isfinite(sums_k).all():
            at = int((~torch.isfinite(sums_k)).nonzero()[0])
            value = sum(weight * column_k[at].item() for column_k, weight in zip(columns, problem.weights, strict=True))
            raise CheckpointError(
                f"{problem.name}: the merged value {value:.6g} is beyond the range of "
                f"{str(sums_k.dtype).removeprefix('torch.')} (±{torch.finfo(sums_k.dtype).max:.6g}); "
                "set out_dtype to bfloat16 or float32, or lower the weights"
            )
        problem.result_n[index_k] = sums_k
