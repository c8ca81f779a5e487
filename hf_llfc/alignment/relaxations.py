"""Differentiable stand-ins for the transforms of axes, which a loss can be minimised over.

A matrix of a group is a start times the Cayley transform of an antisymmetric matrix. A permutation is the best
assignment of a matrix of scores, whose gradient is taken to be that of the scores themselves (straight-through; Bengio
et al., 2013; Ainsworth et al., *Git Re-Basin*, ICLR 2023, for permutations), or of their Sinkhorn normalisation, the
entropic relaxation of the assignment (Peña et al., *Re-basin via implicit Sinkhorn differentiation*, CVPR 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_llfc.alignment.assignment.assignment import assign
from hf_llfc.symmetry.declarations import PERMUTATION
from hf_llfc.symmetry.matrix_groups import MATRIX_GROUPS, cayley
from hf_llfc.symmetry.orthogonal import Orthogonal, multiply_along
from hf_llfc.symmetry.spec import PermutationSpec
from hf_llfc.symmetry.transforms import Permutation, Transform

SINKHORN_SWEEPS = 20


@dataclass(frozen=True)
class Multiplied:
    """A transform as a matrix in the graph of a computation: what `Alignment.read_aligned` needs of a transform.

    Args:
        matrix: `[n, n]`, or `[parent, n, n]`.
    """

    matrix: Tensor
    is_identity: ClassVar[bool] = False

    def apply(self, tensor: Tensor, dim: int, parent_dim: int | None = None) -> Tensor:
        """Multiplies dimension `dim`."""
        return multiply_along(tensor, self.matrix, dim, parent_dim)

    def at(self, index: int) -> Multiplied:
        """The matrix at one index of the parent axis."""
        return Multiplied(self.matrix[index])


class RelaxedMatrix(nn.Module):
    """A matrix of a group near a start."""

    def __init__(self, start: Orthogonal, group: str) -> None:
        """Begins at `start`."""
        super().__init__()
        self._group = MATRIX_GROUPS[group]
        self._start: Tensor
        self.register_buffer("_start", start.matrix.float())
        self.rates = nn.Parameter(torch.zeros_like(self._start))

    def forward(self) -> Tensor:
        """The matrix, `[.., n, n]`."""
        return cayley(self._group.tangent(self.rates)) @ self._start

    def transform(self) -> Orthogonal:
        """The matrix without float32 rounding of its orthogonality."""
        with torch.no_grad():
            return Orthogonal(self._group.nearest(self().double().cpu()))


class RelaxedSigns(nn.Module):
    """Signs, the orthogonal matrices of one entry, which no path joins: of scores, with a straight-through gradient."""

    def __init__(self, start: Orthogonal) -> None:
        """Begins at `start`."""
        super().__init__()
        self.scores = nn.Parameter(start.matrix.float())

    def forward(self) -> Tensor:
        """`[.., 1, 1]`."""
        return self._signs() + self.scores - self.scores.detach()

    def transform(self) -> Orthogonal:
        """The present signs."""
        return Orthogonal(self._signs().double().cpu())

    def _signs(self) -> Tensor:
        return torch.where(self.scores.detach() < 0, -1.0, 1.0)


class RelaxedPermutation(nn.Module):
    """A permutation as the best assignment of scores."""

    def __init__(self, start: Permutation, temperature: float | None) -> None:
        """Begins at `start`.

        Args:
            start: A permutation, or one per index of the parent.
            temperature: Temperature of the Sinkhorn normalisation in the gradient; None for the scores themselves.
        """
        super().__init__()
        self.scores = nn.Parameter(torch.eye(start.size)[start.perm])
        self._temperature = temperature

    def forward(self) -> Tensor:
        """A permutation matrix, `[.., n, n]`, with the gradient of a relaxed one."""
        soft = self.scores if self._temperature is None else sinkhorn(self.scores / self._temperature)
        hard = torch.eye(self.scores.shape[-1], device=soft.device)[self._assigned().to(soft.device)]
        return hard + soft - soft.detach()

    def transform(self) -> Permutation:
        """The present assignment."""
        return Permutation(self._assigned())

    def _assigned(self) -> Tensor:
        scores = self.scores.detach()
        if scores.ndim == 2:
            return assign(scores).cpu()
        return torch.stack([assign(matrix).cpu() for matrix in scores])


def sinkhorn(scores: Tensor) -> Tensor:
    """Doubly stochastic matrices near exp(scores) `[.., n, n]` (Sinkhorn, 1964), in the logarithm."""
    for _ in range(SINKHORN_SWEEPS):
        scores = scores - scores.logsumexp(-1, keepdim=True)
        scores = scores - scores.logsumexp(-2, keepdim=True)
    return scores.exp()


def relaxation(
    spec: PermutationSpec, axis: str, start: Transform, temperature: float | None
) -> RelaxedMatrix | RelaxedSigns | RelaxedPermutation:
    """The stand-in for the transform of one axis."""
    group = spec.axes[axis].group
    if group != PERMUTATION:
        matrix = Orthogonal.of(start)
        return RelaxedSigns(matrix) if matrix.size == 1 else RelaxedMatrix(matrix, group)
    assert isinstance(start, Permutation)
    return RelaxedPermutation(start, temperature)
