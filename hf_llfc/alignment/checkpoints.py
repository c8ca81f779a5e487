"""The alignment of one checkpoint onto another, by each of the methods that a recipe can name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from hf_llfc.checkpoints import Checkpoint
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.parallel.workers import ALONE, Workers
from hf_llfc.parents.parent import Parent, open_data
from hf_llfc.parents.provenance import identified
from hf_llfc.parents.specs import alignment_spec, bind
from hf_llfc.recipe import AlignSection
from hf_llfc.symmetry import Alignment, PermutationSpec

# What opens data and runs models is imported where it is called: a merge alone does not wait for it to load.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_llfc.alignment import Parameters
    from hf_llfc.evaluation import EvaluationConfig


Found = TypeVar("Found")


def align_checkpoints(
    reference: Checkpoint,
    model: Checkpoint,
    options: AlignSection,
    *,
    workers: Workers | None = None,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> Alignment | None:
    """Finds the transforms that bring a model into the coordinates of a reference.

    Args:
        reference: The model that stays.
        model: The model that moves.
        options: How.
        workers: Threads and processes that share the work, and where tensors are multiplied; as many threads as torch
            has where None.
        device: Where models run that matching looks at or learns from; the CPU where None.
        progress: Shown meanwhile.

    Returns:
        The alignment, with the method, both objectives and the fingerprints of both inputs in its metadata; None for
        the method `none`.

    Raises:
        SpecError: The architecture has no adapter, or a checkpoint does not fit it.
    """
    if options.method == "none":
        return None
    from hf_llfc.alignment import match_weights

    workers = workers if workers is not None else Workers(torch.get_num_threads())
    from_activations = None
    if "activation_matching" in (options.method, options.start):
        from_activations = match_by_activations(reference, model, options, workers, device)
    if options.method != "activation_matching":
        alignment = match_weights(
            *parameters_of([reference, model], options, workers),
            restarts=options.restarts,
            max_sweeps=options.max_sweeps,
            seed=options.seed,
            start=from_activations,
            solver=options.solver,
            workers=workers,
            progress=progress,
        )
    else:
        assert from_activations is not None
        alignment = from_activations
    if options.method == "commutativity_matching":
        start = alignment
        alignment = _on_first(workers, lambda: _match_commutativity(reference, model, start, options, device, progress))
    if options.method == "learned_matching":
        alignment = _learn(reference, model, alignment, options, workers, device, progress)
    return identified(alignment, reference, model, options, workers)


def parameters_of(
    checkpoints: Sequence[Checkpoint], options: AlignSection, workers: Workers = ALONE
) -> list[Parameters]:
    """What weight matching reads of checkpoints of one architecture, where the workers multiply it."""
    from hf_llfc.alignment import Parameters
    from hf_llfc.alignment.sources import anchors_of

    spec = alignment_spec(checkpoints[0], options)
    weight = options.anchors if options.anchors is not None else anchors_of(spec)
    return [
        Parameters(bind(spec, each), each.read, each.label, workers.device).with_anchors(weight) for each in checkpoints
    ]


def match_by_activations(
    reference: Checkpoint,
    model: Checkpoint,
    options: AlignSection,
    workers: Workers,
    device: torch.device | None = None,
) -> Alignment:
    """Activation matching, for which both models are in memory of the first process alone; all get what it found."""
    spec = alignment_spec(reference, options)
    return _on_first(workers, lambda: _match_activations(reference, model, spec, options, device))


def match_universe_by_activations(
    checkpoints: Sequence[Checkpoint],
    reference: int,
    options: AlignSection,
    workers: Workers,
    device: torch.device | None = None,
) -> list[Alignment]:
    """All models aligned to each other by their activations, all in memory of the first process alone."""
    return _on_first(workers, lambda: _match_universe_by_activations(checkpoints, reference, options, device))


def _on_first(workers: Workers, match: Callable[[], Found]) -> Found:
    """What the first process finds, on all."""
    found: Found = workers.gather(match() if workers.rank == 0 else None)[0]
    return found


def _match_universe_by_activations(
    checkpoints: Sequence[Checkpoint], reference: int, options: AlignSection, device: torch.device | None
) -> list[Alignment]:
    assert options.calibration is not None
    from hf_llfc.alignment import Parameters, match_universe
    from hf_llfc.alignment.universe_of_activations import match_universe_of_activations

    spec = alignment_spec(checkpoints[reference], options)
    with _running(checkpoints, options.calibration, device) as (models, batches):
        held = match_universe_of_activations(
            models,
            batches,
            spec,
            reference=reference,
            restarts=options.restarts,
            max_sweeps=options.max_sweeps,
            seed=options.seed,
        )
    unmatched = next(each for place, each in enumerate(held) if place != reference).metadata["unmatched"]
    if not unmatched:
        return held
    rest = spec.keep(*unmatched)
    by_weights = match_universe(
        [
            Parameters.from_state_dict(rest, alignment.apply(dict(each.state_dict())))
            for alignment, each in zip(held, checkpoints, strict=True)
        ],
        reference=reference,
        restarts=options.restarts,
        max_sweeps=options.max_sweeps,
        seed=options.seed,
    )
    return [
        alignment.then(other).with_metadata(**alignment.metadata)
        for alignment, other in zip(held, by_weights, strict=True)
    ]


def _loaded(checkpoints: Sequence[Checkpoint], device: torch.device | None) -> list[PreTrainedModel]:
    """Models on a device; the CPU where None."""
    place: Any = device or "cpu"  # the signature of `to` is hidden
    return [Parent(checkpoint).load().to(place) for checkpoint in checkpoints]


@contextmanager
def _running(
    checkpoints: Sequence[Checkpoint], calibration: EvaluationConfig, device: torch.device | None
) -> Iterator[tuple[list[PreTrainedModel], Iterator[dict[str, Tensor]]]]:
    """Models in evaluation mode, and the inputs of calibration data as the first of them takes them."""
    from hf_llfc.evaluation.models import evaluation_mode, model_inputs

    models = _loaded(checkpoints, device)
    data = open_data(calibration, checkpoints[0])
    with evaluation_mode(*models):
        yield models, (model_inputs(batch, models[0]) for batch, _ in data.batches())


def _match_commutativity(
    reference: Checkpoint,
    model: Checkpoint,
    start: Alignment,
    options: AlignSection,
    device: torch.device | None,
    progress: Progress,
) -> Alignment:
    assert options.calibration is not None
    from hf_llfc.alignment.commutativity_matching import match_commutativity

    with _running([reference, model], options.calibration, device) as (models, batches):
        return match_commutativity(models[0], models[1], batches, start.spec, start, progress=progress)


def _learn(
    reference: Checkpoint,
    model: Checkpoint,
    start: Alignment,
    options: AlignSection,
    workers: Workers,
    device: torch.device | None,
    progress: Progress,
) -> Alignment:
    """Learned matching from a start; processes share each step's samples."""
    assert options.calibration is not None
    from hf_llfc.alignment.learned_matching import LEARNING_RATE, STEPS, Learning, learn_matching
    from hf_llfc.diagnostics.features.layers import select_layers
    from hf_llfc.diagnostics.objectives import LLFCGap, TaskLoss

    models = _loaded([reference, model], device)
    data = open_data(options.calibration, reference)
    share = (workers.rank, workers.ranks) if len(data.sample_ids) >= workers.ranks else (0, 1)
    batches = [batch for batch, _ in data.batches(*share)]
    objective = (
        TaskLoss(models[0], data.task) if data.labelled else LLFCGap(models[0], select_layers(models[0], batches[0]))
    )
    learned = learn_matching(
        models[0],
        models[1],
        _in_random_order(batches, options.seed),
        start.spec,
        start,
        objective,
        learning=Learning(
            steps=options.steps or STEPS, learning_rate=options.learning_rate or LEARNING_RATE, seed=options.seed
        ),
        average=_mean_over_processes if workers.ranks > 1 else None,
        progress=progress,
    )
    return _on_first(workers, lambda: learned)


