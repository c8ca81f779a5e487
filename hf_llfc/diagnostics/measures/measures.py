"""What is measured besides LLFC, on one pass of the data.

Of two models additivity, commutativity, stitching and geometry, as in the LLFC paper; of a merge of any number of
models where it breaks, the ways over it, whose weights matter, which units are active, where classes come apart, and
where answers settle. Each measure runs the models itself, so that none can disturb another; those that only look at
features share their passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from hf_llfc.diagnostics.measures.activity import Activity
from hf_llfc.diagnostics.measures.additivity import Additivity
from hf_llfc.diagnostics.measures.blocks import Blocks
from hf_llfc.diagnostics.measures.classes import Classes
from hf_llfc.diagnostics.measures.commutativity import Commutativity
from hf_llfc.diagnostics.measures.geometry import Geometry
from hf_llfc.diagnostics.measures.passes import Passes, Watcher
from hf_llfc.diagnostics.measures.sensitivity import Importance
from hf_llfc.diagnostics.measures.settling import Settling
from hf_llfc.diagnostics.measures.star import Star
from hf_llfc.diagnostics.measures.stitching import Stitching
from hf_llfc.diagnostics.measures.subject import Subject
from hf_llfc.diagnostics.points import DEFAULT_ALPHAS
from hf_llfc.diagnostics.streaming import IN_ONE_PROCESS, Execution, over_batches
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.data import EvaluationData
from hf_llfc.evaluation.models import evaluation_mode
from hf_llfc.foundation.choices import PAIR_MEASURES
from hf_llfc.recipe.data import CLASSIFICATION_TASKS


class Measure(Protocol):
    """A measurement in progress, one of `PAIR_MEASURES`."""

    sums: Any

    def add(self, batch: Mapping[str, torch.Tensor], sample_ids: torch.Tensor) -> None:
        """Runs both models on a batch and adds to the sums."""

    def rows(self, sums: Any) -> tuple[Any, ...]:
        """Rows of the report, from the sums of all processes."""


@dataclass
class _AllSums:
    """The sums of several measures, by their names."""

    by_name: dict[str, Any]

    def merge(self, other: _AllSums) -> None:
        for name, sums in self.by_name.items():
            sums.merge(other.by_name[name])

    def cpu(self) -> _AllSums:
        return _AllSums({name: sums.cpu() for name, sums in self.by_name.items()})


def check_measures(names: Sequence[str], data: EvaluationData, alphas: Sequence[float]) -> None:
    """Rejects measures that cannot be taken, before anything is run.

    Args:
        names: Of `MEASURES`.
        data: The samples.
        alphas: Where additivity is to be measured.

    Raises:
        EvaluationError: Data or alphas do not fit a measure.
    """
    if "additivity" in names and not any(0 < alpha < 1 for alpha in alphas):
        raise EvaluationError("additivity is measured between the models: give an alpha between 0 and 1")
    if "classes" in names and not (data.labelled and data.task in CLASSIFICATION_TASKS):
        raise EvaluationError(
            "classes compares samples of different classes, and these have no class labels; give labelled data of a "
            "classification task, or leave classes out of the measures"
        )
    if "stitching" in names and not data.labelled:
        raise EvaluationError(
            "stitching measures loss and metrics, and the data have no labels; give labelled data, or leave stitching "
            "out of the measures"
        )


def run_measures(
    names: Sequence[str],
    model_a: PreTrainedModel,
    model_b: PreTrainedModel,
    data: EvaluationData,
    *,
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    layers: Sequence[str] | None = None,
    execution: Execution = IN_ONE_PROCESS,
) -> dict[str, tuple[Any, ...]]:
    """Measures a pair.

    Args:
        names: Of `PAIR_MEASURES`.
        model_a: The model with weight α.
        model_b: The model with weight 1 − α, already aligned onto the first, on the same device.
        data: The samples; stitching needs labels.
        alphas: Where additivity is measured; the ends, where it holds by definition, are left out.
        layers: Where to stitch, and whose features' geometry to measure: patterns or words of `select_layers`; every
            block without them.
        execution: Processes and progress.

    Returns:
        Rows by the name of the measure, which is also that of the report's part: `AdditivityRow`, `CommutativityRow`,
        `StitchingPoint` or `GeometryRow`.

    Raises:
        EvaluationError: A name is unknown, a model or the data do not fit a measure, or a feature is not finite.
    """
    check_measures(names, data, alphas)
    if not names:
        return {}
    rank, world = execution.share
    inside = [alpha for alpha in alphas if 0 < alpha < 1]
    with evaluation_mode(model_a, model_b):
        batch, _ = next(data.batches())
        makers: dict[str, Callable[[], Measure]] = {
            "additivity": lambda: Additivity(model_a, model_b, batch, inside),
            "commutativity": lambda: Commutativity(model_a, model_b, batch),
            "stitching": lambda: Stitching(model_a, model_b, batch, data, layers),
            "geometry": lambda: Geometry(model_a, model_b, batch, layers, rank=rank, world=world),
        }
        return _measured({name: makers[name]() for name in PAIR_MEASURES if name in names}, data, execution)


def run_merge_measures(
    names: Sequence[str],
    subject: Subject,
    data: EvaluationData,
    *,
    layers: Sequence[str] | None = None,
    execution: Execution = IN_ONE_PROCESS,
) -> dict[str, tuple[Any, ...]]:
    """Measures a merge of any number of models.

    Args:
        names: Of `MERGE_MEASURES`.
        subject: The merge and its models.
        data: The samples; classes need labels.
        layers: In which layers classes are looked at: patterns or words of `select_layers`; every block without them.
        execution: Processes and progress.

    Returns:
        Rows by the name of the measure, which is also that of the report's part: `BlockRow`, `FoldRow`,
        `ImportanceRow`, `UnitsRow`, `ClassesRow` or `SettlingRow`.

    Raises:
        EvaluationError: A model or the data do not fit a measure, or a feature is not finite.
    """
    check_measures(names, data, DEFAULT_ALPHAS)
    if not names:
        return {}
    with evaluation_mode(*subject.models, subject.merge):
        batch, _ = next(data.batches())
        makers: dict[str, Callable[[], Measure]] = {
            "blocks": lambda: Blocks(subject, batch, data),
            "fold": lambda: Star(subject, data),
            "importance": lambda: Importance(subject, batch, data),
            "units": lambda: Activity(subject, batch),
        }
        watching: dict[str, Callable[[], Watcher]] = {
            "classes": lambda: Classes(subject, batch, data, layers),
            "settling": lambda: Settling(subject, batch),
        }
        passes = Passes(subject, {name: watching[name]() for name in watching if name in names})
        measures = {name: makers[name]() for name in makers if name in names}
        return _measured(measures, data, execution, passes)


def _measured(
    measures: Mapping[str, Measure], data: EvaluationData, execution: Execution, passes: Passes | None = None
) -> dict[str, tuple[Any, ...]]:
    """Rows of measures that have seen all samples."""
    watchers = passes.watchers if passes is not None else {}

    def add(batch: Mapping[str, torch.Tensor], sample_ids: torch.Tensor) -> None:
        for measure in measures.values():
            measure.add(batch, sample_ids)
        if passes is not None and watchers:
            passes.add(batch, sample_ids)

    every: dict[str, Measure | Watcher] = {**measures, **watchers}
    own = _AllSums({name: measure.sums for name, measure in every.items()})
    sums = over_batches(data, add, own, "measuring", execution)
    return {name: measure.rows(sums.by_name[name]) for name, measure in every.items()}
