"""Transforms of one axis: what alignment finds, and how tensors follow it.

A transform acts on one named axis of a tensor. An axis that depends on a parent (`q[kv]`) has one transform
per index of the parent, and is applied after the parent's: for permutations p of the parent and q of the child

    aligned[e, n] = original[p[e], q[e, n]].

Permutations are here, orthogonal maps in `hf_llfc.symmetry.orthogonal`. Everything outside this package goes through
the `Transform` protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from hf_llfc.errors import AlignmentError

# Bytes of an element → integers of that size.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Transform(Protocol):
    """A function-preserving linear map of one axis, or of one axis per index of its parent."""

    kind: ClassVar[str]

    @property
    def size(self) -> int:
        """Number of entries of the axis."""
        ...

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        ...

    @property
    def moved(self) -> int:
        """Number of units that the transform moves, summed over the indices of the parent."""
        ...

    @property
    def units(self) -> int:
        """Number of units that it acts on, summed over the indices of the parent."""
        ...

    def apply(self, tensor: Tensor, dim: int, parent_dim: int | None = None) -> Tensor:
        """Transforms dimension `dim`; dependent transforms find their (already transformed) parent at `parent_dim`."""
        ...

    def at(self, index: int) -> Transform:
        """The transform of a dependent axis at one index of its parent."""
        ...

    def source(self, index: int) -> int:
        """Finds the original entry that becomes entry `index`; only for transforms that move whole entries."""
        ...

    def inverse(self, parent: Transform | None = None) -> Transform:
        """The transform that undoes this one, given the transform of the parent axis."""
        ...

    def then(self, second: Transform, second_parent: Transform | None = None) -> Transform:
        """Composes this transform with a `second` after it, given the second transform of the parent axis."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The data to store, by part name."""
        ...


@dataclass(frozen=True, eq=False)
class Permutation:
    """A permutation of an axis, stored so that `aligned[i] = original[perm[i]]`.

    Args:
        perm: int64 `[size]`, or `[parent, size]` with one permutation per index of the parent axis; on the CPU,
            whatever device the tensors are on that it is applied to.

    Raises:
        AlignmentError: The array is not of integers, or a row is not a permutation of 0 … size − 1.
    """

    perm: Tensor
    kind: ClassVar[str] = "permutation"

    def __post_init__(self) -> None:
        if self.perm.dtype != torch.int64 or self.perm.ndim not in (1, 2):
            raise AlignmentError(
                f"not a permutation: one or two dimensions of int64 expected, {self.perm.dtype} of shape "
                f"{list(self.perm.shape)} found"
            )
        if not torch.equal(self.perm.sort(dim=-1).values, torch.arange(self.size).expand_as(self.perm)):
            raise AlignmentError(
                f"not a permutation: an index array of shape {list(self.perm.shape)} repeats an index, or holds one "
                f"outside 0 … {self.size - 1}"
            )

    @classmethod
    def identity(cls, size: int, parent_size: int | None = None) -> Permutation:
        """The permutation that moves nothing."""
        perm = torch.arange(size)
        return cls(perm if parent_size is None else perm.repeat(parent_size, 1))

    @classmethod
    def random(cls, size: int, parent_size: int | None = None, *, generator: torch.Generator) -> Permutation:
        """A uniformly random permutation, independent for each index of the parent."""
        rows = [torch.randperm(size, generator=generator) for _ in range(1 if parent_size is None else parent_size)]
        return cls(rows[0] if parent_size is None else torch.stack(rows))

    @classmethod
    def from_tensors(cls, parts: Mapping[str, Tensor], size: int, parent_size: int | None = None) -> Permutation:
        """Reads back what `tensors` returned.

        Args:
            parts: The stored data.
            size: Number of entries of the axis.
            parent_size: Number of entries of the axis it depends on.

        Raises:
            AlignmentError: The data are not those of a permutation of that size.
        """
        expected = [size] if parent_size is None else [parent_size, size]
        present = {part: [str(tensor.dtype), list(tensor.shape)] for part, tensor in parts.items()}
        if present != {"perm": [str(torch.int32), expected]}:
            raise AlignmentError(f"one int32 index array of shape {expected} expected, {present} found")
        return cls(parts["perm"].long())

    @property
    def size(self) -> int:
        """Number of entries of the axis."""
        return self.perm.shape[-1]

    @property
    def units(self) -> int:
        """Number of units that it acts on, summed over the indices of the parent."""
        return self.perm.numel()

    @property
    def moved(self) -> int:
        """Number of units that move."""
        return int((self.perm != torch.arange(self.size)).sum())

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves."""
        return self.moved == 0

    def apply(self, tensor: Tensor, dim: int, parent_dim: int | None = None) -> Tensor:
        """Permutes dimension `dim` of a tensor."""
        perm = self.perm.to(tensor.device)
        if perm.ndim == 1:
            return tensor.index_select(dim, perm)
        assert parent_dim is not None, "a dependent permutation needs its parent dimension"
        if parent_dim > dim:
            perm = perm.T
        index_shape = [1] * tensor.ndim
        index_shape[dim], index_shape[parent_dim] = tensor.shape[dim], tensor.shape[parent_dim]
        return torch.take_along_dim(tensor, perm.reshape(index_shape), dim)

    def at(self, index: int) -> Permutation:
        """The permutation at one index of the parent axis."""
        return Permutation(self.perm[index])

    def source(self, index: int) -> int:
        """Finds the original entry that becomes entry `index`."""
        return int(self.perm[index])

    def inverse(self, parent: Transform | None = None) -> Permutation:
        """The permutation that undoes this one."""
        inverted = self.perm.argsort(dim=-1)
        return Permutation(inverted if parent is None else parent.inverse().apply(inverted, 0))

    def then(self, second: Transform, second_parent: Transform | None = None) -> Permutation:
        """Composes this permutation with `second`, which comes after it."""
        if self.perm.ndim == 1:
            return Permutation(second.apply(self.perm, 0))
        rows = self.perm if second_parent is None else second_parent.apply(self.perm, 0)
        return Permutation(second.apply(rows, 1, 0))

    def tensors(self) -> dict[str, Tensor]:
        """The index array, in 32 bits."""
        return {"perm": self.perm.to(torch.int32)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Permutation) and torch.equal(self.perm, other.perm)

    def __hash__(self) -> int:
        return hash(self.perm.numpy().tobytes())


def selected(tensor: Tensor, position: int, index: Tensor) -> Tensor:
    """`index_select`, which along the last dimension takes three times as long as gathering the bits with NumPy."""
    is_slow = tensor.ndim > 1 and position == tensor.ndim - 1 and tensor.device.type == "cpu"
    integers = _INTEGERS.get(tensor.element_size())
    if not is_slow or tensor.requires_grad or integers is None or not tensor.is_contiguous():
        return tensor.index_select(position, index)
    # `clip` spares NumPy a check of the indices, which are all valid.
    moved = np.take(tensor.detach().view(integers).numpy(), index.numpy(), axis=position, mode="clip")
    return torch.from_numpy(moved).view(tensor.dtype)
