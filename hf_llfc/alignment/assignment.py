"""Exact linear assignment."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hf_llfc.errors import AlignmentError


def assign(gain: Tensor) -> Tensor:
    """Finds the permutation that maximises `Σ_i gain[i, perm[i]]`, exactly.

    Where every row's largest entry lies in a column of its own, these entries are the optimum: usual for two
    fine-tunes of one base, and two orders of magnitude cheaper at the widths of large models. Otherwise SciPy's
    shortest augmenting paths (Crouse 2016) decide, in float64.

    Args:
        gain: `[n, n]`, finite.

    Returns:
        Indices `[n]`, int64.

    Raises:
        AlignmentError: The matrix holds NaN or Inf.
    """
    if not bool(torch.isfinite(gain).all()):
        raise AlignmentError("the matching gains hold NaN or Inf: a weight or an activation is not finite")
    best = gain.argmax(dim=1)
    if torch.bincount(best, minlength=gain.shape[0]).max() <= 1:
        return best.cpu()
    _, columns = linear_sum_assignment(gain.cpu().double().numpy(), maximize=True)
    return torch.from_numpy(columns).long()
