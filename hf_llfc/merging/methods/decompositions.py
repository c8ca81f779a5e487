"""Singular vectors, polar factors and ridge regression, all in float64 and by way of products of a matrix with itself.

Eigenvectors of the smaller product take a fraction of the time of a singular value decomposition in float32, and in
float64 they tell singular values apart down to about 1e-8 of the largest, further than float32 does. A matrix is read
in blocks of rows, its longer side, so that nothing is in memory but matrices of its shorter side.

Shape suffixes: `ls` the longer and the shorter side of a matrix, `rs` some of its rows, `k` singular values, `a` rows
of a stack, `oi` outputs and inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import scipy.linalg
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

NEGLIGIBLE = 2.0**-23
"""Singular values below this share of the largest are rounding of float32, and their vectors arbitrary."""

OVERSAMPLING = 16
"""Directions that a randomised search looks for beyond those that are asked for."""

ITERATIONS = 6
"""Products with AᵀA of a randomised search, before its own."""

WORTHWHILE = 0.4
"""A randomised search is used only for a smaller share of all singular values; for more, the exact one is as quick."""

ROWS = 1 << 19
"""Elements of the rows that are worked on at a time: enough for products of matrices, few beside a matrix."""

Blocks = Callable[[], Iterator[Tensor]]
"""Gives a matrix from the first row on, some rows at a time, in float64; as often as asked."""


@dataclass(frozen=True)
class Singular:
    """The largest singular values of a matrix A, and their right vectors.

    Attributes:
        values_k: Singular values, descending, without negligible ones.
        right_ks: Right vectors, as rows.
        missed: ‖A − AQQᵀ‖_F / ‖A‖_F with Q the directions that were searched: 0 if all of them were. No value is too
            large, and the squares of all values are too small by no more than (missed · ‖A‖_F)² in sum.
    """

    values_k: Tensor
    right_ks: Tensor
    missed: float = 0.0

    def left(self, block_rs: Tensor) -> Tensor:
        """Some rows of the left vectors, from the same rows of A."""
        return (block_rs @ self.right_ks.T).div_(self.values_k)


def singular(blocks: Blocks, side: int, count: int, *, exact_size: int, seed: int) -> Singular:
    """The largest singular values of a matrix and their vectors.

    Exact up to rounding if the shorter side is at most `exact_size`, or if so many values are asked for that it is as
    quick. Otherwise by randomised subspace iteration, Halko, Martinsson and Tropp, "Finding Structure with Randomness",
    SIAM Review 2011, algorithm 4.4. Its theorem 10.5 bounds the error to be expected of k values with p further
    directions and no iteration, ‖A − AQQᵀ‖_F ≤ √(1 + k/(p−1)) · ‖A − A_k‖_F with A_k the best of rank k, and iterations
    only lower it. `missed` is that error as it turned out, relative to ‖A‖_F.

    Args:
        blocks: The matrix.
        side: Length of its rows, the shorter side.
        count: How many values to find.
        exact_size: See above.
        seed: Seed of the first directions.

    Returns:
        At most `count` of them.
    """
    count = min(count, side)
    if side <= exact_size or count > WORTHWHILE * side:
        return _top(gram(blocks, side), count)
    basis_sk = _range(blocks, side, min(side, count + OVERSAMPLING), seed)
    square = found = 0.0
    gram_kk = torch.zeros(basis_sk.shape[1], basis_sk.shape[1], dtype=torch.float64)
    for block_rs in blocks():
        small_rk = block_rs @ basis_sk
        gram_kk.addmm_(small_rk.T, small_rk)
        square += float(block_rs.square().sum())
        found += float(small_rk.square().sum())
    inner = _top(gram_kk, count)
    missed = (max(0.0, square - found) / square) ** 0.5 if square else 0.0
    return Singular(inner.values_k, inner.right_ks @ basis_sk.T, missed)


def gram(blocks: Blocks, side: int) -> Tensor:
    """AᵀA of a matrix, whose rows have that length."""
    gram_ss = torch.zeros(side, side, dtype=torch.float64)
    for block_rs in blocks():
        gram_ss.addmm_(block_rs.T, block_rs)
    return gram_ss


def inverse_root(gram_kk: Tensor) -> tuple[Tensor, Tensor]:
    """G^(−½) of a positive semidefinite matrix; zero in the directions in which G is negligible.

    For G = AᵀA, A · G^(−½) is the polar factor of A, the nearest matrix whose columns are orthonormal.

    Args:
        gram_kk: G.

    Returns:
        The matrix, in the memory of G, and the square roots of the eigenvalues of G that are not negligible, ascending.
    """
    values_k, vectors_ks = _eigen(gram_kk)
    vectors_ks.mul_(values_k.rsqrt()[:, None])
    return torch.mm(vectors_ks.T, vectors_ks, out=gram_kk), values_k


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
        shape = (rows if self._is_dual else columns, columns)
        self._matrix_ai = torch.zeros(shape, dtype=torch.float64)  # A, or AᵀA and later its factor
        self._filled = 0
        self._factor: Tensor | None = None

    def add(self, rows: Blocks, summed_oi: Tensor, factor: float = 1.0) -> None:
        """Adds √c Aᵢ, and to a sum of matrices cAᵢAᵢᵀAᵢ, with which it has a product in common.

        Args:
            rows: Aᵢ.
            summed_oi: The sum.
            factor: c.
        """
        assert self._factor is None, "a matrix was added after a division"
        if self._is_dual:
            first = self._filled
            for rows_ri in rows():
                begin, self._filled = self._filled, self._filled + len(rows_ri)
                torch.mul(rows_ri, math.sqrt(factor), out=self._matrix_ai[begin : self._filled])
            added_oi = self._matrix_ai[first : self._filled]
            summed_oi.addmm_(added_oi @ added_oi.T, added_oi, alpha=1 / math.sqrt(factor))
            return
        gram_ii = gram(rows, len(self._matrix_ai))
        begin = 0
        for rows_ri in rows():
            summed_oi[begin : begin + len(rows_ri)].addmm_(rows_ri, gram_ii, alpha=factor)
            begin += len(rows_ri)
        self._matrix_ai.add_(gram_ii, alpha=factor)

    def multiply(self, rows_oi: Tensor) -> Tensor:
        """XM for X of any number of rows."""
        factor = self._factorised()
        if not self._is_dual:
            return (rows_oi @ factor) @ factor.T
        return ((rows_oi @ self._matrix_ai.T) @ self._matrix_ai).add_(rows_oi, alpha=self._epsilon)

    def divide_(self, rows_oi: Tensor) -> Tensor:
        """XM⁻¹ for X of any number of rows, in its memory."""
        factor = self._factorised()
        for block_oi in rows_oi.split(max(1, ROWS // max(1, rows_oi.shape[1]))):
            if not self._is_dual:
                block_oi.copy_(torch.cholesky_solve(block_oi.T, factor).T)
                continue
            inner_oa = torch.cholesky_solve(self._matrix_ai @ block_oi.T, factor).T
            block_oi.addmm_(inner_oa, self._matrix_ai, alpha=-1).div_(self._epsilon)
        return rows_oi

    def _factorised(self) -> Tensor:
        """The factor of AAᵀ + εI or of AᵀA + εI."""
        if self._factor is None:
            product = self._matrix_ai @ self._matrix_ai.T if self._is_dual else self._matrix_ai
            product.diagonal().add_(self._epsilon)
            self._factor = cholesky(product)
        return self._factor


def cholesky(gram_ss: Tensor) -> Tensor:
    """The lower factor of a positive definite matrix, in its memory; what is above the diagonal is zero."""
    with _threads_of_torch():
        # What is the upper triangle to LAPACK, column by column, is the lower one row by row.
        factor = scipy.linalg.cholesky(gram_ss.numpy().T, lower=False, overwrite_a=True, check_finite=False)
    return torch.from_numpy(factor.T)


def _eigen(gram_ss: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of the eigenvalues that are not negligible, ascending, and their vectors as rows.

    By LAPACK's syevr, which takes a matrix beside the result where torch's syevd takes three. The matrix is spoilt.
    """
    with _threads_of_torch():
        squares, vectors = scipy.linalg.eigh(gram_ss.numpy().T, overwrite_a=True, check_finite=False)
    values = np.sqrt(squares.clip(min=0))
    rank = int((values > NEGLIGIBLE * values[-1]).sum()) if len(values) else 0
    first = len(values) - rank
    return torch.from_numpy(values[first:]), torch.from_numpy(vectors.T[first:])


