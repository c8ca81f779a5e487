"""Whatever has become of the files of models, all ways to open a pair of them give one answer, or an error of ours."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file

from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.errors import LLFCError
from hf_llfc.parents.fitting import sharing
from hf_llfc.parents.opening import open_models, open_recipe
from hf_llfc.pipeline.mergeability import check_checkpoints
from hf_llfc.recipe import load_recipe
from tests.fuzz.strategies import steps_to_files
from tests.runs import byte_llama


@cache
def saved_llama() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors of a tiny Llama."""
    with tempfile.TemporaryDirectory() as folder:
        byte_llama(0, num_hidden_layers=1).save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
        return json.loads((Path(folder) / "config.json").read_text()), tensors


def write(folder: Path, steps: list[tuple[str, Any]]) -> None:
    """A tiny Llama whose files have gone through steps."""
    config, tensors = saved_llama()
    config, tensors, files = dict(config), dict(tensors), 1
    for step, value in steps:
        if step == "drop":
            tensors = {name: each for name, each in tensors.items() if value not in name}
        elif step == "add":
            tensors[value] = torch.ones(4)
        elif step == "double" and value in tensors:
            tensors[f"{value}_copy"] = tensors[value].clone()
        elif step == "wrap":
            tensors = {value + name: each for name, each in tensors.items()}
        elif step == "rename":
            tensors = {name.replace(*value): each for name, each in tensors.items()}
        elif step == "integers" and value in tensors:
            tensors[value] = tensors[value].to(torch.int8)
        elif step == "config":
            config[value[0]] = value[1]
        elif step == "shards":
            files = 2
    folder.mkdir()
    (folder / "config.json").write_bytes(json.dumps(config).encode("utf-8", "surrogatepass"))
    names = [f"model-0000{place + 1}-of-00002.safetensors" for place in range(files)]
    file_of = {name: names[place % files] for place, name in enumerate(sorted(tensors))}
    for file in names:
        part = {name: tensors[name].clone() for name in tensors if file_of[name] == file}
        save_file(part, folder / (file if files > 1 else "model.safetensors"), metadata={"format": "pt"})
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))


def answers(a: Path, b: Path) -> list[Any]:
    """What each way to open a pair says: the shapes of the result, or that the two do not fit."""
    settings = {"models": [{"model": str(a)}, {"model": str(b)}], "output_dir": str(a.parent / "out")}
    measured = {**settings, "diagnose": {"task": "text-generation", "dataset": "none.txt"}}

    def by_check() -> Any:
        pair = open_checkpoint(a), open_checkpoint(b)
        return sharing(pair) if not check_checkpoints(pair, level=0).problems else None

    ways = (
        lambda: open_models([a, b]).parents,
        lambda: open_recipe(load_recipe(settings)).parents,
        lambda: open_recipe(load_recipe(measured)).parents,
        by_check,
    )
    found = []
    for way in ways:
        try:
            opened = way()
        except LLFCError as error:
            assert str(error)
            opened = None
        found.append(None if opened is None else {name: info.shape for name, info in opened[0].tensors.items()})
    return found


def check(examples: int) -> None:
    names = sorted(saved_llama()[1])

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(steps_to_files(names), steps_to_files(names))
    def same_answer(first: list[tuple[str, Any]], second: list[tuple[str, Any]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "a", first)
            write(Path(folder) / "b", second)
            found = answers(Path(folder) / "a", Path(folder) / "b")
            assert all(each == found[0] for each in found), (first, second)

    same_answer()


def test_every_way_to_open_a_pair_gives_the_same_answer():
    check(12)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
def test_every_way_to_open_many_pairs_gives_the_same_answer():
    check(2000)
