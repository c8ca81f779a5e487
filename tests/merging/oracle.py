"""What a correctly rounded weighted sum is, from rational numbers and the definition of rounding alone."""

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def exact_sum(values: Sequence[float], weights: Sequence[float]) -> Fraction:
    return sum((Fraction(w) * Fraction(v) for w, v in zip(weights, values, strict=True)), Fraction(0))


def is_nearest(rounded: Tensor, exact: Fraction) -> bool:
    """Whether no neighbour in the type lies nearer, and of two equally near ones the even one was taken."""
    bits = rounded.reshape(1).view(INTEGERS[rounded.element_size()])
    distance = abs(Fraction(rounded.item()) - exact)
    for step in (-1, 1):
        # Stepping the bits gives both neighbours, except below zero's smallest one, which mirrors the one above.
        neighbour = (
            (bits + step).view(rounded.dtype).item() if int(bits) else torch.tensor(step).item() * smallest(rounded)
        )
        if neighbour != neighbour or abs(neighbour) == float("inf"):
            continue
        other = abs(Fraction(neighbour) - exact)
        if other < distance or (other == distance and int(bits) & 1):
            return False
    return True


def smallest(tensor: Tensor) -> float:
    limits = torch.finfo(tensor.dtype)
    return limits.smallest_normal * limits.eps


def wrongly_rounded(result: Tensor, tensors: Sequence[Tensor], weights: Sequence[float]) -> list[str]:
    """Every element that is not the correctly rounded sum, with what it was made from."""
    flat = [tensor.flatten().tolist() for tensor in tensors]
    return [
        f"{weights}·{[column[i] for column in flat]} -> {value.item()}"
        for i, value in enumerate(result.flatten())
        if not is_nearest(value, exact_sum([column[i] for column in flat], weights))
    ]
