"""A calibrated merge beside the merge that it was made from: measures, record and card."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_llfc
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.diagnostics.fold import SHARES, Fold, FoldedModel
from hf_llfc.evaluation.models import evaluate_model
from hf_llfc.parents.data import open_data
from hf_llfc.pipeline import calibrating, flow
from hf_llfc.publishing.hub.folder import check_sanity
from hf_llfc.publishing.record import RunRecord
from hf_llfc.recipe import load_recipe
from tests.runs import byte_llama, image_data, moved, saved, small_resnet, text_data, text_recipe, trained_llama

DATA = {"task": "text-generation", "tokenizer": "bytes", "max_length": 32, "batch_size": 4}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    saved(trained_llama(0), folder / "a")
    saved(moved(trained_llama(1), 2), folder / "b")
    text_data(folder)
    return folder


def calibrated_recipe(shelf, out, **changes):
    """Both models merged, calibrated and diagnosed on one text."""
    text = shelf / "text.txt"
    return text_recipe(shelf / "a", shelf / "b", text, out, calibrate={**DATA, "dataset": str(text), **changes})


@pytest.fixture(scope="module")
def run(shelf):
    """A calibrated run with its result."""
    recipe = calibrated_recipe(shelf, shelf / "out")
    return hf_llfc.run(recipe)


def test_the_merge_before_is_that_of_the_line(run):
    """Of a linear merge, where the line has a point of its own for it."""
    measured, report = run.calibration.measured, run.report
    (middle,) = [point for point in report.path if point.alpha == 0.5]
    assert measured.loss_before == pytest.approx(middle.loss, rel=1e-5)
    assert measured.metrics_before == pytest.approx(middle.metrics, rel=1e-5)
    for row, line in zip(measured.layers, report.at(0.5), strict=True):
        assert row.layer == line.layer and row.baseline == pytest.approx(line.baseline.mean)
        assert row.before == pytest.approx(line.llfc.mean, rel=1e-3)
        assert row.coefficient_before == pytest.approx(line.coefficient.mean, rel=1e-4)
        assert row.after < row.before and abs(row.coefficient_after - 1) < abs(row.coefficient_before - 1)


def test_the_table_has_the_merge_before_and_after(run):
    assert [row.get("is_before", False) for row in run.table] == [False, False, True, False]
    before, after = run.table[2:]
    assert before["loss"] == run.calibration.measured.loss_before > after["loss"]


def test_the_barrier_of_the_fold_is_that_of_its_points(shelf, run):
    """Each point made by hand from the written merge and the aligned parents."""
    alignment = hf_llfc.Alignment.load(
        shelf / "out" / "llfc" / "alignment.safetensors",
        hf_llfc.PermutationSpec.from_config(byte_llama(0).config),
    )
    merge, *parents = (AutoModelForCausalLM.from_pretrained(shelf / name).eval() for name in ("out", "a", "b"))
    parents[1].load_state_dict(alignment.apply(parents[1].state_dict()))
    recipe = load_recipe(shelf / "out" / "llfc" / "recipe.yaml")
    data = open_data(recipe.diagnose.data, open_checkpoint(shelf / "a"))
    own = [evaluate_model(parent, data).loss for parent in parents]
    heights, between = [0.0], byte_llama(0)
    for number, parent in enumerate(parents):
        for share in (*SHARES, 0.0):
            states = parent.state_dict(), merge.state_dict()
            between.load_state_dict(
                {name: share * states[0][name] + (1 - share) * states[1][name] for name in states[0]}
            )
            expected = share * own[number] + (1 - share) * sum(own) / 2
            heights.append(evaluate_model(between, data).loss - expected)
    assert run.calibration.measured.fold_loss == pytest.approx(max(heights), abs=1e-5)


def test_record_report_and_card_tell_what_was_done(shelf, run):
    record, folder = RunRecord.load(shelf / "out").calibration, shelf / "out"
    assert record.maps == run.calibration.maps and record.measured == run.calibration.measured
    assert (record.method, record.targets, record.ridge, record.samples) == ("calibrate", "blend", 0.01, 31)
    assert record.blend == (0.5, 0.5) and str(shelf) not in json.dumps(record.to_dict())
    changes = [(row.moved, row.rows, row.inputs) for row in record.maps]
    assert min(moved for moved, _, _ in changes) < record.moved < max(moved for moved, _, _ in changes)
    assert all(rows == 31 * 32 - 20 for _, rows, _ in changes)
    assert run.report.data["calibrated"] == "calibrate"
    card = (folder / "README.md").read_text()
    assert "then calibrated on 31 samples of text.txt, without labels" in card
    assert "With many samples this works even from random weights" in card
    assert "does not say that the weights of the parents can be averaged" in card
    assert "The merge itself does not lie on the measured path." in card
    assert "fitted to unlabelled samples of the data that it is measured on" in card
    assert "| the merge before calibration |" in card and "| **this merge** |" in card
    section = card.split("## Calibration")[1].split("## Layer by layer")[0]
    assert "moved most" in section and "barrier is" in section and "| logits |" in section


def test_what_is_pushed_is_judged_by_its_own_loss(shelf, run):
    """The verdict is about the line."""
    assert run.report.verdict.answer == "do not merge"
    check_sanity(shelf / "out")


def test_without_labels_features_are_measured_alone(shelf, tmp_path):
    recipe = calibrated_recipe(shelf, tmp_path / "out", method="repair")
    recipe["diagnose"] |= {"labels": False}
    result = hf_llfc.run(recipe)
    assert result.calibration.measured.loss_before is None and "loss" not in result.table[-1]
    assert all(row.after is not None for row in result.calibration.measured.layers)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Repair" in card and "mean and size of its channels were fitted to" in card


def test_a_run_that_measures_nothing_tells_of_its_maps(shelf, tmp_path, capsys):
    from hf_llfc.cli import main

    words = ["merge", str(shelf / "a"), str(shelf / "b"), "--out", str(tmp_path / "out"), "--quiet", "--calibrate"]
    for key, value in {**DATA, "dataset": shelf / "text.txt"}.items():
        words += [f"--calibrate-{key.replace('_', '-')}", str(value)]
    assert main(words) == 0
    assert "Calibration on 31 samples of text.txt moved 15 maps by " in capsys.readouterr().out
    record = RunRecord.load(tmp_path / "out").calibration
    assert record.measured is None and len(record.maps) == 15
    assert "## Calibration" in (tmp_path / "out" / "README.md").read_text()


def test_measures_are_taken_up_where_the_card_failed(shelf, tmp_path, monkeypatch):
    recipe = calibrated_recipe(shelf, tmp_path / "out")

    def stop(*_):
        raise KeyboardInterrupt

    for broken in ("write_evidence", "release"):
        with monkeypatch.context() as patch:
            patch.setattr(flow, broken, stop)
            with pytest.raises(KeyboardInterrupt):
                hf_llfc.run(recipe)
    result = hf_llfc.run(recipe)
    assert result.calibration.measured is not None and (tmp_path / "out" / "README.md").is_file()
    assert not list((tmp_path / "out" / "llfc").glob("[cm]*.safetensors"))


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_goes_on_after_its_very_end(shelf, run, tmp_path, monkeypatch, damaged):
    """What was measured is told, and weights that were damaged meanwhile are calibrated ones again."""
    recipe = calibrated_recipe(shelf, tmp_path / "out")

    def stop(run):
        calibrating.release(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(flow, "release", stop)
        with pytest.raises(KeyboardInterrupt):
            hf_llfc.run(recipe)
    if damaged:
        weights = tmp_path / ".out.partial" / "output" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    result = hf_llfc.run(recipe)
    assert result.calibration == run.calibration
    assert RunRecord.load(tmp_path / "out").calibration == RunRecord.load(shelf / "out").calibration
    expected, found = ((folder / "out" / "model.safetensors").read_bytes() for folder in (shelf, tmp_path))
    assert expected == found


def test_a_merge_with_batch_norm_keeps_its_own_statistics(tmp_path):
    for seed, name in enumerate("ab"):
        saved(small_resnet(seed), tmp_path / name)
    data = {"task": "image-classification", "dataset": str(image_data(tmp_path)), "batch_size": 8}
    models = [{"model": str(tmp_path / name)} for name in "ab"]
    result = hf_llfc.run(
        {"models": models, "calibrate": data, "diagnose": {**data, "alphas": 3}, "output_dir": str(tmp_path / "out")}
    )
    losses = {point.alpha: point.loss for point in result.report.path}
    assert result.calibration.measured.loss_before == pytest.approx(losses[0.5], rel=1e-5)
    assert result.table[-1]["loss"] != pytest.approx(losses[0.5], rel=1e-3)


def test_a_folded_model_returns_to_its_merge():
    merge, *parents = (small_resnet(seed) for seed in range(3))
    state = {name: value.clone() for name, value in merge.state_dict().items()}
    fold = Fold.of((0.25, 0.75))
    model = FoldedModel(merge, parents, fold.places)
    model.move_to(fold.region.points[1].weights, {"resnet.embedder.embedder.normalization.running_mean": torch.ones(8)})
    name = "classifier.1.weight"
    share = SHARES[0]
    torch.testing.assert_close(
        merge.state_dict()[name], share * parents[0].state_dict()[name] + (1 - share) * state[name]
    )
    assert bool((merge.state_dict()["resnet.embedder.embedder.normalization.running_mean"] == 1).all())
    model.move_to((0.25, 0.75), {"resnet.embedder.embedder.normalization.running_mean": torch.ones(8)})
    assert all(torch.equal(value, state[name]) for name, value in merge.state_dict().items())
