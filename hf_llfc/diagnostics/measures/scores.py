"""How well networks do on a batch, with labels, or with the ensemble of some models in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_llfc.diagnostics.streaming import check_finite
from hf_llfc.evaluation.data import EvaluationData
from hf_llfc.evaluation.models import predictions_in
from hf_llfc.evaluation.scoring import score_samples

ELEMENTS_AT_ONCE = 2**22
"""Logits converted to float64 at a time."""


@dataclass(frozen=True)
class BatchScores:
    """Scores the networks that run on one batch.

    Attributes:
        data: Says whether there are labels, and how outputs are scored.
        batch: The samples.
        sample_ids: Their numbers, for messages.
        count: Number of predictions.
        ensemble: Blend of the models' logits, float64, a row a prediction; None with labels.
    """

    data: EvaluationData
    batch: Mapping[str, Tensor]
    sample_ids: Tensor
    count: int
    ensemble: Tensor | None

    @classmethod
    def of(
        cls,
        data: EvaluationData,
        batch: Mapping[str, Tensor],
        sample_ids: Tensor,
        parents: Sequence[tuple[float, Tensor]],
    ) -> BatchScores:
        """The scores of a batch.

        Args:
            data: Says whether there are labels.
            batch: The samples.
            sample_ids: Their numbers.
            parents: Share in the ensemble, and logits, of every model.
        """
        if data.labelled:
            count = int(score_samples(data.task, parents[0][1], batch["labels"].to(parents[0][1].device)).counts.sum())
            return cls(data, batch, sample_ids, count, None)
        ensemble = sum(share * predictions_in(logits, batch).double() for share, logits in parents)
        assert isinstance(ensemble, Tensor)
        return cls(data, batch, sample_ids, len(ensemble), ensemble)

    def __call__(self, logits: Tensor, network: str) -> tuple[float, int]:
        """Summed loss in nats, and the number of wrong predictions.

        Args:
            logits: What the network gives.
            network: Its name, for the message.

        Raises:
            EvaluationError: A loss is not finite.
        """
        if self.ensemble is None:
            scores = score_samples(self.data.task, logits, self.batch["labels"].to(logits.device))
            check_finite(scores.loss_sums, self.sample_ids, "logits", network)
            return float(scores.loss_sums.sum()), self.count - int(scores.correct.sum())
        own, loss, wrong = predictions_in(logits, self.batch), 0.0, 0
        step = max(1, ELEMENTS_AT_ONCE // own.shape[-1])
        for start in range(0, len(own), step):
            ensemble, chosen = self.ensemble[start : start + step], own[start : start + step].double()
            loss -= float((ensemble.softmax(-1) * chosen.log_softmax(-1)).sum())
            wrong += int((ensemble.argmax(-1) != chosen.argmax(-1)).sum())
        check_finite(torch.tensor([loss]), self.sample_ids, "logits", network)
        return loss, wrong
