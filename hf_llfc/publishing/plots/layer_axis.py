"""The horizontal axis of everything that is measured layer by layer: names, panels and ticks.

Few names fit below an axis. What all names share is said once. Modules that recur in every block under the same name
(query, key, value, …) get a panel each, in which a number is name enough.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_llfc.publishing.plots.canvas import (
    FONT_SIZE,
    INK,
    cut,
    literal,
    new_figure,
    plain_axes,
    plot_style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

MOST_LABELS = 34
"""Below an axis as wide as the figure."""
MOST_CHARACTERS = 95
"""Of labels that stand side by side below an axis as wide as the figure."""
MOST_PANELS = 4
"""Side by side."""
LONGEST_LABEL = 24
LONGEST_UPRIGHT = 18
"""Characters of labels that stand upright below a panel."""
LONGEST_SHARED = 72
"""Characters of what all names of layers share."""
FEW = 34
"""Layers on the width of the figure up to which markers are large."""


@dataclass(frozen=True)
class LayerPanel:
    """Layers that share one axis.

    Args:
        title: What they have in common; empty where all layers of a plot share one panel.
        indices: Places of the layers among all of the plot.
        labels: One a layer.
        connected: Whether a line from one layer to the next says something.
    """

    title: str
    indices: tuple[int, ...]
    labels: tuple[str, ...]
    connected: bool = True


def layer_panels(names: Sequence[str]) -> list[LayerPanel]:
    """How layers are shared out among panels.

    Names that are equal but for numbers are of one kind. Where two kinds or more recur, each gets a panel, and what is
    there only once goes into a last one; else all layers stand on one axis in their order.
    """
    kinds: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        kinds.setdefault(_kind(name), []).append(index)
    recurring = {kind: indices for kind, indices in kinds.items() if len(indices) > 1 and "#" in kind.split(".")}
    if len(recurring) < 2:
        return [LayerPanel("", tuple(range(len(names))), tuple(short_layer_names(names)))]
    panels = [
        LayerPanel(title, tuple(indices), tuple(_numbers(names[index]) for index in indices))
        for title, indices in zip(_titles(list(recurring)), recurring.values(), strict=True)
    ]
    single = [index for kind, indices in kinds.items() if kind not in recurring for index in indices]
    if single:
        labels = [cut(label, LONGEST_UPRIGHT) for label in short_layer_names([names[index] for index in single])]
        panels.append(LayerPanel("others", tuple(single), tuple(labels), connected=False))
    return panels


def _kind(name: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


def _numbers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part.isdigit())


def _titles(kinds: Sequence[str]) -> list[str]:
    """Distinct titles: what follows the last number, what precedes it, or all but the numbers."""
    after = [kind.rsplit("#", 1)[1].strip(".") for kind in kinds]
    whole = [".".join(part for part in kind.split(".") if part != "#") for kind in kinds]
    if len(set(after)) == len(kinds) and all(after):
        return after
    shared = next(_shared_heads(whole), "")
    return [name.removeprefix(shared) or name for name in whole]


def _shared_heads(names: Sequence[str]) -> Iterator[str]:
    """Whole dotted parts with which all names begin, the longest first, never a whole name."""
    parts = names[0].split(".")
    for length in range(len(parts) - 1, 0, -1):
        head = ".".join(parts[:length]) + "."
        if all(name.startswith(head) for name in names):
            yield head


def common_prefix(names: Sequence[str]) -> str:
    """The run of whole dotted parts that saves most when it is left out of the names, as `bert.encoder.layer.`."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts)):
            prefix = ".".join(parts[:length]) + "."
            counts[prefix] = counts.get(prefix, 0) + 1
    shared = [prefix for prefix, count in counts.items() if count > 1]
    return max(shared, key=lambda prefix: counts[prefix] * len(prefix), default="")


