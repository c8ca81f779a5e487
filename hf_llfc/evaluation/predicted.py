"""What a batch predicts, and what a model answers there, in one pass over its logits.

Shape legend: n samples, t tokens, k predictions (of samples, or of tokens of language models), c classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.encoding import IGNORED_LABEL
from hf_llfc.recipe.data import CLASSIFICATION_TASKS

ELEMENTS_AT_ONCE = 2**17
"""Logits converted to float64 at a time: few enough to stay in the processor's cache."""

ELEMENTS_ON_DEVICE = 2**24
"""The same where memory is far from the processor, and many small steps cost more than they save."""


@dataclass(frozen=True)
class Predicted:
    """Where a batch predicts something.

    Args:
        rows: Rows of the logits, with all dimensions but the last in one, int64 (k,).
        samples: Index in the batch of the sample that each belongs to, int64 (k,).
        count: Samples of the batch.
        labels: What is to be predicted, int64 (k,); None without labels.
    """

    rows: torch.Tensor
    samples: torch.Tensor
    count: int
    labels: torch.Tensor | None = None

    def slices(self, *logits: torch.Tensor) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """Slices of the predictions, with the logits of one or more models there, in float64.

        Args:
            logits: Logits of every model, classes last.

        Yields:
            A slice of the k predictions, and for every model its logits, (slice, c).
        """
        classes = logits[0].shape[-1]
        at_once = ELEMENTS_AT_ONCE if self.rows.device.type == "cpu" else ELEMENTS_ON_DEVICE
        step = max(1, at_once // classes)
        flat = [each.reshape(-1, classes) for each in logits]
        for start in range(0, max(1, len(self.rows)), step):
            part = slice(start, start + step)
            yield part, [each[self.rows[part]].double() for each in flat]


def labelled(task: str, logits: torch.Tensor, labels: torch.Tensor) -> Predicted:
    """What a labelled batch predicts.

    Args:
        task: A value of `TASKS`.
        logits: (n, c) for classification, (n, t, c) for language models.
        labels: (n,) or (n, t), with -100 where nothing is predicted. For text generation the label of a position is
            predicted by the logits of the position before.

    Raises:
        EvaluationError: The logits are not those of a model for the task.
    """
    if logits.shape[:-1] != labels.shape or int(labels.max()) >= logits.shape[-1]:
        raise EvaluationError(
            f"the model has no head for {task}: its logits have the shape {tuple(logits.shape)}, and the labels the "
            f"shape {tuple(labels.shape)} and values up to {int(labels.max())}; give the task it was trained for"
        )
    labels = labels.to(logits.device)
    labels_nt = labels[:, None] if task in CLASSIFICATION_TASKS else labels
    n, t = labels_nt.shape
    shift = int(task == "text-generation")
    samples, positions = torch.nonzero(labels_nt[:, shift:] != IGNORED_LABEL, as_tuple=True)
    return Predicted(samples * t + positions, samples, n, labels_nt[samples, positions + shift])


def unlabelled(logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> Predicted:
    """What a batch without labels predicts: a sample each, or every token that is no padding.

    Args:
        logits: Of the batch, classes last.
        batch: As `EvaluationData.batches` yields it.
    """
    mask = batch.get("attention_mask")
    shape = logits.shape[:-1]
    if mask is not None and shape == mask.shape:
        rows = mask.reshape(-1).to(logits.device).nonzero()[:, 0]
    else:
        rows = torch.arange(shape.numel(), device=logits.device)
    return Predicted(rows, rows // max(1, shape[1:].numel()), shape[0])


@dataclass(frozen=True)
class Answers:
    """What one model answers for every prediction of a batch.

    Args:
        partition: Log of the summed exponentials of the logits, float64 (k,).
        choice: The most likely class, int64 (k,).
        entropy: Entropy of the predicted distribution in nats, float64 (k,).
        mass: Predicted probabilities summed over predictions, float64 (c,).
        loss: Cross-entropy with the label in nats, float64 (k,); None without labels.
    """

    partition: torch.Tensor
    choice: torch.Tensor
    entropy: torch.Tensor
    mass: torch.Tensor
    loss: torch.Tensor | None


def answers(logits: torch.Tensor, predicted: Predicted) -> Answers:
    """What a model answers.

    Args:
        logits: Of the batch, classes last.
        predicted: What is looked at.
    """
    device = logits.device
    partition, entropy, loss = (torch.empty(len(predicted.rows), dtype=torch.float64, device=device) for _ in range(3))
    choice = torch.empty(len(predicted.rows), dtype=torch.int64, device=device)
    mass = torch.zeros(logits.shape[-1], dtype=torch.float64, device=device)
    for part, (logits_kc,) in predicted.slices(logits):
        top_k, choice[part] = logits_kc.max(-1)
        at_label_k = None if predicted.labels is None else logits_kc.gather(-1, predicted.labels[part, None])[:, 0]
        below_kc = logits_kc.sub_(top_k[:, None])
        exponentials_kc = below_kc.exp()
        sums_k = exponentials_kc.sum(-1)
        partition[part] = top_k + sums_k.log()
        entropy[part] = sums_k.log() - torch.linalg.vecdot(exponentials_kc, below_kc) / sums_k
        mass += sums_k.reciprocal() @ exponentials_kc
        if at_label_k is not None:
            loss[part] = sums_k.log() - (at_label_k - top_k)
    return Answers(partition, choice, entropy, mass, loss if predicted.labels is not None else None)
