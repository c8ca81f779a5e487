"""A connectivity report as tables of text, one for each part that was measured, for a terminal and for the page.

`docs/report.md` explains every column.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from statistics import median

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import AdditivityRow, GeometryRow, LayerRow, Statistic
from hf_llfc.publishing.breaking import blocks_table, fold_table, importance_table, samples_table, units_table
from hf_llfc.publishing.columns import Column, Table
from hf_llfc.publishing.depth import classes_table, settling_table
from hf_llfc.publishing.numbers import (
    ERROR,
    LOSS,
    NOTHING,
    decimal_text,
    distance_text,
    height_text,
    is_number,
    known,
    metric_style,
    rounded,
    value_text,
    weight_text,
    weights_text,
)
from hf_llfc.publishing.path import blend_of_models
from hf_llfc.publishing.plots.layer_axis import common_prefix
from hf_llfc.publishing.reading import (
    metric_names,
    model_names,
    model_points,
    point_name,
    shown_additivity,
    shown_layers,
)

LONG_NAME = 30
"""Characters up to which names of layers are written in full in a terminal."""


def report_tables(report: ConnectivityReport) -> list[Table]:
    """Every part of the report that was measured, in the order in which a reader wants them, for a terminal."""
    tables = [
        _models(report),
        path_table(report),
        decomposition_table(report),
        *map(_with_short_names, [_layers(report), *measure_tables(report)]),
        _suggestion(report),
        _barrier(report),
    ]
    return [table for table in tables if table.rows]


def measure_tables(report: ConnectivityReport) -> list[Table]:
    """The measures beside loss and LLFC that the report has, a row a layer."""
    tables = [
        _additivity(report),
        _commutativity(report),
        _stitching(report),
        _geometry(report, "weights"),
        _rank_one(report),
        _geometry(report, "features"),
        blocks_table(report),
        fold_table(report),
        importance_table(report),
        units_table(report),
        classes_table(report),
        settling_table(report),
    ]
    return [table for table in tables if table.rows]


def page_tables(report: ConnectivityReport) -> list[Table]:
    """What the page shows beside loss and LLFC: every measure, and the samples that carry the barrier."""
    samples = samples_table(report)
    return [*measure_tables(report), *([samples] if samples.rows else [])]


def _with_short_names(table: Table) -> Table:
    """The table where names are long: what most of them begin with is said in the title only."""
    names = [row[0] for row in table.rows]
    prefix = common_prefix(names)
    if max(map(len, names), default=0) <= LONG_NAME or not prefix:
        return table
    rows = tuple((name.removeprefix(prefix), *cells) for name, *cells in table.rows)
    return dataclasses.replace(table, title=f"{table.title} (short names: {prefix}*)", rows=rows)


def _models(report: ConnectivityReport) -> Table:
    """The models and their weights, where letters do not name them."""
    columns = (Column("name"), Column("model"), Column("weight"))
    if len(report.models) <= 2 and report.region == "line":
        return Table("models", "models", columns, ())
    rows = tuple(
        (name, model.id or NOTHING, weight_text(model.weight))
        for name, model in zip(model_names(report), report.models, strict=True)
    )
    return Table("models", "models", columns, rows, numbers=False)


def path_table(report: ConnectivityReport) -> Table:
    """Loss and metrics at every point; without rows where there were no labels."""
    on_line, metrics = report.region == "line", metric_names(report)
    losses = [known(point.loss) for point in report.path]
    has_loss = any(map(is_number, losses))
    rows = []
    for point, blend in zip(report.path, blend_of_models(report.path, losses), strict=True):
        name = f"{point.alpha:.3g}" if on_line else point_name(report, point)
        loss = (value_text(point.loss, LOSS), decimal_text(blend, 4)) if has_loss else ()
        rows.append((name, *loss, *(value_text(point.metrics.get(name), metric_style(name)) for name in metrics)))
    first, second = ([re.split(r"[/\\]", (m.id or "?").rstrip("/\\"))[-1] for m in report.models] + ["B"] * 2)[:2]
    of_loss = (Column("loss", "nats"), Column("blend", "of the models' losses")) if has_loss else ()
    return Table(
        "path",
        f"path: alpha of {first}, 1 - alpha of {second}" if on_line else "loss and metrics of merged models",
        (Column("alpha" if on_line else "point"), *of_loss, *(Column(metric_style(m).title, short=m) for m in metrics)),
        tuple(rows) if has_loss or metrics else (),
    )


def decomposition_table(report: ConnectivityReport) -> Table:
    """The barrier taken apart at every point, in nats; without rows where models do not choose from classes."""
    labelled = any(row.barrier is not None for row in report.decomposition)
    rows = tuple(
        (
            f"{row.alpha:.3g}" if report.region == "line" else point_name(report, row),
            value_text(row.gain.mean, LOSS),
            value_text((row.cost or row.divergence).mean, LOSS),
            *((_with_interval(row.barrier),) if row.barrier is not None else ()),
            _with_interval(row.estimate),
            value_text(row.bound.mean, LOSS),
            NOTHING if row.half_share is None else value_text(row.half_share, ERROR),
        )
        for row in report.decomposition
    )
    columns = (
        Column("alpha" if report.region == "line" else "point"),
        Column("gain", "of the ensemble"),
        Column("cost", "of non-linearity"),
        *((Column("barrier", "cost less gain, 95 % interval"),) if labelled else ()),
        Column("without labels", "estimate of the barrier, 95 % interval", "estimate"),
        Column("at most", "whatever the labels are"),
        Column("half in", "least share of samples that carries half"),
    )
    return Table("decomposition", "the barrier taken apart, in nats", columns, rows)


def _with_interval(statistic: Statistic) -> str:
    """A mean in nats with its interval."""
    mean = value_text(statistic.mean, LOSS)
    if statistic.interval is None:
        return mean
    return f"{mean} ({' to '.join(rounded(end, 3) for end in statistic.interval)})"


def layer_columns(rows: Sequence[LayerRow]) -> tuple[Column, ...]:
    """The columns of `layer_cells`."""
    return (
        Column("layer"),
        *_statistic_columns("LLFC", "1 − cos(merged, blend)", [row.llfc for row in rows]),
        Column("baseline", "1 − cos(A, B)"),
        Column("ratio", "LLFC / baseline"),
        Column("coefficient", "1: as large as the blend", "coef"),
        Column("±", "its standard deviation"),
    )


def layer_cells(row: LayerRow) -> tuple[str, ...]:
    """The numbers of one layer at one point."""
    return (
        *_statistic_cells(row.llfc),
        distance_text(row.baseline.mean),
        distance_text(row.ratio),
        decimal_text(row.coefficient.mean, 3),
        decimal_text(row.coefficient.std, 3),
    )


def _layers(report: ConnectivityReport) -> Table:
    rows, title = shown_layers(report), ""
    if rows:
        unit = report.data.get("unit") or "sample"
        where = (
            f"alpha = {rows[0].alpha:.3g}" if report.region == "line" else f"the point {point_name(report, rows[0])}"
        )
        title = f"layers at {where}, mean over {unit}s"
    return Table("layers", title, layer_columns(rows), tuple((row.layer, *layer_cells(row)) for row in rows))


def _statistic_columns(title: str, note: str, statistics: Sequence[Statistic]) -> tuple[Column, Column]:
    has_interval = any(statistic.interval is not None for statistic in statistics)
    return Column(title, note), Column("95 % interval", "of that mean") if has_interval else Column("± std")


def _statistic_cells(statistic: Statistic) -> tuple[str, str]:
    """A mean with its interval, or with its standard deviation where it has none."""
    if statistic.interval is None:
        return distance_text(statistic.mean), distance_text(statistic.std)
    return distance_text(statistic.mean), " to ".join(map(distance_text, statistic.interval))


def _additivity(report: ConnectivityReport) -> Table:
    rows = shown_additivity(report)
    return Table(
        "additivity",
        f"weak additivity at alpha = {rows[0].alpha:.3g}, mean over samples" if rows else "",
        (
            Column("activation"),
            *_statistic_columns("distance", "", [row.distance for row in rows]),
            Column("baseline", "between the parents"),
            Column("ratio"),
        ),
        tuple(_additivity_cells(row) for row in rows),
        "1 − cos between the activation of the blended inputs and the blend of the activations.",
    )


def _additivity_cells(row: AdditivityRow) -> tuple[str, ...]:
    ratio = row.distance.mean / row.baseline.mean if row.distance.mean is not None and row.baseline.mean else None
    name = row.layer + (" (gated)" if row.gated else "")
    return name, *_statistic_cells(row.distance), distance_text(row.baseline.mean), distance_text(ratio)


def _commutativity(report: ConnectivityReport) -> Table:
    return Table(
        "commutativity",
        "commutativity of linear maps",
        (Column("map"), Column("Dist_com"), Column("Dist_W", "weights"), Column("Dist_H", "inputs")),
        tuple((row.layer, *map(distance_text, (row.com, row.weights, row.features))) for row in report.commutativity),
        "Distance between W_A H_A + W_B H_B and W_A H_B + W_B H_A, beside the distances of weights and of inputs.",
    )


def _stitching(report: ConnectivityReport) -> Table:
    metrics = list(dict.fromkeys(name for point in report.stitching for name in point.metrics))
    rows = [(point.layer, point.loss, point.metrics) for point in report.stitching]
    if rows:
        alone = zip(("A alone", "B alone"), model_points(report), strict=False)
        rows += [(name, point.loss, point.metrics) for name, point in alone if point is not None]
    return Table(
        "stitching",
        "stitching, A up to and with the layer, then B",
        (Column("last layer of A"), Column("loss", "nats"), *(Column(metric_style(m).title, short=m) for m in metrics)),
        tuple(
            (name, value_text(loss, LOSS), *(value_text(values.get(m), metric_style(m)) for m in metrics))
            for name, loss, values in rows
        ),
        "Nothing is trained between the two parts.",
    )


def _geometry(report: ConnectivityReport, of: str) -> Table:
    """Ranks and angles of weights, of what they write and what they read, or of features."""
    read = {row.layer: row for row in report.geometry if row.of == f"{of}, inputs"}
    angles = ("written", "read") if of == "weights" else ("angles",)
    columns = [Column("map" if of == "weights" else "layer"), Column("rank A"), Column("rank B"), *map(Column, angles)]
    rows = [
        (
            row.layer,
            decimal_text(row.rank_a, 1),
            decimal_text(row.rank_b, 1),
            *map(_angles, (row, read.get(row.layer))[: len(angles)]),
        )
        for row in report.geometry
        if row.of == of
    ]
    return Table(
        f"geometry-{of}",
        f"{of}, effective rank and principal angles in degrees",
        tuple(columns),
        tuple(rows),
        "Smallest, median and largest principal angle between the leading subspaces of both models.",
    )


def _rank_one(report: ConnectivityReport) -> Table:
    """How near weights are to rank one, and whether each reads what the map before writes."""
    rows = tuple(
        (
            row.layer,
            *(decimal_text(share, 3) for share in (row.rank_one_a, row.rank_one_b)),
            *(decimal_text(turn, 1) for turn in (row.turn_a, row.turn_b)),
        )
        for row in report.geometry
        if row.rank_one_a is not None or row.rank_one_b is not None
    )
    columns = ("map", "rank one A", "rank one B", "turn A", "turn B")
    note = "Share of the largest singular value; angle between what the map before writes most and this one reads most."
    return Table(
        "rank-one", "rank-one share of weights, and what follows what", tuple(map(Column, columns)), rows, note
    )


def _angles(row: GeometryRow | None) -> str:
    """Smallest, median and largest."""
    if row is None or not row.angles:
        return NOTHING
    chosen = (min(row.angles), median(row.angles), max(row.angles))
    return " / ".join(f"{angle:.2g}" for angle in chosen)


def _suggestion(report: ConnectivityReport) -> Table:
    by_pattern: Mapping[str, Sequence[float]] = {}
    if report.suggestion is not None:
        weights, by_pattern = report.suggestion.weights, report.suggestion.layer_weights
        by_pattern = by_pattern or ({"all tensors": weights} if weights is not None else {})
    rows = tuple((pattern or "all others", weights_text(weights)) for pattern, weights in by_pattern.items())
    return Table("suggestion", "suggested weights", (Column("tensors"), Column("weights")), rows, numbers=False)


def _barrier(report: ConnectivityReport) -> Table:
    heights = [("loss", report.barrier.loss, LOSS), ("error", report.barrier.error, ERROR)]
    rows = tuple((of, NOTHING if height is None else height_text(height, style)) for of, height, style in heights)
    is_known = any(height is not None for _, height, _ in heights)
    return Table("barrier", "barrier", (Column("of"), Column("height")), rows if is_known else ())
