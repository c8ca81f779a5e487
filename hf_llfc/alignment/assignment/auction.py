"""Linear assignment of large matrices: rough prices by auction, an exact finish on the few entries that are near tight.

Columns have prices p. At the optimum every row i is assigned to a column that maximises `gain[i, j] − p[j]`; for any
prices, Σ_i max_j (gain[i, j] − p[j]) + Σ_j p[j] bounds the objective of every assignment from above (duality).

1. An auction (Bertsekas 1988) in blocks of rows, with a coarse ε, gives prices from which few rows remain unassigned.
   Its long tail, where a handful of rows outbid each other, is never run.
2. The entries of each row that are largest under these prices are a sparse problem, which SciPy's Jonker–Volgenant
   solver for sparse matrices answers exactly.
3. The answer gives exact prices for the sparse problem (longest paths, Bellman–Ford), and one pass over the whole
   matrix with these finds every entry that could do better. They join the sparse problem until there is none: the
   answer is then the optimum of the whole matrix. The passes compute in float32; what lies within its rounding is
   decided in float64.

Every step is bounded; what does not come to an end (nearly constant matrices, whose entries are all tight) is left to
the caller. Shape suffixes: i a row, j a column, e an entry of the sparse problem.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

# Bids raise prices by at least this part of the standard deviation of the gains.
EPSILON = 0.1

# The auction ends when this part of the rows is left, or after so many passes over the matrix.
LEFT = 0.02
PASSES = 25

# How many entries of each row the sparse problem begins with.
NEAREST = 16

# Its first extension takes in what misses the profit of its row by this part of the standard deviation, too.
REACH = 0.1

# How often it is extended, and how many entries a row it may come to hold on average.
EXTENSIONS = 10
DENSEST = 128

# How many entries a row are looked at in float64 on average, at most.
SEEN = 1024

# Prices of the sparse problem have settled after so many steps, or never will.
STEPS = 500

# Matrices are looked at so many numbers at a time, which stay in the cache.
BLOCK = 1 << 20

# A row is looked at through the largest of every so many entries, which takes no longer than reading it.
STRIDES = 64

# Where less than this part of the numbers of a row are different, other solvers are quicker.
TIED = 0.5

# Rounding of prices and gains in float64, as a part of the largest number.
ROUNDING = 1e-14

Indices = NDArray[np.int64]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Assignment:
    """A permutation and what it is worth.

    Attributes:
        perm: Column of every row, int64 `[n]`.
        value: Σ gain[i, perm[i]].
        bound: Value that no permutation exceeds.
        is_optimal: Whether none is better, up to float64 rounding.
    """

    perm: Tensor
    value: float
    bound: float
    is_optimal: bool

    @property
    def gap(self) -> float:
        """Largest possible improvement by another permutation, as a part of the value."""
        return max(0.0, self.bound - self.value) / max(abs(self.value), 1e-300)


def solve(gain: Tensor, *, gap: float = 0.0) -> Assignment | None:
    """Maximises `Σ_i gain[i, perm[i]]`.

    Args:
        gain: `[n, n]`, finite, on the CPU.
        gap: An answer whose certified gap is no larger is good enough; 0 asks for the optimum.

    Returns:
        The answer; with a gap of 0 the optimum, or None if it was not found within bounded work. With a larger gap the
        best found, whose own `gap` says what is certain. None also where numbers repeat so often that nearly all of
        them are tight.
    """
    low, high = (float(bound) for bound in torch.aminmax(gain))
    if high <= low or gain[0].unique().numel() < TIED * gain.shape[0]:
        return None
    centre, half, largest = 0.0, 1.0, max(abs(low), abs(high))
    single = gain
    if gain.dtype != torch.float32 or not 1e-30 < (high - low) <= 4 * max(abs(low), abs(high)) < 1e30:
        centre, half, largest = high / 2 + low / 2, high / 2 - low / 2, 1.0
        single = ((gain.double() - centre) / half).float()
    return _Search(gain, single, centre, half, largest).run(gap)


class _Search:
    """One assignment problem on its way.

    Args:
        gain: The gains as given, `[n, n]`.
        single: The same in float32, `(gain − centre) / half`; the search is in these units.
        centre: See `single`.
        half: See `single`.
        largest: The largest magnitude in `single`.
    """

    def __init__(self, gain: Tensor, single: Tensor, centre: float, half: float, largest: float) -> None:
        self.gain, self.single, self.centre, self.half = gain, single, centre, half
        self.n = gain.shape[0]
        self.is_plain = single is gain
        self.rows = max(1, BLOCK // self.n)
        # Rows are filled up to whole strides.
        self.kinds = -(-self.n // STRIDES)
        self.buffer = torch.full((self.rows, self.kinds * STRIDES), -torch.inf)
        self.bids_i = torch.zeros(self.n, dtype=torch.int32)
        self.largest = largest
        # Offsets of whole rows and columns mean nothing for an assignment; what columns differ by are prices already.
        sample = single[:: max(1, self.n // 64)]
        sample = sample - sample.mean(1, keepdim=True)
        offset_j = sample.mean(0)
        self.deviation = float((sample - offset_j).square().mean().sqrt()) or self.largest
        has_offsets = float(offset_j.square().mean().sqrt()) > self.deviation / 2
        self.offset_j = offset_j if has_offsets else torch.zeros(self.n)

    def run(self, gap: float) -> Assignment | None:
        """Searches until the gap is certain, or gives up."""
        prices, owner_j = self._auction()
        perm_i = _completed(owner_j)
        rows_e, columns_e = self._nearest(prices, owner_j)
        rows_e = np.concatenate([rows_e, np.arange(self.n)])
        columns_e = np.concatenate([columns_e, perm_i])
        prices_j = prices.double().numpy()
        best: Assignment | None = None
        for extension in range(EXTENSIONS):
            rows_e, columns_e = _once(rows_e, columns_e, self.n)
            if rows_e.size > DENSEST * self.n:
                break
            gain_e = self._entries(rows_e, columns_e)
            perm_i = _sparse_optimum(rows_e, columns_e, gain_e, prices_j, self.n)
            settled = _settled_prices(rows_e, columns_e, gain_e, perm_i, prices_j)
            if settled is None:
                break
            prices_j = settled
            value_i = self._entries(np.arange(self.n), perm_i)
            reach = 0.0 if extension else REACH * self.deviation
            bound, is_optimal, better_e = self._better(prices_j, value_i - prices_j[perm_i], reach)
            best = self._answer(perm_i, float(value_i.sum()), bound, is_optimal)
            if is_optimal or (gap > 0 and best.gap <= gap):
                return best
            rows_e = np.concatenate([rows_e, better_e[0]])
            columns_e = np.concatenate([columns_e, better_e[1]])
        return best if gap > 0 else None

    def _answer(self, perm_i: Indices, value: float, bound: float, is_optimal: bool) -> Assignment:
        """The answer in the units of the gains as given."""
        perm = torch.from_numpy(perm_i)
        exact = float(self.gain[torch.arange(self.n), perm].double().sum())
        return Assignment(perm, exact, exact + max(0.0, bound - value) * self.half, is_optimal)

    def _entries(self, rows: Indices, columns: Indices) -> Numbers:
        """Gains in float64."""
        entries = self.gain[torch.from_numpy(rows), torch.from_numpy(columns)].double().numpy()
        return entries if self.is_plain else (entries - self.centre) / self.half

    def _auction(self) -> tuple[Tensor, Indices]:
        """Prices under which most rows have a column of their own, and whose each column is (−1: nobody's)."""
        prices = self.offset_j.clone()
        owner_j = torch.full((self.n,), -1, dtype=torch.int64)
        epsilon = EPSILON * self.deviation
        waiting = torch.arange(self.n)
        budget = PASSES * self.n
        while waiting.numel() > LEFT * self.n and budget > 0:
            budget -= max(waiting.numel(), self.rows // 4)
            still = [self._bid(part, prices, owner_j, epsilon) for part in waiting.split(self.rows)]
            waiting = torch.cat(still)
        return prices, owner_j.numpy()

    def _bid(self, rows: Tensor, prices: Tensor, owner_j: Tensor, epsilon: float) -> Tensor:
        """Rows bid for their best columns; returns those that have none afterwards."""
        worth = self.buffer[: rows.numel(), : self.n]
        self.bids_i[rows] += 1
        is_run = int(rows[-1]) - int(rows[0]) == rows.numel() - 1 and bool((rows[1:] > rows[:-1]).all())
        torch.sub(self.single[int(rows[0]) : int(rows[-1]) + 1] if is_run else self.single[rows], prices, out=worth)
        best, column = worth.max(1)
        worth.scatter_(1, column[:, None], -torch.inf)
        second = worth.amax(1)
        if self.n == 1:
            second = best
        bid, order = (prices[column] + (best - second) + epsilon).sort()
        column, rows = column[order], rows[order]
        # NumPy's assignment is in order: the last, which is the highest bid, stays.
        outbid = owner_j[column]
        prices.numpy()[column.numpy()] = bid.numpy()
        owner_j.numpy()[column.numpy()] = rows.numpy()
        return torch.cat([rows[owner_j[column] != rows], outbid[outbid >= 0].unique()])

    def _nearest(self, prices: Tensor, owner_j: Indices) -> tuple[Indices, Indices]:
        """Rows and columns of the best entries of every row that was outbid, or whose column was bid for twice."""
        contested = self.bids_i > 1
        contested[np.setdiff1d(np.arange(self.n), owner_j)] = True
        rows = contested.nonzero()[:, 0]
        count = min(NEAREST, self.n)
        columns = [
            torch.sub(self.single[part], prices, out=self.buffer[: part.numel(), : self.n])
            .topk(count, dim=1, sorted=False)
            .indices.flatten()
            for part in rows.split(self.rows)
        ]
        none = torch.zeros(0, dtype=torch.int64)
        return rows.repeat_interleave(count).numpy(), torch.cat([none, *columns]).numpy()

    def _better(
        self, prices_j: Numbers, profit_i: Numbers, reach: float
    ) -> tuple[float, bool, tuple[Indices, Indices]]:
        """Checks prices and profits of the sparse problem against the whole matrix.

        Returns:
            A bound on the objective, whether no entry exceeds the profit of its row, and else the rows and columns of
            those that do, or miss it by no more than `reach`.
        """
        prices, profit = torch.from_numpy(prices_j).float(), torch.from_numpy(profit_i).float()
        largest = self.largest + float(np.abs(prices_j).max()) + float(np.abs(profit_i).max())
        # Rounding of a gain, of a price, of their difference and of a profit.
        margin = 2 * torch.finfo(torch.float32).eps * largest
        lowest = profit - margin - reach
        strides: list[Tensor] = []
        for start in range(0, self.n, self.rows):
            part = self.single[start : start + self.rows]
            torch.sub(part, prices, out=self.buffer[: part.shape[0], : self.n])
            best_ik = self.buffer[: part.shape[0]].view(-1, STRIDES, self.kinds).amax(1)
            strides.append((best_ik >= lowest[start : start + part.shape[0], None]).nonzero())
            strides[-1][:, 0] += start
        rows, kinds = torch.cat(strides).T
        if rows.numel() * STRIDES > SEEN * self.n:
            return self._better_by_rows(prices_j, profit_i, largest)
        columns = kinds[:, None] + self.kinds * torch.arange(STRIDES)
        inside = columns < self.n
        columns = columns.clamp(max=self.n - 1)
        near = self.single[rows[:, None], columns] - prices[columns] >= lowest[rows, None]
        places = (near & inside).nonzero(as_tuple=True)
        rows_e, columns_e = rows[places[0]].numpy(), columns[places].numpy()
        excess_e = self._entries(rows_e, columns_e) - prices_j[columns_e] - profit_i[rows_e]
        excess_i = np.zeros(self.n)
        np.maximum.at(excess_i, rows_e, excess_e)
        bound = float(profit_i.sum() + prices_j.sum() + excess_i.sum())
        is_near = excess_e > (-reach if reach else ROUNDING * largest)
        return bound, not (excess_e > ROUNDING * largest).any(), (rows_e[is_near], columns_e[is_near])

    def _better_by_rows(
        self, prices_j: Numbers, profit_i: Numbers, largest: float
    ) -> tuple[float, bool, tuple[Indices, Indices]]:
        """Checks prices and profits in float64 where many entries are near: the best entries of rows exceeded."""
        count = min(NEAREST, self.n)
        excess_i = np.zeros(self.n)
        rows_e: list[Indices] = []
        columns_e: list[Indices] = []
        for start in range(0, self.n, self.rows):
            part = self.gain[start : start + self.rows].double()
            worth = (part if self.is_plain else (part - self.centre) / self.half) - torch.from_numpy(prices_j)
            best_ik, columns_ik = worth.topk(count, dim=1)
            excess_i[start : start + self.rows] = best_ik[:, 0].numpy() - profit_i[start : start + self.rows]
            exceeded = np.flatnonzero(excess_i[start : start + self.rows] > ROUNDING * largest)
            rows_e.append(np.repeat(start + exceeded, count))
            columns_e.append(columns_ik.numpy()[exceeded].ravel())
        bound = float(profit_i.sum() + prices_j.sum() + np.maximum(excess_i, 0).sum())
        is_optimal = not (excess_i > ROUNDING * largest).any()
        return bound, is_optimal, (np.concatenate(rows_e), np.concatenate(columns_e))


def _completed(owner_j: Indices) -> Indices:
    """A full permutation that keeps what rows have: column of every row."""
    n = owner_j.size
    perm_i = np.full(n, -1)
    owned = np.flatnonzero(owner_j >= 0)
    perm_i[owner_j[owned]] = owned
    perm_i[perm_i < 0] = np.flatnonzero(owner_j < 0)
    return perm_i


def _once(rows_e: Indices, columns_e: Indices, n: int) -> tuple[Indices, Indices]:
    """Each entry once, by rows."""
    places = np.unique(rows_e * n + columns_e)
    return places // n, places % n


def _sparse_optimum(rows_e: Indices, columns_e: Indices, gain_e: Numbers, prices_j: Numbers, n: int) -> Indices:
    """The best permutation of the sparse problem: column of every row."""
    worth_e = gain_e - prices_j[columns_e]
    starts = np.flatnonzero(np.diff(rows_e, prepend=-1))
    slack_e = np.maximum.reduceat(worth_e, starts)[rows_e] - worth_e
    # A stored zero would count as no entry at all.
    one = max(float(slack_e.max()), 1e-300)
    matrix = csr_matrix((slack_e / one + 1, (rows_e, columns_e)), shape=(n, n))
    _, perm_i = min_weight_full_bipartite_matching(matrix)
    return perm_i.astype(np.int64)


def _settled_prices(
    rows_e: Indices, columns_e: Indices, gain_e: Numbers, perm_i: Indices, prices_j: Numbers
) -> Numbers | None:
    """The smallest prices above the given ones under which no entry exceeds that of its row's assigned column.

    `p[j] ≥ p[perm[i]] + gain[i, j] − gain[i, perm[i]]` for every entry: longest paths, which end because the
    permutation is optimal. None if they do not.
    """
    order = np.argsort(columns_e, kind="stable")
    rows_e, columns_e, gain_e = rows_e[order], columns_e[order], gain_e[order]
    own_i = np.zeros(perm_i.size)
    is_own = perm_i[rows_e] == columns_e
    own_i[rows_e[is_own]] = gain_e[is_own]
    rise_e = gain_e - own_i[rows_e]
    from_e = perm_i[rows_e]
    starts = np.flatnonzero(np.diff(columns_e, prepend=-1))
    prices_j = prices_j.copy()
    tolerance = ROUNDING * (np.abs(gain_e).max() + np.abs(prices_j).max())
    for _ in range(STEPS):
        following = np.maximum.reduceat(prices_j[from_e] + rise_e, starts)
        rising = following > prices_j + tolerance
        if not rising.any():
            return prices_j
        prices_j[rising] = following[rising]
    return None
