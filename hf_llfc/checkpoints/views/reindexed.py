"""A checkpoint over the union of several vocabularies, its rows brought to the ids of the union as they are read.

A row of a token that the model lacks is zero here, so that two models are matched by what both know. What stands in its
place is another model's row, which is taken once all are in the coordinates of one reference: see `lend_rows`.

Shape suffixes: `t` ids of the union, `m` those that a model lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_llfc.checkpoints.checkpoint import Checkpoint, Reindexing
from hf_llfc.checkpoints.companions import is_of_tokenizer
from hf_llfc.checkpoints.files import FileSpan
from hf_llfc.checkpoints.header import TensorInfo
from hf_llfc.checkpoints.names import Layout
from hf_llfc.checkpoints.views.vocabulary import LACKING, Union, rows_of, text_config
from hf_llfc.errors import CheckpointError


def vocabulary_dimensions(checkpoint: Checkpoint) -> dict[str, int]:
    """Which dimension of which tensors is the vocabulary: what grows with `vocab_size` in the config.

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
    larger = Layout(checkpoint.model_class, with_rows(checkpoint, rows_of(checkpoint) + 1)).shapes
    found: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        grown = [new - old for new, old in zip(larger[name], info.shape, strict=True)]
        if any(grown):
            if sorted(grown) != [*[0] * (len(grown) - 1), 1]:
                raise CheckpointError(
                    f"{checkpoint.label}: {name} of shape {list(info.shape)} becomes {list(larger[name])} with one "
                    "more token, so its rows are not those of tokens and cannot be united"
                )
            found[name] = grown.index(1)
    return found


def with_rows(checkpoint: Checkpoint, count: int) -> PreTrainedConfig:
    """The config of a checkpoint with another number of tokens.

    Args:
        checkpoint: Whose config it is.
        count: Rows of the embeddings.
    """
    config = deepcopy(checkpoint.config)
    text_config(config, checkpoint.label).vocab_size = count
    return config


def reindexed(checkpoint: Checkpoint, union: Union, place: int) -> Checkpoint:
    """The same model over the union of vocabularies; nothing is read.

    Args:
        checkpoint: As it is.
        union: Of its vocabulary with others.
        place: Of the checkpoint among the models of the union.

    Raises:
        CheckpointError: Which tensors have a row a token cannot be told.
    """
    reindexing = Reindexing(union, place, vocabulary_dimensions(checkpoint))
    weights = ReindexedWeights(checkpoint, reindexing)
    return replace(
        checkpoint,
        settings=checkpoint.settings.with_config(with_rows(checkpoint, union.size)),
        tensors=weights.infos,
        # The tokenizer is that of the union, which is nobody's own.
        companion_files=tuple(path for path in checkpoint.companion_files if not is_of_tokenizer(path.name)),
        reindexing=reindexing,
        _weights=weights,
    )


def lend_rows(tensor: Tensor, name: str, reindexing: Reindexing, others: Sequence[Callable[[], Tensor]]) -> Tensor:
    """Puts rows of other models in the place of those that a model lacks.

    The row of the base where there is one that has the token, else the mean of all that have it.

    Args:
        tensor: Of the model, in the coordinates of the reference.
        name: Of the tensor, on disk.
        reindexing: Of the model.
        others: Reads the same tensor of each model of the union, in the same coordinates.

    Returns:
        The tensor; in float32 or better where rows were averaged.
    """
    ids_m = reindexing.union.lacking(reindexing.place)
    dimension = reindexing.dimensions.get(name)
    if dimension is None or not len(ids_m):
        return tensor
    lent_m = tensor.index_select(dimension, ids_m).double().zero_()
    count_m = torch.zeros(len(ids_m), dtype=torch.long)
    dtype = tensor.dtype
    for read, lends_m in zip(others, reindexing.union.lenders(ids_m), strict=True):
        if bool(lends_m.any()):
            other = read()
            dtype = torch.promote_types(dtype, other.dtype)
            lent_m.index_add_(
                dimension, lends_m.nonzero().flatten(), other.index_select(dimension, ids_m[lends_m]).double()
            )
            count_m += lends_m
    if bool((count_m > 1).any()):
        dtype = torch.promote_types(dtype, torch.float32)
    shape = [-1 if place == dimension else 1 for place in range(tensor.dim())]
    lent_m /= count_m.view(shape)
    return tensor.to(dtype, copy=True).index_copy_(dimension, ids_m, lent_m.to(dtype))


class ReindexedWeights:
    """The tensors of a checkpoint, their rows under the ids of a union; zero where it has none."""

    def __init__(self, checkpoint: Checkpoint, reindexing: Reindexing) -> None:
        """Takes what is reindexed; nothing is read.

        Args:
            checkpoint: As it was.
            reindexing: Into what.
        """
        self._checkpoint = checkpoint
        self._union = reindexing.union
        self._rows_t = reindexing.union.rows[reindexing.place]
        self._dimensions = reindexing.dimensions
        self._is_moved = not torch.equal(self._rows_t, torch.arange(rows_of(checkpoint)))
        self.infos: Mapping[str, TensorInfo] = {
            name: replace(info, shape=resized_shape(info.shape, self._dimensions[name], reindexing.union.size))
            if name in self._dimensions
            else info
            for name, info in checkpoint.tensors.items()
        }

    def identity(self) -> Mapping[str, Any]:
        """Of the files that it is made from, with the vocabulary; empty in memory."""
        identity = self._checkpoint.identity()
        files = identity.get("files", {})
        own = {key: identity[key] for key in ("companions",) if key in identity}
        return {**files, **own, "union": self._union.digest} if files else {}

    def refuse_changed(self) -> None:
        """Refuses files that were written to since they were opened."""
        self._checkpoint.refuse_changed()

    def read(self, name: str) -> Tensor:
        """One tensor in the dtype of the checkpoint."""
        return self._reindexed(name, self._checkpoint.read(name))

    def read_unrounded(self, name: str) -> Tensor:
        """One tensor, unrounded where the checkpoint makes it."""
        return self._reindexed(name, self._checkpoint.read_unrounded(name))

    def span(self, name: str) -> FileSpan | None:
        """Where the bytes of a tensor lie whose rows stay as they are."""
        return None if self._moves(name) else self._checkpoint.span(name)

    def _moves(self, name: str) -> bool:
        return name in self._dimensions and self._is_moved

    def _reindexed(self, name: str, tensor: Tensor) -> Tensor:
        if not self._moves(name):
            return tensor
        dimension = self._dimensions[name]
        ids = (self._rows_t != LACKING).nonzero().flatten()
        moved = tensor.new_zeros(resized_shape(tensor.shape, dimension, len(self._rows_t)))
        return moved.index_copy_(dimension, ids, tensor.index_select(dimension, self._rows_t[ids]))


def resized_shape(shape: Sequence[int], dimension: int, size: int) -> tuple[int, ...]:
    """A shape with another size in one dimension."""
    return tuple(size if place == dimension else length for place, length in enumerate(shape))
