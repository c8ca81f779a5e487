"""Exact weighted sums, rounded once: the path that `linear_combination` takes for the elements in doubt.

Every product of a weight and an element is split into parts that are exact in float64. The parts are added with the
error of each addition kept (Knuth's two-sum), as a total and a rest. The sum is then brought to the storage type by
rounding to odd in every format on the way, which makes the last rounding the only one that counts (Boldo and
Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE Transactions
on Computers, 2008).

NumPy does the arithmetic, because its calls on a few thousand elements cost a fraction of PyTorch's.

Shape suffix: `k` the elements in question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

SIGNIFICAND_BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
"""Significand bits of every type that a merge reads or writes, the hidden one included."""

# Outside this range of magnitudes a part of a product could leave the range of float64.
_SMALLEST_SAFE, _LARGEST_SAFE = 2.0**-400, 2.0**400


def exact_combination(columns: Sequence[Tensor], weights: Sequence[float], out_dtype: torch.dtype) -> Tensor:
    """Σ weights[i]·columns[i] in exact arithmetic, rounded once, ties to even.

    Args:
        columns: One tensor of `k` finite numbers a model, of types in `SIGNIFICAND_BITS`.
        weights: As many finite numbers, taken as the float64 they are.
        out_dtype: Type of the result, one of `SIGNIFICAND_BITS`.

    Returns:
        The `k` correctly rounded sums; ±inf where they leave the range of `out_dtype`.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return _exact_combination(columns, weights, out_dtype)


def _exact_combination(columns: Sequence[Tensor], weights: Sequence[float], out_dtype: torch.dtype) -> Tensor:
    values = [column.to(torch.float64).numpy() for column in columns]
    large, small = _exact_products(values, weights, [column.dtype == torch.float64 for column in columns])
    total_k = large[0]
    for part_k in large[1:]:
        total_k, error_k = _two_sum(total_k, part_k)
        small.append(error_k)
    rest_k, slack_k = np.zeros_like(total_k), np.zeros_like(total_k)
    for part_k in small:
        rest_k, error_k = _two_sum(rest_k, part_k)
        slack_k += np.abs(error_k)
    total_k, rest_k = _two_sum(total_k, rest_k)

    # total + rest lacks no more than the slack. That matters where it leaves the sign of the rest open and, for
    # float64, where the rest may be half a unit in the last place.
    slack_k *= 2
    doubtful_k = (slack_k > 0) & (np.abs(rest_k) <= slack_k)
    if out_dtype == torch.float64:
        unit_k = np.spacing(np.abs(total_k))
        for boundary in (0.5, 0.25):
            doubtful_k |= (slack_k > 0) & (np.abs(np.abs(rest_k) - boundary * unit_k) <= slack_k)
    for index in np.flatnonzero(doubtful_k | _leaves_safe_range(columns, weights)):
        terms = [Fraction(weight) * Fraction(value_k[index]) for weight, value_k in zip(weights, values, strict=True)]
        total_k[index], rest_k[index] = _nearest_and_rest(sum(terms, Fraction(0)))
    return round_once(total_k, rest_k, out_dtype)


def round_once(total_k: np.ndarray, rest_k: np.ndarray, out_dtype: torch.dtype) -> Tensor:
    """Rounds total + rest to `out_dtype`, to nearest, ties to even, without a second rounding on the way.

    Args:
        total_k: float64; the float64 nearest to the exact value.
        rest_k: float64 with the sign of exact value − total; its size is not used.
        out_dtype: One of `SIGNIFICAND_BITS`.

    Returns:
        `k` numbers of `out_dtype`.
    """
    if out_dtype == torch.float64:
        return torch.from_numpy(total_k)
    odd_k = _round_to_odd(total_k, rest_k)
    single_k = odd_k.astype(np.float32)
    if out_dtype != torch.float32:
        # PyTorch converts float64 to the half types through float32: that step must round to odd as well.
        single_k = _round_to_odd(single_k, odd_k - single_k)
    return torch.from_numpy(single_k).to(out_dtype)


def _round_to_odd(value_k: np.ndarray, rest_k: np.ndarray) -> np.ndarray:
    """From the nearest number to the one whose last bit is odd, of the two around value + rest."""
    integers = np.int64 if value_k.dtype == np.float64 else np.int32
    bits_k: np.ndarray = value_k.view(integers)
    step_k = np.where((rest_k > 0) == (bits_k >= 0), integers(1), integers(-1))
    step_k[(rest_k == 0) | ((bits_k & 1) == 1)] = 0
    odd_k: np.ndarray = (bits_k + step_k).view(value_k.dtype)
    return odd_k


def _two_sum(x_k: np.ndarray, y_k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rounded sum and its error, which is exact (Knuth)."""
    sum_k = x_k + y_k
    part_k = sum_k - x_k
    error_k = x_k - (sum_k - part_k)
    error_k += y_k - part_k
    return sum_k, error_k


def _exact_products(
    values: Sequence[np.ndarray], weights: Sequence[float], wide: Sequence[bool]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Parts without error that add up to the weighted sum: one large part a model, and the small ones."""
    large, small = [], []
    for value_k, weight, is_wide in zip(values, weights, wide, strict=True):
        high, low = _halves(weight)
        if is_wide:
            scaled_k = value_k * (2.0**27 + 1)  # Veltkamp's split into 26 and 27 bits
            high_k = scaled_k - (scaled_k - value_k)
            low_k = value_k - high_k
            large.append(high * high_k)
            small += [high * low_k, low * high_k, low * low_k]
        else:
            large.append(high * value_k)
            small += [low * value_k] if low else []
    return large, small


def _halves(number: float) -> tuple[float, float]:
    """A number as the sum of two that have at most 26 significant bits each."""
    significand, exponent = math.frexp(number)
    high = math.ldexp(round(math.ldexp(significand, 26)), exponent - 26)
    return high, number - high


def _leaves_safe_range(columns: Sequence[Tensor], weights: Sequence[float]) -> np.ndarray:
    """Where a part of a product may overflow or underflow; elements of the narrower types alone never do."""
    unsafe_k = np.zeros(len(columns[0]), dtype=bool)
    for column_k, weight in zip(columns, weights, strict=True):
        if weight != 0 and not _SMALLEST_SAFE < abs(weight) < _LARGEST_SAFE:
            unsafe_k[:] = True
        if column_k.dtype == torch.float64:
            magnitude_k = np.abs(column_k.numpy())
            unsafe_k |= (magnitude_k > _LARGEST_SAFE) | ((magnitude_k < _SMALLEST_SAFE) & (magnitude_k > 0))
    return unsafe_k


def _nearest_and_rest(exact: Fraction) -> tuple[float, float]:
    """The float64 nearest to an exact value, and a number with the sign of what it lacks."""
    try:
        nearest = float(exact)
    except OverflowError:
        return math.copysign(math.inf, exact), 0.0
    lack = exact - Fraction(nearest)
    return nearest, float((lack > 0) - (lack < 0))
