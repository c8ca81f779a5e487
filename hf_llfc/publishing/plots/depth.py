"""What depth does to classes and answers: compression, discrimination and separability, and settled answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import ClassesRow
from hf_llfc.publishing.depth import BLEND, MERGE, by_layer, fisher_ratio, shown_names
from hf_llfc.publishing.numbers import known
from hf_llfc.publishing.plots.canvas import BLUE, GREEN, INK, MUTED, PURPLE, VERMILION, draw_legend
from hf_llfc.publishing.plots.layer_axis import layer_grid
from hf_llfc.publishing.plots.series import Series, draw_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = ((BLUE, "--o"), (GREEN, ":s"), (PURPLE, "-.^"), (INK, "--v"))
"""Of the models, in their order; from the fifth on they begin again."""

SHARES = (0.01, 0.05, 0.2, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
"""Separabilities that are named beside their axis."""

MOST_TICKS = 5
"""On an axis of a low panel."""


def plot_classes(report: ConnectivityReport) -> Figure | None:
    """Compression, discrimination and separability of every layer, and how far class means are turned.

    Args:
        report: The report.

    Returns:
        The figure; None if this was not measured.
    """
    layers = by_layer(report.classes)
    if not layers:
        return None
    names = shown_names(report)
    has_ratio = any(row.separability is not None for row in report.classes)
    grid = layer_grid(
        list(layers),
        heights=(1.3,) * (3 + 2 * has_ratio),
        heading="Classes in the features of the models, of their blend, and of the merge",
    )
    quantities: list[tuple[str, Callable[[ClassesRow], float]]] = [
        ("compression", lambda row: known(row.compression)),
        ("discrimination", lambda row: known(row.discrimination)),
    ]
    if has_ratio:
        quantities.append(("separability", lambda row: _inside(fisher_ratio(row.separability))))
        quantities.append(("worst pair", lambda row: _inside(fisher_ratio(row.least))))
    ofs = [of for of in names if of in next(iter(layers.values()))]
    for panel, axes in grid:
        size = grid.marker_size(panel)
        for axis, (_, value) in zip(axes, quantities, strict=False):
            for index, of in enumerate(ofs):
                values = tuple(value(rows[of]) if of in rows else math.nan for rows in layers.values())
                draw_line(axis, Series(names[of], values, *_style(of, index)).part(panel), size)
        for series in _turned(layers, names):
            draw_line(axes[-1], series.part(panel), size)
    for stack in grid.left:
        for axis, name in zip(stack, [*(name for name, _ in quantities), "class means"], strict=True):
            axis.set_ylabel(name)
        _set_logarithmic(stack[0], [known(row.compression) for row in report.classes])
        if has_ratio:
            _set_separability(stack[2], [fisher_ratio(row.separability) for row in report.classes])
            _set_separability(stack[3], [fisher_ratio(row.least) for row in report.classes])
        stack[-1].set_ylim(bottom=0)
    everywhere = [axis for stack in grid.axes for axis in stack]
    draw_legend(grid.figure, everywhere, columns=4, title=(grid.note, "class means: 1 − cos of their directions"))
    return grid.figure


def _style(of: str, index: int) -> tuple[str, str]:
    if of == MERGE:
        return VERMILION, "-D"
    return (MUTED, "-") if of == BLEND else STYLES[index % len(STYLES)]


def _inside(ratio: float) -> float:
    """A Fisher ratio as it can be drawn on a logarithmic axis."""
    return min(max(ratio, 1e-3), 1e6)


def _turned(layers: dict[str, dict[str, ClassesRow]], names: dict[str, str]) -> list[Series]:
    """How far class means of the merge point from those of every model, and those of two models from each other."""
    models = [of for of in names if of not in (BLEND, MERGE)]

    def distances(of: str, model: int) -> tuple[float, ...]:
        return tuple(
            known(rows[of].directions[model]) if of in rows and model < len(rows[of].directions) else math.nan
            for rows in layers.values()
        )

    lines = [
        Series(f"merge from {names[of]}", distances(MERGE, index), STYLES[index % len(STYLES)][0], "-D")
        for index, of in enumerate(models)
    ]
    if len(models) == 2:
        lines.append(Series(f"{names[models[0]]} from {names[models[1]]}", distances(models[0], 1), MUTED, "--"))
    return lines


def _set_separability(axis: Axes, ratios: Sequence[float]) -> None:
    """An axis of Fisher ratios that says what separability each stands for."""
    shares = {fisher_ratio(share): f"{share:g}" for share in SHARES}
    _set_ticks(axis, [_inside(ratio) for ratio in ratios if not math.isnan(ratio)], shares)


def _set_logarithmic(axis: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers."""
    ticks = {digit * 10.0**power: f"{digit * 10.0**power:g}" for power in range(-12, 13) for digit in (1, 2, 5)}
    _set_ticks(axis, [value for value in values if value > 0], ticks)


def _set_ticks(axis: Axes, drawn: Sequence[float], names: Mapping[float, str]) -> None:
    """A logarithmic axis on which some of the named values are marked."""
    from matplotlib.ticker import NullLocator

    if not drawn:
        return
    axis.set_yscale("log")
    low, high = min(drawn) / 1.6, max(drawn) * 1.6
    axis.set_ylim(low, high)
    inside = [value for value in names if low <= value <= high]
    ticks = inside[:: max(1, math.ceil(len(inside) / MOST_TICKS))]
    axis.set_yticks(ticks, [names[tick] for tick in ticks])
    axis.yaxis.set_minor_locator(NullLocator())


def plot_settling(report: ConnectivityReport) -> Figure | None:
    """Shares of answers, and of distributions, that are settled after every block.

    Args:
        report: The report.

    Returns:
        The figure; None if this was not measured.
    """
    if not report.settling:
        return None
    blocks = list(dict.fromkeys(row.layer for row in report.settling))
    found = {(row.layer, row.of): row for row in report.settling}
    names = {of: name for of, name in shown_names(report).items() if (blocks[0], of) in found}
    grid = layer_grid(
        blocks, heights=(1.7, 1.7), heading="Answers that are settled after a block, in the models and the merge"
    )
    for panel, axes in grid:
        for index, (of, name) in enumerate(names.items()):
            rows = [found[block, of] for block in blocks]
            for axis, values in zip(axes, ([row.answer for row in rows], [row.close for row in rows]), strict=True):
                percents = tuple(100 * value for value in values)
                draw_line(axis, Series(name, percents, *_style(of, index)).part(panel), grid.marker_size(panel))
    for stack in grid.left:
        for axis, name in zip(stack, ("same answer, %", "KL < 0.1, %"), strict=True):
            axis.set_ylabel(name)
            axis.set_ylim(-4, 104)
    draw_legend(grid.figure, grid.top, columns=4, title=(grid.note, "norm and head applied to the block's output"))
    return grid.figure
