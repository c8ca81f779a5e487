"""Merges that weight directions by input covariances, estimated from task vectors alone: `wudi` and `ace`.

The update of a linear map is a sum of gradients gxᵀ, so τᵀτ, for τ = θ − θ₀ as a matrix (outputs × inputs), stands in
for the covariance of its inputs, and the closed form of RegMean needs no data. A kernel of a convolution is outputs ×
the rest. Vectors, and tensors with one row or column, get the mean of the τᵢ. Everything is computed in float64.

Shape suffixes: `oi` outputs and inputs, `ii` inputs and inputs, `1i` one row, `i1` one column.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from hf_llfc.merging.methods.decompositions import ROWS, Ridge, gram, singular
from hf_llfc.merging.methods.matrices import Tasks, is_matrix, mean_change, whole_change
from hf_llfc.merging.methods.parts import Prepared, Stream
from hf_llfc.merging.methods.settings import Settings

TINY = 1e-12
"""What `ace` adds before it divides by a trace or takes its logarithm."""


def wudi(stream: Stream, settings: Settings) -> Prepared:
    """θ₀ + λ(Σ cᵢτᵢτᵢᵀτᵢ)(Σ cᵢτᵢᵀτᵢ + εI)⁻¹, cᵢ = 1/‖τᵢ‖²_F, or 1 if `normalize` is off.

    The minimum of Σ cᵢ‖(Δ − τᵢ)τᵢᵀ‖²_F, which Cheng et al., "Whoever Started the Interference Should End It", ICML
    2025, approach by gradient descent; also known as ACTMat. In directions that no task vector has, Δ is zero.

    Args:
        stream: The models and the base.
        settings: `lambda`, `normalize`; `epsilon`, where ε is that share of the mean of the diagonal.

    Returns:
        What merges a part.
    """

    def change(tasks: Tasks) -> Tensor:
        energies = tasks.energies()
        shares = [1 / energy if energy else 0.0 for energy in energies]
        if not settings.switch("normalize"):
            shares = [1.0] * len(shares)
        trace = sum(share * energy for share, energy in zip(shares, energies, strict=True))
        numerator_oi = torch.zeros(tasks.shape, dtype=torch.float64)
        if not trace:
            return numerator_oi
        outputs, inputs = tasks.shape
        ridge = Ridge(outputs * len(tasks), inputs, settings.number("epsilon") * trace / inputs)
        for index, share in enumerate(shares):
            if share:
                ridge.add(partial(tasks.rows_of, index), numerator_oi, share)
        return ridge.divide_(numerator_oi)

    if not is_matrix(stream.shape):
        return mean_change(stream, settings)
    return whole_change(change(Tasks(stream)), settings)


def ace(stream: Stream, settings: Settings) -> Prepared:
    """θ₀ + λΔ, Δ = (Σ τ̄ᵢΣᵢ)(Σ Σᵢ + 1mᵀ)⁻¹ with Σᵢ = cᵢ(τ̄ᵢᵀτ̄ᵢ + εI), refined where the tasks differ much.

    τ̄ᵢ is τᵢ minus the mean of its rows. m, the consensus prior, has the means of the columns of Σ cᵢτ̄ᵢᵀτ̄ᵢ. Tasks differ
    much where γ = var(log ‖τᵢ‖²)/mean(log ‖τᵢ‖²)² > `heterogeneity`. Then cᵢ = 1/‖τ̄ᵢ‖², m is divided by the mean of the
    ‖τᵢ‖², and σ U_kV_kᵀ is added: the first k = `refined_share`·r singular directions of Δ + Σ τᵢ(cᵢτ̄ᵢᵀτ̄ᵢ − S), with S
    the mean of the Σᵢ, and σ the mean of their singular values. Otherwise cᵢ = 1.

    Xu et al., "ACE-Merging", CVPR 2026, arXiv 2603.02945, with the constants, and the prior that is added to every row,
    of the authors' code. `center: false`, `prior: 0` and `refined_share: 0` leave out a part each.

    Args:
        stream: The models and the base.
        settings: `lambda`, `epsilon`, `heterogeneity`, `refined_share`, `prior` (a factor on m), `center`;
            `exact_size`, see `decompositions.singular`; seed and tensor for randomised searches.

    Returns:
        What merges a part.
    """

    def change(tasks: Tasks) -> Tensor:
        center = settings.switch("center")
        energies = tasks.energies()
        merged_oi = torch.zeros(tasks.shape, dtype=torch.float64)
        if not any(energies):
            return merged_oi
        differ = _heterogeneity(energies) > settings.number("heterogeneity")
        shares = [1.0] * len(tasks)
        if differ:
            shares = [1 / (float(_centred(task_oi, center).square_().sum()) + TINY) for task_oi in tasks]
        epsilons = [settings.number("epsilon") * share for share in shares]
        outputs, inputs = tasks.shape
        ridge = Ridge(outputs * len(tasks), inputs, sum(epsilons))
        for index, (share, epsilon) in enumerate(zip(shares, epsilons, strict=True)):
            rows = partial(_centred_rows, tasks, index, center)
            begin = 0
            for rows_ri in rows():
                merged_oi[begin : begin + len(rows_ri)].add_(rows_ri, alpha=epsilon)
                begin += len(rows_ri)
            ridge.add(rows, merged_oi, share)
        mean_1i = merged_oi.new_full((1, inputs), 1 / inputs)
        prior_1i = (ridge.multiply(mean_1i) - sum(epsilons) * mean_1i) * settings.number("prior")
        if differ:
            prior_1i /= sum(energies) / len(energies) + TINY
        merged_oi = _divide_with_prior(ridge, merged_oi, prior_1i)
        count = int(min(tasks.shape) * settings.number("refined_share"))
        if differ and count:
            rest_oi = ridge.multiply(tasks.sum()).mul_(-1 / len(tasks)).add_(merged_oi)
            for index, share in enumerate(shares):
                _add_times_gram(rest_oi, tasks, index, share, center=center)
            # In blocks of rows of the shorter side, see `decompositions`.
            rest_ls, merged_ls = (rest_oi, merged_oi) if tasks.is_tall else (rest_oi.T, merged_oi.T)
            count_of_rows = max(1, ROWS // tasks.side)
            top = singular(
                lambda: iter(rest_ls.split(count_of_rows)),
                tasks.side,
                count,
                exact_size=settings.count("exact_size"),
                seed=settings.seed_of(0),
            )
            if top.values_k.numel():
                size = float(top.values_k.mean())
                for merged_rs, rest_rs in zip(
                    merged_ls.split(count_of_rows), rest_ls.split(count_of_rows), strict=True
                ):
                    merged_rs.addmm_(top.left(rest_rs), top.right_ks, alpha=size)
        return merged_oi

    if not is_matrix(stream.shape):
        return mean_change(stream, settings)
    return whole_change(change(Tasks(stream)), settings)


def _add_times_gram(summed_oi: Tensor, tasks: Tasks, index: int, share: float, *, center: bool) -> None:
    """Adds to a sum cτᵢ(τ̄ᵢᵀτ̄ᵢ), by way of the smaller of the two products."""
    if tasks.is_tall:
        gram_ii = gram(partial(_centred_rows, tasks, index, center), tasks.side)
        begin = 0
        for rows_ri in tasks.rows_of(index):
            summed_oi[begin : begin + len(rows_ri)].addmm_(rows_ri, gram_ii, alpha=share)
            begin += len(rows_ri)
        return
    task_oi = tasks.matrix(index)
    centred_oi = _centred(task_oi.clone(), center)
    summed_oi.addmm_(task_oi @ centred_oi.T, centred_oi, alpha=share)


def _centred_rows(tasks: Tasks, index: int, center: bool) -> Iterator[Tensor]:
    """Rows of τᵢ, minus the mean of all if they shall be centred, after a pass for that."""
    mean_1i: Tensor | float = 0.0
    if center:
        mean_1i = torch.zeros(1, tasks.shape[1], dtype=torch.float64)
        for rows_ri in tasks.rows_of(index):
            mean_1i.add_(rows_ri.sum(dim=0, keepdim=True))
        mean_1i.div_(tasks.shape[0])
    for rows_ri in tasks.rows_of(index):
        yield rows_ri.sub_(mean_1i) if center else rows_ri


def _centred(matrix_oi: Tensor, center: bool) -> Tensor:
    """A matrix, in its memory, minus the mean of its rows if it shall be centred."""
    return matrix_oi.sub_(matrix_oi.mean(dim=0, keepdim=True)) if center else matrix_oi


def _heterogeneity(energies: Sequence[float]) -> float:
    """var(log e)/mean(log e)², with the unbiased variance; 0 of one task."""
    logarithms = [math.log(energy + TINY) for energy in energies]
    mean = sum(logarithms) / len(logarithms)
    spread = sum((logarithm - mean) ** 2 for logarithm in logarithms)
    return spread / max(1, len(logarithms) - 1) / (mean * mean + TINY)


def _divide_with_prior(ridge: Ridge, rows_oi: Tensor, prior_1i: Tensor) -> Tensor:
    """X(M + 1mᵀ)⁻¹ by the formula of Sherman and Morrison: XM⁻¹ − (XM⁻¹1)(mᵀM⁻¹)/(1 + mᵀM⁻¹1)."""
    divided_oi = ridge.divide_(rows_oi)
    prior_1i = ridge.divide_(prior_1i)
    correction = divided_oi.sum(dim=1, keepdim=True) / (1 + prior_1i.sum())
    return divided_oi.addmm_(correction, prior_1i, alpha=-1)
