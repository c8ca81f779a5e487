"""The main flow: parents → alignment → merge → diagnosis → card → Hub."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from hf_llfc.alignments import align_all
from hf_llfc.checkpoints import (
    Checkpoint,
    OutputFolder,
    ShardFiles,
    TensorInfo,
    open_checkpoint,
    state_dict_on_disk,
    write_checkpoint,
    write_share,
)
from hf_llfc.checkpoints.journal import Journal
from hf_llfc.checkpoints.shards import MAX_SHARD_SIZE, ShardLayout
from hf_llfc.errors import PublishingError, RecipeError
from hf_llfc.evidence import (
    load_alignments,
    load_report,
    save_alignments,
    save_report,
    write_evidence,
    write_method,
)
from hf_llfc.identity import identity_of_run
from hf_llfc.inputs import Models, open_models, open_recipe_data, refuse_replacing_inputs
from hf_llfc.layout import LLFC_FOLDER
from hf_llfc.merging import Merge, Rule, WeightSchedule, merge_streamed, merged_infos
from hf_llfc.merging.streaming import MEMORY
from hf_llfc.processes import Processes
from hf_llfc.progress import Progress, silent
from hf_llfc.publishing import check_access, publish
from hf_llfc.publishing.folder import refuse_too_large_for_the_hub
from hf_llfc.publishing.preflight import parents_in
from hf_llfc.recipe import ModelEntry, Recipe, WeightRule, load_recipe
from hf_llfc.resources import peak_memory, refuse_without_memory, refuse_without_room
from hf_llfc.stages import (
    Parent,
    alignment_spec,
    alignment_summary,
    evaluate_parents,
    refuse_changed,
)
from hf_llfc.symmetry import Alignment
from hf_llfc.trackers import refuse_missing_trackers, tracking

# What measures is imported where it is called: a merge alone does not wait for datasets and metrics to load.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_llfc.diagnostics import ConnectivityReport
    from hf_llfc.evaluation import EvaluationData

Value = TypeVar("Value")


@dataclass(frozen=True)
class Result:
    """What a run made.

    Attributes:
        folder: The output folder.
        report: The diagnosis; None where the recipe asks for none.
        alignments: A summary of each alignment.
        table: Loss and metrics of every parent and of the merged checkpoint on the same data.
        url: Where the merge lies on the Hub; None if it was not pushed.
        is_main_process: Whether this process should report.
    """

    folder: Path
    report: ConnectivityReport | None
    alignments: Sequence[Mapping[str, Any]]
    table: Sequence[Mapping[str, Any]]
    url: str | None
    is_main_process: bool

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "folder": str(self.folder),
            "models": list(self.table),
            "alignments": list(self.alignments),
            "report": self.report.to_dict() if self.report is not None else None,
            "url": self.url,
        }


def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    models: Sequence[str | Path | PreTrainedModel] | None = None,
    restart: bool = False,
    progress: Progress = silent,
) -> Result:
    """Runs a recipe, alone or as one of the processes of a launcher; goes on where the same run was interrupted.

    Args:
        recipe: A recipe, its file, or what its YAML says.
        models: What to take in place of the models that the recipe names, one for each: loaded models, say.
        restart: Whether to discard what an interrupted run into the same folder had finished.
        progress: Shown meanwhile, on the main process.

    Returns:
        What was made.

    Raises:
        StorageError: The disk is full or failed; what is finished is kept, and the same run goes on from there.
        LLFCError: Something is wrong with the recipe, the parents or the data; nothing is written then.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    with Processes() as processes:
        return _run(recipe, models, processes, restart, progress if processes.is_main else silent)


def _run(
    recipe: Recipe,
    models: Sequence[str | Path | PreTrainedModel] | None,
    processes: Processes,
    restart: bool,
    progress: Progress,
) -> Result:
    output = OutputFolder(recipe.output_dir, recipe.overwrite, restart)
    processes.on_main(output.check)
    if recipe.publish is not None:
        processes.on_main(lambda: check_target(recipe))
    processes.on_main(lambda: refuse_missing_trackers(recipe.log_with))
    programs = processes.on_main(lambda: versions_of_programs(recipe))
    opened = processes.main_first(lambda: open_models(recipe, models))
    refuse_replacing_inputs(output, opened.all)
    data, calibration = open_recipe_data(recipe, opened)
    processes.on_main(lambda: refuse_too_large(output, recipe, opened))
    processes.on_main(lambda: output.made_from(identity_of_run(recipe, opened.everything, programs)))

    logged = tracking(
        recipe.log_with,
        logging_dir=recipe.logging_dir,
        name=output.path.name,
        config=recipe.to_dict(),
        is_main=processes.is_main,
    )
    with processes.output(output) as folder, logged as trackers:
        alignments = align_parents(output, processes, opened, recipe, progress)
        trackers.alignments(alignments)
        parents, base = opened.moved(alignments)
        broken = find_broken(output, processes, parents, recipe, data, calibration, progress)
        write_merge(output, processes, folder, parents, base, opened, recipe, calibration, progress, broken)
        report = measure(output, processes, parents, base, opened, recipe, data, calibration, broken, progress)
        trackers.report(report)
        table = score(output, processes, folder, parents, opened, recipe, data, progress)
        trackers.table(table)
        processes.on_main(lambda: write_evidence(output.journal, recipe, opened, alignments, report, table, processes))
    summaries = [alignment_summary(alignment) for alignment in alignments if alignment is not None]
    url = processes.on_main(lambda: push(recipe)) if recipe.publish is not None else None
    return Result(output.path, report, summaries, table, url, processes.is_main)


