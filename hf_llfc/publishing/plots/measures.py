"""What lies behind LLFC, layer by layer: additivity, commutativity, stitching, and where weights and features lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import AdditivityRow, GeometryRow
from hf_llfc.publishing.facts import LOSS, MetricStyle, merge_alpha, metric_style, model_points
from hf_llfc.publishing.plots.canvas import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    VERMILION,
    draw_legend,
    known,
    plain_name,
)
from hf_llfc.publishing.plots.layer_axis import LayerGrid, layer_grid
from hf_llfc.publishing.plots.path import label_values
from hf_llfc.publishing.plots.series import LogScale, Series, draw_distances, marker_size, spread_note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_additivity(report: ConnectivityReport) -> Figure | None:
    """Weak additivity of every activation function against its baseline, at the α nearest to the merge.

    Args:
        report: The report.

    Returns:
        The figure; None if additivity was not measured.
    """
    rows = shown_additivity(report)
    if not rows:
        return None
    series = (
        Series.of(
            "1 − cos(σ(h$_A$), σ(h$_B$)): the parents apart", [row.baseline for row in rows], MUTED, "--s", ratio=True
        ),
        Series.of(
            "1 − cos(σ(blend), blend of σ): 0 is additive", [row.distance for row in rows], BLUE, "-o", ratio=True
        ),
    )
    gated = {True: "gated units", False: "activation functions"}
    what = " and ".join(gated[kind] for kind in (False, True) if kind in {row.gated for row in rows})
    statistics = [statistic for row in rows for statistic in (row.distance, row.baseline)]
    return _distances(
        [row.layer for row in rows],
        series,
        heading=f"Weak additivity of {what}, α = {rows[0].alpha:.3g}",
        quantity="1 − cosine",
        note=spread_note(statistics, ratio=True),
    )


def shown_additivity(report: ConnectivityReport) -> list[AdditivityRow]:
    """One row a layer, at the measured α that is nearest to the merge, or to the middle."""
    wanted = merge_alpha(report)
    wanted = 0.5 if wanted is None else wanted
    nearest = min(
        (row.alpha for row in report.additivity), key=lambda alpha: (abs(alpha - wanted), alpha), default=None
    )
    return [row for row in report.additivity if row.alpha == nearest]


def plot_commutativity(report: ConnectivityReport) -> Figure | None:
    """Dist_com of every linear map beside Dist_W of its weights and Dist_H of its inputs.

    Args:
        report: The report.

    Returns:
        The figure; None if commutativity was not measured.
    """
    rows = report.commutativity
    if not rows:
        return None
    series = (
        Series("Dist$_W$: weights of A and B", tuple(known(row.weights) for row in rows), VERMILION, "--s"),
        Series("Dist$_H$: their inputs", tuple(known(row.features) for row in rows), GREEN, "-.^"),
        Series("Dist$_{com}$: 0 is commutative", tuple(known(row.com) for row in rows), BLUE, "-o"),
    )
    return _distances(
        [row.layer for row in rows],
        series,
        heading="Commutativity of linear maps: $W_A H_A + W_B H_B$ against $W_A H_B + W_B H_A$",
        quantity="‖x − y‖² / (‖x‖‖y‖)",
    )


def _distances(
    names: Sequence[str], series: Sequence[Series], *, heading: str, quantity: str, note: str = ""
) -> Figure:
    scale = LogScale.of(series)
    grid = layer_grid(names, heights=(2.4,), heading=heading)
    for panel, (axis,) in grid:
        draw_distances(axis, [each.part(panel.indices) for each in series], scale, columns=grid.columns)
    for stack in grid.left:
        stack[0].set_ylabel(quantity)
    draw_legend(grid.figure, grid.top, columns=4, title=(grid.note, note))
    return grid.figure


def plot_stitching(report: ConnectivityReport) -> Figure | None:
    """Loss and first metric of A up to a layer and B from there on, with those of A and B themselves.

    Args:
        report: The report.

    Returns:
        The figure; None if stitching was not measured or has no value.
    """
    points = report.stitching
    metrics = list(dict.fromkeys(name for point in points for name in point.metrics))
    panels: list[tuple[MetricStyle, list[float], list[float]]] = [
        (LOSS, [known(point.loss) for point in points], _parents(report, None))
    ]
    for name in metrics[:1]:
        values = [known(point.metrics.get(name)) for point in points]
        panels.append((metric_style(name), values, _parents(report, name)))
    panels = [panel for panel in panels if any(math.isfinite(value) for value in panel[1])]
    if not panels:
        return None
    grid = layer_grid(
        [point.layer for point in points],
        heights=(1.7,) * len(panels),
        heading="A up to and with the layer, B from there on, nothing trained between",
    )
    for panel, axes in grid:
        for axis, (_, values, parents) in zip(axes, panels, strict=True):
            _draw_stitches(axis, [values[index] for index in panel.indices], parents, report, grid.columns)
    for stack in grid.left:
        for axis, (style, values, parents) in zip(stack, panels, strict=True):
            label_values(axis, axis.yaxis, style, [*values, *parents])
    draw_legend(grid.figure, grid.top, columns=3, title=(grid.note,))
    return grid.figure


def _parents(report: ConnectivityReport, metric: str | None) -> list[float]:
    """The loss or a metric of the first and the second model, NaN where it was not measured."""
    points = [*model_points(report), None, None][:2]
    return [math.nan if point is None else known(point.loss if metric is None else point.metrics.get(metric))
            for point in points]  # fmt: skip


def _draw_stitches(
    axis: Axes, values: Sequence[float], parents: Sequence[float], report: ConnectivityReport, columns: int
) -> None:
    for place, (letter, style, colour) in enumerate((("A", "--", INK), ("B", ":", INK))):
        name = f": {plain_name(report.models[place].id, 21)}" if place < len(report.models) else ""
        if math.isfinite(parents[place]):
            axis.axhline(parents[place], color=colour, linestyle=style, linewidth=1.6, label=f"{letter} alone{name}")
    size = marker_size(len(values) * columns)
    axis.plot(range(len(values)), values, "-o", color=BLUE, linewidth=2, markersize=size, label="stitched")
    axis.margins(y=0.12)


def plot_weight_geometry(report: ConnectivityReport) -> Figure | None:
    """Effective rank of both models' weights and the principal angles between their leading subspaces.

    Args:
        report: The report.

    Returns:
        The figure; None if this was not measured.
    """
    return _geometry(report, "weights", "Weights of A and B")


def plot_feature_geometry(report: ConnectivityReport) -> Figure | None:
    """Effective rank of both models' features and the principal angles between their leading subspaces.

    Args:
        report: The report.

    Returns:
        The figure; None if this was not measured.
    """
    return _geometry(report, "features", "Features of A and B")


def _geometry(report: ConnectivityReport, of: str, heading: str) -> Figure | None:
    rows = [row for row in report.geometry if row.of == of]
    if not rows:
        return None
    count = max(len(row.angles) for row in rows)
    has_angles = count > 0
    grid = layer_grid(
        [row.layer for row in rows],
        heights=(1.5, 1.5) if has_angles else (2.4,),
        heading=f"{heading}: effective rank" + (", and angles between leading subspaces" if has_angles else ""),
    )
    for panel, axes in grid:
        part = [rows[index] for index in panel.indices]
        _draw_ranks(axes[0], part, grid.columns)
        if has_angles:
            _draw_angles(axes[1], part, grid.columns)
    _set_rank_scale(grid, rows)
    for stack in grid.left:
        stack[0].set_ylabel("effective rank")
        if has_angles:
            stack[1].set_ylabel("principal angles")
    draw_legend(grid.figure, [axis for stack in grid.axes for axis in stack], columns=4, title=(grid.note,))
    return grid.figure


def _draw_ranks(axis: Axes, rows: Sequence[GeometryRow], columns: int) -> None:
    size = marker_size(len(rows) * columns)
    for label, ranks, colour, style in (
        ("rank of A", [row.rank_a for row in rows], BLUE, "-o"),
        ("rank of B", [row.rank_b for row in rows], VERMILION, "--s"),
    ):
        axis.plot(range(len(rows)), ranks, style, color=colour, linewidth=2, markersize=size, label=label)


def _set_rank_scale(grid: LayerGrid, rows: Sequence[GeometryRow]) -> None:
    """From zero, so that heights compare."""
    highest = max(max(row.rank_a, row.rank_b) for row in rows)
    grid.axes[0][0].set_ylim(0, 1.1 * highest)


def _draw_angles(axis: Axes, rows: Sequence[GeometryRow], columns: int) -> None:
    """The median angle, and a band from the smallest to the largest."""
    positions = [place for place, row in enumerate(rows) if row.angles]
    angles = [sorted(row.angles) for row in rows if row.angles]
    middle = [(each[(len(each) - 1) // 2] + each[len(each) // 2]) / 2 for each in angles]
    axis.fill_between(
        positions, [each[0] for each in angles], [each[-1] for each in angles], color=GREEN, alpha=0.2, linewidth=0,
        label="smallest to largest angle",
    )  # fmt: skip
    size = marker_size(len(rows) * columns)
    axis.plot(positions, middle, "-^", color=GREEN, linewidth=2, markersize=size, label="median angle")
    axis.set_ylim(-4, 94)
    axis.set_yticks([0, 30, 60, 90], ["0°", "30°", "60°", "90°"])
