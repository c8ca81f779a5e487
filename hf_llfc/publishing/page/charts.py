"""Where everything of a path's pictures lies, in units of their view boxes; the template draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.publishing.numbers import MetricStyle, capitalized, height_text, value_text
from hf_llfc.publishing.path import Curve, path_curves
from hf_llfc.publishing.plots.canvas import cut
from hf_llfc.publishing.reading import point_name
from hf_llfc.publishing.words import display_name

WIDTH = 400.0
LINE_HEIGHT = 250.0
ROW_HEIGHT = 24.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 14.0, 46.0
LEFT_OF_ROWS = 132.0
HALF_LABEL = 66.0
MOST_METRICS = 3
"""Charts beside that of the loss."""
LONGEST_NAME = 22


@dataclass(frozen=True)
class Mark:
    """One measured point.

    Args:
        x: Of its centre.
        y: Of its centre.
        kind: `parent`, `merge` or `point`.
        says: What it is, with its numbers.
        blend: x of the blend of the models' values, where points are rows.
        name: Its row's name, where points are rows.
        worse: Whether it is worse than the blend.
    """

    x: float
    y: float
    kind: str
    says: str
    blend: float | None = None
    name: str = ""
    worse: bool = False


@dataclass(frozen=True)
class Chart:
    """One picture.

    Args:
        key: Names it in the page.
        title: What it shows.
        says: The same in words and numbers, for who does not see it.
        rows: Whether points are rows by name; else they are a curve over α.
        height: Of the view box; its width is `WIDTH`.
        marks: The points in their order.
        ticks: Position and text along the axis of values.
        ends: Names of the parents at α = 0 and 1.
        chord: Ends of the straight line between the parents, as `x,y x,y`.
        shaded: The barrier as a polygon; empty where there is none.
        barrier: The height of the barrier in words, and where it is written.
        of_blend: What values are compared with.
    """

    key: str
    title: str
    says: str
    rows: bool
    height: float
    marks: tuple[Mark, ...]
    ticks: tuple[tuple[float, str], ...]
    ends: tuple[str, str] = ("", "")
    chord: str = ""
    shaded: str = ""
    barrier: tuple[float, float, str] | None = None
    left: float = LEFT
    width: float = WIDTH
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = LINE_HEIGHT - BOTTOM

    @property
    def curve(self) -> str:
        """The measured points as `x,y x,y`."""
        return _polyline([(mark.x, mark.y) for mark in self.marks])

    @property
    def alphas(self) -> list[tuple[float, str]]:
        """Position and text along the axis of α."""
        span = self.right - self.left
        return [(self.left + span * alpha, f"{alpha:g}") for alpha in (0, 0.25, 0.5, 0.75, 1)]

    @property
    def has_worse(self) -> bool:
        """Whether any point is seen to be worse than the blend."""
        return bool(self.shaded) or any(mark.worse for mark in self.marks)


def path_charts(report: ConnectivityReport) -> list[Chart]:
    """One chart for the loss and one for each of the first metrics, where at least two points have a value."""
    draw = _line if report.region == "line" else _rows
    return [draw(report, curve) for curve in path_curves(report, MOST_METRICS)]


def _line(report: ConnectivityReport, curve: Curve) -> Chart:
    """A curve over α with the straight line between its ends."""
    scale = _Scale(curve, LINE_HEIGHT - BOTTOM, TOP, margin=0.2)
    across = [LEFT + (WIDTH - RIGHT - LEFT) * point.alpha for point in curve.points]
    values, line = ([scale(value) for value in heights] for heights in (curve.values, curve.blends))
    marks = tuple(
        Mark(x, y, kind, f"{point_name(report, point)}: {curve.style.title} {value_text(value, curve.style)}")
        for point, kind, x, y, value in zip(curve.points, curve.kinds, across, values, curve.values, strict=True)
        if math.isfinite(value)
    )
    names = [cut(display_name(model.id or "?"), LONGEST_NAME) for model in report.models]
    barrier = None
    if curve.has_blend and curve.visible_barrier is not None:
        index, text = curve.visible_barrier
        barrier = (*_beside(across, values, line, index), text)
    is_worse = curve.has_blend and all(map(math.isfinite, curve.heights)) and max(curve.heights) > 0
    says = "" if curve.height is None else f" Barrier {height_text(curve.height, curve.style)}."
    return Chart(
        curve.key,
        curve.title,
        _in_words(report, curve) + says,
        False,
        LINE_HEIGHT,
        marks,
        scale.ticks(curve.style),
        ends=(names[1], names[0]) if len(names) == 2 else ("", ""),
        chord=_polyline([(across[0], line[0]), (across[-1], line[-1])]) if curve.has_blend else "",
        shaded=_between(across, values, line, curve.heights) if is_worse else "",
        barrier=barrier,
    )


def _rows(report: ConnectivityReport, curve: Curve) -> Chart:
    """One row a point: its value, and the blend of the models' own."""
    scale = _Scale(curve, LEFT_OF_ROWS + 8, WIDTH - RIGHT - 8)
    marks = []
    for index, (point, kind, value, blend) in enumerate(
        zip(curve.points, curve.kinds, curve.values, curve.blends, strict=True)
    ):
        if not math.isfinite(value):
            continue
        name, has_blend = point_name(report, point), kind != "parent" and math.isfinite(blend)
        says = f"{name}: {curve.style.title} {value_text(value, curve.style)}"
        says += f", blend {value_text(blend, curve.style)}" if has_blend else ""
        y = TOP + ROW_HEIGHT * (index + 0.5)
        on_row = scale(blend) if has_blend else None
        worse = has_blend and curve.heights[index] > 0
        marks.append(Mark(scale(value), y, kind, says, on_row, cut(name, LONGEST_NAME), worse))
    bottom = TOP + ROW_HEIGHT * len(curve.points)
    return Chart(
        curve.key,
        curve.title,
        _in_words(report, curve),
        True,
        bottom + BOTTOM - 10,
        tuple(marks),
        scale.ticks(curve.style),
        left=LEFT_OF_ROWS,
        bottom=bottom,
    )


