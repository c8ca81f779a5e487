"""What to evaluate on, as typed data that needs neither torch nor datasets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llfc.errors import EvaluationError
from hf_llfc.recipe.options import documented, option, settle

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


@documented
@dataclass(frozen=True)
class EvaluationConfig:
    """A task, the data that poses it and how the data is cut into batches."""

    task: str = option("What the models do.", choices=tuple(TASKS))
    dataset: str | Path | datasets.Dataset = option(
        "Hub id or id@revision; a csv, tsv, json, jsonl, parquet or txt file; a folder of such files, of images by "
        "class, or of `Dataset.save_to_disk`; in Python also a loaded `Dataset`.",
        reads=lambda dataset: dataset,  # what can be opened is known where it is opened
    )
    name: str | None = option("Configuration of the dataset, where it has several.", None, shown="the only one")
    split: str | None = option(
        "Split, slices allowed (test[:500]).", None, shown="the only one, else validation, else test"
    )
    text_column: str | None = option(
        "Column of the text.", None, shown="text, sentence or the only text column", metavar="COLUMN"
    )
    text_pair_column: str | None = option(
        "Column of the second text of a pair, for text classification.", None, shown="none", metavar="COLUMN"
    )
    label_column: str | None = option(
        "Column of the label.", None, shown="label, labels or the only column of classes", metavar="COLUMN"
    )
    image_column: str | None = option(
        "Column of the image.", None, shown="image, img, pixel_values or the only image column", metavar="COLUMN"
    )
    samples: int | None = option(
        "Number of samples, chosen by the seed; more than there are is an error.", None, at_least=1, shown="all"
    )
    seed: int = option("Seed of choice, order and masking of samples.", 0, at_least=0, shown="the seed of the recipe")
    batch_size: int = option("Samples per batch and process; results do not depend on it.", 32, at_least=1)
    max_length: int | None = option(
        "Tokens per sample, at most.", None, at_least=1, shown="512, or what tokenizer and model allow if less"
    )
    metric: str | Sequence[str] | None = option(
        "Metrics besides those of the task: one of `OFFLINE_METRICS`, or, with `trust_remote_code`, what "
        "`evaluate.load` knows.",
        None,
        shown="none",
    )
    tokenizer: str | None = option(
        "Hub id or folder of a tokenizer; bytes makes the text's UTF-8 bytes the token ids.",
        None,
        shown="that of the model",
    )
    blocks: bool = option(
        "Text generation: join all rows and cut them into blocks of `max_length` tokens; false makes each row a "
        "sample.",
        True,
    )
    trust_remote_code: bool = option("Run code of others: that of `metric`, and of `tokenizer`.", False)
    labels: bool = option("False ignores labels: features are compared, loss and metric are not measured.", True)
    label_map: Mapping[str, str | int] | None = option(
        "From a label as the dataset writes it to the model's label name or class index.", None, shown="none"
    )
    mask_fraction: float = option(
        "Fill-mask: share of the tokens of a sample that are predicted, at least one.", 0.15, above=0, at_most=1
    )
    rescale_factor: float | None = option(
        "Images of a model without a processor: factor on every pixel.",
        None,
        shown="1/255 for images and whole numbers, 1 for floating-point arrays",
    )

    def __post_init__(self) -> None:
        settle(self, EvaluationError, self._disagreements)
        object.__setattr__(self, "task", TASKS[self.task])

    def _disagreements(self) -> list[str]:
        task = TASKS[self.task]
        problems = self._misplaced_columns(task)
        if task == "text-generation" and self.max_length == 1:
            problems.append(
                "max_length: at least 2 is expected: a language model predicts each token from those before"
            )
        return problems

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
        return [f"{field}: has no meaning for the task {task}" for field, value in misplaced if value is not None]

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
