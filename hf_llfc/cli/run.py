"""`hf-llfc run`, and what every command that runs a recipe does."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_llfc.cli import is_main_process
from hf_llfc.cli.answers import show_report
from hf_llfc.cli.console import format_bytes, print_json, print_table, progress_bars
from hf_llfc.errors import RecipeError
from hf_llfc.foundation.choices import COMPARED
from hf_llfc.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from hf_llfc.parents.proof import Proof


def execute(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    return run_recipe(load_recipe(options.recipe, options.overrides), options)


def run_recipe(recipe: Recipe, options: argparse.Namespace) -> int:
    """Runs a recipe, or with --dry-run plans it, and prints what came of it."""
    if options.dry_run:
        from hf_llfc.pipeline.planning import plan

        planned = plan(recipe, compare=options.compare or COMPARED[0])
        if not is_main_process():
            return 0
        if options.format == "json":
            print_json(planned)
        else:
            cost = {
                "read": planned["cost"]["bytes_read"],
                "written": planned["cost"]["bytes_written"],
                "memory for tensors": planned["cost"]["peak_memory_bytes"],
            }
            print_table("plan", planned["steps"])
            for warning in planned.get("warnings", ()):
                print(f"warning: {warning}")
            print_table("cost", [{name: format_bytes(count) for name, count in cost.items()}])
            if matching := planned["cost"].get("matching"):
                row = {
                    "operations": f"{matching['operations']:.2g}",
                    "read": format_bytes(round(matching["bytes"])),
                    "seconds": f"{matching['seconds']:.2g}",
                }
                print_table("one sweep of weight matching over one model", [row])
            if calibration := planned["cost"].get("calibration"):
                row = {
                    "samples": calibration["samples"],
                    "forward passes": f"{calibration['forward_passes']:.2g}",
                    "operations": f"{calibration['operations']:.2g}",
                    "seconds": f"{calibration['seconds']:.2g}",
                }
                print_table("calibration, about", [row])
            _show_task_vectors(planned["task_vectors"])
        return 0
    if options.compare is not None:
        raise RecipeError("--compare belongs to --dry-run, which alone compares; leave it out, or add --dry-run")
    from hf_llfc.pipeline.flow import run

    with progress_bars(shown=not options.quiet) as progress:
        result = run(recipe, restart=options.restart, progress=progress)
    if not result.is_main_process:
        return 0
    if options.format == "json":
        print_json(result.to_dict())
        return 0
    rows = [
        {"model": row["id"], **{name: row[name] for name in ("loss",) if name in row}, **row.get("metrics", {})}
        for row in result.table
    ]
    if any("loss" in row for row in rows):
        print_table("models on the same data", rows)
    if result.proofs:
        print_table("adapters, folded and as peft runs them", [_shown_proof(proof) for proof in result.proofs])
    for summary in result.alignments:
        print(summary["sentence"])
    if result.calibration is not None:
        from hf_llfc.publishing.words import calibration_sentence

        print(calibration_sentence(result.calibration))
    if result.report is not None:
        show_report(result.report, options)
    if result.adapter is not None:
        from hf_llfc.publishing.words import adapter_sentence

        print(adapter_sentence(result.adapter))
    if result.tensors is not None:
        print(result.tensors.sentence)
    print(f"merged {'checkpoint' if result.adapter is None else 'adapter'}: {result.folder}")
    if result.url:
        print(f"on the Hub: {result.url}")
    return 0


def _shown_proof(proof: Proof) -> dict[str, Any]:
    """One row of the table of adapters."""
    if proof.left_out:
        return {"model": proof.model, "tensors changed": "not run", "answers differ": proof.left_out}
    return {
        "model": proof.model,
        "tensors changed": f"{proof.changed} of {proof.targeted}",
        "answers differ": f"{proof.difference:.0e}",
        "effect of the adapter": f"{proof.effect:.0e}",
        "seconds": f"{proof.seconds:.1f}",
    }


def _show_task_vectors(found: Mapping[str, Any]) -> None:
    """What models changed of their base: one row a model, with the means over its pairs."""
    rows = []
    for place, model in enumerate(found.get("models", ())):
        row = {"model": model["model"], "change": model["change"], "stable rank": model["stable_rank"]}
        pairs = [pair for pair in found["pairs"] if place in pair["places"]]
        for title, name in (("cosine with others", "cosine"), ("same sign", "same_sign"), ("overlap", "overlap")):
            values = [pair[name] for pair in pairs if pair[name] is not None]
            row[title] = sum(values) / len(values) if values else None
        rows.append(row)
    if rows:
        read = f"{found['tensors_read']} of {found['tensors']} tensors, {format_bytes(found['bytes_read'])}"
        print_table(f"changes of the base ({read})", rows)
    print(found["sentence"])
