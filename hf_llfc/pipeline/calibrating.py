"""The stage in which a merge is fitted to the blend of its parents' features, before its weights are written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_llfc.checkpoints import TensorInfo
from hf_llfc.checkpoints.files import LocalFiles, open_safetensors
from hf_llfc.checkpoints.source import Source
from hf_llfc.checkpoints.writing.journal import Journal, storing
from hf_llfc.checkpoints.writing.shards import ShardLayout
from hf_llfc.checkpoints.writing.writer import whole_shards
from hf_llfc.errors import EvaluationError
from hf_llfc.foundation.choices import AUTO
from hf_llfc.foundation.layout import LLFC_FOLDER
from hf_llfc.merging import Merge, Merges, merged_infos
from hf_llfc.parallel.threads import one_thread_if_small
from hf_llfc.pipeline.run_context import RunContext
from hf_llfc.pipeline.weighting import working_dtype
from hf_llfc.publishing.record import CalibrationRecord, FittedMeasures, MapRecord, RidgeRecord
from hf_llfc.recipe import CalibrateSection, Recipe

# What runs models is imported where it is called: a merge alone does not wait for it to load.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_llfc.calibration import Calibration, Finished, RidgeTrial
    from hf_llfc.calibration import Source as Samples
    from hf_llfc.diagnostics.streaming import Execution

logger = logging.getLogger(__name__)

STAGE = "calibrate"
CALIBRATED_FILE = "calibrated.safetensors"
"""The tensors that calibration changed, in the precision in which it computes, by their names on disk."""
MERGED_FILE = "merged.safetensors"
"""The same tensors as the merge has them, in the dtype of the result."""


FEW_SAMPLES = 64
"""Below these calibration made merges of image classifiers worse (benchmarks/results/calibration.md)."""


@dataclass(frozen=True)
class _Fitted:
    """What a calibration made.

    Attributes:
        tensors: What differs from the merge as it is summed, by names on disk.
        merged: What calibration itself changed, as it was before.
        record: What there is to tell.
    """

    tensors: Mapping[str, Tensor]
    merged: Mapping[str, Tensor]
    record: CalibrationRecord


def calibrated(run: RunContext, merge: Merge | Merges) -> Merge | Merges:
    """The merge with tensors fitted by all processes in the place of its own, where the recipe asks for it."""
    if run.recipe.calibrate is None:
        return merge
    run.on_main(lambda run: _forget_if_damaged(run, merge.infos))
    found = run.stage(STAGE, lambda: fit(run, merge), save=_save, load=lambda journal, value: value)
    if run.on_main(_is_released):
        return merge  # the weights are written
    run.on_main(_drop_parts)
    changed = set(found["tensors"])
    weights = open_safetensors(LocalFiles("the calibrated merge", run.staging / LLFC_FOLDER), CALIBRATED_FILE)
    source = Source("the calibrated merge", weights.read, weights.span)
    parts = [
        replace(part, infos={name: info for name, info in part.infos.items() if name not in changed})
        for part in merge.parts
    ]
    own = Merge.copy(source, {name: info for name, info in merge.infos.items() if name in changed})
    return Merges(merge.infos, tuple(part for part in (*parts, own) if part.infos))


def release(run: RunContext) -> None:
    """Removes the tensors of a calibration, which are written and measured."""
    if STAGE in run.output.journal.stages and not run.output.journal.is_complete:
        run.output.journal.release(STAGE)


def _forget_if_damaged(run: RunContext, infos: Mapping[str, TensorInfo]) -> None:
    """Forgets a calibration whose tensors are gone, and all after it, where a weight file is not as it was written."""
    journal = run.output.journal
    if STAGE not in journal.stages or not _is_released(run):
        return
    layout = ShardLayout.of(infos, run.recipe.max_shard_size)
    if len(whole_shards(run.staging, layout, journal.shards)) < len(layout.shards):
        logger.warning("a weight file is not as it was written; the merge is calibrated again")
        stages = list(journal.stages)
        journal.drop(stages[stages.index(STAGE) :])


def _is_released(run: RunContext) -> bool:
    return not run.output.journal.stages[STAGE]["files"]


def calibration_record(run: RunContext, measured: FittedMeasures | None) -> CalibrationRecord | None:
    """What a finished calibration has to tell; None where there was none.

    Args:
        run: The run.
        measured: The merge before and after, if it was measured.
    """
    if run.recipe.calibrate is None:
        return None
    values = run.on_main(lambda run: run.output.journal.stages[STAGE]["value"]["record"])
    return replace(CalibrationRecord.from_dict(values), measured=measured)


def blend_of(recipe: Recipe) -> tuple[float, ...]:
    """The share of every parent in the blend of features: its weight in a linear merge, where it has one for all."""
    weights = recipe.weights if recipe.method is None and recipe.merge_method == "linear" else None
    if weights is None or min(weights) < 0 or not any(weights):
        weights = (1.0,) * len(recipe.models)
    return tuple(weight / sum(weights) for weight in weights)


@one_thread_if_small(lambda run, *_: run.models.parents[0].nbytes)
def fit(run: RunContext, merge: Merge | Merges) -> _Fitted:
    """Fits the merge; the processes share the samples.

    Raises:
        EvaluationError: There are fewer samples than processes, nothing to calibrate, or a feature is not finite.
    """
    from hf_llfc.calibration import Settings, calibrate_model, choose_ridge
    from hf_llfc.checkpoints import load_model
    from hf_llfc.diagnostics.streaming import Execution

    recipe, processes = run.recipe, run.processes
    section = recipe.calibrate
    assert section is not None
    most = max(len(data) for data in run.fitted_on)
    if most < processes.count:
        raise EvaluationError(f"calibration shares {most} samples among {processes.count} processes; give more samples")
    path = run.output.work / MERGED_FILE
    recomputed = run.on_main(lambda run: _write_merged(run, merge, path))
    dtype = working_dtype(merge.infos)
    model = load_model(run.models.parents[0], state_dict=load_file(path), dtype=dtype).eval()
    parents = [parent.load(dtype) for parent in run.parents]
    for each in (model, *parents):
        each.to(processes.device)
    samples = _samples(run, section)
    settings = Settings(section.method, layers=section.layers, norms=section.norms, own=section.own_input)
    trials = _trials(run, lambda execution: choose_ridge(model, parents, samples, settings, execution=execution))
    settings = replace(settings, ridge=trials[0].ridge if trials else float(section.ridge))
    done = _finished(run)
    numbers = iter(range(len(done) + 1, 1 << 30))
    calibration = calibrate_model(
        model,
        parents,
        samples,
        settings,
        execution=Execution(processes, run.progress),
        finished=done,
        on_finished=lambda part: run.on_main(lambda run: _keep(run.output.journal, next(numbers), part)),
    )
    record = _record(run, calibration, settings.ridge, trials)
    if processes.is_main and (sentence := few_samples(record)) is not None:
        logger.warning("%s", sentence)
    tensors, merged = _changed(merge, model.cpu(), path, recomputed) if processes.is_main else ({}, {})
    return _Fitted(tensors, merged, record)


def _trials(run: RunContext, choose: Callable[[Execution], Sequence[RidgeTrial]]) -> Sequence[RidgeRecord]:
    """The ridges that were tried, the chosen one first; none where the recipe gives it."""
    section = run.recipe.calibrate
    if section is None or section.ridge != AUTO:
        return ()

    from hf_llfc.diagnostics.streaming import Execution

    def progress(_: str, done: int, total: int) -> None:
        run.progress("choosing the ridge", done, total)

    return run.stage(
        f"{STAGE} ridge",
        lambda: [RidgeRecord(**asdict(trial)) for trial in choose(Execution(run.processes, progress))],
        save=lambda journal, trials: ([asdict(trial) for trial in trials], ()),
        load=lambda journal, values: [RidgeRecord(**each) for each in values],
    )


def few_samples(record: CalibrationRecord) -> str | None:
    """Says that samples were few for what was fitted to them; None where there were enough or the ridge was chosen."""
    if record.method == "repair" or record.trials:
        return None
    few = [row for row in record.maps if row.rows < row.inputs]
    if not few and record.samples >= FEW_SAMPLES:
        return None
    found = f"the merge was calibrated from {record.samples} samples"
    if few:
        worst = min(few, key=lambda row: row.rows / row.inputs)
        found += (
            f", {len(few)} of {len(record.maps)} maps from fewer rows than they have inputs ({worst.name}: "
            f"{worst.rows} for {worst.inputs})"
        )
    return (
        f"{found}; with so few it can be worse than before: give more, or `ridge: auto`, which keeps the merge where "
        "held-out samples show no gain"
    )


def _write_merged(run: RunContext, merge: Merge | Merges, path: Path) -> list[str]:
    """Writes the merge as calibration begins with it, with statistics of BatchNorm that belong to it.

    Returns:
        The names of these statistics; none where the model has none, or they are averaged.
    """
    from hf_llfc.checkpoints import load_model, state_dict_on_disk
    from hf_llfc.diagnostics import recompute_batch_norm

    dtype = working_dtype(merge.infos)
    state = {name: tensor for part in merge.parts for name, tensor in _unrounded(part, dtype).tensors()}
    recomputed: list[str] = []
    if (data := run.for_batch_norm) is not None:
        model = load_model(run.models.parents[0], state_dict=state, dtype=dtype)
        recompute_batch_norm(model, data.batches())
        anew = state_dict_on_disk(model)
        recomputed = [name for name, tensor in state.items() if not torch.equal(anew[name], tensor)]
        state |= {name: anew[name].clone() for name in recomputed}
    with storing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return recomputed


def _unrounded(merge: Merge, dtype: torch.dtype) -> Merge:
    """The merge, rounded to the precision of the calibration only."""
    return replace(merge, infos=merged_infos(merge.infos, dtype))


def _samples(run: RunContext, section: CalibrateSection) -> list[Samples]:
    """The batches of this process, and the blend that is the target on them."""
    from hf_llfc.calibration import Source as Samples

    count, processes = len(run.parents), run.processes
    blends = [blend_of(run.recipe)]
    if section.targets == "own":
        blends = [tuple(float(own == index) for own in range(count)) for index in range(count)]
    return [
        Samples(list(data.batches(processes.rank, processes.count)), blend)
        for data, blend in zip(run.fitted_on, blends, strict=True)
    ]


def _record(
    run: RunContext, calibration: Calibration, ridge: float, trials: Sequence[RidgeRecord]
) -> CalibrationRecord:
    section, changes = run.recipe.calibrate, calibration.changes
    assert section is not None
    apart = sum(row.apart**2 for row in changes) ** 0.5
    own = section.targets == "own"
    return CalibrationRecord(
        method=section.method,
        targets=section.targets,
        ridge=ridge if section.method == "calibrate" else None,
        trials=tuple(trials),
        own_input=section.own_input,
        data=tuple(dict(data.summary) for data in run.fitted_on),
        samples=sum(len(data) for data in run.fitted_on),
        blend=() if own else blend_of(run.recipe),
        moved=sum(row.change**2 for row in changes) ** 0.5 / apart if apart else None,
        maps=tuple(MapRecord(row.name, row.rows, row.inputs, row.moved, row.before, row.after) for row in changes),
        left=dict(calibration.left),
    )


def _changed(
    merge: Merge | Merges, model: PreTrainedModel, path: Path, recomputed: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors on disk that differ from the merge, and what of them the merge has where calibration changed it."""
    from hf_llfc.checkpoints import state_dict_on_disk

    state = state_dict_on_disk(model)
    tensors = {name: state[name] for name in recomputed}
    merged = {}
    with safe_open(path, "pt") as before:
        for name, info in merge.infos.items():
            if name in state and not torch.equal(state[name], tensor := before.get_tensor(name)):
                tensors[name], merged[name] = state[name], tensor.to(info.dtype)
    return tensors, merged


