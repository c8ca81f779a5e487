"""Single stages of the main flow that write a folder of their own: a model aligned, a pair diagnosed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hf_llfc.alignment.checkpoints import align_checkpoints
from hf_llfc.alignment.costs import matching_memory
from hf_llfc.alignment.together import align_all
from hf_llfc.checkpoints import OutputFolder, open_checkpoint
from hf_llfc.checkpoints.writing.journal import Journal, storing
from hf_llfc.checkpoints.writing.shards import checksum
from hf_llfc.diagnostics import ConnectivityReport
from hf_llfc.diagnostics.checkpoints import batch_norm_data, diagnose_checkpoints
from hf_llfc.errors import AlignmentError
from hf_llfc.foundation.layout import LLFC_FOLDER, REPORT_FILE
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.merging import Merge
from hf_llfc.parallel.processes import Processes
from hf_llfc.parents.opening import refuse_replacing_inputs
from hf_llfc.parents.parent import Parent, comparable, in_groups, open_data, refuse_changed, refuse_incompatible
from hf_llfc.parents.provenance import refuse_foreign_alignment
from hf_llfc.parents.specs import alignment_spec, spec_of
from hf_llfc.pipeline.evidence import load_alignments, save_alignments
from hf_llfc.pipeline.identity import as_settings, identity_of
from hf_llfc.pipeline.resources import refuse_without_memory, refuse_without_room
from hf_llfc.pipeline.sharing import shared_stage, write_shared
from hf_llfc.pipeline.trackers import refuse_missing_trackers, tracking
from hf_llfc.publishing import save_plots
from hf_llfc.publishing.page import write_page
from hf_llfc.recipe import AlignSection, DiagnoseSection
from hf_llfc.symmetry import Alignment


def write_aligned(
    model: str | Path,
    *,
    to: str | Path,
    out: str | Path,
    options: AlignSection,
    file: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    allow_pickle: bool = False,
    device: str | None = None,
    progress: Progress = silent,
) -> Alignment:
    """Writes a model as an ordinary checkpoint in the coordinates of a reference, with its alignment file.

    Goes on where the same was interrupted.

    Args:
        model: The model that moves.
        to: The reference.
        out: The folder to write.
        options: How to align.
        file: An alignment file to apply instead of matching; it must have been made for these two models.
        overwrite: Whether an earlier output may be replaced.
        restart: Whether to discard what an interrupted run into the same folder had finished.
        allow_pickle: Whether weights that are pickled, not safetensors, may be opened.
        device: As for `Processes`.
        progress: Shown meanwhile.

    Returns:
        The alignment.

    Raises:
        LLFCError: The models do not fit each other, an option or the alignment file.
    """
    if file is None and options.method == "none":
        raise AlignmentError(
            "the method `none` aligns nothing; use weight_matching, activation_matching or learned_matching"
        )
    output = OutputFolder(out, overwrite, restart)
    with Processes(device) as processes:
        progress = progress if processes.is_main else silent
        return _write_aligned(model, to, output, options, file, allow_pickle, processes, progress)


def _write_aligned(
    model: str | Path,
    to: str | Path,
    output: OutputFolder,
    options: AlignSection,
    file: str | Path | None,
    allow_pickle: bool,
    processes: Processes,
    progress: Progress,
) -> Alignment:
    processes.on_main(output.check)
    opening = partial(open_checkpoint, allow_pickle=allow_pickle)
    reference, moving = processes.main_first(lambda: [opening(each) for each in (to, model)])
    refuse_incompatible([reference, moving])
    reference, moving = in_groups([reference, moving], options)
    refuse_replacing_inputs(output, [reference, moving])
    processes.on_main(lambda: refuse_without_room(output, moving.tensors))
    given = Alignment.load(file, spec_of(reference)) if file is not None else None
    settings = {"align": as_settings(options), "file": checksum(Path(file)) if file is not None else None}

    def begin() -> None:
        if given is not None:
            refuse_foreign_alignment(given, reference, moving)
        else:
            refuse_without_memory(matching_memory(reference, options))
        output.made_from(identity_of(settings, [reference, moving], [options.calibration]))

    def find() -> Alignment:
        if given is not None:
            return given
        found = align_checkpoints(
            reference, moving, options, workers=processes.workers(), device=processes.device, progress=progress
        )
        assert found is not None
        refuse_changed([reference, moving])
        return found

    def load(journal: Journal, names: Sequence[str | None]) -> Alignment:
        spec = spec_of(reference) if file is not None else alignment_spec(reference, options)
        (found,) = load_alignments(names, journal.folder / LLFC_FOLDER, spec)
        assert found is not None
        return found

    processes.on_main(begin)
    with processes.output(output) as folder:
        alignment = shared_stage(
            output,
            processes,
            "align",
            find,
            save=lambda journal, found: save_alignments([found], journal.folder / LLFC_FOLDER),
            load=load,
        )
        if processes.on_main(lambda: output.journal.is_complete):
            return alignment
        write_shared(
            output,
            processes,
            folder,
            Merge.copy(Parent(moving, alignment).source, moving.tensors),
            moving,
            companions=moving.companion_files,
            on_bytes=partial(progress, "writing"),
        )
        processes.on_main(lambda: refuse_changed([reference, moving]))
    return alignment


def write_diagnosis(
    models: Sequence[str | Path],
    section: DiagnoseSection,
    *,
    align: AlignSection,
    weights: Sequence[float] | None = None,
    base_model: str | Path | None = None,
    heads: str = "own",
    out: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    allow_pickle: bool = False,
    log_with: Sequence[str] = (),
    logging_dir: str | Path = "runs",
    device: str | None = None,
    progress: Progress = silent,
) -> ConnectivityReport:
    """Diagnoses models as they would be merged and, given a folder, writes report, plots and the interactive report.

    Args:
        models: Two or more; the first is the reference, and on a line has weight α. One is enough with a base model.
        section: What to measure, and on what.
        align: How the others are aligned to the first, or all to the base.
        weights: Of the merge that more than two models, or task vectors, would make; equal ones where None.
        base_model: θ₀ of task arithmetic.
        heads: One of `HEADS`.
        out: The folder to write.
        overwrite: Whether an earlier output may be replaced.
        restart: Whether to discard what an interrupted run into the same folder had finished.
        allow_pickle: Whether weights that are pickled, not safetensors, may be opened.
        log_with: Trackers of accelerate that it is logged to; see `hf_llfc.pipeline.trackers`.
        logging_dir: Where trackers write that write files.
        device: As for `Processes`.
        progress: Shown meanwhile.

    Raises:
        LLFCError: The models do not fit each other or the data.
    """
    with Processes(device) as processes:
        processes.on_main(lambda: refuse_missing_trackers(log_with))
        progress = progress if processes.is_main else silent
        output = OutputFolder(out, overwrite, restart) if out is not None else None
        if output is not None:
            processes.on_main(output.check)
            processes.on_main(lambda: refuse_without_room(output, {}))
        opening = partial(open_checkpoint, allow_pickle=allow_pickle)
        checkpoints = processes.main_first(lambda: [opening(model) for model in models])
        base = processes.main_first(lambda: opening(base_model)) if base_model is not None else None
        checkpoints = in_groups(checkpoints, align)
        base = in_groups([base], align)[0] if base is not None else None
        everyone = [*checkpoints, *([base] if base is not None else [])]
        head = comparable(everyone, heads, aligned=align.method != "none")
        if output is not None:
            refuse_replacing_inputs(output, everyone)
        data = open_data(section.data, checkpoints[0])
        reference = base if base is not None else checkpoints[0]
        alignments = align_all(
            reference, checkpoints, align, workers=processes.workers(), device=processes.device, progress=progress
        )
        report = diagnose_checkpoints(
            [
                Parent(each, alignment, head if each is not head else None)
                for each, alignment in zip(checkpoints, alignments, strict=True)
            ],
            data,
            section,
            base=Parent(base, None, head) if base is not None else None,
            weights=weights,
            calibration=batch_norm_data(checkpoints[0], section),
            processes=processes,
            progress=progress,
        )

        asked = {"models": [str(model) for model in models], "align": as_settings(align)}
        name = output.path.name if output is not None else "diagnosis"
        with tracking(
            log_with, logging_dir=logging_dir, name=name, config=asked, is_main=processes.is_main
        ) as trackers:
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
            with processes.output(output) as folder:
                processes.on_main(lambda: save(folder))
        return report
