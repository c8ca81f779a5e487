"""The parents of a merge: whether they fit each other, and each as it is read in the coordinates of the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_llfc.checkpoints import Checkpoint, FileSpan
from hf_llfc.checkpoints.buffers import is_constant
from hf_llfc.errors import AlignmentError, CheckpointError, SpecError, raise_all, suggest
from hf_llfc.foundation.choices import HEADS
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.merging import Source
from hf_llfc.merging.tensors import Moved
from hf_llfc.parents.specs import bind, spec_of
from hf_llfc.recipe import AlignSection
from hf_llfc.symmetry import Alignment, Binding

# What opens data and runs models is imported where it is called: a merge alone does not wait for it to load.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_llfc.evaluation import EvaluationConfig, EvaluationData
    from hf_llfc.parallel.ranks import Ranks


@dataclass(frozen=True)
class Parent:
    """A checkpoint in the coordinates of the reference.

    Attributes:
        checkpoint: The original.
        alignment: How it moves; None if it stays as it is.
        head_of: Another checkpoint of the same base model, whose architecture and head this one is given: models of
            different tasks are then compared by what they share. Not together with an alignment.
        lenders: All models of the union of vocabularies, in its order and in the coordinates of the reference, whose
            rows stand in for those that this one lacks; see `hf_llfc.checkpoints.views.reindexed`.
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
        if self._borrows(name):
            return self.read_unrounded(name).to(self.checkpoint.tensors[name].dtype)
        return self._moved(name, self.checkpoint.read)

    def read_unrounded(self, name: str) -> Tensor:
        """Reads one tensor, moved, for a sum that is rounded afterwards; see `Checkpoint.read_unrounded`."""
        assert self.head_of is None, "models under another's head are compared, not merged"
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

    def _borrows(self, name: str) -> bool:
        """Whether rows of one tensor come from other models."""
        reindexing = self.checkpoint.reindexing
        if not self.lenders or reindexing is None or name not in reindexing.dimensions:
            return False
        return len(reindexing.union.lacking(reindexing.place)) > 0

    def _is_of_head(self, name: str) -> bool:
        from hf_llfc.checkpoints import body_tensors

        assert self.head_of is not None
        return name not in body_tensors(self.checkpoint, self.head_of)

    def span(self, name: str) -> FileSpan | None:
        """Where the bytes of one tensor lie in a file; None where it is moved or made as it is read."""
        if self.head_of is not None or self._borrows(name):
            return None
        if self.alignment is not None and self.alignment.moves(name, self.binding):
            return None
        return self.checkpoint.span(name)

    def moved(self, name: str) -> Moved | None:
        """Where the bytes of a vector or matrix lie that is moved by whole rows and columns; None of all others."""
        shape = self.checkpoint.tensors[name].shape
        if self.alignment is None or self.head_of is not None or self._borrows(name) or not 1 <= len(shape) <= 2:
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

    def load(self) -> PreTrainedModel:
        """The model, moved, in evaluation mode.

        Raises:
            CheckpointError: A tensor is not finite.
        """
        from hf_llfc.checkpoints import load_model

        refuse_not_finite(self.checkpoint)
        as_stored = self.alignment is None and self.head_of is None and not self.lenders
        state = None if as_stored else self.state_dict()
        return load_model(self.head_of or self.checkpoint, state_dict=state).eval()


def comparable(checkpoints: Sequence[Checkpoint], heads: str, *, aligned: bool) -> Checkpoint | None:
    """Refuses checkpoints that cannot be compared.

    Args:
        checkpoints: All.
        heads: One of `HEADS`.
        aligned: Whether some of them are to be moved.

    Returns:
        The checkpoint whose head all others are given, or None where each has its own.

    Raises:
        CheckpointError: They do not fit each other, or, with one head for all, their base models do not.
        AlignmentError: Models of different heads were to be aligned.
    """
    if heads not in HEADS:
        raise CheckpointError(f"unknown heads {heads!r}{suggest(heads, HEADS)} (known: {', '.join(HEADS)})")
    if heads == "own":
        refuse_incompatible(checkpoints)
        return None
    if aligned:
        raise AlignmentError("models under one head are not aligned; leave out align, or compare them with their own")
    from hf_llfc.checkpoints import compare

    problems = compare(checkpoints, bodies_only=True)
    raise_all(problems, CheckpointError, "these checkpoints have not the same base model")
    return checkpoints[0]


def refuse_incompatible(checkpoints: Sequence[Checkpoint]) -> None:
    """Raises every reason that forbids merging, at once.

    Raises:
        CheckpointError: The checkpoints differ in architecture, sizes, tensors or vocabulary.
    """
    from hf_llfc.checkpoints import compare

    raise_all(compare(checkpoints), CheckpointError, "these checkpoints cannot be merged")


def refuse_changed(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuses checkpoints whose files were written to while they were read.

    Raises:
        CheckpointError: One was.
    """
    for each in checkpoints:
        each.refuse_changed()


def refuse_not_finite(checkpoint: Checkpoint) -> None:
    """Names the first tensor with NaN or Inf, which a model would spread over everything that it computes.

    Raises:
        CheckpointError: There is one.
    """
    for name, tensor in checkpoint.state_dict():
        if not is_constant(name) and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{name} of {checkpoint.label}: some elements are NaN or infinite; the file is damaged or the training "
                "diverged: use another checkpoint or revision"
            )


def in_groups(checkpoints: Sequence[Checkpoint], options: AlignSection) -> list[Checkpoint]:
    """The checkpoints as they are aligned: in canonical form where more than permutations are asked for.

    Raises:
        SpecError: The architecture knows no more than permutations.
    """
    if options.groups == "permutation" or options.method == "none":
        return list(checkpoints)
    from hf_llfc.adapters.canonical_forms import canonical_form
    from hf_llfc.checkpoints.views.canonical import canonical_checkpoint

    found = []
    for each in checkpoints:
        try:
            form = canonical_form(each.config)
        except SpecError as error:
            raise SpecError(f"{each.label}: {error}") from None
        found.append(canonical_checkpoint(each, form))
    return found


def open_data(
    config: EvaluationConfig, checkpoint: Checkpoint, *, tokenizer_source: Checkpoint | None = None
) -> EvaluationData:
    """Opens evaluation data for a checkpoint, with its own tokenizer or processor or those of another."""
    from hf_llfc.evaluation import load_evaluation_data

    source = tokenizer_source or checkpoint
    # A model in memory has no folder of its own, but the one it was loaded from may still hold its tokenizer.
    beside = min((path.parent for path in source.companion_files), key=lambda path: len(path.parts), default=None)
    return load_evaluation_data(config, source.folder or beside, checkpoint.config)


def evaluate_parents(
    parents: Sequence[Parent],
    data: EvaluationData,
    *,
    processes: Ranks | None = None,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Loss and metrics of models on the same data: one row with `id`, `loss` and `metrics` each."""
    from hf_llfc.evaluation.models import evaluate_model

    rows = []
    for place, parent in enumerate(parents, start=1):
        on_batch = partial(progress, f"evaluating model {place} of {len(parents)}")
        result = evaluate_model(parent.load(), data, processes=processes, on_batch=on_batch)
        rows.append({"id": parent.checkpoint.id, "loss": result.loss, "metrics": dict(result.metrics)})
    return rows
