"""A diagnosis of checkpoints: which points, on which data, with which measures; what `run` and `diagnose` share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_llfc.checkpoints import tensors_of
from hf_llfc.checkpoints.streamed import StreamedModel
from hf_llfc.diagnostics import ConnectivityReport, ModelReference, Suggestion, diagnose_models
from hf_llfc.diagnostics.batch_norm import has_batch_norm
from hf_llfc.diagnostics.diagnose import Features, Origin
from hf_llfc.diagnostics.measures.measures import check_measures, run_measures, run_merge_measures
from hf_llfc.diagnostics.measures.subject import Subject
from hf_llfc.diagnostics.points import Region, arithmetic, judged_point, line, parents_shares, simplex
from hf_llfc.diagnostics.streaming import IN_ONE_PROCESS, Execution
from hf_llfc.diagnostics.suggest import suggest_weights
from hf_llfc.errors import EvaluationError, refuse_other_count
from hf_llfc.evaluation import EvaluationData
from hf_llfc.foundation.choices import MERGE_MEASURES, PAIR_MEASURES
from hf_llfc.parallel.threads import one_thread_if_small
from hf_llfc.parents.parent import Parent
from hf_llfc.parents.provenance import alignments_summary
from hf_llfc.recipe import DiagnoseSection

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@one_thread_if_small(lambda parents, *_, **__: parents[0].checkpoint.nbytes)
def diagnose_checkpoints(
    parents: Sequence[Parent],
    data: EvaluationData,
    section: DiagnoseSection,
    *,
    base: Parent | None = None,
    weights: Sequence[float] | None = None,
    calibration: EvaluationData | None = None,
    execution: Execution = IN_ONE_PROCESS,
) -> ConnectivityReport:
    """Diagnoses aligned checkpoints: the line between two, the simplex over more, sums of task vectors over a base.

    Args:
        parents: The models, in the coordinates of one reference.
        data: Samples to measure on.
        section: What to measure.
        base: The base model θ₀ of task arithmetic.
        weights: Weights of the merge, one a parent; equal ones where None.
        calibration: Data from which BatchNorm statistics are recomputed at every point.
        execution: Processes and progress.

    Raises:
        EvaluationError: There is nothing to compare, or a measure does not apply.
    """
    if weights is not None:
        refuse_other_count(weights, len(parents), EvaluationError)
    shares = list(weights) if weights is not None else [1 / len(parents)] * len(parents)
    region = region_of(shares, section, arithmetic_over_base=base is not None)
    pairwise, of_merge = (
        [name for name in section.measures if name in names] for names in (PAIR_MEASURES, MERGE_MEASURES)
    )
    if pairwise and region.kind != "line":
        count = len(parents) + (base is not None)
        raise EvaluationError(
            f"{', '.join(pairwise)}: for two models only, and these are {count}; leave these measures out, or "
            "give two models and no base model"
        )
    compared = [*parents, *([base] if base is not None else [])]
    asked: Sequence[float | None] = weights if weights is not None else [None] * len(parents)
    if base is not None:
        asked = [*asked, None]
    references = tuple(
        ModelReference(parent.checkpoint.id, parent.checkpoint.revision, weight)
        for parent, weight in zip(compared, asked, strict=True)
    )
    origin = Origin(references, alignments_summary(compared))
    check_measures(section.measures, data, section.alphas)
    refuse_offloaded(section)
    if section.offload:
        models, combined = _streamed(compared, execution.processes.device if execution.processes is not None else "cpu")
        execution = replace(execution, combined=combined)
    else:
        models = [parent.load() for parent in compared]
    report = diagnose_models(
        models,
        data,
        region=region,
        features=Features(section.layers or None, section.unit),
        batch_norm_data=calibration,
        origin=origin,
        execution=execution,
    )
    measured: dict[str, Any] = run_measures(
        pairwise,
        models[0],
        models[1],
        data,
        alphas=section.alphas,
        layers=section.layers or None,
        execution=execution,
    )
    if of_merge:
        subject = Subject.at(models, region, calibration)
        measured |= run_merge_measures(of_merge, subject, data, layers=section.layers or None, execution=execution)
    suggestion = _suggestion(models, data, section, region, shares, report, execution)
    return replace(report, **measured, suggestion=suggestion)


def refuse_offloaded(section: DiagnoseSection) -> None:
    """Refuses measures of models that are larger than memory.

    Raises:
        EvaluationError: One is asked for.
    """
    if section.offload and (section.measures or section.suggest):
        raise EvaluationError("with offload only loss, metric and LLFC are measured; leave out measures and suggest")


@dataclass(frozen=True)
class Made:
    """A merge that was made, by whatever method.

    Attributes:
        merge: The merge.
        parents: The models that it was made of, in its coordinates.
        base: The base model of task vectors.
        weights: Of the parents; equal where None.
        is_sum: Whether the merge is the sum of the parents, or of their task vectors, by these weights.
    """

    merge: Parent
    parents: Sequence[Parent]
    base: Parent | None = None
    weights: Sequence[float] | None = None
    is_sum: bool = False

    def subject(self, calibration: EvaluationData | None, device: torch.device | None) -> Subject:
        """All models, loaded, with what the merge is compared with."""
        parents = [*self.parents, *([self.base] if self.base is not None else [])]
        models: list[Any] = [parent.load() for parent in parents]
        merge: Any = self.merge.load()
        merge.to(models[0].dtype)
        for model in (*models, merge) if device is not None else ():
            model.to(device)
        weights = list(self.weights) if self.weights is not None else [1 / len(self.parents)] * len(self.parents)
        over_base = self.base is not None
        region = arithmetic(weights) if over_base else simplex(_positive(weights))
        shares = parents_shares(region)
        blend = judged_point(region).weights if self.is_sum else shares
        recomputed = calibration if has_batch_norm(merge) else None
        return Subject(tuple(models), merge, shares, blend, over_base, recomputed)


def _positive(weights: Sequence[float]) -> list[float]:
    """Weights without those below zero; equal ones where none is above."""
    positive = [max(weight, 0.0) for weight in weights]
    return positive if any(positive) else [1.0] * len(weights)


@one_thread_if_small(lambda made, *_, **__: made.merge.checkpoint.nbytes)
def measure_made(
    made: Made,
    data: EvaluationData,
    section: DiagnoseSection,
    *,
    calibration: EvaluationData | None = None,
    execution: Execution = IN_ONE_PROCESS,
) -> dict[str, tuple[Any, ...]]:
    """The measures of a merge that a section asks for, of the merge as it was made.

    Args:
        made: The merge.
        data: Samples to measure on.
        section: What to measure.
        calibration: Data from which BatchNorm statistics were recomputed in the merge.
        execution: Processes and progress.

    Returns:
        Rows by the name of the measure.

    Raises:
        EvaluationError: A measure does not apply.
    """
    names = [name for name in section.measures if name in MERGE_MEASURES]
    if not names:
        return {}
    refuse_offloaded(section)
    device = execution.processes.device if execution.processes is not None else None
    subject, layers = made.subject(calibration, device), section.layers or None
    return run_merge_measures(names, subject, data, layers=layers, execution=execution)


def _streamed(parents: Sequence[Parent], device: torch.device | str) -> tuple[list[PreTrainedModel], StreamedModel]:
    """Models, and one that moves between them, without memory for their weights."""
    first = parents[0].checkpoint
    readers = [parent.read for parent in parents]
    ones = [tuple(float(index == own) for index in range(len(parents))) for own in range(len(parents))]
    models = [StreamedModel(first, readers, weights, device=device).model for weights in ones]
    return models, StreamedModel(first, readers, ones[0], device=device)


def _suggestion(
    models: Sequence[PreTrainedModel],
    data: EvaluationData,
    section: DiagnoseSection,
    region: Region,
    shares: Sequence[float],
    report: ConnectivityReport,
    execution: Execution,
) -> Suggestion | None:
    """Better weights, where asked for; those of layers by the common start of their tensors' names on disk."""
    if section.suggest is None:
        return None
    if region.kind == "arithmetic":
        raise EvaluationError("weights are suggested for models that are averaged, not for sums of task vectors")
    layers = module_layers(models[0], report) if section.suggest == "layers" else ()
    total = sum(shares)
    reference = [share / total for share in shares]
    suggestion = suggest_weights(models, data, reference=reference, layers=layers, execution=execution)
    if not suggestion.layer_weights:
        return suggestion
    owners = tensors_of(models[0], layers)
    names = {layer: [name for name, owner in owners.items() if owner == layer] for layer in layers}
    on_disk = {layer: os.path.commonprefix(names[layer]) for layer in layers}  # noqa: RUF071  names are no paths
    layer_weights = {on_disk.get(layer, layer): weights for layer, weights in suggestion.layer_weights.items()}
    return replace(suggestion, layer_weights=layer_weights)


