"""Small models in several shards, and what the commands make of them undisturbed."""

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from hf_llfc.cli import main
from tests.faults.harness import counted, working_in
from tests.runs import byte_llama, moved, saved, text_data, text_recipe, written

SHARD = "20KB"

if not hasattr(os, "fork"):
    collect_ignore_glob = ["test_*"]


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Path:
    """Two models, data, and a recipe for each command."""
    folder = tmp_path_factory.mktemp("faults")
    for name, seed in (("a", None), ("b", 1)):
        saved(byte_llama(0) if seed is None else moved(byte_llama(0), seed), folder / name)
    recipe = text_recipe(folder / "a", folder / "b", text_data(folder), Path("out"), max_shard_size=SHARD)
    written(recipe, folder, "run")
    written({key: value for key, value in recipe.items() if key != "diagnose"}, folder, "merge")
    return folder


@pytest.fixture(scope="session")
def commands(bench) -> dict[str, Callable[..., int]]:
    """Name → what runs the command, with more options, into `out` of the working directory."""

    def run(*words: object) -> int:
        logging.getLogger().handlers.clear()  # those of pytest belong to the process that forked
        return main([str(word) for word in words])

    def align(*more: object) -> int:
        from hf_llfc.cli import align
        from hf_llfc.recipe import Recipe

        align.Recipe = partial(Recipe, max_shard_size=20_000)  # in the fork alone
        return run("align", bench / "b", "--to", bench / "a", "--out", "out", *more)

    def diagnose(*more: object) -> int:
        data = ["--task", "text-generation", "--dataset", bench / "text.txt", "--tokenizer", "bytes", "--alphas", "3"]
        return run("diagnose", bench / "a", bench / "b", *data, "--max-length", "32", "--out", "out", *more)

    def merge_by_copies(*more: object) -> int:
        import torch

        from hf_llfc.merging import streaming

        streaming.FORKED = 0  # in the fork alone
        torch.set_num_threads(2)
        return run("run", bench / "merge.yaml", *more)

    return {
        "copies": merge_by_copies,
        "merge": lambda *more: run("run", bench / "merge.yaml", *more),
        "align": align,
        "run": lambda *more: run("run", bench / "run.yaml", *more),
        "diagnose": diagnose,
    }


@pytest.fixture(scope="session")
def undisturbed(bench, commands) -> Callable[[str], tuple[Path, int]]:
    """Name of a command → what it writes when nothing happens, and its number of points."""
    made: dict[str, tuple[Path, int]] = {}

    def make(name: str) -> tuple[Path, int]:
        if name not in made:
            with working_in(bench / f"undisturbed-{name}"):
                code, points = counted(commands[name], bench / f"{name}.log")
            assert code == 0, (bench / f"{name}.log").read_text()
            made[name] = bench / f"undisturbed-{name}" / "out", points
        return made[name]

    return make
