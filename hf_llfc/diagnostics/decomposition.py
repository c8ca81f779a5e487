"""The barrier at the logits, taken apart: what the ensemble gains, and what non-linearity costs.

With weights αₖ that sum to one, z̄ = Σ αₖzₖ the ensemble's logits, z the merged model's, E = z − z̄, and LSE the log of
the summed exponentials, every prediction with the label y obeys

    loss(z) − Σ αₖ loss(zₖ) = D − J − E_y,    D = LSE(z) − LSE(z̄),    J = Σ αₖ LSE(zₖ) − LSE(z̄),

and D − Σ p̄E = KL(p̄ ‖ p), with p̄ and p the predictions of the ensemble and of the merged model. J ≥ 0 between the
models is by how much the ensemble beats the blend of its members' losses; E is zero where the logits connect linearly
(LLFC). Without labels KL − J estimates the barrier, exactly if the labels are distributed as the ensemble says, and
max E − min E − J bounds it.

Shape legend: m models, n samples, k predictions (of samples, or of tokens of language models), c classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_llfc.diagnostics.rows import Statistic
from hf_llfc.diagnostics.statistics import KeptValues, RatioMoments
from hf_llfc.evaluation.predicted import Answers, Predicted, answers


@dataclass(frozen=True)
class Decomposition:
    """Parts of the barrier for every prediction, in nats; float64 (k,).

    Args:
        gain: J, by how much the ensemble's loss lies below the blend of its members' losses.
        partition: D, by how much the merged model's log-sum-exp lies above the ensemble's.
        divergence: KL(p̄ ‖ p), what non-linearity costs with labels drawn from the ensemble.
        spread: max E − min E, the most that non-linearity can cost.
        choice: What the ensemble chooses, int64 (k,).
        at_label: E_y; None without labels.
    """

    gain: torch.Tensor
    partition: torch.Tensor
    divergence: torch.Tensor
    spread: torch.Tensor
    choice: torch.Tensor
    at_label: torch.Tensor | None = None

    @property
    def estimate(self) -> torch.Tensor:
        """The barrier if labels are distributed as the ensemble says."""
        return self.divergence - self.gain

    @property
    def bound(self) -> torch.Tensor:
        """The most that the barrier can be, whatever the labels are."""
        return self.spread - self.gain

    @property
    def cost(self) -> torch.Tensor | None:
        """D − E_y, what non-linearity costs; None without labels."""
        return None if self.at_label is None else self.partition - self.at_label

    @property
    def barrier(self) -> torch.Tensor | None:
        """Loss of the merged model less the blend of its parents' losses; None without labels."""
        return None if self.cost is None else self.cost - self.gain


def decompose(
    parents: Sequence[torch.Tensor],
    weights: Sequence[float],
    merged_kc: torch.Tensor,
    labels_k: torch.Tensor | None = None,
) -> Decomposition:
    """Takes the barrier of a merged model apart.

    Args:
        parents: Logits of the models, each (k, c).
        weights: Weights of the models; they sum to one. Outside the simplex the identity holds, but J may be negative.
        merged_kc: Logits of the merged model.
        labels_k: True classes.
    """
    every_k = torch.arange(len(merged_kc), device=merged_kc.device)
    predicted = Predicted(every_k, every_k, len(merged_kc), labels_k)
    runs = [Run(logits, answers(logits, predicted)) for logits in (*parents, merged_kc)]
    return decompose_runs(runs[:-1], weights, runs[-1], predicted)


@dataclass(frozen=True)
class Run:
    """What a model gave for a batch.

    Args:
        logits: Logits, classes last.
        answers: Answers to what is predicted.
    """

    logits: torch.Tensor
    answers: Answers


