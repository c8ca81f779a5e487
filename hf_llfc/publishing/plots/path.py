"""Loss and metric where models are merged: over α on a line, point by point elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import PathPoint
from hf_llfc.publishing.numbers import LOSS, MetricStyle, capitalized
from hf_llfc.publishing.path import Curve, path_curves
from hf_llfc.publishing.plots.canvas import (
    BLUE,
    FONT_SIZE,
    GROUND,
    INK,
    MUTED,
    VERMILION,
    draw_legend,
    literal,
    new_figure,
    plain_axes,
    plain_name,
    plot_style,
)
from hf_llfc.publishing.reading import is_model, point_model, point_name, point_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

LEGEND_ORDER = (
    "measured on the path", "straight line between the parents", "model", "merged", "blend of the models' values",
    "worse than the line", "worse than the blend", "this merge",
)  # fmt: skip


def plot_path(report: ConnectivityReport) -> Figure | None:
    """Loss and first metric of merged models, with the blend of the parents' values and the barrier shaded.

    On a line both are curves over α and the blend is the straight line between the ends. Over a simplex, and for sums
    of task vectors, every point is a row by its name.

    Args:
        report: The report.

    Returns:
        The figure; None if the path has fewer than two points with a loss or a metric.
    """
    curves = path_curves(report, metrics=1)
    if not curves:
        return None
    on_line = report.region == "line"
    figure = new_figure(3.5 if on_line else 1.5 + 0.27 * max(4, len(report.path)))
    with plot_style():
        axes: Sequence[Axes] = figure.subplots(1, len(curves), squeeze=False, sharey=not on_line)[0]
    for axis, curve in zip(axes, curves, strict=True):
        plain_axes(axis)
        (_draw_line if on_line else _draw_points)(axis, report, curve)
        axis.set_title(capitalized(curve.title), loc="left")
        label_values(axis, axis.yaxis if on_line else axis.xaxis, curve.style, curve.values)
    draw_legend(figure, axes, columns=4, order=LEGEND_ORDER)
    return figure


def label_values(axis: Axes, along: Axis, style: MetricStyle, values: Sequence[float]) -> None:
    """Says what the values are and in which unit."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    if style.percent:
        finite = [value for value in values if math.isfinite(value)]
        span = max(finite) - min(finite)
        decimals = 0 if span > 0.08 else 1 if span > 0.008 else 2
        # No steps of two and a half, which would be rounded.
        along.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
        along.set_major_formatter(PercentFormatter(xmax=1.0, decimals=decimals, symbol=" %"))
    along.set_label_text("loss (nats)" if style is LOSS else style.title)


def _draw_line(axis: Axes, report: ConnectivityReport, curve: Curve) -> None:
    alphas = [point.alpha for point in curve.points]
    if curve.has_blend:
        axis.plot(alphas, curve.blends, "--", color=MUTED, linewidth=1.6, label="straight line between the parents")
        visible = any(height > 0.01 * curve.span for height in curve.heights)
        axis.fill_between(
            alphas, curve.values, curve.blends, where=[height > 0 for height in curve.heights], interpolate=True,
            color=VERMILION, alpha=0.17, linewidth=0, label="worse than the line" if visible else None,
        )  # fmt: skip
        _mark_barrier(axis, alphas, curve)
    axis.plot(alphas, curve.values, "-o", color=BLUE, linewidth=2, markersize=4, label="measured on the path")
    _mark_merge(axis, curve, alphas, curve.values)
    axis.set_xlim(-0.04, 1.04)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
    axis.margins(y=0.12)
    axis.set_xlabel("α, weight of the first model")
    if len(report.models) == 2:
        for model, at, side in ((report.models[1], 0.0, "left"), (report.models[0], 1.0, "right")):
            axis.annotate(
                plain_name(model.id, 21), (at, 0), (0, -22), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha=side, va="top", fontsize=FONT_SIZE - 2, color=MUTED,
            )  # fmt: skip
        axis.xaxis.labelpad = 16


