"""The groups of matrices that an axis may be transformed by, beyond permutations.

A transform of an axis keeps the function of a model if whatever writes the axis and whatever reads it change together.
Where nothing but linear maps touch the axis every invertible matrix M does, applied as M to the writers and as M⁻ᵀ to
the readers. For an orthogonal matrix the two are the same, so that a tensor need not say on which side it stands; what
is not orthogonal in M is taken away beforehand (`hf_llfc.symmetry.canonical`). What each axis allows:

- `orthogonal`, Q Qᵀ = 1: channels between two linear maps (values, and queries and keys without a rotary embedding),
  and a residual stream that is read through RMSNorm without gain only: RMSNorm(Qx) = Q RMSNorm(x), since Q keeps the
  norm of x.
  Of one channel it is a sign: of what a gate multiplies, in each neuron.
- `orthogonal_fixing_ones`, besides Q·1 = 1: a residual stream that is read through LayerNorm without gain and shift
  only. LayerNorm takes away the part of x along 1 and normalises the rest. Q maps both parts to themselves, so that
  LayerNorm(Qx) = Q LayerNorm(x); no other orthogonal map does so for every x.
- `phases`: one rotation in the plane of each pair of channels (c, c + n/2), a complex number of modulus 1. A rotary
  embedding multiplies the pairs by such numbers itself, and these commute: ⟨R_s M q, R_t M k⟩ = ⟨M R_s q, M R_t k⟩ =
  ⟨R_s q, R_t k⟩ (Su et al., RoFormer, 2021).

Theus et al., *Generalized Linear Mode Connectivity for Transformers*, NeurIPS 2025, name the symmetries of
transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ORTHOGONAL = "orthogonal"
ORTHOGONAL_FIXING_ONES = "orthogonal_fixing_ones"
PHASES = "phases"


@dataclass(frozen=True)
class MatrixGroup:
    """A closed subgroup of the orthogonal matrices.

    Attributes:
        name: What specs call it.
        nearest: gain `[.., n, n]` → the matrix M of the group that maximises ⟨gain, M⟩, in closed form.
        tangent: any matrix `[.., n, n]` → the nearest one of the group's Lie algebra, an antisymmetric matrix.
        random: (n, generator) → a uniformly random matrix `[n, n]`, float64.
    """

    name: str
    nearest: Callable[[Tensor], Tensor]
    tangent: Callable[[Tensor], Tensor]
    random: Callable[[int, torch.Generator], Tensor]


def _procrustes(gain: Tensor) -> Tensor:
    """U Vᵀ of gain = U S Vᵀ (Schönemann, *A generalized solution of the orthogonal Procrustes problem*, 1966)."""
    left, _, right = torch.linalg.svd(gain)
    return left @ right


def _procrustes_fixing_ones(gain: Tensor) -> Tensor:
    """Finds the best rotation of what is orthogonal to 1.

    The part of the gain along 1 does not count. In its place 1 is made a singular vector, with a singular value that
    no other can have, so that U Vᵀ maps it to itself.
    """
    size = gain.shape[-1]
    centred = gain - gain.mean(-1, keepdim=True)
    centred = centred - centred.mean(-2, keepdim=True)
    apart = 1 + 2 * torch.linalg.matrix_norm(centred, keepdim=True)
    return _procrustes(centred + apart / size)


def _best_phases(gain: Tensor) -> Tensor:
    """Each pair turned by the angle of its complex gain."""
    half = gain.shape[-1] // 2
    parts = gain.unflatten(-1, (2, half)).unflatten(-3, (2, half)).diagonal(dim1=-3, dim2=-1)  # [.., 2, 2, half]
    along = parts[..., 0, 0, :] + parts[..., 1, 1, :]
    across = parts[..., 1, 0, :] - parts[..., 0, 1, :]
    return rotations(torch.atan2(across, along))


def rotations(angles: Tensor) -> Tensor:
    """The matrix that turns the pair (c, c + n/2) by the angle c: `[.., n/2]` radians → `[.., n, n]`."""
    cosine, sine = torch.diag_embed(angles.cos()), torch.diag_embed(angles.sin())
    return torch.cat([torch.cat([cosine, -sine], -1), torch.cat([sine, cosine], -1)], -2)


def cayley(tangent: Tensor) -> Tensor:
    """(1 − S)⁻¹ (1 + S) of antisymmetric S `[.., n, n]`: orthogonal, in the group in whose Lie algebra S lies.

    For an orthogonal map that fixes 1, S·1 = 0, and for phases S commutes with the quarter turn of every pair.
    """
    one = torch.eye(tangent.shape[-1], dtype=tangent.dtype, device=tangent.device)
    return torch.linalg.solve(one - tangent, one + tangent)


def _antisymmetric(matrix: Tensor) -> Tensor:
    return (matrix - matrix.mT) / 2


def _antisymmetric_against_ones(matrix: Tensor) -> Tensor:
    centred = matrix - matrix.mean(-1, keepdim=True)
    return _antisymmetric(centred - centred.mean(-2, keepdim=True))


def _pair_rates(matrix: Tensor) -> Tensor:
    half = matrix.shape[-1] // 2
    rates = torch.diagonal(_antisymmetric(matrix), half, -1, -2)
    block, nothing = torch.diag_embed(rates), torch.zeros_like(matrix[..., :half, :half])
    return torch.cat([torch.cat([nothing, -block], -1), torch.cat([block, nothing], -1)], -2)


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Uniform over all orthogonal matrices (Mezzadri, *How to generate random matrices*, 2007)."""
    factor, triangle = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return factor * triangle.diagonal().sign()


def _random_fixing_ones(size: int, generator: torch.Generator) -> Tensor:
    basis = torch.linalg.qr(torch.cat([torch.ones(size, 1), torch.eye(size)[:, 1:]], 1).double())[0][:, 1:]
    return basis @ _random_orthogonal(size - 1, generator) @ basis.T + 1 / size


def _random_phases(size: int, generator: torch.Generator) -> Tensor:
    return rotations(2 * torch.pi * torch.rand(size // 2, generator=generator, dtype=torch.float64))


MATRIX_GROUPS = {
    group.name: group
    for group in (
        MatrixGroup(ORTHOGONAL, _procrustes, _antisymmetric, _random_orthogonal),
        MatrixGroup(ORTHOGONAL_FIXING_ONES, _procrustes_fixing_ones, _antisymmetric_against_ones, _random_fixing_ones),
        MatrixGroup(PHASES, _best_phases, _pair_rates, _random_phases),
    )
}
