"""`hf-llfc inspect`."""

from __future__ import annotations

import argparse

from hf_llfc.api import inspect
from hf_llfc.cli.console import fold_layers, print_json, print_table


def execute(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    found = inspect(
        options.model,
        verify=options.verify,
        seed=options.seed or 0,
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
    )
    axes = [
        {"axis": axis.name, "size": axis.size, "depends on": axis.parent, "symmetric": axis.symmetric}
        for axis in found.spec.axes.values()
    ]
    if options.format == "json":
        print_json(
            {
                "model": found.model,
                "model_type": found.model_type,
                "architecture": found.architecture,
                "spec": found.spec.origin,
                "notes": list(found.spec.notes),
                "parameters": found.parameters,
                "symmetric_axes": list(found.symmetric_axes),
                "axes": axes,
                "tensors": list(found.tensors),
                "verification": found.verification,
            }
        )
    else:
        rows = [
            {**row, "symmetric": " ".join(row["symmetric"]), "shape": "×".join(map(str, row["shape"]))}
            for row in found.tensors
        ]
        kind = found.architecture or found.model_type
        title = f"{found.model}: {kind}, {found.parameters:,} parameters, {found.spec.origin} spec"
        print_table(
            title, rows if options.all else fold_layers(rows), columns=("tensor", "shape", "dtype", "axes", "symmetric")
        )
        for note in found.spec.notes:
            print(f"{found.spec.origin} spec: {note}")
        if found.verification is not None:
            sentence = "the symmetries hold" if found.verification["verified"] else "THE SYMMETRIES DO NOT HOLD"
            print(
                f"verification: a random transform of every symmetric axis changes the logits by "
                f"{found.verification['change']:.1e} (float noise {found.verification['noise']:.1e}): {sentence}"
            )
    return 0 if found.verification is None or found.verification["verified"] else 1