def _threads_of_torch() -> Any:
    """Lets the library below SciPy use as many threads as torch."""
    return _controller().limit(limits=torch.get_num_threads(), user_api="blas")


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def _top(gram_ss: Tensor, count: int) -> Singular:
    """The largest singular values of a matrix by its product with itself, which is spoilt."""
    values_k, vectors_ks = _eigen(gram_ss)
    order_k = torch.arange(len(values_k) - 1, max(0, len(values_k) - count) - 1, -1)
    is_large = 2 * len(order_k) > len(gram_ss)
    room_ks = gram_ss[: len(order_k)] if is_large else torch.empty(len(order_k), len(gram_ss), dtype=torch.float64)
    return Singular(values_k[order_k], torch.index_select(vectors_ks, 0, order_k, out=room_ks))


def _range(blocks: Blocks, side: int, count: int, seed: int) -> Tensor:
    """Orthonormal columns that nearly span the leading right singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    basis_sk = torch.linalg.qr(torch.randn(side, count, generator=generator, dtype=torch.float64)).Q
    for _ in range(ITERATIONS):
        basis_lk = torch.linalg.qr(torch.cat([block_rs @ basis_sk for block_rs in blocks()])).Q
        basis_sk, begin = torch.zeros_like(basis_sk), 0
        for block_rs in blocks():
            basis_sk.addmm_(block_rs.T, basis_lk[begin : begin + len(block_rs)])
            begin += len(block_rs)
        basis_sk = torch.linalg.qr(basis_sk).Q
    return basis_sk