def versions_of_programs(recipe: Recipe) -> dict[str, str]:
    """Other programs that a run needs, with their versions.

    Raises:
        CheckpointError: One is not there.
    """
    if recipe.mergekit_method is None:
        return {}
    from hf_llfc.mergekit import mergekit_version

    return {"mergekit": mergekit_version()}


def refuse_too_large(output: OutputFolder, recipe: Recipe, opened: Models) -> None:
    """Refuses a run for which there is not enough room on the disk, in memory or on the Hub, before it begins.

    Raises:
        CheckpointError: There is not.
        PublishingError: The Hub would not take what is to be pushed.
    """
    infos = merge_infos(opened.parents[0], recipe)
    if recipe.publish is not None:
        refuse_too_large_for_the_hub(infos, recipe.max_shard_size)
    # mergekit's own output, and a copy of every parent that it cannot read where it lies: of all of them at most.
    copies = 1 + len(opened.all) if recipe.mergekit_method is not None else 0
    refuse_without_room(output, infos, copies=copies)
    refuse_without_memory(peak_memory(recipe, opened.all, infos))


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


@dataclass(frozen=True)
class Broken:
    """Where features are not connected.

    Attributes:
        blocks: Names of the modules.
        tensors: Names on disk of their tensors.
    """

    blocks: Sequence[str]
    tensors: Sequence[str]


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
    weights = shares(recipe, [parent.checkpoint for parent in parents])
    if weights is None:
        raise RecipeError("keep_where_broken: needs one weight a model, and these differ among tensors")
    from hf_llfc.diagnosis import broken_tensors

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
    from hf_llfc.mergekit import describe, merge_by_mergekit

    infos = merge_infos(parents[0].checkpoint, recipe)

    def compute() -> str:
        progress("mergekit", 0, 1)
        merged = merge_by_mergekit(recipe, parents, base, output.work, infos)
        write_method(folder, describe(recipe))
        progress("mergekit", 1, 1)
        return str(merged)

    return Merge.copy(Parent(open_checkpoint(processes.on_main(compute))).source, infos)


def write_shared(
    output: OutputFolder,
    processes: Processes,
    folder: Path,
    merge: Merge,
    first: Checkpoint,
    *,
    companions: Sequence[Path],
    max_shard_size: int = MAX_SHARD_SIZE,
    max_memory: int = MEMORY,
    tensors: Callable[[], Iterator[tuple[str, Tensor]]] | None = None,
    on_bytes: Callable[[int, int], None],
) -> None:
    """Writes a checkpoint whose tensors all processes share, and notes every weight file in the journal.

    Args:
        output: What is being made.
        processes: Each writes its share into files that the main one has made.
        folder: Where, on every process.
        merge: What becomes of every tensor.
        first: Gives the configs.
        companions: Files to copy beside the weights.
        max_shard_size: The size in bytes above which weights are split into several files.
        max_memory: See `merge_streamed`.
        tensors: Makes them on the main process alone, in place of the merge.
        on_bytes: Told how many bytes this process has done and how many it will do.
    """

    def fill(files: ShardFiles, names: Sequence[str]) -> None:
        workers = processes.workers()
        merge_streamed(merge, files, names=names, workers=workers, memory=max_memory, on_bytes=on_bytes)

    def write(fill: Iterable[tuple[str, Tensor]] | Callable[[ShardFiles], None]) -> None:
        write_checkpoint(
            folder,
            merge.infos,
            fill,
            config=first.settings,
            companions=companions,
            max_shard_size=max_shard_size,
            finished=output.journal.shards,
            on_shard=output.journal.finish_shard,
        )

    if tensors is not None:
        processes.on_main(lambda: write(tensors()))
    elif processes.is_main:
        write(lambda files: fill(files, processes.gather(files.names)[0]))
    else:
        names = processes.gather(None)[0]  # the main process has made the files by now
        write_share(folder, merge.infos, partial(fill, names=names), max_shard_size=max_shard_size)
    processes.on_main(lambda: note_shards(output.journal, ShardLayout.of(merge.infos, max_shard_size)))


def note_shards(journal: Journal, layout: ShardLayout) -> None:
    """Notes the weight files that several processes wrote, of which none alone knows when they are complete."""
    for filename, shard in layout.shards.items():
        if filename not in journal.shards:
            journal.finish_shard(filename, shard.checksum(journal.folder / filename))


