"""The samples of an evaluation: chosen once, checked at once, batched on demand, sharded by process.

Shape legend: n samples, t tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import evaluate
import numpy as np
import torch

from hf_llfc.errors import EvaluationError, raise_all
from hf_llfc.evaluation.encoding import (
    IGNORED_LABEL,
    TextEncoder,
    TokenRow,
    check_vocabulary,
    collate,
    cut_into_blocks,
    load_image_encoder,
    load_text_encoder,
    mask_tokens,
)
from hf_llfc.evaluation.metrics import default_metrics, load_metric, refuse_other_than_two_classes
from hf_llfc.evaluation.sources import MAX_LISTED, choose_column, choose_samples, class_indices, open_dataset, pinned
from hf_llfc.recipe.data import CLASSIFICATION_TASKS, EvaluationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

SCAN_BATCH = 1000
"""Rows tokenized at once while a dataset is checked."""

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class EvaluationData:
    """Samples of one task, ready to be batched.

    Args:
        config: What was asked for.
        sample_ids: Number of each sample in its split (of rows, or of blocks for text generation), in the order
            of evaluation, which depends on the seed alone.
        labelled: Whether batches carry `labels`, so that loss and metrics can be measured.
        metrics: The metrics to report, by name.
        byte_count: Bytes of UTF-8 text that all samples together predict; None where that is not defined.
        summary: What reports say about the data, as JSON values.
        encode: From positions in `sample_ids` to a batch.
    """

    config: EvaluationConfig
    sample_ids: np.ndarray
    labelled: bool
    metrics: Mapping[str, evaluate.Metric]
    byte_count: int | None
    summary: Mapping[str, Any]
    encode: Callable[[np.ndarray], Batch] = field(repr=False)

    @property
    def task(self) -> str:
        """The task by the name that `TASKS` gives it."""
        return self.config.task

    def __len__(self) -> int:
        return len(self.sample_ids)

    def batch_count(self, rank: int = 0, world: int = 1) -> int:
        """How many batches one process gets."""
        return math.ceil(len(self.sample_ids[rank::world]) / self.config.batch_size)

    def batches(
        self, rank: int = 0, world: int = 1, on_batch: Callable[[int, int], None] | None = None
    ) -> Iterator[tuple[Batch, torch.Tensor]]:
        """The batches of one process; over all processes every sample comes exactly once.

        Args:
            rank: Number of this process.
            world: Number of processes.
            on_batch: Called before every batch and after the last with the samples done and all of this process.

        Yields:
            The model's inputs as CPU tensors with, if `labelled`, the key `labels`: class indices (n,), or
            token ids (n, t) with -100 where nothing is predicted. And the samples' ids, int64 (n,).
        """
        shard = np.arange(rank, len(self.sample_ids), world)
        for start in range(0, len(shard), self.config.batch_size):
            if on_batch is not None:
                on_batch(start, len(shard))
            positions = shard[start : start + self.config.batch_size]
            yield self.encode(positions), torch.from_numpy(self.sample_ids[positions])
        if on_batch is not None:
            on_batch(len(shard), len(shard))


def load_evaluation_data(
    config: EvaluationConfig,
    checkpoint_folder_or_processor: Any,
    model_config: PretrainedConfig,
    *,
    trust_remote_code: bool = False,
) -> EvaluationData:
    """Opens a dataset and checks it from end to end against task and model.

    Args:
        config: Task, dataset and batches.
        checkpoint_folder_or_processor: The model's folder or Hub id, whose tokenizer or image processor is used; or
            such a tokenizer or processor; or None if the model has neither.
        model_config: Of the model: labels, vocabulary, positions, channels.
        trust_remote_code: Whether code that comes with the model's tokenizer or processor may be run.

    Returns:
        The samples.

    Raises:
        EvaluationError: Anything that would make loss, metric or features wrong.
    """
    metrics = _load_metrics(config)
    if config.labels and config.task in CLASSIFICATION_TASKS:
        _check_single_label(model_config)
        refuse_other_than_two_classes(config.metric_names, len(model_config.id2label or ()))
    rows = open_dataset(config)
    config = pinned(config, rows)
    if config.task == "image-classification":
        return _image_data(config, metrics, rows, checkpoint_folder_or_processor, model_config, trust_remote_code)
    encoder = load_text_encoder(
        config, checkpoint_folder_or_processor, model_config, trust_remote_code=trust_remote_code
    )
    text_column = choose_column(
        rows,
        config.text_column,
        setting="text_column",
        usual=("text", "sentence"),
        feature=datasets.Value,
        config=config,
    )
    if config.task == "text-classification":
        return _text_classification_data(config, metrics, rows, text_column, encoder, model_config)
    if config.task == "fill-mask":
        return _masked_language_data(config, metrics, rows, text_column, encoder, model_config)
    return _causal_language_data(config, metrics, rows, text_column, encoder, model_config)


def _load_metrics(config: EvaluationConfig) -> dict[str, evaluate.Metric]:
    """The metrics that were asked for; those every task reports are added when the data are known."""
    if config.metric_names and not config.labels:
        raise EvaluationError(f"metric {config.metric_names[0]!r} needs labels, and labels is false")
    language_model = config.task not in CLASSIFICATION_TASKS
    return {
        name: load_metric(name, language_model=language_model, trust_remote_code=config.trust_remote_code)
        for name in config.metric_names
    }


def _all_metrics(
    asked: Mapping[str, evaluate.Metric], config: EvaluationConfig, byte_count: int | None
) -> dict[str, evaluate.Metric]:
    language_model = config.task not in CLASSIFICATION_TASKS
    if "bits_per_byte" in asked and byte_count is None:
        raise EvaluationError(
            "metric 'bits_per_byte' is for text generation with a tokenizer that maps tokens to their place in the "
            "text (a fast one, or bytes)"
        )
    defaults = default_metrics(language_model=language_model, byte_count=byte_count)
    metrics = {name: load_metric(name, language_model=language_model) for name in defaults}
    return {**metrics, **asked} if config.labels else {}


def _check_single_label(model_config: PretrainedConfig) -> None:
    problem = model_config.problem_type
    if problem not in (None, "single_label_classification") or len(model_config.label2id or {}) < 2:
        kind = problem or "one output without classes"
        raise EvaluationError(
            f"the model's head is made for {kind}; only single-label classification with two or more classes is "
            "evaluated"
        )


def _labels(
    config: EvaluationConfig, rows: datasets.Dataset, indices: np.ndarray, model_config: PretrainedConfig
) -> np.ndarray | None:
    if not config.labels:
        return None
    column = choose_column(
        rows,
        config.label_column,
        setting="label_column",
        usual=("label", "labels"),
        feature=datasets.ClassLabel,
        config=config,
    )
    return class_indices(rows, column, indices, model_config, config)


def _read_texts(rows: datasets.Dataset, columns: Sequence[str], indices: np.ndarray) -> list[list[str]]:
    """The texts of some rows, a list per column."""
    chosen = rows[[int(index) for index in indices]]
    for column in columns:
        for index, text in zip(indices, chosen[column], strict=True):
            if not isinstance(text, str):
                raise EvaluationError(f"row {index} of column {column!r} holds {text!r} instead of text; leave it out")
    return [chosen[column] for column in columns]


@dataclass(frozen=True)
class _Texts:
    """Rows of text that are tokenized again whenever a batch needs them, so that none is kept."""

    rows: datasets.Dataset
    columns: Sequence[str]
    indices: np.ndarray
    encoder: TextEncoder

    def tokens(self, positions: np.ndarray) -> list[TokenRow]:
        """The tokens of the samples at some positions."""
        texts = _read_texts(self.rows, self.columns, self.indices[positions])
        return self.encoder.encode(*texts)

    def scan(self, model_config: PretrainedConfig, usable: Callable[[TokenRow], bool], need: str) -> dict[str, int]:
        """Tokenizes everything once.

        Args:
            model_config: Whose vocabulary must hold all tokens.
            usable: Whether a sample can be evaluated.
            need: What it takes to be, for the message.

        Returns:
            Counts of `tokens`, of `truncated` samples and, where the tokenizer can tell, of the `bytes` that
            tokens after the first of each sample stand for.

        Raises:
            EvaluationError: All samples that are not usable.
        """
        tokens = truncated = byte_count = 0
        unusable: list[int] = []
        counts_bytes = True
        for start in range(0, len(self.indices), SCAN_BATCH):
            positions = np.arange(start, min(start + SCAN_BATCH, len(self.indices)))
            encoded = self.tokens(positions)
            check_vocabulary(encoded, model_config)
            for position, row in zip(positions, encoded, strict=True):
                if not usable(row):
                    unusable.append(int(self.indices[position]))
                tokens += len(row.ids)
                truncated += row.truncated
                if row.byte_counts is None:
                    counts_bytes = False
                else:
                    byte_count += int(row.byte_counts[1:].sum())
        if unusable:
            listed = ", ".join(map(str, sorted(unusable)[:MAX_LISTED]))
            more = f" and {len(unusable) - MAX_LISTED} more" if len(unusable) > MAX_LISTED else ""
            raise EvaluationError(
                f"{len(unusable)} of {len(self.indices)} samples cannot be evaluated, they {need}: row {listed}{more} "
                f"of column {' and '.join(map(repr, self.columns))}; leave these rows out of the dataset"
            )
        if truncated:
            logger.warning(
                "%d of %d samples are longer than max_length %d and were truncated",
                truncated,
                len(self.indices),
                self.encoder.max_length,
            )
        counts = {"tokens": tokens, "truncated": truncated}
        return {**counts, "bytes": byte_count} if counts_bytes else counts


def _text_classification_data(
    config: EvaluationConfig,
    metrics: Mapping[str, evaluate.Metric],
    rows: datasets.Dataset,
    text_column: str,
    encoder: TextEncoder,
    model_config: PretrainedConfig,
) -> EvaluationData:
    columns = [text_column]
    if config.text_pair_column is not None:
        columns.append(
            choose_column(
                rows,
                config.text_pair_column,
                setting="text_pair_column",
                usual=(),
                feature=None,
                config=config,
            )
        )
    indices = choose_samples(len(rows), config, "rows")
    labels = _labels(config, rows, indices, model_config)
    texts = _Texts(rows.select_columns(columns), columns, indices, encoder)
    counts = texts.scan(model_config, lambda row: len(row.ids) > 0, "are empty")
    counts.pop("bytes", None)

    def encode(positions: np.ndarray) -> Batch:
        batch = collate(texts.tokens(positions), encoder.pad_id)
        return _with_labels(batch, None if labels is None else labels[positions])

    return _evaluation_data(config, metrics, indices, None, counts, encode)


def _masked_language_data(
    config: EvaluationConfig,
    metrics: Mapping[str, evaluate.Metric],
    rows: datasets.Dataset,
    text_column: str,
    encoder: TextEncoder,
    model_config: PretrainedConfig,
) -> EvaluationData:
    indices = choose_samples(len(rows), config, "rows")
    texts = _Texts(rows.select_columns([text_column]), [text_column], indices, encoder)
    counts = texts.scan(model_config, lambda row: not row.special.all(), "have no token that could be masked")
    counts.pop("bytes", None)
    assert encoder.mask_id is not None
    mask_id = encoder.mask_id

    def encode(positions: np.ndarray) -> Batch:
        masked = [
            mask_tokens(
                row,
                sample_id=int(indices[position]),
                seed=config.seed,
                fraction=config.mask_fraction,
                mask_id=mask_id,
                vocabulary=encoder.vocabulary,
            )
            for position, row in zip(positions, texts.tokens(positions), strict=True)
        ]
        batch = collate([row for row, _ in masked], encoder.pad_id)
        labels_nt = np.full(tuple(batch["input_ids"].shape), IGNORED_LABEL, dtype=np.int64)
        for index, (_, labels) in enumerate(masked):
            labels_nt[index, : len(labels)] = labels
        return _with_labels(batch, labels_nt if config.labels else None)

    return _evaluation_data(config, metrics, indices, None, counts, encode)


def _causal_language_data(
    config: EvaluationConfig,
    metrics: Mapping[str, evaluate.Metric],
    rows: datasets.Dataset,
    text_column: str,
    encoder: TextEncoder,
    model_config: PretrainedConfig,
) -> EvaluationData:
    rows = rows.select_columns([text_column])
    if config.blocks:
        stream = _join(rows, text_column, encoder, model_config)
        length = encoder.max_length
        available = cut_into_blocks(stream.ids, length)
        if available == 0:
            raise EvaluationError(f"column {text_column!r} holds no text that could be predicted")
        indices = choose_samples(available, config, f"blocks of {length} tokens")

        def tokens(positions: np.ndarray) -> list[TokenRow]:
            starts = [int(indices[position]) * length for position in positions]
            return [stream.cut(start, start + length) for start in starts]

        counts = {"tokens": 0, "truncated": 0}
        byte_count = 0 if stream.byte_counts is not None else None
        for position in range(len(indices)):
            block = tokens(np.array([position]))[0]
            counts["tokens"] += len(block.ids)
            if byte_count is not None and block.byte_counts is not None:
                byte_count += int(block.byte_counts[1:].sum())
    else:
        indices = choose_samples(len(rows), config, "rows")
        texts = _Texts(rows, [text_column], indices, encoder)
        tokens = texts.tokens
        counts = texts.scan(model_config, lambda row: len(row.ids) > 1, "have fewer than two tokens")
        byte_count = counts.pop("bytes", None)

    def encode(positions: np.ndarray) -> Batch:
        batch = collate(tokens(positions), encoder.pad_id)
        labels_nt = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL).numpy()
        return _with_labels(batch, labels_nt if config.labels else None)

    return _evaluation_data(config, metrics, indices, byte_count, counts, encode)


@dataclass(frozen=True)
class _Stream:
    """All rows as one run of tokens."""

    ids: np.ndarray
    byte_counts: np.ndarray | None

    def cut(self, start: int, end: int) -> TokenRow:
        """The tokens from `start` up to `end`."""
        ids = self.ids[start:end].astype(np.int64)
        byte_counts = None if self.byte_counts is None else self.byte_counts[start:end]
        return TokenRow(ids, None, np.zeros(len(ids), dtype=bool), byte_counts, False)


def _join(rows: datasets.Dataset, column: str, encoder: TextEncoder, model_config: PretrainedConfig) -> _Stream:
    """Tokenizes all rows and joins them, with the encoder's separator between two."""
    ids: list[np.ndarray] = []
    byte_counts: list[np.ndarray | None] = []
    is_blank = True
    for start in range(0, len(rows), SCAN_BATCH):
        indices = np.arange(start, min(start + SCAN_BATCH, len(rows)))
        texts = _read_texts(rows, [column], indices)
        is_blank = is_blank and not any(text.strip() for text in texts[0])
        encoded = encoder.encode(*texts, truncate=False)
        check_vocabulary(encoded, model_config)
        for row in encoded:
            separated = ids and encoder.separator_id is not None and ids[-1][-1:].tolist() != [encoder.separator_id]
            if separated:
                ids.append(np.array([encoder.separator_id], dtype=np.int32))
                byte_counts.append(np.array([encoder.separator_bytes], dtype=np.int32))
            ids.append(row.ids.astype(np.int32))
            byte_counts.append(None if row.byte_counts is None else row.byte_counts.astype(np.int32))
    if is_blank:
        raise EvaluationError(f"every row of column {column!r} is empty; give data with text in it")
    known = [counts for counts in byte_counts if counts is not None]
    return _Stream(np.concatenate(ids), np.concatenate(known) if len(known) == len(byte_counts) else None)


