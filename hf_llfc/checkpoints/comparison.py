"""May these checkpoints be merged? Answered from configs, headers and tokenizers, before any weight is read."""

import copy
import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from hf_llfc.checkpoints.buffers import is_constant
from hf_llfc.checkpoints.checkpoint import Checkpoint
from hf_llfc.checkpoints.companions import added_beside, has_vocabulary
from hf_llfc.checkpoints.config_differences import config_differences
from hf_llfc.errors import CheckpointError

logger = logging.getLogger(__name__)

_EXAMPLES = 5


def compare(checkpoints: Sequence[Checkpoint], *, bodies_only: bool = False) -> list[str]:
    """Finds everything that forbids merging these checkpoints with each other.

    All are compared with the first: model type, architecture, every config value that changes what the model
    computes, names, shapes and kinds of the tensors, labels, and vocabularies.

    Args:
        checkpoints: Opened checkpoints.
        bodies_only: Whether only what the base model computes must fit, not heads and labels.

    Returns:
        One message per problem; none if the checkpoints fit together.
    """
    problems: list[str] = []
    for other in checkpoints[1:]:
        problems += _problems(checkpoints[0], other, bodies_only)
    return problems


def body_tensors(checkpoint: Checkpoint, other: Checkpoint) -> frozenset[str]:
    """Names of the tensors of the base model, which two checkpoints share whatever their heads.

    A base model that was saved alone has names without its prefix; it is no such pair.
    """
    assert other.model_class is not None
    prefix = f"{other.model_class.base_model_prefix}."
    return frozenset(name for name in other.tensors if name.startswith(prefix) and name in checkpoint.tensors)


def share_vocabulary(models: Sequence[Checkpoint], source: Checkpoint) -> bool:
    """Whether every id stands for the same token in some models and in the tokenizer of another, in as many rows.

    Args:
        models: The models, at least one; of one without a tokenizer the vocabulary is taken to be that of the others.
        source: The model that has the tokenizer.

    Raises:
        CheckpointError: The source has no tokenizer that can be read.
    """
    vocabulary = _vocabulary(source)
    if vocabulary is None:
        raise CheckpointError(
            f"tokenizer_source: {source.label}: has no tokenizer that can be read; name a model with one"
        )
    others = [_vocabulary(model) for model in models if model is not source]
    rows = {_rows_said(model) for model in models}
    largest, token = max((index, token) for token, index in vocabulary.items())
    too_few = [count for count in rows if count is not None and count <= largest]
    if too_few and any(other is None for other in others):
        raise CheckpointError(
            f"tokenizer_source: {source.label} gives {token!r} the id {largest}, but the embeddings of "
            f"{models[0].label} have {too_few[0]} rows, and it has no tokenizer that says whose they are"
        )
    return not too_few and len(rows) == 1 and all(other is None or other == vocabulary for other in others)


def differ_in_rows_alone(models: Sequence[Checkpoint]) -> bool:
    """Whether models have one vocabulary and other numbers of rows for it: some are padded to a multiple, say.

    Args:
        models: At least one; those without a tokenizer are not known to have the vocabulary of the others.
    """
    rows = {_rows_in_file(model) for model in models}
    if len(rows) < 2 or None in rows:
        return False
    first, *others = (_vocabulary(model) for model in models)
    return first is not None and all(other == first for other in others)


def _rows_in_file(checkpoint: Checkpoint) -> int | None:
    """The rows of the embeddings, as far as config.json says them or the config is in memory."""
    raw = checkpoint.settings.raw
    is_said = raw is None or "vocab_size" in {**raw, **(raw.get("text_config") or {})}
    return _rows_said(checkpoint) if is_said else None


