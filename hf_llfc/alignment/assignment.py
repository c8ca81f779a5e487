"""Linear assignment: exact, or with a certified gap.

Seconds for n × n float32 gains on two cores, planted permutation under noise / product of Gaussians / decaying spectrum
(`benchmarks/assignment.py`):

| n | SciPy | `auction` |
|---|---|---|
| 768 | .007 / .04 / .09 | .02 / .04 / .04 |
| 2048 | .05 / .28 / 1.2 | .03 / .10 / .12 |
| 8192 | .6 / 7 / 50 | .35 / .8 / 1.2 |

So below a width of `SMALL` SciPy decides; up to `WIDE` it does where most rows prefer a column of their own, its best
case; beyond, the auction with its exact finish.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hf_llfc.alignment import auction
from hf_llfc.errors import AlignmentError

SMALL = 512
WIDE = 1024

# Where so many of the rows prefer a column of their own, shortest augmenting paths are short.
DISTINCT = 0.6

# The largest certified gap of the approximate solver, as a part of the objective.
GAP = 1e-4


def assign(gain: Tensor, *, solver: str = "exact") -> Tensor:
    """Finds the permutation that maximises `Σ_i gain[i, perm[i]]`.

    Where every row's largest entry lies in a column of its own, these entries are the optimum: usual for two
    fine-tunes of one base. Otherwise the auction of `hf_llfc.alignment.auction` finds the optimum of wide
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
    """The same, with what is certain of the answer.

    Args:
        gain: `[n, n]`, finite.
        solver: `exact`, or `auction`, which is content with a certified gap of `GAP` in wide matrices, and takes the
            best that it found in bounded work where it does not reach that.

    Returns:
        Indices `[n]`, int64, and by how much another permutation could at most raise the objective; 0 for an optimum.

    Raises:
        AlignmentError: The matrix holds NaN or Inf.
    """
    # NaN spreads, so that the ends of the range tell all; a test of each element takes twenty times as long.
    if not bool(torch.stack(torch.aminmax(gain)).isfinite().all()):
        raise AlignmentError("the matching gains hold NaN or Inf: a weight or an activation is not finite")
    size = gain.shape[0]
    best = gain.argmax(dim=1).cpu()
    distinct = int((torch.bincount(best, minlength=size) > 0).sum())
    if distinct == size:
        return best, 0.0
    gain = gain.cpu()
    if size >= WIDE or (size >= SMALL and distinct < DISTINCT * size):
        found = auction.solve(gain, gap=GAP if solver == "auction" else 0.0)
        if found is not None:
            return found.perm, 0.0 if found.is_optimal else max(0.0, found.bound - found.value)
    _, columns = linear_sum_assignment(gain.double().numpy(), maximize=True)
    return torch.from_numpy(columns).long(), 0.0
