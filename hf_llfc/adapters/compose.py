"""Families made of others: blocks with their axes renamed, and the spec of one model inside another."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_llfc.adapters.registry import spec_for

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hf_llfc.symmetry.declarations import TensorSpec

_LINE = re.compile(r"(?P<name>\S+)(?P<shape>.*?)(?P<condition>\s+(?:if|unless)\s+\S+)?\s*")
_WORD = re.compile(r"(?<![\w.])[A-Za-z_]\w*")  # a word after a dot is the index of an axis
_IN_NAME = re.compile(r"<[^<>]+>")


@dataclass(frozen=True)
class Part:
    """The declarations of a model inside another one.

    Attributes:
        lines: One tensor each.
        sizes: Size of each axis.
        symmetric: The symmetric axes.
    """

    lines: tuple[str, ...]
    sizes: dict[str, int | None]
    symmetric: tuple[str, ...]


def renamed(lines: Iterable[str], **axes: str) -> list[str]:
    """Declarations with axes renamed.

    Args:
        lines: One tensor each.
        **axes: Name of an axis, by its part before the dot → its new name; a whole expression where the axis has no
            index (`residual="(groups channels[groups])"`).
    """
    return [_with_axes(line, lambda axis: axes.get(axis, axis)) for line in lines]


def occurring(axes: Iterable[str], *blocks: Iterable[str]) -> tuple[str, ...]:
    """Those of some axes that declarations use, where one list of symmetric axes serves several families."""
    used = {word for block in blocks for line in block for word in _WORD.findall(line.partition(" ")[2])}
    return tuple(axis for axis in axes if axis in used)


def only_if(other: str, *blocks: Iterable[str]) -> list[str]:
    """Declarations that hold where another tensor is present: the half of a model that a checkpoint may lack."""
    return [f"{line}  if {other}" for block in blocks for line in block]


def part_of(
    config: PreTrainedConfig,
    place: str,
    *,
    axes: str = "",
    shared: Mapping[str, str] | None = None,
    heads: Mapping[str, str] | None = None,
    whole: bool = False,
) -> Part:
    """The spec of a model inside another one.

    Args:
        config: Config of the inner model.
        place: Goes before the names of its tensors, in place of the head prefix that they have alone.
        axes: Goes before the names of its axes (`vision_`).
        shared: Axes that it shares with the outer model, by their part before the dot → the name there.
        heads: Its task heads that the outer model has too → their names there.
        whole: Whether all its names are kept, head prefix and heads included, behind `place`.
    """
    config = copy.copy(config)
    config.architectures = None  # what the inner model returns alone is not what the outer one returns
    spec = spec_for(config)
    shared, heads = shared or {}, heads or {}

    def outer(axis: str) -> str:
        base, dot, index = axis.partition(".")
        return shared.get(base, axes + base) + dot + index

    def rename(name: str) -> str | None:
        if whole:
            return f"{place}.{name}"
        for inner, there in heads.items():
            if name == inner or name.startswith(f"{inner}."):
                return there + name.removeprefix(inner)
        return f"{place}.{name.removeprefix(spec.prefix)}" if name.startswith(spec.prefix) else None

    tensors = [(name, tensor) for tensor in spec.declarations if (name := rename(tensor.name)) is not None]
    used = {use.axis for _, tensor in tensors for use in tensor.axes}
    return Part(
        tuple(_with_axes(_declaration(name, tensor, rename), lambda axis: outer(axis)) for name, tensor in tensors),
        {outer(name): axis.size for name, axis in spec.axes.items() if name in used},
        tuple(outer(name) for name in spec.symmetric_axes if name in used),
    )


def _declaration(name: str, tensor: TensorSpec, rename: Callable[[str], str | None]) -> str:
    marks = ("?" if tensor.optional else "") + ("~" if tensor.statistic else "")
    condition = ""
    if tensor.condition is not None:
        sense, other = tensor.condition
        condition = f"  {sense} {rename(other) or other}"
    return f"{name}{marks}  {tensor.expression}{condition}"


def _with_axes(line: str, name_of: Callable[[str], str]) -> str:
    match = _LINE.fullmatch(line)
    assert match is not None, line

    def renamed_in(text: str) -> str:
        return _WORD.sub(lambda word: name_of(word[0]), text)

    name = _IN_NAME.sub(lambda axis: renamed_in(axis[0]), match["name"])
    return name + renamed_in(match["shape"]) + (match["condition"] or "")
