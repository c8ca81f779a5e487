"""What is ours in an output folder: recipe as run, alignments, report and card; written, and read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llfc.checkpoints import Checkpoint
from hf_llfc.checkpoints.writing.journal import Journal, storing
from hf_llfc.foundation.choices import UNION
from hf_llfc.foundation.layout import LLFC_FOLDER, RECIPE_FILE, REPORT_FILE
from hf_llfc.foundation.model_names import as_text, portable, without_paths
from hf_llfc.parents.fitting import refuse_changed
from hf_llfc.parents.opening import Models
from hf_llfc.parents.proof import Proof
from hf_llfc.parents.provenance import alignment_summary
from hf_llfc.pipeline.calibrating import few_samples
from hf_llfc.publishing import write_card
from hf_llfc.publishing.card.card import Evidence
from hf_llfc.publishing.files import read_recipe
from hf_llfc.publishing.lineage import models_of, read_parent_card
from hf_llfc.publishing.machine import hardware_in_words, installed_versions
from hf_llfc.publishing.record import (
    AdapterRecord,
    AlignmentSummary,
    CalibrationRecord,
    Result,
    RunRecord,
    TensorsRecord,
)
from hf_llfc.recipe import Recipe, dump_recipe, load_recipe, renamed
from hf_llfc.symmetry import Alignment, PermutationSpec

# What measures is imported where it is called: a merge alone does not wait for datasets and metrics to load.
if TYPE_CHECKING:
    from hf_llfc.diagnostics import ConnectivityReport
    from hf_llfc.evaluation import EvaluationConfig
    from hf_llfc.pipeline.run_context import RunContext


@dataclass(frozen=True)
class Beside:
    """What a run made beside a merge of weights.

    Attributes:
        calibration: How the merge was fitted to its parents' features; None where it was not.
        adapter: What was written in place of a model; None where a model was.
        proofs: What the proof of each parent's adapter found.
        tensors: What became of every tensor of the models; None of an adapter.
    """

    calibration: CalibrationRecord | None = None
    adapter: AdapterRecord | None = None
    proofs: Sequence[Proof] = ()
    tensors: TensorsRecord | None = None


NOTHING = Beside()


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
    folders = {each.document: each.output_dir for each in recipe.earlier}
    earlier = tuple(_as_run(each, folders) for each in recipe.earlier)
    return replace(recipe, align=align, tokenizer_source=source, diagnose=section, earlier=earlier)


def _with_data(recipe: Recipe, fitted_on: Sequence[EvaluationConfig]) -> Recipe:
    """The recipe with the data of its calibration at their commits."""
    if recipe.calibrate is None:
        return recipe
    if recipe.calibrate.targets == "blend":
        return replace(recipe, calibrate=replace(recipe.calibrate, data=fitted_on[0]))
    entries = zip(recipe.models, fitted_on, strict=True)
    return replace(recipe, models=tuple(replace(entry, calibrate_on=data) for entry, data in entries))


def _as_run(document: Recipe, folders: Mapping[str | None, str]) -> Recipe:
    """A document whose result is there, with its revisions as commits; others by the folders that they have here."""
    path = Path(document.output_dir) / LLFC_FOLDER / RECIPE_FILE
    if not path.is_file():
        return document
    recipe = load_recipe(path)
    recipe = renamed(recipe, {each.output_dir: folders.get(each.document, each.output_dir) for each in recipe.earlier})
    return replace(recipe, earlier=(), output_dir=document.output_dir, document=document.document)


def _pinned(name: str, checkpoint: Checkpoint) -> str:
    """A model at its commits; as the user named it where it has none, as loaded models have."""
    return checkpoint.pinned if checkpoint.revision or checkpoint.adapter else name


def write_evidence(
    run: RunContext,
    report: ConnectivityReport | None,
    table: Sequence[Mapping[str, Any]],
    beside: Beside = NOTHING,
) -> None:
    """Writes what is ours beside alignments and report: recipe as run, record of the run, plots and the card.

    Args:
        run: The run.
        report: The diagnosis, if there is one.
        table: Loss and metrics, a row a model.
        beside: What else was made.
    """
    calibration = beside.calibration
    journal, recipe, opened = run.output.journal, run.recipe, run.models
    if journal.is_complete:
        return
    refuse_changed(opened.all)
    ours = journal.folder / LLFC_FOLDER
    as_run = _with_data(resolved(recipe, opened, report), [data.config for data in run.fitted_on])
    told = dump_recipe(as_run, shown_names(recipe, opened, run.output.path / LLFC_FOLDER))
    with storing(journal.folder):
        ours.mkdir(exist_ok=True)
        (ours / RECIPE_FILE).write_text(told, encoding="utf-8")
    shown = read_recipe(ours / RECIPE_FILE)
    gone, names = gone_of(run), shown_names(recipe, opened)
    parents = [
        replace(parent, card=read_parent_card(known.id, known.revision), is_gone=index in gone)
        for index, (parent, known) in enumerate(zip(models_of(shown, report), models_of(as_run, report), strict=True))
    ]
    warnings = [*run.warnings, *([few_samples(calibration)] if calibration is not None else [])]
    name = recipe.document or (recipe.publish.repo_id if recipe.publish else as_text(Path(recipe.output_dir).name))
    record = RunRecord(
        alignments=tuple(AlignmentSummary.from_dict(alignment_summary(a)) for a in run.alignments if a is not None),
        results=tuple(Result(**row) for row in table if "loss" in row),
        versions=installed_versions(
            *(["peft"] if recipe.is_adapter or any(each.adapter for each in opened.named) else [])
        ),
        hardware=hardware_in_words(run.processes),
        cards=tuple(parent.metadata for parent in parents),
        warnings=tuple(without_paths([each for each in warnings if each is not None], names)),
        left=run.carried.left,
        quantised=tuple(without_paths(opened.quantised, names)),
        gone=gone,
        name=name,
        calibration=calibration and replace(calibration, data=tuple(without_paths(calibration.data, names))),
        proofs=tuple(without_paths([proof.sentence for proof in beside.proofs], names)),
        vocabulary=opened.vocabulary and without_paths(opened.vocabulary, names),
        tensors=beside.tensors and beside.tensors.renamed(names),
        adapter=beside.adapter and replace(beside.adapter, base=names.get(beside.adapter.base, beside.adapter.base)),
    )
    with storing(journal.folder):
        record.save(journal.folder)
        write_card(
            journal.folder,
            Evidence(parents, shown, report, record),
            name=name,
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


def shown_names(recipe: Recipe, opened: Models, beside: Path | None = None) -> dict[str, str]:
    """Names of models, data and folders that would tell how a disk is laid out → what others are told.

    Args:
        recipe: Names them.
        opened: The models.
        beside: The folder of a file that names them, from which paths beside it are told.
    """
    named: list[Any] = []
    for document in (*recipe.earlier, recipe):
        data = [document.align.calibration, document.importance, *(entry.importance for entry in document.models)]
        data += document.calibration_data
        if document.diagnose is not None:
            data += [document.diagnose.data, document.diagnose.batch_norm.data]
        named += [*(entry.model for entry in document.models), document.base_model, document.tokenizer_source]
        named += [value for each in data if each is not None for value in (each.dataset, each.tokenizer)]
    named += [value for each in opened.everything for value in (each.id, each.label)]
    names = {str(name): portable(str(name), beside) for name in named if isinstance(name, str | Path)}
    folders = [name for each in (*recipe.earlier, recipe) for name in (each.output_dir, each.logging_dir)]
    names |= {name: portable(name) for name in folders}
    return {name: shown for name, shown in names.items() if shown != name}


def gone_of(run: RunContext) -> tuple[int, ...]:
    """Indices of the parents that are not to be found after the run: those in memory, or all where none is kept."""
    return tuple(index for index, parent in enumerate(run.models.named) if run.is_temporary or parent.folder is None)


def save_report(names: Mapping[str, str], journal: Journal, report: ConnectivityReport) -> tuple[None, list[Path]]:
    """Writes the report where it lies in an output, with others names of models and data; see `shown_names`."""
    path = journal.folder / LLFC_FOLDER / REPORT_FILE
    path.parent.mkdir(exist_ok=True)
    type(report).from_dict(without_paths(report.to_dict(), names)).save(path)
    return None, [path]


def load_report(journal: Journal, _: None) -> ConnectivityReport:
    """Reads what `save_report` wrote."""
    from hf_llfc.diagnostics import ConnectivityReport

    return ConnectivityReport.load(journal.folder / LLFC_FOLDER / REPORT_FILE)
