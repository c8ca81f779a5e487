"""Errors are values: raised once with all problems, with the nearest valid name."""

import subprocess
import sys

import pytest

from hf_llfc import errors
from hf_llfc.errors import CheckpointError, LLFCError, RecipeError, raise_all, suggest

KINDS = [
    errors.SpecError,
    errors.CheckpointError,
    errors.StorageError,
    errors.AlignmentError,
    errors.RecipeError,
    errors.EvaluationError,
    errors.PublishingError,
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_a_value_error_of_the_package(kind):
    assert issubclass(kind, LLFCError)
    assert issubclass(kind, ValueError)


def test_nothing_is_raised_without_a_problem():
    raise_all([], CheckpointError, "checking")


def test_one_problem_is_one_line():
    with pytest.raises(RecipeError) as caught:
        raise_all(["key x is unknown"], RecipeError, "recipe.yaml")
    assert str(caught.value) == "recipe.yaml: key x is unknown"


def test_all_problems_are_raised_at_once():
    with pytest.raises(CheckpointError) as caught:
        raise_all(["a is missing", "b is odd\nin two ways"], CheckpointError, "these do not fit")
    assert str(caught.value) == ("these do not fit: 2 problems\n  - a is missing\n  - b is odd\n    in two ways")


def test_a_long_list_is_cut_and_counted():
    with pytest.raises(CheckpointError) as caught:
        raise_all([f"problem {index}" for index in range(40)], CheckpointError, "all wrong")
    lines = str(caught.value).splitlines()
    assert lines[0] == "all wrong: 40 problems" and lines[30] == "  - problem 29" and lines[31] == "  and 10 more"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("weight_maching", "; did you mean 'weight_matching'?"),
        ("WEIGHT_MATCHING", "; did you mean 'weight_matching'?"),
        ("Bert", "; did you mean 'bert'?"),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_suggest_names_the_nearest_choice_or_nothing(name, expected):
    assert suggest(name, ["weight_matching", "activation_matching", "bert"]) == expected


def test_suggest_without_choices_says_nothing():
    assert suggest("bert", []) == ""


def test_errors_import_nothing_heavy():
    code = "import sys, hf_llfc.errors; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
