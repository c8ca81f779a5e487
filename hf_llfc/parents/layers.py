"""The layers of a model: which of its tensors are of which layer, by its spec, and which parts it has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_llfc.adapters import spec_for
from hf_llfc.checkpoints import Checkpoint
from hf_llfc.errors import CheckpointError, SpecError, suggest
from hf_llfc.parents.depth import LayerOrigin, Path, changes_for, depth_keys, values_of
from hf_llfc.parents.specs import bind, spec_of

if TYPE_CHECKING:
    from hf_llfc.symmetry import PermutationSpec, TensorSpec

_ALONG_AXIS = re.compile(r"<[^<>]*>")

DEFAULT = "default"
"""What the only module of a model is called."""

_OF_SECTIONS = {"text_config": "text_decoder", "vision_config": "vision_tower", "audio_config": "audio_tower"}
_PROJECTOR = re.compile(r"(?:^|[._])(?:projector|merger|connector)(?:[._]|$)")
_PROJECTOR_NAME = "multi_modal_projector"
_ALIASES = {"vision_model": "vision_tower", "audio_model": "audio_tower", "language_model": "text_decoder"}


@dataclass(frozen=True)
class Place:
    """The place of a tensor in a stack of layers: its name is `STACK.INDEX.REST`."""

    stack: str
    index: int
    rest: str

    def name(self, index: int) -> str:
        """The name of the same tensor in another layer."""
        return f"{self.stack}.{index}" + (f".{self.rest}" if self.rest else "")


@dataclass(frozen=True)
class Stack:
    """Layers that follow each other.

    Attributes:
        prefix: What the names of their tensors begin with, up to the index of the layer.
        depth: How many there are.
        key: Where the config says how many.
    """

    prefix: str
    depth: int
    key: Path


@dataclass(frozen=True)
class Module:
    """A part of a model that can be merged its own way.

    Attributes:
        name: What it is called.
        stack: Its layers; None where it has none.
        before: Its tensors before the layers, or all of them where it has no layers.
        after: Its tensors after the layers.
    """

    name: str
    stack: Stack | None
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model.

    Attributes:
        label: What the model is called.
        places: Name of every tensor → its place among layers; None outside them.
        modules: The parts, by name.
    """

    label: str
    places: Mapping[str, Place | None]
    modules: Mapping[str, Module]

    def module(self, name: str | None, path: str) -> Module:
        """A module by the name that a recipe has for it, or the only one.

        Args:
            name: The name; None where the recipe names none.
            path: Where it stands in the recipe, for messages.

        Raises:
            CheckpointError: There is none of that name, or there are several.
        """
        known = ", ".join(self.modules)
        if name is None:
            if len(self.modules) > 1:
                raise CheckpointError(
                    f"{path}: {self.label} has several modules ({known}); write the slices of each under "
                    "`modules: {NAME: {slices: …}}`"
                )
            return next(iter(self.modules.values()))
        found = name if name in self.modules else _ALIASES.get(name, name)
        for module in self.modules.values():
            roots = (module.stack.prefix, module.stack.prefix.rpartition(".")[0]) if module.stack is not None else ()
            if module.name == found or name in roots:
                return module
        if len(self.modules) == 1 and name == DEFAULT:
            return next(iter(self.modules.values()))
        raise CheckpointError(f"{path}: {self.label} has no such module{suggest(name, self.modules)} (it has {known})")


def anatomy_of(checkpoint: Checkpoint) -> Anatomy:
    """Finds the layers and modules of a model.

    The declarations of its spec name the layers, and stand in the order of the network. A group of tensors with an
    index is a stack of layers if the config says how many there are: the spec of the config with one layer more has one
    more there, and nowhere else. Without a spec the names in the files are all there is to go by.

    Raises:
        CheckpointError: There are no layers.
    """
    try:
        spec: PermutationSpec | None = spec_of(checkpoint)
        assert spec is not None
        bound = bind(spec, checkpoint).tensors
        order = {each.name: number for number, each in enumerate(spec.declarations)}
        declared = {name: _declared(bound[name].spec, order) for name in checkpoint.tensors}
        position = {name: order.get(declared[name], 0) for name in declared}
    except SpecError:
        spec, declared, position = None, {name: name for name in checkpoint.tensors}, {}
    places = {name: _place(name, declared[name]) for name in declared}
    # A stack may be called otherwise in its spec than in the files.
    called = {
        place.stack: inner.stack
        for name, place in places.items()
        if place is not None and (inner := _place(declared[name], declared[name])) is not None
    }
    stacks = [
        Stack(prefix, depth, key)
        for prefix, depth in _groups(places.values()).items()
        if depth and (key := _key(checkpoint, spec, called.get(prefix, prefix), depth)) is not None
    ]
    if not stacks:
        raise CheckpointError(
            f"{checkpoint.label}: no layers are found whose number the config says, so they cannot be taken apart"
        )
    of_layers = {stack.prefix for stack in stacks}
    places = {name: place if place is not None and place.stack in of_layers else None for name, place in places.items()}
    return Anatomy(checkpoint.label, places, _modules(stacks, places, position))


