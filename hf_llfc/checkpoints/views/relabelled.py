"""A classifier with its classes in another order: rows of its head are moved as they are read, and its config too."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from hf_llfc.checkpoints.checkpoint import Checkpoint, Relabelling
from hf_llfc.checkpoints.views.reindexed import growing_dimensions
from hf_llfc.checkpoints.views.view import View
from hf_llfc.errors import CheckpointError


def relabelled(checkpoint: Checkpoint, relabelling: Relabelling, first: Checkpoint) -> Checkpoint:
    """Brings the classes of a classifier into the order of another one; nothing is read.

    Args:
        checkpoint: Of a known model class.
        relabelling: The order.
        first: The model whose names the classes get.

    Raises:
        CheckpointError: Which tensors have a row a class cannot be told, or none has.
    """
    dimensions = label_dimensions(checkpoint)
    order = torch.tensor(relabelling.order)

    def make(name: str) -> Tensor:
        return checkpoint.read_unrounded(name).index_select(dimensions[name], order)

    config = deepcopy(checkpoint.config)
    config.id2label, config.label2id = deepcopy((first.config.id2label, first.config.label2id))
    return replace(
        checkpoint,
        settings=checkpoint.settings.with_config(config),
        relabelling=relabelling,
        weights=View(checkpoint.weights, checkpoint.tensors, dimensions, make, {"labels": list(relabelling.order)}),
    )


def label_dimensions(checkpoint: Checkpoint) -> dict[str, int]:
    """Finds the dimension of every tensor that has a row for each class.

    Raises:
        CheckpointError: It cannot be told, or there is none.
    """
    if checkpoint.model_class is None:
        raise CheckpointError(
            f"{checkpoint.label}: the model class {checkpoint.architecture or '(the config names none)'} is not known, "
            "and the order of classes needs it, to tell which tensors have a row a class; register the class, or allow "
            "trust_remote_code"
        )
    config = deepcopy(checkpoint.config)
    config.num_labels = (config.num_labels or 0) + 1
    dimensions = growing_dimensions(checkpoint, config, "class")
    if not dimensions:
        raise CheckpointError(f"{checkpoint.label}: {checkpoint.architecture} has no tensor with a row for each class")
    return dimensions