def _mark_merge(axis: Axes, curve: Curve, x: Sequence[float], y: Sequence[float]) -> None:
    """Draws a diamond where the merge is that is published."""
    for index, (kind, value) in enumerate(zip(curve.kinds, curve.values, strict=True)):
        if kind == "merge" and math.isfinite(value):
            axis.plot(
                [x[index]], [y[index]], "D", color=GROUND, markeredgecolor=INK, markeredgewidth=1.6, markersize=7.5,
                label="this merge", zorder=5, linestyle="none",
            )  # fmt: skip


def _mark_barrier(axis: Axes, alphas: Sequence[float], curve: Curve) -> None:
    """An arrow where the path is farthest on the wrong side of the straight line, with the height beside it."""
    if curve.visible_barrier is None:
        return
    index, text = curve.visible_barrier
    alpha, value, blend = alphas[index], curve.values[index], curve.blends[index]
    arrow = {"arrowstyle": "<->", "color": INK, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", (alpha, value), (alpha, blend), arrowprops=arrow)
    above = value > blend
    axis.annotate(
        f"barrier {text}", (alpha, value), (0, 8 if above else -8), textcoords="offset points",
        ha="left" if alpha < 0.2 else "right" if alpha > 0.8 else "center",
        va="bottom" if above else "top", fontsize=FONT_SIZE - 1, color=INK,
        bbox={"facecolor": GROUND, "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
    )  # fmt: skip
    # Room for the words beyond the curve.
    room = 0.16 * curve.span
    axis.update_datalim([(alpha, value + (room if above else -room))])


def _draw_points(axis: Axes, report: ConnectivityReport, curve: Curve) -> None:
    """One row a point, the first on top: its value, the blend of the models' own, and the way between."""
    rows = range(len(curve.values))
    merged = [row for row in rows if curve.kinds[row] != "parent" and math.isfinite(curve.blends[row])]
    worse = [row for row in merged if curve.heights[row] > 0]
    axis.hlines(
        worse, [curve.blends[row] for row in worse], [curve.values[row] for row in worse], color=VERMILION, alpha=0.35,
        linewidth=6, label="worse than the blend" if worse else "",
    )  # fmt: skip
    axis.plot(
        [curve.blends[row] for row in merged], merged, "|", color=INK, markersize=13, markeredgewidth=1.6,
        label="blend of the models' values", linestyle="none",
    )  # fmt: skip
    for is_parent, label, marker, colour in ((True, "model", "s", MUTED), (False, "merged", "o", BLUE)):
        own = [row for row in rows if (curve.kinds[row] == "parent") == is_parent]
        axis.plot([curve.values[row] for row in own], own, marker, color=colour, markersize=6.5, label=label)
    _mark_merge(axis, curve, curve.values, rows)
    if curve.visible_barrier is not None:
        row, text = curve.visible_barrier
        ends = (curve.values[row], curve.blends[row])
        to_left = sum(ends) > sum(curve.limits)
        axis.annotate(
            f"barrier {text}", ((min if to_left else max)(ends), row), (-9 if to_left else 9, 0),
            textcoords="offset points", va="center", ha="right" if to_left else "left", color=INK,
            fontsize=FONT_SIZE - 1,
        )  # fmt: skip
    axis.set_ylim(len(curve.values) - 0.5, -0.5)
    axis.set_yticks(list(rows), [_row_name(report, point) for point in curve.points])
    axis.margins(x=0.08)


def _row_name(report: ConnectivityReport, point: PathPoint) -> str:
    """A model with the name that it has on disk or on the Hub, so that numbers say which it is."""
    name = literal(point_name(report, point))
    if not is_model(point) or len(point_weights(point)) != len(report.models):
        return name
    return f"{name}: {plain_name(report.models[point_model(point)].id, 18)}"
