"""A checkpoint over the vocabulary of several models, its rows brought to the ids of it as they are read.

A row of a token that the model lacks is zero here, so that two models are matched by what both know. What stands in its
place is another model's row, which is taken once all are in the coordinates of one reference: see `lend_rows`.

Shape suffixes: `t` ids of the vocabulary, `m` those that a model lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_llfc.checkpoints.checkpoint import Checkpoint, Reindexing
from hf_llfc.checkpoints.companions import is_of_tokenizer
from hf_llfc.checkpoints.names import Layout
from hf_llfc.checkpoints.views.view import View
from hf_llfc.checkpoints.views.vocabulary import LACKING, Vocabulary, rows_of, text_config
from hf_llfc.errors import CheckpointError


def vocabulary_dimensions(checkpoint: Checkpoint) -> dict[str, int]:
    """Finds the dimension of every tensor that is the vocabulary: the one that grows with `vocab_size` in the config.

    Args:
        checkpoint: Of a known model class.

    Returns:
        Name on disk → dimension.

    Raises:
        CheckpointError: The model class is not known, or a tensor grows otherwise than by one row a token.
    """
    if checkpoint.model_class is None:
        raise CheckpointError(
            f"{checkpoint.label}: the model class {checkpoint.architecture or '(the config names none)'} is not known, "
            "and the union of vocabularies needs it, to tell which tensors have a row a token; register the class, or "
            "allow trust_remote_code"
        )
    return growing_dimensions(checkpoint, with_rows(checkpoint, rows_of(checkpoint) + 1), "token")


def growing_dimensions(checkpoint: Checkpoint, config: PreTrainedConfig, row: str) -> dict[str, int]:
    """Finds the dimension of every tensor that is one longer by another config.

    Args:
        checkpoint: Of a known model class.
        config: Its config with one row more.
        row: What has a row: `token`, `class`.

    Returns:
        Name on disk → dimension.

    Raises:
        CheckpointError: A tensor grows otherwise than by one row.
    """
    assert checkpoint.model_class is not None, "of a known model class"
    larger = Layout(checkpoint.model_class, config).shapes
    dimensions: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        grown = [new - old for new, old in zip(larger[name], info.shape, strict=True)]
        if any(grown):
            if sorted(grown) != [*[0] * (len(grown) - 1), 1]:
                raise CheckpointError(
                    f"{checkpoint.label}: {name} of shape {list(info.shape)} becomes {list(larger[name])} with one "
                    f"{row} more, so its rows are not those of a {row} each and cannot be moved"
                )
            dimensions[name] = grown.index(1)
    return dimensions


def with_rows(checkpoint: Checkpoint, count: int) -> PreTrainedConfig:
    """The config of a checkpoint with another number of tokens.

    Args:
        checkpoint: Whose config it is.
        count: Rows of the embeddings.
    """
    config = deepcopy(checkpoint.config)
    text_config(config, checkpoint.label).vocab_size = count
    return config


def with_tokens_of(config: PreTrainedConfig, source: Checkpoint, label: str) -> PreTrainedConfig:
    """A config whose special tokens are those of another model, as its tokenizer has them.

    Args:
        config: Of a model over the vocabulary of `source`; it is not changed.
        source: Whose tokens they are.
        label: What the model is called.
    """
    config = deepcopy(config)
    ids = {**text_config(source.config, source.label).to_dict(), **source.config.to_dict()}
    for part in {id(each): each for each in (config, text_config(config, label))}.values():
        for key in part.to_dict():
            if key.endswith("_token_id") and key in ids:
                setattr(part, key, ids[key])
    return config


def reindexed(checkpoint: Checkpoint, union: Vocabulary, index: int) -> Checkpoint:
    """Brings a model to the vocabulary of several; nothing is read.

    Args:
        checkpoint: Any checkpoint of a known model class.
        union: The vocabulary, of this model and of others.
        index: The position of the checkpoint among the models of the vocabulary, or behind them of a donor.

    Raises:
        CheckpointError: Which tensors have a row a token cannot be told.
    """
    dimensions = vocabulary_dimensions(checkpoint)
    rows_t = union.rows[index]
    ids = (rows_t != LACKING).nonzero().flatten()

    def make(name: str) -> Tensor:
        tensor, dimension = checkpoint.read_unrounded(name), dimensions[name]
        moved = tensor.new_zeros(resized_shape(tensor.shape, dimension, len(rows_t)))
        return moved.index_copy_(dimension, ids, tensor.index_select(dimension, rows_t[ids]))

    infos = {
        name: replace(info, shape=resized_shape(info.shape, dimensions[name], union.size))
        if name in dimensions
        else info
        for name, info in checkpoint.tensors.items()
    }
    is_moved = not torch.equal(rows_t, torch.arange(rows_of(checkpoint)))
    own = {"companions": checkpoint.companion_checksums()} if checkpoint.revision is None else {}
    settings, source = checkpoint.settings.with_config(with_rows(checkpoint, union.size)), union.source
    if source is not None and source is not checkpoint:
        settings = replace(
            settings.with_config(with_tokens_of(settings.config, source, checkpoint.label)),
            load_generation=lambda _: source.generation_config,
        )
    return replace(
        checkpoint,
        settings=settings,
        tensors=infos,
        # The tokenizer is that of the union, which is nobody's own.
        companion_files=tuple(path for path in checkpoint.companion_files if not is_of_tokenizer(path.name)),
        reindexing=Reindexing(union, index, dimensions),
        weights=View(checkpoint.weights, infos, dimensions if is_moved else (), make, {**own, "union": union.digest}),
    )


def completed(checkpoint: Checkpoint, lenders: Sequence[Checkpoint]) -> Checkpoint:
    """A reindexed model with rows of others in the place of those that it lacks.

    Args:
        checkpoint: The model, in the coordinates of the others.
        lenders: The models of the vocabulary, and its donors.
    """
    reindexing = checkpoint.reindexing
    assert reindexing is not None, "a reindexed model"
    vocabulary = reindexing.union

    def make(name: str) -> Tensor:
        readers = [partial(lender.read_unrounded, name) for lender in lenders]
        return lend_rows(checkpoint.read_unrounded(name), name, reindexing, readers)

    is_lent = len(vocabulary.lacking(reindexing.index)) > 0 or vocabulary.added > 0
    others = tuple(lender.weights for lender in lenders if lender is not checkpoint)
    tag = {"rows": reindexing.index}
    weights = View(checkpoint.weights, checkpoint.tensors, reindexing.dimensions if is_lent else (), make, tag, others)
    return replace(checkpoint, reindexing=None, weights=weights)


def lend_rows(tensor: Tensor, name: str, reindexing: Reindexing, others: Sequence[Callable[[], Tensor]]) -> Tensor:
    """Puts rows of other models in the place of those that a model lacks.

    Which ones, `Vocabulary.lenders` says; where nobody lends one it is zero. Rows that are added to make a multiple are
    the mean of all others.

    Args:
        tensor: Of the model, in the coordinates of the reference.
        name: Of the tensor, on disk.
        reindexing: Of the model.
        others: Reads the same tensor of each model of the vocabulary, and of its donors, in the same coordinates.

    Returns:
        The tensor; in float32 or better where rows were averaged.
    """
    vocabulary = reindexing.union
    ids_m = vocabulary.lacking(reindexing.index)
    dimension = reindexing.dimensions.get(name)
    if dimension is None or not (len(ids_m) or vocabulary.added):
        return tensor
    lent_m = tensor.index_select(dimension, ids_m).double().zero_()
    count_m = torch.zeros(len(ids_m), dtype=torch.long)
    dtype = tensor.dtype
    for read, lends_m in zip(others, vocabulary.lenders(ids_m), strict=True):
        if bool(lends_m.any()):
            other = read()
            dtype = torch.promote_types(dtype, other.dtype)
            lent_m.index_add_(
                dimension, lends_m.nonzero().flatten(), other.index_select(dimension, ids_m[lends_m]).double()
            )
            count_m += lends_m
    if bool((count_m > 1).any()):
        dtype = torch.promote_types(dtype, torch.float32)
    shape = [-1 if index == dimension else 1 for index in range(tensor.dim())]
    lent_m /= count_m.clamp(min=1).view(shape)
    if not vocabulary.added:
        return tensor.to(dtype, copy=True).index_copy_(dimension, ids_m, lent_m.to(dtype))
    dtype = torch.promote_types(dtype, torch.float32)
    filled = tensor.to(dtype, copy=True).index_copy_(dimension, ids_m, lent_m.to(dtype))
    mean = filled.narrow(dimension, 0, vocabulary.count).mean(dim=dimension, keepdim=True, dtype=torch.float64)
    filled.narrow(dimension, vocabulary.count, vocabulary.added).copy_(mean)
    return filled


def resized_shape(shape: Sequence[int], dimension: int, size: int) -> tuple[int, ...]:
    """A shape with another size in one dimension."""
    return tuple(size if index == dimension else length for index, length in enumerate(shape))
