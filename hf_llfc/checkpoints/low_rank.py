"""A matrix, or one matrix an expert, as the product of two thin ones.

Shape suffixes: `e` experts, 1 of an ordinary weight; `o` rows and `i` columns of a weight as it is stored, `r` rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """What is added to a weight, in factors.

    Attributes:
        left_eor: The left factors.
        right_eri: The right factors.
    """

    left_eor: Tensor
    right_eri: Tensor

    @property
    def rank(self) -> int:
        """Columns of the left factors."""
        return self.left_eor.shape[-1]

    @property
    def transposed(self) -> LowRank:
        """The factors of the transposed matrices."""
        return LowRank(self.right_eri.mT, self.left_eor.mT)

    def product(self) -> Tensor:
        """The matrices themselves, in float64: e × o × i."""
        return self.left_eor.double() @ self.right_eri.double()
