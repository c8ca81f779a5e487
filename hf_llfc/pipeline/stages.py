"""The stages of a run, whose results a journal keeps; `hf_llfc.pipeline.flow.run` puts them in a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_llfc.alignment.together import align_all
from hf_llfc.checkpoints import open_checkpoint, state_dict_on_disk
from hf_llfc.checkpoints.writing.output import WEIGHTS_STAGE
from hf_llfc.foundation.choices import MERGE_MEASURES
from hf_llfc.merging import Merge, Merges
from hf_llfc.parents.data import evaluate_parents
from hf_llfc.parents.fitting import refuse_changed
from hf_llfc.parents.parent import Parent
from hf_llfc.parents.proof import Proof, prove_all
from hf_llfc.parents.specs import alignment_spec
from hf_llfc.pipeline.calibrating import calibrated
from hf_llfc.pipeline.evidence import keep_alignments, load_report, save_report, shown_names
from hf_llfc.pipeline.importance import measure_importances
from hf_llfc.pipeline.run_context import RunContext
from hf_llfc.pipeline.sharing import write_shared
from hf_llfc.pipeline.tally import tally
from hf_llfc.pipeline.weighting import Broken, plan_merge
from hf_llfc.pipeline.written import with_measures, with_own_verdict
from hf_llfc.symmetry import Alignment

# What measures is imported where it is called: a merge alone does not wait for datasets and metrics to load.
if TYPE_CHECKING:
    from hf_llfc.diagnostics import ConnectivityReport
    from hf_llfc.publishing.record import AdapterRecord, TensorsRecord


def align_parents(run: RunContext) -> RunContext:
    """The run with one alignment a parent, onto the base of task arithmetic or the reference.

    All processes share the axes.
    """
    recipe, models, processes = run.recipe, run.models, run.processes
    if recipe.align.method == "none":
        return replace(run, alignments=[None] * len(models.parents))

    def find() -> list[Alignment | None]:
        alignments = align_all(
            models.reference,
            models.parents,
            recipe.align,
            workers=processes.workers(),
            device=processes.device,
            progress=run.progress,
        )
        refuse_changed(models.all)
        return alignments

    return keep_alignments(run, find, alignment_spec(models.reference, recipe.align))


def prove_adapters(run: RunContext) -> Sequence[Proof]:
    """Runs every adapter among the models as peft does and folded; an adapter as the result folds none.

    Raises:
        CheckpointError: The two answer differently.
    """
    if not run.recipe.prove or run.recipe.is_adapter or not any(each.adapter for each in run.models.named):
        return []
    return run.on_main(
        lambda run: run.output.journal.stage(
            "prove",
            lambda: prove_all(run.models.named, run.progress),
            save=lambda proofs: ([proof.to_dict() for proof in proofs], ()),
            load=lambda values: [Proof(**value) for value in values],
        )
    )


def find_broken(run: RunContext) -> Broken | None:
    """The layers that a recipe wants kept as they are in one model; None where it does not."""
    recipe = run.recipe
    if recipe.keep_where_broken is None:
        return None
    assert run.data is not None and recipe.diagnose is not None, "the reader of recipes asks for both"
    weights = recipe.weights
    assert weights is not None, "a recipe with one weight a model"
    from hf_llfc.diagnostics.checkpoints import broken_tensors
    from hf_llfc.diagnostics.streaming import Execution

    find = partial(
        broken_tensors,
        run.parents,
        run.data,
        recipe.diagnose,
        ratio=recipe.keep_where_broken.ratio,
        weights=weights,
        calibration=run.calibration,
        execution=Execution(run.processes, run.progress),
    )
    return run.stage(
        "keep",
        lambda: Broken(*find()),
        save=lambda journal, broken: ([broken.blocks, broken.tensors], ()),
        load=lambda journal, broken: Broken(*broken),
    )


def write_merge(run: RunContext, broken: Broken | None = None) -> AdapterRecord | None:
    """Writes the merged checkpoint; all processes share its tensors, but those of a model with BatchNorm.

    Its statistics are computed by the whole model, which the main process holds in memory.

    Returns:
        What was written where the recipe wants an adapter; None of a model.
    """
    if run.recipe.is_adapter:
        from hf_llfc.pipeline.adapter_out import write_adapter_of

        record = write_adapter_of(run)
        run.on_main(finish_weights)
        return record
    if run.on_main(lambda run: run.output.journal.is_complete):
        return None
    merge = plan_merge((run.parents, run.base), run.recipe, broken, measure_importances(run), run.models.sections)
    merge = calibrated(run, merge)
    whole = run.calibration is not None and run.recipe.calibrate is None
    write_shared(run, merge, partial(with_batch_norm, run, merge) if whole else None)
    run.on_main(finish_weights)
    return None


def count_tensors(run: RunContext, broken: Broken | None = None) -> TensorsRecord | None:
    """What becomes of every tensor of the models; None where an adapter is written."""
    if run.recipe.is_adapter:
        return None
    return tally(run.models, plan_merge((run.parents, run.base), run.recipe, broken, sections=run.models.sections))


def finish_weights(run: RunContext) -> None:
    """Notes that the output is a checkpoint from now on: an error in what follows does not cost the weights.

    Raises:
        CheckpointError: A parent has changed meanwhile.
    """
    refuse_changed(run.models.all)
    if WEIGHTS_STAGE not in run.output.journal.stages:
        run.output.journal.finish(WEIGHTS_STAGE)


def with_batch_norm(run: RunContext, merge: Merge | Merges) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors, with statistics of batch normalization as the calibration data give them."""
    from hf_llfc.checkpoints import load_model
    from hf_llfc.diagnostics import recompute_batch_norm

    assert run.calibration is not None
    model = load_model(run.models.parents[0], state_dict=dict(merge.tensors()))
    recompute_batch_norm(model, run.calibration.batches())
    state = state_dict_on_disk(model)
    for name, info in merge.infos.items():
        yield name, state[name].to(info.dtype)


