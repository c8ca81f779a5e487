"""Merges that weight directions by input covariances, estimated from task vectors alone: `wudi` and `ace`.

The update of a linear map is a sum of gradients gxᵀ, so τᵀτ, for τ = θ − θ₀ as a matrix (outputs × inputs), stands in
for the covariance of its inputs, and the closed form of RegMean needs no data. A kernel of a convolution is outputs ×
the rest. Vectors, and tensors with one row or column, get the mean of the τᵢ. Everything is computed in float64; where
it is refined, Δ waits in float32 meanwhile, unless the models are in float64.

Shape suffixes: `oi` outputs and inputs, `ri` some outputs, `ii` inputs and inputs, `1i` one row; `ls` and `rs` as in
`decompositions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from hf_llfc.merging.methods.decompositions import Blocks, cholesky, divide_, gram, rows_at_a_time, singular
from hf_llfc.merging.methods.matrices import Tasks, change_by_blocks, is_matrix, mean_change, total_of, whole_change
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
    if not is_matrix(stream.shape):
        return mean_change(stream, settings)
    tasks = Tasks(stream)
    energies, means = tasks.moments()
    shares = [1.0 if energy else 0.0 for energy in energies]
    if settings.switch("normalize"):
        shares = [1 / energy if energy else 0.0 for energy in energies]
    trace = sum(share * energy for share, energy in zip(shares, energies, strict=True))
    if not trace:
        return whole_change(torch.zeros(tasks.shape), settings)
    ridge = settings.number("epsilon") * trace / tasks.shape[1]
    return _solved(_Problem(tasks, means, shares, [0.0] * len(tasks), ridge), settings)


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
    if not is_matrix(stream.shape):
        return mean_change(stream, settings)
    tasks, center = Tasks(stream), settings.switch("center")
    energies, means = tasks.moments()
    if not any(energies):
        return whole_change(torch.zeros(tasks.shape), settings)
    differ = _heterogeneity(energies) > settings.number("heterogeneity")
    problem = _Problem(tasks, means, [1.0] * len(tasks), [], 0.0, prior=settings.number("prior"), center=center)
    if differ:
        problem = replace(
            problem,
            shares=[1 / (energy + TINY) for energy in problem.energies()],
            prior=problem.prior / (sum(energies) / len(energies) + TINY),
            refined=int(min(tasks.shape) * settings.number("refined_share")),
        )
    own_ridges = [settings.number("epsilon") * share for share in problem.shares]
    return _solved(replace(problem, own_ridges=own_ridges, ridge=sum(own_ridges)), settings)


@dataclass(frozen=True)
class _Problem:
    """Δ = (Σ cᵢτ̄ᵢτ̄ᵢᵀτ̄ᵢ + εᵢτ̄ᵢ)(M + 1mᵀ)⁻¹ with M = Σ cᵢτ̄ᵢᵀτ̄ᵢ + εI, and m the means of the columns of M − εI, times p.

    Attributes:
        tasks: The τᵢ.
        means: Of every τᵢ the mean of its rows.
        shares: The cᵢ.
        own_ridges: The εᵢ.
        ridge: ε > 0.
        prior: p.
        center: Whether τ̄ᵢ is τᵢ minus the mean of its rows, or τᵢ itself.
        refined: How many singular directions are added, see `ace`.
    """

    tasks: Tasks
    means: Sequence[Tensor]
    shares: Sequence[float]
    own_ridges: Sequence[float]
    ridge: float
    prior: float = 0.0
    center: bool = False
    refined: int = 0

    @property
    def weighted(self) -> list[tuple[int, float]]:
        """Tasks that count, and their cᵢ."""
        return [(index, share) for index, share in enumerate(self.shares) if share]

    def rows_of(self, index: int, factor: float = 1.0) -> Iterator[Tensor]:
        """Some outputs of τ̄ᵢ, times a factor, after the other; new tensors."""
        for rows_ri in self.tasks.rows_of(index):
            yield (rows_ri.sub_(self.means[index]) if self.center else rows_ri).mul_(factor)

    def energies(self) -> list[float]:
        """‖τ̄ᵢ‖²_F of every task."""
        return [
            sum(float(rows_ri.square_().sum()) for rows_ri in self.rows_of(index)) for index in range(len(self.tasks))
        ]


def _solved(problem: _Problem, settings: Settings) -> Prepared:
    """θ₀ + λΔ, by the smaller of two systems of equations: as many unknowns as inputs, or as outputs of all tasks."""
    outputs, inputs = problem.tasks.shape
    if len(problem.tasks) * outputs < inputs:
        return _by_outputs(problem, settings)
    return whole_change(_by_inputs(problem, settings), settings)


def _by_inputs(problem: _Problem, settings: Settings) -> Tensor:
    """Δ in memory, by the Cholesky factor of M."""
    tasks, inputs = problem.tasks, problem.tasks.shape[1]
    # Beside this sum either a product τ̄ᵢᵀτ̄ᵢ is in memory, or M.
    merged_oi, total_1i = _numerator(problem)
    matrix_ii = gram(
        lambda: (rows_ri for index, share in problem.weighted for rows_ri in problem.rows_of(index, math.sqrt(share))),
        inputs,
    )
    prior_1i = matrix_ii.sum(dim=0, keepdim=True).mul_(problem.prior / inputs)
    matrix_ii.diagonal().add_(problem.ridge)
    rest_oi = _distances(problem, merged_oi, matrix_ii, total_1i) if problem.refined else None
    factor_ii = cholesky(matrix_ii)
    _divide_with_prior(merged_oi, factor_ii, prior_1i)
    del matrix_ii, factor_ii
    if rest_oi is None:
        return merged_oi
    rest_oi.add_(merged_oi)
    merged_oi = merged_oi.to(torch.promote_types(tasks.dtype, torch.float32))
    # In blocks of rows of the shorter side, see `decompositions`.
    rest_ls, merged_ls = (rest_oi, merged_oi) if tasks.is_tall else (rest_oi.T, merged_oi.T)
    rows = max(1, rows_at_a_time(tasks.shape) // tasks.side)
    top = _refined(problem, settings, lambda: iter(rest_ls.split(rows)))
    for merged_rs, rest_rs in zip(merged_ls.split(rows), rest_ls.split(rows), strict=True):
        merged_rs.add_(top(rest_rs))
    return merged_oi


def _numerator(problem: _Problem) -> tuple[Tensor, Tensor]:
    """Σ cᵢτ̄ᵢτ̄ᵢᵀτ̄ᵢ + εᵢτ̄ᵢ, and Σ cᵢμᵢτ̄ᵢᵀτ̄ᵢ with μᵢ the mean of the rows of τᵢ."""
    summed_oi = torch.zeros(problem.tasks.shape, dtype=torch.float64)
    total_1i = torch.zeros(1, problem.tasks.shape[1], dtype=torch.float64)
    for index, share in problem.weighted:
        gram_ii = gram(partial(problem.rows_of, index), problem.tasks.shape[1])
        total_1i.addmm_(problem.means[index], gram_ii, alpha=share)
        gram_ii.mul_(share).diagonal().add_(problem.own_ridges[index])
        for summed_ri, (rows_ri,) in _beside(summed_oi, ([rows_ri] for rows_ri in problem.rows_of(index))):
            summed_ri.addmm_(rows_ri, gram_ii)
        del gram_ii
    return summed_oi, total_1i


def _divide_with_prior(rows_oi: Tensor, factor_ii: Tensor, prior_1i: Tensor) -> None:
    """X(M + 1mᵀ)⁻¹, in the memory of X, by the formula of Sherman and Morrison: XM⁻¹ − (XM⁻¹1)(mᵀM⁻¹)/(1 + mᵀM⁻¹1)."""
    divide_(prior_1i, factor_ii)
    for rows_ri in rows_oi.split(max(1, rows_at_a_time(rows_oi.shape) // rows_oi.shape[1])):
        divide_(rows_ri, factor_ii)
        rows_ri.addmm_(rows_ri.sum(dim=1, keepdim=True), prior_1i, alpha=-1 / float(1 + prior_1i.sum()))


def _distances(problem: _Problem, merged_oi: Tensor, matrix_ii: Tensor, total_1i: Tensor) -> Tensor:
    """Σ τᵢ(cᵢτ̄ᵢᵀτ̄ᵢ − M/T), a new tensor.

    Args:
        problem: What is solved.
        merged_oi: Σ cᵢτ̄ᵢτ̄ᵢᵀτ̄ᵢ + εᵢτ̄ᵢ.
        matrix_ii: M.
        total_1i: Σ cᵢμᵢτ̄ᵢᵀτ̄ᵢ, with μᵢ the mean of the rows of τᵢ.
    """
    rest_oi = merged_oi.clone()
    if problem.center:
        rest_oi.add_(total_1i)
    for rest_ri, of_tasks in _beside(rest_oi, problem.tasks.rows()):
        for index, rows_ri in enumerate(of_tasks):
            centred_ri = rows_ri - problem.means[index] if problem.center else rows_ri
            rest_ri.sub_(centred_ri, alpha=problem.own_ridges[index])
        rest_ri.addmm_(total_of(of_tasks), matrix_ii, alpha=-1 / len(problem.tasks))
    return rest_oi


def _beside(matrix_oi: Tensor, blocks: Iterable[list[Tensor]]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """The same rows of a matrix, in its memory, beside blocks of rows that come in order."""
    begin = 0
    for of_tasks in blocks:
        yield matrix_oi[begin : begin + len(of_tasks[0])], of_tasks
        begin += len(of_tasks[0])


def _by_outputs(problem: _Problem, settings: Settings) -> Prepared:
    """θ₀ + λΔ, by the Cholesky factor of AAᵀ + εI, with A the √cᵢτ̄ᵢ one below the other.

    (BA)(AᵀA + εI)⁻¹ = B(AAᵀ + εI)⁻¹A, so that Δ = CA with C as small as outputs × rows of A; A is read in blocks, as
    rows of Aᵀ. Shape suffix `a`: rows of A.
    """
    tasks = problem.tasks
    roots = [math.sqrt(share) for share in problem.shares]

    def stacked(blocks: Sequence[Tensor]) -> Tensor:
        centred = [block_rs - block_rs.mean(dim=1, keepdim=True) if problem.center else block_rs for block_rs in blocks]
        return torch.cat([block_rs * root for block_rs, root in zip(centred, roots, strict=True)], dim=1)

    sums_a = torch.zeros(len(tasks) * tasks.side, dtype=torch.float64)
    of_means_ta = sums_a.new_zeros(len(tasks), len(sums_a))

    def read() -> Iterator[Tensor]:
        for blocks in tasks.blocks():
            yield (stack_ra := stacked(blocks))
            sums_a.add_(stack_ra.sum(dim=0))
            of_means_ta.addmm_(torch.stack([block_rs.mean(dim=1) for block_rs in blocks]), stack_ra)

    matrix_aa = gram(read, len(sums_a))
    places = [slice(first, first + tasks.side) for first in range(0, len(sums_a), tasks.side)]
    of_own_sa = torch.cat(
        [matrix_aa[place, place] / (root or 1.0) for place, root in zip(places, roots, strict=True)], dim=1
    )
    of_rest_sa = of_own_sa.clone() if problem.refined else None
    if of_rest_sa is not None:
        for index, (place, root) in enumerate(zip(places, roots, strict=True)):
            of_rest_sa.sub_(matrix_aa[place], alpha=1 / (root * len(tasks)))
            if problem.center:
                of_rest_sa[:, place].add_(of_means_ta[index, place])
                of_rest_sa.sub_(of_means_ta[index], alpha=1 / len(tasks))
    for place, root, own_ridge in zip(places, roots, problem.own_ridges, strict=True):
        of_own_sa[:, place].diagonal().add_(own_ridge / (root or 1.0))
    matrix_aa.diagonal().add_(problem.ridge)
    factor_aa = cholesky(matrix_aa)
    core_sa = divide_(of_own_sa, factor_aa)
    prior_1a = divide_(sums_a[None] * (problem.prior / tasks.shape[1]), factor_aa)
    # As in `_divide_with_prior`.
    core_sa.addmm_((core_sa @ sums_a)[:, None], prior_1a, alpha=-1 / float(1 + prior_1a @ sums_a))
    del matrix_aa, factor_aa

    def change_of(blocks: list[Tensor]) -> Tensor:
        return stacked(blocks) @ core_sa.T

    if of_rest_sa is None:
        return change_by_blocks(tasks, settings, change_of)
    of_rest_sa.add_(core_sa)

    def rest_of(blocks: list[Tensor]) -> Tensor:
        rest_rs = stacked(blocks) @ of_rest_sa.T
        return rest_rs.sub_(total_of(blocks), alpha=problem.ridge / len(tasks))

    top = _refined(problem, settings, lambda: map(rest_of, tasks.blocks()))
    return change_by_blocks(tasks, settings, lambda blocks: change_of(blocks).add_(top(rest_of(blocks))))


def _refined(problem: _Problem, settings: Settings, rest: Blocks) -> Callable[[Tensor], Tensor]:
    """From rows of the distances to the same rows of what they add: σ U_kV_kᵀ, see `ace`."""
    side, exact_size = problem.tasks.side, settings.count("exact_size")
    top = singular(rest, side, problem.refined, exact_size=exact_size, seed=settings.seed_of(0))
    size = float(top.values_k.mean()) if top.values_k.numel() else 0.0
    return lambda rest_rs: (top.left(rest_rs) @ top.right_ks).mul_(size)


def _heterogeneity(energies: Sequence[float]) -> float:
    """var(log e)/mean(log e)², with the unbiased variance; 0 of one task."""
    logarithms = [math.log(energy + TINY) for energy in energies]
    mean = sum(logarithms) / len(logarithms)
    spread = sum((logarithm - mean) ** 2 for logarithm in logarithms)
    return spread / max(1, len(logarithms) - 1) / (mean * mean + TINY)
