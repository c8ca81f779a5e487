"""What plots and card read out of a connectivity report, in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import AdditivityRow, LayerRow, PathPoint
from hf_llfc.errors import EvaluationError, PublishingError

SAME_ALPHA = 1e-6
"""Two values of α closer than this are one."""

FAR_ABOVE = 1.5
"""A merge whose loss is more than this many times that of its worst parent is taken for broken."""
FAR_ABOVE_NATS = 0.1


@dataclass(frozen=True)
class MetricStyle:
    """How a metric is named and read.

    Args:
        title: What a reader calls it.
        higher_is_better: Which way is up; None where it is not known.
        percent: Whether a value of 0.5 is read as 50 %.
    """

    title: str
    higher_is_better: bool | None
    percent: bool = False


LOSS = MetricStyle("loss", higher_is_better=False)
METRIC_STYLES = {
    "accuracy": MetricStyle("accuracy", True, percent=True),
    "balanced_accuracy": MetricStyle("balanced accuracy", True, percent=True),
    "token_accuracy": MetricStyle("token accuracy", True, percent=True),
    "f1": MetricStyle("F1", True),
    "matthews_correlation": MetricStyle("Matthews correlation", True),
    "perplexity": MetricStyle("perplexity", False),
    "bits_per_byte": MetricStyle("bits per byte", False),
}


def metric_style(name: str) -> MetricStyle:
    """The style of a metric, a plain one for a metric that is not known."""
    return METRIC_STYLES.get(name) or MetricStyle(name.replace("_", " "), None)


def number_text(value: float | None, style: MetricStyle) -> str:
    """A loss or a metric with the digits that a reader wants."""
    if value is None or not math.isfinite(value):
        return "not finite" if value is not None else "–"
    if style.percent:
        return f"{100 * value:.2f} %"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 1000 else f"{value:.4g}"


def read_report(report: Mapping[str, Any] | ConnectivityReport) -> ConnectivityReport:
    """The report, from itself or from what its `to_dict` gave.

    Raises:
        PublishingError: It is no connectivity report of this version.
    """
    if isinstance(report, ConnectivityReport):
        return report
    try:
        return ConnectivityReport.from_dict(report)
    except EvaluationError as error:
        raise PublishingError(f"{error}; diagnose the models again") from error


def merge_alpha(report: ConnectivityReport) -> float | None:
    """The α of the merge that is published; None if it does not lie on the path."""
    weights = [model.weight for model in report.models]
    if len(weights) != 2 or weights[0] is None or weights[1] is None:
        return None
    return weights[0] if abs(sum(weights) - 1) < SAME_ALPHA else None  # type: ignore[arg-type]


def point_at(report: ConnectivityReport, alpha: float | None) -> PathPoint | None:
    """What was measured at this α, if it is one of the path's."""
    if alpha is None:
        return None
    return next((point for point in report.path if abs(point.alpha - alpha) < SAME_ALPHA), None)


def metric_names(report: ConnectivityReport) -> list[str]:
    """Every metric of the path, the one that the report names first in front."""
    return list(dict.fromkeys(name for point in report.path for name in point.metrics))


def point_weights(of: PathPoint | LayerRow) -> tuple[float, ...]:
    """The weights of all models at a point; reports of a line need not write them."""
    return of.weights or (of.alpha, 1 - of.alpha)


def is_model(of: PathPoint | LayerRow) -> bool:
    """Whether a point is one of the models themselves, where merged features are those of the model."""
    return max(point_weights(of)) > 1 - SAME_ALPHA and min(point_weights(of)) > -SAME_ALPHA


def point_model(of: PathPoint) -> int:
    """The model that has the largest weight at a point."""
    weights = point_weights(of)
    return weights.index(max(weights))


