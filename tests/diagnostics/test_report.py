import dataclasses
import json

import pytest

from hf_llfc.diagnostics import (
    Barrier,
    CommutativityRow,
    ConnectivityReport,
    LayerRow,
    ModelReference,
    PathPoint,
    Statistic,
    Verdict,
)
from hf_llfc.errors import EvaluationError


def row(layer, alpha, llfc, baseline):
    return LayerRow(layer, alpha, Statistic(llfc, 0.01), Statistic(baseline, 0.02), Statistic(0.9, 0.03))


REPORT = ConnectivityReport(
    models=(ModelReference("one/model", "abc", 0.5), ModelReference("models/two")),
    path=(
        PathPoint(0.0, 0.5, {"accuracy": 0.8}),
        PathPoint(0.5, 0.6, {"accuracy": 0.75}),
        PathPoint(1.0, 0.4, {"accuracy": None}),
    ),
    barrier=Barrier(0.15, 0.05),
    layers=(
        row("encoder.layer.3", 0.25, 0.1, 0.4),
        row("encoder.layer.3", 0.5, 0.2, 0.4),
        row("logits", 0.25, 0.3, 0.0),
        row("logits", 0.5, 0.4, 0.8),
    ),
    verdict=Verdict("align", "the barrier is high"),
    data={"task": "text-classification", "samples": 3},
    alignment={"method": "none"},
    versions={"torch": "2"},
)

GOLDEN = {
    "schema": "hf_llfc.report/1",
    "models": [
        {"id": "one/model", "revision": "abc", "weight": 0.5},
        {"id": "models/two", "revision": None, "weight": None},
    ],
    "path": [
        {"alpha": 0.0, "loss": 0.5, "metrics": {"accuracy": 0.8}},
        {"alpha": 0.5, "loss": 0.6, "metrics": {"accuracy": 0.75}},
        {"alpha": 1.0, "loss": 0.4, "metrics": {"accuracy": None}},
    ],
    "barrier": {"loss": 0.15, "error": 0.05},
    "layers": [
        {
            "layer": layer,
            "alpha": alpha,
            "llfc": {"mean": llfc, "std": 0.01},
            "baseline": {"mean": baseline, "std": 0.02},
            "coefficient": {"mean": 0.9, "std": 0.03},
        }
        for layer, alpha, llfc, baseline in (
            ("encoder.layer.3", 0.25, 0.1, 0.4),
            ("encoder.layer.3", 0.5, 0.2, 0.4),
            ("logits", 0.25, 0.3, 0.0),
            ("logits", 0.5, 0.4, 0.8),
        )
    ],
    "verdict": {"answer": "align", "because": "the barrier is high"},
    "region": "line",
    "data": {"task": "text-classification", "samples": 3},
    "alignment": {"method": "none"},
    "versions": {"torch": "2"},
}


def test_the_json_is_the_contract():
    assert REPORT.to_dict() == GOLDEN
    assert list(REPORT.to_dict()) == list(GOLDEN)


def test_saving_and_loading_change_nothing(tmp_path):
    path = tmp_path / "llfc_report.json"
    REPORT.save(path)
    assert json.loads(path.read_text()) == GOLDEN
    assert ConnectivityReport.load(path) == REPORT


def test_a_report_of_a_later_version_with_more_keys_is_read():
    more = {**GOLDEN, "stitching": [], "layers": [{**GOLDEN["layers"][0], "quantiles": [1]}]}
    less = {key: value for key, value in more.items() if key not in ("data", "alignment", "versions")}
    found = ConnectivityReport.from_dict(less)
    assert found.layers == REPORT.layers[:1]
    assert found.data == {}


