"""How a recipe names a model: as text, or as mergekit's mapping of model, adapter and class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_llfc.recipe.options import join, refuse_unknown

_KEYS = ("model", "lora", "override_architecture")
_KEYS_OF_A_PART = ("path", "revision")


@dataclass(frozen=True)
class Reference:
    """A model as a recipe names it.

    Attributes:
        name: `id`, `id@revision`, a folder, or `base+adapter` of these.
        architecture: The model class to take in place of the one that the config names; None takes that one.
    """

    name: str
    architecture: str | None = None


def read_reference(value: Any, path: str, problems: list[str], located: Callable[[str], str]) -> Reference | None:
    """Reads the name of a model.

    Args:
        value: Text; `{path, revision}`; or `{model, lora, override_architecture}`, of which model and lora are each
            text or `{path, revision}`.
        path: Where it stands in the recipe.
        problems: What is wrong is appended to it, each with its path.
        located: Gives the path of what lies beside the recipe.

    Returns:
        The model; None where something is wrong with its name.
    """
    if isinstance(value, str):
        return Reference(located(value))
    if not isinstance(value, Mapping):
        problems.append(
            f"{path}: the name of a model, or a mapping of {', '.join(_KEYS)}, is expected, found {value!r}"
        )
        return None
    before = len(problems)
    is_part = "path" in value
    refuse_unknown(value, _KEYS_OF_A_PART if is_part else _KEYS, path, problems)
    names = [_part(value, path, problems, located)] if is_part else []
    for key in ("model", "lora"):
        if not is_part and (value.get(key) is not None or key == "model"):
            names.append(_part(value.get(key), join(path, key), problems, located))
    if "lora" in value and value["lora"] is None:
        problems.append(f"{join(path, 'lora')}: names no adapter; give its Hub id or folder, or remove the key")
    architecture = None if is_part else value.get("override_architecture")
    if architecture is not None and not isinstance(architecture, str):
        problems.append(
            f"{join(path, 'override_architecture')}: the name of a class is expected, found {architecture!r}"
        )
    return Reference("+".join(map(str, names)), architecture) if len(problems) == before else None


def _part(value: Any, path: str, problems: list[str], located: Callable[[str], str]) -> str | None:
    """A model or an adapter alone."""
    if isinstance(value, str) and value:
        return located(value)
    if not isinstance(value, Mapping):
        found = "missing" if value is None else f"text or `path` and `revision` is expected, found {value!r}"
        problems.append(f"{path}: {found}")
        return None
    refuse_unknown(value, _KEYS_OF_A_PART, path, problems)
    name, revision = value.get("path"), value.get("revision")
    if not isinstance(name, str) or not name:
        problems.append(f"{join(path, 'path')}: {'missing' if name is None else f'text is expected, found {name!r}'}")
        return None
    name = located(name)
    if revision is None:
        return name
    if not isinstance(revision, str | int) or isinstance(revision, bool):
        problems.append(f"{join(path, 'revision')}: a branch, tag or commit is expected, found {revision!r}")
    elif Path(name).expanduser().is_dir():
        problems.append(f"{join(path, 'revision')}: {name} is a folder, which has no revisions; remove the revision")
    elif "@" in name:
        problems.append(f"{join(path, 'revision')}: {name} has a revision already; give it once")
    return f"{name}@{revision}"
