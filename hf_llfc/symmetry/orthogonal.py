"""Orthogonal transforms of an axis; see `hf_llfc.symmetry.matrix_groups` for what may be transformed by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_llfc.errors import AlignmentError
from hf_llfc.symmetry.matrix_groups import MATRIX_GROUPS
from hf_llfc.symmetry.transforms import Permutation, Transform

# How far Q Qᵀ may be from 1 in a file, and a row of Q from that of the identity to count as not moved.
TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Orthogonal:
    """An orthogonal map of an axis: `aligned = matrix @ original` along it.

    Args:
        matrix: float64 `[size, size]`, or `[parent, size, size]` with one matrix per index of the parent axis; on the
            CPU, whatever device the tensors are on that it is applied to.

    Raises:
        AlignmentError: The matrix is not orthogonal.
    """

    matrix: Tensor
    kind: ClassVar[str] = "orthogonal"

    def __post_init__(self) -> None:
        matrix = self.matrix
        if matrix.dtype != torch.float64 or matrix.ndim not in (2, 3) or matrix.shape[-1] != matrix.shape[-2]:
            raise AlignmentError(
                f"not an orthogonal map: square matrices of float64 expected, {matrix.dtype} of shape "
                f"{list(matrix.shape)} found"
            )
        with torch.no_grad():
            error = (matrix @ matrix.mT - torch.eye(self.size, dtype=torch.float64)).abs().max() if self.size else 0
        if not float(error) <= TOLERANCE * max(1, self.size):
            raise AlignmentError(f"not an orthogonal map: Q Qᵀ differs from the identity by {float(error):.1e}")

    @classmethod
    def identity(cls, size: int, parent_size: int | None = None) -> Orthogonal:
        """The map that changes nothing."""
        matrix = torch.eye(size, dtype=torch.float64)
        return cls(matrix if parent_size is None else matrix.repeat(parent_size, 1, 1))

    @classmethod
    def random(cls, group: str, size: int, parent_size: int | None = None, *, generator: torch.Generator) -> Orthogonal:
        """A uniformly random map of a group of matrices, independent for each index of the parent."""
        draw = MATRIX_GROUPS[group].random
        if parent_size is None:
            return cls(draw(size, generator))
        return cls(torch.stack([draw(size, generator) for _ in range(parent_size)]))

    @classmethod
    def of(cls, transform: Transform) -> Orthogonal:
        """Any transform as an orthogonal map."""
        if isinstance(transform, Orthogonal):
            return transform
        assert isinstance(transform, Permutation), f"{transform.kind} is no orthogonal map"
        return cls(torch.eye(transform.size, dtype=torch.float64)[transform.perm])

    @classmethod
    def from_tensors(cls, parts: Mapping[str, Tensor], size: int, parent_size: int | None = None) -> Orthogonal:
        """Reads back what `tensors` returned.

        Args:
            parts: The stored data.
            size: Number of entries of the axis.
            parent_size: Number of entries of the axis it depends on.

        Raises:
            AlignmentError: The data are not those of an orthogonal map of that size.
        """
        expected = [size, size] if parent_size is None else [parent_size, size, size]
        present = {part: [str(tensor.dtype), list(tensor.shape)] for part, tensor in parts.items()}
        if present != {"matrix": [str(torch.float64), expected]}:
            raise AlignmentError(f"one float64 matrix of shape {expected} expected, {present} found")
        return cls(parts["matrix"])

    @property
    def size(self) -> int:
        """Number of entries of the axis."""
        return self.matrix.shape[-1]

    @property
    def units(self) -> int:
        """Number of channels that it acts on, summed over the indices of the parent."""
        return self.matrix.shape[:-1].numel()

    @property
    def moved(self) -> int:
        """Number of channels that change."""
        change = (self.matrix - torch.eye(self.size, dtype=torch.float64)).abs()
        return int((change.amax(-1) > TOLERANCE).sum()) if self.size else 0

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        return self.moved == 0

    def apply(self, tensor: Tensor, dim: int, parent_dim: int | None = None) -> Tensor:
        """Multiplies dimension `dim` of a floating-point tensor, in float32 or better, rounded once at the end."""
        return multiply_along(tensor, self.matrix, dim, parent_dim)

    def at(self, index: int) -> Orthogonal:
        """The map at one index of the parent axis."""
        return Orthogonal(self.matrix[index])

    def source(self, index: int) -> int:
        """Refused: no single entry becomes entry `index`."""
        raise AlignmentError(
            "an orthogonal map mixes the entries of its axis, and this axis is one of separate tensors"
        )

    def inverse(self, parent: Transform | None = None) -> Orthogonal:
        """The map that undoes this one."""
        inverted = self.matrix.mT.contiguous()
        return Orthogonal(inverted if parent is None else parent.inverse().apply(inverted, 0))

    def then(self, second: Transform, second_parent: Transform | None = None) -> Orthogonal:
        """Composes this map with `second`, which comes after it."""
        if self.matrix.ndim == 2:
            return Orthogonal(second.apply(self.matrix, 0))
        rows = self.matrix if second_parent is None else second_parent.apply(self.matrix, 0)
        return Orthogonal(second.apply(rows, 1, 0))

    def tensors(self) -> dict[str, Tensor]:
        """The matrix."""
        return {"matrix": self.matrix}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Orthogonal) and torch.equal(self.matrix, other.matrix)

    def __hash__(self) -> int:
        return hash(self.matrix.numpy().tobytes())


def multiply_along(tensor: Tensor, matrix: Tensor, dim: int, parent_dim: int | None = None) -> Tensor:
    """Multiplies one dimension of a tensor by a matrix.

    Args:
        tensor: Floating-point, any shape.
        matrix: `[out, into]`, or `[parent, out, into]` with one matrix per index of dimension `parent_dim`.
        dim: The dimension of size `into` that becomes `out`.
        parent_dim: Where the parent is.

    Returns:
        In the dtype of the tensor; computed in that or in float32, whichever is wider.
    """
    wide = torch.promote_types(tensor.dtype, torch.float32)
    matrix = matrix.to(tensor.device, wide)
    if matrix.ndim == 2:
        moved = tensor.to(wide).movedim(dim, -1) @ matrix.T
        return moved.movedim(-1, dim).to(tensor.dtype)
    assert parent_dim is not None, "a dependent map needs its parent dimension"
    rows = tensor.to(wide).movedim((parent_dim, dim), (0, 1))
    moved = (
        (matrix @ rows.flatten(2)).unflatten(2, rows.shape[2:]) if rows.ndim > 2 else (matrix @ rows[..., None])[..., 0]
    )
    return moved.movedim((0, 1), (parent_dim, dim)).to(tensor.dtype)