def test_what_is_no_report_is_refused(tmp_path):
    (tmp_path / "text.json").write_text("no json")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other.json").write_text('{"schema": "other/2"}')
    (tmp_path / "part.json").write_text(json.dumps({**GOLDEN, "path": [{"alpha": 0}]}))
    (tmp_path / "half.json").write_text(json.dumps({**GOLDEN, "data": {"dataset": "\ud800"}}))
    (tmp_path / "infinite.json").write_text(json.dumps({**GOLDEN, "data": {"samples": float("inf")}}))
    for name, message in (
        ("missing", "cannot be read"),
        ("infinite", "is not JSON: .*not JSON compliant"),
        ("half", "is not JSON: .*surrogates not allowed"),
        ("text", "is not JSON"),
        ("list", "holds no report"),
        ("other", "schema is 'other/2', expected 'hf_llfc.report/1'"),
        ("part", r"path\[0\]: loss, metrics missing"),
    ):
        with pytest.raises(EvaluationError, match=message):
            ConnectivityReport.load(tmp_path / f"{name}.json")


def test_numbers_that_json_has_not_are_never_written(tmp_path):
    broken = dataclasses.replace(REPORT, barrier=Barrier(float("nan"), 0.0))
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.save(tmp_path / "report.json")
    assert not (tmp_path / "report.json").exists()


def test_tables():
    assert REPORT.alphas == (0.25, 0.5)
    assert REPORT.layer_names == ("encoder.layer.3", "logits")
    first, last = REPORT.rows()
    assert first == {
        "layer": "encoder.layer.3",
        "alpha": 0.5,
        "llfc": 0.2,
        "llfc_std": 0.01,
        "baseline": 0.4,
        "baseline_std": 0.02,
        "ratio": 0.5,
        "coefficient": 0.9,
        "coefficient_std": 0.03,
    }
    assert last["ratio"] == 0.5
    assert [found["ratio"] for found in REPORT.rows(0.1)] == [0.25, None]
    assert REPORT.path_rows()[1] == {"alpha": 0.5, "loss": 0.6, "accuracy": 0.75}
    assert dataclasses.replace(REPORT, layers=()).rows() == []


def test_pandas():
    layers = REPORT.to_pandas()
    assert layers.shape == (4, 9)
    assert layers.loc[layers.layer == "logits", "llfc"].tolist() == [0.3, 0.4]
    assert REPORT.to_pandas("path")["loss"].tolist() == [0.5, 0.6, 0.4]
    with pytest.raises(EvaluationError, match="has no 'barrier'; it has path, layers"):
        REPORT.to_pandas("barrier")


def test_a_distance_of_zero_is_no_empty_field():
    rows = (CommutativityRow("head", 0.0, 0.0, 0.25), CommutativityRow("last", None, None, 0.5))
    report = dataclasses.replace(REPORT, commutativity=rows)
    assert report.to_dict()["commutativity"][0] == {"layer": "head", "com": 0.0, "weights": 0.0, "features": 0.25}
    assert ConnectivityReport.from_dict(report.to_dict()) == report


def test_spread_becomes_columns():
    llfc = Statistic(0.25, 0.125, {"0.05": 0.0625, "0.5": 0.25}, (0.125, 0.5))
    report = dataclasses.replace(REPORT, layers=(dataclasses.replace(REPORT.layers[0], llfc=llfc),))
    (found,) = report.to_pandas().to_dict("records")
    assert {name: found[name] for name in found if name.startswith("llfc")} == {
        "llfc": 0.25, "llfc_std": 0.125, "llfc_q05": 0.0625, "llfc_q50": 0.25, "llfc_low": 0.125, "llfc_high": 0.5
    }  # fmt: skip
    assert "baseline_low" not in found


def test_points_that_lie_on_no_line_are_named():
    path = tuple(PathPoint(w[0], 0.5, {}, w, name) for w, name in (((1.0, 0.0), "model 1"), ((0.5, 0.5), "centre")))
    layers = (dataclasses.replace(REPORT.layers[0], weights=(0.5, 0.5)),)
    report = dataclasses.replace(REPORT, region="simplex", path=path, layers=layers)
    assert report.to_pandas("path")["point"].tolist() == ["model 1", "centre"]
    assert report.to_pandas()["point"].tolist() == ["centre"]
    assert "alpha" not in report.rows()[0]
