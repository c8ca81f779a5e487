"""The state of a wrapped model: what wrappers of torch, peft and launchers add to the names of tensors is taken off."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from hf_llfc.checkpoints.files import Weights
from hf_llfc.checkpoints.header import TensorInfo
from hf_llfc.checkpoints.positioned import TensorBytes
from hf_llfc.errors import CheckpointError

logger = logging.getLogger(__name__)

_ANYWHERE = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module|_forward_module)\."
)
"""Modules of torch.compile, FSDP, activation checkpointing and Lightning; no model names one of its own so."""

_IN_FRONT = ("module.", "base_model.model.")
"""What DDP, DeepSpeed and peft put in front of every name."""

_NAME_OF_ADAPTER = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save)\.default(?=\.|$)"
)

_OF_ADAPTERS = re.compile(r"\.(?:lora_[AB]|lora_embedding_[AB]|base_layer|lora_magnitude_vector|modules_to_save)\.")


def unwrapped_name(name: str) -> str:
    """A name without the modules that wrappers put anywhere into it."""
    return _ANYWHERE.sub("", name)


def unwrapped_adapter(weights: Weights, where: str) -> Weights:
    """The tensors of an adapter under the names that peft writes: without wrappers, and without the adapter's own name.

    Args:
        weights: As they are stored.
        where: What messages call them.

    Raises:
        CheckpointError: Two tensors would get one name.
    """
    names = {name: _NAME_OF_ADAPTER.sub(r".\1", unwrapped_name(name)) for name in weights.infos}
    while names and all(name.startswith("module.") for name in names.values()):
        names = {name: inside.removeprefix("module.") for name, inside in names.items()}
    return _renamed(weights, names, where)


def unwrapped(weights: Weights, where: str) -> Weights:
    """Weights under the names of the model inside a wrapper; as they are where nothing wraps it.

    Args:
        weights: As they are stored.
        where: What messages call them.

    Raises:
        CheckpointError: They are those of an adapter that was not merged, or two tensors would get one name.
    """
    names = {name: unwrapped_name(name) for name in weights.infos}
    while prefix := next((each for each in _IN_FRONT if names and all(n.startswith(each) for n in names.values())), ""):
        names = {name: inside.removeprefix(prefix) for name, inside in names.items()}
    example = next((name for name, inside in names.items() if _OF_ADAPTERS.search(f".{inside}")), None)
    if example is not None:
        raise CheckpointError(
            f"{where}: {example} is of an adapter that was not merged into its base; save the model that "
            "merge_and_unload() of peft returns, or name base and adapter as BASE+ADAPTER"
        )
    return _renamed(weights, names, where)


def _renamed(weights: Weights, names: Mapping[str, str], where: str) -> Weights:
    """Weights under other names, which is said."""
    changed = {name: inside for name, inside in names.items() if name != inside}
    if not changed:
        return weights
    if len(set(names.values())) < len(names):
        name = next(name for name, inside in names.items() if name != inside and inside in names)
        raise CheckpointError(f"{where}: holds {name} and {names[name]}, of which only one can be meant; remove one")
    name, inside = next(iter(changed.items()))
    logger.warning(
        "%s: the tensors are those of a wrapped model; what wrappers add to names is taken off (%s is read as %s)",
        where,
        name,
        inside,
    )
    return Renamed(weights, {inside: name for name, inside in names.items()})


@dataclass(frozen=True)
class Renamed:
    """Weights under other names; they follow the protocol of `Weights`.

    Attributes:
        source: The weights as they are stored.
        stored: Name → the name that it is stored under.
    """

    source: Weights
    stored: Mapping[str, str]

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of every tensor."""
        return {name: self.source.infos[stored] for name, stored in self.stored.items()}

    def identity(self) -> Mapping[str, Any]:
        """The identity of the files."""
        return self.source.identity()

    def refuse_changed(self) -> None:
        """Refuses files that were written to since they were opened."""
        self.source.refuse_changed()

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor in its dtype."""
        return self.source.read(self.stored[name])

    def read_unrounded(self, name: str) -> torch.Tensor:
        """Reads one tensor, before it is rounded where it is made."""
        return self.source.read_unrounded(self.stored[name])

    def span(self, name: str) -> TensorBytes | None:
        """Finds where the bytes of a tensor lie."""
        return self.source.span(self.stored[name])