def _save(journal: Journal, fitted: _Fitted) -> tuple[dict[str, Any], Iterable[Path]]:
    folder = journal.folder / LLFC_FOLDER
    folder.mkdir(exist_ok=True)
    files = {CALIBRATED_FILE: fitted.tensors, MERGED_FILE: fitted.merged}
    for name, tensors in files.items():
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, folder / name)
    return {"tensors": list(fitted.tensors), "record": fitted.record.to_dict()}, [folder / name for name in files]


def _keep(journal: Journal, number: int, part: Finished) -> None:
    """Notes a part of the calibration, so that an interrupted run goes on after it."""
    path = journal.folder / LLFC_FOLDER / f"calibration-{number:04}.safetensors"
    with storing(journal.folder):
        path.parent.mkdir(exist_ok=True)
        save_file({name: tensor.cpu().contiguous() for name, tensor in part.tensors.items()}, path)
    journal.finish(f"{STAGE} {number}", [asdict(row) for row in part.changes], [path])


def _finished(run: RunContext) -> list[Finished]:
    """The parts that an interrupted run had finished."""
    from hf_llfc.calibration import Finished, MapChange

    parts = run.on_main(lambda run: list(_parts(run.output.journal)))
    return [
        Finished(tuple(MapChange(**row) for row in rows), load_file(run.staging / file, str(run.processes.device)))
        for rows, file in parts
    ]


def _parts(journal: Journal) -> Iterator[tuple[list[dict[str, Any]], str]]:
    """The maps of every finished part, in order, and its file."""
    number = 1
    while (entry := journal.stages.get(f"{STAGE} {number}")) is not None:
        yield entry["value"], next(iter(entry["files"]))
        number += 1


def _drop_parts(run: RunContext) -> None:
    """Forgets the parts of a calibration that is finished."""
    journal = run.output.journal
    journal.drop([name for name in journal.stages if name.startswith(f"{STAGE} ")])
    (run.output.work / MERGED_FILE).unlink(missing_ok=True)
