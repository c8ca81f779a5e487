"""`hf-llfc check`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from hf_llfc.api import check
from hf_llfc.cli.console import print_json, print_table, progress_bars
from hf_llfc.cli.settings import evaluation_config
from hf_llfc.diagnostics import LayerRow
from hf_llfc.diagnostics.rows import OutputAgreement


def execute(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    data = evaluation_config(options, required=options.level == 2 and options.b is not None)
    with progress_bars(shown=not options.quiet) as progress:
        result = check(
            options.a,
            options.b,
            level=options.level,
            data=data,
            seed=options.seed or 0,
            allow_pickle=options.allow_pickle,
            progress=progress,
        )
    if options.format == "json":
        print_json(asdict(result))
    else:
        how = "alignment" if options.b is None else "weight matching"
        state = f" after {how}" if result.aligned else ""
        of = "of the merge" if options.b is None else "at the midpoint"
        if models := result.task_vectors.get("models"):
            print_table("changes of the base", models)
        if result.changes:
            rows = [{"model": model, "change of the base": change} for model, change in result.changes.items()]
            print_table("how far the models and the merge lie from the base", rows)
        if result.tensors:
            print_table("tensors farthest apart", [asdict(row) for row in result.tensors])
        if result.layers:
            rows = [{"layer": row.layer, **_means(row)} for row in result.layers]
            print_table(f"layers {of}{state}", rows)
        if result.outputs is not None:
            print_table(f"predictions {of}{state}", [_predictions(result.outputs)])
        if result.criteria:
            print_table(f"what decides{state}", [asdict(criterion) for criterion in result.criteria])
        print(f"{result.answer}: {result.because}")
        for problem in result.problems:
            print(f"  - {problem}")
        if result.differences:
            print("inputs are not prepared alike, and a merge prepares them as the first model does:")
        for difference in result.differences:
            print(f"  - {difference}")
    return 0 if result.answer == "merge" or (result.answer == "undecided" and result.level == 0) else 1


def _predictions(outputs: OutputAgreement) -> dict[str, float | None]:
    """The barrier taken apart, in nats, and how often predictions differ."""
    low, high = outputs.loss_barrier_range or (None, None)
    return {
        "gain": outputs.gain,
        "cost": outputs.merged_divergence,
        "estimate": outputs.loss_barrier,
        "from": low,
        "to": high,
        "at most": outputs.bound,
        "parents disagree": outputs.parents_disagreement,
    }


def _means(row: LayerRow) -> dict[str, float | None]:
    return {
        "llfc": row.llfc.mean,
        "baseline": row.baseline.mean,
        "ratio": row.ratio,
        "coefficient": row.coefficient.mean,
    }
