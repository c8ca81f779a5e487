"""YAML that strangers wrote, read within limits: plain values, no key twice, bounded size and depth.

Aliases (`*name`) and merge keys (`<<: *name`) are replaced by what they stand for, each time by a copy of its own. The
limits hold for the text and for what it becomes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hf_llfc.errors import LLFCError

LARGEST_FILE = 1_000_000
"""In bytes, and of what it says, aliases replaced, in characters."""

DEEPEST = 20
"""Levels of mappings and lists."""


_MERGE = "tag:yaml.org,2002:merge"


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that comes twice, and makes a value of its own for every alias."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        made = super().construct_object(node, deep=True)
        self.constructed_objects.pop(node, None)
        return made


def _mapping_once(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    content: dict[Any, Any] = {}
    merged: list[dict[Any, Any]] = []
    for key_node, value in node.value:
        is_merge = key_node.tag == _MERGE
        key = "<<" if is_merge else loader.construct_object(key_node)
        if isinstance(key, list | dict):
            raise LLFCError(f"line {node.start_mark.line + 1}: a key must be a word, not {key!r}")
        if merged if is_merge else key in content:
            raise LLFCError(f"line {node.start_mark.line + 1}: the key {key!r} comes twice")
        if is_merge:
            merged.append(_merged(loader, value))
        else:
            content[key] = loader.construct_object(value)
    return {**merged[0], **content} if merged else content


def _merged(loader: _StrictLoader, node: yaml.Node) -> dict[Any, Any]:
    """What a merge key takes over: a mapping, or several, of which the first that has a key counts."""
    sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(source, yaml.MappingNode) for source in sources):
        raise LLFCError(f"line {node.start_mark.line + 1}: `<<` takes over a mapping (`<<: *name`), or a list of them")
    merged: dict[Any, Any] = {}
    for source in reversed(sources):
        merged |= loader.construct_object(source)
    return merged


# YAML 1.1 takes 1e-3 for text because it has no dot; nobody who writes it means that.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_once)


def parse_yaml(text: str, where: str, kind: type[LLFCError]) -> Any:
    """Reads one YAML document; see `parse_documents`.

    Raises:
        LLFCError: An instance of `kind`, if there are several, or it is not valid.
    """
    documents = [each for each in parse_documents(text, where, kind) if each is not None]
    if len(documents) > 1:
        raise kind(f"{where}: holds {len(documents)} documents, and one is expected")
    return documents[0] if documents else None


def parse_documents(text: str, where: str, kind: type[LLFCError]) -> list[Any]:
    """Reads YAML of any number of documents.

    Args:
        text: The YAML.
        where: What error messages call it.
        kind: The class of the error.

    Returns:
        What each says; None of an empty one.

    Raises:
        LLFCError: An instance of `kind`, if it is not valid or beyond the limits.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise kind(f"{where}: nested deeper than {DEEPEST} levels")
        return list(_documents(text))
    except yaml.MarkedYAMLError as error:
        mark, said = error.problem_mark or error.context_mark, error.problem or error.context
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise kind(f"{where}: not valid YAML{place}: {said}") from None
    except yaml.YAMLError as error:
        raise kind(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except LLFCError as error:
        raise kind(f"{where}: {str(error).removeprefix(where + ': ')}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise kind(f"{where}: a value cannot be read: {error}") from None


def _documents(text: str) -> Iterator[Any]:
    """What each document says, looked at before it is made."""
    loader = _StrictLoader(text)
    try:
        while loader.check_node():
            node = loader.get_node()
            assert node is not None, "looked at before"
            _refuse_too_large(node)
            yield loader.construct_document(node)
    finally:
        loader.dispose()


def _refuse_too_large(document: yaml.Node) -> None:
    """Refuses a document that its aliases make too large or too deep, or that holds itself.

    A node is looked at once, however many aliases lead to it.
    """
    measured: dict[yaml.Node, tuple[int, int]] = {}
    within: set[yaml.Node] = set()

    def measure(node: yaml.Node) -> tuple[int, int]:
        if node in measured:
            return measured[node]
        if isinstance(node, yaml.ScalarNode):
            return len(node.value) + 1, 0
        if node in within:
            raise LLFCError(f"line {node.start_mark.line + 1}: an alias stands within what it stands for")
        within.add(node)
        pairs = node.value if isinstance(node, yaml.MappingNode) else [(child,) for child in node.value]
        sizes, depths = zip((1, 0), *(measure(child) for pair in pairs for child in pair), strict=True)
        within.discard(node)
        measured[node] = sum(sizes), max(depths) + 1
        if measured[node][0] > LARGEST_FILE:
            raise LLFCError(f"larger than {LARGEST_FILE} characters with its aliases (`*name`) replaced")
        if measured[node][1] > DEEPEST:
            raise LLFCError(f"nested deeper than {DEEPEST} levels with its aliases (`*name`) replaced")
        return measured[node]

    measure(document)


def read_documents(path: Path, kind: type[LLFCError]) -> list[Any]:
    """Reads a YAML file of any number of documents.

    Args:
        path: The file.
        kind: The class of the error.

    Returns:
        What each says; None of an empty one.

    Raises:
        LLFCError: An instance of `kind`, if it cannot be read, is not valid or beyond the limits.
    """
    return parse_documents(_text_of(path, kind), str(path), kind)


def _text_of(path: Path, kind: type[LLFCError]) -> str:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise kind(f"{path}: larger than {LARGEST_FILE} bytes; this is no recipe")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise kind(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise kind(f"{path}: not a text file") from None
    except ValueError as error:  # a null byte in the name
        raise kind(f"{path}: cannot be read ({error})") from None
