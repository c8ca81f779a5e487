"""The page of model types, docs/model_types.md: one row each, from the facts of `tests.zoo_table`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import transformers

KINDS = ("residual", "neurons", "heads", "within heads", "experts")

PAGE = """\
# Every model type

One row for each of the {registered} model types that transformers {version} registers. Made by

    python benchmarks/zoo.py --check tests.zoo_table:examine --page docs/model_types.md

which builds a tiny model of each type from its default config, with random weights everywhere, in float64.
`verified` means: every tensor in memory and on disk is declared, a random transform of every symmetric axis changes
no answer by more than 1e-9 of its largest entry, the inverse restores every bit, names in memory and on disk move
alike, and weight matching finds a planted transform exactly. `hand-written` specs are functions in
`hf_llfc/adapters/families`; `derived` ones are found by running the model (`hf_llfc/adapters/derived`), at the size of
the config at hand.

`residual` is a stream through several layers, `neurons` are the units between two maps of one layer (channels of a
block of convolutions too), `heads` whole heads or groups, `within heads` query heads of a group and channels of a
head, `experts` whole experts. A class that gives out its residual stream as features holds it fixed ("output");
other empty cells are axes that the architecture ties to something it tells apart (ALiBi slopes fix heads), or that
the spec does not know.

| | model types |
|---|---|
{counts}

| model type | class | spec | residual | neurons | heads | within heads | experts | verified |
|---|---|---|---|---|---|---|---|---|
{rows}

## Not built

These have no row above, for the reason beside them.

| model type | why |
|---|---|
{failures}
"""


def is_verified(row: Mapping[str, Any]) -> bool:
    """Whether the properties of `examine` hold for a model type, with at least one symmetric axis."""
    return bool(row["stage"] == "done" and row["kinds"])


def page_row(row: Mapping[str, Any]) -> str:
    """The row of a model type that was built and run."""
    marks = ["✓" if kind in row.get("kinds", ()) else "" for kind in KINDS]
    if not marks[0] and row.get("features"):
        marks[0] = "output"
    verified = "✓" if is_verified(row) else _one_line(row["reason"] or "nothing is symmetric")
    return f"| {row['type']} | {row['class']} | {row.get('spec', '')} | {' | '.join(marks)} | {verified} |"


def page_failure(row: Mapping[str, Any]) -> str:
    """The row of a model type that cannot be built or run."""
    return f"| {row['type']} | {_one_line(row['reason'])} |"


def is_built(row: Mapping[str, Any]) -> bool:
    """Whether a tiny model of a model type runs and gives finite answers."""
    return row["stage"] in ("check", "done")


def counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many model types get how far, and how many have which symmetries."""
    built = [row for row in rows if is_built(row)]
    verified = [row for row in built if is_verified(row)]
    attention = [row for row in verified if row["attention"]]
    return {
        "registered": len(rows),
        "run under 5 M parameters": len(built),
        "verified": len(verified),
        "verified, hand-written": sum(row["spec"] == "hand-written" for row in verified),
        "verified, derived": sum(row["spec"] == "derived" for row in verified),
        "with neurons of the MLPs or channels of the blocks": sum(
            "neurons" in row["kinds"] or (not row["attention"] and "heads" in row["kinds"]) for row in verified
        ),
        "with attention": len(attention),
        "of these with heads": sum("heads" in row["kinds"] for row in attention),
        "of these with a residual stream, or giving it out": sum(
            "residual" in row["kinds"] or row["features"] for row in attention
        ),
        "with experts": sum("experts" in row["kinds"] for row in verified),
    }


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page of model types, as Markdown."""
    ordered = sorted(rows, key=lambda row: row["type"])
    return PAGE.format(
        registered=len(rows),
        version=transformers.__version__,
        counts="\n".join(f"| {label} | {count} |" for label, count in counts(rows).items()),
        rows="\n".join(page_row(row) for row in ordered if is_built(row)),
        failures="\n".join(page_failure(row) for row in ordered if not is_built(row)),
    )


def _one_line(text: str, width: int = 160) -> str:
    line = " ".join(text.split()).replace("|", "\\|")
    line = re.sub(r"0x[0-9a-f]+", "…", line)
    return line if len(line) <= width else f"{line[: width - 1]}…"
