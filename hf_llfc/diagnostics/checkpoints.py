"""A diagnosis of checkpoints: which points, on which data, with which measures; what `run` and `diagnose` share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_llfc.checkpoints import tensors_of
from hf_llfc.checkpoints.streamed import StreamedModel
from hf_llfc.diagnostics import ConnectivityReport, ModelReference, Suggestion, diagnose_models
from hf_llfc.diagnostics.diagnose import judged_point
from hf_llfc.diagnostics.features.trial import LOGITS
from hf_llfc.diagnostics.measures.measures import check_measures, run_measures
from hf_llfc.diagnostics.outputs import compare_outputs
from hf_llfc.diagnostics.points import Region, arithmetic, line, simplex
from hf_llfc.diagnostics.suggest import suggest_weights
from hf_llfc.diagnostics.verdict import judge
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation import EvaluationConfig, EvaluationData
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.parallel.threads import one_thread_if_small
from hf_llfc.parents.parent import Parent, open_data
from hf_llfc.parents.provenance import alignment_summary
from hf_llfc.recipe import DiagnoseSection

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from hf_llfc.checkpoints import Checkpoint
    from hf_llfc.parallel.ranks import Ranks


@one_thread_if_small(lambda parents, *_, **__: parents[0].checkpoint.nbytes)
def diagnose_checkpoints(
    parents: Sequence[Parent],
    data: EvaluationData,
    section: DiagnoseSection,
    *,
    base: Parent | None = None,
    weights: Sequence[float] | None = None,
    calibration: EvaluationData | None = None,
    processes: Ranks | None = None,
    progress: Progress = silent,
) -> ConnectivityReport:
    """Diagnoses aligned checkpoints: the line between two, the simplex over more, sums of task vectors over a base.

    Args:
        parents: The models, in the coordinates of one reference.
        data: What to measure on.
        section: What to measure.
        base: θ₀ of task arithmetic.
        weights: Of the merge, one a parent; equal ones where None.
        calibration: Data from which BatchNorm statistics are recomputed at every point.
        processes: Share the samples.
        progress: Shown meanwhile.

    Raises:
        EvaluationError: There is nothing to compare, or a measure does not apply.
    """
    if weights is not None and len(weights) != len(parents):
        raise EvaluationError(f"{len(weights)} weights for {len(parents)} models; give one weight a model")
    shares = list(weights) if weights is not None else [1 / len(parents)] * len(parents)
    region = region_of(shares, section, arithmetic_over_base=base is not None)
    if section.measures and region.kind != "line":
        count = len(parents) + (base is not None)
        raise EvaluationError(
            f"{', '.join(section.measures)}: for two models only, and these are {count}; leave the measures out, or "
            "give two models and no base model"
        )
    compared = [*parents, *([base] if base is not None else [])]
    asked: Sequence[float | None] = weights if weights is not None else [None] * len(parents)
    named = [
        ModelReference(each.checkpoint.id, each.checkpoint.revision, weight)
        for each, weight in zip(parents, asked, strict=True)
    ]
    if base is not None:
        named.append(ModelReference(base.checkpoint.id, base.checkpoint.revision))
    check_measures(section.measures, data, section.alphas)
    if section.offload and (section.measures or section.suggest):
        raise EvaluationError("with offload only loss, metric and LLFC are measured; leave out measures and suggest")
    device = processes.device if processes is not None else "cpu"
    models, combined = _streamed(compared, device) if section.offload else ([each.load() for each in compared], None)
    report = diagnose_models(
        models,
        data,
        combined=combined,
        region=region,
        layers=section.layers or None,
        unit=section.unit,
        processes=processes,
        batch_norm_data=calibration,
        references=[vars(reference) for reference in named],
        alignment=_how_aligned(compared),
        on_batch=partial(progress, "diagnosing"),
    )
    if not data.labelled and region.kind == "line" and combined is None and report.layer_names[-1] == LOGITS:
        # Without labels the predictions say more than the features: the same rule, and limits, as those of `check`.
        outputs = compare_outputs(
            models[0], models[1], data, alpha=judged_point(region).alpha, batch_norm_data=calibration
        )
        aligned = report.alignment.get("method") not in (None, "none")
        report = replace(report, verdict=judge(report.barrier, report.layers, aligned=aligned, outputs=outputs))
    measured = run_measures(
        section.measures,
        models[0],
        models[1],
        data,
        alphas=section.alphas,
        layers=section.layers or None,
        processes=processes,
        on_batch=partial(progress, "measuring"),
    )
    return replace(
        report,
        additivity=measured.get("additivity", ()),
        commutativity=measured.get("commutativity", ()),
        stitching=measured.get("stitching", ()),
        geometry=measured.get("geometry", ()),
        suggestion=_suggestion(models, data, section, region, shares, report, processes, progress),
    )


def _streamed(parents: Sequence[Parent], device: torch.device | str) -> tuple[list[PreTrainedModel], StreamedModel]:
    """The models, and one between them, without memory for their weights."""
    first = parents[0].checkpoint
    readers = [parent.read for parent in parents]
    ones = [tuple(float(place == own) for place in range(len(parents))) for own in range(len(parents))]
    models = [StreamedModel(first, readers, weights, device=device).model for weights in ones]
    return models, StreamedModel(first, readers, ones[0], device=device)


def _suggestion(
    models: Sequence[PreTrainedModel],
    data: EvaluationData,
    section: DiagnoseSection,
    region: Region,
    shares: Sequence[float],
    report: ConnectivityReport,
    processes: Ranks | None,
    progress: Progress,
) -> Suggestion | None:
    """Better weights, where asked for; those of layers by what the names of their tensors on disk begin with."""
    if section.suggest is None:
        return None
    if region.kind == "arithmetic":
        raise EvaluationError("weights are suggested for models that are averaged, not for sums of task vectors")
    layers = module_layers(models[0], report) if section.suggest == "layers" else ()
    total = sum(shares)
    found = suggest_weights(
        models,
        data,
        reference=[share / total for share in shares],
        layers=layers,
        processes=processes,
        on_step=partial(progress, "looking for weights"),
    )
    if not found.layer_weights:
        return found
    owners = tensors_of(models[0], layers)
    names = {layer: [name for name, owner in owners.items() if owner == layer] for layer in layers}
    on_disk = {layer: os.path.commonprefix(names[layer]) for layer in layers}  # noqa: RUF071  names are no paths
    return replace(found, layer_weights={on_disk.get(name, name): each for name, each in found.layer_weights.items()})


def module_layers(model: PreTrainedModel, report: ConnectivityReport) -> tuple[str, ...]:
    """The layers of a report that are modules with weights, none inside another."""
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
    processes: Ranks | None = None,
    progress: Progress = silent,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The blocks in which the features of a merge are not the blend of its parents', and their tensors.

    Args:
        parents: The models, in the coordinates of one reference.
        data: What to measure on; labels are not looked at.
        section: Which layers.
        ratio: LLFC over its baseline above which a block is broken.
        weights: Of the merge, one a parent.
        calibration: Data from which BatchNorm statistics are recomputed.
        processes: Share the samples.
        progress: Shown meanwhile.

    Returns:
        Names of the modules, and of their tensors on disk.
    """
    total = sum(weights)
    shares = [weight / total for weight in weights]
    region = line([shares[0]]) if len(shares) == 2 else simplex(shares)
    models = [parent.load() for parent in parents]
    report = diagnose_models(
        models,
        data,
        region=region,
        layers=section.layers or None,
        processes=processes,
        batch_norm_data=calibration,
        on_batch=partial(progress, "looking for broken layers"),
    )
    blocks = module_layers(models[0], report)
    ratios = {row.layer: row.ratio for row in report.at(shares[0])}
    broken = tuple(block for block in blocks if (ratios[block] or 0) > ratio)
    return broken, tuple(name for name, owner in tensors_of(models[0], broken).items() if owner is not None)