def _declared(tensor: TensorSpec, order: Mapping[str, int]) -> str:
    """What the spec calls a tensor that may have its name in another layout."""
    return next((name for name in (tensor.name, *tensor.covers) if name in order), tensor.name)


def stacks_by_name(checkpoint: Checkpoint) -> list[int]:
    """How many layers each group of tensors with an index has, by their names alone; 0 where indices are missing."""
    return list(_groups(_place(name, name) for name in checkpoint.tensors).values())


def _place(name: str, declared: str) -> Place | None:
    """The place of a tensor; an index along an axis, that of an expert say, is none of a layer."""
    parts = name.split(".")
    pattern = _ALONG_AXIS.sub("#", declared).split(".")
    beside = len(parts) - len(pattern)  # a head prefix more or less
    for number, part in enumerate(parts):
        if part.isdecimal() and not (0 <= number - beside < len(pattern) and pattern[number - beside] == "#"):
            return Place(".".join(parts[:number]), int(part), ".".join(parts[number + 1 :]))
    return None


def _groups(places: Iterable[Place | None]) -> dict[str, int]:
    """Prefix → number of indices, where they go from 0 without a gap; 0 where they do not."""
    indices: dict[str, set[int]] = {}
    for place in places:
        if place is not None:
            indices.setdefault(place.stack, set()).add(place.index)
    return {prefix: len(found) if found == set(range(len(found))) else 0 for prefix, found in indices.items()}


def _key(checkpoint: Checkpoint, spec: PermutationSpec | None, prefix: str, depth: int) -> Path | None:
    """Where the config says how many layers a stack has; None if it is not a stack of layers.

    Args:
        checkpoint: The model.
        spec: Its spec; None where it has none.
        prefix: What the spec calls the stack.
        depth: How many layers it has.
    """
    values = values_of(checkpoint.settings)
    candidates = list(depth_keys(values, depth))
    if spec is None:
        return next(iter(candidates), None)
    groups = _groups_of(spec)
    expected = {**groups, prefix: groups.get(prefix, depth) + 1}
    layers = [LayerOrigin(values, depth, min(index, depth - 1)) for index in range(depth + 1)]
    for key in candidates:
        try:
            larger = dict(values)
            for place, value in changes_for(key, layers).items():
                larger = _replaced(larger, place, value)
            grown = _groups_of(spec_for(type(checkpoint.config).from_dict(larger)))
        except Exception:  # a config class may raise anything on values it does not expect
            continue
        if grown == expected:
            return key
    return None


def _groups_of(spec: PermutationSpec) -> dict[str, int]:
    return _groups(_place(each.name, each.name) for each in spec.declarations)


def _replaced(values: Mapping[str, Any], place: Path, value: Any) -> dict[str, Any]:
    head, *rest = place
    return {**values, head: _replaced(values.get(head) or {}, tuple(rest), value) if rest else value}


def _modules(
    stacks: Sequence[Stack], places: Mapping[str, Place | None], position: Mapping[str, int]
) -> dict[str, Module]:
    """The parts of a model: one a stack, with the tensors that belong to it, and what is left over."""
    loose = [name for name, place in places.items() if place is None]
    if len(stacks) == 1:
        return {DEFAULT: _module(DEFAULT, stacks[0], loose, places, position)}
    roots = {stack.prefix: _root(stack.prefix, [each.prefix for each in stacks]) for stack in stacks}
    names = {stack.prefix: _module_name(stack, roots[stack.prefix]) for stack in stacks}
    owned: dict[str, list[str]] = {names[stack.prefix]: [] for stack in stacks}
    text = next((name for name in owned if name == "text_decoder"), None)
    for name in loose:
        own = next((prefix for prefix, root in roots.items() if name.startswith(f"{root}.")), None)
        if _PROJECTOR.search(name):
            owner = _PROJECTOR_NAME
        elif own is not None:
            owner = names[own]
        else:
            owner = text or "shared"
        owned.setdefault(owner, []).append(name)
    of_name = {names[stack.prefix]: stack for stack in stacks}
    return {name: _module(name, of_name.get(name), mine, places, position) for name, mine in owned.items()}


def _module(
    name: str,
    stack: Stack | None,
    loose: Sequence[str],
    places: Mapping[str, Place | None],
    position: Mapping[str, int],
) -> Module:
    if stack is None:
        return Module(name, None, tuple(loose), ())
    of_layers = [
        position.get(each, 0) for each, place in places.items() if place is not None and place.stack == stack.prefix
    ]
    last = max(of_layers)
    after = [each for each in loose if position.get(each, 0) > last]
    return Module(name, stack, tuple(each for each in loose if each not in after), tuple(after))


def _root(prefix: str, prefixes: Sequence[str]) -> str:
    """The shortest beginning of a prefix that no other one has."""
    parts = prefix.split(".")
    for count in range(1, len(parts) + 1):
        root = ".".join(parts[:count])
        if not any(other == root or other.startswith(f"{root}.") for other in prefixes if other != prefix):
            return root
    return prefix


def _module_name(stack: Stack, root: str) -> str:
    last = root.rpartition(".")[2]
    if last in ("encoder", "decoder"):
        return last
    return _OF_SECTIONS.get(stack.key[0], "text_decoder" if len(stack.key) == 1 else last)
