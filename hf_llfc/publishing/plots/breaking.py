"""Where a merge breaks: barrier and drift by block, the ways over it, and whose weights matter."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.publishing.breaking import barrier_of_blocks, fold_table
from hf_llfc.publishing.numbers import known
from hf_llfc.publishing.plots.canvas import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    PURPLE,
    VERMILION,
    draw_legend,
    literal,
    new_figure,
    plain_axes,
    plot_style,
)
from hf_llfc.publishing.plots.layer_axis import LayerPanel, layer_grid
from hf_llfc.publishing.plots.series import Series, draw_line
from hf_llfc.publishing.reading import model_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_blocks(report: ConnectivityReport) -> Figure | None:
    """What every block adds to the barrier, and how much of the drift of features arises there.

    Args:
        report: The report.

    Returns:
        The figure; None if this was not measured.
    """
    rows, whole = report.blocks, barrier_of_blocks(report.blocks)
    has_drift = any(row.drift is not None for row in rows)
    if not rows or (whole is None and not has_drift):
        return None
    grid = layer_grid(
        [row.block for row in rows],
        heights=(2.0,) * ((whole is not None) + has_drift),
        heading="Where the merge breaks, by block",
    )
    losses = (
        Series("merged alone", tuple(known(row.alone) for row in rows), BLUE, "--o"),
        Series(
            "left out alone: what that saves",
            tuple(math.nan if row.without is None or whole is None else whole - row.without for row in rows),
            VERMILION,
            ":s",
        ),
    )
    local = (known(row.local) * known(row.drift) for row in rows)
    drifts = (
        Series("drift from the blend", tuple(known(row.drift) for row in rows), PURPLE, "-^"),
        Series("of it, arisen here", tuple(local), GREEN, "--v"),
    )
    for panel, axes in grid:
        if whole is not None:
            _draw_steps(axes[0], panel, [known(row.step) for row in rows])
        shown = ([losses] if whole is not None else []) + ([drifts] if has_drift else [])
        for axis, series in zip(axes, shown, strict=True):
            axis.axhline(0.0, color=INK, linewidth=0.8)
            for line in series:
                draw_line(axis, line.part(panel), grid.marker_size(panel))
    for stack in grid.left:
        if whole is not None:
            stack[0].set_ylabel("nats")
        if has_drift:
            stack[-1].set_ylabel("‖merged − blend‖ / ‖blend‖")
    draw_legend(grid.figure, [axis for stack in grid.axes for axis in stack], columns=3, title=(grid.note,))
    return grid.figure


def _draw_steps(axis: Axes, panel: LayerPanel, steps: list[float]) -> None:
    """Bars of what the blocks add, which sum to the barrier."""
    values = [steps[index] for index in panel.indices]
    label = "step: merged up to here (bars sum to the barrier)"
    axis.bar(range(len(values)), values, width=0.7, color=MUTED, alpha=0.45, label=label)


def plot_fold(report: ConnectivityReport) -> Figure | None:
    """Barrier and length of every way from a model to the merge, and of every fold over it.

    Args:
        report: The report.

    Returns:
        The figure; None if this was not measured.
    """
    rows = report.fold
    if not rows:
        return None
    table = fold_table(report)
    figure = new_figure(1.3 + 0.32 * len(rows))
    with plot_style():
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = range(len(rows))
    colours = [BLUE if len(row.models) == 1 else VERMILION for row in rows]
    left.barh(places, [row.loss for row in rows], color=colours, height=0.6)
    right.plot([known(row.length) for row in rows], places, "D", color=PURPLE, markersize=6)
    for axis in (left, right):
        plain_axes(axis)
        axis.grid(visible=False, axis="y")
    left.set_yticks(list(places), [literal(name) for name, *_ in table.rows])
    left.invert_yaxis()
    highest = max([*(row.loss for row in rows), report.barrier.loss or 0.0])
    if report.barrier.loss is not None:
        left.axvline(report.barrier.loss, color=INK, linestyle="--", linewidth=1.4)
        left.set_title(f"Ways over the merge (dashed: the straight line, {report.barrier.loss:.3f} nats)", loc="left")
    else:
        left.set_title("Ways over the merge", loc="left")
    left.set_xlim(0.0, 1.08 * highest if highest > 0 else 1.0)
    left.set_xlabel("barrier, nats")
    right.set_xlim(left=0.0)
    right.set_xlabel("length / distance of the models")
    return figure


def plot_importance(report: ConnectivityReport) -> Figure | None:
    """Importance of every block in every model, as a share of the whole model's.

    Args:
        report: The report.

    Returns:
        The figure; None if this was not measured.
    """
    rows = report.importance
    if not rows:
        return None
    blocks = list(dict.fromkeys(row.block for row in rows))
    names = model_names(report)[: len(rows[0].fisher)]
    grid = layer_grid(blocks, heights=(1.6, 1.6), heading="Whose weights matter where: shares of each model")
    colours, styles = (BLUE, VERMILION, GREEN, PURPLE, INK), ("-o", "--s", "-.^", ":v", "-D")
    for kind, height in (("fisher", 0), ("feedback", 1)):
        for model, name in enumerate(names):
            values = [sum(getattr(row, kind)[model] for row in rows if row.block == block) for block in blocks]
            whole = sum(values) or math.nan
            line = Series(
                name if height == 0 else "",
                tuple(100 * value / whole for value in values),
                colours[model % len(colours)],
                styles[model % len(styles)],
            )
            for panel, axes in grid:
                draw_line(axes[height], line.part(panel), grid.marker_size(panel))
    for stack in grid.left:
        stack[0].set_ylabel("Fisher, %")
        stack[1].set_ylabel("feedback, %")
        for axis in stack:
            axis.set_ylim(bottom=0.0)
    draw_legend(grid.figure, grid.top, columns=4, title=(grid.note,))
    return grid.figure


def plot_units(report: ConnectivityReport) -> Figure | None:
    """Share of units that are always and never active, in every model and in the merge.

    Args:
        report: The report.

    Returns:
        The figure; None if this was not measured.
    """
    rows = report.units
    if not rows:
        return None
    names = [*model_names(report), "merge"]
    heading = "Units that are never active (above), and always (below)"
    grid = layer_grid([row.layer for row in rows], heights=(1.5, 1.5), heading=heading)
    for model, name in enumerate(names):
        is_merge = model == len(names) - 1
        colour = VERMILION if is_merge else (BLUE, GREEN, PURPLE)[model % 3]
        style = "--s" if is_merge else ("-o", ":v", "-.^")[model % 3]
        for height, kind in enumerate(("never", "always")):
            values = tuple(100 * getattr(row, kind)[model] for row in rows)
            line = Series(name if height == 0 else "", values, colour, style)
            for panel, axes in grid:
                draw_line(axes[height], line.part(panel), grid.marker_size(panel))
    for stack in grid.left:
        for axis, kind in zip(stack, ("never", "always"), strict=True):
            axis.set_ylabel(f"{kind}, %")
            highest = max(100 * share for row in rows for share in getattr(row, kind))
            axis.set_ylim(-1.0, max(5.0, 1.08 * highest))
    draw_legend(grid.figure, grid.top, columns=4, title=(grid.note,))
    return grid.figure
