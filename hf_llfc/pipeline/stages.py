"""The stages of a run, whose results a journal keeps; `hf_llfc.pipeline.flow.run` puts them in a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_llfc.alignment.together import align_all
from hf_llfc.checkpoints import Checkpoint, OutputFolder, open_checkpoint, state_dict_on_disk
from hf_llfc.errors import RecipeError
from hf_llfc.foundation.layout import LLFC_FOLDER
from hf_llfc.foundation.progress import Progress
from hf_llfc.merging import Merge
from hf_llfc.parallel.processes import Processes
from hf_llfc.parents.opening import Models
from hf_llfc.parents.parent import Parent, evaluate_parents, refuse_changed
from hf_llfc.parents.specs import alignment_spec
from hf_llfc.pipeline.evidence import load_alignments, load_report, save_alignments, save_report, write_method
from hf_llfc.pipeline.sharing import shared_stage, write_shared
from hf_llfc.pipeline.weighting import Broken, merge_infos, plan_merge
from hf_llfc.recipe import Recipe
from hf_llfc.symmetry import Alignment

# What measures is imported where it is called: a merge alone does not wait for datasets and metrics to load.
if TYPE_CHECKING:
    from hf_llfc.diagnostics import ConnectivityReport
    from hf_llfc.evaluation import EvaluationData


def align_parents(
    output: OutputFolder, processes: Processes, opened: Models, recipe: Recipe, progress: Progress
) -> Sequence[Alignment | None]:
    """One alignment a parent, onto the base of task arithmetic or the reference; None where nothing is aligned.

    All processes share the axes.
    """
    if recipe.align.method == "none":
        return [None] * len(opened.parents)
    reference = opened.reference(recipe)

    def find() -> list[Alignment | None]:
        found = align_all(
            reference,
            opened.parents,
            recipe.align,
            workers=processes.workers(),
            device=processes.device,
            progress=progress,
        )
        refuse_changed(opened.all)
        return found

    return shared_stage(
        output,
        processes,
        "align",
        find,
        save=lambda journal, found: save_alignments(found, journal.folder / LLFC_FOLDER),
        load=lambda journal, names: load_alignments(
            names, journal.folder / LLFC_FOLDER, alignment_spec(reference, recipe.align)
        ),
    )


def find_broken(
    output: OutputFolder,
    processes: Processes,
    parents: Sequence[Parent],
    recipe: Recipe,
    data: EvaluationData | None,
    calibration: EvaluationData | None,
    progress: Progress,
) -> Broken | None:
    """The layers that a recipe wants kept as they are in one model; None where it does not.

    Raises:
        RecipeError: The weights differ among tensors already.
    """
    if recipe.keep_where_broken is None:
        return None
    assert data is not None and recipe.diagnose is not None, "the reader of recipes asks for both"
    weights = recipe.weights
    if weights is None:
        raise RecipeError("keep_where_broken: needs one weight a model, and these differ among tensors")
    from hf_llfc.diagnostics.checkpoints import broken_tensors

    find = partial(
        broken_tensors,
        parents,
        data,
        recipe.diagnose,
        ratio=recipe.keep_where_broken.ratio,
        weights=weights,
        calibration=calibration,
        processes=processes,
        progress=progress,
    )
    return shared_stage(
        output,
        processes,
        "keep",
        lambda: Broken(*find()),
        save=lambda journal, found: ([found.blocks, found.tensors], ()),
        load=lambda journal, found: Broken(*found),
    )


def write_merge(
    output: OutputFolder,
    processes: Processes,
    folder: Path,
    parents: Sequence[Parent],
    base: Parent | None,
    opened: Models,
    recipe: Recipe,
    calibration: EvaluationData | None,
    progress: Progress,
    broken: Broken | None = None,
) -> None:
    """Writes the merged checkpoint; all processes share its tensors, but those of a model with BatchNorm.

    Its statistics are computed by the whole model, which the main process holds in memory.
    """
    if processes.on_main(lambda: output.journal.is_complete):
        return
    first = opened.parents[0]
    if recipe.mergekit_method is None:
        merge = plan_merge(parents, base, recipe, broken)
    else:
        merge = merge_elsewhere(output, processes, folder, parents, base, recipe, progress)
    write_shared(
        output,
        processes,
        folder,
        merge,
        first,
        companions=opened.tokenizer_source.companion_files,
        max_shard_size=recipe.max_shard_size,
        max_memory=recipe.max_memory,
        tensors=partial(with_batch_norm, merge, first, calibration) if calibration is not None else None,
        on_bytes=partial(progress, "merging"),
    )
    processes.on_main(lambda: refuse_changed(opened.all))


def merge_elsewhere(
    output: OutputFolder,
    processes: Processes,
    folder: Path,
    parents: Sequence[Parent],
    base: Parent | None,
    recipe: Recipe,
    progress: Progress,
) -> Merge:
    """Lets mergekit merge, on the main process, and copies what it wrote into the result."""
    from hf_llfc.pipeline.mergekit import describe, merge_by_mergekit

    infos = merge_infos(parents[0].checkpoint, recipe)

    def compute() -> str:
        progress("mergekit", 0, 1)
        merged = merge_by_mergekit(recipe, parents, base, output.work, infos)
        write_method(folder, describe(recipe))
        progress("mergekit", 1, 1)
        return str(merged)

    return Merge.copy(Parent(open_checkpoint(processes.on_main(compute))).source, infos)


def with_batch_norm(merge: Merge, first: Checkpoint, calibration: EvaluationData) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors, with statistics of batch normalization as the calibration data give them."""
    from hf_llfc.checkpoints import load_model
    from hf_llfc.diagnostics import recompute_batch_norm

    model = load_model(first, state_dict=dict(merge.tensors()))
    recompute_batch_norm(model, calibration.batches())
    state = state_dict_on_disk(model)
    for name, info in merge.infos.items():
        yield name, state[name].to(info.dtype)