def _in_words(report: ConnectivityReport, curve: Curve) -> str:
    """The values at the models and at the merge as a sentence."""
    own = [
        f"{point_name(report, point)} {value_text(value, curve.style)}"
        for point, kind, value in zip(curve.points, curve.kinds, curve.values, strict=True)
        if math.isfinite(value) and kind != "point"
    ]
    return f"{capitalized(curve.style.title)}: {', '.join(own)}." if own else curve.style.title


def _polyline(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _between(across: Sequence[float], curve: Sequence[float], line: Sequence[float], heights: Sequence[float]) -> str:
    """The polygon between curve and line where the curve is worse; along the line elsewhere."""
    upper: list[tuple[float, float]] = []
    for index, (x, y, on_line, height) in enumerate(zip(across, curve, line, heights, strict=True)):
        if index and heights[index - 1] * height < 0:
            share = heights[index - 1] / (heights[index - 1] - height)
            crossing_x = across[index - 1] + share * (x - across[index - 1])
            upper.append((crossing_x, line[index - 1] + share * (on_line - line[index - 1])))
        upper.append((x, y if height > 0 else on_line))
    return _polyline([*upper, *zip(reversed(across), reversed(line), strict=True)])


def _beside(across: Sequence[float], curve: Sequence[float], line: Sequence[float], at: int) -> tuple[float, float]:
    """Where words about a point of the curve cover nothing of it: beyond it as seen from the line."""
    x = min(max(across[at], LEFT + HALF_LABEL), WIDTH - RIGHT - HALF_LABEL)
    near = [y for other, y in zip(across, curve, strict=True) if abs(other - x) <= HALF_LABEL + 12]
    return (x, min(near) - 10) if curve[at] < line[at] else (x, max(near) + 19)


class _Scale:
    """A map from the values of a curve to coordinates between two ends, with a margin."""

    def __init__(self, curve: Curve, start: float, end: float, margin: float = 0.1) -> None:
        low, high = curve.limits
        margin = margin * (high - low) or max(abs(high), 1e-3) * 0.1
        self._low, self._high = low - margin, high + margin
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        return self._start + (self._end - self._start) * (value - self._low) / (self._high - self._low)

    def ticks(self, style: MetricStyle) -> tuple[tuple[float, str], ...]:
        """Round values within the ends, with the digits that tell them apart."""
        from matplotlib.ticker import MaxNLocator

        factor = 100.0 if style.percent else 1.0
        values = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(factor * self._low, factor * self._high)
        step = float(values[1] - values[0])
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        unit = " %" if style.percent else ""
        return tuple(
            (self(float(value) / factor), f"{float(value):.{decimals}f}{unit}")
            for value in values
            if factor * self._low <= value <= factor * self._high
        )
