"""YAML that strangers wrote, read within limits: plain values, no aliases, no key twice, bounded size and depth."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from hf_llfc.errors import LLFCError

LARGEST_FILE = 1_000_000
"""In bytes."""

DEEPEST = 20
"""Levels of mappings and lists."""


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that comes twice."""


def _mapping_once(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if isinstance(key, list | dict):
            raise LLFCError(f"line {node.start_mark.line + 1}: a key must be a word, not {key!r}")
        if keys.count(key) > 1:
            raise LLFCError(f"line {node.start_mark.line + 1}: the key {key!r} comes twice")
    return {key: loader.construct_object(value, deep=True) for key, (_, value) in zip(keys, node.value, strict=True)}


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
            if isinstance(event, yaml.AliasEvent):
                raise kind(f"{where}: aliases (`*name`) are not supported in a recipe")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise kind(f"{where}: nested deeper than {DEEPEST} levels")
        return list(yaml.load_all(text, Loader=_StrictLoader))
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
