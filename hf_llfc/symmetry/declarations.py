"""What a permutation spec is declared from: axes, and the tensors that are built from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from hf_llfc.errors import SpecError, suggest
from hf_llfc.symmetry.expressions import (
    AxisUse,
    Expression,
    atoms_of_pieces,
    axis_uses,
    format_shape,
    parse,
    size_of,
)
from hf_llfc.symmetry.matrix_groups import MATRIX_GROUPS

_NAME_AXIS = re.compile(r"<([^<>]+)>")
_CONDITION = re.compile(r"\s(?P<sense>if|unless)\s+(?P<other>\S+)$")
_DECLARATION = re.compile(r"(?P<name>[^\s?~]+)(?P<marks>[?~]*)(?:\s+(?P<shape>.*))?")

# The group of an axis whose units move as they are; `hf_llfc.symmetry.matrix_groups` has the others.
PERMUTATION = "permutation"


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
        """The declaration as JSON values."""
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
        """Uses of axes, the ones in the name first."""
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
    """A tensor of a checkpoint and its declaration; `index` is its position along the axes in its name."""

    spec: TensorSpec
    index: tuple[int, ...] = ()


def read_axes(values: Sequence[Any]) -> dict[str, Axis]:
    """Reads axes from JSON values.

    Raises:
        ValueError: A value is not an axis, or depends on an axis that is not among them.
    """
    axes = {}
    for value in values:
        axis = Axis(*value)
        kinds = {"name": str, "size": int | None, "symmetric": bool, "parent": str | None, "group": str}
        wrong = [part for part, kind in kinds.items() if not isinstance(getattr(axis, part), kind)]
        if wrong or axis.group not in (PERMUTATION, *MATRIX_GROUPS):
            raise ValueError(f"{', '.join(wrong) or 'group'} of the axis {axis.name!r}")
        axes[axis.name] = axis
    for axis in axes.values():
        if axis.parent is not None and axis.parent not in axes:
            raise ValueError(f"the axis {axis.name!r} depends on {axis.parent!r}, which is none")
    return axes


def matches_axis(name: str, pattern: str) -> bool:
    """Whether an axis name matches a pattern; a bare name matches all its indices (`heads` matches `heads.3`)."""
    return fnmatchcase(name, pattern) or name.split(".")[0] == pattern


def collect_axes(
    tensors: Sequence[TensorSpec], sizes: Mapping[str, int | None], symmetric: Sequence[str]
) -> tuple[dict[str, Axis], list[str]]:
    """Finds the axes that declarations use.

    Args:
        tensors: The declarations.
        sizes: Size of each axis, by its full name or by the part before the first dot.
        symmetric: The symmetric axes, named likewise.

    Returns:
        The axes by name, and what contradicts itself in the declarations.
    """
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
    """Lists the dependent axes whose parent is not exactly once beside them or in the name of the tensor."""
    problems = []
    for atoms in atoms_of_pieces(tensor.dimensions):
        beside = [*tensor.name_axes, *(atom.axis for atom in atoms if isinstance(atom, AxisUse))]
        for atom in atoms:
            if isinstance(atom, AxisUse) and atom.parent is not None and beside.count(atom.parent) != 1:
                problems.append(f"{tensor.name}: {atom} needs its parent axis {atom.parent!r} beside it, exactly once")
    return list(dict.fromkeys(problems))


def concrete_names(
    tensors: Sequence[TensorSpec], axes: Mapping[str, Axis], is_present: Callable[[str], bool]
) -> dict[str, BoundTensor]:
    """Lists every tensor name that the declarations allow, one per index of the axes in the name.

    Args:
        tensors: The declarations.
        axes: The axes by name.
        is_present: Whether the checkpoint has a tensor, for declarations that depend on another tensor.
    """
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
