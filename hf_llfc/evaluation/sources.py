"""From a dataset's name to rows: opening, choosing split, columns and samples, class indices of labels."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow
from datasets.arrow_writer import SchemaInferenceError
from pandas.errors import EmptyDataError

from hf_llfc.errors import EvaluationError, raise_all, suggest
from hf_llfc.foundation.model_names import existing
from hf_llfc.recipe.data import EvaluationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

FILE_BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
"""The builder of `datasets` for each kind of file."""

PREFERRED_SPLITS = ("validation", "test")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What datasets and its parsers raise where a file has nothing in it.
_OF_EMPTY = (EmptyDataError, SchemaInferenceError, StopIteration)
_AS_UTF_8 = "save the file as UTF-8 (`iconv -f latin1 -t utf-8`, if it is Latin-1)"
MAX_LISTED = 5
"""Faulty rows named in a message; the rest is counted."""


def open_dataset(config: EvaluationConfig) -> datasets.Dataset:
    """The rows of the split that the configuration asks for.

    Args:
        config: Which dataset, configuration and split.

    Returns:
        A dataset of at least one row, memory-mapped where it comes from disk.

    Raises:
        EvaluationError: It does not exist, cannot be read, has no such split, or is empty.
    """
    dataset = config.dataset
    if isinstance(dataset, datasets.Dataset):
        if config.name is not None or config.split is not None:
            raise EvaluationError(
                "name and split choose from a dataset that is yet to be loaded; the given one already is"
            )
        opened: Any = dataset
    elif isinstance(dataset, datasets.DatasetDict):
        opened = dataset
    elif isinstance(dataset, str | Path):
        opened = _load(str(dataset), config)
    else:
        raise EvaluationError(
            f"dataset must be a Hub id, a file, a folder or a datasets.Dataset, not {type(dataset).__name__}"
        )
    if isinstance(opened, datasets.DatasetDict):
        opened = _choose_split(opened, config)
    if not isinstance(opened, datasets.Dataset):
        raise EvaluationError(f"dataset {_title(config)} was loaded as a {type(opened).__name__}, not as rows")
    if len(opened) == 0:
        raise _empty(config)
    _refuse_other_encodings(opened, config)
    return opened


def _refuse_other_encodings(rows: datasets.Dataset, config: EvaluationConfig) -> None:
    """Refuses text that is not UTF-8, which readers of JSON take over as it is.

    Raises:
        EvaluationError: Names the column.
    """
    texts = [name for name, feature in rows.features.items() if _is_a(feature, datasets.Value)]
    for name in texts:
        for chunk in rows.data.column(name).chunks:
            try:
                chunk.validate(full=True)
            except pyarrow.ArrowInvalid as error:
                raise EvaluationError(
                    f"dataset {_title(config)}: column {name!r} holds text that is not UTF-8 ({error}); {_AS_UTF_8}"
                ) from None


def pinned(config: EvaluationConfig, rows: datasets.Dataset) -> EvaluationConfig:
    """The configuration with the commit and the split that a data set of the Hub was read at.

    Args:
        config: Which data set was asked for.
        rows: What `open_dataset` gave for it.

    Returns:
        The same where the data are local, or the commit is not known.
    """
    if not isinstance(config.dataset, str) or existing(config.dataset) is not None:
        return config
    # `datasets` keeps what it prepares under the commit of the repository.
    folders = {Path(file["filename"]).parent.name for file in rows.cache_files}
    commits = [name for name in folders if _COMMIT.fullmatch(name)]
    if len(commits) != 1:
        return config
    split = config.split or (str(rows.split) if rows.split is not None else None)
    return dataclasses.replace(config, dataset=f"{config.dataset.partition('@')[0]}@{commits[0]}", split=split)


def _load(name: str, config: EvaluationConfig) -> Any:
    path = existing(name) or Path(name)
    is_folder = existing(name) is not None and path.is_dir()
    arguments: dict[str, Any] = {"split": config.split}
    if is_folder and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        opened = _guarded(config, lambda: datasets.load_from_disk(str(path)))
        if config.name is not None or (config.split is not None and isinstance(opened, datasets.Dataset)):
            raise EvaluationError(f"dataset {name} is saved on disk without configurations or splits to choose from")
        return opened
    if existing(name) is not None and path.is_file():
        if config.name is not None:
            raise EvaluationError(
                f"dataset {name} is one file, which has no configuration {config.name!r}; leave name out"
            )
        builder = FILE_BUILDERS.get(path.suffix.lower())
        if builder is None:
            raise EvaluationError(
                f"dataset file {name} is of a kind that is not known (known: {', '.join(FILE_BUILDERS)})"
            )
        arguments |= {"path": builder, "data_files": str(path)}
        if path.suffix.lower() == ".tsv":
            arguments["sep"] = "\t"
        if builder == "text" and config.task == "text-generation":
            arguments["sample_by"] = "document"
        opened = _guarded(config, lambda: datasets.load_dataset(**arguments))
        return _without_blank_lines(opened, name) if builder == "text" else opened
    if not is_folder and (path.suffix.lower() in FILE_BUILDERS or name.startswith((".", "/", "~"))):
        raise EvaluationError(f"dataset {name} does not exist; a path is taken from the current folder, {Path.cwd()}")
    if is_folder:
        arguments["path"] = str(path)
    else:
        identifier, _, revision = name.partition("@")
        arguments |= {"path": identifier, "revision": revision or None}
    if config.name is not None:
        arguments["name"] = config.name
    return _guarded(config, lambda: datasets.load_dataset(**arguments))


def _guarded(config: EvaluationConfig, load: Any) -> Any:
    try:
        return load()
    except EvaluationError:
        raise
    except Exception as error:  # datasets lets errors of the network, the parsers and the file system through
        causes = [error] if error.__cause__ is None else [error, error.__cause__]
        if any(isinstance(cause, _OF_EMPTY) or "corresponds to no data" in str(cause) for cause in causes):
            raise _empty(config) from error
        reason = "; ".join(f"{type(cause).__name__}: {str(cause).strip()}" for cause in causes)
        if any(isinstance(cause, UnicodeDecodeError) or "UTF-8" in str(cause) for cause in causes):
            reason += f"; {_AS_UTF_8}"
        raise EvaluationError(f"dataset {_title(config)} cannot be loaded: {reason}") from error


def _empty(config: EvaluationConfig) -> EvaluationError:
    return EvaluationError(f"dataset {_title(config)} has no rows; give data with at least one")


def _without_blank_lines(opened: Any, name: str) -> Any:
    """A text file's rows without the blank lines that separate paragraphs."""
    kept = opened.filter(lambda row: bool(row["text"].strip()))
    before, after = (
        sum(map(len, rows.values())) if isinstance(rows, datasets.DatasetDict) else len(rows) for rows in (opened, kept)
    )
    if before != after:
        logger.info("%s: %d blank lines are no samples", name, before - after)
    return kept


