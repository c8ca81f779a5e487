"""Metrics as `evaluate` modules that need no network, and access to all others by name.

Each class is an ordinary `evaluate.Metric`: it can be used alone, fed batch by batch, or over processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import f1_score, matthews_corrcoef, recall_score

from hf_llfc.errors import EvaluationError, suggest

_CLASSES = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
_LOSS_SUMS = datasets.Features({"loss_sums": datasets.Value("float64"), "counts": datasets.Value("int64")})
_HITS = datasets.Features({"correct": datasets.Value("int64"), "counts": datasets.Value("int64")})
_CLASS_INPUTS = "predictions and references: class indices, one per sample."


def _info(description: str, inputs: str, features: datasets.Features) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description=inputs, features=features, format="numpy"
    )


class Accuracy(evaluate.Metric):
    """Share of samples whose predicted class is the true one."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(str(Accuracy.__doc__), _CLASS_INPUTS, _CLASSES)

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class BalancedAccuracy(evaluate.Metric):
    """Mean over the classes present of the share of their samples that are recognised."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(str(BalancedAccuracy.__doc__), _CLASS_INPUTS, _CLASSES)

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        present = np.unique(references)
        recall = recall_score(references, predictions, labels=present, average="macro", zero_division=0)
        return {"balanced_accuracy": float(recall)}


class BinaryF1(evaluate.Metric):
    """Harmonic mean of precision and recall of class 1, of two classes."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(str(BinaryF1.__doc__), _CLASS_INPUTS, _CLASSES)

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, average="binary", pos_label=1, zero_division=0))}


class MacroF1(evaluate.Metric):
    """Unweighted mean over the classes of the harmonic mean of precision and recall."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(str(MacroF1.__doc__), _CLASS_INPUTS, _CLASSES)

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0))}


class WeightedF1(evaluate.Metric):
    """Mean over the classes of the harmonic mean of precision and recall, each by its share of the samples."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(str(WeightedF1.__doc__), _CLASS_INPUTS, _CLASSES)

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"weighted_f1": float(f1_score(references, predictions, average="weighted", zero_division=0))}


