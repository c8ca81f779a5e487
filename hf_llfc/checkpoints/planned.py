"""A checkpoint whose tensors have the names on disk of its model class, made from those in its files."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from hf_llfc.checkpoints.buffers import is_buffer
from hf_llfc.checkpoints.checkpoint import Checkpoint
from hf_llfc.checkpoints.files import CONFIG_FILE, Weights
from hf_llfc.checkpoints.views.view import View
from hf_llfc.errors import CheckpointError

if TYPE_CHECKING:  # what knows model classes takes seconds to load, and is loaded where a class is needed
    from transformers import PreTrainedModel

    from hf_llfc.checkpoints import names

logger = logging.getLogger(__name__)


def planned(
    checkpoint: Checkpoint,
    weights: Weights,
    heading: str | None = None,
    *,
    has_head: bool = True,
    may_lack: Collection[str] = (),
) -> Checkpoint:
    """Gives the tensors of a checkpoint the names on disk of its model class, where that is known.

    Args:
        checkpoint: A checkpoint whose tensors have the names of its files.
        weights: The tensors by those names.
        heading: The first line of the error, if there is one.
        has_head: Whether it must have all tensors of the class; else those of the base model are enough.
        may_lack: Names on disk of tensors that it need not have.

    Raises:
        CheckpointError: The tensors are not those of the model class.
    """
    plan = _plan(checkpoint, weights, heading, has_head, may_lack)
    if plan is None:
        return checkpoint
    making = _Making(checkpoint.label, plan, weights)
    spare = {name: weights.infos[name] for name in plan.spare if not is_buffer(name, weights.infos[name])}
    return replace(
        checkpoint,
        tensors=plan.tensors,
        unused=plan.unused,
        spare=spare,
        buffers=checkpoint.buffers + len(plan.spare) - len(spare),
        lacking=plan.lacking,
        ties=plan.ties,
        weights=View(weights, {**plan.tensors, **spare}, making.names, making.make),
    )


def with_class(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint that was opened as stored under the names of its class; as it is where none is known.

    Raises:
        CheckpointError: The tensors are not those of the class.
    """
    if checkpoint.model_class is not None or checkpoint.architecture is None:
        return checkpoint
    from hf_llfc.checkpoints import names  # loads transformers

    model_class = names.find_model_class(
        checkpoint.architecture,
        checkpoint.config,
        folder=checkpoint.folder,
        trust_remote_code=checkpoint.trust_remote_code,
    )
    stored = View(checkpoint.weights, checkpoint.tensors, (), checkpoint.weights.read)
    return planned(replace(checkpoint, model_class=model_class), stored)


def in_class_of(checkpoint: Checkpoint, model: Checkpoint, *, has_head: bool) -> Checkpoint:
    """A checkpoint in the class of another of its model type.

    Args:
        checkpoint: Of a class of its own, or of none that its config names.
        model: The other.
        has_head: Whether it must have all tensors of that class; else those of the base model are enough, and it is
            given the labels of the other.

    Returns:
        The checkpoint as it is where the class of the other is not known, or both are of one class.

    Raises:
        CheckpointError: It lacks tensors that it must have.
    """
    kinds = [(each.settings.model_type, each.architecture) for each in (checkpoint, model)]
    if kinds[0][0] != kinds[1][0] or kinds[0][1] == kinds[1][1] or model.architecture is None:
        return checkpoint
    from hf_llfc.checkpoints import names  # loads transformers

    model_class = model.model_class or names.find_model_class(
        model.architecture, model.config, folder=model.folder, trust_remote_code=model.trust_remote_code
    )
    if model_class is None:
        return checkpoint
    config = deepcopy(checkpoint.config)
    config.architectures = [model.architecture]
    if not has_head:
        config.id2label, config.label2id = model.config.id2label, model.config.label2id
    opened = replace(
        checkpoint,
        settings=checkpoint.settings.with_config(config),
        architecture=model.architecture,
        model_class=model_class,
        tensors={**checkpoint.tensors, **checkpoint.spare},
    )
    whose = "" if has_head else "the base model of "
    heading = f"{checkpoint.label}: its tensors are not those of {whose}{model.architecture}"
    stored = View(checkpoint.weights, opened.tensors, (), checkpoint.weights.read)
    return planned(opened, stored, heading, has_head=has_head)


def refuse_without_class(checkpoint: Checkpoint) -> None:
    """Refuses a checkpoint that has the tensors of no class that transformers makes of its config.

    Args:
        checkpoint: Its config names no class.

    Raises:
        CheckpointError: It lacks tensors of every class; of one without a head only if its names have no prefix.
    """
    from hf_llfc.checkpoints import names
    from hf_llfc.checkpoints.configs import UnknownConfig

    if isinstance(checkpoint.config, UnknownConfig):
        return
    problems = []
    for model_class in names.classes_of(checkpoint.config):
        prefix = model_class.base_model_prefix + "."
        try:
            is_bare = names.Layout(model_class, checkpoint.config).is_bare
        except Exception:  # a model class may raise anything on values that it does not expect
            continue
        if is_bare and any(name.startswith(prefix) for name in checkpoint.tensors):
            continue  # loaded it would do without the prefix, but what wrote it had a head
        opened = replace(checkpoint, architecture=model_class.__name__, model_class=model_class)
        try:
            planned(opened, View(checkpoint.weights, opened.tensors, (), checkpoint.weights.read), model_class.__name__)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return
    if problems:
        raise CheckpointError(
            f"{checkpoint.label}: config.json names no class, and its tensors are those of none; the nearest is"
            f" {min(problems, key=len)}\nFetch or save the checkpoint again, or name the class that is meant in"
            " config.json (`architectures`)"
        )


