"""Reports of real runs: the file fits its schema, every part becomes a data frame, tables and pictures."""

import json
from pathlib import Path

import jsonschema
import pytest

from hf_llfc import ConnectivityReport
from hf_llfc.cli import main
from hf_llfc.diagnostics.report import PARTS, report_schema
from hf_llfc.foundation.choices import MEASURES
from tests.evaluation.tiny_data import pixel_rows
from tests.runs import byte_llama, saved, text_data
from tests.tiny_models import tiny_model

BYTES = ["--task", "text-generation", "--tokenizer", "bytes", "--samples", "4", "--batch-size", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three related models, and text."""
    folder = tmp_path_factory.mktemp("models")
    for seed in range(3):
        saved(byte_llama(seed), folder / str(seed))
    text_data(folder)
    return folder


def diagnosed(folder: Path, models: list[str], *words: str) -> tuple[ConnectivityReport, Path]:
    out = folder / f"report-{'-'.join(models)}"
    paths = [str(folder / model) for model in models]
    command = ["diagnose", *paths, *BYTES, "--dataset", str(folder / "text.txt"), "--out", str(out), *words, "--quiet"]
    assert main(command) == 0
    jsonschema.validate(json.loads((out / "llfc" / "llfc_report.json").read_text()), report_schema())
    return ConnectivityReport.load(out / "llfc" / "llfc_report.json"), out / "llfc"


def test_a_pair_with_every_measure(folder, capsys):
    report, files = diagnosed(
        folder, ["0", "1"], "--measures", *(name for name in MEASURES if name != "classes"), "--alphas", "5"
    )
    printed = capsys.readouterr().out
    titles = [
        "path:",
        "layers at",
        "weak additivity",
        "commutativity",
        "stitching",
        "weights",
        "features",
        "where it breaks",
        "ways over the merge",
        "whose weights matter",
        "settling",
        "barrier",
    ]
    assert [title for title in titles if title in printed] == titles
    assert {path.stem for path in files.glob("*.png")} == {
        "path", "layers", "heatmap", "additivity", "commutativity", "stitching", "weight_geometry", "feature_geometry",
        "blocks", "fold", "importance", "units", "settling",
    }  # fmt: skip
    frames = {
        part: report.to_pandas(part) for part in PARTS if part not in ("samples", "classes")
    }  # no barrier, no classes
    assert all(len(frame) for frame in frames.values())
    # Two blocks and the logits, five points; a gate in each block; seven maps a block and the head.
    assert {part: len(frame) for part, frame in frames.items()} == {
        "path": 5, "layers": 15, "additivity": 6, "commutativity": 15, "stitching": 2, "geometry": 32, "blocks": 4,
        "fold": 3, "importance": 21, "units": 2,
        "decomposition": 3, "settling": 6,
    }  # fmt: skip
    assert {"llfc", "llfc_std", "llfc_q05", "llfc_q95", "llfc_low", "llfc_high"} <= set(frames["layers"].columns)
    assert frames["layers"].query("alpha == 0.5").llfc.tolist() == [row.llfc.mean for row in report.at(0.5)]
    assert list(frames["commutativity"].columns) == ["layer", "com", "weights", "features"]
    assert set(frames["geometry"].of) == {"weights", "weights, inputs", "features"}
    assert frames["additivity"].gated.all()


def test_three_models(folder, capsys):
    report, files = diagnosed(folder, ["0", "1", "2"])
    assert "layers at the point centre" in capsys.readouterr().out
    assert report.to_pandas().point.unique().tolist()[-1] == "centre"
    assert {path.stem for path in files.glob("*.png")} == {"path", "layers", "heatmap"}


def test_classes_of_a_merge_of_three(tmp_path, capsys):
    models = [str(saved(tiny_model("vit", "image-classification", seed), tmp_path / str(seed))) for seed in range(3)]
    pixel_rows(40).to_parquet(tmp_path / "data.parquet")
    data = ["--task", "image-classification", "--dataset", str(tmp_path / "data.parquet")]
    command = ["diagnose", *models, *data, "--out", str(tmp_path / "out"), "--measures", "classes", "--quiet"]
    assert main(command) == 0
    report = ConnectivityReport.load(tmp_path / "out" / "llfc" / "llfc_report.json")
    assert list(dict.fromkeys(row.of for row in report.classes)) == ["model 1", "model 2", "model 3", "blend", "merge"]
    assert {len(row.directions) for row in report.classes} == {3}
    assert "classes: " in capsys.readouterr().out
    assert (tmp_path / "out" / "llfc" / "classes.png").is_file()


def test_classes_need_labels_of_classes(folder, capsys):
    models = [str(folder / seed) for seed in "01"]
    assert main(["diagnose", *models, *BYTES, "--dataset", str(folder / "text.txt"), "--measures", "classes"]) == 2
    assert "classes compares samples of different classes, and these have no class labels" in capsys.readouterr().err


def test_measures_of_more_than_two_models_are_refused(folder, capsys):
    models = [str(folder / seed) for seed in "012"]
    data = [*BYTES, "--dataset", str(folder / "text.txt")]
    assert main(["diagnose", *models, *data, "--measures", "stitching"]) == 2
    assert "stitching: for two models only, and these are 3" in capsys.readouterr().err
