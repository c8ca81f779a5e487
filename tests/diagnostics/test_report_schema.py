"""The JSON schema of a report fits what is written, refuses what is no report, and describes every field."""

import dataclasses
import typing
from typing import Any

import jsonschema
import pytest

from hf_llfc.diagnostics import ConnectivityReport, rows
from hf_llfc.diagnostics.report import SCHEMA, report_schema
from hf_llfc.diagnostics.rows import ANSWERS, Suggestion
from tests.publishing.samples import decomposition, make_measured_report, make_report, make_simplex_report

VALIDATOR = jsonschema.Draft202012Validator(report_schema())
ROWS = {
    "statistic": rows.Statistic,
    "model": rows.ModelReference,
    "point": rows.PathPoint,
    "barrier": rows.Barrier,
    "layer": rows.LayerRow,
    "decomposition": rows.DecompositionRow,
    "outputs": rows.OutputAgreement,
    "contradiction": rows.Contradiction,
    "additivity": rows.AdditivityRow,
    "commutativity": rows.CommutativityRow,
    "stitching": rows.StitchingPoint,
    "geometry": rows.GeometryRow,
    "block": rows.BlockRow,
    "fold": rows.FoldRow,
    "importance": rows.ImportanceRow,
    "units": rows.UnitsRow,
    "classes": rows.ClassesRow,
    "settling": rows.SettlingRow,
    "sample": rows.SampleRow,
    "suggestion": rows.Suggestion,
    "verdict": rows.Verdict,
}


def test_the_schema_is_one_and_names_its_version():
    jsonschema.Draft202012Validator.check_schema(report_schema())
    assert report_schema()["$id"] == SCHEMA == "hf_llfc.report/1"
    assert report_schema()["$defs"]["verdict"]["properties"]["answer"]["enum"] == list(ANSWERS)


@pytest.mark.parametrize(
    "report",
    [
        make_report(decomposition=[decomposition(0.25), decomposition(0.5, labelled=False)]),
        make_report(contradiction={"model": 1, "agreement": 0.1, "chance": 0.5, "matched": 0.9, "order": [1, 0]}),
        make_report(),
        make_measured_report(2),
        make_simplex_report(3),
        make_simplex_report(3, "arithmetic"),
    ],
)
def test_what_is_written_fits(report):
    VALIDATOR.validate(report)
    VALIDATOR.validate(ConnectivityReport.from_dict(report).to_dict())


def test_a_suggestion_fits():
    suggestion = Suggestion("better", 0.5, 0.6, (0.05, 0.15), None, {"*.3.*": (1.0, 0.0)})
    VALIDATOR.validate(
        dataclasses.replace(ConnectivityReport.from_dict(make_report()), suggestion=suggestion).to_dict()
    )


@pytest.mark.parametrize("name", ROWS)
def test_every_field_is_described_and_required_where_it_has_no_default(name):
    schema = report_schema()["$defs"][name]
    fields = dataclasses.fields(ROWS[name])
    assert list(schema["properties"]) == [field.name for field in fields]
    always = {field.name for field in fields if field.default is dataclasses.MISSING
              and field.default_factory is dataclasses.MISSING}  # fmt: skip
    assert always <= set(schema["required"])
    assert schema["description"] and all("description" in entry for entry in schema["properties"].values())


@pytest.mark.parametrize("name", ROWS)
def test_numbers_may_be_missing_where_the_class_says_so(name):
    properties = report_schema()["$defs"][name]["properties"]
    for field, hint in typing.get_type_hints(ROWS[name]).items():
        if hint == (float | None):
            assert "null" in properties[field]["type"], field


def test_every_part_is_described():
    properties = report_schema()["properties"]
    fields = [field.name for field in dataclasses.fields(ConnectivityReport)]
    assert list(properties) == ["schema", *fields]


def broken(**changes: Any) -> dict[str, Any]:
    return {**make_report(), **changes}


@pytest.mark.parametrize(
    "report",
    [
        broken(schema="hf_llfc.report/2"),
        {name: value for name, value in make_report().items() if name != "verdict"},
        broken(verdict={"answer": "perhaps", "because": "no idea"}),
        broken(barrier={"loss": -0.1, "error": 0.0}),
        broken(path=[{"alpha": 0.5, "metrics": {}}]),
        broken(layers=[{**make_report()["layers"][0], "llfc": 0.1}]),
        broken(geometry=[{"layer": "h.0", "of": "weights", "angles": [91], "rank_a": 1, "rank_b": 1}]),
        broken(region="circle"),
    ],
    ids=["version", "no verdict", "answer", "negative", "no loss", "no statistic", "angle", "region"],
)
def test_what_is_no_report_does_not_fit(report):
    assert not VALIDATOR.is_valid(report)


def test_keys_of_later_versions_fit():
    VALIDATOR.validate(broken(more={"x": 1}))
