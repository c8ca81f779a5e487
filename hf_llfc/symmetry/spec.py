"""The permutation spec, which says what is symmetric in a model, and its alignments, which move models along that."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_llfc.errors import AlignmentError, SpecError, raise_all, suggest
from hf_llfc.foundation.tensor_files import save_tensors
from hf_llfc.symmetry.binding import Binding, bind
from hf_llfc.symmetry.declarations import (
    PERMUTATION,
    Axis,
    TensorSpec,
    collect_axes,
    matches_axis,
    read_axes,
)
from hf_llfc.symmetry.expressions import Atom, AxisUse, Expression, axis_uses, size_of
from hf_llfc.symmetry.orthogonal import Orthogonal
from hf_llfc.symmetry.transforms import Permutation, Transform, selected
from hf_llfc.symmetry.views import map_pieces

FILE_FORMAT = "hf_llfc.alignment/1"

TRANSFORM_KINDS = {kind.kind: kind for kind in (Permutation, Orthogonal)}


@dataclass(frozen=True)
class PermutationSpec:
    """The axis expressions of every tensor of a checkpoint, and which axes are symmetric.

    Attributes:
        model_type: The `model_type` of the configs it describes.
        axes: Every axis by name.
        declarations: The tensors, in the order of the network.
        prefix: The head prefix (`bert.`); names with and without it are the same tensor.
        other_prefixes: Head prefixes that some heads write instead of it.
        old_endings: How names ended in old checkpoints → how they end now (`.gamma`, `.weight`).
        other_layouts: Gives, for a spec, the same tensors as transformers names them in memory; asked only when a
            name is not among `declarations`.
        origin: `hand-written` or `derived`.
        notes: What a reader should know of how it was made and verified, a sentence each.
    """

    model_type: str
    axes: Mapping[str, Axis]
    declarations: tuple[TensorSpec, ...]
    prefix: str = ""
    other_prefixes: tuple[str, ...] = ()
    old_endings: Mapping[str, str] = field(default_factory=dict)
    other_layouts: Callable[[PermutationSpec], Sequence[TensorSpec]] | None = field(
        default=None, compare=False, repr=False
    )
    origin: str = "hand-written"
    notes: tuple[str, ...] = ()

    look_up: ClassVar[Callable[[Any], PermutationSpec] | None] = None
    """Look-up of the spec for a config; `hf_llfc.adapters`, which cannot be imported from here, sets it."""

    @classmethod
    def from_config(cls, config: Any) -> PermutationSpec:
        """Builds the spec of a Hugging Face model config; touches no weights and downloads nothing.

        Args:
            config: A `PreTrainedConfig`.

        Raises:
            SpecError: `config.model_type` has no adapter, and its spec cannot be derived.
        """
        if cls.look_up is None:
            raise SpecError("no adapter is loaded; import PermutationSpec from hf_llfc, or import hf_llfc.adapters")
        return cls.look_up(config)

    @classmethod
    def from_lines(
        cls,
        lines: Iterable[str],
        *,
        sizes: Mapping[str, int | None],
        symmetric: Iterable[str],
        model_type: str = "",
        prefix: str = "",
        other_prefixes: Iterable[str] = (),
        old_endings: Mapping[str, str] | None = None,
    ) -> PermutationSpec:
        """Builds a hand-written spec from declarations such as `encoder.0.weight  neurons.0  residual`.

        Args:
            lines: One tensor each, see `TensorSpec.from_line`.
            sizes: Size of each axis, by its full name or by the part before the first dot; None where only the
                checkpoint tells.
            symmetric: The symmetric axes, named likewise.
            model_type: The `model_type` it describes.
            prefix: The head prefix, with its dot.
            other_prefixes: See the class.
            old_endings: See the class.

        Returns:
            The spec.

        Raises:
            SpecError: A tensor is declared twice, an axis has no size or contradicting parents, or a symmetric
                axis does not occur.
        """
        tensors = tuple(TensorSpec.from_line(line) for line in lines)
        symmetric = tuple(symmetric)
        axes, problems = collect_axes(tensors, sizes, symmetric)
        seen: set[tuple[str, tuple[str, str] | None]] = set()
        for tensor in tensors:
            if (tensor.name, tensor.condition) in seen:
                problems.append(f"{tensor.name} is declared twice")
            seen.add((tensor.name, tensor.condition))
        raise_all(problems, SpecError, f"the permutation spec of {model_type or 'this model'} contradicts itself")
        return cls(model_type, axes, tensors, prefix, tuple(other_prefixes), dict(old_endings or {}))

    def to_dict(self) -> dict[str, Any]:
        """The whole spec as JSON values, the names in memory included, so that a file can carry it."""
        layouts = tuple(self.other_layouts(self)) if self.other_layouts is not None else ()
        return {
            "model_type": self.model_type,
            "axes": [list(astuple(axis)) for axis in self.axes.values()],
            "tensors": [tensor.to_list() for tensor in self.declarations],
            "layouts": [tensor.to_list() for tensor in layouts],
            "prefix": self.prefix,
            "other_prefixes": list(self.other_prefixes),
            "old_endings": dict(self.old_endings),
            "origin": self.origin,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PermutationSpec:
        """Reads back what `to_dict` returned.

        Raises:
            SpecError: The values are not those of a spec.
        """
        try:
            layouts = tuple(TensorSpec.from_list(tensor) for tensor in values["layouts"])
            return cls(
                str(values["model_type"]),
                read_axes(values["axes"]),
                tuple(TensorSpec.from_list(tensor) for tensor in values["tensors"]),
                str(values["prefix"]),
                tuple(values["other_prefixes"]),
                dict(values["old_endings"]),
                partial(_given_layouts, layouts) if layouts else None,
                str(values["origin"]),
                tuple(values.get("notes", ())),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise SpecError(f"not a permutation spec: {error}") from None

    @property
    def symmetric_axes(self) -> tuple[str, ...]:
        """Names of the axes that may be transformed, parents before the axes that depend on them."""
        names = [axis.name for axis in self.axes.values() if axis.symmetric]
        return tuple(sorted(names, key=lambda name: (self.axes[name].parent is not None,)))

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Declared tensors by name; of conditional declarations of one name, the first."""
        tensors: dict[str, TensorSpec] = {}
        for tensor in self.declarations:
            tensors.setdefault(tensor.name, tensor)
        return tensors

    def fix(self, *patterns: str) -> PermutationSpec:
        """Returns the spec with the axes that match a pattern no longer symmetric.

        Args:
            patterns: Axis names or shell patterns (`residual`, `heads.*`); a bare name means all its indices too.

        Raises:
            SpecError: A pattern matches no axis.
        """
        return self._restrict(patterns, keep=False)

    def keep(self, *patterns: str) -> PermutationSpec:
        """Returns the spec with only the axes that match a pattern still symmetric; see `fix`."""
        return self._restrict(patterns, keep=True)

    def _restrict(self, patterns: Sequence[str], *, keep: bool) -> PermutationSpec:
        matched: set[str] = set()
        problems = []
        for pattern in patterns:
            matching = {name for name in self.symmetric_axes if matches_axis(name, pattern)}
            if not matching and not any(matches_axis(name, pattern) for name in self.axes):
                kinds = sorted({name.split(".")[0] for name in self.axes})
                problems.append(f"no axis matches {pattern!r}{suggest(pattern, kinds)} (axes: {', '.join(kinds)})")
            matched |= matching
        raise_all(problems, SpecError, f"axis selection for {self.model_type}")
        axes = {
            name: replace(axis, symmetric=axis.symmetric and (name in matched) == keep)
            for name, axis in self.axes.items()
        }
        return replace(self, axes=axes)

    def bind(self, shapes: Mapping[str, Sequence[int]]) -> Binding:
        """Finds the declaration of every tensor of a checkpoint and checks every shape.

        Args:
            shapes: Name → shape of every tensor of the checkpoint, or of a model's `state_dict`.

        Returns:
            The binding, by the checkpoint's own names.

        Raises:
            SpecError: Lists every tensor that is not declared, missing, or of another shape than the config says.
        """
        return bind(self, shapes)

    def identity_alignment(self) -> Alignment:
        """The alignment that moves nothing."""
        return Alignment(self, {axis: self._identity(axis) for axis in self.symmetric_axes})

    def random_alignment(self, generator: torch.Generator) -> Alignment:
        """A uniformly random transform of every symmetric axis; it does not change the function of the model.

        Args:
            generator: Source of randomness.
        """
        transforms = {axis: self._random(axis, generator) for axis in self.symmetric_axes}
        return Alignment(self, transforms, {"method": "random"})

    def _identity(self, axis: str) -> Transform:
        kind = Permutation if self.axes[axis].group == PERMUTATION else Orthogonal
        return kind.identity(*self._sizes(axis))

    def _random(self, axis: str, generator: torch.Generator) -> Transform:
        group, sizes = self.axes[axis].group, self._sizes(axis)
        if group == PERMUTATION:
            return Permutation.random(*sizes, generator=generator)
        return Orthogonal.random(group, *sizes, generator=generator)

    def _sizes(self, name: str) -> tuple[int, int | None]:
        """The sizes of an axis and of its parent."""
        axis = self.axes[name]
        assert axis.size is not None, f"symmetric axis {name} needs a size"
        return axis.size, None if axis.parent is None else self.axes[axis.parent].size

    def table(self) -> list[dict[str, str]]:
        """Lists the tensors, one row each: `tensor`, `axes` (its expression), `symmetric` (those that may move)."""
        return [
            {
                "tensor": tensor.name + ("?" if tensor.optional else ""),
                "axes": tensor.expression,
                "symmetric": " ".join(dict.fromkeys(use.axis for use in tensor.axes if self.axes[use.axis].symmetric)),
            }
            for tensor in self.declarations
        ]


