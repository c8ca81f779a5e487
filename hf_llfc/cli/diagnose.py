"""`hf-llfc diagnose`."""

from __future__ import annotations

import argparse
from dataclasses import replace

from hf_llfc.cli import is_main_process
from hf_llfc.cli.answers import show_report
from hf_llfc.cli.console import progress_bars
from hf_llfc.cli.settings import evaluation_config, given, matching_names, refuse_given
from hf_llfc.errors import EvaluationError, refuse_other_count
from hf_llfc.pipeline.single_stages import write_diagnosis
from hf_llfc.recipe import AlignSection, DiagnoseSection, ModelEntry, ModelParameters, Recipe


def execute(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    if options.method == "none":
        refuse_given(options, matching_names(), "without --align")
    data = evaluation_config(options, required=True)
    assert data is not None
    settings = AlignSection(**given(options, AlignSection), calibration=data)
    settings = settings if settings.uses_data else replace(settings, calibration=None)
    if len(options.models) == 2 and options.weights and not options.base_model:
        raise EvaluationError("--weights has no meaning for a line, which is measured at every weight; see --alphas")
    section = DiagnoseSection(data, **given(options, DiagnoseSection))
    weights = options.weights or [None] * len(options.models)
    refuse_other_count(weights, len(options.models), EvaluationError)
    models = [
        ModelEntry(model, None if weight is None else ModelParameters(weight))
        for model, weight in zip(options.models, weights, strict=True)
    ]
    settings_of_run = {"output_dir": "diagnosis", **given(options, Recipe)}
    with progress_bars(shown=not options.quiet) as progress:
        recipe = Recipe(
            models=tuple(models),
            merge_method="linear" if options.base_model is None else "task_arithmetic",
            align=settings,
            diagnose=section,
            **settings_of_run,
        )
        report = write_diagnosis(
            recipe, heads=options.heads, keep=options.out is not None, restart=options.restart, progress=progress
        )
    if is_main_process():
        show_report(report, options)
    return 0
