"""Changes of low rank, merged in the subspace that they span together, and changes of any rank made thin.

The factors of all changes stand side by side, B = [B₁ B₂ …] = Q_B R_B and Aᵀ = [A₁ᵀ A₂ᵀ …] = Q_A R_A. The change of
model i is then Q_B C_i Q_Aᵀ with a small core C_i = R_B,i R_A,iᵀ. What merges cores so that rotated changes give the
rotated result (`Sees.SUBSPACE`) merges the changes: nothing of the size of a weight is made.

Shape suffixes: `e` experts, `o` and `i` rows and columns of a weight, `r` rank, `k` all ranks together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_llfc.checkpoints.low_rank import LowRank

NOISE = 2.0**-23
"""Relative error of a weight that counts as none: rounding of float32."""

KRYLOV = 10
"""Products with AᵀA whose blocks are searched together; more of them tell close singular values apart better."""

OVERSAMPLING = 8
"""Directions of a block beyond the rank."""

SMALL = 512
"""Matrices whose shorter side is at most this are decomposed whole, which is as quick."""

SHARE = 1 / 8
"""The same where more than this share of all directions is asked for."""


@dataclass(frozen=True)
class RankChoice:
    """Which rank a change gets.

    Attributes:
        rank: At most this; the smallest that keeps the change where None.
        error: Relative error that a change may have; rounding of float32 where nobody says more.
    """

    rank: int | None = None
    error: float = NOISE

    def of(self, values_k: Tensor) -> int:
        """How many of the singular values, descending, are kept; at least one."""
        squares_k = values_k.double().square()
        tail_k = squares_k.flip(0).cumsum(0).flip(0)
        kept = int((tail_k > self.error**2 * tail_k[:1]).sum())
        return max(1, kept if self.rank is None else min(kept, self.rank))


@dataclass(frozen=True)
class Thin:
    """A change in thin factors.

    Attributes:
        change: The factors.
        size: Norm of the change as it was.
        error: Norm of what the factors lack of it.
    """

    change: LowRank
    size: float
    error: float


def merge_in_subspace(
    changes: Sequence[LowRank | None], merge: Callable[[list[Tensor]], Tensor], choice: RankChoice
) -> Thin | None:
    """Merges changes of low rank, exactly but for the rank that is chosen.

    Args:
        changes: One a model; None of a model that leaves the weight alone. At least one is there.
        merge: Merges square matrices, one a model, in float64, so that rotated ones give the rotated result, and zero
            rows and columns change nothing.
        choice: The rank.

    Returns:
        The factors; None where the subspace has no room in the weight for what `merge` may need, and dense changes are
        as small.
    """
    present = [change for change in changes if change is not None]
    widest = max(change.rank for change in present)
    sides = (present[0].left_eor.shape[1], present[0].right_eri.shape[2])
    side = max(2, len(changes) * widest)
    if side > min(sides):
        return None
    left_eok, of_left = _joined([change.left_eor for change in present])
    right_eik, of_right = _joined([change.right_eri.mT for change in present])
    cores = iter([left_ekr @ right_ekr.mT for left_ekr, right_ekr in zip(of_left, of_right, strict=True)])
    room = (len(left_eok), side, side)
    padded = [_padded(next(cores), room) if change is not None else torch.zeros(room).double() for change in changes]
    merged = torch.stack([merge(list(of_expert)) for of_expert in zip(*padded, strict=True)])
    width = left_eok.shape[-1]
    outer, values_ek, inner = torch.linalg.svd(merged[:, :width, :width])
    kept = max(choice.of(values_k) for values_k in values_ek)
    root_e1r = values_ek[:, None, :kept].sqrt()
    change = LowRank((left_eok @ outer[..., :kept]) * root_e1r, (right_eik @ inner.mT[..., :kept] * root_e1r).mT)
    return Thin(change, float(values_ek.norm()), float(values_ek[:, kept:].norm()))


def thin(change_eoi: Tensor, choice: RankChoice, seed: int = 0) -> Thin:
    """The best factors of a change of any rank.

    Args:
        change_eoi: One matrix an expert.
        choice: The rank.
        seed: Of a search for the leading directions.
    """
    found = [_leading(change_oi, choice, seed) for change_oi in change_eoi]
    kept = max(left_or.shape[1] for left_or, _ in found)
    left_eor = torch.stack([_padded(left_or, (left_or.shape[0], kept)) for left_or, _ in found])
    right_eri = torch.stack([_padded(right_ri, (kept, right_ri.shape[1])) for _, right_ri in found])
    change = LowRank(left_eor, right_eri)
    size = float(torch.linalg.vector_norm(change_eoi, dtype=torch.float64))
    return Thin(change, size, distance(change_eoi, change))


def distance(change_eoi: Tensor, factors: LowRank) -> float:
    """The norm of what factors lack of a change, one matrix at a time."""
    parts = [
        float(torch.linalg.vector_norm(change_oi - left_or.to(change_oi) @ right_ri.to(change_oi), dtype=torch.float64))
        for change_oi, left_or, right_ri in zip(change_eoi, factors.left_eor, factors.right_eri, strict=True)
    ]
    return math.hypot(*parts)


def difference(one: LowRank, other: LowRank) -> float:
    """The norm of the difference of two products, by their factors."""
    left = torch.cat([one.left_eor.double(), other.left_eor.double()], dim=-1)
    right = torch.cat([one.right_eri.double(), -other.right_eri.double()], dim=-2)
    return float((torch.linalg.qr(left).R @ torch.linalg.qr(right.mT).R.mT).norm())


def _joined(factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Orthonormal columns that span those of all factors, and the coordinates of each factor in them."""
    basis, coordinates = torch.linalg.qr(torch.cat([factor.double() for factor in factors], dim=-1))
    return basis, list(coordinates.split([factor.shape[-1] for factor in factors], dim=-1))


