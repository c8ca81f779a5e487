"""A dry run says what the models of its recipe changed of their base, where that costs no download."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hf_llfc.checkpoints import Checkpoint
from hf_llfc.cli import main
from hf_llfc.pipeline.planning import plan
from hf_llfc.recipe import load_recipe
from tests.runs import byte_llama, saved


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A base, and two models that changed it."""
    folder = tmp_path_factory.mktemp("shelf")
    base = byte_llama(0)
    saved(base, folder / "base")
    for seed, name in enumerate("ab", start=1):
        model = byte_llama(0)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01 * seed)
        saved(model, folder / name)
    return folder


def words(shelf, *more):
    models = [str(shelf / name) for name in "ab"]
    return ["merge", *models, "--base-model", str(shelf / "base"), "--out", str(shelf / "out"), "--dry-run", *more]


def test_numbers_of_a_dry_run_are_those_of_the_weights(shelf, capsys):
    assert main(words(shelf, "--merge-method", "tsv_m", "--format", "json")) == 0
    found = json.loads(capsys.readouterr().out)["task_vectors"]
    base, *models = (load_file(shelf / name / "model.safetensors") for name in ("base", "a", "b"))
    names = sorted(base)
    flat = [torch.cat([tensors[name].double().flatten() for name in names]) for tensors in (base, *models)]
    tasks = [each - flat[0] for each in flat[1:]]
    changes = [float(task.norm() / flat[0].norm()) for task in tasks]
    assert [row["change"] for row in found["models"]] == pytest.approx(changes)
    assert [row["model"] for row in found["models"]] == [str(shelf / name) for name in "ab"]
    [pair] = found["pairs"]
    assert pair["places"] == [0, 1]
    assert pair["cosine"] == pytest.approx(float(torch.cosine_similarity(*tasks, dim=0)), abs=1e-9)
    assert pair["same_sign"] == pytest.approx(float((tasks[0].sign() == tasks[1].sign()).double().mean()), abs=1e-3)
    assert found["tensors_read"] == found["tensors"] == len(names)
    assert found["bytes_read"] == 3 * sum(tensor.nbytes for tensor in base.values())
    assert not (shelf / "out").exists()


def test_the_table_has_a_row_a_model_and_one_sentence(shelf, capsys):
    assert main(words(shelf, "--merge-method", "iso_c")) == 0
    shown = capsys.readouterr().out
    title = next(line for line in shown.splitlines() if line.startswith("changes of the base"))
    assert f"{len(load_file(shelf / 'a' / 'model.safetensors'))} of" in title
    table = shown[shown.index(title) :]
    for column in ("change", "stable rank", "cosine with others", "same sign", "overlap"):
        assert column in table
    assert all(str(shelf / name) in table for name in "ab")
    found = plan(load_recipe(recipe_of(shelf, "iso_c")))["task_vectors"]
    assert found["sentence"] and shown.rstrip().endswith(found["sentence"])


def recipe_of(shelf, method, **changes):
    weight = {} if method == "iso_c" else {"parameters": {"weight": 0.5}}
    models = [{"model": str(shelf / name), **weight} for name in "ab"]
    base = {} if method == "linear" else {"base_model": str(shelf / "base")}
    return {"models": models, "merge_method": method, **base, "output_dir": str(shelf / "out"), **changes}


@pytest.mark.parametrize(
    ("method", "changes", "how", "reason"),
    [
        ("task_arithmetic", {}, "none", "--compare none"),
        ("linear", {}, "sample", "linear has no base_model"),
        ("task_arithmetic", {"align": {"method": "weight_matching"}}, "all", "the models are aligned first"),
    ],
)
def test_no_weights_are_read_where_they_tell_nothing(shelf, monkeypatch, method, changes, how, reason):
    monkeypatch.setattr(Checkpoint, "read", lambda checkpoint, name: pytest.fail(f"{name} was read"))
    monkeypatch.setattr(Checkpoint, "read_unrounded", lambda checkpoint, name: pytest.fail(f"{name} was read"))
    found = plan(load_recipe(recipe_of(shelf, method, **changes)), compare=how)["task_vectors"]
    assert list(found) == ["sentence"] and found["sentence"].startswith("task vectors are not compared: ")
    assert reason in found["sentence"]


def test_weights_that_are_elsewhere_are_not_downloaded(shelf, monkeypatch):
    monkeypatch.setattr(Checkpoint, "is_here", property(lambda checkpoint: checkpoint.label.endswith("a")))
    said = plan(load_recipe(recipe_of(shelf, "iso_c")))["task_vectors"]["sentence"]
    assert said.startswith(f"task vectors are not compared: the weights of {shelf / 'b'}, {shelf / 'base'}")


def test_compare_belongs_to_a_dry_run(shelf, capsys):
    given = [word for word in words(shelf, "--merge-method", "iso_c", "--compare", "all") if word != "--dry-run"]
    assert main(given) == 2
    assert "--compare belongs to --dry-run" in capsys.readouterr().err
    assert not (shelf / "out").exists()
