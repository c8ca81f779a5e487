"""A connectivity report as tables for a terminal of 100 columns, one for each part that was measured.

`docs/report.md` explains every column.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import AdditivityRow, GeometryRow, LayerRow, Statistic
from hf_llfc.publishing.plots.layer_axis import common_prefix
from hf_llfc.publishing.reading import (
    LOSS,
    blend_of_models,
    metric_names,
    metric_style,
    model_points,
    number_text,
    point_name,
    shown_additivity,
    shown_layers,
)

Row = dict[str, str]

LONG_NAME = 30
"""Characters up to which names of layers are written in full."""


@dataclass(frozen=True)
class ReportTable:
    """A part of a report.

    Args:
        title: What it shows.
        rows: Cells by the names of their columns.
        numbers: Whether all columns but the first hold numbers.
    """

    title: str
    rows: list[Row]
    numbers: bool = True


def report_tables(report: ConnectivityReport) -> list[ReportTable]:
    """Every part of the report that was measured, in the order in which a reader wants them."""
    models = _models(report) if len(report.models) > 2 or report.region != "line" else []
    tables = [
        ReportTable("models", models, numbers=False),
        ReportTable(_path_title(report), _path(report)),
        _by_layer(_layer_title(report), [_layer(row) for row in shown_layers(report)]),
        _by_layer(_additivity_title(report), [_additivity(row) for row in shown_additivity(report)]),
        _by_layer("commutativity of linear maps", _commutativity(report)),
        _by_layer("stitching, A up to and with the layer, then B", _stitching(report)),
        _by_layer("weights, effective rank and principal angles in degrees", _weights(report)),
        _by_layer("features, effective rank and principal angles in degrees", _features(report)),
        ReportTable("suggested weights", _suggestion(report), numbers=False),
        ReportTable("barrier", _barrier(report)),
    ]
    return [table for table in tables if table.rows]


def _by_layer(title: str, rows: list[Row]) -> ReportTable:
    """A table of layers; where names are long, what most of them begin with is said in the title only."""
    if not rows:
        return ReportTable(title, rows)
    column = next(iter(rows[0]))
    names = [row[column] for row in rows]
    prefix = common_prefix(names)
    if max(map(len, names)) <= LONG_NAME or not prefix:
        return ReportTable(title, rows)
    shortened = [{**row, column: row[column].removeprefix(prefix)} for row in rows]
    return ReportTable(f"{title} (short names: {prefix}*)", shortened)


def _models(report: ConnectivityReport) -> list[Row]:
    names = [f"model {place}" for place in range(1, len(report.models) + 1)]
    if report.region == "arithmetic":
        names[-1] = "base"
    return [
        {"name": name, "model": model.id or "–", "weight": "–" if model.weight is None else f"{model.weight:.4g}"}
        for name, model in zip(names, report.models, strict=True)
    ]


def _path_title(report: ConnectivityReport) -> str:
    if report.region != "line":
        return "loss and metrics of merged models"
    first, second = ([_short(model.id) for model in report.models] + ["B"] * 2)[:2]
    return f"path: alpha of {first}, 1 - alpha of {second}"


def _short(model_id: str | None) -> str:
    return re.split(r"[/\\]", (model_id or "?").rstrip("/\\"))[-1]


def _path(report: ConnectivityReport) -> list[Row]:
    losses = [math.nan if point.loss is None else point.loss for point in report.path]
    labelled = any(math.isfinite(loss) for loss in losses)
    rows = []
    for point, blend in zip(report.path, blend_of_models(report.path, losses), strict=True):
        place = {"alpha": f"{point.alpha:.3g}"} if report.region == "line" else {"point": point_name(report, point)}
        values = {name: number_text(point.metrics.get(name), metric_style(name)) for name in metric_names(report)}
        loss = {"loss": number_text(point.loss, LOSS), "blend": decimal_text(blend, ".4f")} if labelled else {}
        rows.append({**place, **loss, **values})
    return rows if labelled or metric_names(report) else []


def _layer_title(report: ConnectivityReport) -> str:
    rows = shown_layers(report)
    if not rows:
        return ""
    unit = report.data.get("unit") or "sample"
    where = f"alpha = {rows[0].alpha:.3g}" if report.region == "line" else f"the point {point_name(report, rows[0])}"
    return f"layers at {where}, mean over {unit}s"


def _layer(row: LayerRow) -> Row:
    return {
        "layer": row.layer,
        **_statistic("LLFC", row.llfc),
        "baseline": distance_text(row.baseline.mean),
        "ratio": distance_text(row.ratio),
        "coef": decimal_text(row.coefficient.mean, ".3f"),
        "±": decimal_text(row.coefficient.std, ".3f"),
    }


def _statistic(name: str, found: Statistic) -> Row:
    """A mean with its interval, or without one with its standard deviation."""
    if found.interval is None:
        return {name: distance_text(found.mean), "± std": distance_text(found.std)}
    low, high = found.interval
    return {name: distance_text(found.mean), "95 % interval": f"{distance_text(low)} to {distance_text(high)}"}


def _additivity_title(report: ConnectivityReport) -> str:
    rows = shown_additivity(report)
    return f"weak additivity at alpha = {rows[0].alpha:.3g}, mean over samples" if rows else ""


def _additivity(row: AdditivityRow) -> Row:
    ratio = row.distance.mean / row.baseline.mean if row.distance.mean is not None and row.baseline.mean else None
    return {
        "activation": row.layer + (" (gated)" if row.gated else ""),
        **_statistic("distance", row.distance),
        "baseline": distance_text(row.baseline.mean),
        "ratio": distance_text(ratio),
    }


def _commutativity(report: ConnectivityReport) -> list[Row]:
    return [
        {
            "map": row.layer,
            "Dist_com": distance_text(row.com),
            "Dist_W": distance_text(row.weights),
            "Dist_H": distance_text(row.features),
        }
        for row in report.commutativity
    ]


def _stitching(report: ConnectivityReport) -> list[Row]:
    if not report.stitching:
        return []
    metrics = list(dict.fromkeys(name for point in report.stitching for name in point.metrics))
    alone = zip(("A alone", "B alone"), model_points(report), strict=False)
    points = [(point.layer, point.loss, point.metrics) for point in report.stitching]
    points += [(name, point.loss, point.metrics) for name, point in alone if point is not None]
    return [
        {
            "last layer of A": layer,
            "loss": number_text(loss, LOSS),
            **{name: number_text(values.get(name), metric_style(name)) for name in metrics},
        }
        for layer, loss, values in points
    ]


def _weights(report: ConnectivityReport) -> list[Row]:
    read = {row.layer: row for row in report.geometry if row.of == "weights, inputs"}
    return [
        {**_ranks("map", row), "written": _angles(row.angles), "read": _angles(read[row.layer].angles)}
        if row.layer in read
        else {**_ranks("map", row), "written": _angles(row.angles), "read": "–"}
        for row in report.geometry
        if row.of == "weights"
    ]


def _features(report: ConnectivityReport) -> list[Row]:
    return [{**_ranks("layer", row), "angles": _angles(row.angles)} for row in report.geometry if row.of == "features"]


def _ranks(name: str, row: GeometryRow) -> Row:
    return {name: row.layer, "rank A": f"{row.rank_a:.1f}", "rank B": f"{row.rank_b:.1f}"}


def _angles(angles: Sequence[float]) -> str:
    """Smallest, median and largest."""
    if not angles:
        return "–"
    return " / ".join(f"{angle:.2g}" for angle in (min(angles), statistics.median(angles), max(angles)))


def _suggestion(report: ConnectivityReport) -> list[Row]:
    found = report.suggestion
    if found is None:
        return []
    by_pattern = found.layer_weights or ({"all tensors": found.weights} if found.weights is not None else {})
    return [
        {"tensors": pattern or "all others", "weights": " : ".join(f"{weight:.3g}" for weight in weights)}
        for pattern, weights in by_pattern.items()
    ]


def _barrier(report: ConnectivityReport) -> list[Row]:
    if report.barrier.loss is None and report.barrier.error is None:
        return []
    error = report.barrier.error
    return [
        {"of": "loss", "height": f"{decimal_text(report.barrier.loss, '.4f')} nats"},
        {"of": "error", "height": "–" if error is None else f"{100 * error:.2f} points"},
    ]


def distance_text(value: float | None) -> str:
    """Three digits, as powers of ten where there would be zeros in front."""
    if value is None or not math.isfinite(value):
        return "–"
    return "0" if value == 0 else f"{value:#.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def decimal_text(value: float | None, form: str) -> str:
    """A number in a form of its own, a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)
