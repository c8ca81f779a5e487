"""One parent of a merge: a checkpoint as it is read in the coordinates of the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor

from hf_llfc.checkpoints import Checkpoint, TensorBytes
from hf_llfc.checkpoints.source import Moved, Source
from hf_llfc.errors import SpecError
from hf_llfc.parents.fitting import refuse_not_finite
from hf_llfc.parents.specs import bind, spec_of
from hf_llfc.symmetry import Alignment, Binding

# What opens data and runs models is imported where it is called: a merge alone does not wait for it to load.
if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Parent:
    """A checkpoint in the coordinates of the reference.

    Attributes:
        checkpoint: The original.
        alignment: How it moves; None if it stays as it is.
        head_of: Another checkpoint of the same base model, whose architecture and head this one is given: models of
            different tasks are then compared by what they share. Not together with an alignment.
        lenders: All models of the run and behind them the donors of its vocabulary, in its order and in the coordinates
            of the reference, where some lend: rows that one lacks, see `hf_llfc.checkpoints.views.reindexed`, or whole
            tensors.
    """

    checkpoint: Checkpoint
    alignment: Alignment | None = None
    head_of: Checkpoint | None = None
    lenders: Sequence[Parent] = ()

    @cached_property
    def binding(self) -> Binding:
        """The declarations of its tensors."""
        assert self.alignment is not None
        return bind(self.alignment.spec, self.checkpoint)

    def read(self, name: str) -> Tensor:
        """Reads one tensor, moved."""
        if self.head_of is not None and self._is_of_head(name):
            return self.head_of.read(name)
        if (lender := self._lender(name)) is not None:
            return lender.read(name)
        if self._borrows(name):
            return self.read_unrounded(name).to(self.checkpoint.tensors[name].dtype)
        return self._moved(name, self.checkpoint.read)

    def read_unrounded(self, name: str) -> Tensor:
        """Reads one tensor, moved, for a sum that is rounded afterwards; see `Checkpoint.read_unrounded`."""
        assert self.head_of is None, "models under another's head are compared, not merged"
        if (lender := self._lender(name)) is not None:
            return lender.read_unrounded(name)
        moved = self._moved(name, self.checkpoint.read_unrounded)
        if not self._borrows(name):
            return moved
        from hf_llfc.checkpoints.views.reindexed import lend_rows

        assert self.checkpoint.reindexing is not None
        return lend_rows(
            moved, name, self.checkpoint.reindexing, [partial(each.read_unrounded, name) for each in self.lenders]
        )

    def _moved(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        if self.alignment is None:
            return read(name)
        return self.alignment.read_aligned(name, self.binding, read)

    def _lender(self, name: str) -> Parent | None:
        """The model whose tensor stands in for one that this one lacks."""
        borrowed = self.checkpoint.borrowed
        return self.lenders[borrowed[name]] if self.lenders and name in borrowed else None

    def _borrows(self, name: str) -> bool:
        """Whether rows of one tensor come from other models."""
        reindexing = self.checkpoint.reindexing
        if not self.lenders or reindexing is None or name not in reindexing.dimensions:
            return False
        return len(reindexing.union.lacking(reindexing.index)) > 0 or reindexing.union.added > 0

    def _is_of_head(self, name: str) -> bool:
        from hf_llfc.checkpoints import body_tensors

        assert self.head_of is not None
        return name not in body_tensors(self.checkpoint, self.head_of)

    def span(self, name: str) -> TensorBytes | None:
        """Where the bytes of one tensor lie in a file; None where it is moved or made as it is read."""
        if self.head_of is not None or self._borrows(name) or name in self.checkpoint.borrowed:
            return None
        if self.alignment is not None and self.alignment.moves(name, self.binding):
            return None
        return self.checkpoint.span(name)

    def moved(self, name: str) -> Moved | None:
        """Where the bytes of a vector or matrix lie that is moved by whole rows and columns; None of all others."""
        shape = self.checkpoint.tensors[name].shape
        if self.alignment is None or self.head_of is not None or self._borrows(name) or not 1 <= len(shape) <= 2:
            return None
        if name in self.checkpoint.borrowed:
            return None
        places = self.alignment.places(name, self.binding)
        span = self.checkpoint.span(self.alignment.original(name, self.binding)) if places is not None else None
        if places is None or span is None:
            return None
        rows, columns = (None if index is None else index.numpy() for index in [*places, None][:2])
        return Moved(span, (shape[0], prod(shape[1:])), rows, columns)

    @property
    def source(self) -> Source:
        """What a merge reads."""
        return Source(self.checkpoint.label, self.read_unrounded, self.span, self.moved)

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, moved."""
        return {name: self.read(name) for name in (self.head_of or self.checkpoint).tensors}

    def axes_of(self, name: str) -> tuple[str, ...]:
        """The axes that a tensor carries; none where the architecture has no spec."""
        try:
            return tuple(use.axis for use in self._unmoved.tensors[name].spec.axes)
        except SpecError:
            return ()

    @cached_property
    def _unmoved(self) -> Binding:
        return bind(spec_of(self.checkpoint), self.checkpoint)

    def load(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The model, moved, in evaluation mode.

        Args:
            dtype: Of the model; None keeps the one in which most weights are stored.

        Raises:
            CheckpointError: A tensor is not finite.
        """
        from hf_llfc.checkpoints import load_model

        refuse_not_finite(self.checkpoint)
        as_stored = self.alignment is None and self.head_of is None and not self.lenders
        state = None if as_stored else self.state_dict()
        return load_model(self.head_of or self.checkpoint, state_dict=state, dtype=dtype).eval()
