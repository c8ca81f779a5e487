"""`hf-llfc merge`."""

from __future__ import annotations

import argparse
from typing import Any

from hf_llfc.cli.arguments import MATCHING_OPTIONS
from hf_llfc.cli.run import run_recipe
from hf_llfc.cli.settings import matching_section, refuse_given, refuse_unused_data, refuse_unused_learning
from hf_llfc.errors import RecipeError
from hf_llfc.merging.mergekit_methods import MERGEKIT_METHODS
from hf_llfc.recipe import load_recipe


def execute(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    if options.method == "none":
        refuse_given(options, (*MATCHING_OPTIONS, "seed"), "without --align")
    refuse_unused_data(options)
    refuse_unused_learning(options)
    equal = None if options.merge_method in MERGEKIT_METHODS else 1 / len(options.models)
    weights = options.weights or [equal] * len(options.models)
    if len(weights) != len(options.models):
        raise RecipeError(f"{len(weights)} weights for {len(options.models)} models; give one weight a model")
    recipe: dict[str, Any] = {
        "models": [
            {"model": model, **({"parameters": {"weight": weight}} if weight is not None else {})}
            for model, weight in zip(options.models, weights, strict=True)
        ],
        "merge_method": options.merge_method,
        "align": matching_section(options),
        "output_dir": options.out,
        "overwrite": options.overwrite,
        "allow_pickle": options.allow_pickle,
        "device": options.device,
        "log_with": options.log_with,
        "logging_dir": options.logging_dir,
    }
    if options.base_model:
        recipe["base_model"] = options.base_model
    if options.dtype:
        recipe["dtype"] = options.dtype
    if options.tokenizer_source is not None:
        source = options.tokenizer_source
        recipe["tokenizer_source"] = int(source) if source.isdigit() else source
    if options.normalize is not None:
        recipe["parameters"] = {"normalize": options.normalize}
    return run_recipe(load_recipe(recipe, [f"parameters.{each}" for each in options.parameters]), options)
