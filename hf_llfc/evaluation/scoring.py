"""From logits and labels to loss and hits, per sample, and their exact sums over samples and processes.

Shape legend: n samples, t tokens, c classes or vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import evaluate
import torch

from hf_llfc.evaluation.encoding import IGNORED_LABEL
from hf_llfc.evaluation.metrics import classification_metric, language_model_metric
from hf_llfc.evaluation.predicted import Answers, Predicted, answers, labelled
from hf_llfc.recipe.data import CLASSIFICATION_TASKS


@dataclass(frozen=True)
class SampleScores:
    """Scores of a batch, on the device of the logits.

    Args:
        loss_sums: Cross-entropy in nats summed over what each sample predicts, float64 (n,).
        counts: How many predictions each sample makes, int64 (n,).
        correct: How many of them are right, int64 (n,).
        predictions: Predicted class of each sample, int64 (n,); for classification only.
        references: Its true class.
    """

    loss_sums: torch.Tensor
    counts: torch.Tensor
    correct: torch.Tensor
    predictions: torch.Tensor | None
    references: torch.Tensor | None


def score_samples(task: str, logits: torch.Tensor, labels: torch.Tensor) -> SampleScores:
    """Scores every sample of a batch.

    Args:
        task: A value of `TASKS`.
        logits: (n, c) for classification, (n, t, c) for language models.
        labels: (n,) or (n, t), with -100 where nothing is predicted. For text generation the label of a
            position is predicted by the logits of the position before.

    Returns:
        The scores; the loss is computed in float64.

    Raises:
        EvaluationError: The logits are not those of a model for the task.
    """
    predicted = labelled(task, logits, labels)
    return score_answers(task, predicted, answers(logits, predicted))


def score_answers(task: str, predicted: Predicted, found: Answers) -> SampleScores:
    """Scores every sample of a labelled batch by what a model answers.

    Args:
        task: A value of `TASKS`.
        predicted: What is to be predicted.
        found: The answers.
    """
    assert predicted.labels is not None and found.loss is not None
    samples = predicted.samples
    loss_sums = torch.zeros(predicted.count, dtype=torch.float64, device=samples.device)
    correct, counts = (torch.zeros(predicted.count, dtype=torch.int64, device=samples.device) for _ in range(2))
    loss_sums.index_add_(0, samples, found.loss)
    correct.index_add_(0, samples, (found.choice == predicted.labels).long())
    counts.index_add_(0, samples, torch.ones_like(samples))
    if task not in CLASSIFICATION_TASKS:
        return SampleScores(loss_sums, counts, correct, None, None)
    return SampleScores(loss_sums, counts, correct, found.choice, predicted.labels)


def task_loss(task: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean loss of a batch with its gradient, for what is learned; `score_samples` is what is reported.

    Args:
        task: A value of `TASKS`.
        logits: As for `score_samples`.
        labels: As for `score_samples`.

    Returns:
        Mean cross-entropy per prediction, in nats; a scalar in float32 or better.
    """
    if task == "text-generation":
        logits, labels = logits[:, :-1], labels[:, 1:]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(
        wide.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="mean"
    )


@dataclass
class ScoreSums:
    """Sums of scores; what is needed for every metric and grows neither with samples nor with batches.

    Args:
        samples: How many samples were added.
        loss_sum: Their summed loss, in nats.
        count: What they predict: classes or tokens.
        correct: How many of these are right.
        confusion: Number of samples per (true class, predicted class).
    """

    samples: int = 0
    loss_sum: float = 0.0
    count: int = 0
    correct: int = 0
    confusion: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add(self, scores: SampleScores) -> None:
        """Adds a batch."""
        self.samples += len(scores.counts)
        self.loss_sum += float(scores.loss_sums.sum())
        self.count += int(scores.counts.sum())
        self.correct += int(scores.correct.sum())
        if scores.predictions is not None and scores.references is not None:
            pairs = zip(scores.references.tolist(), scores.predictions.tolist(), strict=True)
            self.confusion.update(pairs)

    def merge(self, other: ScoreSums) -> None:
        """Adds what another process has summed."""
        self.samples += other.samples
        self.loss_sum += other.loss_sum
        self.count += other.count
        self.correct += other.correct
        self.confusion.update(other.confusion)

    @property
    def loss(self) -> float:
        """Mean cross-entropy per prediction, in nats."""
        return self.loss_sum / self.count

    @property
    def error(self) -> float:
        """Share of predictions that are wrong."""
        return 1 - self.correct / self.count

    def metrics(self, metrics: Mapping[str, evaluate.Metric], byte_count: int | None) -> dict[str, float]:
        """The values of all metrics.

        Args:
            metrics: By name, as `EvaluationData` holds them.
            byte_count: As `EvaluationData` holds it.

        Returns:
            Plain numbers by name.
        """
        values: dict[str, float] = {}
        for name, metric in metrics.items():
            if self.confusion:
                values |= classification_metric(metric, name, self.confusion)
            else:
                values |= language_model_metric(
                    metric,
                    name,
                    loss_sum=self.loss_sum,
                    correct=self.correct,
                    tokens=self.count,
                    byte_count=byte_count,
                )
        return values
