"""Where everything of a path's pictures lies, in units of their view boxes; the template draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.foundation.model_names import split_revision
from hf_llfc.publishing.plots.canvas import cut, known
from hf_llfc.publishing.reading import (
    LOSS,
    MetricStyle,
    blend_of_models,
    is_model,
    merge_point,
    metric_names,
    metric_style,
    number_text,
    point_name,
)
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
        ticks: Place and text along the axis of values.
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
        return " ".join(f"{mark.x:.1f},{mark.y:.1f}" for mark in self.marks)

    @property
    def alphas(self) -> list[tuple[float, str]]:
        """Place and text along the axis of α."""
        span = self.right - self.left
        return [(self.left + span * alpha, f"{alpha:g}") for alpha in (0, 0.25, 0.5, 0.75, 1)]

    @property
    def has_worse(self) -> bool:
        """Whether any point is seen to be worse than the blend."""
        return bool(self.shaded) or any(mark.worse for mark in self.marks)


def path_charts(report: ConnectivityReport) -> list[Chart]:
    """One chart for the loss and one for each of the first metrics, where at least two points have a value."""
    found: list[tuple[str, MetricStyle, list[float]]] = [("loss", LOSS, [known(point.loss) for point in report.path])]
    for name in metric_names(report)[:MOST_METRICS]:
        found.append((name, metric_style(name), [known(point.metrics.get(name)) for point in report.path]))
    draw = _line if report.region == "line" else _rows
    return [
        draw(report, key, style, values)
        for key, style, values in found
        if sum(math.isfinite(value) for value in values) >= 2
    ]


def _line(report: ConnectivityReport, key: str, style: MetricStyle, values: Sequence[float]) -> Chart:
    """A curve over α with the straight line between its ends."""
    line = blend_of_models(report.path, values)
    scale = _Scale([*values, *line], LINE_HEIGHT - BOTTOM, TOP, margin=0.2)
    across = [LEFT + (WIDTH - RIGHT - LEFT) * point.alpha for point in report.path]
    merged = merge_point(report)
    marks = tuple(
        Mark(
            x,
            scale(value),
            "merge" if point is merged else "parent" if is_model(point) else "point",
            f"{point_name(report, point)}: {style.title} {number_text(value, style)}",
        )
        for point, x, value in zip(report.path, across, values, strict=True)
        if math.isfinite(value)
    )
    heights = _heights(style, values, line)
    has_chord = all(map(math.isfinite, line))
    chord = f"{across[0]:.1f},{scale(line[0]):.1f} {across[-1]:.1f},{scale(line[-1]):.1f}" if has_chord else ""
    names = [cut(display_name(split_revision(model.id or "?")[0]), LONGEST_NAME) for model in report.models]
    shaded, barrier = "", None
    if has_chord and all(map(math.isfinite, heights)) and max(heights) > 0:
        shaded = _between(across, [scale(value) for value in values], [scale(value) for value in line], heights)
        at = max(range(len(heights)), key=heights.__getitem__)
        if heights[at] > 0.05 * scale.span:
            places, line_places = ([scale(value) for value in each] for each in (values, line))
            barrier = (*_beside(across, places, line_places, at), _amount(style, heights[at]))
    height = max((each for each in heights if math.isfinite(each)), default=math.nan)
    return Chart(
        key,
        f"{style.title} along the path",
        _in_words(report, style, values)
        + (f" Barrier {_amount(style, max(0.0, height))}." if height == height else ""),
        False,
        LINE_HEIGHT,
        marks,
        scale.ticks(style),
        ends=(names[1], names[0]) if len(names) == 2 else ("", ""),
        chord=chord,
        shaded=shaded,
        barrier=barrier,
    )


def _rows(report: ConnectivityReport, key: str, style: MetricStyle, values: Sequence[float]) -> Chart:
    """One row a point: its value, and the blend of the models' own."""
    blends = blend_of_models(report.path, values)
    scale = _Scale([*values, *blends], LEFT_OF_ROWS + 8, WIDTH - RIGHT - 8)
    heights = _heights(style, values, blends)
    merged = merge_point(report)
    marks = tuple(
        Mark(
            scale(value),
            TOP + ROW_HEIGHT * (place + 0.5),
            "merge" if point is merged else "parent" if is_model(point) else "point",
            f"{point_name(report, point)}: {style.title} {number_text(value, style)}"
            + ("" if is_model(point) or not math.isfinite(blend) else f", blend {number_text(blend, style)}"),
            None if is_model(point) or not math.isfinite(blend) else scale(blend),
            cut(point_name(report, point), LONGEST_NAME),
            not is_model(point) and height > 0,
        )
        for place, (point, value, blend, height) in enumerate(zip(report.path, values, blends, heights, strict=True))
        if math.isfinite(value)
    )
    bottom = TOP + ROW_HEIGHT * len(report.path)
    return Chart(
        key,
        f"{style.title} of merged models",
        _in_words(report, style, values),
        True,
        bottom + BOTTOM - 10,
        marks,
        scale.ticks(style),
        left=LEFT_OF_ROWS,
        bottom=bottom,
    )


