"""Loss and metrics of parents and merge in a card: the rows, their table, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import PathPoint
from hf_llfc.publishing.reading import LOSS, merge_point, metric_style, model_points, number_text
from hf_llfc.publishing.words import display_name


def result_rows(report: ConnectivityReport | None, results: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Loss and metrics, a row a model, the merge in its place; empty without numbers."""
    if results:
        return [
            {
                "id": str(row.get("id") or ""),
                "is_merge": bool(row.get("is_merge", False)),
                "loss": row.get("loss"),
                "metrics": dict(row.get("metrics") or {}),
            }
            for row in results
        ]
    if report is None:
        return []
    rows = []
    for point, model in (
        *zip(model_points(report), range(len(report.models)), strict=True),
        (merge_point(report), None),
    ):
        if point is None or not _has_numbers(point):
            continue
        model_id = "" if model is None or model >= len(report.models) else report.models[model].id or ""
        rows.append({"id": model_id, "is_merge": model is None, "loss": point.loss, "metrics": dict(point.metrics)})
    return rows


def _has_numbers(point: PathPoint) -> bool:
    return point.loss is not None or any(value is not None for value in point.metrics.values())


def result_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The rows as cells of text."""
    if not rows:
        return None
    metrics = list(dict.fromkeys(metric for row in rows for metric in row["metrics"]))
    styles = [(metric, metric_style(metric)) for metric in metrics]
    arrows = {True: " ↑", False: " ↓", None: ""}
    has_loss = any(row["loss"] is not None for row in rows)
    heads = (["loss ↓"] if has_loss else []) + [style.title + arrows[style.higher_is_better] for _, style in styles]
    cells = []
    for row in rows:
        values = [number_text(row["loss"], LOSS)] if has_loss else []
        values += [number_text(row["metrics"].get(metric), style) for metric, style in styles]
        name = "this merge" if row["is_merge"] else display_name(str(row["id"]))
        cells.append({"name": name, "is_merge": row["is_merge"], "values": values})
    return {"heads": heads, "rows": cells}


def comparison(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Whether a parent alone has the lower loss, in one sentence."""
    losses = {display_name(str(row["id"])): row["loss"] for row in rows if not row["is_merge"]}
    losses = {name: loss for name, loss in losses.items() if loss is not None and math.isfinite(loss)}
    own = next((row["loss"] for row in rows if row["is_merge"]), None)
    if own is None or not math.isfinite(own) or not losses:
        return None
    best = min(losses, key=lambda name: losses[name])
    if own < losses[best]:
        return "On these data the merge has a lower loss than every one of its parents."
    if len(losses) > 1 and own >= max(losses.values()):
        return "On these data every one of its parents alone does as well or better, by loss."
    return f"On these data {best} alone does as well or better, by loss."


def standard_error(data: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """How far chance alone moves an accuracy: √(p(1−p)/n) of a share p of n samples."""
    merged = next((row["metrics"].get("accuracy") for row in rows if row["is_merge"]), None)
    samples = data.get("samples")
    if merged is None or not 0 <= merged <= 1 or not isinstance(samples, int) or samples < 1:
        return None
    error = 100 * math.sqrt(merged * (1 - merged) / samples)
    return f"With {samples} samples the accuracy of this merge has a standard error of {error:.1f} points."
