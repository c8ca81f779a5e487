"""What a model class needs of the tensors that a spec marks as optional, known without loading the class.

A spec declares a family with every head, bias and buffer that one of its checkpoints may hold. Which of them a
checkpoint has to hold depends on its class and its config: `needs.json` says so, as `python -m tests.needs_table` has
found by building the classes. A class that is not there has to be asked itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any

from hf_llfc.symmetry.binding import Binding
from hf_llfc.symmetry.declarations import concrete_names
from hf_llfc.symmetry.spec import PermutationSpec

LABELS = "labels"
"""The axis whose size is the number of labels; `sizes` of a row says which value of a config is the size of others."""

ASK = "?"
"""In place of a tensor where only the class can tell."""

_INDEX = re.compile(r"\.\d+(?=\.)")
_NEED = re.compile(r"(?P<name>\S+)(?: (?P<sense>if|unless) (?P<key>\S+))?")


def is_whole(binding: Binding, architecture: str | None, values: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has exactly the tensors that its class needs, of their sizes.

    Args:
        binding: Its tensors, each by the name that its class writes.
        architecture: The name of the class.
        values: The values in its config.json.

    Returns:
        False also where only the class can tell.
    """
    needed = needed_tensors(binding.spec, architecture, values)
    held = {name for name, bound in binding.tensors.items() if bound.spec.optional}
    if needed is None or held != needed:
        return False
    unknown = {axis: size for axis, size in binding.sizes.items() if binding.spec.axes[axis].size is None}
    sizes = _table()[binding.spec.model_type].get("sizes", {})
    return all(size == _size(axis, sizes, values) for axis, size in unknown.items())


def is_whole_of_some_class(binding: Binding, values: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has all tensors that some class needs, where its config names none.

    Args:
        binding: Its tensors.
        values: The values in its config.json.

    Returns:
        False also where only the classes can tell.
    """
    row = _table().get(binding.spec.model_type)
    if row is None or any(name != bound.spec.name_at(bound.index) for name, bound in binding.tensors.items()):
        return False
    needed = (needed_tensors(binding.spec, name, values) for name in row["classes"])
    return any(tensors is not None and tensors <= binding.tensors.keys() for tensors in needed)


def needed_tensors(spec: PermutationSpec, architecture: str | None, values: Mapping[str, Any]) -> frozenset[str] | None:
    """The optional tensors of a spec that a model class needs.

    Args:
        spec: The spec of the config.
        architecture: The name of the class.
        values: The values in config.json.

    Returns:
        Their names; None where only the class can tell.
    """
    row = _table().get(spec.model_type)
    if row is None or architecture not in row["classes"]:
        return None
    patterns = set()
    for line in [*row["all"], *row["classes"][architecture]]:
        need = _NEED.fullmatch(line)
        assert need is not None, line
        if need["key"] is not None:
            value = values.get(need["key"], row["defaults"][need["key"]])
            if not isinstance(value, bool):
                return None
            if value != (need["sense"] == "if"):
                continue
        if need["name"] == ASK:
            return None
        patterns.add(need["name"])
    optional = [replace(tensor, condition=None) for tensor in spec.declarations if tensor.optional]
    names = concrete_names(optional, spec.axes, lambda _: True)
    found = {name: {pattern_of(name), pattern_after_first(name)} for name in names}
    if not patterns <= set().union(*found.values()):
        return None
    return frozenset(name for name, forms in found.items() if forms & patterns)


def pattern_of(name: str) -> str:
    """The name of a tensor with a star for every index."""
    return _INDEX.sub(".*", name)


def pattern_after_first(name: str) -> str | None:
    """The name of a tensor with a plus for every index; None where one is zero, of the first layer."""
    return None if any(int(index[1:]) == 0 for index in _INDEX.findall(name)) else _INDEX.sub(".+", name)


def _size(axis: str, sizes: Mapping[str, Any], values: Mapping[str, Any]) -> int | None:
    """The size of an axis that a config.json says and the spec does not; None where its class has to be asked."""
    if axis == LABELS:
        labels = values.get("id2label", (0, 1))
        return len(labels) if isinstance(labels, Mapping | tuple) and "num_labels" not in values else None
    if axis not in sizes:
        return None
    rule = sizes[axis]
    value, more = values.get(rule["key"], rule["default"]), int(rule["more"])
    return value + more if isinstance(value, int) and not isinstance(value, bool) else None


@cache
def _table() -> Any:
    return json.loads((files(__package__) / "needs.json").read_text(encoding="utf-8"))
