"""The main flow: parents → alignment → merge → diagnosis → card → Hub."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llfc.checkpoints import OutputFolder
from hf_llfc.errors import PublishingError
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.parallel.processes import Processes
from hf_llfc.parents.opening import Models, open_models, open_recipe_data, refuse_replacing_inputs
from hf_llfc.parents.provenance import alignment_summary
from hf_llfc.pipeline.evidence import write_evidence
from hf_llfc.pipeline.identity import identity_of_run
from hf_llfc.pipeline.resources import peak_memory, refuse_without_memory, refuse_without_room
from hf_llfc.pipeline.stages import align_parents, find_broken, measure, score, write_merge
from hf_llfc.pipeline.trackers import refuse_missing_trackers, tracking
from hf_llfc.pipeline.weighting import merge_infos
from hf_llfc.publishing import check_access, publish
from hf_llfc.publishing.hub.folder import refuse_too_large_for_the_hub
from hf_llfc.publishing.hub.preflight import parents_in
from hf_llfc.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_llfc.diagnostics import ConnectivityReport


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
    with Processes(recipe.device) as processes:
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
    from hf_llfc.pipeline.mergekit import mergekit_version

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
