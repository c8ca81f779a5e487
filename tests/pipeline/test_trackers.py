"""Runs log to the real trackers: what they hold afterwards is what the report says."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import hf_llfc
from hf_llfc.errors import LLFCError, RecipeError
from hf_llfc.pipeline import trackers
from tests.runs import byte_llama, moved, saved, text_data, text_recipe


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return saved(byte_llama(0), tmp_path / "a"), saved(moved(byte_llama(0), 1), tmp_path / "b")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Of all event files below a folder, by tag: (step, value)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.rglob("*tfevents*")):
        events = EventAccumulator(str(path))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


def test_tensorboard_holds_what_the_report_says(pair, tmp_path):
    recipe = text_recipe(*pair, text_data(tmp_path), tmp_path / "out")
    logging = {"log_with": "tensorboard", "logging_dir": str(tmp_path / "logs")}
    result = hf_llfc.run({**recipe, **logging})
    found = scalars(tmp_path / "logs" / "out")
    expected = [(round(1000 * point.alpha), point.loss) for point in result.report.path]
    assert [step for step, _ in found["path/loss"]] == [step for step, _ in expected]
    assert [value for _, value in found["path/loss"]] == pytest.approx([value for _, value in expected])
    layer = result.report.layer_names[0]
    rows = [row for row in result.report.layers if row.layer == layer]
    assert [value for _, value in found[f"layers/{layer}/llfc"]] == pytest.approx([row.llfc.mean for row in rows])
    assert found["barrier/loss"][0][1] == pytest.approx(result.report.barrier.loss)
    assert [value for _, value in found["models/loss"]] == pytest.approx([row["loss"] for row in result.table])
    objectives = [value for _, value in found["align/1/identity/objective"]]
    assert objectives == sorted(objectives) and len(objectives) >= 1
    # The logs are no part of the result, and the result is the same without them.
    assert not list((tmp_path / "out").rglob("*tfevents*"))
    plain = hf_llfc.run({**recipe, "output_dir": str(tmp_path / "plain")})
    names = ["model.safetensors", "llfc/alignment.safetensors"]
    assert all((tmp_path / "out" / name).read_bytes() == (plain.folder / name).read_bytes() for name in names)


def test_a_diagnosis_logs_to_trackio_and_stdout_stays_json(pair, tmp_path):
    words = ["diagnose", *map(str, pair), "--task", "text-generation", "--dataset", str(text_data(tmp_path))]
    words += ["--tokenizer", "bytes", "--max-length", "32", "--alphas", "3", "--format", "json", "--quiet"]
    words += ["--log-with", "trackio", "--logging-dir", str(tmp_path / "logs")]
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hf_llfc", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    with sqlite3.connect(tmp_path / "trackio" / "hf-llfc.db") as database:
        rows = [json.loads(row) for (row,) in database.execute("SELECT metrics FROM metrics ORDER BY id")]
        assert {name for (name,) in database.execute("SELECT DISTINCT run_name FROM metrics")} == {"diagnosis"}
    losses = [row["path/loss"] for row in rows if "path/loss" in row]
    assert losses == pytest.approx([point["loss"] for point in report["path"]])
    assert [row["verdict"] for row in rows if "verdict" in row] == [report["verdict"]["answer"]]


def test_unknown_and_missing_trackers_are_refused_before_any_work(pair, tmp_path, monkeypatch):
    recipe = text_recipe(*pair, text_data(tmp_path), tmp_path / "out")
    with pytest.raises(RecipeError, match=r"tensorbord.*tensorboard"):
        hf_llfc.run({**recipe, "log_with": ["tensorbord"]})
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(LLFCError, match="pip install wandb"):
        hf_llfc.run({**recipe, "log_with": ["wandb"]})
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_fails_ends_no_run(pair, tmp_path, caplog):
    (tmp_path / "logs").write_text("no folder")
    recipe = text_recipe(*pair, text_data(tmp_path), tmp_path / "out")
    result = hf_llfc.run({**recipe, "log_with": ["tensorboard"], "logging_dir": str(tmp_path / "logs")})
    assert (result.folder / "model.safetensors").is_file()
    assert "logging to the trackers ends here" in caplog.text


def test_configs_are_flat():
    flat = dict(trackers._flat({"a": [{"b": 1.5}, None], "c": {"d": True}}))
    assert flat == {"a.0.b": 1.5, "c.d": True}