def common_suffix(names: Sequence[str]) -> str:
    """The run of whole dotted parts with which all names end that begin with the common prefix, as `.mlp.act`."""
    prefix = common_prefix(names)
    endings = [name.removeprefix(prefix).split(".")[1:] for name in names if prefix and name.startswith(prefix)]
    suffix: list[str] = []
    for parts in zip(*(reversed(ending) for ending in endings), strict=False):
        if len(set(parts)) > 1:
            break
        suffix.insert(0, parts[0])
    return "".join(f".{part}" for part in suffix)


def short_layer_names(names: Sequence[str]) -> list[str]:
    """Names of layers as they fit below an axis: without what they share, long ones cut in the middle."""
    prefix, suffix = common_prefix(names), common_suffix(names)
    shortened = []
    for name in names:
        last = name.rsplit(".", 1)[-1]
        short = name.removeprefix(prefix)
        if not prefix or short != name:
            short = short.removesuffix(suffix)
        elif not last.isdigit():
            short = last
        shortened.append(cut(short, LONGEST_LABEL))
    if len(set(shortened)) < len(shortened):
        return [name if len(name) <= LONGEST_LABEL else f"…{name[1 - LONGEST_LABEL :]}" for name in names]
    return shortened


@dataclass(frozen=True)
class LayerTicks:
    """Which layers of a panel are labelled, and how.

    Args:
        positions: Of the layers that are.
        labels: Of these.
        slanted: Whether the labels are too long to stand side by side.
    """

    positions: tuple[int, ...]
    labels: tuple[str, ...]
    slanted: bool

    @property
    def height(self) -> float:
        """Of the labels, in inches."""
        longest = max(map(len, self.labels), default=0)
        return min(0.9, 0.075 * longest + 0.2) if self.slanted else 0.25


def layer_ticks(labels: Sequence[str], share: float = 1.0) -> LayerTicks:
    """The labels that fit below an axis, the first and the last always among them.

    Args:
        labels: One a layer.
        share: The width of the axis, 1 for one as wide as the figure.
    """
    step = max(1, math.ceil(len(labels) / (MOST_LABELS * share)))
    short = max(map(len, labels)) <= 3
    while True:
        ticks = sorted({*range(0, len(labels) - 1, step), len(labels) - 1})
        if len(ticks) > 1 and ticks[-1] - ticks[-2] < step:
            del ticks[-2]
        upright = sum(len(labels[tick]) + 1.5 for tick in ticks) <= MOST_CHARACTERS * share
        if upright or not short or len(ticks) <= 2:
            break
        step += 1
    return LayerTicks(tuple(ticks), tuple(labels[tick] for tick in ticks), not upright)


@dataclass(frozen=True)
class LayerGrid:
    """A figure with one column of axes a panel, one axis a quantity, and the same vertical axis for all panels.

    Args:
        figure: To draw on.
        panels: The layers.
        axes: Of each panel, one a quantity from top to bottom.
        columns: How many panels stand side by side.
        note: What the numbers below the axes count, where there is more than one panel; else empty.
    """

    figure: Figure
    panels: tuple[LayerPanel, ...]
    axes: tuple[tuple[Axes, ...], ...]
    columns: int
    note: str

    def __iter__(self) -> Iterator[tuple[LayerPanel, tuple[Axes, ...]]]:
        return iter(zip(self.panels, self.axes, strict=True))

    def marker_size(self, panel: LayerPanel) -> float:
        """The size of markers in points, smaller where there are many layers on the width of the figure."""
        return 4.5 if len(panel.indices) * self.columns <= FEW else 2.5

    @property
    def left(self) -> tuple[tuple[Axes, ...], ...]:
        """The axes at the left edge, which name their quantity."""
        return self.axes[:: self.columns]

    @property
    def top(self) -> tuple[Axes, ...]:
        """The uppermost axis of every panel."""
        return tuple(stack[0] for stack in self.axes)


