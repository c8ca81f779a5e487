"""Singular vectors, polar factors and ridge regression, all in float64 and by way of products of a matrix with itself.

Eigenvectors of the smaller product take a fraction of the time of a singular value decomposition in float32, and in
float64 they tell singular values apart down to about 1e-8 of the largest, further than float32 does.

Shape suffixes: `oi` rows (outputs) and columns (inputs), `k` singular values, `s` the smaller side, `a` rows of a
stack.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEGLIGIBLE = 2.0**-23
"""Singular values below this share of the largest are rounding of float32, and their vectors arbitrary."""

OVERSAMPLING = 16
"""Directions that a randomised search looks for beyond those that are asked for."""

ITERATIONS = 3
"""Power iterations of a randomised search."""

BLOCK = 1024
"""Columns that are replaced at a time."""

WORTHWHILE = 0.4
"""A randomised search is used only for a smaller share of all singular values; for more, the exact one is as quick."""


@dataclass(frozen=True)
class Singular:
    """The largest singular values of a matrix A, and their vectors.

    Attributes:
        left_ok: Left vectors, as columns.
        values_k: Singular values, descending, without negligible ones.
        right_ki: Right vectors, as rows.
        missed: ‖A − QQᵀA‖_F / ‖A‖_F with Q the directions that were searched: 0 if all of them were. No value is too
            large, and the squares of all values are too small by no more than (missed · ‖A‖_F)² in sum.
    """

    left_ok: Tensor
    values_k: Tensor
    right_ki: Tensor
    missed: float = 0.0


def singular(matrix_oi: Tensor, count: int, *, exact_size: int, seed: int) -> Singular:
    """The largest singular values of a matrix and their vectors.

    Exact up to rounding if the smaller side is at most `exact_size`, or if so many values are asked for that it is as
    quick. Otherwise by randomised subspace iteration, Halko, Martinsson and Tropp, "Finding Structure with Randomness",
    SIAM Review 2011, algorithm 4.4. Its theorem 10.5 bounds the error to be expected of k values with p further
    directions and no iteration, ‖A − QQᵀA‖_F ≤ √(1 + k/(p−1)) · ‖A − A_k‖_F with A_k the best of rank k, and iterations
    only lower it. `missed` is that error as it turned out, relative to ‖A‖_F.

    Args:
        matrix_oi: In float64.
        count: How many values to find.
        exact_size: See above.
        seed: Seed of the first directions.

    Returns:
        At most `count` of them.
    """
    side = min(matrix_oi.shape)
    count = min(count, side)
    if side <= exact_size or count > WORTHWHILE * side:
        return _exact(matrix_oi, count)
    basis_ok = _range(matrix_oi, min(side, count + OVERSAMPLING), seed)
    small_ki = basis_ok.T @ matrix_oi
    square, found = float(matrix_oi.square().sum()), float(small_ki.square().sum())
    inner = _exact(small_ki, count)
    missed = (max(0.0, square - found) / square) ** 0.5 if square else 0.0
    return Singular(basis_ok @ inner.left_ok, inner.values_k, inner.right_ki, missed)


def flatten(matrix_oi: Tensor) -> Tensor:
    """Replaces a matrix A = USVᵀ by its polar factor UVᵀ, in its memory.

    Always exact: it takes every direction of the smaller side. Directions of negligible singular values, which are
    arbitrary, stay out of the factor.

    Args:
        matrix_oi: In float64; it becomes the factor, whose singular values are 1, or 0 where they were negligible.

    Returns:
        The singular values that are not negligible, descending.
    """
    wide = matrix_oi.shape[0] <= matrix_oi.shape[1]
    short = matrix_oi if wide else matrix_oi.T
    values_k, vectors_sk = _eigen(short @ short.T, short.shape[0])
    root_ss = (vectors_sk / values_k) @ vectors_sk.T
    del vectors_sk
    for block in short.split(BLOCK, dim=1):
        block.copy_(root_ss @ block)
    return values_k


def inverse_root(gram_kk: Tensor) -> Tensor:
    """G^(−½) of a positive semidefinite matrix; zero in the directions in which G is negligible."""
    values_k, vectors_kk = _eigen(gram_kk, gram_kk.shape[0])
    return (vectors_kk / values_k) @ vectors_kk.T


class Ridge:
    """M = AᵀA + εI, with A the matrices Aᵢ one below the other: products with it, and right division by it.

    If A has fewer rows than columns, the smaller AAᵀ + εI is factorised instead: XM⁻¹ = (X − XAᵀ(AAᵀ + εI)⁻¹A)/ε,
    which loses as many digits as the square of A's norm has more than ε.
    """

    def __init__(self, rows: int, columns: int, epsilon: float) -> None:
        """Begins without a matrix.

        Args:
            rows: How many rows the Aᵢ will have in all.
            columns: How many columns they have.
            epsilon: ε > 0.
        """
        self._epsilon = epsilon
        self._is_dual = rows < columns
        self._parts: list[Tensor] = []  # the Aᵢ, or AᵀA
        self._matrix: Tensor | None = None
        self._factor: Tensor | None = None

    def add(self, matrix_oi: Tensor) -> Tensor:
        """Adds Aᵢ, and returns AᵢAᵢᵀAᵢ, with which it has a product in common.

        Args:
            matrix_oi: In float64; it is kept if A has fewer rows than columns.
        """
        assert self._factor is None, "a matrix was added after a division"
        if self._is_dual:
            self._parts.append(matrix_oi)
            return (matrix_oi @ matrix_oi.T) @ matrix_oi
        gram_ii = matrix_oi.T @ matrix_oi
        cubed_oi = matrix_oi @ gram_ii
        self._parts = [self._parts[0].add_(gram_ii) if self._parts else gram_ii]
        return cubed_oi

    def multiply(self, rows_oi: Tensor) -> Tensor:
        """XM for X of any number of rows."""
        matrix, factor = self._factorised()
        if not self._is_dual:
            return (rows_oi @ factor) @ factor.T
        return ((rows_oi @ matrix.T) @ matrix).add_(rows_oi, alpha=self._epsilon)

    def divide(self, rows_oi: Tensor) -> Tensor:
        """XM⁻¹ for X of any number of rows."""
        matrix, factor = self._factorised()
        if not self._is_dual:
            return torch.cholesky_solve(rows_oi.T, factor).T
        inner_oa = torch.cholesky_solve(matrix @ rows_oi.T, factor).T
        return (rows_oi - inner_oa @ matrix).div_(self._epsilon)

    def _factorised(self) -> tuple[Tensor, Tensor]:
        """A and the factor of AAᵀ + εI; or twice the factor of AᵀA + εI."""
        if self._matrix is None or self._factor is None:
            stacked = torch.cat(self._parts)
            gram = stacked @ stacked.T if self._is_dual else stacked
            self._parts = []
            gram.diagonal().add_(self._epsilon)
            self._factor = torch.linalg.cholesky(gram)
            self._matrix = stacked if self._is_dual else self._factor
        return self._matrix, self._factor


def _eigen(gram_ss: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Square roots of the largest eigenvalues that are not negligible, descending, and their vectors as columns."""
    squares_s, vectors_ss = torch.linalg.eigh(gram_ss)
    values = squares_s.clamp(min=0).sqrt().flip(0)[:count]
    rank = int((values > NEGLIGIBLE * values[0]).sum()) if values.numel() else 0
    return values[:rank], vectors_ss.flip(1)[:, :rank]


def _exact(matrix_oi: Tensor, count: int) -> Singular:
    """By eigenvectors of the smaller product."""
    wide = matrix_oi.shape[0] <= matrix_oi.shape[1]
    short = matrix_oi if wide else matrix_oi.T
    values_k, vectors_sk = _eigen(short @ short.T, count)
    others_kl = vectors_sk.T @ short / values_k[:, None]
    return Singular(vectors_sk, values_k, others_kl) if wide else Singular(others_kl.T, values_k, vectors_sk.T)


def _range(matrix_oi: Tensor, count: int, seed: int) -> Tensor:
    """Orthonormal columns that nearly span the leading left singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix_oi.shape[1], count, generator=generator, dtype=matrix_oi.dtype).to(matrix_oi.device)
    basis_ok = torch.linalg.qr(matrix_oi @ start).Q
    for _ in range(ITERATIONS):
        basis_ik = torch.linalg.qr(matrix_oi.T @ basis_ok).Q
        basis_ok = torch.linalg.qr(matrix_oi @ basis_ik).Q
    return basis_ok
