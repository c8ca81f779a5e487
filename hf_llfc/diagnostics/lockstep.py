"""The lockstep: all models and every point between them on one batch, with nothing kept of it but sums.

Shape legend: p points, l layers, m models, n samples, t tokens, u units (samples, or samples times tokens), f features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hf_llfc.diagnostics.carriers import Carriers
from hf_llfc.diagnostics.chance import Predictions
from hf_llfc.diagnostics.combination import MovingModel
from hf_llfc.diagnostics.decomposition import Run
from hf_llfc.diagnostics.features.layers import LOGITS, Layer, handing_over, sample_vectors
from hf_llfc.diagnostics.outputs import AgreementSums, has_classes
from hf_llfc.diagnostics.points import Region, judged_point, parents_shares
from hf_llfc.diagnostics.statistics import (
    Distribution,
    blend_distance,
    blend_norms,
    cosine_distance,
    gram,
    projection_coefficient,
    residuals,
)
from hf_llfc.diagnostics.streaming import attention_mask, check_complete, check_finite
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.class_order import ChoicePairs
from hf_llfc.evaluation.data import EvaluationData
from hf_llfc.evaluation.models import forward_logits
from hf_llfc.evaluation.predicted import Predicted, answers, labelled, unlabelled
from hf_llfc.evaluation.scoring import ScoreSums, score_answers
from hf_llfc.recipe.data import CLASSIFICATION_TASKS

MOST_TOKENS = 2**24
"""Above any sequence length, so that a token has a number of its own."""


@dataclass
class PathSums:
    """All that is kept of the samples seen.

    Args:
        scores: Loss and hits by point.
        llfc: 1 − cos(merged, blend), (p, l).
        coefficient: Of merged on blend, (p, l).
        baseline: 1 − cos between the models, the mean over their pairs, (l,).
        predictions: What each model predicts.
        agreements: How merged predictions agree with the models', by the index of the point; empty without classes.
        carriers: The samples that carry the barrier at the judged point.
        choices: Which classes models choose, the first and each other one, by the index of that; of classifiers alone.
    """

    scores: list[ScoreSums]
    llfc: Distribution
    coefficient: Distribution
    baseline: Distribution
    predictions: list[Predictions]
    agreements: dict[int, AgreementSums]
    carriers: Carriers
    choices: dict[int, ChoicePairs]

    def merge(self, other: PathSums) -> None:
        """Adds what another process has gathered."""
        for own, others in zip(self.scores, other.scores, strict=True):
            own.merge(others)
        self.llfc.merge(other.llfc)
        self.coefficient.merge(other.coefficient)
        self.baseline.merge(other.baseline)
        for own_predictions, others_predictions in zip(self.predictions, other.predictions, strict=True):
            own_predictions.merge(others_predictions)
        for place, agreement in other.agreements.items():
            self.agreements[place].merge(agreement)
        self.carriers.merge(other.carriers)
        for model, pairs in other.choices.items():
            self.choices[model].merge(pairs)

    def cpu(self) -> PathSums:
        """A copy in main memory, for other processes."""
        predictions = [each.cpu() for each in self.predictions]
        agreements = {place: each.cpu() for place, each in self.agreements.items()}
        spreads = self.llfc.cpu(), self.coefficient.cpu(), self.baseline.cpu()
        return PathSums(self.scores, *spreads, predictions, agreements, self.carriers, self.choices)


@dataclass(frozen=True)
class Lockstep:
    """What one batch does to the sums.

    Args:
        models: The models themselves.
        combined: The model that goes from point to point.
        region: The points.
        layers: Whose features are compared.
        buffers: Statistics of batch normalization that belong to a point, by its place.
        data: Says whether and how outputs are scored.
        unit: One of `UNITS`.
        names: Of the models, for messages.
        sums: What was gathered so far.
    """

    models: Sequence[PreTrainedModel]
    combined: MovingModel
    region: Region
    layers: tuple[Layer, ...]
    buffers: Mapping[int, Mapping[str, torch.Tensor]]
    data: EvaluationData
    unit: str
    names: Sequence[str]
    sums: PathSums

    @classmethod
    def start(
        cls,
        models: Sequence[PreTrainedModel],
        combined: MovingModel,
        region: Region,
        layers: tuple[Layer, ...],
        buffers: Mapping[int, Mapping[str, torch.Tensor]],
        data: EvaluationData,
        unit: str = "sample",
    ) -> Lockstep:
        """A lockstep that has seen nothing yet."""
        device = models[0].device
        shape = (len(region.points), len(layers))
        has_choices = layers[-1].label == LOGITS and has_classes(models[0].config, data.task)
        agreements = {
            place: AgreementSums.empty(len(models), labelled=data.labelled, device=device)
            for place, point in enumerate(region.points)
            if point.vertex is None and has_choices
        }
        others = range(1, len(models) - (region.kind == "arithmetic"))  # the base need not know the task
        choices = {index: ChoicePairs() for index in others if has_choices and data.task in CLASSIFICATION_TASKS}
        sums = PathSums(
            [ScoreSums() for _ in region.points],
            Distribution.empty(*shape, device=device),
            Distribution.empty(*shape, device=device),
            Distribution.empty(len(layers), device=device),
            [Predictions() for _ in models],
            agreements,
            Carriers(parents_shares(region), {int(k): v for k, v in (models[0].config.id2label or {}).items()}),
            choices,
        )
        names = (
            ("the first model", "the second model")
            if len(models) == 2
            else tuple(point.name for point in region.points if point.vertex is not None)
        )
        return cls(models, combined, region, layers, buffers, data, unit, names, sums)

    def add(self, batch: Mapping[str, torch.Tensor], sample_ids: torch.Tensor) -> None:
        """Runs every model once, and the combined one once a point between them."""
        units = self._units(batch, sample_ids)
        runs = [self._parent(model, batch, units) for model in self.models]
        predicted = self._predicted(runs[0].logits, batch)
        parents = [run for each in runs if (run := self._answered(each.logits, predicted)) is not None]
        if predicted is not None:
            of_samples = sample_ids[predicted.samples.cpu()]
            for index, pairs in self.sums.choices.items():
                pairs.add(parents[0].answers.choice, parents[index].answers.choice, of_samples)
        between = torch.stack([gram([run.features[place] for run in runs]) for place in range(len(self.layers))])
        squares = between.diagonal(dim1=1, dim2=2).permute(2, 0, 1)
        self._check_finite(squares, units, self.names)
        self.sums.baseline.add(units.numbers, units.only_present(self._baseline(between), self.layers))

        blend = blend_norms(between, [point.weights for point in self.region.points])
        norms, difference = blend.clone(), torch.zeros_like(blend)
        for place, point in enumerate(self.region.points):
            if point.vertex is not None:
                run = parents[point.vertex] if parents else None
            else:
                features = [run.features for run in runs]
                norms[place], difference[place], logits = self._merged(place, batch, units, features)
                run = self._answered(logits, predicted)
            if run is not None and predicted is not None:
                self._add_answers(place, run, parents, predicted, sample_ids)
        self._check_finite(norms, units, [f"the merged model at {point.name}" for point in self.region.points])
        distances = blend_distance(norms, blend, difference)
        coefficients = projection_coefficient((norms + blend - difference) / 2, blend)
        self.sums.llfc.add(units.numbers, units.only_present(distances, self.layers))
        self.sums.coefficient.add(units.numbers, units.only_present(coefficients, self.layers))

    def _baseline(self, between: torch.Tensor) -> torch.Tensor:
        """Mean over all pairs of models of 1 − cos between them, (l, u)."""
        count = len(self.models)
        pairs = [
            cosine_distance(between[:, one, one], between[:, one, other], between[:, other, other])
            for one in range(count)
            for other in range(one + 1, count)
        ]
        return torch.stack(pairs).mean(dim=0)

    def _units(self, batch: Mapping[str, torch.Tensor], sample_ids: torch.Tensor) -> Units:
        device = self.models[0].device
        mask = attention_mask(batch, sample_ids, self.layers, device)
        n = len(next(iter(batch.values())))
        if self.unit == "token":
            if "attention_mask" not in batch:
                raise EvaluationError(
                    "statistics by token need an attention mask, which these data have not; use the unit sample"
                )
            mask = batch["attention_mask"].to(device)
        return Units(n, mask, sample_ids.to(device), self.unit == "token")

    def _predicted(self, logits: torch.Tensor | None, batch: Mapping[str, torch.Tensor]) -> Predicted | None:
        """What a batch predicts; None of models without logits."""
        if logits is None:
            return None
        return labelled(self.data.task, logits, batch["labels"]) if self.data.labelled else unlabelled(logits, batch)

    def _answered(self, logits: torch.Tensor | None, predicted: Predicted | None) -> Run | None:
        return None if logits is None or predicted is None else Run(logits, answers(logits, predicted))

    def _add_answers(
        self, place: int, run: Run, parents: Sequence[Run], predicted: Predicted, sample_ids: torch.Tensor
    ) -> None:
        """Adds what the model at a point answers."""
        point = self.region.points[place]
        if point.vertex is not None:
            self.sums.predictions[point.vertex].add(predicted, run.answers)
        elif place in self.sums.agreements:
            self.sums.agreements[place].add(parents, point.weights, run, predicted, sample_ids)
        if predicted.labels is None:
            return
        scores = score_answers(self.data.task, predicted, run.answers)
        self.sums.scores[place].add(scores)
        if point == judged_point(self.region):
            own = [score_answers(self.data.task, predicted, each.answers) for each in parents]
            self.sums.carriers.add(sample_ids, own, scores)

    def _parent(self, model: PreTrainedModel, batch: Mapping[str, torch.Tensor], units: Units) -> ParentRun:
        """Features of every layer, (u, f) each, kept until the batch is done."""
        kept: dict[int, torch.Tensor] = {}

        def keep(index: int, tensor: torch.Tensor) -> None:
            layer = self.layers[index]
            tensor = tensor.clone() if layer.overwritten else tensor
            kept[index] = units.vectors(tensor, layer)

        logits = self._run(model, batch, keep)
        check_complete(self.layers, kept)
        return ParentRun([kept[index] for index in range(len(self.layers))], logits)

    def _merged(
        self,
        place: int,
        batch: Mapping[str, torch.Tensor],
        units: Units,
        features: Sequence[Sequence[torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Squared norms of merged features, those of their difference from the blend, (l, u) each, and the logits."""
        measured: dict[int, torch.Tensor] = {}
        weights = self.region.points[place].weights

        def measure(index: int, tensor: torch.Tensor) -> None:
            vectors = units.vectors(tensor, self.layers[index])
            measured[index] = residuals(vectors, [each[index] for each in features], weights)

        self.combined.move_to(weights, self.buffers.get(place))
        logits = self._run(self.combined.model, batch, measure)
        check_complete(self.layers, measured)
        norms, difference = torch.stack([measured[index] for index in range(len(self.layers))], dim=1)
        return norms, difference, logits

    def _run(
        self,
        model: PreTrainedModel,
        batch: Mapping[str, torch.Tensor],
        receive: Callable[[int, torch.Tensor], None],
    ) -> torch.Tensor | None:
        with handing_over(model, self.layers, receive):
            logits = forward_logits(model, batch)
        if logits is not None and self.layers[-1].label == LOGITS:
            receive(len(self.layers) - 1, logits)
        return logits

    def _check_finite(self, squared_norms: torch.Tensor, units: Units, models: Sequence[str]) -> None:
        """Raises with the first model and layer that have a feature which is not finite, (models, l, u)."""
        if squared_norms.isfinite().all():
            return
        for model, of_model in zip(models, squared_norms, strict=True):
            for layer, norms in zip(self.layers, of_model, strict=True):
                check_finite(norms, units.samples, layer.label, model)