def _padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor in the corner of zeros."""
    room = tensor.new_zeros(tuple(shape))
    room[tuple(slice(size) for size in tensor.shape)] = tensor
    return room


def _leading(change_oi: Tensor, choice: RankChoice, seed: int) -> tuple[Tensor, Tensor]:
    """The two factors of one matrix."""
    is_long = change_oi.shape[0] >= change_oi.shape[1]
    matrix_ls = change_oi if is_long else change_oi.T
    side = matrix_ls.shape[1]
    if choice.rank is not None and side > SMALL and choice.rank < SHARE * side:
        right_sk = _krylov(matrix_ls, choice.rank, seed)
    else:
        from hf_llfc.merging.methods.decompositions import singular  # a merge of weights alone does not wait for scipy

        found = singular(lambda: iter([matrix_ls.double()]), side, side, exact_size=side, seed=seed)
        right_sk = found.right_ks.T.to(matrix_ls.dtype)
    left_lk = matrix_ls @ right_sk
    values_k = left_lk.norm(dim=0)
    if not len(values_k):  # nothing changed
        left_lk, right_sk, values_k = (left_lk.new_zeros(size) for size in ((len(matrix_ls), 1), (side, 1), (1,)))
    kept = choice.of(values_k) if choice.rank is None else min(choice.rank, len(values_k))
    root_k = values_k[:kept].sqrt()
    long_lr, short_sr = left_lk[:, :kept] / root_k.clamp_min(1e-30), right_sk[:, :kept] * root_k
    return (long_lr, short_sr.T) if is_long else (short_sr, long_lr.T)


def _krylov(matrix_ls: Tensor, rank: int, seed: int) -> Tensor:
    """The leading right singular vectors, as columns, by a block Krylov search: Musco and Musco, NeurIPS 2015.

    Its error is within a factor of 1 + ε of the least of that rank after O(log(s)/√ε) products, whatever the gaps
    between singular values; powers of the matrix alone need O(log(s)/ε).
    """
    generator = torch.Generator().manual_seed(seed)
    side, width = matrix_ls.shape[1], rank + OVERSAMPLING
    block_sk = torch.randn(side, width, generator=generator, dtype=matrix_ls.dtype)
    blocks = []
    for _ in range(min(KRYLOV, side // width)):
        block_sk = torch.linalg.qr(matrix_ls.T @ (matrix_ls @ block_sk)).Q
        blocks.append(block_sk)
    basis_sk = torch.linalg.qr(torch.cat(blocks, dim=1)).Q
    image_lk = (matrix_ls @ basis_sk).double()
    _, vectors_kk = torch.linalg.eigh(image_lk.T @ image_lk)
    return basis_sk @ vectors_kk[:, -rank:].flip(1).to(basis_sk)
