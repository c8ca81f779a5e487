"""The diagnosis of a pair: both parents and every point of the path, batch by batch, in lockstep.

Shape legend: k values of alpha, l layers, s statistics, n samples, t tokens, f features.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from hf_llfc.diagnostics.batch_norm import batch_norm_state, has_batch_norm, recompute_batch_norm
from hf_llfc.diagnostics.layers import LOGITS, Layer, handing_over, sample_vectors, select_layers
from hf_llfc.diagnostics.path import WeightPath
from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import Barrier, LayerRow, ModelReference, PathPoint, Statistic
from hf_llfc.diagnostics.statistics import RunningMoments, cosine_distance, products, projection_coefficient
from hf_llfc.diagnostics.verdict import judge
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.data import EvaluationData, problems_over_processes
from hf_llfc.evaluation.models import evaluation_mode, forward_logits, gather
from hf_llfc.evaluation.scoring import ScoreSums, score_samples

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

DEFAULT_ALPHAS = tuple(step / 10 for step in range(11))
"""Steps of a tenth, ends included."""

LIBRARIES = ("hf-llfc", "torch", "transformers", "datasets", "accelerate", "evaluate")


def diagnose_models(
    model_a: PreTrainedModel,
    model_b: PreTrainedModel,
    data: EvaluationData,
    *,
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    layers: Sequence[str] | None = None,
    accelerator: Accelerator | None = None,
    batch_norm_data: EvaluationData | None = None,
    models: Sequence[Mapping[str, Any]] | None = None,
    alignment: Mapping[str, Any] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> ConnectivityReport:
    """Measures the path between two models: loss, metric and, layer by layer, LLFC (arXiv 2307.08286).

    For each batch both parents run once, then a third model runs once per α with its weights moved in place. Its
    features are compared with the blend αA + (1−α)B of the parents' at the moment they are computed; nothing
    outlives its batch but sums, so memory depends on neither samples nor alphas.

    Args:
        model_a: The model with weight α.
        model_b: The model with weight 1 − α, already aligned onto the first.
        data: The samples; without labels only features are compared.
        alphas: Where to measure, each from 0 to 1. Loss and metric are always measured at both ends too.
        layers: Modules as shell patterns, see `select_layers`; without them every block. Logits always come last.
        accelerator: Shares the samples among its processes; every process gets the report of all.
        batch_norm_data: Calibration samples from which batch normalization is recomputed at every α inside the
            path; without them its statistics are interpolated. Has no effect on models without it.
        models: `id`, `revision` and `weight` of both, for the report.
        alignment: How the second model was aligned (`method`, ...), for the report and the verdict; None or the
            method ``none`` if it was not.
        on_batch: Called with the number of batches done and the number there are, for progress bars.

    Returns:
        The report, equal on all processes.

    Raises:
        EvaluationError: The models do not fit each other or the data, or a feature is not finite.
    """
    grid = _checked(alphas)
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    if accelerator is not None:
        model_a.to(accelerator.device)
        model_b.to(accelerator.device)
    with evaluation_mode(model_a, model_b):
        path = WeightPath(model_a, model_b)
        first_batch, _ = next(data.batches())
        selected = select_layers(model_a, first_batch, layers)
        if data.labelled and selected[-1].label != LOGITS:
            raise EvaluationError(f"{type(model_a).__name__} has no logits; a model with a task head is needed")
        buffers = _recomputed_batch_norm(path, grid, batch_norm_data)
        lockstep = Lockstep.start(model_a, model_b, path, selected, grid, buffers, data)
        problem: str | None = None
        total = data.batch_count(rank, world)
        try:
            for done, (batch, sample_ids) in enumerate(data.batches(rank, world), start=1):
                lockstep.add(batch, sample_ids)
                if on_batch is not None:
                    on_batch(done, total)
        except EvaluationError as error:
            problem = str(error)
    sums = lockstep.sums
    if accelerator is None:
        problems_over_processes([problem])
    else:
        parts = gather([(sums.cpu(), problem)])
        problems_over_processes([problem for _, problem in parts])
        sums = parts[0][0]
        for part, _ in parts[1:]:
            sums.merge(part)
    return _report(sums, selected, grid, data, models, alignment, bool(buffers))


def _checked(alphas: Sequence[float]) -> tuple[float, ...]:
    bad = [alpha for alpha in alphas if not (isinstance(alpha, int | float) and 0 <= alpha <= 1)]
    if bad or not alphas:
        raise EvaluationError(f"alphas must be numbers from 0 to 1, at least one, not {list(alphas)!r}")
    if all(alpha in (0, 1) for alpha in alphas):
        raise EvaluationError("alphas need a value between 0 and 1; at the ends there is nothing but the parents")
    return tuple(sorted({float(alpha) for alpha in alphas}))


def _recomputed_batch_norm(
    path: WeightPath, grid: Sequence[float], data: EvaluationData | None
) -> dict[float, dict[str, torch.Tensor]]:
    """Statistics of batch normalization that belong to each α; the parents keep their own.

    Every process measures on all calibration samples, so that all have the same statistics.
    """
    if data is None or not has_batch_norm(path.model):
        return {}
    buffers = {}
    for alpha in grid:
        if 0 < alpha < 1:
            path.move_to(alpha)
            recompute_batch_norm(path.model, data.batches())
            buffers[alpha] = batch_norm_state(path.model)
    return buffers


@dataclass
class PathSums:
    """All that is kept of the samples seen.

    Args:
        scores: Loss and hits by α.
        llfc: 1 − cos(merged, blend), (k, l).
        coefficient: Of merged on blend, (k, l).
        baseline: 1 − cos(A, B), (l,).
    """

    scores: dict[float, ScoreSums]
    llfc: RunningMoments
    coefficient: RunningMoments
    baseline: RunningMoments

    def merge(self, other: PathSums) -> None:
        """Adds what another process has gathered."""
        for alpha, scores in self.scores.items():
            scores.merge(other.scores[alpha])
        self.llfc.merge(other.llfc)
        self.coefficient.merge(other.coefficient)
        self.baseline.merge(other.baseline)

    def cpu(self) -> PathSums:
        """A copy in main memory, for other processes."""
        return PathSums(self.scores, self.llfc.cpu(), self.coefficient.cpu(), self.baseline.cpu())


@dataclass(frozen=True)
class Lockstep:
    """The lockstep: what one batch does to the sums."""

    model_a: PreTrainedModel
    model_b: PreTrainedModel
    path: WeightPath
    layers: tuple[Layer, ...]
    grid: tuple[float, ...]
    buffers: Mapping[float, Mapping[str, torch.Tensor]]
    data: EvaluationData
    sums: PathSums

    @classmethod
    def start(
        cls,
        model_a: PreTrainedModel,
        model_b: PreTrainedModel,
        path: WeightPath,
        layers: tuple[Layer, ...],
        grid: tuple[float, ...],
        buffers: Mapping[float, Mapping[str, torch.Tensor]],
        data: EvaluationData,
    ) -> Lockstep:
        """A lockstep that has seen nothing yet."""
        device = model_a.device
        shape = (len(grid), len(layers))
        sums = PathSums(
            {alpha: ScoreSums() for alpha in sorted({*grid, 0.0, 1.0})},
            RunningMoments.zeros(*shape, device=device),
            RunningMoments.zeros(*shape, device=device),
            RunningMoments.zeros(len(layers), device=device),
        )
        return cls(model_a, model_b, path, layers, grid, buffers, data, sums)

    def add(self, batch: Mapping[str, torch.Tensor], sample_ids: torch.Tensor) -> None:
        """Runs both parents once and the third model once per α inside the path."""
        mask = self._mask(batch, sample_ids)
        features_a = self._parent(self.model_a, 1.0, batch, mask)
        features_b = self._parent(self.model_b, 0.0, batch, mask)
        pairs = zip(features_a, features_b, strict=True)
        between = torch.stack([torch.stack(products(a, b)) for a, b in pairs])
        self._check_finite(between[:, 0], sample_ids, "the first model")
        self._check_finite(between[:, 2], sample_ids, "the second model")
        self.sums.baseline.add(cosine_distance(between[:, 0], between[:, 1], between[:, 2]))

        along = torch.stack([self._merged(alpha, batch, mask, features_a, features_b) for alpha in self.grid])
        for alpha, values in zip(self.grid, along, strict=True):
            self._check_finite(values[:, 0], sample_ids, f"the merged model at alpha {alpha:g}")
        self.sums.llfc.add(cosine_distance(along[:, :, 0], along[:, :, 1], along[:, :, 2]))
        self.sums.coefficient.add(projection_coefficient(along[:, :, 1], along[:, :, 2]))

    def _mask(self, batch: Mapping[str, torch.Tensor], sample_ids: torch.Tensor) -> torch.Tensor | None:
        """The attention mask on the models' device; None where there is none or it hides nothing."""
        mask = batch.get("attention_mask")
        if mask is None:
            return None
        empty = sample_ids[mask.sum(dim=-1) == 0].tolist()
        if empty:
            raise EvaluationError(f"sample {empty[0]} is empty: its attention mask is zero everywhere")
        # A first dimension over samples and tokens can only be taken apart with a mask.
        flattened = any(layer.token_axes == (-1,) for layer in self.layers)
        return mask.to(self.model_a.device) if flattened or not mask.all() else None

    def _score(self, alpha: float, logits: torch.Tensor | None, batch: Mapping[str, torch.Tensor]) -> None:
        if self.data.labelled:
            assert logits is not None
            labels = batch["labels"].to(logits.device)
            self.sums.scores[alpha].add(score_samples(self.data.task, logits, labels))

    def _parent(
        self,
        model: PreTrainedModel,
        alpha: float,
        batch: Mapping[str, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """Features of every layer, (n, f) each, kept until the batch is done."""
        kept: dict[int, torch.Tensor] = {}

        def keep(index: int, tensor: torch.Tensor) -> None:
            layer = self.layers[index]
            tensor = tensor.clone() if layer.overwritten else tensor
            kept[index] = sample_vectors(tensor, layer, n, mask)

        n = len(next(iter(batch.values())))
        with handing_over(model, self.layers, keep):
            logits = forward_logits(model, batch)
        self._keep_logits(logits, keep)
        self._score(alpha, logits, batch)
        self._check_complete(kept)
        return [kept[index] for index in range(len(self.layers))]

    def _merged(
        self,
        alpha: float,
        batch: Mapping[str, torch.Tensor],
        mask: torch.Tensor | None,
        features_a: Sequence[torch.Tensor],
        features_b: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """The three inner products of merged features and blend for every layer, (l, 3, n)."""
        if alpha in (0.0, 1.0):
            own = features_a if alpha == 1.0 else features_b
            triples = zip(own, features_a, features_b, strict=True)
            return torch.stack([torch.stack(products(x, a, b, alpha)) for x, a, b in triples])
        measured: dict[int, torch.Tensor] = {}

        def measure(index: int, tensor: torch.Tensor) -> None:
            vectors = sample_vectors(tensor, self.layers[index], n, mask)
            measured[index] = torch.stack(products(vectors, features_a[index], features_b[index], alpha))

        n = len(next(iter(batch.values())))
        self.path.move_to(alpha, self.buffers.get(alpha))
        with handing_over(self.path.model, self.layers, measure):
            logits = forward_logits(self.path.model, batch)
        self._keep_logits(logits, measure)
        self._score(alpha, logits, batch)
        self._check_complete(measured)
        return torch.stack([measured[index] for index in range(len(self.layers))])

    def _keep_logits(self, logits: torch.Tensor | None, keep: Callable[[int, torch.Tensor], None]) -> None:
        if logits is not None and self.layers[-1].label == LOGITS:
            keep(len(self.layers) - 1, logits)

    def _check_complete(self, found: Mapping[int, torch.Tensor]) -> None:
        missing = [layer.label for index, layer in enumerate(self.layers) if index not in found]
        if missing:
            raise EvaluationError(f"layer {missing[0]!r} did not run for a batch, unlike in its trial run")

    def _check_finite(self, squared_norms: torch.Tensor, sample_ids: torch.Tensor, model: str) -> None:
        """Raises with the first layer that has a feature which is not finite, (l, n)."""
        finite = squared_norms.isfinite()
        if finite.all():
            return
        layer, sample = (~finite).nonzero()[0].tolist()
        raise EvaluationError(
            f"features of layer {self.layers[layer].label!r} of {model} are not finite (NaN or Inf) for sample "
            f"{int(sample_ids[sample])}"
        )


def _report(
    sums: PathSums,
    layers: Sequence[Layer],
    grid: Sequence[float],
    data: EvaluationData,
    models: Sequence[Mapping[str, Any]] | None,
    alignment: Mapping[str, Any] | None,
    recomputed: bool,
) -> ConnectivityReport:
    path = tuple(_path_point(alpha, scores, data) for alpha, scores in sums.scores.items())
    barrier = Barrier(None, None)
    if data.labelled:
        barrier = Barrier(
            loss=barrier_height({alpha: scores.loss for alpha, scores in sums.scores.items()}),
            error=barrier_height({alpha: scores.error for alpha, scores in sums.scores.items()}),
        )
    rows = tuple(
        LayerRow(
            layer=layer.label,
            alpha=alpha,
            llfc=_statistic(sums.llfc, k, index),
            baseline=_statistic(sums.baseline, index),
            coefficient=_statistic(sums.coefficient, k, index),
        )
        for index, layer in enumerate(layers)
        for k, alpha in enumerate(grid)
    )
    how_aligned = dict(alignment or {})
    described = {**data.summary, "batch_norm": "recomputed"} if recomputed else dict(data.summary)
    return ConnectivityReport(
        models=tuple(ModelReference(**model) for model in models or ({}, {})),
        path=path,
        barrier=barrier,
        layers=rows,
        verdict=judge(barrier, rows, aligned=how_aligned.get("method") not in (None, "none")),
        data=described,
        alignment=how_aligned,
        versions=_versions(),
    )


def barrier_height(values: Mapping[float, float]) -> float:
    """The barrier sup_α L(αA + (1−α)B) − [αL(A) + (1−α)L(B)] over what was measured.

    Args:
        values: L by α, with both ends.

    Returns:
        At least 0, as the difference is 0 at the ends.
    """
    return max(value - (alpha * values[1.0] + (1 - alpha) * values[0.0]) for alpha, value in values.items())


def _path_point(alpha: float, scores: ScoreSums, data: EvaluationData) -> PathPoint:
    if not data.labelled:
        return PathPoint(alpha, None, {})
    values = scores.metrics(data.metrics, data.byte_count)
    metrics = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return PathPoint(alpha, scores.loss, metrics)


def _statistic(moments: RunningMoments, *index: int) -> Statistic:
    if not moments.count[index]:
        return Statistic(None, None)
    return Statistic(float(moments.mean[index]), float(moments.std[index]))


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            # A checkout that runs without being installed has no version of its own.
            logger.debug("%s is not installed as a package", library)
    return versions
