"""Where a merge breaks, in one sentence and in tables: the blocks and the samples that carry its barrier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import AFTER, BEFORE, BlockRow
from hf_llfc.publishing.columns import Column, Table
from hf_llfc.publishing.numbers import LOSS, NOTHING, decimal_text, distance_text, height_text, rounded, value_text
from hf_llfc.publishing.reading import model_names

MOST_OF_IT = 0.8
"""The share of a barrier that the blocks which are named carry at least."""

SMALLEST_BARRIER = 0.01
"""In nats; below it there is nothing to share out."""

WORTH_IT = 0.1
"""A block is named whose leaving out lowers the barrier by this share at least."""


def barrier_of_blocks(rows: Sequence[BlockRow]) -> float | None:
    """The barrier of the merge that is split up by block; None where there is no loss."""
    steps = [row.step for row in rows if row.step is not None]
    return sum(steps) if steps else None


def breaking_sentence(report: ConnectivityReport) -> str | None:
    """Which blocks carry the barrier, in one sentence; None where this was not measured."""
    rows, whole = report.blocks, barrier_of_blocks(report.blocks)
    if whole is None:
        return None
    if whole < SMALLEST_BARRIER:
        side = "more" if whole > 0 else "less"
        return f"No block stands out: the merge loses {height_text(abs(whole), LOSS)} {side} than its models."
    (first, last), share = carrying_blocks(rows)
    names = _span(rows, first, last)
    carry = "carry" if first < last and rows[first].block != BEFORE else "carries"
    text = f"{names} {carry} {rounded(100 * share, 0)} % of the barrier of {height_text(whole, LOSS)}"
    best = min(rows, key=lambda row: math.inf if row.without is None else row.without)
    if best.without is not None and best.without < (1 - WORTH_IT) * whole:
        left = height_text(max(best.without, 0.0), LOSS)
        text += f"; with {_span([best], 0, 0)} left out of the merge, {left} of it are left"
    return f"{text}."


def carrying_blocks(rows: Sequence[BlockRow]) -> tuple[tuple[int, int], float]:
    """The shortest run of blocks that makes up `MOST_OF_IT` of all steps above zero, and its share of them.

    Returns:
        Indices of the first and the last block; of several runs as short, that with the largest share.
    """
    steps = [max(row.step or 0.0, 0.0) for row in rows]
    runs = [
        (last - first, -sum(steps[first : last + 1]), first)
        for first in range(len(steps))
        for last in range(first, len(steps))
        if sum(steps[first : last + 1]) >= MOST_OF_IT * sum(steps)
    ]
    length, carried, first = min(runs)
    return (first, first + length), -carried / sum(steps)


def _span(rows: Sequence[BlockRow], first: int, last: int) -> str:
    names = [rows[index].block for index in (first, last)]
    if names[0] == BEFORE:
        return "what runs before the blocks" if first == last else f"what runs up to {names[1]}"
    names = [name.replace(AFTER, "what runs after the blocks") for name in names]
    if first == last:
        return names[0]
    shared, _, number = names[1].rpartition(".")
    return f"{names[0]} to {number if shared and names[0].startswith(f'{shared}.') else names[1]}"


def blocks_table(report: ConnectivityReport) -> Table:
    """What every block has to do with the barrier and with the drift of features."""
    has_angles = any(row.angle is not None for row in report.blocks)
    columns = (
        Column("block"),
        Column("alone", "loss above the models' with this block merged only, nats"),
        Column("without", "with all merged but this block"),
        Column("step", "what it adds where the blocks before it are merged; these sum to the barrier"),
        *([Column("angle", "between task vectors, degrees")] if has_angles else []),
        Column("distance", "of the models' weights, relative"),
        Column("drift", "of features from the blend, relative"),
        Column("local", "share of that which arises here"),
    )
    rows = tuple(
        (
            row.block,
            *(decimal_text(value, 4) for value in (row.alone, row.without, row.step)),
            *([decimal_text(row.angle, 1)] if has_angles else []),
            distance_text(row.distance),
            distance_text(row.drift),
            NOTHING if row.local is None else f"{rounded(100 * row.local, 0)} %",
        )
        for row in report.blocks
    )
    return Table("blocks", "where it breaks", columns, rows, breaking_sentence(report) or "")


def samples_table(report: ConnectivityReport) -> Table:
    """The samples that carry most of the barrier, with what the models and the merge answer."""
    names = [*model_names(report), "merge"]
    classes = any(row.answer is not None for row in report.samples)
    told = ("label", *(f"answer of {name}" for name in names)) if classes else ("tokens",)
    columns = ("sample", *told, *(f"loss of {name}" for name in names), "share of the barrier")
    rows = []
    for row in report.samples:
        answers = (row.label, *row.answers, row.answer) if classes else (str(row.predictions),)
        losses = (value_text(loss, LOSS) for loss in (*row.losses, row.loss))
        share = NOTHING if row.share is None else f"{rounded(100 * row.share, 1)} %"
        rows.append((str(row.sample), *(each or NOTHING for each in answers), *losses, share))
    carried = sum(row.share or 0.0 for row in report.samples)
    note = f"Together they carry {rounded(100 * carried, 0)} % of the barrier." if carried else ""
    return Table(
        "samples", "samples that carry the barrier", tuple(map(Column, columns)), tuple(rows), note, not classes
    )


def fold_table(report: ConnectivityReport) -> Table:
    """The ways from the models to the merge, and from one to another by way of it."""
    names = model_names(report)
    rows = tuple(
        (
            " → ".join([names[row.models[0]], "merge", *(names[model] for model in row.models[1:])]),
            decimal_text(row.loss, 4),
            f"{rounded(100 * row.error, 2)} points",
            decimal_text(row.length, 3),
        )
        for row in report.fold
    )
    columns = (
        Column("way"),
        Column("barrier", "of loss, in nats"),
        Column("of error"),
        Column("length", "over the distance of the models"),
    )
    note = "By how much the loss on the way lies above the line between those of its ends."
    return Table("fold", "ways over the merge", columns, rows, note)


def importance_table(report: ConnectivityReport) -> Table:
    """Importance of every block in every model, as a share of the whole model's, and whose is larger."""
    blocks = list(dict.fromkeys(row.block for row in report.importance))
    count = len(report.importance[0].fisher) if report.importance else 0
    names = model_names(report)[:count]
    fisher, feedback = (
        {
            block: [sum(getattr(row, kind)[m] for row in report.importance if row.block == block) for m in range(count)]
            for block in blocks
        }
        for kind in ("fisher", "feedback")
    )
    rows = tuple(
        (block, *_shares(fisher, block), *_shares(feedback, block), *_of_all(fisher[block])) for block in blocks
    )
    columns = (
        Column("block"),
        *(Column(f"Fisher {name}", "share of the model's own") for name in names),
        *(Column(f"feedback {name}", "share of the model's own") for name in names),
        *(Column(f"weight {name}", "Fisher of this model over that of all") for name in names),
    )
    return Table("importance", "whose weights matter where", columns, rows, "By block; the file has every tensor.")


def units_table(report: ConnectivityReport) -> Table:
    """Share of units that are always and never active in every model and in the merge."""
    of = " / ".join(name.removeprefix("model ") for name in (*model_names(report), "merge"))
    columns = (Column("activation"), Column("units"), Column("always, %", of), Column("never, %", of))
    rows = tuple(
        (
            row.layer,
            str(row.units),
            *(" / ".join(rounded(100 * share, 1) for share in shares) for shares in (row.always, row.never)),
        )
        for row in report.units
    )
    return Table(
        "units",
        "units that are always or never active",
        columns,
        rows,
        f"Active is an input above zero; in the order {of}.",
    )


def _shares(by_block: Mapping[str, Sequence[float]], block: str) -> list[str]:
    """A block's share of every model's importance."""
    wholes = [sum(values) for values in zip(*by_block.values(), strict=True)]
    return [
        f"{rounded(100 * value / whole, 1)} %" if whole else NOTHING
        for value, whole in zip(by_block[block], wholes, strict=True)
    ]


def _of_all(values: Sequence[float]) -> list[str]:
    """Every model's share of the sum over models."""
    return [f"{rounded(100 * value / sum(values), 0)} %" if sum(values) else NOTHING for value in values]
