"""Linear assignment: exact, or with a certified gap.

Seconds for n × n float32 gains on two cores, planted permutation under noise / product of Gaussians / decaying spectrum
(`benchmarks/assignment.py`; the others are lapx and OR-tools):

| n | SciPy | best other solver | here |
|---|---|---|---|
| 768 | .003 / .016 / .04 | .001 / .011 / .04 | .001 / .012 / .014 |
| 4096 | .20 / 1.0 / 4.3 | .04 / .66 / 1.6 | .018 / .34 / .31 |
| 8192 | .8 / 6 / 25 | .17 / 3.1 / 7 | .12 / 1.0 / 1.2 |
| 14336 | 2.4 / 22 / – | .5 / 12 / 26 | .29 / 2.8 / 7 |

So where nearly all rows prefer a column of their own, the others are given theirs one by one; else SciPy decides below
a width of `WIDE`, given good prices to start from, and beyond it the auction with its exact finish.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hf_llfc.alignment.assignment import auction, augmenting
from hf_llfc.errors import AlignmentError

WIDE = 1024

# From this width on it pays to estimate prices for SciPy.
ENTROPIC = 256

# The entropy's temperature, in standard deviations of the gains; steps; the smallest logarithm of a kernel's entry;
# rows whose spread is looked at, about.
TEMPERATURE = 0.1
STEPS = 10
FARTHEST = -60.0
SAMPLED = 64

# Where so many of the rows prefer a column of their own, the others are given theirs one by one.
NEARLY = 0.9

# Numbers that are looked at at a time, which stay in the cache.
CACHED = 1 << 18

# The largest certified gap of the approximate solver, as a part of the objective.
GAP = 1e-4


def assign(gain: Tensor, *, solver: str = "exact") -> Tensor:
    """Finds the permutation that maximises `Σ_i gain[i, perm[i]]`.

    Where every row's largest entry lies in a column of its own, these entries are the optimum: usual for two
    fine-tunes of one base. Otherwise the auction of `hf_llfc.alignment.assignment.auction` finds the optimum of wide
    matrices, and SciPy's shortest augmenting paths (Crouse 2016) that of small ones, and of those where the auction
    gives up; both are exact in float64.

    Args:
        gain: `[n, n]`, finite.
        solver: One of `SOLVERS`; see `assign_with_gap`.

    Returns:
        Indices `[n]`, int64.

    Raises:
        AlignmentError: The matrix holds NaN or Inf.
    """
    return assign_with_gap(gain, solver=solver)[0]


def assign_with_gap(gain: Tensor, *, solver: str = "exact") -> tuple[Tensor, float]:
    """Assigns rows to columns, with a bound on what the answer lacks.

    Args:
        gain: `[n, n]`, finite.
        solver: `exact`, or `auction`, which is content with a certified gap of `GAP` in wide matrices, and takes the
            best that it found in bounded work where it does not reach that.

    Returns:
        Indices `[n]`, int64, and by how much another permutation could at most raise the objective; 0 for an optimum.

    Raises:
        AlignmentError: The matrix holds NaN or Inf.
    """
    size = gain.shape[0]
    best_i = _best_of_rows(gain)
    distinct = int((np.bincount(best_i, minlength=size) > 0).sum())
    if distinct == size:
        return torch.from_numpy(best_i), 0.0
    gain = gain.cpu()
    if distinct >= NEARLY * size:
        perm_i = augmenting.complete(_as_array(gain), best_i, size)
        if perm_i is not None:
            return torch.from_numpy(perm_i), 0.0
    if size >= WIDE:
        answer = auction.solve(gain, gap=GAP if solver == "auction" else 0.0)
        if answer is not None:
            return answer.perm, 0.0 if answer.is_optimal else max(0.0, answer.bound - answer.value)
    # The nearer prices are to those of the optimum, the shorter are the paths of SciPy.
    worth = gain.double() - _entropic_prices(gain) if size >= ENTROPIC else gain.double()
    cost = worth.amax(1, keepdim=True) - worth
    _, columns = linear_sum_assignment((cost - cost.amin(0)).numpy())
    return torch.from_numpy(columns).long(), 0.0


def _entropic_prices(gain: Tensor) -> Tensor:
    """Prices of the columns in the assignment problem with an entropy (Cuturi, "Sinkhorn Distances", NeurIPS 2013).

    Few steps of Sinkhorn's algorithm come near enough to the prices of the optimum for SciPy to take half the time.

    Args:
        gain: `[n, n]`, finite.

    Returns:
        Prices `[n]`, float64; those of nothing but the columns' means where the steps leave the range of float32.
    """
    mean_j = gain.double().mean(0)
    if not bool(mean_j.isfinite().all()):
        return torch.zeros_like(mean_j)
    centred = (gain - mean_j.to(gain.dtype)).float()
    temperature = TEMPERATURE * float(centred[:: max(1, len(gain) // SAMPLED)].std())
    if not 0 < temperature < torch.inf:
        return mean_j
    # What is far from the best of its row plays no part, and would be slow as the smallest of numbers are.
    kernel = ((centred - centred.amax(1, keepdim=True)) / temperature).clamp_(min=FARTHEST).exp_()
    scale_j = torch.ones_like(kernel[0])
    for _ in range(STEPS):
        scale_i = 1 / (kernel @ scale_j)
        scale_j = 1 / (kernel.T @ scale_i)
    prices = mean_j - scale_j.double().log() * temperature
    return prices if bool(prices.isfinite().all()) else mean_j


def _best_of_rows(gain: Tensor) -> NDArray[np.int64]:
    """Column of the largest entry of every row.

    Raises:
        AlignmentError: The matrix holds NaN or Inf.
    """
    if gain.device.type == "cpu":
        matrix = _as_array(gain)
        rows = max(1, CACHED // matrix.shape[1])
        best_i = np.empty(len(matrix), dtype=np.int64)
        lowest = []
        for start in range(0, len(matrix), rows):
            part = matrix[start : start + rows]
            best_i[start : start + rows] = part.argmax(1)
            lowest.append(part.min())
        # NaN is the largest and the smallest.
        is_finite = bool(np.isfinite([np.min(lowest), matrix[np.arange(len(matrix)), best_i].max()]).all())
    else:
        best_i = gain.argmax(dim=1).cpu().numpy()
        is_finite = bool(torch.stack(torch.aminmax(gain)).isfinite().all())
    if not is_finite:
        raise AlignmentError("the matching gains hold NaN or Inf: a weight or an activation is not finite")
    return best_i


def _as_array(gain: Tensor) -> NDArray[Any]:
    return (gain if gain.dtype in (torch.float32, torch.float64) else gain.double()).numpy()
