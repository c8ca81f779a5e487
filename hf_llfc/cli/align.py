"""`hf-llfc align`."""

from __future__ import annotations

import argparse

from hf_llfc.cli import is_main_process
from hf_llfc.cli.console import print_json, print_table, progress_bars
from hf_llfc.cli.settings import evaluation_config, given, matching_names, refuse_given, refuse_unused_data
from hf_llfc.parents.provenance import alignment_summary
from hf_llfc.pipeline.single_stages import write_aligned
from hf_llfc.recipe import ModelEntry, Recipe
from hf_llfc.recipe.options import options_of
from hf_llfc.recipe.sections import AlignSection, EvaluationConfig


def execute(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    refuse_unused_data(options)
    if options.use is not None:
        # An alignment that was found between canonical forms is one of these only.
        of_matching = [name for name in matching_names() if name not in ("groups", "probe")]
        names = [*of_matching, "seed", *options_of(EvaluationConfig)]
        refuse_given(options, dict.fromkeys(names), "with --use, which matches nothing")
    settings = AlignSection(**given(options, AlignSection), calibration=evaluation_config(options, required=False))
    with progress_bars(shown=not options.quiet) as progress:
        recipe = Recipe(
            models=(ModelEntry(options.model),),
            merge_method="task_arithmetic",
            base_model=options.to,
            align=settings,
            output_dir=options.out,
            overwrite=options.overwrite,
            allow_pickle=options.allow_pickle,
            device=options.device,
        )
        alignment = write_aligned(recipe, file=options.use, restart=options.restart, progress=progress)
    if not is_main_process():
        return 0
    summary = alignment_summary(alignment)
    if options.format == "json":
        print_json({"out": options.out, **summary})
    else:
        print_table(f"{options.model} in the coordinates of {options.to}: {options.out}", summary["axes"])
    return 0
