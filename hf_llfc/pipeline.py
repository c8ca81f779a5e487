"""The main flow: parents → alignment → merge → diagnosis → card → Hub."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llfc.checkpoints import (
    Checkpoint,
    OutputFolder,
    TensorInfo,
    load_model,
    open_checkpoint,
    state_dict_on_disk,
    write_checkpoint,
)
from hf_llfc.diagnosis import batch_norm_data, broken_tensors, diagnose_checkpoints
from hf_llfc.diagnostics import ConnectivityReport, recompute_batch_norm
from hf_llfc.errors import CheckpointError, PublishingError, RecipeError
from hf_llfc.evaluation import EvaluationData
from hf_llfc.merging import Rule, Source, WeightSchedule, merge_tensors, merged_infos
from hf_llfc.processes import Processes
from hf_llfc.progress import Progress, silent
from hf_llfc.publishing import check_access, publish, write_card
from hf_llfc.recipe import ModelEntry, Recipe, WeightRule, dump_recipe, load_recipe
from hf_llfc.stages import (
    Parent,
    align_checkpoints,
    alignment_summary,
    evaluate_parents,
    open_data,
    refuse_incompatible,
)
from hf_llfc.symmetry import Alignment

LLFC_FOLDER = "llfc"
"""Where everything that is ours lies in an output folder: some runtimes load every safetensors file beside a model."""


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
    progress: Progress = silent,
) -> Result:
    """Runs a recipe, alone or as one of the processes of a launcher.

    Args:
        recipe: A recipe, its file, or what its YAML says.
        models: What to take in place of the models that the recipe names, one for each: loaded models, say.
        progress: Shown meanwhile, on the main process.

    Returns:
        What was made.

    Raises:
        LLFCError: Something is wrong with the recipe, the parents or the data; nothing is written then.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    processes = Processes()
    progress = progress if processes.is_main else silent
    output = OutputFolder(recipe.output_dir, recipe.overwrite)
    processes.on_main(output.check)
    if recipe.publish is not None:
        target = recipe.publish
        processes.on_main(lambda: check_access(target.repo_id, private=target.private, create_pr=target.create_pr))
    opened = processes.main_first(lambda: open_models(recipe, models))
    refuse_replacing_inputs(output, opened.all)
    data, calibration = open_recipe_data(recipe, opened)

    alignments = processes.on_main(lambda: align_parents(opened, recipe, progress))
    parents = [Parent(each, alignment) for each, alignment in zip(opened.parents, alignments, strict=True)]
    broken = processes.on_main(lambda: find_broken(parents, recipe, data, calibration, progress))
    with processes.output(output) as folder:
        processes.on_main(lambda: write_merge(folder, parents, opened, recipe, calibration, progress, broken))
        report: ConnectivityReport | None = None
        table: list[dict[str, Any]] = [{"id": each.id} for each in opened.parents]
        if data is not None and recipe.diagnose is not None:
            if len(parents) > 1 or opened.base is not None:
                report = diagnose_checkpoints(
                    parents,
                    data,
                    recipe.diagnose,
                    base=Parent(opened.base) if opened.base is not None else None,
                    weights=shares(recipe, opened.parents),
                    calibration=calibration,
                    accelerator=processes.accelerator,
                    progress=progress,
                )
            if data.labelled:
                merged = open_checkpoint(folder, trust_remote_code=recipe.models[0].trust_remote_code)
                merged = replace(merged, id=str(recipe.output_dir))
                everyone = [*parents, Parent(merged)]
                table = evaluate_parents(everyone, data, accelerator=processes.accelerator, progress=progress)
                table[-1]["is_merge"] = True
        if report is not None and broken is not None and recipe.keep_where_broken is not None:
            keeper = opened.parents[recipe.keep_where_broken.model].id
            kept = {"model": keeper, "layers": list(broken.blocks), "ratio": recipe.keep_where_broken.ratio}
            report = replace(report, data={**report.data, "kept": kept})
        processes.on_main(lambda: write_evidence(folder, recipe, opened, alignments, report, table))
    summaries = [alignment_summary(alignment) for alignment in alignments if alignment is not None]
    url = processes.on_main(lambda: push(recipe)) if recipe.publish is not None else None
    return Result(output.path, report, summaries, table, url, processes.is_main)


