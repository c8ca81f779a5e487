"""The samples that carry the barrier: those whose loss in the merge lies farthest above that of its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hf_llfc.diagnostics.rows import SampleRow
from hf_llfc.evaluation.scoring import SampleScores

MOST = 10
"""Samples that are listed."""


@dataclass
class Carriers:
    """The samples seen that add most to the barrier at one point.

    Args:
        shares: Of every model in what the merge's loss is compared with.
        labels: Names of the classes.
        total: Loss of the merge less that of its models, over all predictions of all samples.
        found: At most `MOST`, by how much they add to the total, and that.
    """

    shares: tuple[float, ...]
    labels: Mapping[int, str]
    total: float = 0.0
    found: list[tuple[float, SampleRow]] = field(default_factory=list)

    def add(self, sample_ids: torch.Tensor, models: Sequence[SampleScores], merge: SampleScores) -> None:
        """Adds a batch.

        Args:
            sample_ids: Numbers of the samples.
            models: Scores of every model.
            merge: Scores of the merge.
        """
        blend = sum(share * scores.loss_sums for share, scores in zip(self.shares, models, strict=True))
        excess = merge.loss_sums - blend
        self.total += float(excess.sum())
        most = torch.topk(excess, min(MOST, len(excess))).indices.tolist()
        rows = [(float(excess[index]), self._row(index, int(sample_ids[index]), models, merge)) for index in most]
        self._keep([row for row in rows if row[0] > 0])

    def _row(self, index: int, sample: int, models: Sequence[SampleScores], merge: SampleScores) -> SampleRow:
        def answer(scores: SampleScores) -> str | None:
            return None if scores.predictions is None else self._name(int(scores.predictions[index]))

        def loss(scores: SampleScores) -> float:
            return float(scores.loss_sums[index] / scores.counts[index])

        return SampleRow(
            sample,
            None if merge.references is None else self._name(int(merge.references[index])),
            int(merge.counts[index]),
            loss(merge),
            tuple(map(loss, models)),
            answer(merge),
            tuple(name for name in map(answer, models) if name is not None),
        )

    def _name(self, label: int) -> str:
        return str(self.labels.get(label, label))

    def _keep(self, rows: Sequence[tuple[float, SampleRow]]) -> None:
        everyone = [*self.found, *rows]
        self.found = sorted(everyone, key=lambda each: (-each[0], each[1].sample))[:MOST]

    def merge(self, other: Carriers) -> None:
        """Adds what another process has gathered."""
        self.total += other.total
        self._keep(other.found)

    def rows(self) -> tuple[SampleRow, ...]:
        """The samples, the one that adds most first, with its share of the barrier where there is one."""
        return tuple(
            SampleRow(**{**vars(row), "share": excess / self.total if self.total > 0 else None})
            for excess, row in self.found
        )
