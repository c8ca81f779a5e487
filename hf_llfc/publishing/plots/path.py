"""Loss and metric where models are merged: over α on a line, point by point elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import PathPoint
from hf_llfc.publishing.plots.canvas import (
    BLUE,
    FONT_SIZE,
    GROUND,
    INK,
    MUTED,
    VERMILION,
    draw_legend,
    known,
    literal,
    new_figure,
    plain_axes,
    plain_name,
    plot_style,
)
from hf_llfc.publishing.reading import (
    LOSS,
    MetricStyle,
    blend_of_models,
    is_model,
    merge_point,
    metric_names,
    metric_style,
    point_name,
    point_weights,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

VISIBLE_BARRIER = 0.08
"""Of the height of what is drawn. A barrier that is not seen beside the whole is told in the card's table only."""
LEGEND_ORDER = (
    "measured on the path", "straight line between the parents", "model", "merged", "blend of the models' values",
    "worse than the line", "worse than the blend", "this merge",
)  # fmt: skip

Panel = tuple[MetricStyle, list[float]]


def plot_path(report: ConnectivityReport) -> Figure | None:
    """Loss and first metric of merged models, with the blend of the parents' values and the barrier shaded.

    On a line both are curves over α and the blend is the straight line between the ends. Over a simplex, and for sums
    of task vectors, every point is a row by its name.

    Args:
        report: The report.

    Returns:
        The figure; None if the path has fewer than two points with a loss or a metric.
    """
    panels = path_panels(report)
    if not panels:
        return None
    on_line = report.region == "line"
    figure = new_figure(3.5 if on_line else 1.5 + 0.27 * max(4, len(report.path)))
    with plot_style():
        axes: Sequence[Axes] = figure.subplots(1, len(panels), squeeze=False, sharey=not on_line)[0]
    for axis, (style, values) in zip(axes, panels, strict=True):
        plain_axes(axis)
        (_draw_line if on_line else _draw_points)(axis, report, style, values)
    draw_legend(figure, axes, columns=4, order=LEGEND_ORDER)
    return figure


def path_panels(report: ConnectivityReport) -> list[Panel]:
    """Loss and the first metric with one value a point, those of which at least two were measured."""
    panels: list[Panel] = [(LOSS, [known(point.loss) for point in report.path])]
    for name in metric_names(report)[:1]:
        panels.append((metric_style(name), [known(point.metrics.get(name)) for point in report.path]))
    return [panel for panel in panels if sum(math.isfinite(value) for value in panel[1]) >= 2]


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


def _heights(style: MetricStyle, values: Sequence[float], blends: Sequence[float]) -> list[float]:
    """By how much every value is worse than the blend; NaN where that is not known."""
    if style.higher_is_better is None:
        return [math.nan for _ in values]
    sign = -1.0 if style.higher_is_better else 1.0
    return [sign * (value - blend) for value, blend in zip(values, blends, strict=True)]


def _barrier(style: MetricStyle, values: Sequence[float], blends: Sequence[float]) -> tuple[int, str] | None:
    """Where the barrier is, and its height as text; None if it is not seen beside the whole."""
    heights = _heights(style, values, blends)
    at = max(range(len(values)), key=lambda index: heights[index] if math.isfinite(heights[index]) else -math.inf)
    finite = [value for value in (*values, *blends) if math.isfinite(value)]
    if not heights[at] > VISIBLE_BARRIER * (max(finite) - min(finite)):
        return None
    return at, f"{100 * heights[at]:.3g} points" if style.percent else f"{heights[at]:.3g}"


def _draw_line(axis: Axes, report: ConnectivityReport, style: MetricStyle, values: Sequence[float]) -> None:
    alphas = [point.alpha for point in report.path]
    line = blend_of_models(report.path, values)
    if all(math.isfinite(value) for value in line):
        axis.plot(alphas, line, "--", color=MUTED, linewidth=1.6, label="straight line between the parents")
        heights = _heights(style, values, line)
        finite = [value for value in (*values, *line) if math.isfinite(value)]
        visible = any(height > 0.01 * (max(finite) - min(finite)) for height in heights)
        axis.fill_between(
            alphas, values, line, where=[height > 0 for height in heights], interpolate=True, color=VERMILION,
            alpha=0.17, linewidth=0, label="worse than the line" if visible else None,
        )  # fmt: skip
        _mark_barrier(axis, alphas, values, line, style)
    axis.plot(alphas, values, "-o", color=BLUE, linewidth=2, markersize=4, label="measured on the path")
    merged = merge_point(report)
    if merged is not None and math.isfinite(value := values[report.path.index(merged)]):
        axis.plot(
            [merged.alpha], [value], "D", color=GROUND, markeredgecolor=INK, markeredgewidth=1.6, markersize=7.5,
            label="this merge", zorder=5, linestyle="none",
        )  # fmt: skip
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
    axis.set_title(f"{style.title[:1].upper()}{style.title[1:]} along the path", loc="left")
    label_values(axis, axis.yaxis, style, values)