@dataclass(frozen=True)
class ParentRun:
    """What one model gave for a batch.

    Args:
        features: (u, f) for every layer.
        logits: Its output, if it has one.
    """

    features: list[torch.Tensor]
    logits: torch.Tensor | None


@dataclass(frozen=True)
class Units:
    """What of a batch makes one feature vector: a sample with all its tokens, or a token.

    Args:
        n: Samples of the batch.
        mask: (n, t), 1 at tokens that are no padding; None where nothing is hidden.
        sample_ids: Numbers of the samples, (n,).
        tokens: Whether a unit is a token.
    """

    n: int
    mask: torch.Tensor | None
    sample_ids: torch.Tensor
    tokens: bool

    @property
    def width(self) -> int:
        """Units of one sample, t or 1."""
        return self.mask.shape[1] if self.tokens and self.mask is not None else 1

    @property
    def numbers(self) -> torch.Tensor:
        """A number of its own for every unit, the same in any batch, (u,)."""
        within = torch.arange(self.width, device=self.sample_ids.device)
        return (self.sample_ids[:, None] * MOST_TOKENS + within).reshape(-1)

    @property
    def samples(self) -> torch.Tensor:
        """The number of the sample that each unit belongs to, (u,)."""
        return self.sample_ids.repeat_interleave(self.width)

    def vectors(self, features: torch.Tensor, layer: Layer) -> torch.Tensor:
        """The feature vectors of all units, (u, f); zeros at what is padded, and where a layer has no tokens."""
        return sample_vectors(features, layer, self.n, self.mask, by_token=self.tokens)

    def only_present(self, values: torch.Tensor, layers: Sequence[Layer]) -> torch.Tensor:
        """Values with NaN for units that are not there, (..., l, u)."""
        if self.width == 1:
            return values
        assert self.mask is not None
        sample_only = torch.zeros_like(self.mask)
        sample_only[:, 0] = 1
        present = torch.stack([self.mask if len(layer.token_axes) == 1 else sample_only for layer in layers])
        return torch.where(present.reshape(len(layers), -1) != 0, values, torch.nan)
