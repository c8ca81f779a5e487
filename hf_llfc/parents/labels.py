"""The classes of classifiers in the order of the first, by their names or by what the models answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from hf_llfc.checkpoints import Checkpoint
from hf_llfc.checkpoints.checkpoint import Relabelling
from hf_llfc.checkpoints.comparison import has_rows_of_labels
from hf_llfc.errors import AlignmentError
from hf_llfc.recipe import AlignSection
from hf_llfc.recipe.data import CLASSIFICATION_TASKS

# What runs models is imported where it is called: a merge alone does not wait for it to load.
if TYPE_CHECKING:
    from hf_llfc.evaluation import EvaluationData
    from hf_llfc.evaluation.class_order import ClassOrder

SAMPLES = 512
"""Samples that classes are matched on where the data name no number: enough for some fifty classes."""

LEAST_AGREEMENT = 0.5
"""Agreement of two models below which classes were matched in vain."""


def in_order_of_labels(models: Sequence[Checkpoint], align: AlignSection, *, given: bool = True) -> list[Checkpoint]:
    """Brings the classes of models into the order of the first.

    Args:
        models: Two or more; one stays as it is.
        align: Says how.
        given: Whether all models are there to be run; others are left as they are where they would have to be.

    Raises:
        AlignmentError: The classes are not the same, or no order of them fits.
        CheckpointError: A model has no classes, or which tensors have a row for each cannot be told.
    """
    if align.label_order == "keep" or len(models) < 2 or (align.label_order == "match" and not given):
        return list(models)
    _refuse_without_classes(models[0])
    from hf_llfc.checkpoints.views.relabelled import relabelled

    first, *others = models
    found = [_by_names(first, each) for each in others] if align.label_order == "names" else _by_answers(models, align)
    return [
        first,
        *(each if new is None else relabelled(each, new, first) for each, new in zip(others, found, strict=True)),
    ]


def base_in_order_of_labels(first: Checkpoint, base: Checkpoint | None, align: AlignSection) -> Checkpoint | None:
    """The base of task arithmetic with its classes in the order of the first model.

    Raises:
        AlignmentError: It has classes, and only what it answers could tell their order.
    """
    if base is None or align.label_order == "keep" or "Classification" not in (base.architecture or ""):
        return base
    if align.label_order == "match":
        raise AlignmentError(
            f"label_order: match: the base {base.label} has classes of its own, whose order is not looked for; use "
            "`label_order: names`, or a base without a classifier"
        )
    return in_order_of_labels([first, base], align)[1]


def _refuse_without_classes(model: Checkpoint) -> None:
    """Refuses a model whose outputs are no classes that could stand in another order.

    Raises:
        AlignmentError: It is a language model, a bare encoder or a regression.
    """
    labels = len(model.config.id2label or {})
    kind = model.architecture or "a model of no class"
    if model.config.problem_type == "regression" or (labels == 1 and "SequenceClassification" in kind):
        reason = "its outputs are numbers, not classes (a regression)"
    elif not has_rows_of_labels(model):
        reason = "it has no classes"
    else:
        return
    raise AlignmentError(
        f"label_order: {model.label} is {kind}, and {reason}, so that there is no order of classes to find; remove "
        "`label_order` (--label-order)"
    )


def _by_names(first: Checkpoint, other: Checkpoint) -> Relabelling | None:
    """The order of the first by the names of the classes in the configs; None where it is the same."""
    names, own = (_names(checkpoint) for checkpoint in (first, other))
    if sorted(names) != sorted(own) or len(set(names)) < len(names):
        raise AlignmentError(
            f"label_order: names: the classes of {other.label} ({', '.join(own)}) are not those of {first.label} "
            f"({', '.join(names)}), each once; give both configs the same names, or match them by what the models "
            "answer (`label_order: match`)"
        )
    order = tuple(map(own.index, names))
    if order == tuple(range(len(order))):
        return None
    return Relabelling(
        order, f"the classes of {other.label} were brought into the order of {first.label} by their names"
    )


def _names(checkpoint: Checkpoint) -> list[str]:
    """The names of the classes in their order, without regard to case."""
    by_index = {int(index): str(name).casefold() for index, name in (checkpoint.config.id2label or {}).items()}
    return [by_index[index] for index in sorted(by_index)]


def _by_answers(models: Sequence[Checkpoint], align: AlignSection) -> list[Relabelling | None]:
    """The order of the first for every other model, by what they answer."""
    assert align.calibration is not None, "a section that matches classes has data"
    if align.calibration.task not in CLASSIFICATION_TASKS:
        raise AlignmentError(
            f"label_order: match: {align.calibration.task} has no classes to match; leave `label_order` out, or give "
            f"the task that the models were trained for ({', '.join(CLASSIFICATION_TASKS)})"
        )
    first, *others = models
    return [_relabelling(first, other, found) for other, found in zip(others, _orders(models, align), strict=True)]


def _relabelling(first: Checkpoint, other: Checkpoint, found: ClassOrder | None) -> Relabelling | None:
    if found is not None and found.restores:
        return Relabelling(
            found.order,
            f"the classes of {other.label} were brought into the order of {first.label}: on {found.samples} samples "
            f"both then choose the same class for {found.matched:.1%} instead of {found.agreement:.1%}",
        )
    if found is None or found.agreement < LEAST_AGREEMENT:
        shares = "" if found is None else f" ({found.agreement:.1%} as they are, {found.matched:.1%} in the best order)"
        raise AlignmentError(
            f"label_order: match: in no order of its classes does {other.label} answer as {first.label} does{shares}; "
            "give more samples, or leave `label_order` out"
        )
    return None


def _orders(models: Sequence[Checkpoint], align: AlignSection) -> list[ClassOrder | None]:
    """How the choices of every other model fit those of the first."""
    from hf_llfc.evaluation.class_order import ChoicePairs
    from hf_llfc.parents.data import open_data

    assert align.calibration is not None
    data = open_data(replace(align.calibration, labels=False, metric=None), models[0])
    if align.calibration.samples is None:
        data = replace(data, sample_ids=data.sample_ids[:SAMPLES])
    sample_ids = torch.cat([numbers for _, numbers in data.batches()])
    first, *others = (_choices(checkpoint, data) for checkpoint in models)
    orders = []
    for other in others:
        pairs = ChoicePairs()
        pairs.add(first, other, sample_ids)
        orders.append(pairs.class_order(len(_names(models[0]))))
    return orders


def _choices(checkpoint: Checkpoint, data: EvaluationData) -> torch.Tensor:
    """The class that a model chooses for every sample."""
    from hf_llfc.evaluation.models import evaluation_mode, forward_logits
    from hf_llfc.parents.parent import Parent

    model, choices = Parent(checkpoint).load(), []
    with evaluation_mode(model):
        for batch, _ in data.batches():
            logits = forward_logits(model, batch)
            if logits is None:
                raise AlignmentError(f"label_order: match: {checkpoint.label} has no logits; leave `label_order` out")
            choices.append(logits.argmax(-1))
    return torch.cat(choices)
