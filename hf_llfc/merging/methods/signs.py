"""Which sign an element of a merge has, and what agrees with it.

Shape suffix: `c` some elements of a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def total(changes: Sequence[Tensor]) -> Tensor:
    """Σ of the changes, in this order, in the memory of the first one."""
    summed_c = changes[0]
    for change in changes[1:]:
        summed_c.add_(change)
    return summed_c


def elect_signs(changes: Sequence[Tensor]) -> Tensor:
    """Elects the sign of every element by the sum of the changes; a sum of zero is positive.

    Args:
        changes: One tensor a model, of one shape. Of each is left, in its memory, the magnitude of what has the elected
            sign, and zero elsewhere.

    Returns:
        1 or −1, in a new tensor of that shape.
    """
    sign_c = total([changes[0].clone(), *changes[1:]])
    torch.copysign(sign_c.new_ones(()), sign_c, out=sign_c)  # a negative zero has no change to agree with
    for change in changes:
        change.mul_(sign_c).clamp_(min=0)
    return sign_c