def point_name(report: ConnectivityReport, of: PathPoint | LayerRow) -> str:
    """What a reader calls a point: its α on a line, elsewhere the name that the report gives it."""
    if report.region == "line":
        return f"α = {of.alpha:.3g}"
    names = (point.name for point in report.path if point_weights(point) == point_weights(of))
    return next(names, "") or " : ".join(f"{weight:.3g}" for weight in point_weights(of))


def model_points(report: ConnectivityReport) -> list[PathPoint | None]:
    """What was measured of every model itself, in their order; None where it is no point of the path."""
    own = {point_model(point): point for point in report.path if is_model(point)}
    return [own.get(model) for model in range(len(report.models))]


def merge_point(report: ConnectivityReport) -> PathPoint | None:
    """What was measured of the merge that is published, if it is a point of the path."""
    if report.region == "line":
        return point_at(report, merge_alpha(report))
    return report.path[-1] if report.path and not is_model(report.path[-1]) else None


def merge_is_outside(report: ConnectivityReport) -> bool:
    """Whether the merge does not lie between the models, as sums of task vectors need not: no barrier is its own."""
    merged = merge_point(report)
    return merged is not None and any(weight < 0 for weight in merged.weights)


def shown_layers(report: ConnectivityReport) -> list[LayerRow]:
    """One row a layer: at the merge, or on a line at the measured α inside that is nearest to it, or to the middle."""
    if report.region != "line":
        return [row for row in report.at() if not is_model(row)]
    wanted = merge_alpha(report)
    wanted = 0.5 if wanted is None else wanted
    inside = [row for row in report.layers if SAME_ALPHA < row.alpha < 1 - SAME_ALPHA]
    nearest = min((row.alpha for row in inside), key=lambda alpha: (abs(alpha - wanted), alpha), default=None)
    return [row for row in inside if row.alpha == nearest]


def shown_additivity(report: ConnectivityReport) -> list[AdditivityRow]:
    """One row an activation function, at the measured α that is nearest to the merge, or to the middle."""
    wanted = merge_alpha(report)
    wanted = 0.5 if wanted is None else wanted
    nearest = min(
        (row.alpha for row in report.additivity), key=lambda alpha: (abs(alpha - wanted), alpha), default=None
    )
    return [row for row in report.additivity if row.alpha == nearest]


def not_finite(report: ConnectivityReport) -> list[str]:
    """What the report could not give a finite number for, as a reader would name it."""
    found = []
    measured = any(point.loss is not None for point in report.path)
    for point in report.path:
        values = {"loss": point.loss, **point.metrics} if measured else point.metrics
        for name, value in values.items():
            if value is None or not math.isfinite(value):
                found.append(f"{metric_style(name).title} at {point_name(report, point)}")
    for row in report.layers:
        if row.llfc.mean is None or not math.isfinite(row.llfc.mean):
            found.append(f"features of {row.layer} at {point_name(report, row)}")
    return found


def is_far_above(loss: float, parents: Sequence[float]) -> bool:
    """Whether the loss of a merge is so far above that of its worst parent that it is taken for broken."""
    worst = max(parents)
    return loss > FAR_ABOVE * worst and loss > worst + FAR_ABOVE_NATS


def blend_of_models(points: Sequence[PathPoint], values: Sequence[float]) -> list[float]:
    """The blend of the models' own values at every point: on a line the chord between its ends.

    Args:
        points: All of a path.
        values: One a point, NaN where there is none.

    Returns:
        Σ wᵢ·valueᵢ; NaN where the value of a model is missing, or where a weight is negative, since outside the models
        a blend of their values says nothing.
    """
    own = {point_model(point): value for point, value in zip(points, values, strict=True) if is_model(point)}
    blends = []
    for point in points:
        weights = point_weights(point)
        needed = [index for index, weight in enumerate(weights) if abs(weight) > SAME_ALPHA]
        inside = min(weights) > -SAME_ALPHA and all(index in own for index in needed)
        blends.append(math.fsum(weights[index] * own[index] for index in needed) if inside else math.nan)
    return blends
