"""What to evaluate on, as typed data that needs neither torch nor datasets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llfc.errors import EvaluationError, raise_all, suggest

if TYPE_CHECKING:
    import datasets

TASKS: dict[str, str] = {
    "text-classification": "text-classification",
    "text-generation": "text-generation",
    "causal-lm": "text-generation",
    "fill-mask": "fill-mask",
    "masked-lm": "fill-mask",
    "image-classification": "image-classification",
}
"""Every name a task may be asked by, and the pipeline tag of the Hub it stands for."""

CLASSIFICATION_TASKS = ("text-classification", "image-classification")
TEXT_TASKS = ("text-classification", "text-generation", "fill-mask")

BYTES_TOKENIZER = "bytes"
"""Value of `EvaluationConfig.tokenizer` for byte-level models: the text's UTF-8 bytes are the token ids."""


@dataclass(frozen=True)
class EvaluationConfig:
    """A task, the data that poses it and how the data is cut into batches.

    Args:
        task: One of `TASKS`; an alias is replaced by the name it stands for.
        dataset: Hub id (also ``id@revision``), a local csv, tsv, json, jsonl, parquet or txt file, a folder of
            such files or of images by class, a folder written by `Dataset.save_to_disk`, or a loaded `Dataset`.
        name: The configuration of the dataset, where it has several.
        split: The split, slices allowed (``test[:500]``). Without it the only split, else validation, else test.
        text_column: Without it ``text``, ``sentence`` or the only column of strings.
        text_pair_column: The second text of a pair, for text classification.
        label_column: Without it ``label``, ``labels`` or the only column of class labels.
        image_column: Without it ``image``, ``img``, ``pixel_values`` or the only column of images.
        samples: How many samples to take, chosen by `seed`; all of them without it. More than there are is an
            error.
        seed: Of the choice and order of samples, and of the masking.
        batch_size: Samples per batch and process. Results do not depend on it.
        max_length: Tokens per sample at most. Without it 512, or what tokenizer and model allow if that is less.
        metric: Names of metrics besides those the task always reports: one of
            `hf_llfc.evaluation.metrics.OFFLINE_METRICS`, or what `evaluate.load` knows.
        tokenizer: ``bytes`` for byte-level models whose folder has no tokenizer (the text column's UTF-8 bytes
            are the token ids), or a Hub id or folder. Without it the one of the model.
        blocks: For text generation: join all rows and cut them into blocks of `max_length` tokens. False: one
            row is one sample, truncated to `max_length`.
        labels: False ignores labels: features are compared, loss and metric are not measured.
        label_map: From a label as the dataset writes it to the model's label name or class index.
        mask_fraction: For fill-mask: share of the tokens of a sample that are predicted, at least one.
        rescale_factor: For images of a model without a processor: the factor on every pixel. Without it 1/255 for
            images and integer arrays, 1 for floating-point arrays.

    Raises:
        EvaluationError: All values that are not valid, at once.
    """

    task: str
    dataset: str | Path | datasets.Dataset
    name: str | None = None
    split: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    image_column: str | None = None
    samples: int | None = None
    seed: int = 0
    batch_size: int = 32
    max_length: int | None = None
    metric: str | Sequence[str] | None = None
    tokenizer: str | None = None
    blocks: bool = True
    labels: bool = True
    label_map: Mapping[str, str | int] | None = None
    mask_fraction: float = 0.15
    rescale_factor: float | None = None

    def __post_init__(self) -> None:
        problems = []
        task = TASKS.get(self.task)
        if task is None:
            choices = ", ".join(TASKS)
            problems.append(f"unknown task {self.task!r}{suggest(str(self.task), TASKS)} (known: {choices})")
        for field, value in (
            ("samples", self.samples),
            ("batch_size", self.batch_size),
            ("max_length", self.max_length),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                problems.append(f"{field} must be a whole number of at least 1, not {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            problems.append(f"seed must be a whole number of at least 0, not {self.seed!r}")
        if not 0 < self.mask_fraction <= 1:
            problems.append(f"mask_fraction must be above 0 and at most 1, not {self.mask_fraction!r}")
        if task == "text-generation" and self.max_length == 1:
            problems.append("max_length must be at least 2: a language model predicts each token from those before")
        if task is not None:
            problems += self._misplaced_columns(task)
        raise_all(problems, EvaluationError, "the evaluation settings are not valid")
        assert task is not None
        object.__setattr__(self, "task", task)

    def _misplaced_columns(self, task: str) -> list[str]:
        """Settings that the task would not look at: nothing that a user wrote is ignored."""
        misplaced: list[tuple[str, Any]] = []
        if task not in TEXT_TASKS:
            misplaced += [("text_column", self.text_column), ("tokenizer", self.tokenizer)]
            misplaced += [("max_length", self.max_length)]
        if task != "text-classification":
            misplaced += [("text_pair_column", self.text_pair_column)]
        if task not in CLASSIFICATION_TASKS:
            misplaced += [("label_column", self.label_column), ("label_map", self.label_map)]
        if task != "image-classification":
            misplaced += [("image_column", self.image_column), ("rescale_factor", self.rescale_factor)]
        if task != "text-generation":
            misplaced += [("blocks", None if self.blocks else False)]
        return [f"{field} has no meaning for the task {task}" for field, value in misplaced if value is not None]

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics asked for, in the order given."""
        if self.metric is None:
            return ()
        return (self.metric,) if isinstance(self.metric, str) else tuple(self.metric)

    def summary(self) -> dict[str, Any]:
        """The settings that differ from their defaults, as JSON values, for reports."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = vars(self)[field.name]
            if value == field.default and field.default is not dataclasses.MISSING:
                continue
            if field.name == "dataset":
                value = str(value) if isinstance(value, str | Path) else "in memory"
            elif field.name == "metric":
                value = list(self.metric_names)
            elif isinstance(value, Mapping):
                value = dict(value)
            values[field.name] = value
        return values
