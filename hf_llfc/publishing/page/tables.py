"""Everything that was measured, as tables of texts, which begin with the number to sort by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import GeometryRow, LayerRow, Statistic
from hf_llfc.publishing.reading import (
    LOSS,
    blend_of_models,
    metric_names,
    metric_style,
    number_text,
    point_name,
    shown_additivity,
)
from hf_llfc.publishing.tables import decimal_text, distance_text


@dataclass(frozen=True)
class Column:
    """What a column holds.

    Args:
        title: Its heading.
        says: What it is, in a few words.
    """

    title: str
    says: str = ""


@dataclass(frozen=True)
class Table:
    """A table of which every row is a layer, or a point of the path.

    Args:
        key: Names it in the page.
        title: Its heading.
        says: How to read it.
        columns: The first names the rows.
        rows: Name of the row, and a text for every further column.
    """

    key: str
    title: str
    says: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def spread(found: Statistic) -> str:
    """The interval of a mean, or the standard deviation where there is none."""
    if found.interval is None:
        return distance_text(found.std)
    low, high = found.interval
    return f"{distance_text(low)} to {distance_text(high)}"


def layer_columns(rows: Sequence[LayerRow]) -> tuple[Column, ...]:
    """The columns of `layer_cells`."""
    has_interval = any(row.llfc.interval is not None for row in rows)
    return (
        Column("layer"),
        Column("LLFC", "1 − cos(merged, blend)"),
        Column("95 % interval", "of that mean") if has_interval else Column("± std", "over samples"),
        Column("baseline", "1 − cos(A, B)"),
        Column("ratio", "LLFC / baseline"),
        Column("coefficient", "1: as large as the blend"),
        Column("±", "its standard deviation"),
    )


def layer_cells(row: LayerRow) -> tuple[str, ...]:
    """What is known of one layer at one point."""
    return (
        distance_text(row.llfc.mean),
        spread(row.llfc),
        distance_text(row.baseline.mean),
        distance_text(row.ratio),
        decimal_text(row.coefficient.mean, ".3f"),
        decimal_text(row.coefficient.std, ".3f"),
    )


def path_table(report: ConnectivityReport) -> Table | None:
    """Loss and metrics at every point; None where there were no labels."""
    metrics = metric_names(report)
    losses = [math.nan if point.loss is None else point.loss for point in report.path]
    if not metrics and not any(math.isfinite(loss) for loss in losses):
        return None
    rows = tuple(
        (
            point_name(report, point),
            (
                number_text(point.loss, LOSS),
                decimal_text(blend, ".4f"),
                *(number_text(point.metrics.get(name), metric_style(name)) for name in metrics),
            ),
        )
        for point, blend in zip(report.path, blend_of_models(report.path, losses), strict=True)
    )
    columns = (
        Column("point"),
        Column("loss", "nats"),
        Column("blend", "of the models' losses"),
        *(Column(metric_style(name).title) for name in metrics),
    )
    return Table("path", "The path as numbers", "", columns, rows)


def measure_tables(report: ConnectivityReport) -> list[Table]:
    """The further measures that a report has."""
    return [
        table
        for table in (
            _additivity(report),
            _commutativity(report),
            _stitching(report),
            _geometry(report, "weights"),
            _geometry(report, "features"),
        )
        if table.rows
    ]


def _additivity(report: ConnectivityReport) -> Table:
    found = shown_additivity(report)
    where = f"At α = {found[0].alpha:.3g}: " if found else ""
    return Table(
        "additivity",
        "Weak additivity of activation functions",
        f"{where}1 − cos between the activation of the blended inputs and the blend of the activations.",
        (Column("activation"), Column("distance"), Column("baseline", "between the parents"), Column("ratio")),
        tuple(
            (
                row.layer + (" (gated)" if row.gated else ""),
                (
                    distance_text(row.distance.mean),
                    distance_text(row.baseline.mean),
                    distance_text(
                        row.distance.mean / row.baseline.mean
                        if row.distance.mean is not None and row.baseline.mean
                        else None
                    ),
                ),
            )
            for row in found
        ),
    )


def _commutativity(report: ConnectivityReport) -> Table:
    return Table(
        "commutativity",
        "Commutativity of linear maps",
        "How far W_A H_A + W_B H_B is from W_A H_B + W_B H_A, beside the distances of weights and of inputs.",
        (Column("map"), Column("Dist_com"), Column("Dist_W", "weights"), Column("Dist_H", "inputs")),
        tuple(
            (row.layer, (distance_text(row.com), distance_text(row.weights), distance_text(row.features)))
            for row in report.commutativity
        ),
    )


def _stitching(report: ConnectivityReport) -> Table:
    metrics = list(dict.fromkeys(name for point in report.stitching for name in point.metrics))
    return Table(
        "stitching",
        "Stitching",
        "A up to and with the layer, then B, without an adapter between.",
        (Column("last layer of A"), Column("loss", "nats"), *(Column(metric_style(name).title) for name in metrics)),
        tuple(
            (
                point.layer,
                (
                    number_text(point.loss, LOSS),
                    *(
                        number_text(value, metric_style(name))
                        for name, value in ((name, point.metrics.get(name)) for name in metrics)
                    ),
                ),
            )
            for point in report.stitching
        ),
    )


def _geometry(report: ConnectivityReport, of: str) -> Table:
    rows = [row for row in report.geometry if row.of == of]
    read = {row.layer: row for row in report.geometry if row.of == f"{of}, inputs"}
    columns = [Column("map" if of == "weights" else "layer"), Column("rank A", "effective"), Column("rank B")]
    columns += [Column(name, "median angle, degrees") for name in (("written", "read") if read else ("angle",))]
    return Table(
        f"geometry-{of}",
        f"Geometry of {of}",
        "Effective ranks, and the median principal angle between the leading subspaces of both models.",
        tuple(columns),
        tuple(
            (
                row.layer,
                (
                    decimal_text(row.rank_a, ".1f"),
                    decimal_text(row.rank_b, ".1f"),
                    _median_angle(row),
                    *([_median_angle(read.get(row.layer))] if read else []),
                ),
            )
            for row in rows
        ),
    )


def _median_angle(row: GeometryRow | None) -> str:
    return decimal_text(statistics.median(row.angles), ".1f") if row is not None and row.angles else "–"
