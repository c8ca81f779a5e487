"""What determines a result: recipe, inputs and versions, as JSON values that a journal keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llfc.checkpoints import Checkpoint
from hf_llfc.checkpoints.companions import code_names, companion_names
from hf_llfc.checkpoints.files import CONFIG_FILE
from hf_llfc.checkpoints.positioned import checksum
from hf_llfc.evaluation import EvaluationConfig
from hf_llfc.foundation.model_names import existing, is_hub_id
from hf_llfc.foundation.version import __version__
from hf_llfc.recipe import Recipe

if TYPE_CHECKING:
    from hf_llfc.evaluation import EvaluationData

LIBRARIES = ("torch", "transformers")
"""Those whose other version may round otherwise."""

IRRELEVANT = ("output_dir", "overwrite", "max_memory", "device", "log_with", "logging_dir")
"""Keys of a recipe that say where a result goes and how it is made, not what it is."""


def identity_of_run(
    recipe: Recipe, checkpoints: Sequence[Checkpoint], opened: Sequence[EvaluationData | None] = ()
) -> dict[str, Any]:
    """What determines the output of a run.

    Args:
        recipe: As it is run.
        checkpoints: All that it reads.
        opened: The data that it has opened: of those on the Hub the commit is known by now.
    """
    calibration = recipe.diagnose.batch_norm.data if recipe.diagnose is not None else None
    measured = recipe.diagnose.data if recipe.diagnose is not None else None
    settings = {key: value for key, value in recipe.to_dict().items() if key not in IRRELEVANT}
    data = [recipe.align.calibration, measured, calibration, recipe.importance]
    data += [entry.importance for entry in recipe.models]
    data += recipe.calibration_data
    commits = {f"data {index}": str(each.config.dataset) for index, each in enumerate(opened) if each is not None}
    told = {"recipe": settings, "commits": {name: each for name, each in commits.items() if "@" in each}}
    return identity_of(told, checkpoints, data)


def identity_of(
    settings: Mapping[str, Any], checkpoints: Sequence[Checkpoint], data: Sequence[EvaluationConfig | None] = ()
) -> dict[str, Any]:
    """What determines an output.

    Args:
        settings: What the user wrote, as JSON values.
        checkpoints: All that are read.
        data: All data that are read.
    """
    told = [each for each in data if each is not None]
    tokenizers = [each.tokenizer for each in told if each.tokenizer is not None]
    return {
        **settings,
        "versions": {"hf-llfc": __version__, **{name: version(name) for name in LIBRARIES}},
        "inputs": [each.identity() for each in checkpoints],
        "data": _data([each.dataset for each in told]),
        "tokenizers": {name: _content(existing(name), _is_of_tokenizer) or _commit_of(name) for name in tokenizers},
    }


def as_settings(section: Any) -> dict[str, Any]:
    """A section of a recipe as JSON values."""
    return {name: value for name, value in dataclasses.asdict(section).items() if value not in (None, ())}


def _data(datasets: Sequence[Any]) -> dict[str, Any]:
    """What tells data from others: the content of files, each read once, and fingerprints of what is in memory."""
    names = dict.fromkeys(str(each) for each in datasets if isinstance(each, str | Path))
    paths = {name: existing(name) for name in names}
    found: dict[str, Any] = {name: _content(path) for name, path in paths.items() if path is not None}
    in_memory = [repr(vars(each).get("_fingerprint")) for each in datasets if not isinstance(each, str | Path)]
    return found | {f"in memory {place}".removesuffix(" 0"): each for place, each in enumerate(in_memory)}


def _content(path: Path | None, is_read: Callable[[str], bool] = lambda _: True) -> dict[str, str]:
    """The checksum of a file, or of every file below a folder by its path; nothing of what is elsewhere.

    Args:
        path: The file or folder; None where there is none.
        is_read: Tells of a path below the folder whether it is read.
    """
    if path is None or not path.is_dir():
        return {} if path is None else {path.name: checksum(path)}
    files = {each.relative_to(path).as_posix(): each for each in sorted(path.rglob("*")) if each.is_file()}
    return {name: checksum(each) for name, each in files.items() if is_read(name)}


def _commit_of(tokenizer: str) -> str | None:
    """The commit of a tokenizer of the Hub in the cache, from which it was read; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    if not is_hub_id(tokenizer):
        return None
    cached = try_to_load_from_cache(tokenizer, "tokenizer_config.json")
    return Path(cached).parent.name if isinstance(cached, str) else None


def _is_of_tokenizer(name: str) -> bool:
    return name == CONFIG_FILE or bool(companion_names([name]) or code_names([name]))