def layer_grid(names: Sequence[str], *, heights: Sequence[float], heading: str, legend: float = 0.6) -> LayerGrid:
    """Axes for layers, with ticks and names.

    Args:
        names: Of the layers, in order.
        heights: One a quantity, in inches, where there is one panel; more panels are less high.
        heading: Above all.
        legend: Room for it, in inches.
    """
    panels = layer_panels(names)
    rows = math.ceil(len(panels) / MOST_PANELS)
    columns = math.ceil(len(panels) / rows)
    share = 0.92 / columns if columns > 1 else 1.0
    ticks = [layer_ticks(panel.labels, share) for panel in panels]
    titles = [_wrapped(panel.title, columns) for panel in panels]
    below = [max(labels.height for labels in ticks[row * columns : (row + 1) * columns]) for row in range(rows)]
    above = 0.0 if len(panels) == 1 else 0.1 + 0.16 * max(title.count("\n") + 1 for title in titles)
    scale = 1.0 if rows == 1 else 0.8
    height = scale * rows * sum(heights) + sum(below) + rows * above + legend + 0.6
    figure = new_figure(height)
    cells = figure.add_gridspec(rows * len(heights), columns, height_ratios=list(heights) * rows)
    stacks: list[tuple[Axes, ...]] = []
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        first = row * len(heights)
        stack = _panel_axes(figure, [cells[first + quantity, column] for quantity in range(len(heights))], stacks)
        _label_layers(stack, panel, ticks[index])
        if panel.title:
            stack[0].set_title(literal(titles[index]), fontsize=FONT_SIZE - 0.5, loc="left")
        for axis in stack if column else ():
            axis.tick_params(labelleft=False)
        stacks.append(stack)
    note = _name_axis(figure, stacks, names, heading)
    return LayerGrid(figure, tuple(panels), tuple(stacks), columns, note)


def _panel_axes(figure: Figure, cells: Sequence[SubplotSpec], earlier: Sequence[tuple[Axes, ...]]) -> tuple[Axes, ...]:
    stack: list[Axes] = []
    with plot_style():
        for quantity, cell in enumerate(cells):
            axis = figure.add_subplot(
                cell,
                sharex=stack[0] if stack else None,
                sharey=earlier[0][quantity] if earlier else None,
            )
            plain_axes(axis)
            axis.tick_params(labelbottom=quantity == len(cells) - 1)
            stack.append(axis)
    return tuple(stack)


def _label_layers(stack: Sequence[Axes], panel: LayerPanel, ticks: LayerTicks) -> None:
    """Names the layers; long names stand upright below a panel that has neighbours, so as not to reach below these."""
    for axis in stack:
        axis.set_xlim(-0.6, len(panel.labels) - 0.4)
        axis.set_xticks(ticks.positions)
    rotation: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if ticks.slanted else {}
    rotation = {"rotation": 90} if rotation and panel.title else rotation
    stack[-1].set_xticklabels([literal(label) for label in ticks.labels], **rotation)


def _name_axis(figure: Figure, axes: Sequence[Sequence[Axes]], names: Sequence[str], heading: str) -> str:
    """Writes heading and name of the axis; returns what is left for a note, since panels share no axis to name."""
    prefix = common_prefix(names)
    if len(axes) == 1:
        shared = literal(cut(f"{prefix}*{common_suffix(names)}", LONGEST_SHARED))
        axes[0][0].set_title(heading, loc="left")
        axes[0][-1].set_xlabel(f"layer (short names: {shared})" if prefix else "layer")
        return ""
    figure.suptitle(heading, x=0.01, ha="left", fontsize=FONT_SIZE + 0.5, color=INK)
    return f"layers as numbered in {literal(cut(prefix, LONGEST_SHARED))}*" if prefix else "layers by their numbers"


def _wrapped(title: str, columns: int) -> str:
    """A dotted name in at most three lines."""
    width = int(78 / columns)
    lines = textwrap.wrap(re.sub(r"([._])", r"\1 ", title), width) if len(title) > width else [title]
    joined = [re.sub(r"([._]) ", r"\1", line) for line in lines]
    return "\n".join(joined if len(joined) <= 3 else [cut(title, width)])
