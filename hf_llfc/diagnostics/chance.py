"""Models at chance: what they predict says nothing of the data, so that no verdict follows from them.

Models that know nothing merge without a barrier, whatever their weights are. With labels such a model does no better
than the frequencies of the labels; without, it gives every input the same prediction.

Shape legend: n samples, k predictions (samples, or tokens of language models), c classes or vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hf_llfc.diagnostics.rows import AtChance, ModelReference
from hf_llfc.diagnostics.statistics import RatioMoments
from hf_llfc.evaluation.predicted import Answers, Predicted
from hf_llfc.foundation.numbers import rounded

LEARNED_LIMIT = 0.01
"""Share of what there is to know, of the labels by the loss or of the predictions by the input, up to which a model
knows nothing: random classifiers reach it by accident, since their inputs differ by class."""

FLAT_LIMIT = 0.1
"""Share of the log of a vocabulary by which the predictions of a language model are sharper than uniform, up to which
it knows nothing. A vocabulary's bare frequencies are far above it, wide random models below."""

STANDARD_ERRORS = 2.0
"""Noise: so many standard errors."""

SMOOTHING = 0.5
"""Added to the count of every label, as the estimate of Krichevsky and Trofimov does."""


@dataclass
class Predictions:
    """Sums over what one model predicts; they grow with neither samples nor batches.

    Args:
        count: How many predictions there are.
        mean: Their summed probabilities, (c,), in float64; None before the first.
        entropy: Their summed entropies, in nats.
        labels: How often each label is to be predicted; empty without labels.
        correct: How many predictions are right.
        loss: Their losses; empty without labels.
    """

    count: int = 0
    mean: torch.Tensor | None = None
    entropy: float = 0.0
    labels: Counter[int] = field(default_factory=Counter)
    correct: int = 0
    loss: RatioMoments = field(default_factory=lambda: RatioMoments.zeros(1))

    def add(self, predicted: Predicted, found: Answers) -> None:
        """Adds what a model answers to a batch."""
        self.count += len(predicted.rows)
        self.mean = found.mass if self.mean is None else self.mean + found.mass
        self.entropy += float(found.entropy.sum())
        if predicted.labels is None or found.loss is None:
            return
        self.loss.add(found.loss[None], predicted.samples)
        values, counts = predicted.labels.unique(return_counts=True)
        self.labels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        self.correct += int((found.choice == predicted.labels).sum())

    def merge(self, other: Predictions) -> None:
        """Adds what another process has gathered."""
        if other.mean is not None:
            self.mean = other.mean if self.mean is None else self.mean + other.mean
        self.count += other.count
        self.entropy += other.entropy
        self.labels.update(other.labels)
        self.correct += other.correct
        self.loss.merge(other.loss)

    def cpu(self) -> Predictions:
        """A copy in main memory, for other processes."""
        mean = None if self.mean is None else self.mean.cpu()
        return Predictions(self.count, mean, self.entropy, self.labels, self.correct, self.loss)

    @property
    def classes(self) -> int:
        """Size of what is chosen from; 0 where nothing is predicted."""
        return 0 if self.mean is None else len(self.mean)

    @property
    def mean_entropy(self) -> float:
        """Mean entropy of a prediction, in nats."""
        return self.entropy / self.count

    @property
    def spread(self) -> float:
        """Entropy of the mean prediction, in nats."""
        return 0.0 if self.mean is None else float(torch.special.entr(self.mean / self.count).sum())

    @property
    def from_input(self) -> float:
        """Share of this entropy that the input explains: mutual information of input and prediction over it."""
        return (self.spread - self.mean_entropy) / self.spread if self.spread > 0 else 0.0

    @property
    def sharpness(self) -> float:
        """Share of the log of the classes by which single predictions are sharper than uniform."""
        return 1 - self.mean_entropy / math.log(self.classes)


def at_chance(
    parents: Sequence[Predictions], references: Sequence[ModelReference], *, language: bool
) -> tuple[AtChance, ...]:
    """The models that do no better than chance.

    Args:
        parents: What each predicts; without the base of task arithmetic, which need not know the task.
        references: Their names.
        language: Whether they are language models.
    """
    found = []
    for index, (predictions, reference) in enumerate(zip(parents, references, strict=False)):
        if predictions.count < 2 or predictions.classes < 2:
            continue
        reason = _by_labels(predictions) if predictions.labels else _by_predictions(predictions, language)
        if reason is not None:
            name = f"model {index + 1}" + (f" ({reference.id})" if reference.id else "")
            found.append(AtChance(index, f"{name} does no better than chance on these data: {reason}"))
    return tuple(found)


def chance_loss(labels: Counter[int], classes: int) -> float:
    """The loss of one who knows no input, in nats.

    Args:
        labels: How often each label occurs.
        classes: Size of what is chosen from.

    Returns:
        That of guessing evenly or, if it is less, by the frequencies of all other labels; of labels that are all the
        same no frequencies are taken, since every model that knows them would be at chance.
    """
    uniform = math.log(classes)
    if len(labels) < 2:
        return uniform
    total = labels.total() - 1 + SMOOTHING * classes
    by_frequency = -sum(count * math.log((count - 1 + SMOOTHING) / total) for count in labels.values())
    return min(uniform, by_frequency / labels.total())


def _by_labels(predictions: Predictions) -> str | None:
    """Why a model is at chance, by its loss and its hits; None if it is not."""
    loss, error = float(predictions.loss.mean), float(predictions.loss.errors)
    count, chance = predictions.count, chance_loss(predictions.labels, predictions.classes)
    noise = STANDARD_ERRORS * error
    if loss < chance - max(noise, LEARNED_LIMIT * chance):
        return None
    # Who is too sure of what it knows has a loss above chance, and hits.
    accuracy, most = predictions.correct / count, max(predictions.labels.values()) / count
    hits = accuracy - most > STANDARD_ERRORS * math.sqrt(most * (1 - most) / count)
    if hits and predictions.from_input > LEARNED_LIMIT:
        return None
    return (
        f"its loss is {rounded(loss, 3)} nats, that of the labels' frequencies alone {rounded(chance, 3)}; it is right "
        f"in {accuracy:.1%}, and the most frequent label in {most:.1%}"
    )


def _by_predictions(predictions: Predictions, language: bool) -> str | None:
    """Why a model is at chance, by what it predicts; None if it is not, as far as can be seen without labels."""
    if predictions.from_input <= LEARNED_LIMIT:
        share = f"{max(0.0, predictions.from_input):.1%}"
        return f"its predictions hardly depend on the input, which explains {share} of their entropy"
    if language and predictions.sharpness <= FLAT_LIMIT:
        uniform = rounded(math.log(predictions.classes), 3)
        entropy = rounded(predictions.mean_entropy, 3)
        return f"its predictions are nearly uniform, with an entropy of {entropy} nats out of {uniform}"
    return None
