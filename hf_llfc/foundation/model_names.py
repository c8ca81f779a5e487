"""How a user names a model: a folder, a Hub id, `id@revision`, or `base+adapter`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""A repository on the Hub with its owner."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[^\s+]+)?")


def existing(name: str | Path) -> Path | None:
    """The file or folder that a user names; None where there is none, or where none can be called that."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # longer than a name can be, of a user that is not known, a null byte
        return None


def is_hub_id(model: str) -> bool:
    """Whether a name is an id on the Hub, and no folder of that name exists here."""
    return HUB_ID.fullmatch(model) is not None and existing(model) is None


def split_revision(model: str) -> tuple[str, str | None]:
    """Splits `id@revision`; a path that holds an @ stays whole."""
    model_id, at, revision = model.rpartition("@")
    return (model_id, revision) if at and revision and HUB_ID.fullmatch(model_id) else (model, None)


def split_adapter(model: str) -> tuple[str, str | None]:
    """Splits `base+adapter`; a folder whose name holds a plus stays whole.

    Args:
        model: As a user names it.

    Returns:
        The base and the adapter; the whole and None where it is not two names.
    """
    if "+" not in model or existing(model) is not None:
        return model, None

    def may_be_a_model(name: str) -> bool:
        return existing(name) is not None or _HUB_NAME.fullmatch(name) is not None

    pluses = [index for index, letter in enumerate(model) if letter == "+"]
    pairs = [(model[:index], model[index + 1 :]) for index in pluses]
    fitting = [pair for pair in pairs if all(may_be_a_model(name) for name in pair)]
    if not fitting and len(pairs) == 1:
        return pairs[0]  # the error about the one that is missing names it
    return fitting[0] if fitting else (model, None)


def parts_of(model: str) -> list[str]:
    """The names in a model's name: one, or of `base+adapter` two."""
    base, adapter = split_adapter(model)
    return [base] if adapter is None else [base, adapter]


def portable(name: str, beside: Path | None = None) -> str:
    """What others are told of a model or of data: a Hub id as it is, and no path from the root of a disk.

    Of an absolute path what is left is the way from a folder beside which it lies, or from the current folder if it is
    in that (with `./` in front, so that nobody takes it for a Hub id), or else its last part.

    Args:
        name: Hub id, `id@revision`, path, or `base+adapter`.
        beside: A folder from which paths are told that lie beside the folder that it is in, or below.
    """
    parts = parts_of(name)
    if len(parts) > 1:
        return "+".join(portable(part, beside) for part in parts)
    return as_text(_portable(name, beside))


def as_text(name: str) -> str:
    """A name as text that every file and screen takes: bytes that the locale does not know are read as UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _portable(name: str, beside: Path | None) -> str:
    path = existing(name) or Path(name)
    if not path.is_absolute():
        return f"./{name}" if HUB_ID.fullmatch(name) and existing(name) is not None else name
    if beside is not None and path.is_relative_to(beside.parent.parent) and path != beside.parent.parent:
        return Path(os.path.relpath(path, beside)).as_posix()
    inside = os.path.relpath(path, Path.cwd())
    return f"./{path.name}" if inside.startswith("..") or path.name == "" else f"./{PurePath(inside).as_posix()}"


def without_paths(value: Any, names: Mapping[str, str]) -> Any:
    """JSON values in which names stand in place of others: of absolute paths also inside sentences.

    Args:
        value: The values.
        names: What is replaced → by what.
    """
    if isinstance(value, Mapping):
        return {key: without_paths(entry, names) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(entry, names) for entry in value]
    if not isinstance(value, str) or value in names:
        return names[value] if isinstance(value, str) else value
    for name in sorted(names, key=len, reverse=True):
        if name.startswith(("/", "~")) or Path(name).is_absolute() or name != as_text(name):
            value = value.replace(name, names[name])
    return value
