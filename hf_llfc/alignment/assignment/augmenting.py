"""Exact assignment where nearly every row prefers a column of its own: shortest augmenting paths for the others.

Every row begins with its largest entry as its profit, every column with price 0, so that `profit[i] + price[j] ≥
gain[i, j]` holds for the whole matrix. Each row without a column then takes the shortest path of slacks to a free
column, which keeps the inequality, with equality for what is assigned (Jonker and Volgenant, "A shortest augmenting
path algorithm for dense and sparse linear assignment problems", Computing 1987): so the end is an optimum, and nothing
but the rows on the paths is looked at again. A planted permutation under noise is such a case, and two models that are
nearly matched.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Numbers = NDArray[np.float64]


def complete(gain: NDArray[Any], best_i: Indices, steps: int) -> Indices | None:
    """Maximises `Σ_i gain[i, perm[i]]`.

    Args:
        gain: `[n, n]`, finite.
        best_i: Column of the largest entry of every row.
        steps: Number of rows that may be looked at again.

    Returns:
        Column of every row, or None if the paths are longer than that.
    """
    n = best_i.size
    profit_i: Numbers = gain[np.arange(n), best_i].astype(np.float64)
    price_j = np.zeros(n)
    owner_j = np.full(n, -1)
    order = profit_i.argsort()
    owner_j[best_i[order]] = order  # the last, which gains most, stays
    for row in np.setdiff1d(np.arange(n), owner_j):
        steps -= _augment(gain, int(row), profit_i, price_j, owner_j, steps)
        if steps < 0:
            return None
    perm_i = np.empty(n, dtype=np.int64)
    perm_i[owner_j] = np.arange(n)
    return perm_i


def _augment(gain: NDArray[Any], row: int, profit_i: Numbers, price_j: Numbers, owner_j: Indices, most: int) -> int:
    """Gives a row a column along the shortest path; the number of rows that it took, or more than `most`."""
    n = price_j.size
    far_j = price_j - gain[row]  # how far a column is, and infinity once its distance is final
    far_j += profit_i[row]
    from_j = np.full(n, row)
    closed: list[int] = []
    distances: list[float] = []
    through_j = np.empty(n)
    while True:
        column = int(far_j.argmin())
        distance = float(far_j[column])
        owner = int(owner_j[column])
        if owner < 0:
            break
        if len(closed) >= most:
            return most + 1
        closed.append(column)
        distances.append(distance)
        np.subtract(price_j, gain[owner], out=through_j)
        through_j += profit_i[owner] + distance
        through_j[closed] = np.inf
        far_j[column] = np.inf
        nearer = np.flatnonzero(through_j < far_j)
        far_j[nearer] = through_j[nearer]
        from_j[nearer] = owner
    nearer_by = distance - np.array(distances)
    profit_i[row] -= distance
    profit_i[owner_j[closed]] -= nearer_by
    price_j[closed] += nearer_by
    end, column_of = column, dict(zip((int(owner_j[j]) for j in closed), closed, strict=True))
    while True:
        owner = int(from_j[end])
        owner_j[end] = owner
        if owner == row:
            return len(closed) + 1
        end = column_of[owner]
