"""`hf-llfc merge`."""

from __future__ import annotations

import argparse
from typing import Any

from hf_llfc.cli.run import run_recipe
from hf_llfc.cli.settings import (
    calibration_settings,
    data_settings,
    given,
    matching_names,
    refuse_given,
    refuse_unused_data,
)
from hf_llfc.errors import RecipeError, refuse_other_count
from hf_llfc.merging.methods import find_method
from hf_llfc.recipe import AlignSection, Recipe, load_recipe
from hf_llfc.recipe.sections import SUMS, uses_data


def execute(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    align = given(options, AlignSection)
    if options.method == "none":
        unused = matching_names() if options.calibrate else [*matching_names(), "seed"]
        refuse_given(options, unused, "without --align")
    measures = options.merge_method is not None and bool(find_method(options.merge_method).importance)
    if not measures:
        refuse_unused_data(options)
    data = data_settings(options, required=measures)
    equal = 1 / len(options.models) if options.merge_method in (None, *SUMS) else None
    weights = options.weights or [equal] * len(options.models)
    refuse_other_count(weights, len(options.models), RecipeError)
    recipe: dict[str, Any] = {
        **given(options, Recipe),
        "models": [
            {"model": model, **({"parameters": {"weight": weight}} if weight is not None else {})}
            for model, weight in zip(options.models, weights, strict=True)
        ],
        "align": {
            **align,
            "calibration": data if uses_data(options.method, options.start or "", options.label_order) else None,
        },
    }
    if measures:
        recipe["importance"] = data
    if (calibrate := calibration_settings(options)) is not None:
        recipe["calibrate"] = calibrate
    if options.normalize is not None:
        recipe["parameters"] = {"normalize": options.normalize}
    return run_recipe(load_recipe(recipe, [f"parameters.{each}" for each in options.parameters]), options)
