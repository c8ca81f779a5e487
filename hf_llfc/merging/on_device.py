"""Linear combinations on an accelerator, bit for bit those of `hf_llfc.merging.combination`.

Every operation is one of IEEE 754 on float64 and a kernel of its own, so that none is fused with the next; an
accelerator then gives what the processor gives. Numbers are moved in the types in which they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_llfc.merging.combination import HALVES, Combination


class DeviceScratch:
    """Combines tensors of the CPU on a device; may be shared by threads.

    Args:
        device: An accelerator that has float64.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def combine(self, combination: Combination, columns: Sequence[Tensor], result_n: Tensor) -> bool:
        """What `Scratch.combine` does; there is no result at all where it would not be finite."""
        sum_n = self._sum(combination, columns)
        half = HALVES.get(result_n.dtype)
        if half is None:
            rounded_n = sum_n.to(result_n.dtype)
        else:
            product_n = sum_n * half.splitter
            rounded_n = (product_n - (product_n - sum_n)).to(result_n.dtype)
            multiple_n = torch.round(sum_n / half.unit) * half.unit
            is_tiny_n = sum_n.abs() <= torch.finfo(result_n.dtype).smallest_normal
            rounded_n = torch.where(is_tiny_n, multiple_n.to(result_n.dtype), rounded_n)
        if not bool(torch.isfinite(rounded_n).all()):
            return False
        result_n.copy_(rounded_n)
        return True

    def _sum(self, combination: Combination, columns: Sequence[Tensor]) -> Tensor:
        first_n, *others = (column.to(self.device).double() for column in columns)
        if not combination.over_base:
            sum_n = first_n * combination.weights[0]
            for other_n, weight in zip(others, combination.weights[1:], strict=True):
                sum_n = sum_n + other_n * weight
            return sum_n
        sum_n = first_n
        for other_n, weight in zip(others, combination.weights, strict=True):
            sum_n = sum_n + (other_n - first_n) * weight
        return sum_n
