"""The measures of a merge are those of the checkpoint that a run wrote, by whatever method."""

import pytest
import torch

import hf_llfc
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.diagnostics.checkpoints import Made, measure_made
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation import EvaluationConfig
from hf_llfc.evaluation.models import evaluate_model
from hf_llfc.parents.data import open_data
from hf_llfc.parents.parent import Parent
from hf_llfc.recipe import DiagnoseSection, load_recipe
from tests.runs import byte_llama, saved, text_data, trained_llama

DATA = {"task": "text-generation", "tokenizer": "bytes", "max_length": 32, "batch_size": 4}
MEASURES = ["blocks", "fold", "importance"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    saved(trained_llama(0), folder / "a")
    saved(trained_llama(1), folder / "b")
    saved(byte_llama(2), folder / "base")
    text_data(folder)
    return folder


def run(shelf, out, **changes):
    """A recipe of both models with all measures of merges, run; and the losses of the models and of the result."""
    recipe = {
        "models": [{"model": str(shelf / name), "parameters": {"weight": 0.5}} for name in "ab"],
        "output_dir": str(shelf / out),
        "diagnose": {**DATA, "dataset": str(shelf / "text.txt"), "alphas": 3, "measures": MEASURES},
        **changes,
    }
    report = hf_llfc.run(recipe).report
    data = open_data(load_recipe(recipe).diagnose.data, open_checkpoint(shelf / "a"))
    return report, {
        name: evaluate_model(Parent(open_checkpoint(shelf / name)).load(), data).loss for name in ("a", "b", out)
    }


@pytest.mark.parametrize(
    ("out", "changes"),
    [
        ("ties", {"merge_method": "ties", "parameters": {"density": 0.5}}),
        ("sum", {"merge_method": "task_arithmetic"}),
        ("calibrated", {"calibrate": True}),
    ],
)
def test_blocks_sum_to_the_height_of_what_was_written(shelf, out, changes):
    if "merge_method" in changes:
        changes["base_model"] = str(shelf / "base")
    if "calibrate" in changes:
        changes = {"calibrate": {**DATA, "dataset": str(shelf / "text.txt")}}
    report, losses = run(shelf, out, **changes)
    height = losses[out] - (losses["a"] + losses["b"]) / 2
    assert sum(row.step for row in report.blocks) == pytest.approx(height, abs=1e-5)
    assert all((row.angle is not None) == ("merge_method" in changes) for row in report.blocks)
    assert [row.models for row in report.fold] == [(0,), (1,), (0, 1)]
    assert report.fold[-1].loss >= max(height, 0) - 1e-5 and report.fold[-1].length > 1
    assert len({len(row.fisher) for row in report.importance}) == 1 and len(report.importance[0].fisher) == 2


def test_shares_are_those_of_the_recipe(shelf):
    models = [
        {"model": str(shelf / name), "parameters": {"weight": weight}} for name, weight in (("a", 0.3), ("b", 0.7))
    ]
    report, losses = run(shelf, "linear", models=models)
    height = losses["linear"] - 0.3 * losses["a"] - 0.7 * losses["b"]
    assert sum(row.step for row in report.blocks) == pytest.approx(height, abs=1e-5)
    assert report.fold[-1].length == pytest.approx(1, abs=1e-6)


def test_models_larger_than_memory_are_refused(shelf):
    parents = [Parent(open_checkpoint(shelf / name)) for name in "ab"]
    section = DiagnoseSection(
        EvaluationConfig(**DATA, dataset=str(shelf / "text.txt")), 3, (), "sample", ("blocks",), None, True
    )
    data = open_data(section.data, parents[0].checkpoint)
    with pytest.raises(EvaluationError, match="with offload only loss, metric and LLFC"):
        measure_made(Made(parents[0], parents), data, section)


def test_a_single_model_and_its_base(shelf):
    models = [{"model": str(shelf / "a"), "parameters": {"weight": 1.0}}]
    report, _ = run(shelf, "alone", models=models, base_model=str(shelf / "base"), merge_method="ties")
    assert [row.models for row in report.fold] == [(0,), (1,), (0, 1)]
    assert torch.isfinite(torch.tensor([row.loss for row in report.fold])).all()
