"""From options of the command line to the sections of a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from hf_llfc.cli.arguments import LEFT_OUT, NAMES, calibration_options
from hf_llfc.errors import EvaluationError, RecipeError
from hf_llfc.recipe.options import options_of
from hf_llfc.recipe.sections import AlignSection, EvaluationConfig, uses_data


def given(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The values of a section that were given, by field.

    Raises:
        RecipeError: The command has no use for one of them.
    """
    left_out = LEFT_OUT.get((options.command, kind.__name__), {})
    values = {}
    for name, each in options_of(kind).items():
        value = vars(options).get(NAMES.get(name, name))
        if value is not None and each.section is None:
            if name in left_out and not each.is_required:
                raise RecipeError(f"{_flag(name)}: has no meaning for {options.command}: {left_out[name]}")
            values[name] = value
    return values


def data_settings(options: argparse.Namespace, *, required: bool) -> dict[str, Any] | None:
    """The keys of the data that were given, or None where there are none.

    Raises:
        EvaluationError: They are required, or given in part only.
    """
    settings = given(options, EvaluationConfig)
    if settings.keys() <= {"seed", "trust_remote_code"} and not required:
        return None
    missing = [_flag(name) for name in ("task", "dataset") if name not in settings]
    if missing:
        raise EvaluationError(f"{' and '.join(missing)} must be given to know what to measure on")
    return settings


def evaluation_config(options: argparse.Namespace, *, required: bool) -> EvaluationConfig | None:
    """The data to measure on, or None where none are given; raises as `data_settings`."""
    settings = data_settings(options, required=required)
    return None if settings is None else EvaluationConfig(**settings)


def refuse_given(options: argparse.Namespace, names: Iterable[str], because: str) -> None:
    """Nothing that a user wrote is ignored: options that have no effect here are an error."""
    useless = [name for name in names if vars(options).get(name) is not None]
    if useless:
        raise RecipeError(f"{', '.join(map(_flag, useless))}: has no meaning {because}")


def refuse_unused_data(options: argparse.Namespace) -> None:
    """Data are for activations and for learning."""
    if not uses_data(options.method, options.start or "", vars(options).get("label_order")):
        names = [name for name in options_of(EvaluationConfig) if name not in ("seed", "trust_remote_code")]
        refuse_given(
            options,
            names,
            "without activation, commutativity or learned matching or --label-order match, which alone look at data",
        )


def calibration_settings(options: argparse.Namespace) -> dict[str, Any] | None:
    """The section `calibrate` as it was given; None without `--calibrate`.

    Raises:
        RecipeError: Something is said of a calibration that is not asked for.
    """
    if not options.calibrate:
        refuse_given(options, calibration_options(), "without --calibrate")
        return None
    named = {key: vars(options)[dest] for dest, (key, _) in calibration_options().items()}
    return {key: value for key, value in named.items() if value is not None}


def matching_names() -> list[str]:
    """What says how weights are matched, the method aside."""
    return [name for name in options_of(AlignSection) if name not in ("method", "calibration", "seed", "label_order")]


def _flag(name: str) -> str:
    return "--" + NAMES.get(name, name).replace("_", "-")