def _rows_said(checkpoint: Checkpoint) -> int | None:
    """The rows of the embeddings by the config, read without its class where its file says them."""
    raw = checkpoint.settings.raw or {}
    text = raw.get("text_config")
    for values in (raw, text if isinstance(text, Mapping) else {}):
        if isinstance(values.get("vocab_size"), int):
            return int(values["vocab_size"])
    rows = checkpoint.config.get_text_config().to_dict().get("vocab_size")
    return rows if isinstance(rows, int) else None


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether there are files of a tokenizer beside a checkpoint."""
    return has_vocabulary([path.name for path in checkpoint.companion_files])


def _problems(first: Checkpoint, other: Checkpoint, bodies_only: bool) -> list[str]:
    type_1, type_2 = first.settings.model_type, other.settings.model_type
    if type_1 != type_2:
        return [f"{other.label}: the model type is {type_2}, but that of {first.label} is {type_1}"]
    differences, _ = config_differences(first, other)
    rows = next((pair for key, pair in differences.items() if key.rpartition(".")[2] == "vocab_size"), None)
    torn = {key: pair for key, pair in differences.items() if key.rpartition(".")[2] == "tie_word_embeddings"}
    differences = {key: pair for key, pair in differences.items() if key not in torn}
    problems = [
        f"{other.label}: {key} in the config is {value_2!r}, but in that of {first.label} {value_1!r}"
        for key, (value_1, value_2) in differences.items()
        if (value_1, value_2) != rows
    ]
    if bodies_only:
        shared = body_tensors(other, first)
        if not shared:
            return [f"{other.label}: shares no tensor of a base model with {first.label}; save both with a task head"]
        problems += _shape_problems(first, other, shared, rows)
    elif first.architecture != other.architecture:
        problems.append(
            f"{other.label}: the architecture is {other.architecture}, but that of {first.label} is"
            f" {first.architecture}; save both with the same model class"
        )
    else:
        problems += _shape_problems(first, other, other.tensors, rows) if torn else _tensor_problems(first, other, rows)
        problems += _label_problems(first, other)
    if torn:
        has, lacks = (first, other) if next(iter(torn.values()))[1] else (other, first)
        problems.append(
            f"{other.label}: the output head of {lacks.label} is its embedding, that of {has.label} is its own; "
            f"`tie_word_embeddings: false` in a recipe (--no-tie-word-embeddings) writes a head: of {lacks.label} its "
            "embedding"
        )
    of_vocabulary = list(_vocabulary_problems(first, other))
    if rows is not None:
        problems.append(_rows_problem(first, other, rows, is_one_vocabulary=not of_vocabulary))
    return [*problems, *of_vocabulary]


def _tensor_problems(first: Checkpoint, other: Checkpoint, rows: tuple[Any, Any] | None) -> Iterator[str]:
    absent = _absent(first, other)
    if absent:
        yield f"{other.label}: lacks {listed(absent)}, which {first.label} has"
    extra = _absent(other, first)
    if extra:
        yield f"{other.label}: has {listed(extra)}, which {first.label} lacks"
    yield from _shape_problems(first, other, other.tensors, rows)
    kinds = [
        f"{name} {other.tensors[name].dtype} against {info.dtype}"
        for name, info in first.tensors.items()
        if name in other.tensors and other.tensors[name].dtype.is_floating_point != info.dtype.is_floating_point
    ]
    if kinds:
        yield f"{other.label}: other kinds of numbers than in {first.label}: {_few(kinds, '; ')}"


def _absent(first: Checkpoint, other: Checkpoint) -> list[str]:
    """The tensors of one that the other lacks, though its class does not do without them."""
    return [
        name
        for name in first.tensors
        if name not in other.tensors and name not in other.lacking and not is_constant(name)
    ]


def _shape_problems(
    first: Checkpoint, other: Checkpoint, names: Container[str], rows: tuple[Any, Any] | None
) -> Iterator[str]:
    shapes = [
        f"{name} {list(other.tensors[name].shape)} against {list(info.shape)}"
        for name, info in first.tensors.items()
        if name in names
        and other.tensors[name].shape != info.shape
        and not _differ_in_rows(info.shape, other.tensors[name].shape, rows)
    ]
    if shapes:
        yield f"{other.label}: other shapes than in {first.label}: {_few(shapes, '; ')}"


def _differ_in_rows(shape_1: Sequence[int], shape_2: Sequence[int], rows: tuple[Any, Any] | None) -> bool:
    """Whether two shapes differ in the rows of the embeddings alone, of which something else is said."""
    pairs = set(zip(shape_1, shape_2, strict=False))
    return len(shape_1) == len(shape_2) and {pair for pair in pairs if pair[0] != pair[1]} == {rows}


def _rows_problem(first: Checkpoint, other: Checkpoint, rows: tuple[Any, Any], *, is_one_vocabulary: bool) -> str:
    start = f"{other.label}: vocab_size in the config is {rows[1]}, but in that of {first.label} {rows[0]}"
    given = "" if not is_one_vocabulary else ", once both models have their tokenizer beside them"
    return (
        f"{start}: the embeddings have other numbers of rows; tokenizer_source: union in a recipe (--tokenizer-source "
        f"union) gives each token its row{given}"
    )


def _label_problems(first: Checkpoint, other: Checkpoint) -> Iterator[str]:
    """Names of classes in another order would merge the row of one class with that of another."""
    if _labels_are_defaults(first, other):
        return
    labels_2 = {int(index): str(label) for index, label in _labels(other).items()}
    for key, label in _labels(first).items():
        index, label_1 = int(key), str(label)
        label_2 = labels_2.get(index, label_1)
        is_other = label_1.casefold() != label_2.casefold() and f"LABEL_{index}" not in (label_1, label_2)
        if is_other and has_rows_of_labels(first):
            yield (
                f"{other.label}: class {index} is {label_2!r}, but that of {first.label} is {label_1!r}; bring the"
                " classes into one order: `align: {label_order: names}` in a recipe, `--label-order names` on the"
                " command line"
            )
            return


def has_rows_of_labels(checkpoint: Checkpoint) -> bool:
    """Whether tensors of a checkpoint grow with the number of labels; also where that cannot be told."""
    from hf_llfc.checkpoints.names import Layout, find_model_class

    try:
        model_class = checkpoint.model_class or find_model_class(checkpoint.architecture or "", checkpoint.config)
        if model_class is None:
            return True
        more = copy.deepcopy(checkpoint.config)
        more.num_labels = (more.num_labels or 0) + 1
        return Layout(model_class, checkpoint.config).shapes != Layout(model_class, more).shapes
    except Exception:  # a model class may raise anything on values it does not expect
        return True


def _labels_are_defaults(first: Checkpoint, other: Checkpoint) -> bool:
    """Whether the config.json of neither says of classes what the other does not; transformers need not be loaded."""
    raw_1, raw_2 = first.settings.raw, other.settings.raw
    if raw_1 is None or raw_2 is None:
        return False
    return not any(raw.get("id2label") for raw in (raw_1, raw_2)) and all(
        raw_1.get(key) == raw_2.get(key) for key in ("model_type", "num_labels")
    )


def _labels(checkpoint: Checkpoint) -> Mapping[Any, str]:
    """Index → class: as config.json says, or else as the config class does."""
    said = (checkpoint.settings.raw or {}).get("id2label")
    return said if isinstance(said, Mapping) and said else checkpoint.config.id2label or {}


def _vocabulary_problems(first: Checkpoint, other: Checkpoint) -> Iterator[str]:
    vocabulary_1, vocabulary_2 = _vocabulary(first), _vocabulary(other)
    if vocabulary_1 is None or vocabulary_2 is None or vocabulary_1 == vocabulary_2:
        return
    by_id_1, by_id_2 = _by_id(vocabulary_1), _by_id(vocabulary_2)
    ids: list[int] = sorted({*by_id_1, *by_id_2})
    differing = [index for index in ids if by_id_1.get(index) != by_id_2.get(index)]
    examples = [
        f"id {index} is {_token(by_id_2.get(index))} against {_token(by_id_1.get(index))}"
        for index in differing[:_EXAMPLES]
    ]
    yield (
        f"{other.label}: the vocabulary has {len(vocabulary_2)} tokens and differs from that of {first.label} with"
        f" {len(vocabulary_1)} in {len(differing)}: {', '.join(examples)}; only models"
        " that share a tokenizer can be merged as they are; a recipe or merge with tokenizer_source: union unites the "
        "vocabularies"
    )


def _vocabulary(checkpoint: Checkpoint) -> dict[str, int] | None:
    """Token → id, or None if the checkpoint has no tokenizer that can be read."""
    files = {path.name: path for path in checkpoint.companion_files}
    try:
        if "tokenizer.json" in files:
            known = Tokenizer.from_file(str(files["tokenizer.json"])).get_vocab(with_added_tokens=True)
            return {**known, **added_beside(files, known)}
        if has_vocabulary(files):
            from transformers import AutoTokenizer

            folder = next(iter(files.values())).parent
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
    except Exception as error:  # both libraries raise whatever they meet in a tokenizer's files
        logger.warning(
            "%s: the tokenizer cannot be read, so the vocabularies are not compared: %s", checkpoint.label, error
        )
    return None


def _by_id(vocabulary: Mapping[str, int]) -> dict[int, str]:
    return {index: token for token, index in sorted(vocabulary.items(), reverse=True)}


def _token(token: str | None) -> str:
    return "missing" if token is None else repr(token)


def listed(names: Sequence[str]) -> str:
    """Names of tensors in a message: how many, and the first few."""
    noun = "tensor" if len(names) == 1 else f"{len(names)} tensors"
    return f"{noun} {_few(names, ', ')}"


def _few(items: Sequence[str], separator: str) -> str:
    more = f"{separator}and {len(items) - _EXAMPLES} more" if len(items) > _EXAMPLES else ""
    return separator.join(items[:_EXAMPLES]) + more
