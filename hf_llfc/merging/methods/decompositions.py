"""Singular vectors and polar factors, all in float64 and by way of products of a matrix with itself.

Eigenvectors of the smaller product take a fraction of the time of a singular value decomposition in float32, and in
float64 they tell singular values apart down to about 1e-8 of the largest, further than float32 does. A matrix is read
in blocks of rows, its longer side, so that nothing is in memory but matrices of its shorter side. Of symmetric matrices
one triangle is computed, by BLAS's syrk.

Shape suffixes: `ls` the longer and the shorter side of a matrix, `rs` some of its rows, `k` singular values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import scipy.linalg
import torch
from scipy.linalg import blas, lapack
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

FEW = 0.6
"""Share of all eigenvectors up to which fewer of them take less time."""

ROWS = 1 << 19
"""Elements of the rows that are worked on at a time: enough for products of matrices, few beside a matrix."""

FEWEST = 1 << 15
"""Elements of the rows of the smallest matrices that are worked on at a time."""

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
    with _threads_of_torch():
        for block_rs in blocks():
            _add_square(gram_ss, block_rs)
    return _mirrored(gram_ss)


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
    with _threads_of_torch():
        _add_square(gram_kk.zero_(), vectors_ks)
    return _mirrored(gram_kk), values_k


def between_polar_factors(left: Blocks, values_k: Tensor, right_ks: Tensor) -> Tensor:
    """(LᵀL)^(−½) S (RRᵀ)^(−½) R: times L on its left it is L⊥ S R⊥, with the polar factors of L and R.

    The two roots share the memory of one matrix, a triangle each.

    Args:
        left: L in blocks of rows, with as many columns as R has rows.
        values_k: The diagonal of S.
        right_ks: R, which is not changed.

    Returns:
        A new matrix of the shape of R.
    """
    count = len(right_ks)
    # Column by column, as LAPACK sees them: `of_left` has its upper triangle here, `of_right` its lower one.
    room = np.zeros((count, count + 1), order="F")
    of_right, of_left = room[:, :count], room[:, 1:]
    with _threads_of_torch():
        for block_rk in left():
            blas.dsyrk(1.0, block_rk.numpy().T, beta=1.0, c=of_right, lower=1, overwrite_c=1)
        _root_into(of_left, of_right, lower=0)
        blas.dsyrk(1.0, right_ks.numpy().T, trans=1, c=of_right, lower=1, overwrite_c=1)
        _root_into(of_right, of_right, lower=1)
        core_sk = blas.dsymm(1.0, of_right, right_ks.numpy().T, side=1, lower=1)
        core_sk *= values_k.numpy()
        for rows in _spans(len(core_sk), count):
            core_sk[rows] = blas.dsymm(1.0, of_left, np.asfortranarray(core_sk[rows]), side=1, lower=0)
    return torch.from_numpy(core_sk.T)


def _root_into(root: np.ndarray, gram_kk: np.ndarray, *, lower: int) -> None:
    """Puts G^(−½), see `inverse_root`, into one triangle; G is the lower triangle of a matrix, and is spoilt."""
    values_k, vectors_ks = _eigen(torch.from_numpy(gram_kk.T))
    vectors_ks.mul_(values_k.rsqrt()[:, None])
    blas.dsyrk(1.0, vectors_ks.numpy().T, c=root, lower=lower, overwrite_c=1)


def _add_square(summed_ss: Tensor, rows_rs: Tensor) -> None:
    """Adds RᵀR to the upper triangle of a sum, which is the lower one to BLAS, column by column."""
    blas.dsyrk(1.0, rows_rs.numpy().T, beta=1.0, c=summed_ss.numpy().T, lower=1, overwrite_c=1)


def _mirrored(upper_ss: Tensor) -> Tensor:
    """A symmetric matrix of which the upper triangle is filled, completed in its memory."""
    for rows in _spans(len(upper_ss), len(upper_ss)):
        corner = upper_ss[rows, rows]
        corner.copy_(corner.triu() + corner.triu(1).T)
        upper_ss[rows.stop :, rows] = upper_ss[rows, rows.stop :].T
    return upper_ss


def _spans(rows: int, columns: int) -> Iterator[slice]:
    """Rows that are worked on at a time, see `rows_at_a_time`."""
    step = max(1, rows_at_a_time((rows, columns)) // max(1, columns))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def rows_at_a_time(shape: Sequence[int]) -> int:
    """Elements of the rows of a matrix that are worked on at a time: `ROWS`, of a small one a small part."""
    return min(ROWS, max(FEWEST, math.prod(shape) // 32))


def cholesky(gram_ss: Tensor) -> Tensor:
    """The lower factor of a positive definite matrix, in its memory; what is above the diagonal is zero."""
    with _threads_of_torch():
        # What is the upper triangle to LAPACK, column by column, is the lower one row by row.
        factor = scipy.linalg.cholesky(gram_ss.numpy().T, lower=False, overwrite_a=True, check_finite=False)
    return torch.from_numpy(factor.T)


def divide_(rows_rs: Tensor, factor_ss: Tensor) -> Tensor:
    """XM⁻¹ for X of any number of rows, in its memory, with the lower Cholesky factor of M."""
    with _threads_of_torch():
        lapack.dpotrs(factor_ss.numpy().T, rows_rs.numpy().T, lower=0, overwrite_b=1)
    return rows_rs


def _eigen(gram_ss: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Square roots of the eigenvalues that are not negligible, ascending, and their vectors as rows.

    By LAPACK's syevr, which takes the vectors beside the matrix where torch's syevd takes three matrices.

    Args:
        gram_ss: The matrix; its upper triangle is read and spoilt.
        count: How many are wanted, the largest; all where None.
    """
    side = len(gram_ss)
    few = (side - count, side - 1) if count is not None and 0 < count < FEW * side else None
    with _threads_of_torch():
        squares, vectors = scipy.linalg.eigh(
            gram_ss.numpy().T, overwrite_a=True, check_finite=False, subset_by_index=few
        )
    values = np.sqrt(squares.clip(min=0))
    rank = int((values > NEGLIGIBLE * values[-1]).sum()) if len(values) else 0
    first = len(values) - (rank if count is None else min(rank, count))
    return torch.from_numpy(values[first:]), torch.from_numpy(vectors.T[first:])


def _threads_of_torch() -> Any:
    """Lets the library below SciPy use as many threads as torch."""
    return _controller().limit(limits=torch.get_num_threads(), user_api="blas")


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def _top(gram_ss: Tensor, count: int) -> Singular:
    """The largest singular values of a matrix by its product with itself, which is spoilt."""
    values_k, vectors_ks = _eigen(gram_ss, count)
    order_k = torch.arange(len(values_k) - 1, -1, -1)
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
