"""What the Python functions take and give back: no answer is true that means no, and no folder is called None."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import hf_llfc
from hf_llfc.errors import EvaluationError, RecipeError, refuse_other_count
from hf_llfc.pipeline.inspection import Inspection
from hf_llfc.pipeline.mergeability import CheckResult


@pytest.mark.parametrize(
    ("answer", "yes"), [("merge", True), ("align", False), ("do not merge", False), ("undecided", False)]
)
def test_the_answer_of_a_check_is_true_where_it_is_yes(answer: str, yes: bool) -> None:
    assert bool(CheckResult(answer, "because")) is yes


@pytest.mark.parametrize(
    ("verification", "yes"),
    [(None, True), ({"verified": True, "change": 0.0}, True), ({"verified": False, "change": 0.3}, False)],
)
def test_an_inspection_is_false_where_a_symmetry_was_verified_and_does_not_hold(verification: Any, yes: bool) -> None:
    found = Inspection(**{**dict.fromkeys(field.name for field in fields(Inspection)), "verification": verification})
    assert bool(found) is yes


@pytest.mark.parametrize("out", [None, "", 3, ["out"]])
def test_what_is_no_folder_is_refused(out: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="out: a folder to write is expected, found"):
        hf_llfc.merge(["a", "b"], out=out)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_weights_are_one_a_model() -> None:
    refuse_other_count([0.5, 0.5], 2, EvaluationError)
    with pytest.raises(EvaluationError, match="3 weights for 2 models; give one weight a model"):
        refuse_other_count([1, 1, 1], 2, EvaluationError)
