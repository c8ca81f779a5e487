"""Merge methods that mergekit computes, on parents that are aligned here, in a process of its own.

mergekit gets folders with tensors under one set of names: a parent's own folder where nothing moves it, else a copy.
It computes in float32 (float64 if the result is) and rounds to the dtype of the result. What it wrote is then read like
any checkpoint, checked, and written as every result is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from hf_llfc.checkpoints import ShardFiles, TensorInfo, open_checkpoint, write_checkpoint
from hf_llfc.errors import CheckpointError, raise_all
from hf_llfc.merging import Merge, merge_streamed, merged_infos
from hf_llfc.parallel.workers import Workers
from hf_llfc.parents.fitting import refuse_not_finite
from hf_llfc.parents.parent import Parent
from hf_llfc.recipe import Recipe

PYTHON = "HF_LLFC_MERGEKIT"
"""Environment variable that names the Python of another environment, in which mergekit is installed."""

_SCRIPT = "mergekit.scripts.run_yaml"
_MESSAGE_LINES = 8


def mergekit_version() -> str:
    """The version of the mergekit that would run.

    Raises:
        CheckpointError: There is none.
    """
    code = "import importlib.metadata, mergekit.scripts; print(importlib.metadata.version('mergekit'))"
    try:
        found = subprocess.run([_python(), "-c", code], capture_output=True, text=True, env=_environment())
    except OSError as error:
        raise CheckpointError(f"{PYTHON} is {_python()!r}, which cannot be run ({error.strerror})") from error
    if found.returncode != 0:
        said = (found.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(
            f"this merge method is computed by mergekit, which {_python()} cannot import ({said}); install it with pip "
            f"install 'hf-llfc[mergekit]', or into another environment whose Python {PYTHON} names"
        )
    return found.stdout.strip()


def merge_by_mergekit(
    recipe: Recipe, parents: Sequence[Parent], base: Parent | None, folder: Path, infos: Mapping[str, TensorInfo]
) -> Path:
    """Runs mergekit.

    Args:
        recipe: With a method that mergekit computes.
        parents: Aligned; one an entry of the recipe's models.
        base: The base, where there is one.
        folder: Where copies and mergekit's output may lie; what is there is removed.
        infos: Name on disk → dtype and shape of the result.

    Returns:
        The folder that mergekit wrote.

    Raises:
        CheckpointError: mergekit is not there or fails, or what it wrote is not a model of these tensors, all finite.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    everyone = [*parents, *([base] if base is not None else [])]
    places = [_place(parent, folder / f"parent-{number}") for number, parent in enumerate(everyone)]
    for each in everyone:
        each.checkpoint.refuse_changed()
    (folder / "merge.yaml").write_text(yaml.safe_dump(_config(recipe, places, infos)), encoding="utf-8")
    _run(folder, recipe)
    merged = open_checkpoint(folder / "merged")
    differing = [
        f"{name}: expected shape {list(info.shape)}, found "
        + (str(list(merged.tensors[name].shape)) if name in merged.tensors else "no such tensor")
        for name, info in infos.items()
        if name not in merged.tensors or merged.tensors[name].shape != info.shape
    ]
    raise_all(differing, CheckpointError, f"{recipe.merge_method}: mergekit wrote other tensors than the parents have")
    refuse_not_finite(merged)
    return folder / "merged"


def describe(recipe: Recipe) -> dict[str, Any]:
    """What made the weights, for the evidence beside a result.

    Returns:
        Title of the method, version of mergekit, and the settings that it was given, as JSON values.
    """
    method = recipe.mergekit_method
    assert method is not None
    return {
        "method": recipe.merge_method,
        "title": method.title,
        "mergekit": mergekit_version(),
        "parameters": dict(recipe.parameters.settings),
        "seed": recipe.seed,
    }


def _config(recipe: Recipe, places: Sequence[Path], infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The recipe as mergekit reads it, the base behind the models among the places."""
    result = next(info.dtype for info in infos.values() if info.dtype.is_floating_point)
    models = [
        {"model": str(place), "parameters": dict(entry.parameters.settings if entry.parameters is not None else {})}
        for place, entry in zip(places, recipe.models, strict=False)
    ]
    config = {
        "merge_method": recipe.merge_method,
        "models": models,
        "parameters": dict(recipe.parameters.settings),
        "dtype": _name(torch.promote_types(result, torch.float32)),
        "out_dtype": _name(result),
    }
    return config if recipe.base_model is None else {**config, "base_model": str(places[-1])}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _lies_ready(parent: Parent) -> bool:
    """Whether a parent's folder holds its tensors as they are and under their names."""
    checkpoint = parent.checkpoint
    if parent.alignment is not None or checkpoint.adapter is not None or checkpoint.folder is None:
        return False
    return all(checkpoint.span(name) is not None for name in checkpoint.tensors)


def _place(parent: Parent, copy: Path) -> Path:
    """Where mergekit reads a parent."""
    checkpoint = parent.checkpoint
    if _lies_ready(parent):
        assert checkpoint.folder is not None
        return checkpoint.folder.resolve()
    copy.mkdir()
    # A folded adapter is not rounded yet, and need not be.
    infos = merged_infos(checkpoint.tensors, torch.float32) if checkpoint.adapter is not None else checkpoint.tensors
    merge = Merge.copy(parent.source, infos)

    def fill(files: ShardFiles) -> None:
        merge_streamed(merge, files, workers=Workers(torch.get_num_threads()))

    write_checkpoint(copy, infos, fill, config=checkpoint.settings)
    return copy


def _run(folder: Path, recipe: Recipe) -> None:
    options = ["--no-write-model-card", "--no-copy-tokenizer", "--quiet", "--random-seed", str(recipe.seed)]
    paths = [str(folder / "merge.yaml"), str(folder / "merged")]
    done = subprocess.run(
        [_python(), "-m", _SCRIPT, *paths, *options], capture_output=True, text=True, env=_environment()
    )
    if done.returncode != 0:
        said = "\n".join(done.stderr.strip().splitlines()[-_MESSAGE_LINES:])
        raise CheckpointError(f"{recipe.merge_method}: mergekit {mergekit_version()} failed; it said:\n{said}")


def _python() -> str:
    return os.environ.get(PYTHON) or sys.executable


def _environment() -> dict[str, str]:
    """Nothing is to be fetched: all that mergekit reads lies here."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