@dataclass(frozen=True)
class Models:
    """The checkpoints of a recipe.

    Attributes:
        parents: One a model, the first gives config and names.
        base: θ₀ of task arithmetic.
        tokenizer_source: Whose tokenizer and processor files are carried over.
    """

    parents: Sequence[Checkpoint]
    base: Checkpoint | None
    tokenizer_source: Checkpoint

    @property
    def all(self) -> list[Checkpoint]:
        """All that are merged: the parents and the base."""
        return [*self.parents, *([self.base] if self.base is not None else [])]

    def reference(self, recipe: Recipe) -> Checkpoint:
        """The one that stays in alignment: the base of task arithmetic, or what the recipe says."""
        return self.base if self.base is not None else self.parents[recipe.reference_index]


def open_models(recipe: Recipe, models: Sequence[str | Path | PreTrainedModel] | None = None) -> Models:
    """Opens all checkpoints of a recipe, or `models` in place of its parents, and compares them.

    Raises:
        LLFCError: One cannot be opened, or they do not fit each other.
    """
    given = models if models is not None else [entry.model for entry in recipe.models]
    if len(given) != len(recipe.models):
        raise RecipeError(f"{len(given)} models are given in place of the {len(recipe.models)} of the recipe")
    parents = [
        open_checkpoint(model, trust_remote_code=entry.trust_remote_code)
        for model, entry in zip(given, recipe.models, strict=True)
    ]
    base = open_checkpoint(recipe.base_model) if recipe.base_model is not None else None
    opened = Models(parents, base, parents[0])
    refuse_incompatible(opened.all)
    source = recipe.tokenizer_source
    if source is None:
        return opened
    if source == "base":
        assert base is not None
        return replace(opened, tokenizer_source=base)
    named = [each for each, entry in zip(parents, recipe.models, strict=True) if entry.model == source]
    return replace(opened, tokenizer_source=named[0] if named else open_checkpoint(source))


def refuse_replacing_inputs(output: OutputFolder, checkpoints: Sequence[Checkpoint]) -> None:
    """Refuses an output folder that is, or holds, one of the inputs, also where it may overwrite.

    Raises:
        CheckpointError: It does.
    """
    for each in checkpoints:
        folder = each.folder.resolve() if each.folder is not None else None
        if folder is not None and output.path in (folder, *folder.parents):
            raise CheckpointError(f"{output.path}: the output would replace its own input {each.label}; name another")


def open_recipe_data(recipe: Recipe, opened: Models) -> tuple[EvaluationData | None, EvaluationData | None]:
    """The data to measure on, and those to recompute BatchNorm from: the same without labels if none are named."""
    if recipe.diagnose is None:
        return None, None
    first, source = opened.parents[0], opened.tokenizer_source
    data = open_data(recipe.diagnose.data, first, tokenizer_source=source)
    return data, batch_norm_data(first, recipe.diagnose, tokenizer_source=source)


def align_parents(opened: Models, recipe: Recipe, progress: Progress) -> list[Alignment | None]:
    """One alignment a parent, onto the base of task arithmetic or the reference; None where nothing is aligned."""
    reference = opened.reference(recipe)
    return [
        None if each is reference else align_checkpoints(reference, each, recipe.align, progress=progress)
        for each in opened.parents
    ]


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
    ratio = recipe.keep_where_broken.ratio
    blocks, tensors = broken_tensors(
        parents, data, recipe.diagnose, ratio=ratio, weights=weights, calibration=calibration, progress=progress
    )
    return Broken(blocks, tensors)


def write_merge(
    folder: Path,
    parents: Sequence[Parent],
    opened: Models,
    recipe: Recipe,
    calibration: EvaluationData | None,
    progress: Progress,
    broken: Broken | None = None,
) -> None:
    """Writes the merged checkpoint, tensor by tensor; only models with BatchNorm are held in memory."""
    first = opened.parents[0]
    infos = merge_infos(first, recipe)
    tensors = merge_sources(parents, opened, recipe, infos, broken)
    if calibration is not None:
        model = load_model(first, state_dict=dict(tensors))
        recompute_batch_norm(model, calibration.batches())
        state = state_dict_on_disk(model)
        tensors = ((name, state[name].to(info.dtype)) for name, info in infos.items())
    write_checkpoint(
        folder,
        infos,
        counted(tensors, len(infos), progress),
        config=first.config,
        generation_config=first.generation_config,
        companions=opened.tokenizer_source.companion_files,
        max_shard_size=recipe.max_shard_size,
    )


