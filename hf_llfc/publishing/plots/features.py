"""Features layer by layer: LLFC against its baseline with the coefficient, and LLFC over all measured points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import LayerRow
from hf_llfc.publishing.numbers import SMALLEST_SHOWN, cell_text, known
from hf_llfc.publishing.plots.canvas import (
    BLUE,
    FONT_SIZE,
    GREEN,
    GROUND,
    INK,
    MUTED,
    SMALL_FONT,
    WIDTH_INCHES,
    draw_legend,
    literal,
)
from hf_llfc.publishing.plots.layer_axis import LayerPanel, layer_grid
from hf_llfc.publishing.plots.series import (
    LogScale,
    Series,
    draw_around_one,
    draw_distances,
    limits_around_one,
    spread_note,
)
from hf_llfc.publishing.reading import is_model, point_name, point_weights, shown_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALLEST_CELL = 0.42
"""Inches; narrower cells of the heat map do not hold their number."""
WIDEST_RATIO = 1000.0
"""Ratios beyond this, and below its inverse, are drawn in one colour."""
MIDDLE_LUMINANCE = 0.22
"""Where dark and light text contrast equally with what is behind them."""
MISSING = "#b6bbc1"
"""Cells without a value."""


def plot_layers(report: ConnectivityReport) -> Figure | None:
    """1 − cos(merged, blend) against 1 − cos(A, B), layer by layer, and the coefficient below.

    Args:
        report: The report.

    Returns:
        The figure; None if the report has no layers between the ends of the path.
    """
    rows = shown_layers(report)
    if not rows:
        return None
    between = (
        "1 − cos(A, B): the parents apart" if report.region == "line" else "1 − cos, mean over pairs: the models apart"
    )
    distances = (
        Series.of(between, [row.baseline for row in rows], MUTED, "--s", ratio=True),
        Series.of("1 − cos(merged, blend): 0 is linear (LLFC)", [row.llfc for row in rows], BLUE, "-o", ratio=True),
    )
    coefficients = Series.of("coefficient", [row.coefficient for row in rows], GREEN, "-^", ratio=False)
    scale = LogScale.of(distances)
    grid = layer_grid(
        [row.layer for row in rows],
        heights=(2.4, 1),
        heading=f"Merged features against the blend of the parents' features: {point_name(report, rows[0])}",
    )
    for panel, (distance_axis, coefficient_axis) in grid:
        draw_distances(distance_axis, [series.part(panel) for series in distances], scale, size=grid.marker_size(panel))
        draw_around_one(coefficient_axis, coefficients.part(panel), size=grid.marker_size(panel))
        coefficient_axis.set_ylim(limits_around_one(coefficients))
    for stack in grid.left:
        stack[0].set_ylabel("1 − cosine")
        stack[1].set_ylabel("coefficient")
    statistics = [statistic for row in rows for statistic in (row.llfc, row.baseline)]
    draw_legend(
        grid.figure,
        grid.top,
        columns=3,
        title=(grid.note, spread_note(statistics, ratio=True, unit=report.data.get("unit"))),
    )
    return grid.figure


def plot_heatmap(report: ConnectivityReport, *, relative: bool = False) -> Figure | None:
    """1 − cos(merged, blend) of every layer at every measured point, as colours on a logarithmic scale.

    Args:
        report: The report.
        relative: Divides by the baseline 1 − cos(A, B) of the layer, so that 1 means as far from the blend as the
            parents are from each other.

    Returns:
        The figure; None if features were measured at fewer than two points besides the models themselves.
    """
    rows = [row for row in report.layers if not is_model(row)]
    named = {point_weights(row): point_name(report, row) for row in rows}
    if len(named) < 2:
        return None
    # Upwards by rising α, or from top to bottom as in the report.
    points = sorted(named) if report.region == "line" else list(reversed(named))
    layers = list(dict.fromkeys(row.layer for row in rows))
    cells = {(row.layer, point_weights(row)): row for row in rows}
    table = [[_cell(cells.get((layer, point)), relative=relative) for layer in layers] for point in points]
    quantity = "1 − cos(merged, blend)" + (", in units of the baseline" if relative else "")
    grid = layer_grid(layers, heights=(max(1.6, min(6.0, 0.28 * len(points))),), heading=quantity, legend=0.1)
    colours = _colours(table, relative=relative)
    if colours is None:
        return None
    for panel, (axis,) in grid:
        room = 0.8 * WIDTH_INCHES / grid.columns / len(panel.indices)
        _draw_cells(axis, panel, table, colours, numbers=room >= SMALLEST_CELL)
        _name_points(axis, [named[point].removeprefix("α = ") for point in points])
    alpha = "α, weight of the first model" if len(grid.left) == 1 and len(points) > 5 else "α"
    for stack in grid.left:
        stack[0].set_ylabel(alpha if report.region == "line" else "merged model")
    grid.figure.supxlabel(grid.note, fontsize=FONT_SIZE, color=INK)
    _draw_colour_bar(grid.figure, grid.top, colours)
    return grid.figure


def _cell(row: LayerRow | None, *, relative: bool) -> float:
    if row is None:
        return math.nan
    return known(row.ratio if relative else row.llfc.mean)


def _colours(table: Sequence[Sequence[float]], *, relative: bool) -> Any:
    """A map from values to colours that readers with colour blindness see as one order of lightness; None if no value.

    The ratio to the baseline has a middle, 1, where features are as far off as the parents are apart; colours on either
    side of it differ in hue.
    """
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    shown = [value for row in table for value in row if math.isfinite(value) and value > SMALLEST_SHOWN]
    if not shown:
        return None
    low, high = min(shown), max(shown)
    if relative:
        reach = min(max(1 / low, high, 10.0), WIDEST_RATIO)
        low, high = 1 / reach, reach
    elif high / low < 10:
        low, high = low / 3, high * 3
    name = "RdBu_r" if relative else "cividis"
    return ScalarMappable(LogNorm(low, high, clip=True), matplotlib.colormaps[name])


def _draw_cells(
    axis: Axes, panel: LayerPanel, table: Sequence[Sequence[float]], colours: Any, *, numbers: bool
) -> None:
    import numpy

    axis.grid(False)
    axis.set_facecolor(MISSING)
    values = numpy.array([[row[index] for index in panel.indices] for row in table])
    painted = numpy.where(numpy.isnan(values), numpy.nan, numpy.maximum(values, colours.norm.vmin))
    edges = [numpy.arange(count + 1) - 0.5 for count in (len(panel.indices), len(table))]
    axis.pcolormesh(
        edges[0], edges[1], numpy.ma.masked_invalid(painted), cmap=colours.cmap, norm=colours.norm,
        edgecolors=GROUND, linewidth=0.6 if len(panel.indices) <= 40 else 0,
    )  # fmt: skip
    axis.set_xlim(-0.5, len(panel.indices) - 0.5)
    for (row, column), value in numpy.ndenumerate(values) if numbers else ():
        is_light = math.isnan(value) or _luminance(colours.to_rgba(max(value, colours.norm.vmin))) > MIDDLE_LUMINANCE
        axis.text(
            column, row, cell_text(value), ha="center", va="center", fontsize=FONT_SIZE - 3.5,
            color=INK if is_light else GROUND,
        )  # fmt: skip


def _luminance(colour: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour, 0 for black and 1 for white (WCAG 2)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _name_points(axis: Axes, names: Sequence[str]) -> None:
    step = max(1, math.ceil(len(names) / 30))
    axis.set_ylim(-0.5, len(names) - 0.5)
    axis.set_yticks(range(0, len(names), step), [literal(name) for name in names[::step]])


def _draw_colour_bar(figure: Figure, axes: Sequence[Axes], colours: Any) -> None:
    extend = "both" if colours.norm.vmax == WIDEST_RATIO else "neither"
    bar = figure.colorbar(colours, ax=list(axes), pad=0.01, aspect=30, fraction=0.05, extend=extend)
    bar.ax.tick_params(labelsize=SMALL_FONT, colors=INK)
    bar.outline.set_visible(False)
