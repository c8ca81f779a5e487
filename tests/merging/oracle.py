"""What a correctly rounded sum is, from rational numbers and the definition of rounding alone."""

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SIGNIFICAND_BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def linear(values: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted sum in Python's float64, in order."""
    total = weights[0] * values[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total += weight * value
    return total


def task(values: Sequence[float], weights: Sequence[float]) -> float:
    """Task arithmetic in Python's float64, the base first."""
    total = base = values[0]
    for value, weight in zip(values[1:], weights, strict=True):
        total += weight * (value - base)
    return total


def is_nearest(rounded: Tensor, exact: Fraction) -> bool:
    """Whether no neighbour in the type lies nearer, and of two equally near ones the even one was taken."""
    bits = rounded.reshape(1).view(INTEGERS[rounded.element_size()])
    distance = abs(Fraction(rounded.item()) - exact)
    for step in (-1, 1):
        # One more or less in the bits is the next number of the type; the neighbours of zero are its smallest ones.
        neighbour = (bits + step).view(rounded.dtype).item() if rounded.item() else step * smallest(rounded.dtype)
        if neighbour != neighbour or abs(neighbour) == float("inf"):
            continue
        other = abs(Fraction(neighbour) - exact)
        if other < distance or (other == distance and int(bits) & 1):
            return False
    return True


def smallest(dtype: torch.dtype) -> float:
    limits = torch.finfo(dtype)
    return limits.smallest_normal * limits.eps


def wrongly_rounded(result: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], total=linear) -> list[str]:
    """Every element that is not the correctly rounded float64 sum, with what it was made from."""
    rows = zip(*(tensor.flatten().tolist() for tensor in tensors), strict=True)
    return [
        f"{weights} of {row} is {total(row, weights)}, not {value.item()}"
        for row, value in zip(rows, result.flatten(), strict=True)
        if not is_nearest(value, Fraction(total(row, weights)))
    ]
