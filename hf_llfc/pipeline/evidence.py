"""What is ours in an output folder: recipe as run, alignments, report and card; written, and read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llfc.checkpoints import Checkpoint
from hf_llfc.checkpoints.writing.journal import Journal, storing
from hf_llfc.foundation.choices import UNION
from hf_llfc.foundation.layout import LLFC_FOLDER, RECIPE_FILE, REPORT_FILE
from hf_llfc.parents.fitting import refuse_changed
from hf_llfc.parents.opening import Models
from hf_llfc.parents.provenance import alignment_summary
from hf_llfc.publishing import write_card
from hf_llfc.publishing.card.card import Evidence
from hf_llfc.publishing.lineage import models_of, read_parent_card
from hf_llfc.publishing.machine import hardware_in_words, installed_versions
from hf_llfc.publishing.record import AlignmentSummary, Result, RunRecord
from hf_llfc.recipe import Recipe, dump_recipe, load_recipe, renamed
from hf_llfc.symmetry import Alignment, PermutationSpec

# What measures is imported where it is called: a merge alone does not wait for datasets and metrics to load.
if TYPE_CHECKING:
    from hf_llfc.diagnostics import ConnectivityReport
    from hf_llfc.pipeline.run_context import RunContext


def resolved(recipe: Recipe, opened: Models, report: ConnectivityReport | None = None) -> Recipe:
    """The recipe with every revision as the commit it stood for, that of the data included where the report says it."""
    listed = [entry.model for entry in recipe.models] + ([recipe.base] if recipe.base is not None else [])
    pinned = {name: _pinned(name, each) for name, each in zip(listed, opened.named, strict=True)}
    source = recipe.tokenizer_source
    if isinstance(source, str) and source not in ("base", UNION):
        pinned = {source: _pinned(source, opened.tokenizer_source), **pinned}
        source = pinned[source]
    # All layers need no range.
    recipe = replace(renamed(recipe, pinned), layer_range=recipe.layer_range if opened.originals else None)
    reference = recipe.align.reference
    align = recipe.align if isinstance(reference, int) else replace(recipe.align, reference=recipe.reference_index)
    section = recipe.diagnose
    measured = dict(report.data) if report is not None else {}
    if section is not None and str(measured.get("dataset")).startswith(f"{section.data.dataset}@"):
        data = replace(section.data, dataset=measured["dataset"], split=measured.get("split"))
        section = replace(section, data=data)
    earlier = tuple(map(_as_run, recipe.earlier))
    return replace(recipe, align=align, tokenizer_source=source, diagnose=section, earlier=earlier)


def _as_run(document: Recipe) -> Recipe:
    """A document whose result is there, with its revisions as commits."""
    path = Path(document.output_dir) / LLFC_FOLDER / RECIPE_FILE
    return replace(load_recipe(path), earlier=()) if path.is_file() else document


def _pinned(name: str, checkpoint: Checkpoint) -> str:
    """A model at its commits; as the user named it where it has none, as loaded models have."""
    return checkpoint.pinned if checkpoint.revision or checkpoint.adapter else name


def write_evidence(run: RunContext, report: ConnectivityReport | None, table: Sequence[Mapping[str, Any]]) -> None:
    """Writes what is ours beside alignments and report: recipe as run, record of the run, plots and the card."""
    journal, recipe, opened = run.output.journal, run.recipe, run.models
    if journal.is_complete:
        return
    refuse_changed(opened.all)
    ours = journal.folder / LLFC_FOLDER
    as_run = resolved(recipe, opened, report)
    parents = [
        replace(parent, card=read_parent_card(parent.id, parent.revision)) for parent in models_of(as_run, report)
    ]
    record = RunRecord(
        alignments=tuple(AlignmentSummary.from_dict(alignment_summary(a)) for a in run.alignments if a is not None),
        results=tuple(Result(**row) for row in table if "loss" in row),
        versions=installed_versions(*(["peft"] if any(each.adapter for each in opened.named) else [])),
        hardware=hardware_in_words(run.processes),
        cards=tuple(parent.metadata for parent in parents),
    )
    with storing(journal.folder):
        ours.mkdir(exist_ok=True)
        (ours / RECIPE_FILE).write_text(dump_recipe(as_run), encoding="utf-8")
        record.save(journal.folder)
        write_card(
            journal.folder,
            Evidence(parents, as_run, report, record),
            name=recipe.document or (recipe.publish.repo_id if recipe.publish else Path(recipe.output_dir).name),
            license=recipe.publish.license if recipe.publish is not None else None,
        )


def save_alignments(alignments: Sequence[Alignment | None], folder: Path) -> tuple[list[str | None], list[Path]]:
    """Writes what moved which model; with several, the file's name says which.

    Returns:
        The name of each alignment's file, None where nothing moved; and the files.
    """
    folder.mkdir(exist_ok=True)
    is_alone = sum(alignment is not None for alignment in alignments) == 1
    names = [
        None if alignment is None else "alignment.safetensors" if is_alone else f"alignment-{place}.safetensors"
        for place, alignment in enumerate(alignments)
    ]
    for name, alignment in zip(names, alignments, strict=True):
        if name is not None and alignment is not None:
            alignment.save(folder / name)
    return names, [folder / name for name in names if name is not None]


def keep_alignments(
    run: RunContext, find: Callable[[], Sequence[Alignment | None]], spec: PermutationSpec
) -> RunContext:
    """The run with the alignments of its parents, which its journal keeps.

    Args:
        run: The run.
        find: Finds them.
        spec: What they are of.
    """
    alignments = run.stage(
        "align",
        find,
        save=lambda journal, alignments: save_alignments(alignments, journal.folder / LLFC_FOLDER),
        load=lambda journal, names: load_alignments(names, journal.folder / LLFC_FOLDER, spec),
    )
    return replace(run, alignments=alignments)


def load_alignments(names: Sequence[str | None], folder: Path, spec: PermutationSpec) -> list[Alignment | None]:
    """Reads what `save_alignments` wrote."""
    return [None if name is None else Alignment.load(folder / name, spec) for name in names]


def save_report(journal: Journal, report: ConnectivityReport) -> tuple[None, list[Path]]:
    """Writes the report where it lies in an output."""
    path = journal.folder / LLFC_FOLDER / REPORT_FILE
    path.parent.mkdir(exist_ok=True)
    report.save(path)
    return None, [path]


def load_report(journal: Journal, _: None) -> ConnectivityReport:
    """Reads what `save_report` wrote."""
    from hf_llfc.diagnostics import ConnectivityReport

    return ConnectivityReport.load(journal.folder / LLFC_FOLDER / REPORT_FILE)
