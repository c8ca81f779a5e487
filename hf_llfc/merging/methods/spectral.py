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

from hf_llfc.merging.methods.decompositions import Singular, gram, inverse_root, singular
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
        found = [
            singular(
                tasks.blocks_of(index),
                tasks.side,
                count,
                exact_size=settings.count("exact_size"),
                seed=settings.seed_of(index),
            )
            for index in range(len(tasks))
        ]

        def left(blocks: list[Tensor]) -> Tensor:
            return torch.cat([triples.left(block_rs) for triples, block_rs in zip(found, blocks, strict=True)], dim=1)

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
        common = singular(tasks.blocks_of_sum, side, side - per_task * len(tasks), exact_size=side, seed=0)
        if not per_task:
            return _orthogonal(tasks, [common], lambda blocks: common.left(total_of(blocks)), equal=True)
        rest = _Rest(tasks, common)
        found = [common]
        for index in range(len(tasks)):
            exact_size, seed = settings.count("exact_size"), settings.seed_of(index)
            found.append(singular(rest.blocks_of(index), side, per_task, exact_size=exact_size, seed=seed))

        def left(blocks: list[Tensor]) -> Tensor:
            common_rk = rest.common(blocks)
            of_tasks = [
                triples.left(rest.of_task(index, block_rs, common_rk))
                for index, (triples, block_rs) in enumerate(zip(found[1:], blocks, strict=True))
            ]
            return torch.cat([common_rk, *of_tasks], dim=1)

        return _orthogonal(tasks, found, left, equal=True)

    return merged_change(stream, settings, prepare)


class _Rest:
    """What every task vector has beside the common directions: τᵢ − U_cU_cᵀτᵢ, with U_c as many outputs long as τᵢ.

    Blocks have the shorter side in their rows. If that side is the inputs, U_cᵀτᵢ is found in a pass; if it is the
    outputs, the blocks are those of τᵢᵀ, whose rows are multiplied by I − U_cU_cᵀ.
    """

    def __init__(self, tasks: Tasks, common: Singular) -> None:
        self._tasks = tasks
        self._common = common
        self._shares_ks: list[Tensor] = []
        if tasks.is_tall:
            self._shares_ks = [torch.zeros_like(common.right_ks) for _ in range(len(tasks))]
            for blocks in tasks.blocks():
                common_rk = self.common(blocks)
                for share_ks, block_rs in zip(self._shares_ks, blocks, strict=True):
                    share_ks.addmm_(common_rk.T, block_rs)

    def common(self, blocks: Sequence[Tensor]) -> Tensor:
        """Rows of the common vectors of the longer side; the first block keeps its values."""
        return self._common.left(total_of([blocks[0].clone(), *blocks[1:]]))

    def of_task(self, index: int, block_rs: Tensor, common_rk: Tensor | None) -> Tensor:
        """A block of the rest, a new tensor, with the rows of the common vectors beside it."""
        if common_rk is not None and self._tasks.is_tall:
            return block_rs - common_rk @ self._shares_ks[index]
        return block_rs - (block_rs @ self._common.right_ks.T) @ self._common.right_ks

    def blocks_of(self, index: int) -> Callable[[], Iterator[Tensor]]:
        """The rest of one task vector in blocks."""
        if not self._tasks.is_tall:
            of_task = self._tasks.blocks_of(index)
            return lambda: (self.of_task(index, block_rs, None) for block_rs in of_task())
        return lambda: (self.of_task(index, blocks[index], self.common(blocks)) for blocks in self._tasks.blocks())


def _orthogonal(tasks: Tasks, found: list[Singular], left: FromBlocks, *, equal: bool = False) -> FromBlocks:
    """U⊥ S V⊥ᵀ of all triples together, block by block.

    Args:
        tasks: The task vectors.
        found: The triples; their vectors come to lie in one matrix.
        left: From a block of every task vector to the same rows of all left vectors.
        equal: Whether all singular values are replaced by their mean.
    """
    values_k = torch.cat([triples.values_k for triples in found])
    if not values_k.numel():
        return lambda blocks: torch.zeros_like(blocks[0])
    if equal:
        values_k.fill_(float(values_k.mean()))
    right_ks = torch.cat([triples.right_ks for triples in found])
    rows = right_ks.split([len(triples.values_k) for triples in found])
    found[:] = [replace(triples, right_ks=rows_ks) for triples, rows_ks in zip(found, rows, strict=True)]
    core_ks = inverse_root(right_ks @ right_ks.T)[0] @ right_ks
    core_ks.mul_(values_k[:, None])
    root_kk, _ = inverse_root(gram(lambda: map(left, tasks.blocks()), len(values_k)))
    core_ks = root_kk @ core_ks
    return lambda blocks: left(blocks) @ core_ks
