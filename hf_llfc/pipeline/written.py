"""A merge as it is written, measured beside its parents: what a verdict is about where the merge lies on no line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.parallel.threads import one_thread_if_small
from hf_llfc.parents.parent import Parent
from hf_llfc.parents.provenance import alignments_summary
from hf_llfc.pipeline.calibrating import blend_of
from hf_llfc.pipeline.closeness import COMMON_ANCESTOR, closeness
from hf_llfc.pipeline.run_context import RunContext

# What measures is imported where it is called: a merge alone does not wait for datasets and metrics to load.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_llfc.diagnostics import ConnectivityReport

JUDGED = "the merge as it is written"
"""What a report says that its verdict is about, where this is no point of its path."""

NOTHING: Mapping[str, Any] = MappingProxyType({})


@one_thread_if_small(lambda run, *_, **__: run.models.parents[0].nbytes)
def measure_written(
    run: RunContext,
    parents: Sequence[PreTrainedModel] | None = None,
    *,
    shares: Sequence[float] = (),
    changes: Mapping[str, Any] = NOTHING,
    doing: str = "measuring the merge",
) -> ConnectivityReport:
    """Measures what a run has written against the blend of its parents, by all processes.

    Args:
        run: The run, whose weights are written, with its data; their labels are looked at where there are any.
        parents: What `load_compared` gives; loaded where None.
        shares: Where the ways from the parents to the merge are measured; see `Fold.of`.
        changes: Tensors that replace those of the merge.
        doing: What is shown meanwhile.

    Returns:
        See `measure_merge`. The blend has the weights of a linear merge, elsewhere equal ones. The verdict advises to
        align only where the models have no common ancestor.
    """
    from hf_llfc.checkpoints import load_model
    from hf_llfc.diagnostics.diagnose import BLOCKS, Features, Origin
    from hf_llfc.diagnostics.fold import Fold, measure_merge
    from hf_llfc.diagnostics.rows import ModelReference, Verdict
    from hf_llfc.diagnostics.streaming import Execution
    from hf_llfc.diagnostics.verdict import NOT_ALIGNED

    def progress(_: str, done: int, total: int) -> None:
        run.progress(doing, done, total)

    section, compared = run.recipe.diagnose, _compared(run)
    assert run.data is not None, "what to measure on"
    blend = blend_of(run.recipe) if len(compared) == len(run.recipe.models) else (1 / len(compared),) * len(compared)
    parents = load_compared(run) if parents is None else parents
    written = open_checkpoint(run.staging, trust_remote_code=run.recipe.models[0].trust_remote_code)
    merge = load_model(written, state_dict={**dict(written.state_dict()), **changes}, dtype=parents[0].dtype)
    references = tuple(ModelReference(each.checkpoint.id, each.checkpoint.revision) for each in compared)
    report = measure_merge(
        merge,
        parents,
        run.data,
        fold=Fold.of(blend, shares),
        features=BLOCKS if section is None else Features(section.layers or None, section.unit),
        batch_norm_data=run.calibration,
        origin=Origin(references, alignments_summary(compared)),
        execution=Execution(run.processes, progress),
    )
    if report.verdict.answer != "align" or not (run.base is not None or _are_near(run)):
        return report
    because = report.verdict.because.removesuffix(NOT_ALIGNED)
    because += "; the models have one ancestor, and aligning changes nothing: try smaller weights"
    return replace(report, verdict=Verdict("do not merge", because))


def _compared(run: RunContext) -> list[Parent]:
    """What a merge is compared with: its parents; where there is one alone, the base and it."""
    return run.parents if len(run.parents) > 1 or run.base is None else [run.base, *run.parents]


def load_compared(run: RunContext) -> list[PreTrainedModel]:
    """The models that a merge is compared with, in memory."""
    models = [parent.load() for parent in _compared(run)]
    for model in models:
        model.to(run.processes.device)  # type: ignore[arg-type]  # the signature is hidden
    return models


def _are_near(run: RunContext) -> bool:
    """Whether the models have a common ancestor."""
    near = closeness(run.models, run.recipe)
    return bool(near) and min(each.cosine for each in near) >= COMMON_ANCESTOR


def with_own_verdict(run: RunContext, report: ConnectivityReport) -> ConnectivityReport:
    """The report with the verdict of the merge that was made.

    A linear merge is a point of what the report measures. What other methods make lies elsewhere, and is measured as it
    was written, unless layers come from several places or the models are too large to be held in memory.
    """
    section = run.recipe.diagnose
    assert run.data is not None and section is not None, "there are data where there is a report"
    if run.recipe.method is None or run.models.sections or section.offload:
        return report
    own = measure_written(run)
    verdict = replace(own.verdict, because=f"of {JUDGED}: {own.verdict.because}")
    data = {**report.data, "judged": JUDGED}
    return replace(report, verdict=verdict, outputs=own.outputs, samples=own.samples, data=data)


def with_measures(run: RunContext, report: ConnectivityReport, *, is_sum: bool) -> ConnectivityReport:
    """The report with the measures of a merge that the recipe asks for, of the merge as it was written.

    Args:
        run: The run, whose weights are written.
        report: The diagnosis.
        is_sum: Whether the merge is the sum of its parents, or of their task vectors, by the recipe's weights.
    """
    from hf_llfc.diagnostics.checkpoints import Made, measure_made
    from hf_llfc.diagnostics.streaming import Execution

    recipe, section, data = run.recipe, run.recipe.diagnose, run.data
    assert data is not None and section is not None, "there are data where there is a report"
    parents, base = run.parents, run.base
    if recipe.method is not None and len(parents) == 1 and base is not None:
        parents, base = [base, *parents], None  # as the report has them
    written = open_checkpoint(run.staging, trust_remote_code=recipe.models[0].trust_remote_code)
    made = Made(Parent(written), parents, base, recipe.weights, is_sum)
    execution = Execution(run.processes, run.progress)
    measured: dict[str, Any] = measure_made(made, data, section, calibration=run.calibration, execution=execution)
    return replace(report, **measured)