def _plan(
    checkpoint: Checkpoint, weights: Weights, heading: str | None, has_head: bool, may_lack: Collection[str]
) -> names.Plan | None:
    """Finds how the tensors on disk come from those in the files; None if the model class is not known here."""
    model_class, where = checkpoint.model_class, checkpoint.label
    if model_class is None:
        return None
    from hf_llfc.checkpoints import names

    try:
        layout = names.Layout(model_class, checkpoint.config)
    except ImportError as error:
        logger.warning("%s: %s cannot be built (%s); its tensors keep their names", where, model_class.__name__, error)
        return None
    except Exception as error:  # a model class may raise anything on values it does not expect
        raise CheckpointError(
            f"{where}/{CONFIG_FILE}: {model_class.__name__} cannot be built from this config: {error}"
        ) from error
    is_asked_for = heading is None
    heading = heading or (
        f"{where}: the tensors are not those of {model_class.__name__} as {CONFIG_FILE} describes it; fetch or save "
        "the checkpoint again"
    )
    body = frozenset() if has_head else layout.names_in_body
    try:
        plan = layout.plan(
            weights.infos, heading, may_lack=lambda name: name in may_lack or (not has_head and name not in body)
        )
    except CheckpointError as error:
        hint = _hint_of_tying(checkpoint, weights) if is_asked_for else ""
        raise CheckpointError(f"{error}{hint}") from None
    if plan.converted:
        logger.info(
            "%s: %d tensors are stored under other names, or in the layout of the memory; they are converted as they"
            " are read, which takes the memory of one group of tensors",
            where,
            len(plan.converted),
        )
    return plan


def _hint_of_tying(checkpoint: Checkpoint, weights: Weights) -> str:
    """What to do where all that a file lacks is an output head; nothing where it lacks more."""
    from hf_llfc.checkpoints import names

    config = deepcopy(checkpoint.config)
    if checkpoint.model_class is None or vars(config).get("tie_word_embeddings") is not False:
        return ""
    config.tie_word_embeddings = True
    try:
        names.Layout(checkpoint.model_class, config).plan(weights.infos, "")
    except Exception:  # a model class may raise anything on values that it does not expect
        return ""
    return (
        "; if its output head is its embedding, say so: `tie_word_embeddings: true` in a recipe "
        "(--tie-word-embeddings), or false, which writes the embedding as the head"
    )


class _Making:
    """Makes the tensors on disk of a plan from those in the files.

    Attributes:
        names: The tensors that are made, and the tied ones whose copies are still to be compared.
    """

    def __init__(self, where: str, plan: names.Plan, stored: Weights) -> None:
        self.names = {*plan.converted, *plan.ties}
        self._where = where
        self._plan = plan
        self._stored = stored
        self._made: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def make(self, name: str) -> torch.Tensor:
        """Makes one tensor; the rest of its group is kept until the next group is made."""
        if name in self._plan.converted:
            with self._lock:
                if name not in self._made:
                    self._made.clear()
                    self._made = self._plan.make(name, self._stored.read_unrounded)
                return self._made.pop(name)
        tensor = self._stored.read(name)
        for copy in self._plan.ties[name]:
            other = self._stored.read(copy)
            if other.dtype != tensor.dtype or not torch.equal(other, tensor):
                raise CheckpointError(
                    f"{self._where}: the config ties {copy} to {name}, but the file holds two different tensors; "
                    "`tie_word_embeddings: false` in a recipe (--no-tie-word-embeddings) keeps both"
                )
        self.names.discard(name)  # compared once
        return tensor


def state_dict_on_disk(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Takes the state of a loaded model under the names that `save_pretrained` writes, tied weights once.

    Args:
        model: A loaded model.

    Returns:
        Name on disk → tensor; most share their memory with the model.

    Raises:
        CheckpointError: If the model has adapters, is not in memory, or ties weights that its class does not declare.
    """
    from hf_llfc.checkpoints import names

    label = model.name_or_path or type(model).__name__
    if model._hf_peft_config_loaded:
        raise CheckpointError(f"{label}: the model carries adapters; merge them with merge_and_unload() first")
    try:
        state = names.disk_state(model)
    except RuntimeError as error:
        raise CheckpointError(f"{label}: the weights cannot be named as on disk: {error}") from error
    absent = [name for name, tensor in state.items() if tensor.device.type == "meta"]
    if absent:
        raise CheckpointError(
            f"{label}: tensor {absent[0]} is not in memory (offloaded, or on the meta device; {len(absent)} tensors);"
            " load the model without a device map, or give the folder it came from"
        )
    return state