def merge_infos(first: Checkpoint, recipe: Recipe) -> dict[str, TensorInfo]:
    """Dtype and shape of every merged tensor."""
    return merged_infos(first.tensors, getattr(torch, recipe.result_dtype) if recipe.result_dtype else None)


def merge_sources(
    parents: Sequence[Parent],
    opened: Models,
    recipe: Recipe,
    infos: Mapping[str, TensorInfo],
    broken: Broken | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors, one after the other; weights that do not fit are refused before anything is read."""
    keeper = recipe.keep_where_broken.model if recipe.keep_where_broken is not None else 0
    return merge_tensors(
        [Source(parent.checkpoint.label, parent.read) for parent in parents],
        infos,
        [schedule(entry, len(parents), parent) for entry, parent in zip(recipe.models, parents, strict=True)],
        normalize=recipe.parameters.normalize,
        base=Source(opened.base.label, opened.base.read) if opened.base is not None else None,
        scale=recipe.parameters.scale,
        kept=dict.fromkeys(broken.tensors, keeper) if broken is not None else None,
    )


def counted(tensors: Iterable[tuple[str, Tensor]], total: int, progress: Progress) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, with progress told."""
    for done, pair in enumerate(tensors, start=1):
        yield pair
        progress("merging", done, total)


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
    """The weight of every parent in the merge; None where a parent's weight differs among tensors."""
    schedules = [
        schedule(entry, len(parents), Parent(each)) for entry, each in zip(recipe.models, parents, strict=True)
    ]
    if not all(each.is_constant for each in schedules):
        return None
    weights = [recipe.parameters.scale * each.rules[0].values[0] for each in schedules]
    total = sum(weights) if recipe.parameters.normalize else 1.0
    return [weight / total for weight in weights]


def resolved(recipe: Recipe, parents: Sequence[Checkpoint]) -> Recipe:
    """The recipe with every revision as the commit it stood for."""
    entries = [
        replace(entry, model=f"{entry.model.partition('@')[0]}@{each.revision}" if each.revision else entry.model)
        for entry, each in zip(recipe.models, parents, strict=True)
    ]
    reference = recipe.align.reference
    align = recipe.align if isinstance(reference, int) else replace(recipe.align, reference=recipe.reference_index)
    return replace(recipe, models=tuple(entries), align=align)


def write_evidence(
    folder: Path,
    recipe: Recipe,
    opened: Models,
    alignments: Sequence[Alignment | None],
    report: ConnectivityReport | None,
    table: Sequence[Mapping[str, Any]],
) -> None:
    """Writes what is ours: recipe as run, alignments, report, plots and the card."""
    ours = folder / LLFC_FOLDER
    ours.mkdir()
    as_run = resolved(recipe, opened.parents)
    (ours / "recipe.yaml").write_text(dump_recipe(as_run), encoding="utf-8")
    save_alignments(alignments, ours)
    if report is not None:
        report.save(ours / "llfc_report.json")
    write_card(
        folder,
        recipe=as_run.to_dict(),
        report=report,
        alignment=[alignment_summary(alignment) for alignment in alignments if alignment is not None],
        results=[row for row in table if "loss" in row] or None,
        name=recipe.publish.repo_id if recipe.publish is not None else Path(recipe.output_dir).name,
        license=recipe.publish.licence if recipe.publish is not None else None,
        hardware=f"{platform.machine()}, {platform.system()}",
    )


def save_alignments(alignments: Sequence[Alignment | None], folder: Path) -> None:
    """Writes what moved which model; with several, the file's name says which."""
    found = [(place, alignment) for place, alignment in enumerate(alignments) if alignment is not None]
    for place, alignment in found:
        alignment.save(folder / ("alignment.safetensors" if len(found) == 1 else f"alignment-{place}.safetensors"))


def push(recipe: Recipe) -> str:
    """Pushes the output folder as the recipe says.

    Raises:
        PublishingError: It could not be pushed; the folder stays.
    """
    assert recipe.publish is not None
    target = recipe.publish
    try:
        return publish(recipe.output_dir, target.repo_id, private=target.private, create_pr=target.create_pr)
    except PublishingError as error:
        raise PublishingError(
            f"{error}\nThe merge is complete in {recipe.output_dir}: `hf-llfc push {recipe.output_dir} "
            f"{target.repo_id}` tries again"
        ) from error
