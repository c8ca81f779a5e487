"""The star of a merge: the ways from its models straight to it, and from one to another by way of it.

A merge that lies off the line between its models (task arithmetic, TIES, a calibrated or learned one) may have no
barrier on the way to any of them although there is one on the line: star-shaped connectivity (arXiv 2404.06391). Of a
way from A straight to the merge M the barrier is the most by which the loss lies above the line from L(A) to L(M); of
the fold A → M → B, above the line from L(A) to L(B), which M divides as its shares do. The length of a fold is
(‖A − M‖ + ‖M − B‖) / ‖A − B‖ over all parameters, 1 where M lies between; that of a way ‖A − M‖ over the mean distance
of the models.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor, nn

from hf_llfc.diagnostics.batch_norm import batch_norm_state, has_batch_norm, recompute_batch_norm
from hf_llfc.diagnostics.fold import SHARES, FoldedModel, Weights
from hf_llfc.diagnostics.measures.scores import BatchScores
from hf_llfc.diagnostics.measures.subject import Subject
from hf_llfc.diagnostics.rows import FoldRow
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.data import EvaluationData
from hf_llfc.evaluation.models import forward_logits


@dataclass
class StarSums:
    """Summed loss and wrong predictions of every model and of every point of the star.

    Args:
        models: Of every model.
        points: Of every point, the merge first.
        count: Number of predictions.
    """

    models: list[list[float]]
    points: list[list[float]]
    count: int = 0

    def merge(self, other: StarSums) -> None:
        """Adds what another process has gathered."""
        for own, others in zip((*self.models, *self.points), (*other.models, *other.points), strict=True):
            own[:] = [a + b for a, b in zip(own, others, strict=True)]
        self.count += other.count

    def cpu(self) -> StarSums:
        """Itself: it holds numbers only."""
        return self


class Star:
    """Barriers and lengths of the ways over a merge.

    Args:
        subject: The merge and its models, in evaluation mode. Where only one model has a share, its base is the other.
        data: Says whether and how outputs are scored; without labels by the ensemble of the models.

    Raises:
        EvaluationError: There is one model only.
    """

    def __init__(self, subject: Subject, data: EvaluationData) -> None:
        self.data = data
        self.numbers = list(subject.parents)
        if len(self.numbers) < 2:
            self.numbers = sorted({*self.numbers, len(subject.models) - 1})
        if len(self.numbers) < 2:
            raise EvaluationError("fold: a way over a merge needs two models; leave fold out of the measures")
        self.models = [subject.models[number] for number in self.numbers]
        shares = [subject.shares[number] for number in self.numbers]
        self.shares = [1 / len(shares)] * len(shares) if min(shares) == 0 else shares
        # A place is told by what it has of every model and, as the last weight, of the merge.
        alone = [tuple(float(other == own) for other in range(len(self.models))) for own in range(len(self.models))]
        places: dict[Weights, tuple[int, float]] = {(*(0.0 for _ in self.models), 1.0): (0, 0.0)}
        for own, weights in enumerate(alone):
            places |= {(*(share * each for each in weights), 1 - share): (own, share) for share in SHARES}
        self.places = places
        self.moving = FoldedModel(copy.deepcopy(subject.merge), self.models, places)
        self.buffers = self._recomputed(subject.batch_norm_data)
        self.lengths = _distances(self.models, subject.merge)
        self.sums = StarSums([[0.0, 0.0] for _ in self.models], [[0.0, 0.0] for _ in places])

    def _recomputed(self, data: EvaluationData | None) -> dict[Weights, Mapping[str, Tensor]]:
        """Statistics of batch normalization on the ways; the merge has its own."""
        found: dict[Weights, Mapping[str, Tensor]] = {}
        if data is None or not has_batch_norm(self.moving.model):
            return found
        for place, (_, share) in self.places.items():
            if share:
                self.moving.move_to(place)
                recompute_batch_norm(self.moving.model, data.batches())
                found[place] = batch_norm_state(self.moving.model)
        return found

    def add(self, batch: Mapping[str, Tensor], sample_ids: Tensor) -> None:
        """Runs every model, and the merge at every point of the star."""
        logits = [self._logits(model, batch) for model in self.models]
        score = BatchScores.of(self.data, batch, sample_ids, list(zip(self.shares, logits, strict=True)))
        self.sums.count += score.count
        for number, (sums, own) in enumerate(zip(self.sums.models, logits, strict=True), start=1):
            sums[:] = [a + b for a, b in zip(sums, score(own, f"model {number}"), strict=True)]
        for sums, place in zip(self.sums.points, self.places, strict=True):
            self.moving.move_to(place, self.buffers.get(place))
            found = score(self._logits(self.moving.model, batch), "the way over the merge")
            sums[:] = [a + b for a, b in zip(sums, found, strict=True)]

    def _logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits = forward_logits(model, batch)  # type: ignore[arg-type]  # a `MovingModel` has a model of transformers
        if logits is None:
            raise EvaluationError(f"fold: {type(model).__name__} has no logits; leave fold out of the measures")
        return logits

    def rows(self, sums: StarSums) -> tuple[FoldRow, ...]:
        """One row a model, then one a pair of models."""
        count = len(self.models)
        apart = {pair: self.lengths[pair] for pair in combinations(range(count), 2)}
        mean = sum(apart.values()) / len(apart)
        to_merge = [self.lengths[own, count] for own in range(count)]
        rows = [
            FoldRow(
                (self.numbers[own],), *self._barriers(sums, (own,)), self.lengths[own, count] / mean if mean else None
            )
            for own in range(count)
        ]
        for a, b in combinations(range(count), 2):
            length = (to_merge[a] + to_merge[b]) / apart[a, b] if apart[a, b] else None
            rows.append(FoldRow((self.numbers[a], self.numbers[b]), *self._barriers(sums, (a, b)), length))
        return tuple(rows)

    def _barriers(self, sums: StarSums, ends: Sequence[int]) -> tuple[float, float]:
        """Barrier of loss and of error of a way or a fold."""
        heights = []
        for kind in (0, 1):
            own = [each[kind] / sums.count for each in sums.models]
            merge = sums.points[0][kind] / sums.count
            between = sum(self.shares[end] * own[end] for end in ends) / sum(self.shares[end] for end in ends)
            middle = merge if len(ends) == 1 else between
            above = [0.0, merge - middle]
            for point, (model, share) in zip(sums.points, self.places.values(), strict=True):
                if share and model in ends:
                    above.append(point[kind] / sums.count - share * own[model] - (1 - share) * middle)
            heights.append(max(above))
        return heights[0], heights[1]


def _distances(models: Sequence[nn.Module], merge: nn.Module) -> dict[tuple[int, int], float]:
    """Distances of all pairs of models and the merge, which comes last, over all parameters, in float64."""
    parameters = [dict(model.named_parameters()) for model in (*models, merge)]
    found = dict.fromkeys(combinations(range(len(parameters)), 2), 0.0)
    for name, tensor in parameters[0].items():
        if tensor.is_floating_point():
            for a, b in found:
                difference = parameters[a][name].detach().double() - parameters[b][name].detach().double()
                found[a, b] += float(difference.square().sum())
    return {pair: squared**0.5 for pair, squared in found.items()}
