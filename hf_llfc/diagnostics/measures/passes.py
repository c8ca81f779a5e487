"""Measures of features that share their passes: every model and the merge run once a batch for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from hf_llfc.diagnostics.measures.subject import Subject
from hf_llfc.evaluation.models import forward_logits

BLEND, MERGE = "blend", "merge"
"""What a row is of that is no model."""


@dataclass
class Run:
    """One pass of one model over a batch.

    Attributes:
        number: Index of the model in the subject; that after the last is the merge's.
        name: Name of the model, as rows have it.
        model: The model.
        batch: The batch.
        sample_ids: Numbers of its samples.
        logits: What the pass gave; None before it is over.
    """

    number: int
    name: str
    model: PreTrainedModel
    batch: Mapping[str, torch.Tensor]
    sample_ids: torch.Tensor
    logits: torch.Tensor | None = None


class Watcher(Protocol):
    """A measure in progress that watches passes."""

    sums: Any

    def watch(self, run: Run) -> AbstractContextManager[None]:
        """Inside, the pass runs; afterwards what was seen is added to the sums."""

    def rows(self, sums: Any) -> tuple[Any, ...]:
        """Rows of the report, from the sums of all processes."""


def model_names(subject: Subject) -> tuple[str, ...]:
    """Names of a subject's models, as rows have them."""
    count = len(subject.models) - subject.has_base
    return (*(f"model {number}" for number in range(1, count + 1)), *(["base"] * subject.has_base))


@dataclass(frozen=True)
class Passes:
    """The passes that several watchers share.

    Attributes:
        subject: The merge and its models, in evaluation mode.
        watchers: By the name of the measure.
    """

    subject: Subject
    watchers: Mapping[str, Watcher]

    def add(self, batch: Mapping[str, torch.Tensor], sample_ids: torch.Tensor) -> None:
        """Runs every model and the merge on a batch."""
        names = (*model_names(self.subject), MERGE)
        for number, (name, model) in enumerate(zip(names, (*self.subject.models, self.subject.merge), strict=True)):
            run = Run(number, name, model, batch, sample_ids)
            with ExitStack() as stack:
                for watcher in self.watchers.values():
                    stack.enter_context(watcher.watch(run))
                run.logits = forward_logits(model, batch)
