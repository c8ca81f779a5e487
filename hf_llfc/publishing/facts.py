"""What plots and card read out of a connectivity report, in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import LayerRow, PathPoint
from hf_llfc.errors import EvaluationError, PublishingError

SAME_ALPHA = 1e-6
"""Two values of α closer than this are one."""


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


def shown_layers(report: ConnectivityReport) -> list[LayerRow]:
    """One row a layer, at the measured α inside the path that is nearest to the merge, or to the middle."""
    wanted = merge_alpha(report)
    wanted = 0.5 if wanted is None else wanted
    inside = [row for row in report.layers if SAME_ALPHA < row.alpha < 1 - SAME_ALPHA]
    nearest = min((row.alpha for row in inside), key=lambda alpha: (abs(alpha - wanted), alpha), default=None)
    return [row for row in inside if row.alpha == nearest]


def not_finite(report: ConnectivityReport) -> list[str]:
    """What the report could not give a finite number for, as a reader would name it."""
    found = []
    measured = any(point.loss is not None for point in report.path)
    for point in report.path:
        values = {"loss": point.loss, **point.metrics} if measured else point.metrics
        for name, value in values.items():
            if value is None or not math.isfinite(value):
                found.append(f"{metric_style(name).title} at α = {point.alpha:g}")
    for row in report.layers:
        if row.llfc.mean is None or not math.isfinite(row.llfc.mean):
            found.append(f"features of {row.layer} at α = {row.alpha:g}")
    return found


def chord(alphas: Sequence[float], values: Sequence[float]) -> list[float] | None:
    """The straight line between the values at both ends of the path, at every α; None if an end is missing."""
    at_zero = next((value for alpha, value in zip(alphas, values, strict=True) if abs(alpha) < SAME_ALPHA), None)
    at_one = next((value for alpha, value in zip(alphas, values, strict=True) if abs(1 - alpha) < SAME_ALPHA), None)
    if at_zero is None or at_one is None:
        return None
    return [alpha * at_one + (1 - alpha) * at_zero for alpha in alphas]