def _image_data(
    config: EvaluationConfig,
    metrics: Mapping[str, evaluate.Metric],
    rows: datasets.Dataset,
    source: str | Path | Any,
    model_config: PretrainedConfig,
    trust_remote_code: bool,
) -> EvaluationData:
    column = choose_column(
        rows,
        config.image_column,
        setting="image_column",
        usual=("image", "img", "pixel_values"),
        feature=datasets.Image,
        config=config,
    )
    indices = choose_samples(len(rows), config, "images")
    labels = _labels(config, rows, indices, model_config)
    feature = rows.features[column]
    images = rows.select_columns([column])
    if not isinstance(feature, datasets.Image):
        images = images.with_format("numpy")
    encoder = load_image_encoder(
        config, source, model_config, integers=_holds_integers(feature), trust_remote_code=trust_remote_code
    )

    def encode(positions: np.ndarray) -> Batch:
        chosen = images[[int(index) for index in indices[positions]]][column]
        try:
            batch = {"pixel_values": encoder.encode(list(chosen))}
        except EvaluationError as error:
            low, high = indices[positions].min(), indices[positions].max()
            raise EvaluationError(f"column {column!r}, in a batch of rows between {low} and {high}: {error}") from error
        return _with_labels(batch, None if labels is None else labels[positions])

    encode(np.arange(min(2, len(indices))))
    return _evaluation_data(config, metrics, indices, None, {}, encode)


def _holds_integers(feature: Any) -> bool:
    while isinstance(feature, datasets.List | datasets.LargeList):
        feature = feature.feature
    return "int" in str(getattr(feature, "dtype", ""))


def _with_labels(batch: Batch, labels: np.ndarray | None) -> Batch:
    return batch if labels is None else {**batch, "labels": torch.from_numpy(labels)}


def _evaluation_data(
    config: EvaluationConfig,
    metrics: Mapping[str, evaluate.Metric],
    indices: np.ndarray,
    byte_count: int | None,
    counts: Mapping[str, int],
    encode: Callable[[np.ndarray], Batch],
) -> EvaluationData:
    all_metrics = _all_metrics(metrics, config, byte_count)
    summary: dict[str, Any] = {**config.summary(), "samples": len(indices), **counts}
    if byte_count is not None:
        summary["bytes"] = byte_count
    return EvaluationData(config, indices, config.labels, all_metrics, byte_count, summary, encode)


def problems_over_processes(problems: Sequence[str | None]) -> None:
    """Raises on every process what went wrong on any of them."""
    distinct = dict.fromkeys(problem for problem in problems if problem is not None)
    raise_all(list(distinct), EvaluationError, "evaluation failed")
