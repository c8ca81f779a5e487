"""Several models in the coordinates of one: each aligned onto it, by way of a centre among them, or all together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING

import torch

from hf_llfc.alignment.checkpoints import (
    align_checkpoints,
    match_by_activations,
    match_universe_by_activations,
    parameters_of,
)
from hf_llfc.checkpoints import Checkpoint
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.parallel.workers import Workers
from hf_llfc.parents.provenance import identified
from hf_llfc.recipe import AlignSection
from hf_llfc.symmetry import Alignment

if TYPE_CHECKING:
    from hf_llfc.alignment import Parameters

Align = Callable[[Checkpoint, Checkpoint, AlignSection], Alignment | None]


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
        models: Those that are wanted.
        options: How.
        workers: As for `align_checkpoints`.
        device: As for `align_checkpoints`.
        progress: Shown meanwhile.

    Returns:
        One alignment a model; None for the reference, and for the method `none`.

    Raises:
        SpecError: The architecture has no adapter, or a checkpoint does not fit it.
    """
    workers = workers if workers is not None else Workers(torch.get_num_threads())

    def align(onto: Checkpoint, model: Checkpoint, options: AlignSection) -> Alignment | None:
        return align_checkpoints(onto, model, options, workers=workers, device=device, progress=progress)

    everyone = [*([] if any(each is reference for each in models) else [reference]), *models]
    if options.method == "none" or options.together == "reference" or len(everyone) < 3:
        return [None if each is reference else align(reference, each, options) for each in models]
    place = next(place for place, each in enumerate(everyone) if each is reference)
    if options.together == "universe":
        found = _in_universe(everyone, place, options, workers, device, progress)
    else:
        found = _around_centre(everyone, place, options, align, workers)
    return [
        None if each is reference else identified(alignment, reference, each, options, workers)
        for each, alignment in zip(everyone, found, strict=True)
    ][-len(models) :]


def _in_universe(
    models: Sequence[Checkpoint],
    reference: int,
    options: AlignSection,
    workers: Workers,
    device: torch.device | None,
    progress: Progress,
) -> list[Alignment]:
    """All models aligned to each other at once."""
    from hf_llfc.alignment import match_universe

    parameters = parameters_of(models, options, workers)
    if options.method == "activation_matching":
        return _in_universe_of_activations(models, reference, options, parameters, workers, device)
    starts = None
    if options.start == "activation_matching":
        starts = [
            parameters[0].binding.spec.identity_alignment()
            if place == reference
            else match_by_activations(models[reference], each, options, workers, device)
            for place, each in enumerate(models)
        ]
    return match_universe(
        parameters,
        reference=reference,
        restarts=options.restarts,
        max_sweeps=options.max_sweeps,
        seed=options.seed,
        starts=starts,
        solver=options.solver,
        workers=workers,
        progress=progress,
    )


def _in_universe_of_activations(
    models: Sequence[Checkpoint],
    reference: int,
    options: AlignSection,
    parameters: Sequence[Parameters],
    workers: Workers,
    device: torch.device | None,
) -> list[Alignment]:
    """The same by activations; how close the weights are then is told as of any method."""
    from hf_llfc.alignment.universe import closeness_of_all
    from hf_llfc.alignment.weight_matching import closeness_of

    found = match_universe_by_activations(models, reference, options, workers, device)
    universe = closeness_of_all(parameters, found, workers)
    return [
        alignment.with_metadata(**closeness_of(parameters[reference], each, alignment, workers), universe=universe)
        for alignment, each in zip(found, parameters, strict=True)
    ]


def _around_centre(
    models: Sequence[Checkpoint],
    reference: int,
    options: AlignSection,
    align: Align,
    workers: Workers,
) -> list[Alignment]:
    """All models aligned onto the one from which the others are least far."""
    from hf_llfc.alignment.weight_matching import closeness_of

    by_weights = replace(options, method="weight_matching")
    pairs: dict[tuple[int, int], Alignment] = {}
    squares = [0.0] * len(models)
    for first, second in combinations(range(len(models)), 2):
        found = _matched(align, models[first], models[second], by_weights)
        pairs[first, second], pairs[second, first] = found, found.inverse()
        for place in (first, second):
            squares[place] += found.metadata["distance_after"] ** 2
    centre = squares.index(min(squares))
    parameters = parameters_of(models, options, workers)
    onto = [
        parameters[centre].binding.spec.identity_alignment()
        if place == centre
        else pairs[centre, place]
        if options.method == "weight_matching"
        else _matched(align, models[centre], each, options)
        for place, each in enumerate(models)
    ]
    star = {
        "models": len(models),
        "centre": models[centre].id,
        "distances": [(square / (len(models) - 1)) ** 0.5 for square in squares],
    }
    back = onto[reference].inverse()
    alignments = []
    for place, each in enumerate(onto):
        alignment = each.then(back)
        # What was found between the centre and the reference is told with the centre, which that moves.
        of_search = dict((onto[reference] if place == centre else each).metadata)
        of_search.pop("inverted", None)
        measured = closeness_of(parameters[reference], parameters[place], alignment, workers)
        alignments.append(alignment.with_metadata(**of_search | measured, star=star))
    return alignments


def _matched(align: Align, onto: Checkpoint, model: Checkpoint, options: AlignSection) -> Alignment:
    alignment = align(onto, model, options)
    assert alignment is not None, "some method is given"
    return alignment
