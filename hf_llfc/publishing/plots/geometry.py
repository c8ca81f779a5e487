"""Where weights and features of two models lie: effective ranks, and angles between leading subspaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import GeometryRow
from hf_llfc.publishing.plots.canvas import BLUE, GREEN, PURPLE, VERMILION, draw_legend
from hf_llfc.publishing.plots.layer_axis import layer_grid
from hf_llfc.publishing.plots.series import draw_band, draw_line, marker_size

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
    """Effective rank of both models' features and the principal angles between their leading subspaces.

    Args:
        report: The report.

    Returns:
        The figure; None if this was not measured.
    """
    return _geometry(report, FEATURES, "Features of A and B")


def _geometry(report: ConnectivityReport, sides: Mapping[str, tuple[str, str, str]], heading: str) -> Figure | None:
    rows = {(row.layer, row.of): row for row in report.geometry if row.of in sides}
    if not rows:
        return None
    layers = list(dict.fromkeys(layer for layer, _ in rows))
    has_angles = any(row.angles for row in rows.values())
    grid = layer_grid(
        layers,
        heights=(1.5, 1.5) if has_angles else (2.4,),
        heading=f"{heading}: effective rank" + (", and angles between leading subspaces" if has_angles else ""),
    )
    first = next(iter(sides))
    for panel, axes in grid:
        names = [layers[index] for index in panel.indices]
        size = marker_size(len(names) * grid.columns)
        _draw_ranks(axes[0], [rows.get((name, first)) for name in names], size, panel.connected)
        for of, (label, colour, style) in sides.items() if has_angles else ():
            label = "median" if len(sides) == 1 else f"median, {label}"
            _draw_angles(axes[1], [rows.get((name, of)) for name in names], label, colour, style, size, panel.connected)
    # From zero, so that heights compare.
    highest = max(max(row.rank_a, row.rank_b) for row in rows.values())
    grid.top[0].set_ylim(-0.04 * highest, 1.1 * highest)
    for stack in grid.left:
        stack[0].set_ylabel("effective rank")
        if has_angles:
            stack[1].set_ylabel("principal angles")
            _set_angle_scale(stack[1])
    note = "bands: smallest to largest angle" if has_angles else ""
    everywhere = [axis for stack in grid.axes for axis in stack]
    draw_legend(grid.figure, everywhere, columns=4, title=(grid.note, note))
    return grid.figure


def _draw_ranks(axis: Axes, rows: Sequence[GeometryRow | None], size: float, connected: bool) -> None:
    found = [(place, row) for place, row in enumerate(rows) if row is not None]
    places = [place for place, _ in found]
    # Ranks are often equal: markers of A are larger, so that they are seen behind those of B.
    for label, ranks, colour, style, scale in (
        ("rank of A", [row.rank_a for _, row in found], BLUE, "-o", 1.9),
        ("rank of B", [row.rank_b for _, row in found], VERMILION, "--s", 0.9),
    ):
        draw_line(axis, places, ranks, style, colour, scale * size, label=label, connected=connected)


def _draw_angles(
    axis: Axes,
    rows: Sequence[GeometryRow | None],
    label: str,
    colour: str,
    style: str,
    size: float,
    connected: bool,
) -> None:
    """The median angle, and a band from the smallest to the largest."""
    found = [
        (place, sorted(max(angle, SMALLEST_ANGLE) for angle in row.angles))
        for place, row in enumerate(rows)
        if row is not None and row.angles
    ]
    places = [place for place, _ in found]
    medians = [(each[(len(each) - 1) // 2] + each[len(each) // 2]) / 2 for _, each in found]
    draw_band(axis, places, [each[0] for _, each in found], [each[-1] for _, each in found], colour, connected)
    draw_line(axis, places, medians, style, colour, size, label=label, connected=connected)


def _set_angle_scale(axis: Axes) -> None:
    """Logarithmic, since weights of two fine-tunes of one base are turned by fractions of a degree."""
    from matplotlib.ticker import NullFormatter

    axis.set_yscale("log")
    axis.set_ylim(0.8 * SMALLEST_ANGLE, 150)
    axis.set_yticks([SMALLEST_ANGLE, 0.1, 1, 10, 90], ["0.01°", "0.1°", "1°", "10°", "90°"])
    axis.yaxis.set_minor_formatter(NullFormatter())
