"""What determines a result: recipe, inputs and versions, as JSON values that a journal keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_llfc.checkpoints import Checkpoint
from hf_llfc.evaluation import EvaluationConfig
from hf_llfc.foundation.version import __version__
from hf_llfc.recipe import Recipe

LIBRARIES = ("torch", "transformers")
"""Those whose other version may round otherwise."""

IRRELEVANT = ("output_dir", "overwrite", "max_memory", "device", "log_with", "logging_dir")
"""Keys of a recipe that say where a result goes and how it is made, not what it is."""


def identity_of_run(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """What determines the output of a run.

    Args:
        recipe: As it is run.
        checkpoints: All that it reads.
    """
    calibration = recipe.diagnose.batch_norm.data if recipe.diagnose is not None else None
    measured = recipe.diagnose.data if recipe.diagnose is not None else None
    settings = {key: value for key, value in recipe.to_dict().items() if key not in IRRELEVANT}
    data = [recipe.align.calibration, measured, calibration, recipe.importance]
    data += [entry.importance for entry in recipe.models]
    return identity_of({"recipe": settings}, checkpoints, data)


def identity_of(
    settings: Mapping[str, Any], checkpoints: Sequence[Checkpoint], data: Sequence[EvaluationConfig | None] = ()
) -> dict[str, Any]:
    """What determines an output.

    Args:
        settings: What the user wrote, as JSON values.
        checkpoints: All that are read.
        data: All data that are read.
    """
    paths = [Path(each.dataset) for each in data if each is not None and isinstance(each.dataset, str)]
    return {
        **settings,
        "versions": {"hf-llfc": __version__, **{name: version(name) for name in LIBRARIES}},
        "inputs": [each.identity() for each in checkpoints],
        "data": {str(path): _content(path) for path in paths if path.exists()},
    }


def as_settings(section: Any) -> dict[str, Any]:
    """A section of a recipe as JSON values."""
    return {name: value for name, value in dataclasses.asdict(section).items() if value not in (None, ())}


def _content(path: Path) -> dict[str, list[int]]:
    """Size and time of the last change of every file."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    return {each.name: [each.stat().st_size, each.stat().st_mtime_ns] for each in files}
