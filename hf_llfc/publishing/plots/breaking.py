"""Where a merge breaks: the barrier and the drift of features by block."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.publishing.breaking import barrier_of_blocks
from hf_llfc.publishing.numbers import known
from hf_llfc.publishing.plots.canvas import BLUE, GREEN, INK, MUTED, PURPLE, VERMILION, draw_legend
from hf_llfc.publishing.plots.layer_axis import LayerPanel, layer_grid
from hf_llfc.publishing.plots.series import Series, draw_line

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
        stack = list(axes)
        if whole is not None:
            _draw_steps(stack[0], panel, [known(row.step) for row in rows])
        shown = ([losses] if whole is not None else []) + ([drifts] if has_drift else [])
        for axis, series in zip(stack, shown, strict=True):
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