def _in_random_order(batches: Sequence[Mapping[str, Tensor]], seed: int) -> Iterator[Mapping[str, Tensor]]:
    """The batches without end, in another order each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[place]


def _mean_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replaces gradients by their mean over the processes of a launcher."""
    from accelerate.utils import reduce

    flat: Tensor = reduce(torch.cat([tensor.flatten() for tensor in tensors]), reduction="mean")
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _match_activations(
    reference: Checkpoint,
    model: Checkpoint,
    spec: PermutationSpec,
    options: AlignSection,
    device: torch.device | None,
) -> Alignment:
    assert options.calibration is not None
    from hf_llfc.alignment import Parameters, match_activations, match_weights

    with _running([reference, model], options.calibration, device) as (models, batches):
        alignment = match_activations(models[0], models[1], batches, spec)
    if alignment.metadata["unmatched"]:
        # What no linear map shows (experts fused into one tensor) is matched by its weights, the rest held.
        held = alignment
        rest = spec.keep(*alignment.metadata["unmatched"])
        parameters = [
            Parameters.from_state_dict(rest, state)
            for state in (dict(reference.state_dict()), held.apply(dict(model.state_dict())))
        ]
        by_weights = match_weights(*parameters, restarts=options.restarts, seed=options.seed)
        alignment = held.then(by_weights).with_metadata(**held.metadata)
    return alignment
