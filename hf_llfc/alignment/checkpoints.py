"""The alignment of one checkpoint onto another, by each of the methods that a recipe can name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from hf_llfc.checkpoints import Checkpoint
from hf_llfc.errors import AlignmentError
from hf_llfc.foundation.choices import METHODS_WITH_DATA
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.parallel.threads import one_thread_if_small
from hf_llfc.parallel.workers import ALONE, Workers
from hf_llfc.parents.data import open_data
from hf_llfc.parents.parent import Parent
from hf_llfc.parents.provenance import identified
from hf_llfc.parents.specs import alignment_spec, bind
from hf_llfc.recipe import AlignSection
from hf_llfc.symmetry import Alignment

# What opens data and runs models is imported where it is called: a merge alone does not wait for it to load.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_llfc.alignment import Parameters
    from hf_llfc.evaluation import EvaluationConfig


Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


@one_thread_if_small(lambda reference, *_, **__: reference.nbytes)
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
        options: Method, and how it searches.
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
    from hf_llfc.alignment import Search, match_weights

    workers = workers if workers is not None else Workers(torch.get_num_threads())
    alignment = None
    if "activation_matching" in (options.method, options.start):
        alignment = on_first(workers, match_by_activations, reference, model, options, device)
    if options.method != "activation_matching":
        parameters = parameters_of([reference, model], options, workers)
        alignment = match_weights(
            *parameters, search=Search.of(options), start=alignment, workers=workers, progress=progress
        )
    assert alignment is not None
    if options.method == "commutativity_matching":
        alignment = on_first(workers, _match_by_commutativity, reference, model, alignment, options, device, progress)
    if options.method == "learned_matching":
        alignment = _learn(reference, model, alignment, options, workers, device, progress)
    return identified(alignment, reference, model, options, workers)


def parameters_of(
    checkpoints: Sequence[Checkpoint], options: AlignSection, workers: Workers = ALONE
) -> list[Parameters]:
    """Parameters for weight matching of checkpoints of one architecture, on the device where the workers multiply."""
    from hf_llfc.alignment import Parameters
    from hf_llfc.alignment.sources import anchors_of

    spec = alignment_spec(checkpoints[0], options)
    weight = options.anchors if options.anchors is not None else anchors_of(spec)
    return [
        Parameters(bind(spec, checkpoint), checkpoint.read, checkpoint.label, workers.device).with_anchors(weight)
        for checkpoint in checkpoints
    ]


def on_first(
    workers: Workers, match: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """Calls a function on the first process, which alone holds its models in memory, and gives its result to all."""
    result: Result = workers.gather(match(*args, **kwargs) if workers.rank == 0 else None)[0]
    return result


def match_by_activations(
    reference: Checkpoint, model: Checkpoint, options: AlignSection, device: torch.device | None = None
) -> Alignment:
    """Aligns a model onto a reference by activations, both in memory; axes that no activation shows, by weights."""
    from hf_llfc.alignment import Parameters, Search, match_activations, match_weights

    spec = alignment_spec(reference, options)
    with _running([reference, model], options, device) as (models, batches):
        alignment = match_activations(models[0], models[1], batches, spec)
    if not alignment.metadata["unmatched"]:
        return alignment
    # No linear map shows these (experts fused into one tensor, for example).
    rest = spec.keep(*alignment.metadata["unmatched"])
    parameters = [
        Parameters.from_state_dict(rest, state)
        for state in (dict(reference.state_dict()), alignment.apply(dict(model.state_dict())))
    ]
    by_weights = match_weights(*parameters, search=Search(options.restarts, seed=options.seed))
    return alignment.then(by_weights).with_metadata(**alignment.metadata)


def match_universe_by_activations(
    checkpoints: Sequence[Checkpoint], reference: int, options: AlignSection, device: torch.device | None = None
) -> list[Alignment]:
    """Aligns models to each other by activations, all in memory; axes that no activation shows, by weights."""
    from hf_llfc.alignment import Parameters, Search, match_universe
    from hf_llfc.alignment.universe_of_activations import match_universe_of_activations

    spec = alignment_spec(checkpoints[reference], options)
    search = replace(Search.of(options), solver="exact")
    with _running(checkpoints, options, device) as (models, batches):
        alignments = match_universe_of_activations(models, batches, spec, search=search, reference=reference)
    unmatched = alignments[0 if reference else 1].metadata["unmatched"]
    if not unmatched:
        return alignments
    rest = spec.keep(*unmatched)
    parameters = [
        Parameters.from_state_dict(rest, alignment.apply(dict(checkpoint.state_dict())))
        for alignment, checkpoint in zip(alignments, checkpoints, strict=True)
    ]
    return [
        alignment.then(by_weights).with_metadata(**alignment.metadata)
        for alignment, by_weights in zip(
            alignments, match_universe(parameters, search=search, reference=reference), strict=True
        )
    ]


def _calibration(options: AlignSection) -> EvaluationConfig:
    """Data on which models are run.

    Raises:
        AlignmentError: There are none.
    """
    if options.calibration is None:
        method = next(name for name in (options.method, options.start) if name in METHODS_WITH_DATA)
        raise AlignmentError(
            f"{method.replace('_', ' ')} needs calibration data: give `align.calibration` in a recipe, or --dataset"
        )
    return options.calibration


def _loaded(checkpoints: Sequence[Checkpoint], device: torch.device | None) -> list[PreTrainedModel]:
    """Models on a device; the CPU where None."""
    target: Any = device or "cpu"  # the signature of `to` is hidden
    return [Parent(checkpoint).load().to(target) for checkpoint in checkpoints]


@contextmanager
def _running(
    checkpoints: Sequence[Checkpoint], options: AlignSection, device: torch.device | None
) -> Iterator[tuple[list[PreTrainedModel], Iterator[dict[str, Tensor]]]]:
    """Models in evaluation mode, and the inputs of calibration data as the first of them takes them."""
    calibration = _calibration(options)
    from hf_llfc.evaluation.models import evaluation_mode, model_inputs

    models = _loaded(checkpoints, device)
    data = open_data(calibration, checkpoints[0])
    with evaluation_mode(*models):
        yield models, (model_inputs(batch, models[0]) for batch, _ in data.batches())


def _match_by_commutativity(
    reference: Checkpoint,
    model: Checkpoint,
    start: Alignment,
    options: AlignSection,
    device: torch.device | None,
    progress: Progress,
) -> Alignment:
    """Aligns a model onto a reference by the commutativity of their layers, from a start."""
    from hf_llfc.alignment.commutativity_matching import match_commutativity

    with _running([reference, model], options, device) as (models, batches):
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
    """Aligns a model onto a reference by gradient descent from a start; processes share each step's samples."""
    calibration = _calibration(options)
    from hf_llfc.alignment.learned_matching import LEARNING_RATE, STEPS, Learning, learn_matching
    from hf_llfc.diagnostics.features.layers import select_layers
    from hf_llfc.diagnostics.objectives import LLFCGap, TaskLoss

    models = _loaded([reference, model], device)
    data = open_data(calibration, reference)
    share = (workers.rank, workers.ranks) if len(data.sample_ids) >= workers.ranks else (0, 1)
    batches = [batch for batch, _ in data.batches(*share)]
    objective = (
        TaskLoss(models[0], data.task) if data.labelled else LLFCGap(models[0], select_layers(models[0], batches[0]))
    )
    learning = Learning(
        steps=options.steps or STEPS,
        learning_rate=options.learning_rate or LEARNING_RATE,
        seed=options.seed,
        average=_mean_over_processes if workers.ranks > 1 else None,
    )
    in_random_order = _in_random_order(batches, options.seed)
    learned = learn_matching(
        models[0], models[1], in_random_order, start, objective, learning=learning, progress=progress
    )
    return on_first(workers, lambda: learned)


def _in_random_order(batches: Sequence[Mapping[str, Tensor]], seed: int) -> Iterator[Mapping[str, Tensor]]:
    """The batches without end, in another order each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]


def _mean_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replaces gradients by their mean over the processes of a launcher."""
    from accelerate.utils import reduce

    flat: Tensor = reduce(torch.cat([tensor.flatten() for tensor in tensors]), reduction="mean")
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