def decompose_runs(
    parents: Sequence[Run], weights: Sequence[float], merged: Run, predicted: Predicted
) -> Decomposition:
    """Takes the barrier of a merged model apart, for models that have been run; see `decompose`.

    Args:
        parents: The models.
        weights: Their weights.
        merged: The merged model.
        predicted: What is looked at.

    Returns:
        Its parts, computed in float64.
    """
    k, device = len(predicted.rows), predicted.rows.device
    blend_k, expected_k, spread_k, at_label_k = torch.empty((4, k), dtype=torch.float64, device=device)
    choice_k = torch.empty(k, dtype=torch.int64, device=device)
    for part, (difference_kc, blend_kc, *others) in predicted.slices(merged.logits, *(run.logits for run in parents)):
        blend_kc.mul_(weights[0])
        for other_kc, weight in zip(others, weights[1:], strict=True):
            blend_kc.add_(other_kc, alpha=weight)
        difference_kc.sub_(blend_kc)
        if predicted.labels is not None:
            at_label_k[part] = difference_kc.gather(-1, predicted.labels[part, None])[:, 0]
        top_k, choice_k[part] = blend_kc.max(-1)
        exponentials_kc = blend_kc.sub_(top_k[:, None]).exp_()
        sums_k = exponentials_kc.sum(-1)
        blend_k[part] = top_k + sums_k.log()
        expected_k[part] = torch.linalg.vecdot(exponentials_kc, difference_kc) / sums_k
        least_k, most_k = difference_kc.aminmax(dim=-1)
        spread_k[part] = most_k - least_k
    partitions_km = torch.stack([run.answers.partition for run in parents], dim=1)
    partition_k = merged.answers.partition - blend_k
    return Decomposition(
        gain=partitions_km @ partitions_km.new_tensor(weights) - blend_k,
        partition=partition_k,
        divergence=partition_k - expected_k,
        spread=spread_k,
        choice=choice_k,
        at_label=at_label_k if predicted.labels is not None else None,
    )


QUANTITIES = ("gain", "divergence", "estimate", "bound", "cost", "barrier")
"""Whose means are reported; the last two with labels only."""


@dataclass
class DecompositionSums:
    """Sums over all predictions; they grow with neither samples nor batches.

    Args:
        moments: Of `QUANTITIES`, predictions in samples.
        kept: Barrier of some samples, its estimate without labels, summed over their predictions.
    """

    moments: RatioMoments
    kept: KeptValues

    @classmethod
    def empty(cls, *, labelled: bool, device: torch.device | str = "cpu") -> DecompositionSums:
        """Nothing seen yet."""
        return cls(RatioMoments.zeros(len(QUANTITIES) - (0 if labelled else 2)), KeptValues.none(device=device))

    def add(self, found: Decomposition, predicted: Predicted, sample_ids: torch.Tensor) -> None:
        """Adds the predictions of a batch.

        Args:
            found: Their parts.
            predicted: What they are of.
            sample_ids: Numbers of the samples of the batch, (n,).
        """
        series = [getattr(found, name) for name in QUANTITIES]
        self.moments.add(torch.stack([values for values in series if values is not None]), predicted.samples)
        barrier_k = found.estimate if found.barrier is None else found.barrier
        of_samples = barrier_k.new_zeros(predicted.count).index_add_(0, predicted.samples, barrier_k)
        self.kept.add(sample_ids, of_samples)

    def merge(self, other: DecompositionSums) -> None:
        """Adds what another process has gathered."""
        self.moments.merge(other.moments)
        self.kept.merge(other.kept)

    def cpu(self) -> DecompositionSums:
        """A copy in main memory, for other processes."""
        return DecompositionSums(self.moments, self.kept.cpu())

    def statistics(self) -> dict[str, Statistic]:
        """Mean, spread over samples and interval by quantity."""
        return dict(zip(QUANTITIES, self.moments.statistics(), strict=False))

    @property
    def half_share(self) -> float | None:
        """Least share of samples that carries half of what is positive in the barrier; None where nothing is."""
        carried = self.kept.values.clamp(min=0).sort(descending=True).values.cumsum(0)
        if not len(carried) or carried[-1] <= 0:
            return None
        return float((carried < carried[-1] / 2).sum() + 1) / len(carried)
