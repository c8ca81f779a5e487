"""Several models in the coordinates of one: each aligned onto it, by way of a centre among them, or all together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import torch

from hf_llfc.alignment.checkpoints import (
    align_checkpoints,
    match_by_activations,
    match_universe_by_activations,
    on_first,
    parameters_of,
)
from hf_llfc.checkpoints import Checkpoint
from hf_llfc.foundation.model_names import portable
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.parallel.threads import one_thread_if_small
from hf_llfc.parallel.workers import Workers
from hf_llfc.parents.probe import probed
from hf_llfc.parents.provenance import identified
from hf_llfc.recipe import AlignSection
from hf_llfc.symmetry import Alignment

Align = Callable[[Checkpoint, Checkpoint, AlignSection], Alignment | None]


@one_thread_if_small(lambda reference, *_, **__: reference.nbytes)
def align_all(
    reference: Checkpoint,
    models: Sequence[Checkpoint],
    options: AlignSection,
    *,
    workers: Workers | None = None,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> list[Alignment | None]:
    """Finds the transforms that bring models into the coordinates of a reference, which may be one of them.

    Where there are three models or more, the reference included, `together` in the options says how:

    - `reference`: each is aligned onto the reference and knows nothing of the others;
    - `star`: each is aligned onto the centre, the model from which all others are least far. For that all pairs are
      matched by their weights, and the smallest sum of squared distances wins;
    - `universe`: all are aligned to each other at once, by weights or by activations, see `hf_llfc.alignment.universe`.

    The last two then move all models alike, so that the reference is where it was.

    Args:
        reference: The model that stays.
        models: The models to align.
        options: Method, how it searches, and which models are aligned together.
        workers: Threads and processes that share the work, see `align_checkpoints`.
        device: Device where models run, see `align_checkpoints`.
        progress: Shown meanwhile.

    Returns:
        One alignment a model, probed where the options ask for it; None for the reference, and for the method `none`.

    Raises:
        SpecError: The architecture has no adapter, or a checkpoint does not fit it.
        AlignmentError: A model answers otherwise after it is moved, see `hf_llfc.parents.probe`.
    """
    workers = workers if workers is not None else Workers(torch.get_num_threads())
    found = _matched_all(reference, models, options, workers, device, progress)
    return [
        probed(alignment, model, asked=options.probe, workers=workers, progress=progress)
        for alignment, model in zip(found, models, strict=True)
    ]


def _matched_all(
    reference: Checkpoint,
    models: Sequence[Checkpoint],
    options: AlignSection,
    workers: Workers,
    device: torch.device | None,
    progress: Progress,
) -> list[Alignment | None]:
    """Finds the transforms, see `align_all`."""

    def align(onto: Checkpoint, model: Checkpoint, options: AlignSection) -> Alignment | None:
        return align_checkpoints(onto, model, options, workers=workers, device=device, progress=progress)

    everyone = [*([] if any(model is reference for model in models) else [reference]), *models]
    if options.method == "none" or options.together == "reference" or len(everyone) < 3:
        return [None if model is reference else align(reference, model, options) for model in models]
    index = next(index for index, model in enumerate(everyone) if model is reference)
    if options.together == "universe":
        alignments = _in_universe(everyone, index, options, workers, device, progress)
    else:
        alignments = _around_centre(everyone, index, options, align, workers)
    return [
        None if model is reference else identified(alignment, reference, model, options, workers)
        for model, alignment in zip(everyone, alignments, strict=True)
    ][-len(models) :]


def _in_universe(
    models: Sequence[Checkpoint],
    reference: int,
    options: AlignSection,
    workers: Workers,
    device: torch.device | None,
    progress: Progress,
) -> list[Alignment]:
    """Aligns all models to each other at once."""
    from hf_llfc.alignment import Search, match_universe
    from hf_llfc.alignment.universe import closeness_of_all
    from hf_llfc.alignment.weight_matching import closeness_of

    parameters = parameters_of(models, options, workers)
    if options.method == "activation_matching":
        alignments = on_first(workers, match_universe_by_activations, models, reference, options, device)
        universe = closeness_of_all(parameters, alignments, workers)
        return [
            alignment.with_metadata(**closeness_of(parameters[reference], model, alignment, workers), universe=universe)
            for alignment, model in zip(alignments, parameters, strict=True)
        ]
    starts = None
    if options.start == "activation_matching":
        starts = [
            parameters[0].binding.spec.identity_alignment()
            if index == reference
            else on_first(workers, match_by_activations, models[reference], model, options, device)
            for index, model in enumerate(models)
        ]
    return match_universe(
        parameters, search=Search.of(options), reference=reference, starts=starts, workers=workers, progress=progress
    )


def _around_centre(
    models: Sequence[Checkpoint],
    reference: int,
    options: AlignSection,
    align: Align,
    workers: Workers,
) -> list[Alignment]:
    """Aligns all models onto the one from which the others are least far."""
    from hf_llfc.alignment.weight_matching import closeness_of

    by_weights = replace(options, method="weight_matching")
    pairs: dict[tuple[int, int], Alignment] = {}
    squares = [0.0] * len(models)
    for first, second in combinations(range(len(models)), 2):
        alignment = _matched(align, models[first], models[second], by_weights)
        pairs[first, second], pairs[second, first] = alignment, alignment.inverse()
        for index in (first, second):
            squares[index] += alignment.metadata["distance_after"] ** 2
    centre = squares.index(min(squares))
    parameters = parameters_of(models, options, workers)
    onto = [
        parameters[centre].binding.spec.identity_alignment()
        if index == centre
        else pairs[centre, index]
        if options.method == "weight_matching"
        else _matched(align, models[centre], model, options)
        for index, model in enumerate(models)
    ]
    star = {
        "models": len(models),
        "centre": portable(models[centre].id),
        "distances": [(square / (len(models) - 1)) ** 0.5 for square in squares],
    }
    back = onto[reference].inverse()
    alignments = []
    for index, onto_centre in enumerate(onto):
        alignment = onto_centre.then(back)
        # The search between centre and reference moves the centre: its metadata go there.
        of_search = dict((onto[reference] if index == centre else onto_centre).metadata)
        of_search.pop("inverted", None)
        measured = closeness_of(parameters[reference], parameters[index], alignment, workers)
        alignments.append(alignment.with_metadata(**of_search | measured, star=star))
    return alignments


def _matched(align: Align, onto: Checkpoint, model: Checkpoint, options: AlignSection) -> Alignment:
    alignment = align(onto, model, options)
    assert alignment is not None, "some method is given"
    return alignment
