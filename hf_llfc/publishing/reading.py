"""What is read out of a connectivity report, in one place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import AdditivityRow, DecompositionRow, LayerRow, PathPoint
from hf_llfc.diagnostics.verdict import HARM_ERROR, HARM_LOSS
from hf_llfc.errors import EvaluationError, PublishingError
from hf_llfc.publishing.numbers import is_number, metric_style

Row = TypeVar("Row", LayerRow, AdditivityRow, DecompositionRow)

SAME_ALPHA = 1e-6
"""Two values of α closer than this are one."""

FAR_ABOVE = 1.5
"""A merge whose loss is more than this many times that of its worst parent is taken for broken."""
FAR_ABOVE_NATS = 0.1


def read_report(path: Path) -> ConnectivityReport:
    """The report in a file.

    Raises:
        PublishingError: The file holds no connectivity report of this version.
    """
    try:
        return ConnectivityReport.load(path)
    except EvaluationError as error:
        raise PublishingError(f"{error}; diagnose the models again, or delete the file") from None


def merge_alpha(report: ConnectivityReport) -> float | None:
    """The α of the merge that is published; None if it does not lie on the path."""
    weights = [model.weight for model in report.models if model.weight is not None]
    return weights[0] if len(weights) == len(report.models) == 2 and abs(sum(weights) - 1) < SAME_ALPHA else None


def point_at(report: ConnectivityReport, alpha: float | None) -> PathPoint | None:
    """The point of the path at this α, if it has one."""
    if alpha is None:
        return None
    return next((point for point in report.path if abs(point.alpha - alpha) < SAME_ALPHA), None)


def metric_names(report: ConnectivityReport) -> list[str]:
    """Every metric of the path, the one that the report names first in front."""
    return list(dict.fromkeys(name for point in report.path for name in point.metrics))


def point_weights(of: PathPoint | LayerRow | DecompositionRow) -> tuple[float, ...]:
    """The weights of all models at a point; reports of a line need not write them."""
    return of.weights or (of.alpha, 1 - of.alpha)


def is_model(of: PathPoint | LayerRow) -> bool:
    """Whether a point is one of the models themselves, where merged features are those of the model."""
    return max(point_weights(of)) > 1 - SAME_ALPHA and min(point_weights(of)) > -SAME_ALPHA


def point_model(of: PathPoint) -> int:
    """The index of the model that has the largest weight at a point."""
    weights = point_weights(of)
    return weights.index(max(weights))


def point_name(report: ConnectivityReport, of: PathPoint | LayerRow | DecompositionRow) -> str:
    """What a reader calls a point: its α on a line, elsewhere the name that the report gives it."""
    if report.region == "line":
        return f"α = {of.alpha:.3g}"
    names = (point.name for point in report.path if point_weights(point) == point_weights(of))
    return next(names, "") or " : ".join(f"{weight:.3g}" for weight in point_weights(of))


def model_names(report: ConnectivityReport) -> list[str]:
    """What the report calls its models: A and B, or `model 1` and so on, and `base`."""
    if report.region == "line" and len(report.models) == 2:
        return ["A", "B"]
    names = [f"model {number}" for number in range(1, len(report.models) + 1)]
    return [*names[:-1], "base"] if report.region == "arithmetic" else names


def model_points(report: ConnectivityReport) -> list[PathPoint | None]:
    """The point of every model itself, in their order; None where the path has no such point."""
    own = {point_model(point): point for point in report.path if is_model(point)}
    return [own.get(model) for model in range(len(report.models))]


def merge_point(report: ConnectivityReport) -> PathPoint | None:
    """The point of the merge that is published, if it lies on the path."""
    if report.data.get("calibrated") is not None or report.data.get("judged") is not None:
        return None
    if report.region == "line":
        return point_at(report, merge_alpha(report))
    return report.path[-1] if report.path and not is_model(report.path[-1]) else None


def is_worse_than_a_parent(report: ConnectivityReport) -> bool:
    """Whether the merge is much worse than the better parent: in loss, or in accuracy."""
    merged, own = merge_point(report), [point for point in model_points(report) if point is not None]
    if merged is None or merged.loss is None:
        return False
    losses = [point.loss for point in own if point.loss is not None]
    hits = [value for point in own if (value := point.metrics.get("accuracy")) is not None]
    accuracy = merged.metrics.get("accuracy")
    return bool(losses and merged.loss - min(losses) > HARM_LOSS) or bool(
        hits and accuracy is not None and max(hits) - accuracy > HARM_ERROR
    )


def merge_is_outside(report: ConnectivityReport) -> bool:
    """Whether the merge does not lie between the models, as sums of task vectors need not: no barrier is its own."""
    merged = merge_point(report)
    return merged is not None and any(weight < 0 for weight in merged.weights)


def shown_layers(report: ConnectivityReport) -> list[LayerRow]:
    """One row a layer: at the merge, or on a line at the measured α inside that is nearest to it, or to the middle."""
    if report.region != "line":
        return [row for row in report.at() if not is_model(row)]
    return _nearest(report, [row for row in report.layers if SAME_ALPHA < row.alpha < 1 - SAME_ALPHA])


def shown_additivity(report: ConnectivityReport) -> list[AdditivityRow]:
    """One row an activation function, at the measured α that is nearest to the merge, or to the middle."""
    return _nearest(report, report.additivity)


def shown_decomposition(report: ConnectivityReport) -> DecompositionRow | None:
    """The barrier taken apart at the merge, or at the point whose layers are shown."""
    rows = _nearest(report, report.decomposition) if report.region == "line" else report.decomposition[-1:]
    return rows[0] if rows else None


def _nearest(report: ConnectivityReport, rows: Sequence[Row]) -> list[Row]:
    """The rows at the α that is nearest to the merge, or to the middle."""
    merged = merge_alpha(report)
    wanted = 0.5 if merged is None else merged
    nearest = min((row.alpha for row in rows), key=lambda alpha: (abs(alpha - wanted), alpha), default=None)
    return [row for row in rows if row.alpha == nearest]


def largest_ratio(rows: Sequence[LayerRow]) -> tuple[float, str] | None:
    """The largest ratio of LLFC to its baseline and its layer; None where no layer has one."""
    return max(((row.ratio, row.layer) for row in rows if row.ratio is not None), default=None)


def farthest_coefficient(rows: Sequence[LayerRow]) -> tuple[float, str] | None:
    """The coefficient farthest from 1, as a factor, and its layer; None where no layer has one."""
    sizes = [(row.coefficient.mean, row.layer) for row in rows if row.coefficient.mean is not None]
    return max(sizes, key=lambda pair: abs(math.log(pair[0])) if pair[0] > 0 else math.inf, default=None)


def not_finite(report: ConnectivityReport) -> list[str]:
    """The numbers of the report that are not finite, as a reader would name them."""
    names = []
    measured = any(point.loss is not None for point in report.path)
    for point in report.path:
        values = {"loss": point.loss, **point.metrics} if measured else point.metrics
        names += [
            f"{metric_style(name).title} at {point_name(report, point)}"
            for name, value in values.items()
            if not is_number(value)
        ]
    return names + [
        f"features of {row.layer} at {point_name(report, row)}" for row in report.layers if not is_number(row.llfc.mean)
    ]


def is_far_above(loss: float, parents: Sequence[float]) -> bool:
    """Whether the loss of a merge is so far above that of its worst parent that it is taken for broken."""
    worst = max(parents)
    return loss > FAR_ABOVE * worst and loss > worst + FAR_ABOVE_NATS
