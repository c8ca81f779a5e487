"""Merges that weight directions by input covariances, estimated from task vectors alone: `wudi` and `ace`.

The update of a linear map is a sum of gradients gxᵀ, so τᵀτ, for τ = θ − θ₀ as a matrix (outputs × inputs), stands in
for the covariance of its inputs, and the closed form of RegMean needs no data. A kernel of a convolution is outputs ×
the rest. Vectors, and tensors with one row or column, get the mean of the τᵢ. Everything is computed in float64.

Shape suffixes: `oi` outputs and inputs, `ii` inputs and inputs, `1i` one row, `i1` one column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_llfc.merging.methods.decompositions import Ridge, singular
from hf_llfc.merging.methods.matrices import as_matrix, merged_change
from hf_llfc.merging.methods.settings import Settings

TINY = 1e-12
"""What `ace` adds before it divides by a trace or takes its logarithm."""


def wudi(models: Sequence[Tensor], base: Tensor, settings: Settings) -> Tensor:
    """θ₀ + λ(Σ cᵢτᵢτᵢᵀτᵢ)(Σ cᵢτᵢᵀτᵢ + εI)⁻¹, cᵢ = 1/‖τᵢ‖²_F, or 1 if `normalize` is off.

    The minimum of Σ cᵢ‖(Δ − τᵢ)τᵢᵀ‖²_F, which Cheng et al., "Whoever Started the Interference Should End It", ICML
    2025, approach by gradient descent; also known as ACTMat. In directions that no task vector has, Δ is zero.

    Args:
        models: Every model's tensor, of one shape.
        base: That of the base.
        settings: `lambda`, `normalize`; `epsilon`, where ε is that share of the mean of the diagonal.

    Returns:
        The merge.
    """

    def change(tasks: Sequence[Tensor]) -> Tensor:
        matrices = [as_matrix(task) for task in tasks]
        squares = [float(matrix_oi.square().sum()) for matrix_oi in matrices]
        if settings.switch("normalize"):
            shares = [1 / square if square else 0.0 for square in squares]
        else:
            shares = [1.0] * len(matrices)
        trace = sum(share * square for share, square in zip(shares, squares, strict=True))
        if not trace:
            return torch.zeros_like(matrices[0])
        for matrix_oi, share in zip(matrices, shares, strict=True):
            matrix_oi.mul_(math.sqrt(share))
        numerator_oi = torch.zeros_like(matrices[0])
        for matrix_oi, share in zip(matrices, shares, strict=True):
            if share:
                numerator_oi.add_(_cubed(matrix_oi), alpha=1 / math.sqrt(share))
        epsilon = settings.number("epsilon") * trace / numerator_oi.shape[1]
        return Ridge(torch.cat(matrices), epsilon).divide(numerator_oi)

    return merged_change(models, base, settings, change)


def ace(models: Sequence[Tensor], base: Tensor, settings: Settings) -> Tensor:
    """θ₀ + λΔ, Δ = (Σ τ̄ᵢΣᵢ)(Σ Σᵢ + 1mᵀ)⁻¹ with Σᵢ = cᵢ(τ̄ᵢᵀτ̄ᵢ + εI), refined where the tasks differ much.

    τ̄ᵢ is τᵢ minus the mean of its rows. m, the consensus prior, has the means of the columns of Σ cᵢτ̄ᵢᵀτ̄ᵢ. Tasks differ
    much where γ = var(log ‖τᵢ‖²)/mean(log ‖τᵢ‖²)² > `heterogeneity`. Then cᵢ = 1/‖τ̄ᵢ‖², m is divided by the mean of the
    ‖τᵢ‖², and σ U_kV_kᵀ is added: the first k = `refined_share`·r singular directions of Δ + Σ τᵢ(cᵢτ̄ᵢᵀτ̄ᵢ − S), with S
    the mean of the Σᵢ, and σ the mean of their singular values. Otherwise cᵢ = 1.

    Xu et al., "ACE-Merging", CVPR 2026, arXiv 2603.02945, with the constants, and the prior that is added to every row,
    of the authors' code. `center: false`, `prior: 0` and `refined_share: 0` leave out a part each.

    Args:
        models: Every model's tensor, of one shape.
        base: That of the base.
        settings: `lambda`, `epsilon`, `heterogeneity`, `refined_share`, `prior` (a factor on m), `center`;
            `exact_size`, see `decompositions.singular`; seed and tensor for randomised searches.

    Returns:
        The merge.
    """

    def change(tasks: Sequence[Tensor]) -> Tensor:
        matrices = [as_matrix(task) for task in tasks]
        energies = [float(matrix_oi.square().sum()) for matrix_oi in matrices]
        if not any(energies):
            return torch.zeros_like(matrices[0])
        differ = _heterogeneity(energies) > settings.number("heterogeneity")
        centred = [_centred(matrix_oi) if settings.switch("center") else matrix_oi for matrix_oi in matrices]
        shares = [1 / (float(matrix_oi.square().sum()) + TINY) if differ else 1.0 for matrix_oi in centred]
        epsilons = [settings.number("epsilon") * share for share in shares]
        numerator_oi = torch.zeros_like(matrices[0])
        for matrix_oi, share, epsilon in zip(centred, shares, epsilons, strict=True):
            numerator_oi.add_(_cubed(matrix_oi), alpha=share).add_(matrix_oi, alpha=epsilon)
        stack = torch.cat([matrix_oi * math.sqrt(share) for matrix_oi, share in zip(centred, shares, strict=True)])
        ridge = Ridge(stack, sum(epsilons))
        # The means of the columns of AᵀA, without AᵀA: the sum of A's rows, each times the mean of its elements.
        prior_1i = settings.number("prior") * (stack.mean(dim=1, keepdim=True).T @ stack)
        if differ:
            prior_1i /= sum(energies) / len(energies) + TINY
        merged_oi = _divide_with_prior(ridge, numerator_oi, prior_1i)
        count = int(min(merged_oi.shape) * settings.number("refined_share"))
        if differ and count:
            rest_oi = merged_oi.clone()
            for matrix_oi, centred_oi, share in zip(matrices, centred, shares, strict=True):
                rest_oi.add_(_times_gram(matrix_oi, centred_oi), alpha=share)
            total_oi = sum(matrices[1:], matrices[0])
            rest_oi.sub_(_times_gram(total_oi, stack), alpha=1 / len(tasks))
            rest_oi.sub_(total_oi, alpha=sum(epsilons) / len(tasks))
            top = singular(rest_oi, count, exact_size=settings.count("exact_size"), seed=settings.seed_of(0))
            if top.values_k.numel():
                merged_oi.add_(top.left_ok @ top.right_ki, alpha=float(top.values_k.mean()))
        return merged_oi

    return merged_change(models, base, settings, change)


def _cubed(matrix_oi: Tensor) -> Tensor:
    """MMᵀM."""
    return _times_gram(matrix_oi, matrix_oi)


def _times_gram(rows_oi: Tensor, matrix_ai: Tensor) -> Tensor:
    """XMᵀM, by way of the smaller of the two products."""
    if matrix_ai.shape[0] <= matrix_ai.shape[1]:
        return (rows_oi @ matrix_ai.T) @ matrix_ai
    return rows_oi @ (matrix_ai.T @ matrix_ai)


def _centred(matrix_oi: Tensor) -> Tensor:
    """A matrix minus the mean of its rows."""
    return matrix_oi - matrix_oi.mean(dim=0, keepdim=True)


def _heterogeneity(energies: Sequence[float]) -> float:
    """var(log e)/mean(log e)², with the unbiased variance; 0 of one task."""
    logarithms = [math.log(energy + TINY) for energy in energies]
    mean = sum(logarithms) / len(logarithms)
    spread = sum((logarithm - mean) ** 2 for logarithm in logarithms)
    return spread / max(1, len(logarithms) - 1) / (mean * mean + TINY)


def _divide_with_prior(ridge: Ridge, rows_oi: Tensor, prior_1i: Tensor) -> Tensor:
    """X(M + 1mᵀ)⁻¹ by the formula of Sherman and Morrison: XM⁻¹ − (XM⁻¹1)(mᵀM⁻¹)/(1 + mᵀM⁻¹1)."""
    divided_oi = ridge.divide(rows_oi)
    prior_1i = ridge.divide(prior_1i)
    correction = divided_oi.sum(dim=1, keepdim=True) / (1 + prior_1i.sum())
    return divided_oi.sub_(correction @ prior_1i)
