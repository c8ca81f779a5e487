"""The stage that measures a calibrated merge beside the merge that it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safetensors.torch import load_file

from hf_llfc.foundation.layout import LLFC_FOLDER
from hf_llfc.pipeline.calibrating import MERGED_FILE, STAGE, blend_of
from hf_llfc.pipeline.run_context import RunContext
from hf_llfc.pipeline.written import load_compared, measure_written
from hf_llfc.publishing.record import FittedLayer, FittedMeasures

MEASURE_STAGE = f"measure {STAGE}"


def measure_fitted(run: RunContext) -> FittedMeasures | None:
    """The merge before and after calibration, by all processes; None where nothing is calibrated or measured."""
    recipe = run.recipe
    if recipe.calibrate is None or run.data is None or max(blend_of(recipe)) == 1:
        return None
    if not run.on_main(_is_measurable):
        return None
    return run.stage(
        MEASURE_STAGE,
        lambda: _measure(run),
        save=lambda journal, found: (found.to_dict(), ()),
        load=lambda journal, value: FittedMeasures.from_dict(value),
    )


def _is_measurable(run: RunContext) -> bool:
    """Whether both merges are measured, or there; another run whose weights are taken up may need its own no more."""
    return MEASURE_STAGE in run.output.journal.stages or (run.staging / LLFC_FOLDER / MERGED_FILE).is_file()


def with_merge_before(
    table: Sequence[Mapping[str, Any]], measured: FittedMeasures | None
) -> Sequence[Mapping[str, Any]]:
    """The table of loss and metrics with a row for the merge before it was calibrated, above that of the result."""
    if measured is None or measured.loss_before is None:
        return table
    row = {
        "id": "the merge before calibration",
        "loss": measured.loss_before,
        "metrics": dict(measured.metrics_before),
        "is_before": True,
    }
    return [*table[:-1], row, table[-1]]


def _measure(run: RunContext) -> FittedMeasures:
    """Both merges as they are written, against the blend of the parents."""
    from hf_llfc.diagnostics.fold import SHARES

    assert run.data is not None
    before = load_file(run.staging / LLFC_FOLDER / MERGED_FILE)
    parents = load_compared(run)
    merge = measure_written(run, parents, changes=before, doing="measuring the merge before calibration")
    shares = SHARES if run.data.labelled else ()
    result = measure_written(run, parents, shares=shares, doing="measuring the calibrated merge")
    return FittedMeasures(
        layers=tuple(
            FittedLayer(
                old.layer, old.llfc.mean, new.llfc.mean, old.baseline.mean, old.coefficient.mean, new.coefficient.mean
            )
            for old, new in zip(merge.at(), result.at(), strict=True)
        ),
        loss_before=merge.path[-1].loss,
        metrics_before=merge.path[-1].metrics,
        fold_loss=result.barrier.loss,
        fold_error=result.barrier.error,
    )
