"""The main flow: parents → alignment → merge → diagnosis → card → Hub."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llfc.checkpoints import OutputFolder
from hf_llfc.checkpoints.writing.journal import storing
from hf_llfc.errors import PublishingError
from hf_llfc.foundation.layout import LLFC_FOLDER, MADE_FROM_FILE
from hf_llfc.foundation.memory import within_memory
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.parallel.processes import Processes
from hf_llfc.parents.opening import open_recipe, stand_ins
from hf_llfc.parents.proof import Proof
from hf_llfc.parents.provenance import alignment_summary
from hf_llfc.pipeline.adapter_out import with_base_of_adapters
from hf_llfc.pipeline.calibrating import calibration_record, release
from hf_llfc.pipeline.closeness import closeness, warnings_of
from hf_llfc.pipeline.evidence import Beside, write_evidence
from hf_llfc.pipeline.fitted import measure_fitted, with_merge_before
from hf_llfc.pipeline.identity import identity_of_run
from hf_llfc.pipeline.resources import bytes_beside, peak_memory, refuse_without_memory, refuse_without_room
from hf_llfc.pipeline.run_context import RunContext, open_run
from hf_llfc.pipeline.stages import (
    align_parents,
    count_tensors,
    find_broken,
    measure,
    prove_adapters,
    score,
    write_merge,
)
from hf_llfc.pipeline.trackers import refuse_missing_trackers, tracking
from hf_llfc.pipeline.weighting import merge_infos
from hf_llfc.publishing import check_access, publish
from hf_llfc.publishing.hub.folder import refuse_too_large_for_the_hub
from hf_llfc.publishing.hub.preflight import parents_in
from hf_llfc.publishing.record import AdapterRecord, CalibrationRecord, TensorsRecord
from hf_llfc.recipe import Recipe, load_recipe
from hf_llfc.recipe.documents import folder_of

if TYPE_CHECKING:
    from hf_llfc.diagnostics import ConnectivityReport
    from hf_llfc.parents.opening import Model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a run made.

    Attributes:
        folder: The output folder.
        report: The diagnosis; None where the recipe asks for none.
        alignments: A summary of each alignment.
        table: Loss and metrics of every parent and of the merged checkpoint on the same data.
        url: Where the merge lies on the Hub; None if it was not pushed.
        warnings: What to know before using the merge, a sentence each.
        is_main_process: Whether this process should report.
        calibration: How the merge was fitted to its parents' features; None where it was not.
        adapter: What was written in place of a model; None where a model was.
        proofs: What the proof of each parent's adapter found.
        tensors: What became of every tensor of the models; None of an adapter.
    """

    folder: Path
    report: ConnectivityReport | None
    alignments: Sequence[Mapping[str, Any]]
    table: Sequence[Mapping[str, Any]]
    url: str | None
    is_main_process: bool
    warnings: Sequence[str] = ()
    calibration: CalibrationRecord | None = None
    adapter: AdapterRecord | None = None
    proofs: Sequence[Proof] = ()
    tensors: TensorsRecord | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "folder": str(self.folder),
            "models": list(self.table),
            "alignments": list(self.alignments),
            "report": self.report.to_dict() if self.report is not None else None,
            "calibration": self.calibration.to_dict() if self.calibration is not None else None,
            "adapter": self.adapter.to_dict() if self.adapter is not None else None,
            "proofs": [proof.to_dict() for proof in self.proofs],
            "tensors": self.tensors.to_dict() if self.tensors is not None else None,
            "url": self.url,
            "warnings": list(self.warnings),
        }


