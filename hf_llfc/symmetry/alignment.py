"""An alignment: the transforms of all symmetric axes of one model onto a reference model, and how tensors follow."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_llfc.errors import AlignmentError, SpecError, raise_all, suggest
from hf_llfc.symmetry.expressions import Atom, AxisUse, Expression, axis_uses, size_of
from hf_llfc.symmetry.orthogonal import Orthogonal
from hf_llfc.symmetry.spec import PERMUTATION, Binding, PermutationSpec
from hf_llfc.symmetry.transforms import Permutation, Transform
from hf_llfc.symmetry.views import map_pieces

FILE_FORMAT = "hf_llfc.alignment/1"

# Bytes of an element → integers of that size.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

TRANSFORM_KINDS = {kind.kind: kind for kind in (Permutation, Orthogonal)}


@dataclass(frozen=True, eq=False)
class Alignment:
    """The transforms that bring one model into the coordinates of another without changing its function.

    Attributes:
        spec: The permutation spec both models share.
        transforms: Symmetric axis → transform.
        metadata: What found it: `method`, `objective_before`, `objective_after`, `reference` and `model`
            fingerprints, …; JSON values.
    """

    spec: PermutationSpec
    transforms: Mapping[str, Transform]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    _indices: dict[Any, Tensor | None] = field(default_factory=dict, init=False, repr=False)

    def apply(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Moves a whole state dict; tensors that were tied stay tied.

        Args:
            state_dict: Every tensor of a checkpoint, by the names on disk or those of a model in memory.

        Returns:
            Tensors under the same names and in the same order; one that nothing moves may be the original itself.

        Raises:
            SpecError: The tensors do not fit the spec.
        """
        binding = self.spec.bind({name: tensor.shape for name, tensor in state_dict.items()})
        aligned: dict[str, Tensor] = {}
        tied: dict[tuple[Any, ...], Tensor] = {}
        for name, tensor in state_dict.items():
            bound = binding.tensors[name]
            identity = (
                tensor.data_ptr(),
                tensor.shape,
                tensor.stride(),
                tensor.device,
                bound.spec.dimensions,
            )
            if bound.index or tensor.numel() == 0 or identity not in tied:
                tied[identity] = self.read_aligned(name, binding, state_dict.__getitem__)
            aligned[name] = tied[identity]
        return aligned

    def read_aligned(self, name: str, binding: Binding, read: Callable[[str], Tensor]) -> Tensor:
        """Reads one tensor in the coordinates of the reference.

        Args:
            name: The tensor, by the checkpoint's own name.
            binding: The binding of the checkpoint's tensors.
            read: Gives an original tensor by the checkpoint's own name; called once.

        Returns:
            The aligned tensor, in the dtype of the original.
        """
        bound = binding.tensors[name]
        index_along = dict(zip(bound.spec.name_axes, bound.index, strict=True))
        tensor = read(self.original(name, binding))
        places = self.places(name, binding)
        if places is not None:
            for position, index in enumerate(places):
                if index is not None:
                    tensor = _selected(tensor, position, index.to(tensor.device))
            return tensor
        return map_pieces(
            tensor,
            bound.spec.dimensions,
            binding.sizes,
            lambda piece, atoms: self._transform_piece(piece, atoms, index_along),
        )

    def original(self, name: str, binding: Binding) -> str:
        """The checkpoint's tensor that one comes from: another layer's or expert's where these are permuted."""
        bound = binding.tensors[name]
        return binding.name_of(
            bound.spec,
            tuple(
                self.transforms[axis].source(index) if axis in self.transforms else index
                for axis, index in zip(bound.spec.name_axes, bound.index, strict=True)
            ),
        )

    def places(self, name: str, binding: Binding) -> list[Tensor | None] | None:
        """Where the entries of a tensor come from in the original.

        Args:
            name: The tensor, by the checkpoint's own name.
            binding: The binding of the checkpoint's tensors.

        Returns:
            For every dimension the place of each entry, int64, or None where nothing moves; None where dimensions do
            not move independently by whole entries.
        """
        bound = binding.tensors[name]
        index_along = dict(zip(bound.spec.name_axes, bound.index, strict=True))
        if not all(self._is_self_contained(dimension, index_along) for dimension in bound.spec.dimensions):
            return None
        return [self._flat_index(dimension, binding.sizes, index_along) for dimension in bound.spec.dimensions]

    def moves(self, name: str, binding: Binding) -> bool:
        """Whether a tensor comes from another one, or with its entries at other places."""
        used = {use.axis for use in binding.tensors[name].spec.axes}
        return not all(self.transforms[axis].is_identity for axis in used if axis in self.transforms)

    def move(self, tensor: Tensor, dimensions: tuple[Expression, ...], sizes: Mapping[str, int]) -> Tensor:
        """Moves a tensor that is no weight of a checkpoint: activations, say, or their moments.

        Args:
            tensor: Whatever has the axes.
            dimensions: Its axis expressions; an axis occurs once.
            sizes: Size of every named axis.
        """
        return map_pieces(tensor, dimensions, sizes, lambda piece, atoms: self._transform_piece(piece, atoms, {}))

    def _is_self_contained(self, dimension: Expression, index_along: Mapping[str, int]) -> bool:
        """Whether a dimension moves by whole entries, independently of the other dimensions."""
        names = {use.axis for use in axis_uses(dimension)} | set(index_along)
        return all(
            isinstance(self.transforms[use.axis], Permutation) and (use.parent is None or use.parent in names)
            for use in axis_uses(dimension)
            if use.axis in self.transforms
        )

    def _flat_index(
        self, dimension: Expression, sizes: Mapping[str, int], index_along: Mapping[str, int]
    ) -> Tensor | None:
        """Where each entry of a self-contained dimension comes from; None if nothing moves."""
        parents = {use.parent for use in axis_uses(dimension)}
        key = (dimension, tuple((axis, index) for axis, index in index_along.items() if axis in parents))
        if key not in self._indices:
            index = torch.arange(size_of(dimension, sizes))
            moved = map_pieces(
                index,
                (dimension,),
                sizes,
                lambda piece, atoms: self._transform_piece(piece, atoms, index_along),
            )
            self._indices[key] = None if torch.equal(moved, index) else moved
        return self._indices[key]

    def _transform_piece(self, piece: Tensor, atoms: tuple[Atom, ...], index_along: Mapping[str, int]) -> Tensor:
        uses = [(dim, atom) for dim, atom in enumerate(atoms) if isinstance(atom, AxisUse)]
        for dim, use in sorted(uses, key=lambda item: item[1].parent is not None):
            transform = self.transforms.get(use.axis)
            if transform is None:
                continue
            if use.parent is None:
                piece = transform.apply(piece, dim)
            elif use.parent in index_along:
                piece = transform.at(index_along[use.parent]).apply(piece, dim)
            else:
                parent_dim = next(other for other, atom in uses if atom.axis == use.parent)
                piece = transform.apply(piece, dim, parent_dim)
        return piece

    def inverse(self) -> Alignment:
        """The alignment that undoes this one: `a.inverse().apply(a.apply(x))` is `x`, bit for bit."""
        return Alignment(
            self.spec,
            {axis: transform.inverse(self._parent_of(axis)) for axis, transform in self.transforms.items()},
            {**self.metadata, "inverted": not self.metadata.get("inverted", False)},
        )

    def then(self, second: Alignment) -> Alignment:
        """This alignment followed by a second one of the same spec.

        Raises:
            AlignmentError: The two belong to different specs.
        """
        shapes = [
            {name: (axis.size, axis.parent) for name, axis in alignment.spec.axes.items()}
            for alignment in (self, second)
        ]
        if shapes[0] != shapes[1]:
            raise AlignmentError(
                "only alignments of one permutation spec can be composed: these are of "
                f"{self.spec.model_type} and {second.spec.model_type}, with axes of other names or sizes"
            )
        # Either may leave out axes that its spec holds fixed.
        axes = {name: axis if axis.symmetric else second.spec.axes[name] for name, axis in self.spec.axes.items()}
        spec = replace(self.spec, axes=axes)
        identity = identity_alignment(spec).transforms
        first = {**identity, **self.transforms}
        then = {**identity, **second.transforms}
        return Alignment(spec, {axis: _composed(first[axis], then[axis], second._parent_of(axis)) for axis in identity})

    def with_metadata(self, **metadata: Any) -> Alignment:
        """The same transforms with more metadata."""
        return replace(self, metadata={**self.metadata, **metadata})

    def _parent_of(self, axis: str) -> Transform | None:
        parent = self.spec.axes[axis].parent
        return None if parent is None else self.transforms.get(parent)

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves."""
        return all(transform.is_identity for transform in self.transforms.values())

    @property
    def moved(self) -> dict[str, tuple[int, int]]:
        """Axis → (units moved, units)."""
        return {axis: (transform.moved, transform.units) for axis, transform in self.transforms.items()}

    def save(self, path: str | Path) -> None:
        """Writes the alignment file, a safetensors file of transforms with the metadata as JSON.

        Args:
            path: The file to write.
        """
        from safetensors.torch import save_file

        tensors = {
            f"{axis}:{part}": tensor.contiguous()
            for axis, transform in self.transforms.items()
            for part, tensor in transform.tensors().items()
        }
        header = {
            "format": FILE_FORMAT,
            "model_type": self.spec.model_type,
            "spec": self.spec.to_dict(),
            "kinds": {axis: transform.kind for axis, transform in self.transforms.items()},
            "metadata": dict(self.metadata),
        }
        save_file(tensors, str(path), metadata={"hf_llfc": json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path, spec: PermutationSpec | None = None) -> Alignment:
        """Reads an alignment file.

        Args:
            path: The file.
            spec: The spec of the models it is for; the one that the file carries where None.

        Raises:
            AlignmentError: The file cannot be read, is of another format, or does not fit the spec.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                header = json.loads((file.metadata() or {}).get("hf_llfc", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise AlignmentError(
                f"{path}: cannot be read as an alignment file: {error}; write it again with `hf-llfc align`"
            ) from None
        if (
            not isinstance(header, dict)
            or header.get("format") != FILE_FORMAT
            or not isinstance(header.get("kinds"), dict)
            or not all(isinstance(kind, str) for kind in header["kinds"].values())
            or not isinstance(header.get("metadata"), dict)
        ):
            raise AlignmentError(
                f"{path}: not an alignment file of format {FILE_FORMAT!r}; `hf-llfc align` writes one into "
                "llfc/alignment.safetensors"
            )
        if spec is None:
            try:
                spec = PermutationSpec.from_dict(header.get("spec", {}))
            except SpecError as error:
                raise AlignmentError(f"{path}: carries {error}; give the spec of the models it is for") from None
        transforms, problems = _transforms_from_file(header, tensors, spec)
        raise_all(problems, AlignmentError, f"{path} does not fit the permutation spec of {spec.model_type}")
        return cls(spec, transforms, header["metadata"])


def identity_alignment(spec: PermutationSpec) -> Alignment:
    """The alignment that moves nothing."""
    return Alignment(spec, {axis: _identity(spec, axis) for axis in spec.symmetric_axes})


def random_alignment(spec: PermutationSpec, generator: torch.Generator) -> Alignment:
    """A uniformly random transform of every symmetric axis.

    Args:
        spec: The permutation spec.
        generator: Source of randomness.
    """
    return Alignment(
        spec,
        {axis: _random(spec, axis, generator) for axis in spec.symmetric_axes},
        {"method": "random"},
    )


def _identity(spec: PermutationSpec, axis: str) -> Transform:
    kind = Permutation if spec.axes[axis].group == PERMUTATION else Orthogonal
    return kind.identity(*_sizes(spec, axis))


def _random(spec: PermutationSpec, axis: str, generator: torch.Generator) -> Transform:
    group, sizes = spec.axes[axis].group, _sizes(spec, axis)
    if group == PERMUTATION:
        return Permutation.random(*sizes, generator=generator)
    return Orthogonal.random(group, *sizes, generator=generator)


def _composed(first: Transform, second: Transform, second_parent: Transform | None) -> Transform:
    if first.kind != second.kind:
        first = Orthogonal.of(first)
    return first.then(second, second_parent)


def _sizes(spec: PermutationSpec, name: str) -> tuple[int, int | None]:
    axis = spec.axes[name]
    assert axis.size is not None, f"symmetric axis {name} needs a size"
    return axis.size, None if axis.parent is None else spec.axes[axis.parent].size


def _transforms_from_file(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: PermutationSpec
) -> tuple[dict[str, Transform], list[str]]:
    problems: list[str] = []
    if header.get("model_type") != spec.model_type:
        problems.append(f"model type {header.get('model_type')!r} found, {spec.model_type!r} expected")
    parts_of: dict[str, dict[str, Tensor]] = {axis: {} for axis in header["kinds"]}
    for name, tensor in tensors.items():
        axis, _, part = name.rpartition(":")
        if axis in parts_of:
            parts_of[axis][part] = tensor
        else:
            problems.append(f"{name}: belongs to no transform of the file's header")
    transforms: dict[str, Transform] = {}
    for axis, parts in parts_of.items():
        kind = TRANSFORM_KINDS.get(header["kinds"][axis])
        if kind is None:
            known = ", ".join(TRANSFORM_KINDS)
            problems.append(f"{axis}: unknown transform kind {header['kinds'][axis]!r}; known: {known}")
        elif axis not in spec.symmetric_axes:
            problems.append(f"{axis}: not a symmetric axis of the spec{suggest(axis, spec.symmetric_axes)}")
        else:
            try:
                transforms[axis] = kind.from_tensors(parts, *_sizes(spec, axis))
            except AlignmentError as error:
                problems.append(f"{axis}: {error}")
    return transforms, problems


def _selected(tensor: Tensor, position: int, index: Tensor) -> Tensor:
    """`index_select`, which along the last dimension takes three times as long as gathering the bits with NumPy."""
    is_slow = tensor.ndim > 1 and position == tensor.ndim - 1 and tensor.device.type == "cpu"
    integers = _INTEGERS.get(tensor.element_size())
    if not is_slow or tensor.requires_grad or integers is None or not tensor.is_contiguous():
        return tensor.index_select(position, index)
    # All places are there; to be told so spares NumPy looking.
    found = np.take(tensor.detach().view(integers).numpy(), index.numpy(), axis=position, mode="clip")
    return torch.from_numpy(found).view(tensor.dtype)
