"""`hf-llfc diagnose`."""

from __future__ import annotations

import argparse

from hf_llfc.cli import is_main_process
from hf_llfc.cli.answers import show_report
from hf_llfc.cli.arguments import MATCHING_OPTIONS
from hf_llfc.cli.console import progress_bars
from hf_llfc.cli.settings import align_section, evaluation_config, refuse_given, refuse_unused_learning
from hf_llfc.errors import EvaluationError
from hf_llfc.pipeline.single_stages import write_diagnosis
from hf_llfc.recipe import DiagnoseSection, ModelEntry, ModelParameters, Recipe


def execute(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    if options.method == "none":
        refuse_given(options, MATCHING_OPTIONS, "without --align")
    refuse_unused_learning(options)
    data = evaluation_config(options, required=True)
    assert data is not None
    settings = align_section(options, calibration=data)
    if options.alphas < 3:
        raise EvaluationError(f"--alphas must be at least 3, both ends and one point between, not {options.alphas}")
    if len(options.models) == 2 and options.weights and not options.base_model:
        raise EvaluationError("--weights has no meaning for a line, which is measured at every weight; see --alphas")
    section = DiagnoseSection(
        data,
        tuple(step / (options.alphas - 1) for step in range(options.alphas)),
        tuple(options.layers),
        options.unit,
        tuple(options.measures),
        options.suggest,
        options.offload,
    )
    weights = options.weights or [None] * len(options.models)
    if len(weights) != len(options.models):
        raise EvaluationError(f"{len(weights)} weights for {len(options.models)} models; give one weight a model")
    models = [
        ModelEntry(model, None if weight is None else ModelParameters(weight))
        for model, weight in zip(options.models, weights, strict=True)
    ]
    with progress_bars(shown=not options.quiet) as progress:
        recipe = Recipe(
            models=tuple(models),
            merge_method="linear" if options.base_model is None else "task_arithmetic",
            base_model=options.base_model,
            align=settings,
            diagnose=section,
            output_dir=options.out or "",
            overwrite=options.overwrite,
            allow_pickle=options.allow_pickle,
            log_with=tuple(options.log_with),
            logging_dir=options.logging_dir,
            device=options.device,
        )
        report = write_diagnosis(recipe, heads=options.heads, restart=options.restart, progress=progress)
    if is_main_process():
        show_report(report, options)
    return 0