def _mark_barrier(
    axis: Axes, alphas: Sequence[float], values: Sequence[float], line: Sequence[float], style: MetricStyle
) -> None:
    """An arrow where the path is farthest on the wrong side of the straight line, with the height beside it."""
    barrier = _barrier(style, values, line)
    if barrier is None:
        return
    at, amount = barrier
    arrow = {"arrowstyle": "<->", "color": INK, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", (alphas[at], values[at]), (alphas[at], line[at]), arrowprops=arrow)
    above = values[at] > line[at]
    axis.annotate(
        f"barrier {amount}", (alphas[at], values[at]), (0, 8 if above else -8), textcoords="offset points",
        ha="left" if alphas[at] < 0.2 else "right" if alphas[at] > 0.8 else "center",
        va="bottom" if above else "top", fontsize=FONT_SIZE - 1, color=INK,
        bbox={"facecolor": GROUND, "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
    )  # fmt: skip
    # Room for the words beyond the curve.
    finite = [value for value in (*values, *line) if math.isfinite(value)]
    room = 0.16 * (max(finite) - min(finite))
    axis.update_datalim([(alphas[at], values[at] + (room if above else -room))])


def _draw_points(axis: Axes, report: ConnectivityReport, style: MetricStyle, values: Sequence[float]) -> None:
    """One row a point, the first on top: its value, the blend of the models' own, and the way between."""
    blends = blend_of_models(report.path, values)
    heights = _heights(style, values, blends)
    kinds = ["model" if is_model(point) else "merged" for point in report.path]
    places = list(range(len(values)))
    merged = [place for place in places if kinds[place] == "merged" and math.isfinite(blends[place])]
    worse = [place for place in merged if heights[place] > 0]
    axis.hlines(
        worse, [blends[place] for place in worse], [values[place] for place in worse], color=VERMILION, alpha=0.35,
        linewidth=6, label="worse than the blend" if worse else "",
    )  # fmt: skip
    axis.plot(
        [blends[place] for place in merged], merged, "|", color=INK, markersize=13, markeredgewidth=1.6,
        label="blend of the models' values", linestyle="none",
    )  # fmt: skip
    for kind, marker, colour in (("model", "s", MUTED), ("merged", "o", BLUE)):
        own = [place for place in places if kinds[place] == kind]
        axis.plot([values[place] for place in own], own, marker, color=colour, markersize=6.5, label=kind)
    point = merge_point(report)
    if point is not None and math.isfinite(value := values[report.path.index(point)]):
        axis.plot(
            [value], [report.path.index(point)], "D", color=GROUND, markeredgecolor=INK, markeredgewidth=1.6,
            markersize=7.5, label="this merge", linestyle="none",
        )  # fmt: skip
    barrier = _barrier(style, values, blends)
    if barrier is not None:
        at, amount = barrier
        finite = [value for value in (*values, *blends) if math.isfinite(value)]
        to_left = (values[at] + blends[at]) / 2 > (min(finite) + max(finite)) / 2
        end = (min if to_left else max)(values[at], blends[at])
        axis.annotate(
            f"barrier {amount}", (end, at), (-9 if to_left else 9, 0), textcoords="offset points", va="center",
            ha="right" if to_left else "left", fontsize=FONT_SIZE - 1, color=INK,
        )  # fmt: skip
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.set_yticks(places, [_row_name(report, point) for point in report.path])
    axis.margins(x=0.08)
    axis.set_title(f"{style.title[:1].upper()}{style.title[1:]} of merged models", loc="left")
    label_values(axis, axis.xaxis, style, values)


def _row_name(report: ConnectivityReport, point: PathPoint) -> str:
    """A model with the name that it has on disk or on the Hub, so that numbers say which it is."""
    name = literal(point_name(report, point))
    weights = point_weights(point)
    if not is_model(point) or len(weights) != len(report.models):
        return name
    return f"{name}: {plain_name(report.models[weights.index(max(weights))].id, 18)}"
