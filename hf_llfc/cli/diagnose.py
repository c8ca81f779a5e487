"""`hf-llfc diagnose`."""

from __future__ import annotations

import argparse

from hf_llfc.cli import is_main_process
from hf_llfc.cli.answers import show_report
from hf_llfc.cli.console import progress_bars
from hf_llfc.cli.settings import evaluation_config, given, matching_names, refuse_given
from hf_llfc.errors import EvaluationError
from hf_llfc.pipeline.single_stages import write_diagnosis
from hf_llfc.recipe import AlignSection, DiagnoseSection, Recipe


def execute(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    if options.method == "none":
        refuse_given(options, matching_names(), "without --align")
    data = evaluation_config(options, required=True)
    assert data is not None
    settings = AlignSection(**given(options, AlignSection), calibration=data)
    if len(options.models) == 2 and options.weights and not options.base_model:
        raise EvaluationError("--weights has no meaning for a line, which is measured at every weight; see --alphas")
    section = DiagnoseSection(data, **given(options, DiagnoseSection))
    recipe = given(options, Recipe)
    recipe.pop("seed", None)
    with progress_bars(shown=not options.quiet) as progress:
        report = write_diagnosis(
            options.models,
            section,
            align=settings,
            weights=options.weights,
            heads=options.heads,
            out=recipe.pop("output_dir", None),
            restart=options.restart,
            **recipe,
            progress=progress,
        )
    if is_main_process():
        show_report(report, options)
    return 0
