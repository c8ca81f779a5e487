"""A checkpoint whose tensors come from several others, under names of its own: layers taken from different places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from hf_llfc.checkpoints.checkpoint import Checkpoint
from hf_llfc.checkpoints.header import TensorInfo
from hf_llfc.checkpoints.positioned import TensorBytes


@dataclass(frozen=True)
class Origin:
    """Where one tensor comes from: a checkpoint, and its name there."""

    checkpoint: Checkpoint
    name: str


@dataclass(frozen=True)
class StackedWeights:
    """Tensors of several checkpoints; they follow the protocol of `Weights`.

    Attributes:
        origins: Name → where the tensor comes from.
    """

    origins: Mapping[str, Origin]

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of every tensor."""
        return {name: origin.checkpoint.tensors[origin.name] for name, origin in self.origins.items()}

    @cached_property
    def _checkpoints(self) -> tuple[Checkpoint, ...]:
        return tuple({id(origin.checkpoint): origin.checkpoint for origin in self.origins.values()}.values())

    def identity(self) -> Mapping[str, Any]:
        """The identities of all checkpoints, and which tensor comes from where; empty if one is in memory."""
        files = [each.weights.identity() for each in self._checkpoints]
        if not all(files):
            return {}
        place = {id(each): number for number, each in enumerate(self._checkpoints)}
        return {
            "models": [each.identity() for each in self._checkpoints],
            "tensors": {name: [place[id(each.checkpoint)], each.name] for name, each in self.origins.items()},
        }

    def refuse_changed(self) -> None:
        """Refuses files that were written to since they were opened."""
        for checkpoint in self._checkpoints:
            checkpoint.refuse_changed()

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor in its dtype."""
        origin = self.origins[name]
        return origin.checkpoint.read(origin.name)

    def read_unrounded(self, name: str) -> torch.Tensor:
        """Reads one tensor, before it is rounded where it is made."""
        origin = self.origins[name]
        return origin.checkpoint.read_unrounded(origin.name)

    def span(self, name: str) -> TensorBytes | None:
        """Finds where the bytes of a tensor lie in a file."""
        origin = self.origins[name]
        return origin.checkpoint.span(origin.name)
