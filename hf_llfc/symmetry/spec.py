"""The permutation spec: which axes every tensor of a checkpoint is built from, and which of them are symmetric."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from hf_llfc.errors import SpecError, raise_all, suggest
from hf_llfc.symmetry.expressions import (
    AxisUse,
    Expression,
    atoms_of_pieces,
    axis_uses,
    format_shape,
    parse,
    size_of,
)

if TYPE_CHECKING:
    import torch

    from hf_llfc.symmetry.alignment import Alignment

_NAME_AXIS = re.compile(r"<([^<>]+)>")
_CONDITION = re.compile(r"\s(?P<sense>if|unless)\s+(?P<other>\S+)$")
_DECLARATION = re.compile(r"(?P<name>[^\s?~]+)(?P<marks>[?~]*)(?:\s+(?P<shape>.*))?")

# The group of an axis whose units move as they are; `hf_llfc.symmetry.matrix_groups` has the others.
PERMUTATION = "permutation"

# A checkpoint of another architecture misses every name; a few suggestions help, thousands take minutes.
SUGGESTIONS = 8


@dataclass(frozen=True)
class Axis:
    """One named dimension.

    Attributes:
        name: The same name anywhere is the same axis.
        size: Number of entries; None where only the checkpoint tells (number of labels, say).
        symmetric: Whether its units may be transformed without changing the function of the model.
        parent: The axis it depends on: one independent symmetry per index of the parent.
        group: What may transform it: `permutation`, or one of `hf_llfc.symmetry.matrix_groups.MATRIX_GROUPS`.
    """

    name: str
    size: int | None
    symmetric: bool = False
    parent: str | None = None
    group: str = PERMUTATION


@dataclass(frozen=True)
class TensorSpec:
    """One tensor, or one tensor per index of the axes that its name carries.

    Attributes:
        name: As on disk; `<experts.3>` in a name stands for the index along that axis.
        dimensions: Its axis expressions.
        optional: Whether a checkpoint may lack it (biases, heads, tied weights, buffers).
        condition: (`if` or `unless`, tensor): present only together with, or only without, the other tensor.
        covers: For a tensor of another layout (fused experts, say), the names of the tensors it stands for.
        statistic: Whether it is a running statistic or buffer, which follows the transforms but says nothing about
            them (BatchNorm's running mean, say).
    """

    name: str
    dimensions: tuple[Expression, ...]
    optional: bool = False
    condition: tuple[str, str] | None = None
    covers: tuple[str, ...] = ()
    statistic: bool = False

    @classmethod
    def from_line(cls, line: str) -> TensorSpec:
        """Parses one line: name, `?` if optional, `~` if a statistic, axis expression, `if NAME` or `unless NAME`.

        Raises:
            SpecError: The line does not follow the grammar.
        """
        condition = _CONDITION.search(line.strip())
        declaration = line.strip() if condition is None else line.strip()[: condition.start()]
        match = _DECLARATION.fullmatch(declaration.strip())
        if match is None:
            raise SpecError(f"not a tensor declaration: {line!r}; write `name  expression`")
        try:
            dimensions = parse(match["shape"] or "")
        except SpecError as error:
            raise SpecError(f"{match['name']}: {error}") from None
        return cls(
            match["name"],
            dimensions,
            optional="?" in match["marks"],
            condition=None if condition is None else (condition["sense"], condition["other"]),
            statistic="~" in match["marks"],
        )

    def to_list(self) -> list[Any]:
        """As JSON values."""
        condition = list(self.condition) if self.condition is not None else None
        return [self.name, self.expression, self.optional, condition, list(self.covers), self.statistic]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> TensorSpec:
        """Reads back what `to_list` returned.

        Raises:
            SpecError: The expression does not follow the grammar.
            ValueError: The values are not those of a tensor.
        """
        name, expression, optional, condition, covers, statistic = values
        pair = (str(condition[0]), str(condition[1])) if condition is not None else None
        return cls(str(name), parse(expression), bool(optional), pair, tuple(covers), bool(statistic))

    @cached_property
    def name_axes(self) -> tuple[str, ...]:
        """The axes whose index is part of the name."""
        return tuple(_NAME_AXIS.findall(self.name))

    @cached_property
    def axes(self) -> tuple[AxisUse, ...]:
        """Every use of an axis, the ones in the name first."""
        in_shape = [use for dimension in self.dimensions for use in axis_uses(dimension)]
        return (*(AxisUse(axis) for axis in self.name_axes), *in_shape)

    def name_at(self, index: Sequence[int]) -> str:
        """The name of the tensor at an index of the axes that the name carries."""
        positions = iter(index)
        return _NAME_AXIS.sub(lambda _: str(next(positions)), self.name)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape that the file must have."""
        return tuple(size_of(dimension, sizes) for dimension in self.dimensions)

    @cached_property
    def expression(self) -> str:
        """The axis expression as text."""
        return format_shape(self.dimensions)


@dataclass(frozen=True)
class BoundTensor:
    """A tensor of a checkpoint together with its declaration; `index` is its place along the axes in its name."""

    spec: TensorSpec
    index: tuple[int, ...] = ()


@dataclass(frozen=True)
class Binding:
    """What `PermutationSpec.bind` found: the declaration of every tensor of one checkpoint, by its own names.

    Attributes:
        spec: The spec that was bound.
        tensors: Name in the checkpoint → declaration.
        sizes: Size of every axis that the checkpoint's tensors use.
    """

    spec: PermutationSpec
    tensors: Mapping[str, BoundTensor]
    sizes: Mapping[str, int]

    @cached_property
    def symmetric_axes(self) -> tuple[str, ...]:
        """The symmetric axes that the checkpoint's tensors use, parents first."""
        used = {use.axis for bound in self.tensors.values() for use in bound.spec.axes}
        return tuple(axis for axis in self.spec.symmetric_axes if axis in used)

    @cached_property
    def _names(self) -> dict[tuple[str, tuple[int, ...]], str]:
        return {(bound.spec.name, bound.index): name for name, bound in self.tensors.items()}

    def name_of(self, tensor: TensorSpec, index: tuple[int, ...]) -> str:
        """The checkpoint's own name of a declared tensor."""
        return self._names[tensor.name, index]


@dataclass(frozen=True)
class PermutationSpec:
    """For every tensor of a checkpoint its axis expressions, and which axes are symmetric.

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

    @classmethod
    def from_config(cls, config: Any) -> PermutationSpec:
        """Builds the spec of a Hugging Face model config; touches no weights and downloads nothing.

        Args:
            config: A `PreTrainedConfig`.

        Raises:
            SpecError: `config.model_type` has no adapter, and its spec cannot be derived.
        """
        from hf_llfc.adapters import spec_for

        return spec_for(config)

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
        other_layouts: Callable[[PermutationSpec], Sequence[TensorSpec]] | None = None,
        origin: str = "hand-written",
    ) -> PermutationSpec:
        """Builds a spec from declarations such as `encoder.0.weight  neurons.0  residual`.

        Args:
            lines: One tensor each, see `TensorSpec.from_line`.
            sizes: Size of each axis, by its full name or by the part before the first dot; None where only the
                checkpoint tells.
            symmetric: The symmetric axes, named likewise.
            model_type: The `model_type` it describes.
            prefix: The head prefix, with its dot.
            other_prefixes: See the class.
            old_endings: See the class.
            other_layouts: See the class.
            origin: See the class.

        Returns:
            The spec.

        Raises:
            SpecError: A tensor is declared twice, an axis has no size or contradicting parents, or a symmetric
                axis does not occur.
        """
        tensors = tuple(TensorSpec.from_line(line) for line in lines)
        symmetric = tuple(symmetric)
        axes, problems = _collect_axes(tensors, sizes, symmetric)
        seen: set[tuple[str, tuple[str, str] | None]] = set()
        for tensor in tensors:
            if (tensor.name, tensor.condition) in seen:
                problems.append(f"{tensor.name} is declared twice")
            seen.add((tensor.name, tensor.condition))
        raise_all(problems, SpecError, f"the permutation spec of {model_type or 'this model'} contradicts itself")
        return cls(
            model_type, axes, tensors, prefix, tuple(other_prefixes), dict(old_endings or {}), other_layouts, origin
        )

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
            layouts = tuple(TensorSpec.from_list(each) for each in values["layouts"])
            return cls(
                str(values["model_type"]),
                _axes_of(values["axes"]),
                tuple(TensorSpec.from_list(each) for each in values["tensors"]),
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
        """Every declared tensor by name; of conditional declarations of one name, the first."""
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
            found = {name for name in self.symmetric_axes if matches_axis(name, pattern)}
            if not found and not any(matches_axis(name, pattern) for name in self.axes):
                kinds = sorted({name.split(".")[0] for name in self.axes})
                problems.append(f"no axis matches {pattern!r}{suggest(pattern, kinds)} (axes: {', '.join(kinds)})")
            matched |= found
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
        declared = self._declared_names(shapes)
        tensors: dict[str, BoundTensor] = {}
        names: dict[tuple[str, tuple[int, ...]], str] = {}
        problems: list[str] = []
        for name in shapes:
            bound = self._find(name, declared)
            if bound is None:
                nearest = suggest(name, declared) if len(problems) < SUGGESTIONS else ""
                problems.append(f"{name}: not declared{nearest}")
                continue
            tensors[name] = bound
            same = names.setdefault((bound.spec.name, bound.index), name)
            if same != name:
                problems.append(f"{name}: the same tensor as {same}; a checkpoint may hold only one of the two")
        problems += self._missing(tensors, shapes)
        sizes = self._sizes(tensors, shapes, problems)
        raise_all(problems, SpecError, f"the checkpoint does not fit the permutation spec of {self.model_type}")
        return Binding(self, tensors, sizes)

    def _find(self, name: str, declared: Mapping[str, BoundTensor]) -> BoundTensor | None:
        for old, new in self.old_endings.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        for prefix in (self.prefix, *self.other_prefixes):
            bare = name.removeprefix(prefix)
            for candidate in (name, self.prefix + bare, bare, *(other + bare for other in self.other_prefixes)):
                if candidate in declared:
                    return declared[candidate]
        return None

    def _declared_names(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, BoundTensor]:
        present = set(shapes)
        declared = _concrete_names(self.declarations, self.axes, lambda other: self._is_present(other, present))
        if self.other_layouts is not None and any(self._find(name, declared) is None for name in shapes):
            others = tuple(self.other_layouts(self))
            concrete = _concrete_names(others, self.axes, lambda other: self._is_present(other, present))
            declared = {**concrete, **declared}
        return declared

    def _is_present(self, name: str, present: set[str]) -> bool:
        bare = name.removeprefix(self.prefix)
        prefixes = (self.prefix, "", *self.other_prefixes) if bare != name else ("",)
        return any(prefix + bare in present for prefix in prefixes)

    def _missing(self, tensors: Mapping[str, BoundTensor], shapes: Mapping[str, Sequence[int]]) -> list[str]:
        found = {(bound.spec.name, bound.index) for bound in tensors.values()}
        covered = {name for bound in tensors.values() for name in bound.spec.covers}
        present = set(shapes)
        problems = []
        for name, bound in _concrete_names(
            self.declarations, self.axes, lambda other: self._is_present(other, present)
        ).items():
            if not bound.spec.optional and (bound.spec.name, bound.index) not in found and name not in covered:
                problems.append(f"{name}: missing, expected [{bound.spec.expression}]")
        return problems

    def _sizes(
        self, tensors: Mapping[str, BoundTensor], shapes: Mapping[str, Sequence[int]], problems: list[str]
    ) -> dict[str, int]:
        sizes = {name: axis.size for name, axis in self.axes.items() if axis.size is not None}
        for name, bound in tensors.items():
            found, dimensions = tuple(shapes[name]), bound.spec.dimensions
            if len(found) == len(dimensions):
                for size, dimension in zip(found, dimensions, strict=True):
                    if isinstance(dimension, AxisUse):
                        sizes.setdefault(dimension.axis, size)
        for name, bound in tensors.items():
            found = tuple(shapes[name])
            if any(use.axis not in sizes for use in bound.spec.axes):
                unknown = next(use.axis for use in bound.spec.axes if use.axis not in sizes)
                problems.append(f"{name}: shape {list(found)} does not tell the size of {unknown!r}")
                continue
            expected = bound.spec.shape(sizes)
            if found != expected:
                problems.append(
                    f"{name}: shape {list(found)} found, {list(expected)} expected from the config "
                    f"[{bound.spec.expression}]"
                )
        return sizes

    def identity_alignment(self) -> Alignment:
        """The alignment that moves nothing."""
        from hf_llfc.symmetry.alignment import identity_alignment

        return identity_alignment(self)

    def random_alignment(self, generator: torch.Generator) -> Alignment:
        """A uniformly random transform of every symmetric axis; it does not change the function of the model.

        Args:
            generator: Source of randomness.
        """
        from hf_llfc.symmetry.alignment import random_alignment

        return random_alignment(self, generator)

    def table(self) -> list[dict[str, str]]:
        """One row per tensor: `tensor`, `axes` (its expression), `symmetric` (the axes of it that may move)."""
        return [
            {
                "tensor": tensor.name + ("?" if tensor.optional else ""),
                "axes": tensor.expression,
                "symmetric": " ".join(dict.fromkeys(use.axis for use in tensor.axes if self.axes[use.axis].symmetric)),
            }
            for tensor in self.declarations
        ]


def _axes_of(values: Sequence[Any]) -> dict[str, Axis]:
    """Axes from JSON values.

    Raises:
        ValueError: One is not an axis, or depends on none of them.
    """
    from hf_llfc.symmetry.matrix_groups import MATRIX_GROUPS

    axes = {}
    for each in values:
        axis = Axis(*each)
        kinds = {"name": str, "size": int | None, "symmetric": bool, "parent": str | None, "group": str}
        wrong = [part for part, kind in kinds.items() if not isinstance(getattr(axis, part), kind)]
        if wrong or axis.group not in (PERMUTATION, *MATRIX_GROUPS):
            raise ValueError(f"{', '.join(wrong) or 'group'} of the axis {axis.name!r}")
        axes[axis.name] = axis
    for axis in axes.values():
        if axis.parent is not None and axis.parent not in axes:
            raise ValueError(f"the axis {axis.name!r} depends on {axis.parent!r}, which is none")
    return axes


def _given_layouts(layouts: tuple[TensorSpec, ...], spec: PermutationSpec) -> tuple[TensorSpec, ...]:
    """The layouts that a file carried, whatever the spec; a module-level function, so that a spec can be pickled."""
    return layouts


def matches_axis(name: str, pattern: str) -> bool:
    """Whether an axis name matches a pattern; a bare name matches all its indices (`heads` matches `heads.3`)."""
    return fnmatchcase(name, pattern) or name.split(".")[0] == pattern


def _collect_axes(
    tensors: Sequence[TensorSpec], sizes: Mapping[str, int | None], symmetric: Sequence[str]
) -> tuple[dict[str, Axis], list[str]]:
    axes: dict[str, Axis] = {}
    problems: list[str] = []
    for tensor in tensors:
        for use in tensor.axes:
            base = use.axis.split(".")[0]
            if use.axis not in sizes and base not in sizes:
                problems.append(f"{tensor.name}: axis {use.axis!r} has no size{suggest(base, sizes)}")
                continue
            axis = Axis(
                use.axis,
                sizes[use.axis] if use.axis in sizes else sizes[base],
                use.axis in symmetric or base in symmetric,
                use.parent,
            )
            if axes.setdefault(use.axis, axis) != axis:
                problems.append(
                    f"{tensor.name}: axis {use.axis!r} depends on {use.parent!r} here, elsewhere on "
                    f"{axes[use.axis].parent!r}"
                )
        problems += _without_parent(tensor)
        problems += [
            f"{tensor.name}: axis {axis!r} in its name needs a size"
            for axis in tensor.name_axes
            if axis in axes and axes[axis].size is None
        ]
    for axis in axes.values():
        if axis.symmetric and axis.size is None:
            problems.append(f"symmetric axis {axis.name!r} needs a size")
        if axis.parent in axes and axes[axis.parent].parent is not None:
            problems.append(
                f"axis {axis.name!r} depends on {axis.parent!r}, which depends on {axes[axis.parent].parent!r}"
            )
    known = {name.split(".")[0] for name in axes} | set(axes)
    problems += [
        f"symmetric axis {name!r} occurs in no tensor{suggest(name, known)}" for name in symmetric if name not in known
    ]
    return axes, problems


def _without_parent(tensor: TensorSpec) -> list[str]:
    """The dependent axes that do not find their parent, once, beside them or in the name."""
    problems = []
    for atoms in atoms_of_pieces(tensor.dimensions):
        beside = [*tensor.name_axes, *(atom.axis for atom in atoms if isinstance(atom, AxisUse))]
        for atom in atoms:
            if isinstance(atom, AxisUse) and atom.parent is not None and beside.count(atom.parent) != 1:
                problems.append(f"{tensor.name}: {atom} needs its parent axis {atom.parent!r} beside it, exactly once")
    return list(dict.fromkeys(problems))


def _concrete_names(
    tensors: Sequence[TensorSpec], axes: Mapping[str, Axis], is_present: Callable[[str], bool]
) -> dict[str, BoundTensor]:
    """Every name that the declarations allow, one per index of the axes in the name; conditions decided."""
    concrete: dict[str, BoundTensor] = {}
    for tensor in tensors:
        if tensor.condition is not None:
            sense, other = tensor.condition
            if is_present(other) != (sense == "if"):
                continue
        indices: list[tuple[int, ...]] = [()]
        for axis in tensor.name_axes:
            size = axes[axis].size
            assert size is not None, f"axis {axis} in the name of {tensor.name} needs a size"
            indices = [(*index, position) for index in indices for position in range(size)]
        for index in indices:
            concrete[tensor.name_at(index)] = BoundTensor(tensor, index)
    return concrete