def _given_layouts(layouts: tuple[TensorSpec, ...], spec: PermutationSpec) -> tuple[TensorSpec, ...]:
    """The layouts that a file carried, whatever the spec; a module-level function, so that a spec can be pickled."""
    return layouts


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
                    tensor = selected(tensor, position, index.to(tensor.device))
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
        """Finds where the entries of a tensor come from in the original.

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
        """Finds where each entry of a self-contained dimension comes from; None if nothing moves."""
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
        """Composes this alignment with a second one of the same spec, which comes after it.

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
        identity = spec.identity_alignment().transforms
        first = {**identity, **self.transforms}
        then = {**identity, **second.transforms}
        return Alignment(spec, {axis: _composed(first[axis], then[axis], second._parent_of(axis)) for axis in identity})

    def with_metadata(self, **metadata: Any) -> Alignment:
        """Adds metadata to the transforms."""
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
        save_tensors(tensors, Path(path), {"hf_llfc": json.dumps(header, sort_keys=True)})

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


def _composed(first: Transform, second: Transform, second_parent: Transform | None) -> Transform:
    if first.kind != second.kind:
        first = Orthogonal.of(first)
    return first.then(second, second_parent)


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
                transforms[axis] = kind.from_tensors(parts, *spec._sizes(axis))
            except AlignmentError as error:
                problems.append(f"{axis}: {error}")
    return transforms, problems
