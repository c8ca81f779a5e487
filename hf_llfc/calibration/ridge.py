"""The ridge of a calibration, chosen on samples that were held out of it.

Shape legend: n samples, c classes or vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llfc.calibration.engine import DEFAULTS, Batch, Settings, Source, calibrate_model
from hf_llfc.calibration.replay import answer_in, answer_of
from hf_llfc.diagnostics.streaming import IN_ONE_PROCESS, Execution
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.models import forward, logits_in, predictions_in

RIDGES = (0.001, 0.01, 0.1, 1.0, 10.0, 1000.0)
"""What is tried; with the last the merge stays as it is, to a thousandth."""

PARTS = 4
"""One of so many parts of the samples is held out."""

FEW = 64
"""Samples below which every part is held out in turn."""


@dataclass(frozen=True)
class RidgeTrial:
    """What one ridge came to.

    Attributes:
        ridge: See `Settings`.
        divergence: KL(blend of the parents' logits ‖ merge) in nats, the mean over held-out samples; of a model without
            logits the squared distance of its first output from the blend, over the square of that.
        error: Standard error of its difference from the least of all ridges, over samples; 0 for that one.
    """

    ridge: float
    divergence: float
    error: float


def choose_ridge(
    model: PreTrainedModel,
    parents: Sequence[PreTrainedModel],
    sources: Sequence[Source],
    settings: Settings = DEFAULTS,
    *,
    ridges: Sequence[float] = RIDGES,
    execution: Execution = IN_ONE_PROCESS,
) -> tuple[RidgeTrial, ...]:
    """Tries ridges on three quarters of the samples, and measures each on the rest; of few samples, on every quarter.

    Args:
        model: The merge; it is the same afterwards.
        parents: As for `calibrate_model`.
        sources: Samples of this process.
        settings: All but the ridge.
        ridges: What to try.
        execution: Processes and progress.

    Returns:
        One trial a ridge, the chosen one first: the largest whose divergence is not above the least by more than a
        standard error.

    Raises:
        EvaluationError: There are too few samples.
    """
    own = sum(len(ids) for source in sources for _, ids in source.batches)
    of_processes = [own] if execution.processes is None else execution.processes.gather(own)
    samples = sum(of_processes)
    if samples < PARTS or min(of_processes) < 2:
        shared = f", and 2 for each of {len(of_processes)} processes" if len(of_processes) > 1 else ""
        raise EvaluationError(
            f"ridge: auto needs {PARTS} samples or more{shared}; give more, or a number for the ridge"
        )
    start = {name: value.clone() for name, value in model.state_dict().items()}
    found: list[list[Tensor]] = [[] for _ in ridges]
    for part in range(PARTS if samples < FEW else 1):
        fitted, held_out = _split(sources, part)
        for values_of, ridge in zip(found, ridges, strict=True):
            calibrate_model(model, parents, fitted, replace(settings, ridge=ridge), execution=execution)
            values_of.append(_distances(model, parents, held_out, execution))
            model.load_state_dict(start)
    values = [torch.cat(values_of) for values_of in found]
    means = [float(each.mean()) for each in values]
    best = min(range(len(ridges)), key=means.__getitem__)
    trials = []
    for ridge, mean, values_n in zip(ridges, means, values, strict=True):
        difference_n = values_n - values[best]
        error = float(difference_n.std()) / math.sqrt(len(values_n)) if len(values_n) > 1 else 0.0
        trials.append(RidgeTrial(ridge, mean, error))
    near = [trial for trial in trials if trial.divergence <= means[best] + trial.error]
    chosen = max(near, key=lambda trial: trial.ridge)
    return (chosen, *(trial for trial in trials if trial is not chosen))


def _split(sources: Sequence[Source], part: int) -> tuple[list[Source], list[Source]]:
    """Samples to fit on, and one part of them to measure on; of two samples or more some are fitted on."""
    found: tuple[list[Source], list[Source]] = ([], [])
    seen = 0
    for source in sources:
        parts: tuple[list[tuple[Batch, Tensor]], list[tuple[Batch, Tensor]]] = ([], [])
        for batch, ids in source.batches:
            held = (torch.arange(len(ids)) + seen) % PARTS == part
            seen += len(ids)
            for batches, chosen in zip(parts, (~held, held), strict=True):
                if chosen.any():
                    batches.append(({name: value[chosen] for name, value in batch.items()}, ids[chosen]))
        for half, batches in zip(found, parts, strict=True):
            half.append(replace(source, batches=batches))
    return found


def _blended(parents: Sequence[PreTrainedModel], batch: Batch, weights: Sequence[float]) -> Tensor:
    """The blend of what the parents answer."""
    answers = [answer_of(parent, batch) * weight for parent, weight in zip(parents, weights, strict=True) if weight]
    return torch.stack(answers).sum(0)


@torch.no_grad()
def _distances(
    model: PreTrainedModel, parents: Sequence[PreTrainedModel], held_out: Sequence[Source], execution: Execution
) -> Tensor:
    """Distance from the blend, (n,) over the samples of all processes; the mean over the tokens of each sample."""
    found = [  # logits of one batch at a time are in memory
        _of_samples(_blended(parents, batch, source.weights), model, batch)
        for source in held_out
        for batch, _ in source.batches
    ]
    own = torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)
    return own if execution.processes is None else torch.cat(execution.processes.gather(own.cpu()))


def _of_samples(blend: Tensor, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    output = forward(model, batch)
    answer, has_logits = answer_in(output), logits_in(output) is not None
    values = []
    for index in range(len(blend)):
        sample = {name: value[index : index + 1] for name, value in batch.items()}
        target_nc, own_nc = (predictions_in(each[index : index + 1], sample).double() for each in (blend, answer))
        if has_logits:
            target_nc, own_nc = target_nc.log_softmax(-1), own_nc.log_softmax(-1)
            values.append((target_nc.exp() * (target_nc - own_nc)).sum(-1).mean())
        else:
            values.append((target_nc - own_nc).square().sum() / target_nc.square().sum())
    return torch.stack(values)
