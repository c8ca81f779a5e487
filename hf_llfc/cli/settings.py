"""From options of the command line to the sections of a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from hf_llfc.cli.arguments import DATA_FIELDS
from hf_llfc.errors import EvaluationError, RecipeError
from hf_llfc.evaluation import EvaluationConfig
from hf_llfc.recipe import AlignSection


def data_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The data options that were given."""
    return {field: value for field in DATA_FIELDS if (value := vars(options)[field]) is not None}


def evaluation_config(options: argparse.Namespace, *, required: bool) -> EvaluationConfig | None:
    """The data to measure on, or None where none are given.

    Raises:
        EvaluationError: They are required, or given in part only.
    """
    settings = data_settings(options)
    if not settings and not required:
        return None
    missing = [f"--{field}" for field in ("task", "dataset") if field not in settings]
    if missing:
        raise EvaluationError(f"{' and '.join(missing)} must be given to know what to measure on")
    return EvaluationConfig(**settings, seed=options.seed)


def refuse_given(options: argparse.Namespace, names: Sequence[str], because: str) -> None:
    """Nothing that a user wrote is ignored: options that have no effect here are an error."""
    unset = vars(AlignSection())
    given = [name for name in names if vars(options)[name] and vars(options)[name] != unset.get(name)]
    if given:
        raise RecipeError(f"{', '.join('--' + name.replace('_', '-') for name in given)}: has no meaning {because}")


def refuse_unused_data(options: argparse.Namespace) -> None:
    """Data are for activations and for learning."""
    if not AlignSection(options.method, start=options.start).uses_data:
        refuse_given(options, DATA_FIELDS, "without activation matching or learned matching, which alone look at data")


def refuse_unused_learning(options: argparse.Namespace) -> None:
    """Steps are of learned matching."""
    if options.method != "learned_matching":
        refuse_given(options, ("steps", "learning_rate"), "without learned matching")


def align_section(options: argparse.Namespace, *, calibration: EvaluationConfig | None) -> AlignSection:
    """How to align."""
    return AlignSection(
        method=options.method,
        axes=tuple(options.axes),
        exclude=tuple(options.exclude),
        groups=options.groups,
        together=vars(options).get("together", "reference"),
        start=options.start,
        restarts=options.restarts,
        max_sweeps=options.max_sweeps,
        solver=options.solver,
        seed=options.seed,
        steps=options.steps,
        learning_rate=options.learning_rate,
        calibration=calibration,
    )


def matching_section(options: argparse.Namespace) -> dict[str, Any]:
    """The section `align` of a recipe, as its YAML."""
    section: dict[str, Any] = {"method": options.method}
    if options.method != "none":
        section |= {
            "groups": options.groups,
            "together": options.together,
            "start": options.start,
            "restarts": options.restarts,
            "max_sweeps": options.max_sweeps,
            "solver": options.solver,
            "seed": options.seed,
        }
        chosen = ("axes", "exclude", "steps", "learning_rate")
        section |= {name: vars(options)[name] for name in chosen if vars(options)[name]}
        if data := data_settings(options):
            evaluation_config(options, required=True)  # says which option is missing
            section["calibration"] = data
    return section
