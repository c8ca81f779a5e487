"""Where weights and features of two models lie: effective ranks, and angles between leading subspaces."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import GeometryRow
from hf_llfc.publishing.numbers import known
from hf_llfc.publishing.plots.canvas import BLUE, GREEN, PURPLE, VERMILION, draw_legend
from hf_llfc.publishing.plots.layer_axis import layer_grid
from hf_llfc.publishing.plots.series import Series, draw_band, draw_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALLEST_ANGLE = 0.01
"""In degrees; smaller angles are drawn at the foot of the axis."""

# What a row is of, as reports say it, with the name of its angles and how their line is drawn.
SIDES_OF_WEIGHTS = {
    "weights": ("what the map writes", GREEN, "-^"),
    "weights, inputs": ("what the map reads", PURPLE, ":v"),
}
FEATURES = {"features": ("features", GREEN, "-^")}


def plot_weight_geometry(report: ConnectivityReport) -> Figure | None:
    """Effective rank of both models' weights and the principal angles between their leading subspaces.

    Args:
        report: The report.

    Returns:
        The figure; None if this was not measured.
    """
    return _geometry(report, SIDES_OF_WEIGHTS, "Weights of A and B")


def plot_feature_geometry(report: ConnectivityReport) -> Figure | None:
    """As `plot_weight_geometry`, of both models' features."""
    return _geometry(report, FEATURES, "Features of A and B")


def _geometry(report: ConnectivityReport, sides: Mapping[str, tuple[str, str, str]], heading: str) -> Figure | None:
    rows = {(row.layer, row.of): row for row in report.geometry if row.of in sides}
    if not rows:
        return None
    layers = list(dict.fromkeys(layer for layer, _ in rows))
    has_angles = any(row.angles for row in rows.values())
    has_shares = any(row.rank_one_a is not None for row in rows.values())
    grid = layer_grid(
        layers,
        heights=((1.5, 1.5) if has_angles else (2.4,)) + ((1.2,) if has_shares else ()),
        heading=f"{heading}: effective rank" + (", and angles between leading subspaces" if has_angles else ""),
    )
    ranked = [rows.get((layer, next(iter(sides)))) for layer in layers]
    # Ranks are often equal: markers of A are larger, so that they are seen behind those of B.
    ranks = (
        (Series("rank of A", tuple(math.nan if row is None else row.rank_a for row in ranked), BLUE, "-o"), 1.9),
        (Series("rank of B", tuple(math.nan if row is None else row.rank_b for row in ranked), VERMILION, "--s"), 0.9),
    )
    angles = [
        _angles([rows.get((layer, of)) for layer in layers], Series(label, (), colour, style))
        for of, (side, colour, style) in sides.items()
        if (label := "median" if len(sides) == 1 else f"median, {side}")
    ]
    for panel, axes in grid:
        size = grid.marker_size(panel)
        for series, scale in ranks:
            draw_line(axes[0], series.part(panel), scale * size)
        for series in angles if has_angles else ():
            draw_band(axes[1], series.part(panel))
            draw_line(axes[1], series.part(panel), size)
        for which, (series, scale) in zip("ab", ranks if has_shares else (), strict=False):
            shares = tuple(known(getattr(row, f"rank_one_{which}", None)) for row in ranked)
            draw_line(axes[-1], Series("", shares, series.colour, series.style).part(panel), scale * size)
    # From zero, so that heights compare.
    highest = max(max(row.rank_a, row.rank_b) for row in rows.values())
    grid.top[0].set_ylim(-0.04 * highest, 1.1 * highest)
    for stack in grid.left:
        stack[0].set_ylabel("effective rank")
        if has_angles:
            stack[1].set_ylabel("principal angles")
            _set_angle_scale(stack[1])
        if has_shares:
            stack[-1].set_ylabel("rank one")
            stack[-1].set_ylim(-0.04, 1.04)
    note = "bands: smallest to largest angle" if has_angles else ""
    everywhere = [axis for stack in grid.axes for axis in stack]
    draw_legend(grid.figure, everywhere, columns=4, title=(grid.note, note))
    return grid.figure


def _angles(rows: Sequence[GeometryRow | None], line: Series) -> Series:
    """The median angle of every layer, with a band from the smallest to the largest."""
    by_layer = [
        [max(angle, SMALLEST_ANGLE) for angle in row.angles] if row is not None and row.angles else [math.nan]
        for row in rows
    ]
    bands = tuple((min(angles), max(angles)) for angles in by_layer)
    return Series(line.label, tuple(map(statistics.median, by_layer)), line.colour, line.style, bands)


def _set_angle_scale(axis: Axes) -> None:
    """Logarithmic, since weights of two fine-tunes of one base are turned by fractions of a degree."""
    from matplotlib.ticker import NullFormatter

    axis.set_yscale("log")
    axis.set_ylim(0.8 * SMALLEST_ANGLE, 150)
    axis.set_yticks([SMALLEST_ANGLE, 0.1, 1, 10, 90], ["0.01°", "0.1°", "1°", "10°", "90°"])
    axis.yaxis.set_minor_formatter(NullFormatter())
