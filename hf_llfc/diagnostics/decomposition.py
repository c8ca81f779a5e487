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

from hf_llfc.diagnostics.statistics import RatioMoments

ELEMENTS_AT_ONCE = 2**16
"""Logits converted to float64 at a time: few enough to stay in the processor's cache."""

ELEMENTS_ON_DEVICE = 2**24
"""The same where memory is far from the processor, and many small steps cost more than they save."""


@dataclass(frozen=True)
class Decomposition:
    """Parts of the barrier for every prediction, in nats; float64 (k,).

    Args:
        gain: J, by how much the ensemble's loss lies below the blend of its members' losses.
        partition: D, by how much the merged model's log-sum-exp lies above the ensemble's.
        divergence: KL(p̄ ‖ p), what non-linearity costs with labels drawn from the ensemble.
        spread: max E − min E, the most that non-linearity can cost.
        at_label: E_y; None without labels.
    """

    gain: torch.Tensor
    partition: torch.Tensor
    divergence: torch.Tensor
    spread: torch.Tensor
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
    partitions_mk: torch.Tensor | None = None,
) -> Decomposition:
    """Takes the barrier of a merged model apart.

    Args:
        parents: Logits of the models, each (k, c).
        weights: Weights of the models; they sum to one. Outside the simplex the identity holds, but J may be negative.
        merged_kc: Logits of the merged model.
        labels_k: True classes.
        partitions_mk: `log_partition` of the parents, for callers that have it.

    Returns:
        Its parts, computed in float64, slice by slice of predictions.
    """
    if partitions_mk is None:
        partitions_mk = torch.stack([log_partition(each_kc) for each_kc in parents])
    weights_m = torch.tensor(weights, dtype=torch.float64, device=merged_kc.device)
    parts = [
        _decompose(
            [each_kc[rows].double() for each_kc in parents],
            weights,
            merged_kc[rows].double(),
            None if labels_k is None else labels_k[rows],
        )
        for rows in slices_of(merged_kc)
    ]
    blend_k, partition_k, expected_k, spread_k, at_label_k = (torch.cat(each) for each in zip(*parts, strict=True))
    return Decomposition(
        gain=weights_m @ partitions_mk - blend_k,
        partition=partition_k - blend_k,
        divergence=partition_k - blend_k - expected_k,
        spread=spread_k,
        at_label=at_label_k if labels_k is not None else None,
    )


def log_partition(logits_kc: torch.Tensor) -> torch.Tensor:
    """LSE of every prediction, float64 (k,)."""
    return torch.cat([logits_kc[rows].double().logsumexp(-1) for rows in slices_of(logits_kc)])


def slices_of(logits_kc: torch.Tensor) -> list[slice]:
    """Slices of predictions that together are all, each small enough to be computed in float64 at once."""
    count, classes = logits_kc.shape
    at_once = ELEMENTS_AT_ONCE if logits_kc.device.type == "cpu" else ELEMENTS_ON_DEVICE
    step = max(1, at_once // classes)
    return [slice(start, start + step) for start in range(0, count, step)] or [slice(0, 0)]


def _decompose(
    parents: Sequence[torch.Tensor], weights: Sequence[float], merged_kc: torch.Tensor, labels_k: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """LSE(z̄), LSE(z), Σ p̄E, max E − min E and E_y (empty without labels) of some predictions in float64."""
    blend_kc = parents[0] * weights[0]
    for each_kc, weight in zip(parents[1:], weights[1:], strict=True):
        blend_kc.add_(each_kc, alpha=weight)
    difference_kc = merged_kc - blend_kc
    top_k = blend_kc.amax(-1)
    exponentials_kc = (blend_kc - top_k[:, None]).exp_()
    sums_k = exponentials_kc.sum(-1)
    least_k, most_k = difference_kc.aminmax(dim=-1)
    at_label_k = top_k[:0] if labels_k is None else difference_kc.gather(-1, labels_k[:, None])[:, 0]
    expected_k = torch.linalg.vecdot(exponentials_kc, difference_kc) / sums_k
    return top_k + sums_k.log(), merged_kc.logsumexp(-1), expected_k, most_k - least_k, at_label_k


QUANTITIES = ("gain", "divergence", "estimate", "bound", "cost", "barrier")
"""Whose means are reported; the last two with labels only."""


@dataclass
class DecompositionSums:
    """Sums over all predictions; they grow with neither samples nor batches.

    Args:
        moments: Of `QUANTITIES`, predictions in samples.
    """

    moments: RatioMoments

    @classmethod
    def empty(cls, *, labelled: bool) -> DecompositionSums:
        """Nothing seen yet."""
        return cls(RatioMoments.zeros(len(QUANTITIES) - (0 if labelled else 2)))

    def add(self, found: Decomposition, samples_k: torch.Tensor | None = None) -> None:
        """Adds the predictions of a batch.

        Args:
            found: Its parts.
            samples_k: Number of the sample that each belongs to; a sample of its own each without it.
        """
        series = [getattr(found, name) for name in QUANTITIES]
        self.moments.add(torch.stack([values for values in series if values is not None]), samples_k)

    def merge(self, other: DecompositionSums) -> None:
        """Adds what another process has gathered."""
        self.moments.merge(other.moments)

    def means(self) -> dict[str, tuple[float, float | None, tuple[float, float] | None]]:
        """Mean, its standard error and its 95 % interval by quantity."""
        return dict(zip(QUANTITIES, self.moments.means(), strict=False))