def module_layers(model: PreTrainedModel, report: ConnectivityReport) -> tuple[str, ...]:
    """Layers of a report that are modules with weights, none inside another."""
    modules = dict(model.named_modules())
    with_weights = [
        name for name in report.layer_names if name in modules and any(True for _ in modules[name].parameters())
    ]
    return tuple(
        name
        for name in with_weights
        if not any(name.startswith(f"{other}.") for other in with_weights if other != name)
    )


@one_thread_if_small(lambda parents, *_, **__: parents[0].checkpoint.nbytes)
def broken_tensors(
    parents: Sequence[Parent],
    data: EvaluationData,
    section: DiagnoseSection,
    *,
    ratio: float,
    weights: Sequence[float],
    calibration: EvaluationData | None = None,
    execution: Execution = IN_ONE_PROCESS,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Finds the blocks in which the features of a merge are not the blend of its parents', and their tensors.

    Args:
        parents: The models, in the coordinates of one reference.
        data: Samples to measure on; labels are not looked at.
        section: Which layers to look at.
        ratio: LLFC over its baseline above which a block is broken.
        weights: Weights of the merge, one a parent.
        calibration: Data from which BatchNorm statistics are recomputed.
        execution: Processes and progress.

    Returns:
        Names of the modules, and of their tensors on disk.
    """
    total = sum(weights)
    shares = [weight / total for weight in weights]
    region = line([shares[0]]) if len(shares) == 2 else simplex(shares)
    models = [parent.load() for parent in parents]

    def progress(doing: str, done: int, total: int) -> None:
        execution.progress("looking for broken layers", done, total)

    report = diagnose_models(
        models,
        data,
        region=region,
        features=Features(section.layers or None),
        batch_norm_data=calibration,
        execution=replace(execution, progress=progress),
    )
    blocks = module_layers(models[0], report)
    ratios = {row.layer: row.ratio for row in report.at(shares[0])}
    broken = tuple(block for block in blocks if (ratios[block] or 0) > ratio)
    return broken, tuple(name for name, owner in tensors_of(models[0], broken).items() if owner is not None)


def region_of(weights: Sequence[float], section: DiagnoseSection, *, arithmetic_over_base: bool) -> Region:
    """Points where merged models are measured.

    Args:
        weights: Weights of the merge, one a parent.
        section: The section with the grid of α.
        arithmetic_over_base: Whether the weights are those of task vectors.

    Raises:
        EvaluationError: There is one model only, and nothing lies between.
    """
    if arithmetic_over_base:
        return arithmetic(weights)
    if len(weights) < 2:
        raise EvaluationError("a diagnosis compares two models or more; give another model, or a base model")
    return line(section.alphas) if len(weights) == 2 else simplex(weights)
