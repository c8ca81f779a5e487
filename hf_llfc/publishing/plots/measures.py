"""What lies behind LLFC, layer by layer: additivity, commutativity, and stitching."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import PathPoint, StitchingPoint
from hf_llfc.publishing.numbers import LOSS, known, metric_style
from hf_llfc.publishing.plots.canvas import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    VERMILION,
    draw_legend,
    plain_name,
)
from hf_llfc.publishing.plots.layer_axis import layer_grid
from hf_llfc.publishing.plots.path import label_values
from hf_llfc.publishing.plots.series import LogScale, Series, draw_distances, draw_line, spread_note
from hf_llfc.publishing.reading import model_points, shown_additivity

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
        note=spread_note(statistics, ratio=True, unit="sample"),
    )


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
        draw_distances(axis, [line.part(panel) for line in series], scale, size=grid.marker_size(panel))
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
    metrics = list(dict.fromkeys(name for point in report.stitching for name in point.metrics))
    panels = [
        (LOSS if name is None else metric_style(name), _values(report.stitching, name), _parents(report, name))
        for name in (None, *metrics[:1])
    ]
    panels = [panel for panel in panels if any(map(math.isfinite, panel[1]))]
    if not panels:
        return None
    grid = layer_grid(
        [point.layer for point in report.stitching],
        heights=(1.7,) * len(panels),
        heading="A up to and with the layer, B from there on, nothing trained between",
    )
    for panel, axes in grid:
        for axis, (_, values, parents) in zip(axes, panels, strict=True):
            _draw_parents(axis, parents, report)
            draw_line(axis, Series("stitched", values, BLUE, "-o").part(panel), grid.marker_size(panel))
            axis.margins(y=0.12)
    for stack in grid.left:
        for axis, (style, values, parents) in zip(stack, panels, strict=True):
            label_values(axis, axis.yaxis, style, [*values, *parents])
    draw_legend(grid.figure, grid.top, columns=3, title=(grid.note,))
    return grid.figure


def _values(points: Iterable[StitchingPoint | PathPoint | None], metric: str | None) -> tuple[float, ...]:
    """The loss or a metric of every point, NaN where it was not measured."""
    return tuple(
        math.nan if point is None else known(point.loss if metric is None else point.metrics.get(metric))
        for point in points
    )


def _parents(report: ConnectivityReport, metric: str | None) -> tuple[float, ...]:
    """The loss or a metric of the first and the second model."""
    return _values([*model_points(report), None, None][:2], metric)


def _draw_parents(axis: Axes, parents: Sequence[float], report: ConnectivityReport) -> None:
    for index, (letter, style) in enumerate((("A", "--"), ("B", ":"))):
        name = f": {plain_name(report.models[index].id, 21)}" if index < len(report.models) else ""
        if math.isfinite(parents[index]):
            axis.axhline(parents[index], color=INK, linestyle=style, linewidth=1.6, label=f"{letter} alone{name}")
