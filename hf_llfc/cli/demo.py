"""`hf-llfc demo`."""

from __future__ import annotations

import argparse

from hf_llfc.console import print_json, print_table, progress_bars
from hf_llfc.demo import run_demo


def execute(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    with progress_bars(shown=not options.quiet) as progress:
        result = run_demo(options.out, seed=options.seed, overwrite=options.overwrite, progress=progress)
    if options.format == "json":
        print_json(result)
    else:
        print_table("midpoint of two models, before and after alignment", result["rows"])
        for sentence in result["sentences"]:
            print(sentence)
    return 0
