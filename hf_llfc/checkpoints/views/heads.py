"""A checkpoint whose output head is, or is not, its embedding, whatever its config says."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_llfc.checkpoints.checkpoint import Checkpoint
from hf_llfc.checkpoints.files import Weights
from hf_llfc.checkpoints.planned import planned
from hf_llfc.checkpoints.views.view import View
from hf_llfc.errors import CheckpointError

if TYPE_CHECKING:  # takes long to load
    from transformers import PreTrainedConfig

KEY = "tie_word_embeddings"


def saying(raw: Mapping[str, Any], is_tied: bool) -> dict[str, Any]:
    """The values of config.json with another word on whether the head is the embedding."""
    sections = {
        key: {**value, KEY: is_tied} for key, value in raw.items() if isinstance(value, Mapping) and KEY in value
    }
    return {**raw, **sections, KEY: is_tied}


def with_heads(checkpoint: Checkpoint, weights: Weights, said: bool | None) -> Checkpoint:
    """A checkpoint under a config that says whether its head is its embedding.

    Args:
        checkpoint: As stored, under that config.
        weights: Its tensors by the names of its files.
        said: What its own config says; None where it says nothing.

    Returns:
        The same under the names of its class. A head that is to be written and that the file lacks is its embedding.

    Raises:
        CheckpointError: The class is not known or has no such head, or two different tensors are to be one.
    """
    config = checkpoint.config
    is_tied = bool(vars(config).get(KEY))
    heads, order = _heads(checkpoint, config)
    if is_tied:
        return planned(checkpoint, weights)
    opened = planned(checkpoint, weights, may_lack=frozenset(heads))
    copies = {head: body for head, body in heads.items() if head not in opened.tensors}
    said_of = [f"{head} is a copy of {body}" for head, body in copies.items()]
    if _said(config, said):
        own = [(head, body) for head, body in heads.items() if head not in copies]
        said_of += [f"{head} is its own, though its config ties it to {body}" for head, body in own]
    opened = replace(opened, head=f"{checkpoint.label}: {', '.join(said_of)}" if said_of else None)
    if not copies:
        return opened
    held = {**opened.tensors, **{head: opened.tensors[body] for head, body in copies.items()}}
    infos = {name: held[name] for name in order if name in held}
    source = opened.weights

    def make(name: str) -> Tensor:
        return source.read_unrounded(copies[name])

    view = View(source, {**infos, **opened.spare}, copies, make, spans=lambda name: source.span(copies[name]))
    return replace(
        opened,
        tensors=infos,
        weights=view,
        lacking={name: shape for name, shape in opened.lacking.items() if name not in copies},
    )


def _said(config: PreTrainedConfig, said: bool | None) -> bool:
    """Whether a config ties head and embedding, by its file or by default."""
    default = type(config).__dataclass_fields__.get(KEY)
    return bool(said if said is not None or default is None else default.default)


def _heads(checkpoint: Checkpoint, config: PreTrainedConfig) -> tuple[dict[str, str], tuple[str, ...]]:
    """Name on disk of every head that a config can tie → that of the embedding; and all names where none is tied.

    Raises:
        CheckpointError: The class is not known, or has none.
    """
    from hf_llfc.checkpoints.names import Layout

    if checkpoint.model_class is None:
        raise CheckpointError(
            f"{KEY}: the class of {checkpoint.label} ({checkpoint.architecture or 'its config names none'}) is not "
            "known here; remove the key, register the class, or allow trust_remote_code"
        )
    tied, untied = (Layout(checkpoint.model_class, _told(config, value)) for value in (True, False))
    disk = {group.memory[0]: group.disk[0] for group in untied.groups if len(group.memory) == len(group.disk) == 1}
    found = {
        disk[target]: disk[source]
        for target, source in tied.ties.items()
        if target not in untied.ties and target in disk and source in disk
    }
    if not found:
        raise CheckpointError(
            f"{KEY}: {checkpoint.architecture} of {checkpoint.label} has no output head that could be its embedding; "
            "remove the key"
        )
    return found, tuple(untied.shapes)


def _told(config: PreTrainedConfig, is_tied: bool) -> PreTrainedConfig:
    told = deepcopy(config)
    for section in {id(each): each for each in (told, told.get_text_config())}.values():
        setattr(section, KEY, is_tied)
    return told
