"""Singular vectors of task vectors, made orthogonal or equally strong: `tsv_m`, `iso_c`, `iso_cts`.

The singular vectors are those of τᵢ = θᵢ − θ₀ as a matrix (outputs × inputs); kernels of convolutions are outputs ×
the rest. Vectors, and tensors with one row or column, get the mean of the τᵢ, as in the papers. Everything is computed
in float64. Directions whose singular value is rounding only (2⁻²³ of the largest) are left out, where the papers' code
keeps arbitrary vectors for them; it matters for task vectors of low rank, and for equal models.

Shape suffixes: `k` singular values, `rs` some rows of the longer side of a matrix and its shorter side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_llfc.merging.methods.decompositions import Singular, between_polar_factors, gram, inverse_root, singular
from hf_llfc.merging.methods.matrices import Tasks, merged_change, total_of
from hf_llfc.merging.methods.parts import Prepared, Stream
from hf_llfc.merging.methods.settings import Settings

FromBlocks = Callable[[list[Tensor]], Tensor]
"""From a block of every task vector to rows that belong to it."""


def tsv_m(stream: Stream, settings: Settings) -> Prepared:
    """θ₀ + λ U⊥ S V⊥ᵀ: the top singular vectors of all task vectors, made orthogonal to each other.

    Of each of the T task vectors the r/T largest singular triples are taken, r the smaller side, at least one; U, S and
    V have them all, and U⊥ is the nearest matrix to U with orthonormal columns, U(UᵀU)^(−½), V⊥ likewise. Gargiulo et
    al., "Task Singular Vectors", CVPR 2025; λ = 1 there. Of equal task vectors the top part itself is left.

    Args:
        stream: The models and the base.
        settings: `lambda`; `exact_size`, see `decompositions.singular`; seed and tensor for randomised searches.

    Returns:
        What merges a part.
    """

    def prepare(tasks: Tasks) -> FromBlocks:
        count = max(1, tasks.side // len(tasks))
        exact_size = settings.count("exact_size")
        found = _Triples(count * len(tasks), tasks.side)
        for index in range(len(tasks)):
            seed = settings.seed_of(index)
            found.add(singular(tasks.blocks_of(index), tasks.side, count, exact_size=exact_size, seed=seed))

        def left(blocks: list[Tensor]) -> Tensor:
            return torch.cat(
                [triples.left(block_rs) for triples, block_rs in zip(found.of_task, blocks, strict=True)], dim=1
            )

        return _orthogonal(tasks, found, left)

    return merged_change(stream, settings, prepare)


def iso_c(stream: Stream, settings: Settings) -> Prepared:
    """θ₀ + λ σ UVᵀ, with USVᵀ = Σ τᵢ and σ the mean of its singular values.

    Marczak et al., "No Task Left Behind", ICML 2025, where λ is chosen on validation data, about 1.3 to 1.5. Always
    exact, because every singular value is needed.

    Args:
        stream: The models and the base.
        settings: `lambda`.

    Returns:
        What merges a part.
    """

    def prepare(tasks: Tasks) -> FromBlocks:
        root_ss, values_k = inverse_root(gram(tasks.blocks_of_sum, tasks.side))
        if values_k.numel():
            root_ss.mul_(float(values_k.mean()))
        return lambda blocks: total_of(blocks) @ root_ss

    return merged_change(stream, settings, prepare)


def iso_cts(stream: Stream, settings: Settings) -> Prepared:
    """`iso_c` with the weakest common directions replaced by directions of single tasks.

    Of the r singular triples of Σ τᵢ the first are common, a share `common_space_fraction` rounded so that the rest can
    be divided among the T tasks; of each τᵢ − U_cU_cᵀτᵢ, with U_c the common left vectors, as many of the largest
    triples follow. All of them are made orthogonal as in `tsv_m`, and all their singular values replaced by the mean.
    Marczak et al., "No Task Left Behind", ICML 2025; the fraction is .8 there.

    Args:
        stream: The models and the base.
        settings: `lambda`, `common_space_fraction`; `exact_size` for the triples of single tasks, see
            `decompositions.singular`; seed and tensor for randomised searches.

    Returns:
        What merges a part.
    """

    def prepare(tasks: Tasks) -> FromBlocks:
        side = tasks.side
        per_task = round((side - int(side * settings.number("common_space_fraction"))) / len(tasks))
        per_task = min(per_task, side // len(tasks))
        exact_size = settings.count("exact_size")
        found = _Triples(side, side)
        common = found.add(singular(tasks.blocks_of_sum, side, side - per_task * len(tasks), exact_size=side, seed=0))
        rests = [_Rest(tasks, index, common) for index in range(len(tasks)) if per_task]
        for index, rest in enumerate(rests):
            seed = settings.seed_of(index)
            triples = singular(rest.blocks(), side, per_task, exact_size=exact_size, seed=seed)
            rest.keep(found.add(triples))

        def left(blocks: list[Tensor]) -> Tensor:
            common_rk = _common(common, blocks)
            of_tasks = [rest.left(block_rs, common_rk) for rest, block_rs in zip(rests, blocks, strict=False)]
            return torch.cat([common_rk, *of_tasks], dim=1)

        return _orthogonal(tasks, found, left, equal=True)

    return merged_change(stream, settings, prepare)


class _Triples:
    """Singular triples whose right vectors are the rows of one matrix."""

    def __init__(self, count: int, side: int) -> None:
        """Begins without any.

        Args:
            count: How many there will be at most.
            side: Length of the right vectors.
        """
        self._room_ks = torch.empty(count, side, dtype=torch.float64)
        self.of_task: list[Singular] = []

    def add(self, found: Singular) -> Singular:
        """Takes triples in; returns them with their right vectors where they now are."""
        first = len(self.values_k)
        rows_ks = self._room_ks[first : first + len(found.values_k)].copy_(found.right_ks)
        self.of_task.append(replace(found, right_ks=rows_ks))
        return self.of_task[-1]

    @property
    def values_k(self) -> Tensor:
        """All singular values, a new tensor."""
        return torch.cat([self._room_ks.new_empty(0), *(triples.values_k for triples in self.of_task)])

    @property
    def right_ks(self) -> Tensor:
        """All right vectors."""
        return self._room_ks[: len(self.values_k)]


class _Rest:
    """What a task vector has beside the common directions: τ − U_cU_cᵀτ, with U_c as many outputs long as τ.

    Blocks have the shorter side in their rows. If that side is the inputs, U_cᵀτ is found in a pass; if it is the
    outputs, the blocks are those of τᵀ, whose rows are multiplied by I − U_cU_cᵀ.
    """

    def __init__(self, tasks: Tasks, index: int, common: Singular) -> None:
        """Reads nothing yet.

        Args:
            tasks: The task vectors.
            index: Which of them.
            common: The triples of the common directions.
        """
        self._tasks = tasks
        self._index = index
        self._common = common
        self._share_ks: Tensor | None = None
        self._share_kk: Tensor | None = None
        self._triples: Singular | None = None

    def blocks(self) -> Callable[[], Iterator[Tensor]]:
        """The rest in blocks."""
        if not self._tasks.is_tall:
            of_task = self._tasks.blocks_of(self._index)
            return lambda: (
                block_rs.sub_((block_rs @ self._common.right_ks.T) @ self._common.right_ks) for block_rs in of_task()
            )
        crossed_ss = torch.zeros(self._tasks.side, self._tasks.side, dtype=torch.float64)
        for blocks in self._tasks.blocks():
            own_rs = blocks[self._index].clone()
            crossed_ss.addmm_(total_of(blocks).T, own_rs)
        share_ks = self._share_ks = (self._common.right_ks @ crossed_ss).div_(self._common.values_k[:, None])
        del crossed_ss
        return lambda: (
            blocks[self._index].addmm_(_common(self._common, blocks), share_ks, alpha=-1)
            for blocks in self._tasks.blocks()
        )

    def keep(self, triples: Singular) -> None:
        """Keeps the rest's triples, and of U_cᵀτ its products with their right vectors."""
        self._triples = triples
        if self._share_ks is not None:
            self._share_kk, self._share_ks = self._share_ks @ triples.right_ks.T, None

    def left(self, block_rs: Tensor, common_rk: Tensor) -> Tensor:
        """Rows of the left vectors, from a block of the task vector and the rows of U_c, or of V_c, beside it."""
        assert self._triples is not None, "left vectors follow the right ones"
        if self._share_kk is None:
            common_ks = self._common.right_ks
            return self._triples.left(block_rs - (block_rs @ common_ks.T) @ common_ks)
        left_rk = block_rs @ self._triples.right_ks.T
        return left_rk.addmm_(common_rk, self._share_kk, alpha=-1).div_(self._triples.values_k)


def _common(common: Singular, blocks: Sequence[Tensor]) -> Tensor:
    """Rows of the common vectors of the longer side; the blocks keep their values."""
    return common.left(total_of([blocks[0].clone(), *blocks[1:]]))


def _orthogonal(tasks: Tasks, found: _Triples, left: FromBlocks, *, equal: bool = False) -> FromBlocks:
    """U⊥ S V⊥ᵀ of all triples together, block by block.

    Args:
        tasks: The task vectors.
        found: The triples.
        left: From a block of every task vector to the same rows of all left vectors.
        equal: Whether all singular values are replaced by their mean.
    """
    values_k = found.values_k
    if not values_k.numel():
        return lambda blocks: torch.zeros_like(blocks[0])
    if equal:
        values_k.fill_(float(values_k.mean()))
    core_ks = between_polar_factors(lambda: map(left, tasks.blocks()), values_k, found.right_ks)
    return lambda blocks: left(blocks) @ core_ks
