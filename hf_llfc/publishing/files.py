"""Files of an output folder: JSON and YAML read with one clear error, text written as a whole or not at all."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from hf_llfc.errors import PublishingError, RecipeError
from hf_llfc.foundation.limited_yaml import read_documents
from hf_llfc.foundation.model_names import as_text
from hf_llfc.recipe import Recipe, load_recipe


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of an output folder.

    Raises:
        PublishingError: There is none, or it cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PublishingError(f"{path.parent} holds no {path.name}; give the output folder of a merge") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PublishingError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise PublishingError(f"{path} holds no JSON object")
    return values


def read_recipe(path: Path) -> Recipe:
    """The recipe of an output folder, as it was run.

    Raises:
        PublishingError: It cannot be read, or this version knows no such recipe.
    """
    values = [each for each in read_documents(path, PublishingError) if each is not None]
    if not values or not all(isinstance(each, dict) for each in values):
        raise PublishingError(f"{path} holds no recipe")
    try:
        return load_recipe(values)
    except RecipeError as error:
        raise PublishingError(f"{path}: {error}") from None


def write_whole(path: Path, text: str) -> Path:
    """Writes a file so that it is there as a whole or not at all, with the permissions of any new file."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with draft.open("x", encoding="utf-8", newline="\n") as file:
        file.write(as_text(text))
    draft.replace(path)
    return path