@within_memory()
def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    models: Sequence[Model] | None = None,
    restart: bool = False,
    temporary: bool = False,
    progress: Progress = silent,
) -> Result:
    """Runs a recipe, alone or as one of the processes of a launcher; goes on where the same run was interrupted.

    Args:
        recipe: A recipe, its file, or what its YAML says.
        models: What to take in place of the models that the recipe names, one for each: loaded models, say.
        restart: Whether to discard what an interrupted run into the same folder had finished.
        temporary: Whether the models are gone after the run, so that the card must not say how to repeat it.
        progress: Shown meanwhile, on the main process.

    Returns:
        What was made.

    Raises:
        StorageError: The disk is full or failed; what is finished is kept, and the same run goes on from there.
        LLFCError: Something is wrong with the recipe, the parents or the data; nothing is written then.
    """
    recipe = with_base_of_adapters(recipe if isinstance(recipe, Recipe) else load_recipe(recipe))
    with Processes(recipe.device) as processes:
        shown = progress if processes.is_main else silent
        if recipe.earlier:
            processes.on_main(lambda: refuse_documents(recipe, restart))
            for earlier in recipe.earlier:
                _run_document(earlier, recipe, processes, restart, shown)
        output = OutputFolder(recipe.output_dir, recipe.overwrite, restart)
        processes.on_main(lambda: refuse_early(recipe, output))
        run = open_run(recipe, output, processes, shown, models)
        return _run(replace(run, is_temporary=temporary))


def _run_document(recipe: Recipe, last: Recipe, processes: Processes, restart: bool, progress: Progress) -> None:
    """Makes what other documents refer to, unless it is there as it would be made."""
    assert recipe.document is not None, "a document"
    if recipe.output_dir == folder_of(last.output_dir, recipe.document):
        recipe = replace(recipe, overwrite=True)  # nobody else's place
    output = OutputFolder(recipe.output_dir, recipe.overwrite, restart)
    made = None
    if not restart and processes.on_main(lambda: (output.path / LLFC_FOLDER / MADE_FROM_FILE).is_file()):
        made = open_run(recipe, output, processes, progress)
        if made.on_main(is_made):
            return
    processes.on_main(lambda: refuse_early(recipe, output))
    _run(made or open_run(recipe, output, processes, progress))


def _run(run: RunContext) -> Result:
    recipe, output, processes = run.recipe, run.output, run.processes
    run.on_main(refuse_too_large)
    run.on_main(identify)
    run = warned(run)
    with run.staged() as run, tracking(recipe, is_main=processes.is_main) as trackers:
        proofs = prove_adapters(run)
        run = align_parents(run)
        trackers.alignments(run.alignments)
        broken = find_broken(run)
        adapter = write_merge(run, broken)
        report = measure(run, broken)
        trackers.report(report)
        measured = measure_fitted(run)
        table = with_merge_before(score(run), measured)
        trackers.table(table)
        beside = Beside(calibration_record(run, measured), adapter, proofs, count_tensors(run, broken))
        run.on_main(lambda run: write_evidence(run, report, table, beside))
        run.on_main(release)
        if recipe.document is not None:
            run.on_main(write_made_from)
    summaries = [alignment_summary(alignment) for alignment in run.alignments if alignment is not None]
    url = run.on_main(push) if recipe.publish is not None else None
    return Result(
        output.path,
        report,
        summaries,
        table,
        url,
        processes.is_main,
        run.warnings,
        beside.calibration,
        beside.adapter,
        beside.proofs,
        beside.tensors,
    )


def refuse_early(recipe: Recipe, output: OutputFolder) -> None:
    """Refuses a run before anything is opened: its folder, its target on the Hub, what it is logged to.

    Raises:
        LLFCError: What is wrong.
    """
    output.check()
    if recipe.publish is not None:
        check_target(recipe)
    refuse_missing_trackers(recipe.log_with)


def refuse_documents(recipe: Recipe, restart: bool) -> None:
    """Refuses documents before the first of them is merged.

    Raises:
        LLFCError: What is wrong with one of them.
    """
    refuse_early(recipe, OutputFolder(recipe.output_dir, recipe.overwrite, restart))
    open_recipe(recipe, made=stand_ins(recipe))


