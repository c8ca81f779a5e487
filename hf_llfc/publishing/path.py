"""Loss and metrics along the path, as pictures, page and tables show them: values, their blend, and the barrier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import PathPoint
from hf_llfc.publishing.numbers import LOSS, MetricStyle, height_text, known, metric_style
from hf_llfc.publishing.reading import SAME_ALPHA, is_model, merge_point, metric_names, point_model, point_weights

VISIBLE_BARRIER = 0.08
"""As a share of all that is drawn. A lower barrier is not seen beside the whole, and is written in tables only."""


@dataclass(frozen=True)
class Curve:
    """A loss or a metric at every point of the path, against the blend of the models' own values.

    Args:
        key: The metric, or `loss`.
        style: How it is named and read.
        on_line: Whether the points lie on a line between two models.
        points: All of the path.
        kinds: `parent`, `merge` or `point`, for each.
        values: One a point, NaN where there is none.
        blends: What the values are compared with, one a point: on a line the straight line between its ends. NaN where
            the value of a model is missing, or outside the models, where a blend says nothing.
    """

    key: str
    style: MetricStyle
    on_line: bool
    points: tuple[PathPoint, ...]
    kinds: tuple[str, ...]
    values: tuple[float, ...]
    blends: tuple[float, ...]

    @property
    def title(self) -> str:
        """What the curve shows."""
        return f"{self.style.title} along the path" if self.on_line else f"{self.style.title} of merged models"

    @property
    def has_blend(self) -> bool:
        """Whether every point has a blend to compare with."""
        return all(map(math.isfinite, self.blends))

    @property
    def limits(self) -> tuple[float, float]:
        """The smallest and the largest of all values and blends."""
        finite = [value for value in (*self.values, *self.blends) if math.isfinite(value)]
        return min(finite), max(finite)

    @property
    def span(self) -> float:
        """How far the limits are apart."""
        low, high = self.limits
        return high - low

    @property
    def heights(self) -> tuple[float, ...]:
        """By how much every value is worse than its blend; NaN where that is not known."""
        if self.style.higher_is_better is None:
            return (math.nan,) * len(self.values)
        sign = -1.0 if self.style.higher_is_better else 1.0
        return tuple(sign * (value - blend) for value, blend in zip(self.values, self.blends, strict=True))

    @property
    def height(self) -> float | None:
        """The height of the barrier, at least 0; None where it is not known."""
        known_heights = [height for height in self.heights if math.isfinite(height)]
        return max(0.0, *known_heights) if known_heights else None

    @property
    def visible_barrier(self) -> tuple[int, str] | None:
        """The index of the point with the barrier and its height as text; None if it is not seen beside the whole."""
        heights = [height if math.isfinite(height) else -math.inf for height in self.heights]
        index = max(range(len(heights)), key=heights.__getitem__)
        if not heights[index] > VISIBLE_BARRIER * self.span:
            return None
        return index, height_text(heights[index], self.style)


def path_curves(report: ConnectivityReport, metrics: int) -> list[Curve]:
    """The curve of the loss and those of the first metrics, where at least two points have a value.

    Args:
        report: The report.
        metrics: How many metrics at most.
    """
    merged = merge_point(report)
    kinds = tuple("merge" if point is merged else "parent" if is_model(point) else "point" for point in report.path)
    measured = [("loss", LOSS, tuple(known(point.loss) for point in report.path))]
    for name in metric_names(report)[:metrics]:
        measured.append((name, metric_style(name), tuple(known(point.metrics.get(name)) for point in report.path)))
    return [
        Curve(key, style, report.region == "line", report.path, kinds, values, blend_of_models(report.path, values))
        for key, style, values in measured
        if sum(map(math.isfinite, values)) >= 2
    ]


def blend_of_models(points: Sequence[PathPoint], values: Sequence[float]) -> tuple[float, ...]:
    """The blend Σ wᵢ·valueᵢ of the models' own values at every point, as `Curve.blends`."""
    own = {point_model(point): value for point, value in zip(points, values, strict=True) if is_model(point)}
    blends = []
    for point in points:
        weights = point_weights(point)
        needed = [index for index, weight in enumerate(weights) if abs(weight) > SAME_ALPHA]
        inside = min(weights) > -SAME_ALPHA and all(index in own for index in needed)
        blends.append(math.fsum(weights[index] * own[index] for index in needed) if inside else math.nan)
    return tuple(blends)
