"""May this recipe be merged? The same levels as for two models, of the merge that the recipe would make."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llfc.checkpoints import OutputFolder
from hf_llfc.checkpoints.preparation import preparation_differences
from hf_llfc.errors import RecipeError
from hf_llfc.foundation.choices import COMPARED
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.parallel.processes import Processes
from hf_llfc.parents.data import has_statistics
from hf_llfc.parents.opening import Models, open_recipe
from hf_llfc.parents.parent import Parent
from hf_llfc.parents.task_vectors import compare_task_vectors
from hf_llfc.pipeline.closeness import closeness
from hf_llfc.pipeline.flow import refuse_too_large
from hf_llfc.pipeline.mergeability import (
    UNDECIDED,
    CheckResult,
    highest_level,
    open_calibration,
)
from hf_llfc.pipeline.run_context import RunContext, open_run
from hf_llfc.pipeline.stages import align_parents, write_merge
from hf_llfc.pipeline.weighting import plan_merge
from hf_llfc.pipeline.which_method import compared
from hf_llfc.recipe import DiagnoseSection, Recipe, load_recipe

if TYPE_CHECKING:
    from hf_llfc.recipe import EvaluationConfig


def check_recipe(
    recipe: str | Path | Mapping[str, Any],
    *,
    level: int | None = None,
    data: EvaluationConfig | None = None,
    overrides: Sequence[str] = (),
    progress: Progress = silent,
) -> CheckResult:
    """Answers whether what a recipe merges is sound: any method, any number of models, with or without a base.

    Level 0 opens the models and compares them; level 1 looks at their weights and at what they changed of their base;
    level 2 makes the merge in a temporary folder and runs it beside its parents on samples without labels.

    Args:
        recipe: A recipe, ours or mergekit's; its folder, diagnosis and target on the Hub are not touched.
        level: The highest level; where None, 2 with data, of the caller or of the recipe's diagnosis, and 1 without.
        data: What the models run on at level 2; those of the recipe's diagnosis where None.
        overrides: `key.sub=value` replacements; see `load_recipe`.
        progress: Shown meanwhile.

    Raises:
        RecipeError: The recipe is at fault, has several documents, or merges layers from several places (level 2).
        CheckpointError: A model cannot be read, the models do not fit each other, or there is no room for the merge.
        EvaluationError: Level and data do not go together, or the models cannot be run on the data.
    """
    with tempfile.TemporaryDirectory(prefix="hf-llfc-check-") as folder:
        asked = load_recipe(recipe, [*overrides, f"output_dir={Path(folder) / 'merge'}"])
        if asked.earlier:
            raise RecipeError("check takes a recipe of one document; check each document in a file of its own")
        if data is None and level in (None, 2) and asked.diagnose is not None:
            data = asked.diagnose.data
        highest = highest_level(level, data)
        wanted = replace(asked, diagnose=None, publish=None, log_with=(), keep_where_broken=None)
        opened = open_recipe(wanted)
        differences = preparation_differences(opened.parents)
        if highest == 0:
            because = "configs, tokenizers and headers fit; weights have not been looked at"
            return CheckResult(UNDECIDED, because, 0, differences=differences)
        found = replace(_weights(wanted, opened), differences=differences)
        if highest == 1:
            return found
        if opened.sections:
            raise RecipeError(
                "the recipe merges layers from several places, so that the merge has no parents of its depth to be "
                "compared with; check level 1, or run the recipe and evaluate the result"
            )
        assert data is not None
        unlabelled = replace(data, labels=False, metric=None)
        return _outputs(replace(wanted, diagnose=DiagnoseSection(data=unlabelled)), found, progress)


def _weights(recipe: Recipe, opened: Models) -> CheckResult:
    """Level 1: how near the models lie, and what their changes of the base have in common."""
    near = closeness(opened, recipe)
    merge = plan_merge(opened.moved([None] * len(opened.parents)), recipe, sections=opened.sections)
    vectors = compared(recipe, opened, merge, COMPARED[0])
    cosine = min((each.cosine for each in near), default=None)
    if far := [each.sentence for each in near if each.is_far]:
        return CheckResult("do not merge", "; ".join(far), 1, median_cosine=cosine, task_vectors=vectors)
    told = (
        "the models are aligned first"
        if recipe.align.method != "none"
        else "no model is far from the others"
        if near
        else "the models were not compared with each other"
    )
    because = f"{told}; {vectors['sentence']}; whether the merge is sound shows on data alone (level 2)"
    return CheckResult(UNDECIDED, because, 1, median_cosine=cosine, task_vectors=vectors)


def _outputs(recipe: Recipe, found: CheckResult, progress: Progress) -> CheckResult:
    """Level 2: the merge that the recipe makes, beside its parents."""
    from hf_llfc.diagnostics.verdict import judged_by
    from hf_llfc.pipeline.written import measure_written

    assert recipe.diagnose is not None, "the data"
    output = OutputFolder(recipe.output_dir, overwrite=True)
    with Processes(recipe.device) as processes:
        run = open_run(recipe, output, processes, progress)
        samples = open_calibration(recipe.diagnose.data, run.models.parents[0])
        run = replace(run, data=samples, calibration=samples if has_statistics(run.models.parents[0]) else None)
        run.on_main(refuse_too_large)
        with run.staged() as run:
            run = align_parents(run)
            write_merge(run)
        run = replace(run, folder=output.path)
        report = measure_written(run, doing="running the merge and its parents")
        changes = _changes(run)
    verdict = report.verdict
    return replace(
        found,
        answer=verdict.answer,
        because=f"of the merge that the recipe makes: {verdict.because}",
        level=2,
        criteria=judged_by(report.at(), report.outputs) if verdict.answer not in (UNDECIDED, "contradict") else (),
        aligned=recipe.align.method != "none",
        layers=report.at(),
        outputs=report.outputs,
        at_chance=report.at_chance,
        contradiction=report.contradiction,
        changes=changes,
    )


def _changes(run: RunContext) -> Mapping[str, float]:
    """How far every model and the merge lie from the base, in units of its norm; empty without a base."""
    if run.base is None:
        return {}
    from hf_llfc.checkpoints import open_checkpoint

    sources = [parent.source for parent in (*run.parents, Parent(open_checkpoint(run.staging)))]
    assert run.models.base is not None
    infos = {name: run.models.parents[0].tensors[name] for name in run.models.base.tensors}
    infos = {name: info for name, info in infos.items() if name not in run.models.base.borrowed}
    vectors = compare_task_vectors(sources, run.base.source, infos)
    names = [*vectors.models[:-1], "the merge"]
    return dict(zip(names, vectors.changes, strict=True))