def is_made(run: RunContext) -> bool:
    """Whether the output is there, made from what it would be made from now."""
    path = run.output.path / LLFC_FOLDER / MADE_FROM_FILE
    with suppress(OSError):
        return path.read_text(encoding="utf-8") == _digest(run)
    return False


def write_made_from(run: RunContext) -> None:
    """Writes what tells an output from that of another run, so that documents find it there."""
    if not run.output.journal.is_complete:
        with storing(run.staging):
            (run.staging / LLFC_FOLDER / MADE_FROM_FILE).write_text(_digest(run), encoding="utf-8")


def _digest(run: RunContext) -> str:
    identity = identity_of_run(run.recipe, run.models.everything)
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest() + "\n"


def warned(run: RunContext) -> RunContext:
    """The run with what there is to know before using its result, which is said once."""
    return replace(run, warnings=run.on_main(warn))


def warn(run: RunContext) -> list[str]:
    """Says whose classes were moved, which models prepare inputs differently or lie far apart, and what stays behind.

    Returns:
        The warnings, a sentence each.
    """
    warnings = [*run.models.heads, *run.models.relabelled, *warnings_of(run.models, run.carried)]
    if not run.recipe.is_adapter:  # which goes by changes of one base, and need not read it
        warnings += [each.sentence for each in closeness(run.models, run.recipe) if each.is_far]
    for sentence in warnings:
        logger.warning("%s", sentence)
    if run.carried.left:
        logger.info("%s: not carried over: %s", run.models.parents[0].label, ", ".join(run.carried.left))
    return warnings


def identify(run: RunContext) -> None:
    """Tells the output folder what it is made from, so that only the same run goes on there."""
    everything, recipe, fitted_on = run.models.everything, run.recipe, run.fitted_on
    identity = identity_of_run(recipe, everything, [run.data, run.calibration, *fitted_on])
    if recipe.keep_where_broken is not None or run.for_batch_norm is not None:
        run.output.made_from(identity)  # the weights depend on what is measured
    else:
        of_weights = identity_of_run(replace(recipe, diagnose=None, publish=None), everything, [None, None, *fitted_on])
        run.output.made_from(identity, of_weights)


def refuse_too_large(run: RunContext) -> None:
    """Refuses a run for which there is not enough room on the disk, in memory or on the Hub, before it begins.

    Raises:
        CheckpointError: There is not.
        PublishingError: The Hub would not take what is to be pushed.
    """
    recipe, opened = run.recipe, run.models
    infos = {} if recipe.is_adapter else merge_infos(opened.parents[0], recipe)
    if recipe.publish is not None:
        refuse_too_large_for_the_hub(infos, recipe.max_shard_size)
    refuse_without_room(run.output, infos, bytes_beside(recipe, infos))
    refuse_without_memory(peak_memory(recipe, opened.all, infos))


def check_target(recipe: Recipe) -> None:
    """Refuses a run whose result could not be pushed where the recipe says, before it begins.

    Raises:
        PublishingError: What is wrong with the account, the repository or the parents.
    """
    assert recipe.publish is not None
    check_access(recipe.publish, parents_in(recipe))


def push(run: RunContext) -> str:
    """Pushes the output folder as the recipe says.

    Raises:
        PublishingError: It could not be pushed; the folder stays.
    """
    recipe = run.recipe
    assert recipe.publish is not None
    target = recipe.publish
    try:
        return publish(recipe.output_dir, target)
    except PublishingError as error:
        words = ["hf-llfc", "push", str(recipe.output_dir), target.repo_id]
        words += ["--private"] if target.private else []
        words += ["--create-pr"] if target.create_pr else []
        words += ["--revision", target.revision] if target.revision is not None else []
        words += ["--tag", target.tag] if target.tag is not None else []
        raise PublishingError(
            f"{error}\nThe merge is complete in {recipe.output_dir}: `{shlex.join(words)}` tries again"
        ) from error
