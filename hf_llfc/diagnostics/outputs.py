"""What models and their merge predict, compared without labels.

The blend of the parents' logits is an ensemble, whose loss is at most the line between theirs (log-sum-exp is convex).
LLFC at the output says that the merged model is this ensemble. So its predictions stand in for labels: the barrier of
the merged model measured with them is an estimate of the true one that needs no labels (`decomposition`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from hf_llfc.diagnostics.chance import Predictions
from hf_llfc.diagnostics.decomposition import DecompositionSums, Run, decompose_runs
from hf_llfc.diagnostics.points import Point
from hf_llfc.diagnostics.rows import DecompositionRow, OutputAgreement
from hf_llfc.evaluation.predicted import Predicted
from hf_llfc.recipe.data import CLASSIFICATION_TASKS


def has_classes(config: PretrainedConfig, task: str) -> bool:
    """Whether a model chooses by a softmax; classifiers that regress, or say yes or no to every label, do not.

    Args:
        config: Of the model.
        task: A value of `TASKS`.
    """
    if task not in CLASSIFICATION_TASKS:
        return True
    return (config.num_labels or 0) > 1 and config.problem_type in (None, "single_label_classification")


@dataclass
class AgreementSums:
    """How a merged model's predictions agree with those of its parents and of their ensemble, summed.

    Args:
        decomposition: Parts of the barrier.
        merged: What the merged model predicts.
        differing: Number of predictions where the merge does not choose what the ensemble does, where the parents
            differ, where the merge chooses what no parent does, and then for every parent where it does not choose
            what the ensemble does.
    """

    decomposition: DecompositionSums
    merged: Predictions
    differing: torch.Tensor

    @classmethod
    def empty(cls, models: int, *, labelled: bool, device: torch.device | str = "cpu") -> AgreementSums:
        """Nothing seen yet."""
        counts = torch.zeros(3 + models, dtype=torch.int64, device=device)
        return cls(DecompositionSums.empty(labelled=labelled, device=device), Predictions(), counts)

    def add(
        self,
        parents: Sequence[Run],
        weights: Sequence[float],
        merged: Run,
        predicted: Predicted,
        sample_ids: torch.Tensor,
    ) -> None:
        """Adds a batch.

        Args:
            parents: The models.
            weights: Their weights in the merge.
            merged: The merged model.
            predicted: What is looked at.
            sample_ids: Numbers of the samples, (n,).
        """
        found = decompose_runs(parents, weights, merged, predicted)
        self.decomposition.add(found, predicted, sample_ids)
        self.merged.add(predicted, merged.answers)
        choice, choices_mk = merged.answers.choice, torch.stack([run.answers.choice for run in parents])
        differing = [
            choice != found.choice,
            (choices_mk != choices_mk[0]).any(0),
            (choices_mk != choice).all(0),
            *(choices_mk != found.choice),
        ]
        self.differing += torch.stack(differing).sum(1)

    def merge(self, other: AgreementSums) -> None:
        """Adds what another process has gathered."""
        self.decomposition.merge(other.decomposition)
        self.merged.merge(other.merged)
        self.differing = self.differing + other.differing

    def cpu(self) -> AgreementSums:
        """A copy in main memory, for other processes."""
        return AgreementSums(self.decomposition.cpu(), self.merged.cpu(), self.differing.cpu())

    @property
    def shares(self) -> list[float]:
        """`differing` as shares of all predictions."""
        return (self.differing.double() / self.merged.count).tolist()

    def row(self, point: Point) -> DecompositionRow:
        """The row of a report.

        Args:
            point: Where the merged model lies.
        """
        statistics = self.decomposition.statistics()
        merged_disagreement, parents_disagreement, orphans, *_ = self.shares
        return DecompositionRow(
            alpha=point.alpha,
            **{name: statistics[name] for name in ("gain", "divergence", "estimate", "bound")},
            cost=statistics.get("cost"),
            barrier=statistics.get("barrier"),
            half_share=self.decomposition.half_share,
            merged_disagreement=merged_disagreement,
            parents_disagreement=parents_disagreement,
            orphans=orphans,
            weights=point.weights,
        )

    def agreement(self, point: Point, parents: Sequence[Predictions]) -> OutputAgreement:
        """How the predictions of models and of their merge agree.

        Args:
            point: Where the merged model lies.
            parents: What each model predicts.
        """
        row = self.row(point)
        blend = sum(weight * share for weight, share in zip(point.weights, self.shares[3:], strict=True))
        assert row.divergence.mean is not None and row.estimate.mean is not None
        return OutputAgreement(
            weights=point.weights,
            predictions=self.merged.count,
            classes=self.merged.classes,
            error_barrier=row.merged_disagreement - blend,
            loss_barrier=row.estimate.mean,
            merged_disagreement=row.merged_disagreement,
            merged_divergence=row.divergence.mean,
            parents_disagreement=row.parents_disagreement,
            orphans=row.orphans,
            entropies=tuple(each.mean_entropy for each in parents),
            entropy_merged=self.merged.mean_entropy,
            spreads=tuple(each.spread for each in parents),
            spread_merged=self.merged.spread,
            bound=row.bound.mean,
            loss_barrier_interval=row.estimate.interval,
            bound_interval=row.bound.interval,
        )
