"""Tables of a report say what the report says, and fit a terminal of 100 columns."""

import re
from pathlib import Path

import pytest

from hf_llfc.cli.console import print_table
from hf_llfc.publishing.plots import PLOT_FILES
from hf_llfc.publishing.tables import report_tables
from hf_llfc.publishing.words import decomposition_summary
from tests.publishing.samples import as_report, decomposition, make_measured_report, make_report, make_simplex_report


def tables_of(report):
    return {table.title: table.records for table in report_tables(as_report(report))}


@pytest.mark.parametrize("report", [make_report(), make_measured_report(), make_simplex_report(8)])
def test_every_table_fits_a_hundred_columns(report, capsys):
    for table in report_tables(as_report(report)):
        print_table(table.title, table.records, numbers=table.numbers)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert not any("…" in line for line in lines)


def test_a_pair_without_measures_has_path_layers_and_barrier():
    tables = tables_of(make_report())
    assert list(tables) == [
        "path: alpha of bert-tweets, 1 - alpha of bert-films",
        "layers at alpha = 0.5, mean over samples",
        "barrier",
    ]
    path, layers, barrier = tables.values()
    assert path[5] == {"alpha": "0.5", "loss": "0.5000", "blend": "0.3750", "accuracy": "75.00 %"}
    assert layers[2] == {
        "layer": "bert.encoder.layer.1",
        "LLFC": "0.00780",
        "± std": "0.00390",
        "baseline": "0.180",
        "ratio": "0.0433",
        "coef": "0.980",
        "±": "0.010",
    }
    assert layers[0]["LLFC"] == "0" and layers[0]["ratio"] == "–"
    assert barrier == [{"of": "loss", "height": "0.125 nats"}, {"of": "error", "height": "6.25 points"}]


def test_measures_get_a_table_each():
    tables = tables_of(make_measured_report(2))
    titles = [title.split(",")[0].split(" (")[0] for title in tables]
    assert titles[2:-1] == [
        "weak additivity at alpha = 0.5", "commutativity of linear maps", "stitching", "weights",
        "rank-one share of weights", "features", "where it breaks", "ways over the merge", "whose weights matter where",
        "units that are always or never active", "classes", "settling",
    ]  # fmt: skip
    by_start = {title.split(" ")[0].strip(","): rows for title, rows in tables.items()}
    assert by_start["commutativity"][1] == {
        "map": "0.attention.self.key", "Dist_com": "2.0e-05", "Dist_W": "0.00400", "Dist_H": "0.00200"
    }  # fmt: skip
    assert by_start["stitching"][-1] == {"last layer of A": "B alone", "loss": "0.5000", "accuracy": "75.00 %"}
    assert by_start["weights"][1]["written"] == "0.25 / 0.5 / 0.75"
    assert by_start["weights"][1]["read"] == "0.5 / 1 / 1.5"
    assert by_start["layers"][0]["95 % interval"] == "9.4e-07 to 1.1e-06"


def test_short_names_stand_in_full_in_the_title():
    title = next(title for title in tables_of(make_measured_report(2)) if title.startswith("commutativity"))
    assert title == "commutativity of linear maps (short names: bert.encoder.layer.*)"


def test_points_of_a_simplex_have_names_and_models_a_table():
    tables = tables_of(make_simplex_report(3))
    assert tables["models"][1] == {"name": "model 2", "model": "ada/bert-2", "weight": "–"}
    points = tables["loss and metrics of merged models"]
    assert [row["point"] for row in points][-2:] == ["models 2 and 3", "centre"]
    assert "layers at the point centre, mean over samples" in tables


def test_without_labels_there_is_no_table_of_losses():
    path = [{"alpha": alpha, "loss": None, "metrics": {}} for alpha in (0, 0.5, 1)]
    tables = tables_of(make_report(path=path, barrier={"loss": None, "error": None}))
    assert list(tables) == ["layers at alpha = 0.5, mean over samples"]


def test_every_column_and_picture_is_explained():
    page = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    first_cells = " ".join(re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE))
    suggestion = {"because": "better", "weights": [0.75, 0.25]}
    for report in (make_report(suggestion=suggestion), make_measured_report(2), make_simplex_report(3)):
        for table in report_tables(as_report(report)):
            for column in table.records[0]:
                assert column in first_cells or f"*{column}*" in page, column
    for file in PLOT_FILES.values():
        assert f"`{file}`" in page, file


def test_a_suggestion_is_a_table() -> None:
    same = {"because": "tweets weigh more", "weights": [0.7, 0.3]}
    assert tables_of(make_report(suggestion=same))["suggested weights"] == [
        {"tensors": "all tensors", "weights": "0.7 : 0.3"}
    ]
    by_layer = {"because": "better", "layer_weights": {"bert.encoder.layer.0": [1.0, 0.0], "": [0.5, 0.5]}}
    assert tables_of(make_report(suggestion=by_layer))["suggested weights"] == [
        {"tensors": "bert.encoder.layer.0", "weights": "1 : 0"},
        {"tensors": "all others", "weights": "0.5 : 0.5"},
    ]


@pytest.mark.parametrize("labelled", [True, False])
def test_the_barrier_is_taken_apart_at_every_point(labelled, capsys):
    report = make_report(decomposition=[decomposition(alpha, labelled=labelled) for alpha in (0.25, 0.5)])
    rows = tables_of(report)["the barrier taken apart, in nats"]
    assert [row["alpha"] for row in rows] == ["0.25", "0.5"]
    known = {"alpha": "0.5", "gain": "0.1250", "cost": "0.2500", "barrier": "0.1250 (0.063 to 0.188)"}
    estimate = {"estimate": "0.1875 (0.125 to 0.250)", "at most": "0.8750", "half in": "6.25 %"}
    if not labelled:
        known, estimate["half in"] = {"alpha": "0.5", "gain": "0.1250", "cost": "0.3125"}, "–"
    assert rows[1] == {**known, **estimate}
    print_table("", rows, numbers=True)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_the_barrier_of_several_models_is_taken_apart_by_name():
    report = make_simplex_report(3)
    point = report["path"][-1]
    parts = decomposition(point["alpha"], weights=point["weights"])
    assert tables_of({**report, "decomposition": [parts]})["the barrier taken apart, in nats"][0]["point"] == "centre"


def test_what_the_ensemble_gains_and_non_linearity_costs_is_said_in_words():
    def said(**changes):
        return decomposition_summary(as_report(make_report(**changes)))

    assert said() is None
    assert said(decomposition=[decomposition(0.25), decomposition(0.5)]) == (
        "At α = 0.5 the ensemble gains 0.125 nats over the blend of its members' losses, and non-linearity costs 0.250 "
        "nats: the merge lies 0.125 nats above that blend; 6.25 % of the samples carry half of what lies above it."
    )
    assert said(decomposition=[decomposition(0.5, labelled=False)]) == (
        "At α = 0.5 the ensemble gains 0.125 nats over the blend of its members' losses, and non-linearity costs 0.313 "
        "nats: the merge lies 0.188 nats above that blend if labels are distributed as the ensemble says, and at most "
        "0.875 nats above it whatever they are."
    )
    gain = {"mean": 0.5, "std": 1.0}
    below = decomposition(0.5, gain=gain, barrier={"mean": -0.25, "std": 1.0}, half_share=None)
    text = said(decomposition=[below])
    assert text.endswith("non-linearity costs 0.250 nats: the merge lies 0.250 nats below that blend.")
