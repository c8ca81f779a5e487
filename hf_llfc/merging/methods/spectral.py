"""Singular vectors of task vectors, made orthogonal or equally strong: `tsv_m`, `iso_c`, `iso_cts`.

The singular vectors are those of τᵢ = θᵢ − θ₀ as a matrix (outputs × inputs); kernels of convolutions are outputs ×
the rest. Vectors, and tensors with one row or column, get the mean of the τᵢ, as in the papers. Everything is computed
in float64. Directions whose singular value is rounding only (2⁻²³ of the largest) are left out, where the papers' code
keeps arbitrary vectors for them; it matters for task vectors of low rank, and for equal models.

Shape suffixes: `oi` outputs and inputs, `k` singular values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_llfc.merging.methods.decompositions import Singular, flatten, inverse_root, singular
from hf_llfc.merging.methods.matrices import Tasks, merged_change
from hf_llfc.merging.methods.parts import Prepared, Stream
from hf_llfc.merging.methods.settings import Settings


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

    def change(tasks: Tasks) -> Tensor:
        count = max(1, min(tasks.shape) // len(tasks))
        return _orthogonal([_top(task_oi, count, settings, index) for index, task_oi in enumerate(tasks)])

    return merged_change(stream, settings, change)


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

    def change(tasks: Tasks) -> Tensor:
        factor_oi = tasks.sum()
        values_k = flatten(factor_oi)
        return factor_oi.mul_(float(values_k.mean())) if values_k.numel() else factor_oi

    return merged_change(stream, settings, change)


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

    def change(tasks: Tasks) -> Tensor:
        side = min(tasks.shape)
        free = side - int(side * settings.number("common_space_fraction"))
        per_task = round(free / len(tasks))
        common = singular(tasks.sum(), side - per_task * len(tasks), exact_size=side, seed=0)
        found = [common]
        for index, task_oi in enumerate(tasks if per_task else ()):
            task_oi.sub_(common.left_ok @ (common.left_ok.T @ task_oi))
            found.append(_top(task_oi, per_task, settings, index))
        return _orthogonal(found, equal=True)

    return merged_change(stream, settings, change)


def _top(matrix_oi: Tensor, count: int, settings: Settings, index: int) -> Singular:
    """The largest singular triples of a model."""
    return singular(matrix_oi, count, exact_size=settings.count("exact_size"), seed=settings.seed_of(index))


def _orthogonal(found: Sequence[Singular], *, equal: bool = False) -> Tensor:
    """U⊥ S V⊥ᵀ of all triples together; with the mean of all singular values instead of each if they shall be equal."""
    left_ok = torch.cat([triples.left_ok for triples in found], dim=1)
    values_k = torch.cat([triples.values_k for triples in found])
    right_ki = torch.cat([triples.right_ki for triples in found])
    if not values_k.numel():
        return left_ok @ right_ki
    if equal:
        values_k.fill_(float(values_k.mean()))
    core_kk = (inverse_root(left_ok.T @ left_ok) * values_k) @ inverse_root(right_ki @ right_ki.T)
    return left_ok @ (core_kk @ right_ki) if left_ok.shape[0] > right_ki.shape[1] else (left_ok @ core_kk) @ right_ki