def region_of(weights: Sequence[float], section: DiagnoseSection, *, arithmetic_over_base: bool) -> Region:
    """Where merged models are measured.

    Args:
        weights: Of the merge, one a parent.
        section: With the grid of α.
        arithmetic_over_base: Whether the weights are those of task vectors.

    Raises:
        EvaluationError: There is one model only, and nothing lies between.
    """
    if arithmetic_over_base:
        return arithmetic(weights)
    if len(weights) < 2:
        raise EvaluationError("a diagnosis compares two models or more; give another model, or a base model")
    return line(section.alphas) if len(weights) == 2 else simplex(weights)


def batch_norm_data(
    checkpoint: Checkpoint, section: DiagnoseSection, *, tokenizer_source: Checkpoint | None = None
) -> EvaluationData | None:
    """The samples from which BatchNorm is recomputed: those of the diagnosis, unlabelled, where none are named."""
    if not section.batch_norm.recompute or not any(name.endswith("running_mean") for name in checkpoint.tensors):
        return None
    config: EvaluationConfig = section.batch_norm.data or replace(section.data, labels=False)
    return open_data(config, checkpoint, tokenizer_source=tokenizer_source)


def _how_aligned(parents: Sequence[Parent]) -> Mapping[str, Any] | None:
    summaries = [alignment_summary(parent.alignment) for parent in parents if parent.alignment is not None]
    if len(summaries) > 1:
        return {"method": summaries[0]["method"], "alignments": summaries}
    return summaries[0] if summaries else None
