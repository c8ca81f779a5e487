"""The diagnosis of two or more models: loss, metric and features at every point between them.

The lockstep does the measuring, batch by batch; this module prepares it, shares the samples among processes and makes
the report.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_llfc.diagnostics.batch_norm import batch_norm_state, has_batch_norm, recompute_batch_norm
from hf_llfc.diagnostics.chance import at_chance
from hf_llfc.diagnostics.combination import CombinedModel, MovingModel
from hf_llfc.diagnostics.contradiction import contradiction_of
from hf_llfc.diagnostics.features.layers import LOGITS, Layer, select_layers
from hf_llfc.diagnostics.lockstep import Lockstep, PathSums
from hf_llfc.diagnostics.points import Point, Region, judged_point, line
from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import Barrier, LayerRow, ModelReference, PathPoint
from hf_llfc.diagnostics.streaming import IN_ONE_PROCESS, Execution, over_batches
from hf_llfc.diagnostics.verdict import judge
from hf_llfc.errors import EvaluationError, suggest
from hf_llfc.evaluation.data import EvaluationData
from hf_llfc.evaluation.models import evaluation_mode
from hf_llfc.evaluation.scoring import ScoreSums
from hf_llfc.foundation.choices import UNITS
from hf_llfc.recipe.data import CLASSIFICATION_TASKS

logger = logging.getLogger(__name__)

LIBRARIES = ("hf-llfc", "torch", "transformers", "datasets", "accelerate", "evaluate")


@dataclass(frozen=True)
class Features:
    """Features that a diagnosis compares.

    Attributes:
        layers: Modules as shell patterns, see `select_layers`; every block where None. Logits always come last.
        unit: ``sample``, one feature vector a sample as in the paper, or ``token``, one a token, of which mean, spread
            and quantiles are then taken.

    Raises:
        EvaluationError: The unit is unknown.
    """

    layers: Sequence[str] | None = None
    unit: str = "sample"

    def __post_init__(self) -> None:
        """Raises `EvaluationError` for an unknown unit."""
        if self.unit not in UNITS:
            raise EvaluationError(f"unknown unit {self.unit!r}{suggest(self.unit, UNITS)} (known: {', '.join(UNITS)})")


BLOCKS = Features()
"""The outputs of every block."""


@dataclass(frozen=True)
class Origin:
    """Origin of compared models, as a report describes it.

    Attributes:
        models: Id, revision and weight of each; unknown where empty.
        alignment: Alignment of the models (`method`, ...); empty, or with the method ``none``, if they were not.
    """

    models: tuple[ModelReference, ...] = ()
    alignment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_aligned(self) -> bool:
        """Whether one model was moved into the coordinates of another."""
        return self.alignment.get("method") not in (None, "none")


UNKNOWN = Origin()
"""Nothing is known of the models, and nothing was aligned."""


def diagnose_models(
    models: Sequence[PreTrainedModel],
    data: EvaluationData,
    *,
    region: Region | None = None,
    features: Features = Features(),
    batch_norm_data: EvaluationData | None = None,
    origin: Origin = UNKNOWN,
    execution: Execution = IN_ONE_PROCESS,
) -> ConnectivityReport:
    """Measures between models: loss, metric and, layer by layer, LLFC (arXiv 2307.08286).

    For each batch every model runs once, then one more model runs once per point with its weights combined in place.
    Its features are compared with the same combination of the models' features at the moment they are computed;
    nothing outlives its batch but sums, so memory depends on neither samples nor points.

    Args:
        models: Two or more, already aligned onto one of them.
        data: The samples; without labels only features are compared.
        region: Where to measure; the line between two models in steps of a tenth without it. Loss and metric are
            always measured at the models themselves too.
        features: Features that are compared.
        batch_norm_data: Calibration samples from which batch normalization is recomputed at every point between the
            models; without them its statistics are combined. Has no effect on models without it.
        origin: Ids, weights and alignment of the models, for the report.
        execution: Processes, progress, and the model that is moved from point to point.

    Returns:
        The report, equal on all processes.

    Raises:
        EvaluationError: The models do not fit each other or the data, or a feature is not finite.
    """
    if region is None:
        region = line()
    if len(models) != region.models:
        raise EvaluationError(f"{len(models)} models for points with {region.models} weights; give one weight a model")
    measured = _with_ends(region) if region.kind == "line" else region
    if execution.processes is not None and execution.combined is None:
        for model in models:
            model.to(execution.processes.device)  # type: ignore[arg-type]  # the signature is hidden
    with evaluation_mode(*models):
        combined = execution.combined or CombinedModel(models)
        first_batch, _ = next(data.batches())
        selected = select_layers(models[0], first_batch, features.layers)
        if data.labelled and selected[-1].label != LOGITS:
            raise EvaluationError(f"{type(models[0]).__name__} has no logits; a model with a task head is needed")
        buffers = _recomputed_batch_norm(combined, measured.points, batch_norm_data)
        lockstep = Lockstep.start(models, combined, measured, selected, buffers, data, features.unit)
        sums = over_batches(data, lockstep.add, lockstep.sums, "diagnosing", execution)
    summary = dict(data.summary)
    if buffers:
        summary["batch_norm"] = "recomputed"
    if features.unit != "sample":
        summary["unit"] = features.unit
    return _report(sums, selected, region, measured, data, summary, origin)


def _with_ends(region: Region) -> Region:
    """A line with both of its ends, where loss and metric are always measured."""
    return Region(region.kind, line([0.0, 1.0, *(point.alpha for point in region.points)]).points)


def _recomputed_batch_norm(
    combined: MovingModel, points: Sequence[Point], data: EvaluationData | None
) -> dict[int, dict[str, torch.Tensor]]:
    """Statistics of batch normalization at each point, by its index; the models keep their own.

    Every process measures on all calibration samples, so that all have the same statistics.
    """
    if data is None or not has_batch_norm(combined.model):
        return {}
    buffers = {}
    for index, point in enumerate(points):
        if point.vertex is None:
            combined.move_to(point.weights)
            recompute_batch_norm(combined.model, data.batches())
            buffers[index] = batch_norm_state(combined.model)
    return buffers


def _report(
    sums: PathSums,
    layers: Sequence[Layer],
    region: Region,
    measured: Region,
    data: EvaluationData,
    summary: Mapping[str, Any],
    origin: Origin,
) -> ConnectivityReport:
    path = tuple(_path_point(point, scores, data) for point, scores in zip(measured.points, sums.scores, strict=True))
    barrier = Barrier(None, None)
    if data.labelled:
        barrier = Barrier(
            loss=barrier_height(measured.points, [scores.loss for scores in sums.scores]),
            error=barrier_height(measured.points, [scores.error for scores in sums.scores]),
        )
    by_sample = "unit" not in summary
    llfc, coefficient, baseline = (
        values.statistics(intervals=by_sample) for values in (sums.llfc, sums.coefficient, sums.baseline)
    )
    wanted = set(region.points)
    rows = tuple(
        LayerRow(
            layer=layer.label,
            alpha=point.alpha,
            llfc=llfc[at * len(layers) + index],
            baseline=baseline[index],
            coefficient=coefficient[at * len(layers) + index],
            weights=point.weights,
        )
        for index, layer in enumerate(layers)
        for at, point in enumerate(measured.points)
        if point in wanted
    )
    merge = judged_point(region)
    between = {measured.points[place]: agreement for place, agreement in sums.agreements.items()}
    outputs = between[merge].agreement(merge, sums.predictions) if merge.convex and merge in between else None
    models = origin.models or (ModelReference(),) * region.models
    language = data.task not in CLASSIFICATION_TASKS
    ours = slice(-1) if region.kind == "arithmetic" else slice(None)  # the base need not know the task
    lost = at_chance(sums.predictions[ours], models, language=language)
    classes = sums.predictions[0].classes
    found = (contradiction_of(pairs, model, classes, outputs) for model, pairs in sums.choices.items())
    contradiction = next((each for each in found if each is not None), None)
    return ConnectivityReport(
        models=models,
        path=path,
        barrier=barrier,
        layers=rows,
        verdict=judge(
            # Outside the simplex no blend of the parents' losses is a bound.
            barrier if merge.convex else Barrier(None, None),
            [row for row in rows if row.weights == merge.weights],
            aligned=origin.is_aligned,
            # With labels, losses say more than predictions.
            outputs=None if data.labelled else outputs,
            convex=merge.convex,
            on_line=region.kind == "line",
            at_chance=lost,
            contradiction=contradiction,
            harm=_over_the_better(measured, sums, merge, len(sums.predictions[ours])) if data.labelled else None,
        ),
        region=region.kind,
        decomposition=tuple(agreement.row(point) for point, agreement in between.items() if point in wanted),
        outputs=outputs,
        contradiction=contradiction,
        at_chance=lost,
        samples=sums.carriers.rows(),
        data=summary,
        alignment=dict(origin.alignment),
        versions=_versions(),
    )


def _over_the_better(measured: Region, sums: PathSums, merge: Point, models: int) -> Barrier | None:
    """Loss and error of the merge over those of the better model; None where the models were not measured."""
    own = {point.vertex: scores for point, scores in zip(measured.points, sums.scores, strict=True)}
    parents = [own[index] for index in range(models) if index in own]
    if not parents or merge not in measured.points:
        return None
    scores = sums.scores[measured.points.index(merge)]
    return Barrier(
        loss=scores.loss - min(each.loss for each in parents), error=scores.error - min(each.error for each in parents)
    )


def barrier_height(points: Sequence[Point], values: Sequence[float]) -> float:
    """The barrier: sup over points of L(Σ wₘθₘ) − Σ wₘL(θₘ).

    Args:
        points: The points, with the models themselves among them; points outside the simplex are left out.
        values: L at each point.

    Returns:
        At least 0, as the difference is 0 at the models.
    """
    own = {point.vertex: value for point, value in zip(points, values, strict=True) if point.vertex is not None}
    return max(
        value - sum(weight * own[model] for model, weight in enumerate(point.weights) if weight)
        for point, value in zip(points, values, strict=True)
        if point.convex
    )


def _path_point(point: Point, scores: ScoreSums, data: EvaluationData) -> PathPoint:
    if not data.labelled:
        return PathPoint(point.alpha, None, {}, point.weights, point.name)
    values = scores.metrics(data.metrics, data.byte_count)
    metrics = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return PathPoint(point.alpha, scores.loss, metrics, point.weights, point.name)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            # A checkout that runs without being installed has no version of its own.
            logger.debug("%s is not installed as a package", library)
    return versions