def _choose_split(splits: datasets.DatasetDict, config: EvaluationConfig) -> datasets.Dataset:
    names = [str(name) for name in splits]
    if config.split is not None:
        if config.split not in splits:
            raise EvaluationError(
                f"dataset {_title(config)} has no split {config.split!r}{suggest(config.split, names)} "
                f"(it has: {', '.join(names)})"
            )
        return splits[config.split]
    if len(names) == 1:
        return splits[names[0]]
    for name in PREFERRED_SPLITS:
        if name in splits:
            logger.info("dataset %s: split %s, as none is asked for", _title(config), name)
            return splits[name]
    raise EvaluationError(f"dataset {_title(config)} has several splits ({', '.join(names)}); set split")


def _title(config: EvaluationConfig) -> str:
    if not isinstance(config.dataset, str | Path):
        return "in memory"
    return str(config.dataset) if config.name is None else f"{config.dataset} ({config.name})"


def choose_column(
    rows: datasets.Dataset,
    wanted: str | None,
    *,
    setting: str,
    usual: Sequence[str],
    feature: type | None,
    config: EvaluationConfig,
) -> str:
    """The name of a column: the one asked for, or else the one that cannot be mistaken.

    Args:
        rows: The dataset.
        wanted: What the configuration says, or None.
        setting: The name of that setting, for messages.
        usual: Names that are taken without being asked for, in order.
        feature: Without those, the only column of this feature type is taken; `datasets.Value` means strings.
        config: For messages.

    Returns:
        The name of a column that exists.

    Raises:
        EvaluationError: There is none, or more than one might be meant.
    """
    columns = rows.column_names
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise EvaluationError(
            f"dataset {_title(config)} has no column {wanted!r} ({setting}){suggest(wanted, columns)} "
            f"(its columns: {', '.join(columns)})"
        )
    for name in usual:
        if name in columns:
            return name
    candidates = [] if feature is None else [name for name in columns if _is_a(rows.features[name], feature)]
    if len(candidates) == 1:
        return candidates[0]
    several = f"several columns might be it: {', '.join(candidates)}; " if candidates else ""
    raise EvaluationError(
        f"{setting} is not set, and dataset {_title(config)} has no column {' or '.join(map(repr, usual))}; {several}"
        f"its columns: {', '.join(columns)}"
    )