def with_batch_norm(merge: Merge, first: Checkpoint, calibration: EvaluationData) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors, with statistics of batch normalization as the calibration data give them."""
    from hf_llfc.checkpoints import load_model
    from hf_llfc.diagnostics import recompute_batch_norm

    model = load_model(first, state_dict=dict(merge.tensors()))
    recompute_batch_norm(model, calibration.batches())
    state = state_dict_on_disk(model)
    for name, info in merge.infos.items():
        yield name, state[name].to(info.dtype)


def merge_infos(first: Checkpoint, recipe: Recipe) -> dict[str, TensorInfo]:
    """Dtype and shape of every merged tensor."""
    return merged_infos(first.tensors, getattr(torch, recipe.result_dtype) if recipe.result_dtype else None)


def plan_merge(parents: Sequence[Parent], base: Parent | None, recipe: Recipe, broken: Broken | None = None) -> Merge:
    """What becomes of every tensor; weights that do not fit are refused before anything is read."""
    keeper = recipe.keep_where_broken.model if recipe.keep_where_broken is not None else 0
    return Merge.plan(
        [parent.source for parent in parents],
        merge_infos(parents[0].checkpoint, recipe),
        [schedule(entry, len(parents), parent) for entry, parent in zip(recipe.models, parents, strict=True)],
        normalize=recipe.parameters.normalize,
        base=base.source if base is not None else None,
        scale=recipe.parameters.scale,
        kept=dict.fromkeys(broken.tensors, keeper) if broken is not None else None,
    )


def schedule(entry: ModelEntry, count: int, parent: Parent) -> WeightSchedule:
    """What a recipe says of one model's weights."""
    weight = entry.parameters.weight if entry.parameters is not None else 1 / count
    if isinstance(weight, float):
        return WeightSchedule.constant(weight, entry.model)
    if all(isinstance(value, float) for value in weight):
        return WeightSchedule((Rule(None, tuple(value for value in weight if isinstance(value, float))),), entry.model)
    rules = [
        Rule(rule.filter, rule.value if isinstance(rule.value, tuple) else (rule.value,))
        if isinstance(rule, WeightRule)
        else Rule(None, (rule,))
        for rule in weight
    ]
    return WeightSchedule(tuple(rules), entry.model, parent.axes_of)


def shares(recipe: Recipe, parents: Sequence[Checkpoint]) -> list[float] | None:
    """The weight of every parent in the merge; None where one differs among tensors, or the merge is no sum."""
    if recipe.mergekit_method is not None:
        return None
    schedules = [
        schedule(entry, len(parents), Parent(each)) for entry, each in zip(recipe.models, parents, strict=True)
    ]
    if not all(each.is_constant for each in schedules):
        return None
    weights = [recipe.parameters.scale * each.rules[0].values[0] for each in schedules]
    total = sum(weights) if recipe.parameters.normalize else 1.0
    return [weight / total for weight in weights]


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
    from hf_llfc.diagnosis import diagnose_checkpoints

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
            weights=shares(recipe, opened.parents),
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


def shared_stage(
    output: OutputFolder,
    processes: Processes,
    name: str,
    find: Callable[[], Value],
    *,
    save: Callable[[Journal, Value], tuple[Any, Iterable[Path]]],
    load: Callable[[Journal, Any], Value],
) -> Value:
    """The result of a stage whose work all processes share; see `Journal.stage`."""
    made = [] if processes.on_main(lambda: name in output.journal.stages) else [find()]

    def keep() -> Value:
        journal = output.journal
        return journal.stage(
            name, made.pop, save=lambda result: save(journal, result), load=lambda value: load(journal, value)
        )

    return processes.on_main(keep)


def check_target(recipe: Recipe) -> None:
    """Refuses a run whose result could not be pushed where the recipe says, before it begins.

    Raises:
        PublishingError: What is wrong with the account, the repository or the parents.
    """
    assert recipe.publish is not None
    target = recipe.publish
    check_access(
        target.repo_id,
        private=target.private,
        create_pr=target.create_pr,
        revision=target.revision,
        tag=target.tag,
        parents=parents_in(recipe.to_dict()),
    )


def push(recipe: Recipe) -> str:
    """Pushes the output folder as the recipe says.

    Raises:
        PublishingError: It could not be pushed; the folder stays.
    """
    assert recipe.publish is not None
    target = recipe.publish
    try:
        return publish(
            recipe.output_dir,
            target.repo_id,
            private=target.private,
            create_pr=target.create_pr,
            revision=target.revision,
            tag=target.tag,
        )
    except PublishingError as error:
        words = ["hf-llfc", "push", str(recipe.output_dir), target.repo_id]
        words += ["--private"] if target.private else []
        words += ["--create-pr"] if target.create_pr else []
        words += ["--revision", target.revision] if target.revision is not None else []
        words += ["--tag", target.tag] if target.tag is not None else []
        raise PublishingError(
            f"{error}\nThe merge is complete in {recipe.output_dir}: `{shlex.join(words)}` tries again"
        ) from error
