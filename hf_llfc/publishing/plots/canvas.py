"""How every plot looks: colours, figures that no global state touches, legends, and text taken literally."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A solid ground of their own keeps the pictures legible on light and on dark pages. The hues are those of Okabe and
# Ito, which also readers with colour blindness tell apart; every line differs in style or marker as well.
GROUND = "#fcfcfa"
INK = "#24292f"
MUTED = "#6e7781"
GRID = "#dfe1e4"
BLUE = "#0072b2"
VERMILION = "#d55e00"
GREEN = "#00795c"
PURPLE = "#9b4f86"

WIDTH_INCHES = 8.0
DOTS_PER_INCH = 200
FONT_SIZE = 10.5
SMALL_FONT = FONT_SIZE - 1.5


def new_figure(height: float) -> Figure:
    """An empty figure as wide as a card.

    Args:
        height: In inches, of which a card shows a hundred pixels each.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with plot_style():
        figure = Figure(figsize=(WIDTH_INCHES, height), facecolor=GROUND, layout="constrained")
        FigureCanvasAgg(figure)
    return figure


def plot_style() -> Any:
    """The settings under which axes must be made; what a user has set for matplotlib has no effect."""
    import matplotlib

    style: dict[str, Any] = {
        "backend": "agg",
        "font.family": "DejaVu Sans",
        "font.size": FONT_SIZE,
        "axes.titlesize": FONT_SIZE + 0.5,
        "axes.labelsize": FONT_SIZE,
        "xtick.labelsize": FONT_SIZE - 1,
        "ytick.labelsize": FONT_SIZE - 1,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.edgecolor": MUTED,
        "axes.facecolor": GROUND,
    }
    settings: Any = {**matplotlib.rcParamsDefault, **style}
    return matplotlib.rc_context(settings)


def plain_axes(axis: Axes) -> None:
    """Leaves of the frame only two sides, and puts a grid behind."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def draw_legend(
    figure: Figure, axes: Sequence[Axes], *, columns: int, title: Sequence[str] = (), order: Sequence[str] = ()
) -> None:
    """One legend for all panels, below them, with the lines of a title; labels in `order` come first."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = sorted(handles, key=lambda label: order.index(label) if label in order else len(order))
    if not labels:
        return
    legend = figure.legend(
        [handles[label] for label in labels], labels, loc="outside lower center", ncols=_even(len(labels), columns),
        frameon=False, labelcolor=INK, fontsize=SMALL_FONT, title="\n".join(filter(None, title)) or None,
        title_fontsize=FONT_SIZE - 2, handlelength=2.2, columnspacing=1.4,
    )  # fmt: skip
    legend.get_title().set_color(INK)
    legend.get_title().set_multialignment("center")


def _even(entries: int, most: int) -> int:
    """Columns that fill their rows, or nearly so."""
    rows = -(-entries // most)
    return -(-entries // rows)


def power_of_ten(value: float) -> str:
    """A power of ten as a reader writes it."""
    return rf"$10^{{{round(math.log10(value))}}}$"


def literal(text: str) -> str:
    """Text of which matplotlib reads nothing as mathematics."""
    return text.replace("$", r"\$")


def plain_name(model_id: str | None, most: int) -> str:
    """The last part of a model's name or path, of at most so many characters."""
    name = re.split(r"[/\\]", str(model_id or "?").rstrip("/\\"))[-1]
    name = "".join(character if character.isprintable() else " " for character in name)
    return literal(cut(name, most))


def cut(text: str, most: int) -> str:
    """The text, of at most so many characters, the middle left out."""
    if len(text) <= most:
        return text
    front = (most - 1) // 2
    return f"{text[:front]}…{text[front + 1 - most :]}"
