"""May these checkpoints be merged? Answered from configs, headers and tokenizers, before any weight is read."""

import logging
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from hf_llfc.checkpoints.checkpoint import Checkpoint
from hf_llfc.checkpoints.companions import has_vocabulary

logger = logging.getLogger(__name__)

_EXAMPLES = 5

# Config values that do not change what a model computes from its weights: bookkeeping, training and generation.
# max_position_embeddings is among them because where it matters a shape or the RoPE parameters differ too.
_WITHOUT_EFFECT = re.compile(
    r"_.*|.*token_ids?|.*drop.*|.*initializer.*|init_std|.*loss.*|.*jitter.*|architectures|auto_map"
    r"|chunk_size_feed_forward|dtype|torch_dtype|encoder_stride|finetuning_task|gradient_checkpointing|id2label"
    r"|label2id|max_position_embeddings|model_type|output_.*|pretraining_tp|problem_type|return_dict"
    r"|task_specific_params|transformers_version|transformers_weights|use_cache"
)


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


def tokenizer_problems(models: Sequence[Checkpoint], source: Checkpoint) -> list[str]:
    """Finds what forbids giving models the tokenizer of another.

    Args:
        models: The models that get the tokenizer; at least one.
        source: The model that has the tokenizer.

    Returns:
        The problem of the first model that has one; none if every id stands for the same token in all models.
    """
    vocabulary = _vocabulary(source)
    if vocabulary is None:
        return [f"{source.label}: has no tokenizer that can be read; name a model with one"]
    problems = [problem for model in models for problem in _vocabulary_problems(model, source)]
    largest, token = max((index, token) for token, index in vocabulary.items())
    rows = models[0].config.get_text_config().to_dict().get("vocab_size")
    if not problems and isinstance(rows, int) and largest >= rows:
        problems.append(
            f"{source.label}: its tokenizer gives {token!r} the id {largest}, but the embeddings of {models[0].label} "
            f"have {rows} rows"
        )
    return problems[:1]


def _problems(first: Checkpoint, other: Checkpoint, bodies_only: bool) -> list[str]:
    type_1, type_2 = first.settings.model_type, other.settings.model_type
    if type_1 != type_2:
        return [f"{other.label}: the model type is {type_2}, but that of {first.label} is {type_1}"]
    problems = list(_config_problems(first, other))
    if bodies_only:
        shared = body_tensors(other, first)
        if not shared:
            return [f"{other.label}: shares no tensor of a base model with {first.label}; save both with a task head"]
        problems += _shape_problems(first, other, shared)
    elif first.architecture != other.architecture:
        problems.append(
            f"{other.label}: the architecture is {other.architecture}, but that of {first.label} is"
            f" {first.architecture}; save both with the same model class"
        )
    else:
        problems += _tensor_problems(first, other)
        problems += _label_problems(first, other)
    return [*problems, *_vocabulary_problems(first, other)]


def _config_problems(first: Checkpoint, other: Checkpoint) -> Iterator[str]:
    raw_1, raw_2 = first.settings.raw, other.settings.raw
    if raw_1 is not None and raw_2 is not None and dict(_flat(raw_1)) == dict(_flat(raw_2)):
        return
    values_1, values_2 = dict(_flat(first.config.to_dict())), dict(_flat(other.config.to_dict()))
    for key, value in values_1.items():
        if key in values_2 and values_2[key] != value:
            yield f"{other.label}: {key} in the config is {values_2[key]!r}, but in that of {first.label} {value!r}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if _WITHOUT_EFFECT.fullmatch(str(key)):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _tensor_problems(first: Checkpoint, other: Checkpoint) -> Iterator[str]:
    absent = [name for name in first.tensors if name not in other.tensors]
    if absent:
        yield f"{other.label}: lacks {_listed(absent)}, which {first.label} has"
    extra = [name for name in other.tensors if name not in first.tensors]
    if extra:
        yield f"{other.label}: has {_listed(extra)}, which {first.label} lacks"
    unused_1, unused_2 = set(first.unused), set(other.unused)
    if unused_1 != unused_2:
        names = sorted(unused_1 ^ unused_2)
        yield (
            f"{other.label}: one of the two files holds {_listed(names)}, the other does not, and"
            f" {first.architecture} has no use for that; save that model again with save_pretrained"
        )
    yield from _shape_problems(first, other, other.tensors)
    kinds = [
        f"{name} {other.tensors[name].dtype} against {info.dtype}"
        for name, info in first.tensors.items()
        if name in other.tensors and other.tensors[name].dtype.is_floating_point != info.dtype.is_floating_point
    ]
    if kinds:
        yield f"{other.label}: other kinds of numbers than in {first.label}: {_few(kinds, '; ')}"


def _shape_problems(first: Checkpoint, other: Checkpoint, names: Container[str]) -> Iterator[str]:
    shapes = [
        f"{name} {list(other.tensors[name].shape)} against {list(info.shape)}"
        for name, info in first.tensors.items()
        if name in names and other.tensors[name].shape != info.shape
    ]
    if shapes:
        yield f"{other.label}: other shapes than in {first.label}: {_few(shapes, '; ')}"


def _label_problems(first: Checkpoint, other: Checkpoint) -> Iterator[str]:
    """Names of classes in another order would merge the row of one class with that of another."""
    if "Classification" not in (first.architecture or ""):
        return
    labels_2 = {int(index): str(label) for index, label in _labels(other).items()}
    for key, label in _labels(first).items():
        index, label_1 = int(key), str(label)
        label_2 = labels_2.get(index, label_1)
        generic = f"LABEL_{index}"
        if label_1.casefold() != label_2.casefold() and generic not in (label_1, label_2):
            yield (
                f"{other.label}: class {index} is {label_2!r}, but that of {first.label} is {label_1!r}; bring the"
                " classes into one order"
            )
            return


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
            return Tokenizer.from_file(str(files["tokenizer.json"])).get_vocab(with_added_tokens=True)
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


def _listed(names: Sequence[str]) -> str:
    noun = "tensor" if len(names) == 1 else f"{len(names)} tensors"
    return f"{noun} {_few(names, ', ')}"


def _few(items: Sequence[str], separator: str) -> str:
    more = f"{separator}and {len(items) - _EXAMPLES} more" if len(items) > _EXAMPLES else ""
    return separator.join(items[:_EXAMPLES]) + more