class MatthewsCorrelation(evaluate.Metric):
    """Correlation between predicted and true classes, from -1 to 1."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(str(MatthewsCorrelation.__doc__), _CLASS_INPUTS, _CLASSES)

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


class Perplexity(evaluate.Metric):
    """Exponential of the mean negative log-likelihood of the predicted tokens."""

    def _info(self) -> evaluate.MetricInfo:
        inputs = "loss_sums: summed negative log-likelihood per sample, in nats; counts: predicted tokens per sample."
        return _info(str(Perplexity.__doc__), inputs, _LOSS_SUMS)

    def _compute(self, loss_sums: np.ndarray, counts: np.ndarray) -> dict[str, float]:
        return {"perplexity": _exponential(math.fsum(loss_sums) / int(np.sum(counts)))}


class BitsPerByte(evaluate.Metric):
    """Bits that the model spends on one byte of UTF-8 text; comparable between tokenizers."""

    def _info(self) -> evaluate.MetricInfo:
        inputs = "loss_sums: summed negative log-likelihood per sample, in nats; counts: bytes predicted per sample."
        return _info(str(BitsPerByte.__doc__), inputs, _LOSS_SUMS)

    def _compute(self, loss_sums: np.ndarray, counts: np.ndarray) -> dict[str, float]:
        return {"bits_per_byte": math.fsum(loss_sums) / math.log(2) / int(np.sum(counts))}


class TokenAccuracy(evaluate.Metric):
    """Share of predicted tokens that are the true ones."""

    def _info(self) -> evaluate.MetricInfo:
        inputs = "correct: tokens predicted rightly per sample; counts: tokens predicted per sample."
        return _info(str(TokenAccuracy.__doc__), inputs, _HITS)

    def _compute(self, correct: np.ndarray, counts: np.ndarray) -> dict[str, float]:
        return {"token_accuracy": int(np.sum(correct)) / int(np.sum(counts))}


CLASSIFICATION_METRICS: dict[str, type[evaluate.Metric]] = {
    "accuracy": Accuracy,
    "balanced_accuracy": BalancedAccuracy,
    "f1": BinaryF1,
    "macro_f1": MacroF1,
    "weighted_f1": WeightedF1,
    "matthews_correlation": MatthewsCorrelation,
}
LANGUAGE_MODEL_METRICS: dict[str, type[evaluate.Metric]] = {
    "token_accuracy": TokenAccuracy,
    "perplexity": Perplexity,
    "bits_per_byte": BitsPerByte,
}
OFFLINE_METRICS: dict[str, type[evaluate.Metric]] = {**CLASSIFICATION_METRICS, **LANGUAGE_MODEL_METRICS}
"""Every metric of this package, by the name a configuration asks for it."""


def refuse_other_than_two_classes(names: Sequence[str], classes: int) -> None:
    """Refuses metrics of two classes for a model that has others.

    Args:
        names: The metrics that are asked for.
        classes: How many classes the model has.

    Raises:
        EvaluationError: One is of two classes.
    """
    if "f1" in names and classes != 2:
        raise EvaluationError(
            f"metric 'f1' is that of class 1 of two, and the model has {classes} classes; use macro_f1, the mean over "
            "all classes, or weighted_f1"
        )


def load_metric(name: str, *, language_model: bool = False, trust_remote_code: bool = False) -> evaluate.Metric:
    """A metric by name: from this package if it has it, else what `evaluate.load` finds, which runs a script.

    Args:
        name: One of `OFFLINE_METRICS`, or a Hub id or local script that `evaluate.load` knows.
        language_model: Whether it shall judge token predictions.
        trust_remote_code: Whether a script of the Hub or of a folder may be run.

    Returns:
        The metric, keeping its inputs in memory.

    Raises:
        EvaluationError: The metric does not exist, needs the network, or does not fit the task.
    """
    fitting = LANGUAGE_MODEL_METRICS if language_model else CLASSIFICATION_METRICS
    if name in fitting:
        return fitting[name](keep_in_memory=True)
    kind = "language models" if language_model else "classification"
    if name in OFFLINE_METRICS or language_model:
        raise EvaluationError(
            f"metric {name!r} is not one for {kind}{suggest(name, fitting)} (choose from: {', '.join(fitting)})"
        )
    if not trust_remote_code:
        raise EvaluationError(
            f"metric {name!r} is not part of this package{suggest(name, fitting)} (it has: {', '.join(fitting)}); "
            "evaluate.load would run its script: allow that with trust_remote_code: true beside it, if you trust it"
        )
    try:
        metric = evaluate.load(name, keep_in_memory=True)
    except Exception as error:  # evaluate lets errors of the network, the file system and the script through
        raise EvaluationError(
            f"metric {name!r} is not part of this package{suggest(name, fitting)} (it has: {', '.join(fitting)}) and "
            f"evaluate.load cannot load it: {_first_line(error)}"
        ) from error
    features = metric.features[0] if isinstance(metric.features, list) else metric.features
    if set(features) != {"predictions", "references"}:
        raise EvaluationError(
            f"metric {name!r} needs {', '.join(features)}; only metrics of predictions and references can be used"
        )
    return metric


def classification_metric(
    metric: evaluate.Metric, name: str, confusion: dict[tuple[int, int], int]
) -> dict[str, float]:
    """The value of a metric from counts of (reference, prediction) pairs.

    The counts say all there is to say about samples without order, so no prediction is kept while data streams.

    Args:
        metric: From `load_metric`.
        name: How it was asked for.
        confusion: Number of samples per (reference, prediction).

    Returns:
        All plain numbers that the metric gives, by their names.

    Raises:
        EvaluationError: The metric fails on these classes.
    """
    pairs = sorted(confusion)
    repeats = [confusion[pair] for pair in pairs]
    references = np.repeat([reference for reference, _ in pairs], repeats)
    predictions = np.repeat([prediction for _, prediction in pairs], repeats)
    try:
        values = metric.compute(predictions=predictions.tolist(), references=references.tolist())
    except ValueError as error:
        raise EvaluationError(f"metric {name!r} cannot be computed: {_first_line(error)}") from error
    return _plain_numbers(values)


def language_model_metric(
    metric: evaluate.Metric, name: str, *, loss_sum: float, correct: int, tokens: int, byte_count: int | None
) -> dict[str, float]:
    """The value of one of `LANGUAGE_MODEL_METRICS` from the sums over all samples."""
    if name == "token_accuracy":
        return _plain_numbers(metric.compute(correct=[correct], counts=[tokens]))
    if name == "perplexity":
        return _plain_numbers(metric.compute(loss_sums=[loss_sum], counts=[tokens]))
    assert name == "bits_per_byte" and byte_count is not None
    return _plain_numbers(metric.compute(loss_sums=[loss_sum], counts=[byte_count]))


def default_metrics(*, language_model: bool, byte_count: int | None) -> Sequence[str]:
    """The metrics a task always reports; the first is the one that the error rate is taken from."""
    if not language_model:
        return ("accuracy",)
    names = ("token_accuracy", "perplexity")
    return names if byte_count is None else (*names, "bits_per_byte")


def _plain_numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if np.ndim(value) == 0}


def _exponential(nats: float) -> float:
    """The exponential; infinity beyond what a float holds."""
    return math.exp(nats) if nats < 709 else math.inf


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