def _in_words(report: ConnectivityReport, style: MetricStyle, values: Sequence[float]) -> str:
    """The values at the models and at the merge, or at the worst point, as a sentence."""
    own = [
        f"{point_name(report, point)} {number_text(value, style)}"
        for point, value in zip(report.path, values, strict=True)
        if math.isfinite(value) and (is_model(point) or point is merge_point(report))
    ]
    return f"{style.title[:1].upper()}{style.title[1:]}: {', '.join(own)}." if own else style.title


def _amount(style: MetricStyle, height: float) -> str:
    if style.percent:
        return f"{100 * height:.2f} points"
    return f"{height:.3f} nats" if style is LOSS else f"{height:.3g}"


def _heights(style: MetricStyle, values: Sequence[float], blends: Sequence[float]) -> list[float]:
    """By how much every value is worse than the blend; NaN where that is not known."""
    if style.higher_is_better is None:
        return [math.nan for _ in values]
    sign = -1.0 if style.higher_is_better else 1.0
    return [sign * (value - blend) for value, blend in zip(values, blends, strict=True)]


def _between(across: Sequence[float], curve: Sequence[float], line: Sequence[float], heights: Sequence[float]) -> str:
    """The polygon between curve and line where the curve is worse; along the line elsewhere."""
    upper: list[tuple[float, float]] = []
    for place, (x, y, on_line, height) in enumerate(zip(across, curve, line, heights, strict=True)):
        if place and heights[place - 1] * height < 0:
            share = heights[place - 1] / (heights[place - 1] - height)
            upper.append(
                (
                    across[place - 1] + share * (x - across[place - 1]),
                    line[place - 1] + share * (on_line - line[place - 1]),
                )
            )
        upper.append((x, y if height > 0 else on_line))
    points = [*upper, *zip(reversed(across), reversed(line), strict=True)]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _beside(across: Sequence[float], curve: Sequence[float], line: Sequence[float], at: int) -> tuple[float, float]:
    """Where words about a point of the curve cover nothing of it: beyond it as seen from the line."""
    x = min(max(across[at], LEFT + HALF_LABEL), WIDTH - RIGHT - HALF_LABEL)
    near = [y for place, y in zip(across, curve, strict=True) if abs(place - x) <= HALF_LABEL + 12]
    return (x, min(near) - 10) if curve[at] < line[at] else (x, max(near) + 19)


class _Scale:
    """From values to places between two ends, with a margin."""

    def __init__(self, values: Sequence[float], start: float, end: float, margin: float = 0.1) -> None:
        finite = [value for value in values if math.isfinite(value)]
        low, high = min(finite), max(finite)
        margin = margin * (high - low) or max(abs(high), 1e-3) * 0.1
        self.span = high - low
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
