"""Binding: which declaration of a permutation spec every tensor of a checkpoint follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from hf_llfc.errors import SpecError, raise_all, suggest
from hf_llfc.symmetry.declarations import BoundTensor, TensorSpec, concrete_names
from hf_llfc.symmetry.expressions import AxisUse

if TYPE_CHECKING:
    from hf_llfc.symmetry.spec import PermutationSpec

# A checkpoint of another architecture misses every name; a few suggestions help, thousands take minutes.
_SUGGESTIONS = 8


@dataclass(frozen=True)
class Binding:
    """The declaration of every tensor of one checkpoint, by its own names, as `PermutationSpec.bind` finds it.

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


def bind(spec: PermutationSpec, shapes: Mapping[str, Sequence[int]]) -> Binding:
    """Finds the declaration of every tensor of a checkpoint; see `PermutationSpec.bind`."""

    def is_present(name: str) -> bool:
        bare = name.removeprefix(spec.prefix)
        prefixes = (spec.prefix, "", *spec.other_prefixes) if bare != name else ("",)
        return any(prefix + bare in shapes for prefix in prefixes)

    required = concrete_names(spec.declarations, spec.axes, is_present)
    declared = required
    if spec.other_layouts is not None and any(_find(spec, name, required) is None for name in shapes):
        declared = {**concrete_names(tuple(spec.other_layouts(spec)), spec.axes, is_present), **required}
    tensors: dict[str, BoundTensor] = {}
    names: dict[tuple[str, tuple[int, ...]], str] = {}
    problems: list[str] = []
    for name in shapes:
        bound = _find(spec, name, declared)
        if bound is None:
            nearest = suggest(name, declared) if len(problems) < _SUGGESTIONS else ""
            problems.append(f"{name}: not declared{nearest}")
            continue
        tensors[name] = bound
        same = names.setdefault((bound.spec.name, bound.index), name)
        if same != name:
            problems.append(f"{name}: the same tensor as {same}; a checkpoint may hold only one of the two")
    covered = {name for bound in tensors.values() for name in bound.spec.covers}
    problems += [
        f"{name}: missing, expected [{bound.spec.expression}]"
        for name, bound in required.items()
        if not bound.spec.optional and (bound.spec.name, bound.index) not in names and name not in covered
    ]
    sizes = _sizes(spec, tensors, shapes, problems)
    raise_all(problems, SpecError, f"the checkpoint does not fit the permutation spec of {spec.model_type}")
    return Binding(spec, tensors, sizes)


def _find(spec: PermutationSpec, name: str, declared: Mapping[str, BoundTensor]) -> BoundTensor | None:
    for old, new in spec.old_endings.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    for prefix in (spec.prefix, *spec.other_prefixes):
        bare = name.removeprefix(prefix)
        for candidate in (name, spec.prefix + bare, bare, *(other + bare for other in spec.other_prefixes)):
            if candidate in declared:
                return declared[candidate]
    return None


def _sizes(
    spec: PermutationSpec,
    tensors: Mapping[str, BoundTensor],
    shapes: Mapping[str, Sequence[int]],
    problems: list[str],
) -> dict[str, int]:
    """The size of every axis; adds the tensors of another shape to the problems."""
    sizes = {name: axis.size for name, axis in spec.axes.items() if axis.size is not None}
    for name, bound in tensors.items():
        shape, dimensions = shapes[name], bound.spec.dimensions
        if len(shape) == len(dimensions):
            for size, dimension in zip(shape, dimensions, strict=True):
                if isinstance(dimension, AxisUse):
                    sizes.setdefault(dimension.axis, size)
    for name, bound in tensors.items():
        shape = tuple(shapes[name])
        if any(use.axis not in sizes for use in bound.spec.axes):
            unknown = next(use.axis for use in bound.spec.axes if use.axis not in sizes)
            problems.append(f"{name}: shape {list(shape)} does not tell the size of {unknown!r}")
            continue
        expected = bound.spec.shape(sizes)
        if shape != expected:
            problems.append(
                f"{name}: shape {list(shape)} found, {list(expected)} expected from the config "
                f"[{bound.spec.expression}]"
            )
    return sizes
