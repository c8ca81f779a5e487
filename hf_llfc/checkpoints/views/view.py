"""Weights seen through others: some tensors are made from those below, and the rest are read as they lie there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_llfc.checkpoints.files import Weights
from hf_llfc.checkpoints.header import TensorInfo
from hf_llfc.checkpoints.positioned import TensorBytes


@dataclass(frozen=True)
class View:
    """Weights of which some are made as they are read; they follow the protocol of `Weights`.

    Attributes:
        source: The weights below, by the same names.
        infos: Dtype and shape of every tensor.
        made: The names that are made.
        make: Makes one of them, not yet rounded to its dtype.
        tag: What tells the view from its source, as JSON values; it is added to the identity.
        beside: Other weights that the made tensors come from.
        spans: Says what reads parts of a made tensor; None where it is made as a whole.
    """

    source: Weights
    infos: Mapping[str, TensorInfo]
    made: Collection[str]
    make: Callable[[str], torch.Tensor]
    tag: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[Weights, ...] = ()
    spans: Callable[[str], TensorBytes | None] = lambda name: None

    def identity(self) -> Mapping[str, Any]:
        """The identity of the files below, with the tag; empty in memory."""
        files = {file: value for weights in (self.source, *self.beside) for file, value in weights.identity().items()}
        return {**files, **self.tag} if files else {}

    def refuse_changed(self) -> None:
        """Refuses files that were written to since they were opened."""
        for weights in (self.source, *self.beside):
            weights.refuse_changed()

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor in its dtype."""
        return self.make(name).to(self.infos[name].dtype) if name in self.made else self.source.read(name)

    def read_unrounded(self, name: str) -> torch.Tensor:
        """Reads one tensor, before it is rounded where it is made."""
        return self.make(name) if name in self.made else self.source.read_unrounded(name)

    def span(self, name: str) -> TensorBytes | None:
        """Finds where the bytes of a tensor lie that is not made, or what makes parts of it."""
        return self.spans(name) if name in self.made else self.source.span(name)