def measure(
    output: OutputFolder,
    processes: Processes,
    parents: Sequence[Parent],
    base: Parent | None,
    opened: Models,
    recipe: Recipe,
    data: EvaluationData | None,
    calibration: EvaluationData | None,
    broken: Broken | None,
    progress: Progress,
) -> ConnectivityReport | None:
    """The diagnosis, by all processes; None where the recipe asks for none or there is nothing to compare."""
    if data is None or recipe.diagnose is None or (len(parents) == 1 and base is None):
        return None
    from hf_llfc.diagnostics.checkpoints import diagnose_checkpoints

    section = recipe.diagnose
    if recipe.mergekit_method is not None and base is not None:
        # What mergekit makes is no sum of task vectors: the models are compared with each other, one with its base.
        parents, base = ([base, *parents] if len(parents) == 1 else parents), None

    def find() -> ConnectivityReport:
        report = diagnose_checkpoints(
            parents,
            data,
            section,
            base=base,
            weights=recipe.weights,
            calibration=calibration,
            processes=processes,
            progress=progress,
        )
        if broken is not None and recipe.keep_where_broken is not None:
            keeper = opened.parents[recipe.keep_where_broken.model].id
            kept = {"model": keeper, "layers": list(broken.blocks), "ratio": recipe.keep_where_broken.ratio}
            report = replace(report, data={**report.data, "kept": kept})
        return report

    return shared_stage(output, processes, "diagnose", find, save=save_report, load=load_report)


def score(
    output: OutputFolder,
    processes: Processes,
    folder: Path,
    parents: Sequence[Parent],
    opened: Models,
    recipe: Recipe,
    data: EvaluationData | None,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Loss and metrics of every parent and of the merged checkpoint, by all processes; ids alone without labels."""
    if data is None or not data.labelled:
        return [{"id": each.id} for each in opened.parents]

    def find() -> list[dict[str, Any]]:
        merged = open_checkpoint(folder, trust_remote_code=recipe.models[0].trust_remote_code)
        everyone = [*parents, Parent(replace(merged, id=str(recipe.output_dir)))]
        table = evaluate_parents(everyone, data, processes=processes, progress=progress)
        table[-1]["is_merge"] = True
        return table

    return shared_stage(
        output, processes, "evaluate", find, save=lambda journal, table: (table, ()), load=lambda journal, table: table
    )
