"""`hf-llfc extract`."""

from __future__ import annotations

import argparse

from hf_llfc.cli.run import run_recipe
from hf_llfc.cli.settings import data_settings, given
from hf_llfc.recipe import Recipe
from hf_llfc.recipe.extraction import extraction

ALPHAS = 3
"""Points between base and fine-tune that are measured, both among them."""


def execute(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    data = data_settings(options, required=False)
    measured = {} if data is None else {"diagnose": {**data, "alphas": ALPHAS}}
    recipe = extraction(options.base, options.finetuned, {**given(options, Recipe), **measured})
    return run_recipe(recipe, options)
