"""Several recipes in one file, as YAML documents: those with a name are made first, and others refer to them.

All of this is about plain data. A name of a document stands where a model stands; the folder that its result goes to is
put in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from hf_llfc.errors import suggest

OF_MODELS = frozenset({"model", "base_model", "tokenizer_source", "reference", "source", "path"})
"""Keys behind which a model is named."""

INHERITED = ("allow_pickle", "device", "max_memory")
"""Keys of the last document that hold for all that have none of their own: how they are read and merged."""

Content = dict[str, Any]


@dataclass(frozen=True)
class Documents:
    """The recipes of a file, in the order in which they are made.

    Attributes:
        last: The one whose result is the output.
        earlier: Name → the others, each behind those that it refers to.
    """

    last: Content
    earlier: Mapping[str, Content]


def documents_of(contents: Sequence[Any], problems: list[str]) -> Documents | None:
    """Puts the documents of a file in the order in which they are made.

    Args:
        contents: What they say; at least one.
        problems: What is wrong is appended to it.

    Returns:
        The documents; None where they have no order.
    """
    where = [f"document {number}" for number in range(1, len(contents) + 1)]
    for place, content in zip(where, contents, strict=True):
        if not isinstance(content, dict):
            problems.append(f"{place}: a recipe is a mapping of keys, found {repr(content)[:80]}")
        elif "name" in content and (not isinstance(content["name"], str) or not _is_name(content["name"])):
            problems.append(
                f"{place}.name: a word that may be the name of a folder is expected, found {content['name']!r}"
            )
    if problems:
        return None
    names = [content.get("name") for content in contents]
    unnamed = [index for index, name in enumerate(names) if name is None]
    last = unnamed[-1] if unnamed else len(contents) - 1
    problems += [
        f"{where[index]}: has no name, so nothing can be made of it; only the last merge, {where[last]}, needs none"
        for index in unnamed[:-1]
    ]
    for index, name in enumerate(names):
        if name is not None and name in names[:index]:
            problems.append(f"{where[index]}.name: {name!r} is the name of {where[names.index(name)]} as well")
    if problems:
        return None
    earlier = {
        name: content for index, (name, content) in enumerate(zip(names, contents, strict=True)) if index != last
    }
    return _ordered(contents[last], earlier, problems)


def _ordered(last: Content, earlier: Mapping[str, Content], problems: list[str]) -> Documents | None:
    own = last.get("name")
    known = {*earlier, *([own] if own is not None else [])}
    graph = {name: [each for each in _references(content) if each in known] for name, content in earlier.items()}
    graph[own or ""] = [each for each in _references(last) if each in known]
    for name, content in {**earlier, own or "": last}.items():
        said = f"document {name}" if name else "the last document"
        if name and name in graph[name]:
            problems.append(f"{said}: refers to itself")
        for reference in _references(content):
            hint = suggest(reference, known) if reference not in known and _may_be_name(reference) else ""
            if hint:
                problems.append(f"{said}: there is no document {reference!r}{hint}")
    if problems:
        return None
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        circle = list(dict.fromkeys(error.args[1]))
        problems.append(f"documents {', '.join(circle)}: refer to each other in a circle")
        return None
    return Documents(last, {name: earlier[name] for name in order if name in earlier})


def folder_of(output_dir: str, name: str) -> str:
    """Where the result of a document goes that does not say so: beside the output."""
    return f"{output_dir.rstrip('/') or output_dir}-documents/{name}"


def with_names(content: Any, names: Mapping[str, str]) -> Any:
    """Plain data with other names for models: of `base+adapter` both parts.

    Args:
        content: Of a recipe.
        names: Name → what takes its place.
    """

    def renamed(value: str) -> str:
        return names.get(value) or "+".join(names.get(part, part) for part in value.split("+"))

    if isinstance(content, Mapping):
        return {
            key: renamed(value) if key in OF_MODELS and isinstance(value, str) else with_names(value, names)
            for key, value in content.items()
        }
    return [with_names(value, names) for value in content] if isinstance(content, list | tuple) else content


def _references(content: Any) -> Iterator[str]:
    """Every name of a model."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if key in OF_MODELS and isinstance(value, str):
                yield from dict.fromkeys([value, *value.split("+")])
            else:
                yield from _references(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _references(value)


def _is_name(name: str) -> bool:
    return bool(name) and name not in (".", "..", "base", "union") and not set(name) & set('/\\:@+"<>|?*\0')


def _may_be_name(reference: str) -> bool:
    """Whether a name of a model may be meant for a document: it is no path, and no id on the Hub."""
    return _is_name(reference) and not Path(reference).exists()
