"""Loss and metrics of parents and merge in a card: the rows, their table, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.publishing.lineage import display_name
from hf_llfc.publishing.numbers import LOSS, is_number, metric_style, rounded, value_text
from hf_llfc.publishing.reading import merge_point, model_points
from hf_llfc.publishing.record import Result


@dataclass(frozen=True)
class ResultTable:
    """Loss and metrics as text.

    Attributes:
        heads: Of the columns behind the name.
        rows: Of every model whether it is the merge, its name, and a text a column.
    """

    heads: list[str]
    rows: list[tuple[bool, str, list[str]]]


def result_rows(report: ConnectivityReport | None, results: Sequence[Result]) -> list[Result]:
    """Loss and metrics of every model and of the merge; those of the path where none were measured otherwise."""
    if results or report is None:
        return list(results)
    ids = [model.id or "" for model in report.models]
    points = [*zip(ids, model_points(report), strict=True), (None, merge_point(report))]
    return [
        Result(name or "", point.loss, point.metrics, is_merge=name is None)
        for name, point in points
        if point is not None and any(value is not None for value in (point.loss, *point.metrics.values()))
    ]


def result_table(rows: Sequence[Result]) -> ResultTable | None:
    """The rows as cells of text; None without numbers."""
    if not rows:
        return None
    styles = {metric: metric_style(metric) for row in rows for metric in row.metrics}
    arrows = {True: " ↑", False: " ↓", None: ""}
    has_loss = any(row.loss is not None for row in rows)
    heads = (["loss ↓"] if has_loss else []) + [
        style.title + arrows[style.higher_is_better] for style in styles.values()
    ]
    cells = []
    for row in rows:
        values = [value_text(row.loss, LOSS)] if has_loss else []
        values += [value_text(row.metrics.get(metric), style) for metric, style in styles.items()]
        name = "this merge" if row.is_merge else row.id if row.is_before else display_name(row.id)
        cells.append((row.is_merge, name, values))
    return ResultTable(heads, cells)


def comparison(rows: Sequence[Result]) -> str | None:
    """Whether a parent alone has the lower loss, in one sentence."""
    parents = [(display_name(row.id), row.loss) for row in rows if row.is_parent]
    losses = {name: loss for name, loss in parents if is_number(loss)}
    own = next((row.loss for row in rows if row.is_merge), None)
    if not is_number(own) or not losses:
        return None
    best = min(losses, key=losses.__getitem__)
    if own < losses[best]:
        return "On this data, the merge has a lower loss than each of its parents."
    if len(losses) > 1 and own >= max(losses.values()):
        return "On this data, each of its parents alone has an equal or lower loss."
    return f"On this data, {best} alone has an equal or lower loss."


def standard_error(samples: int | None, rows: Sequence[Result]) -> str | None:
    """How far chance alone moves an accuracy: √(p(1−p)/n) of a share p of n samples."""
    merged = next((row.metrics.get("accuracy") for row in rows if row.is_merge), None)
    if merged is None or not 0 <= merged <= 1 or samples is None or samples < 1:
        return None
    error = rounded(100 * math.sqrt(merged * (1 - merged) / samples), 1)
    return f"With {samples} samples the accuracy of this merge has a standard error of {error} points."
