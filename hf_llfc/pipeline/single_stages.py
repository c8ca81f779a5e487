"""Single stages of the main flow that write a folder of their own: a model aligned, a pair diagnosed."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from hf_llfc.alignment.costs import matching_memory
from hf_llfc.alignment.together import align_all
from hf_llfc.checkpoints import OutputFolder
from hf_llfc.checkpoints.positioned import checksum
from hf_llfc.checkpoints.writing.journal import storing
from hf_llfc.diagnostics import ConnectivityReport
from hf_llfc.diagnostics.checkpoints import diagnose_checkpoints
from hf_llfc.diagnostics.streaming import Execution
from hf_llfc.errors import AlignmentError
from hf_llfc.foundation.layout import LLFC_FOLDER, REPORT_FILE
from hf_llfc.foundation.memory import within_memory
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.merging import Merge
from hf_llfc.parallel.processes import Processes
from hf_llfc.parents.data import open_recipe_data
from hf_llfc.parents.fitting import refuse_changed
from hf_llfc.parents.opening import open_recipe, refuse_replacing_inputs
from hf_llfc.parents.probe import probed
from hf_llfc.parents.provenance import refuse_foreign_alignment
from hf_llfc.parents.specs import spec_of
from hf_llfc.pipeline.evidence import keep_alignments, save_alignments
from hf_llfc.pipeline.identity import as_settings, identity_of
from hf_llfc.pipeline.resources import refuse_without_memory, refuse_without_room
from hf_llfc.pipeline.run_context import RunContext, open_run, staging_of
from hf_llfc.pipeline.sharing import write_shared
from hf_llfc.pipeline.stages import align_parents
from hf_llfc.pipeline.trackers import refuse_missing_trackers, tracking
from hf_llfc.publishing import save_plots
from hf_llfc.publishing.page import write_page
from hf_llfc.recipe import Recipe
from hf_llfc.symmetry import Alignment


@within_memory()
def write_aligned(
    recipe: Recipe, *, file: str | Path | None = None, restart: bool = False, progress: Progress = silent
) -> Alignment:
    """Writes a model as an ordinary checkpoint in the coordinates of a reference, with its alignment file.

    Goes on where the same was interrupted.

    Args:
        recipe: Its only model moves onto its base model.
        file: An alignment file to apply instead of matching; it must have been made for these two models.
        restart: Whether to discard what an interrupted run into the same folder had finished.
        progress: Shown meanwhile.

    Returns:
        The alignment.

    Raises:
        LLFCError: The models do not fit each other, an option or the alignment file.
    """
    if file is None and recipe.align.method == "none":
        raise AlignmentError(
            "the method `none` aligns nothing; use weight_matching, activation_matching or learned_matching"
        )
    output = OutputFolder(recipe.output_dir, recipe.overwrite, restart)
    with Processes(recipe.device) as processes:
        processes.on_main(output.check)
        run = open_run(recipe, output, processes, progress if processes.is_main else silent)
        (moving,), reference = run.models.parents, run.models.reference
        given = Alignment.load(file, spec_of(reference)) if file is not None else None

        def begin(run: RunContext) -> None:
            refuse_without_room(output, moving.tensors)
            if given is not None:
                refuse_foreign_alignment(given, reference, moving)
            else:
                refuse_without_memory(matching_memory(reference, recipe.align))
            made_by = checksum(Path(file)) if file is not None else None
            settings = {"align": as_settings(recipe.align), "file": made_by}
            output.made_from(identity_of(settings, [reference, moving], [recipe.align.calibration]))

        run.on_main(begin)
        with run.staged() as run:
            if given is None:
                run = align_parents(run)
            else:
                asked, workers = recipe.align.probe, processes.workers()
                shown = partial(probed, given, moving, asked=asked, workers=workers, progress=run.progress)
                run = keep_alignments(run, lambda: [shown()], spec_of(reference))
            (alignment,) = run.alignments
            assert alignment is not None
            if not run.on_main(lambda run: output.journal.is_complete):
                write_shared(run, Merge.copy(run.parents[0].source, moving.tensors), doing="writing")
                run.on_main(lambda run: refuse_changed(run.models.all))
        return alignment


@within_memory()
def write_diagnosis(
    recipe: Recipe, *, heads: str = "own", keep: bool = True, restart: bool = False, progress: Progress = silent
) -> ConnectivityReport:
    """Diagnoses models, and writes report, plots and the interactive report.

    Args:
        recipe: With a section `diagnose`. The first model is the reference, and on a line has weight α; one model is
            enough with a base model.
        heads: One of `HEADS`.
        keep: Whether a folder is written.
        restart: Whether to discard what an interrupted run into the same folder had finished.
        progress: Shown meanwhile.

    Raises:
        LLFCError: The models do not fit each other or the data.
    """
    section = recipe.diagnose
    assert section is not None, "what to measure"
    output = OutputFolder(recipe.output_dir, recipe.overwrite, restart) if keep else None
    with Processes(recipe.device) as processes:
        progress = progress if processes.is_main else silent
        processes.on_main(lambda: refuse_early(recipe, output))
        opened = processes.main_first(lambda: open_recipe(recipe, heads=heads))
        if output is not None:
            refuse_replacing_inputs(output, opened.all)
        data, calibration = open_recipe_data(recipe, opened)
        assert data is not None
        alignments = align_all(
            opened.reference,
            opened.parents,
            recipe.align,
            workers=processes.workers(),
            device=processes.device,
            progress=progress,
        )
        parents, base = opened.moved(alignments)
        has_weights = any(entry.parameters is not None for entry in recipe.models)
        report = diagnose_checkpoints(
            parents,
            data,
            section,
            base=base,
            weights=recipe.weights if has_weights else None,
            calibration=calibration,
            execution=Execution(processes, progress),
        )
        with tracking(recipe, is_main=processes.is_main) as trackers:
            trackers.alignments(alignments)
            trackers.report(report)

        def save(folder: Path) -> None:
            with storing(folder):
                (folder / LLFC_FOLDER).mkdir()
                report.save(folder / LLFC_FOLDER / REPORT_FILE)
                save_plots(report, folder / LLFC_FOLDER)
                save_alignments(alignments, folder / LLFC_FOLDER)
                write_page(report, folder / LLFC_FOLDER)

        if output is not None:
            with staging_of(output, processes) as folder:
                processes.on_main(lambda: save(folder))
        return report


def refuse_early(recipe: Recipe, output: OutputFolder | None) -> None:
    """Refuses a diagnosis before anything is opened: its folder, what it is logged to.

    Raises:
        LLFCError: What is wrong.
    """
    refuse_missing_trackers(recipe.log_with)
    if output is not None:
        output.check()
        refuse_without_room(output, {})