def measure(run: RunContext, broken: Broken | None = None) -> ConnectivityReport | None:
    """The diagnosis, by all processes; None where the recipe asks for none or there is nothing to compare."""
    recipe, parents, base = run.recipe, run.parents, run.base
    section, data = recipe.diagnose, run.data
    if data is None or section is None or (len(parents) == 1 and base is None):
        return None
    from hf_llfc.diagnostics.checkpoints import diagnose_checkpoints
    from hf_llfc.diagnostics.streaming import Execution

    of_pair = replace(section, measures=tuple(name for name in section.measures if name not in MERGE_MEASURES))
    is_sum = recipe.method is None and recipe.calibrate is None and recipe.weights is not None
    if recipe.method is not None and base is not None:
        # What is merged is no sum of task vectors: the models are compared with each other, one with its base.
        parents, base = ([base, *parents] if len(parents) == 1 else parents), None

    def find() -> ConnectivityReport:
        report = diagnose_checkpoints(
            parents,
            data,
            of_pair,
            base=base,
            weights=recipe.weights,
            calibration=run.calibration,
            execution=Execution(run.processes, run.progress),
        )
        report = with_own_verdict(run, report)
        report = with_measures(run, report, is_sum=is_sum and broken is None)
        if broken is not None and recipe.keep_where_broken is not None:
            keeper = run.models.parents[recipe.keep_where_broken.model].id
            kept = {"model": keeper, "layers": list(broken.blocks), "ratio": recipe.keep_where_broken.ratio}
            report = replace(report, data={**report.data, "kept": kept})
        if recipe.calibrate is not None:
            report = replace(report, data={**report.data, "calibrated": recipe.calibrate.method})
        if sections := run.models.sections:
            report = replace(report, data={**report.data, "stack": [[each.where, each.what] for each in sections]})
        return report

    names = shown_names(recipe, run.models)
    return run.stage("diagnose", find, save=partial(save_report, names), load=load_report)


def score(run: RunContext) -> Sequence[dict[str, Any]]:
    """Loss and metrics of every parent and of the merged checkpoint, by all processes; ids alone without labels."""
    data = run.data
    # Of layers from several places the models themselves are beside the result, as they are.
    models = [Parent(each) for each in run.models.originals] or run.parents
    if data is None or not data.labelled:
        return [{"id": parent.checkpoint.id} for parent in models]

    def find() -> list[dict[str, Any]]:
        merged = open_checkpoint(run.staging, trust_remote_code=run.recipe.models[0].trust_remote_code)
        everyone = [*models, Parent(replace(merged, id=str(run.recipe.output_dir)))]
        table = evaluate_parents(everyone, data, processes=run.processes, progress=run.progress)
        table[-1]["is_merge"] = True
        return table

    return run.stage("evaluate", find, save=lambda journal, table: (table, ()), load=lambda journal, table: table)