def _is_a(column: Any, feature: type) -> bool:
    if feature is datasets.Value:
        return column in (datasets.Value("string"), datasets.Value("large_string"))
    return isinstance(column, feature)


def choose_samples(available: int, config: EvaluationConfig, noun: str) -> np.ndarray:
    """Indices of the samples to take, in an order that depends on the seed alone.

    The order is shuffled even when all are taken, so that a batch is never of one class only, as files often are
    sorted by it.

    Args:
        available: How many there are.
        config: Its `samples` and `seed`.
        noun: What they are, for messages.

    Returns:
        Distinct indices, int64.

    Raises:
        EvaluationError: There are fewer than asked for.
    """
    if config.samples is not None and config.samples > available:
        raise EvaluationError(
            f"samples is {config.samples}, but dataset {_title(config)} has only {available} {noun}; "
            "ask for fewer, or leave samples out to take all"
        )
    return np.random.default_rng(config.seed).permutation(available)[: config.samples]


def class_indices(
    rows: datasets.Dataset, column: str, indices: np.ndarray, model_config: PretrainedConfig, config: EvaluationConfig
) -> np.ndarray:
    """The labels of the chosen rows as the model's class indices.

    Names are matched with the model's `label2id` without regard to case. Numbers are class indices as they are,
    and so are class labels if the model's labels have no names of their own (`LABEL_0`, ...).

    Args:
        rows: The dataset.
        column: Its column of labels.
        indices: The chosen rows.
        model_config: Of the model; its `label2id` and `num_labels`.
        config: Its `label_map`, and for messages.

    Returns:
        One class index per chosen row, int64.

    Raises:
        EvaluationError: A label has no class, with the names on both sides.
    """
    feature = rows.features[column]
    if isinstance(feature, datasets.List | datasets.LargeList):
        raise EvaluationError(f"column {column!r} holds lists; one class per sample is needed")
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    values = rows.select_columns([column]).select(indices).with_format(None)[column][:]
    problems: list[str] = []
    translation: dict[Any, int] = {}
    for value in sorted(set(values), key=lambda value: (value is None, str(value))):
        try:
            translation[value] = _class_index(value, names, model_config, config.label_map)
        except EvaluationError as error:
            problems.append(f"{error} (row {int(indices[values.index(value)])})")
    if len(problems) > MAX_LISTED:
        problems = [*problems[:MAX_LISTED], f"and {len(problems) - MAX_LISTED} more"]
    raise_all(problems, EvaluationError, f"column {column!r} of dataset {_title(config)} does not fit the model")
    return np.array([translation[value] for value in values], dtype=np.int64)


def _class_index(
    value: Any,
    names: Sequence[str] | None,
    model_config: PretrainedConfig,
    label_map: Mapping[str, str | int] | None,
) -> int:
    """The model's class for one label of the dataset, whose class labels have `names`."""
    label = _label_text(value, names)
    meant: str | int = label
    if label_map is not None:
        if label not in label_map:
            raise EvaluationError(f"label {label!r} is not in label_map{suggest(label, label_map)}")
        meant = label_map[label]
    ids = model_config.label2id or {}
    by_folded_name = {str(name).casefold(): int(index) for name, index in ids.items()}
    if str(meant).casefold() in by_folded_name:
        return by_folded_name[str(meant).casefold()]
    nameless = all(name == f"label_{index}" for name, index in by_folded_name.items())
    if isinstance(meant, int) or meant.isdigit():
        index = int(meant)
    elif names is not None and label_map is None and nameless:
        index = int(value)
    else:
        hint = suggest(str(meant), map(str, ids))
        raise EvaluationError(
            f"label {meant!r} is none of the model's{hint} (it has: {', '.join(map(str, ids))}); set label_map"
        )
    if not 0 <= index < len(ids):
        raise EvaluationError(f"label {meant!r} is class {index}, but the model's config has {len(ids)} classes")
    return index


def _label_text(value: Any, names: Sequence[str] | None) -> str:
    """A label as the dataset means it: the name of a class label, the digits of a number."""
    if value is None or value != value:
        raise EvaluationError("a label is missing")
    if names is not None:
        if not 0 <= int(value) < len(names):
            raise EvaluationError(f"label {value} is none of the dataset's own; this split may be without labels")
        return names[int(value)]
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    return str(value).strip()
