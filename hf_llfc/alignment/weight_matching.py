"""Weight matching by coordinate descent over groups of axes (Ainsworth et al., *Git Re-Basin*, ICLR 2023)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from typing import Any

import torch

from hf_llfc.alignment.gains import ROLES, Gains, Key
from hf_llfc.alignment.groups import Group, Solution, groups_of
from hf_llfc.alignment.search import DEFAULT_SEARCH, Search
from hf_llfc.alignment.sources import Parameters
from hf_llfc.errors import AlignmentError, raise_all
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.parallel.workers import ALONE, Workers
from hf_llfc.symmetry.spec import Alignment, PermutationSpec
from hf_llfc.symmetry.transforms import Transform

# A group, and the axes that are not determined when it is its turn.
Visit = tuple[Group, frozenset[str]]

logger = logging.getLogger(__name__)

# Groups are solved one by one by all workers where one group a worker would take so many times as long: what follows
# the sums, above all the assignment, is not shared.
IDLE = 1.2

# A sweep that raises the objective by less than this fraction ends the descent: below it lies float rounding.
CONVERGED = 1e-9


@dataclass(frozen=True)
class Sweep:
    """One pass over all groups.

    Attributes:
        start: Name of the start it belongs to.
        sweep: Number of the pass, from 1.
        objective: Σ ⟨A, T·B⟩ after it.
        moved: Units with another index than in the original model.
    """

    start: str
    sweep: int
    objective: float
    moved: int


def match_weights(
    reference: Parameters,
    model: Parameters,
    *,
    search: Search = DEFAULT_SEARCH,
    start: Alignment | None = None,
    workers: Workers = ALONE,
    progress: Progress = silent,
) -> Alignment:
    """Finds transforms of `model` that bring its weights close to those of `reference`.

    The objective Σ ⟨A, T·B⟩ never falls from one sweep to the next. The first start is the identity (or
    `start`): for two fine-tunes of one base it is usually the optimum, and if its first sweep moves nothing no other
    start is tried. The next start knows nothing: axes are matched in the order in which the ones already matched
    anchor them, and those not yet matched are averaged over. Further starts repeat the descent from random
    transforms. The best objective wins.

    Args:
        reference: The model that stays, A.
        model: The model that moves, B.
        search: Starts, sweeps, seed and solver.
        start: Transforms to start from instead of the identity.
        workers: Where groups are matched, and the tensors of large ones worked on. Groups that share no tensor are
            matched at the same time; the result does not depend on it.
        progress: Told the groups done and the groups in the sweep.

    Returns:
        The alignment; its metadata holds `objective_before`, `objective_after`, `cosine_before`, `cosine_after`,
        `distance_before`, `distance_after` (Euclidean, over the tensors that hold a symmetric axis),
        `converged` and `sweeps`; with the solver `auction` also `solver` and `assignment_gap`, the largest sum over
        one sweep of what exact assignments could have added at most, as a part of the objective.

    Raises:
        AlignmentError: The two models have different tensors, a weight is not finite, or `start` moves what the spec
            holds fixed.
    """
    raise_all(differences(reference, model), AlignmentError, "the two models hold different tensors")
    spec = reference.binding.spec
    gains = Gains(reference, model, workers=workers, solver=search.solver)
    groups = groups_of(reference.binding)
    generator = torch.Generator().manual_seed(search.seed)
    identity = spec.identity_alignment()
    norm_a, norm_b, before = gains.norms()
    history: list[Sweep] = []
    best: _Descent | None = None
    for number in range(search.restarts):
        if number == 0 and start is not None:
            label, current = "given", completed(start, spec)
        elif number == 0:
            label, current = "identity", identity
        elif number == 1 and start is None:
            label, current = "uninformed", _uninformed_start(gains, groups, identity, progress)
        else:
            label, current = f"random {number}", _random_start(reference, generator)
        begin = _Start(label, current, before if current.is_identity else gains.objective(current))
        descent = _descend(gains, groups, begin, search.max_sweeps, generator, progress)
        history += descent.sweeps
        if best is None or descent.objective > best.objective:
            best = descent
        if number == 0 and descent.alignment.is_identity and start is None:
            break
    assert best is not None
    return best.alignment.with_metadata(
        **of_solver(search.solver, best.gap, best.objective),
        method="weight_matching",
        **closeness(norm_a, norm_b, before, best.objective),
        converged=best.converged,
        restarts=search.restarts,
        seed=search.seed,
        sweeps=[asdict(sweep) for sweep in history],
    )


def closeness(norm_a: float, norm_b: float, before: float, after: float) -> dict[str, float]:
    """Objective, distance and cosine of two models before and after, from their norms, ⟨A, B⟩ and ⟨A, T·B⟩."""
    norm = norm_a * norm_b
    return {
        "objective_before": before,
        "objective_after": after,
        "distance_before": max(0.0, norm_a**2 + norm_b**2 - 2 * before) ** 0.5,
        "distance_after": max(0.0, norm_a**2 + norm_b**2 - 2 * after) ** 0.5,
        "cosine_before": before / norm if norm else 1.0,
        "cosine_after": after / norm if norm else 1.0,
    }


def closeness_of(
    reference: Parameters, model: Parameters, alignment: Alignment, workers: Workers = ALONE
) -> dict[str, float]:
    """Measures closeness of two models, reading their weights; the alignment may come from any method."""
    gains = Gains(reference, model, workers=workers)
    norm_a, norm_b, before = gains.norms()
    return closeness(norm_a, norm_b, before, gains.objective(alignment))


def of_solver(solver: str, gap: float, objective: float) -> dict[str, Any]:
    """Metadata of a solver that is not exact: its name, and the gap as a part of the objective."""
    return {} if solver == "exact" else {"solver": solver, "assignment_gap": gap / abs(objective) if objective else 0.0}


def differences(reference: Parameters, model: Parameters) -> list[str]:
    """Differences that keep the tensors of two models from being compared."""
    problems = []
    for ours, theirs, role in ((reference, model, ROLES[1]), (model, reference, ROLES[0])):
        label = theirs.label or role
        problems += [f"{name}: not in {label}" for key, name in ours.keys.items() if key not in theirs.keys]
    for key, name in reference.keys.items():
        if key in model.keys:
            shapes = [
                list(side.binding.tensors[side.keys[key]].spec.shape(side.binding.sizes)) for side in (reference, model)
            ]
            if shapes[0] != shapes[1]:
                problems.append(
                    f"{name}: {shapes[0]} in {reference.label or ROLES[0]}, {shapes[1]} in {model.label or ROLES[1]}"
                )
    return problems


def completed(start: Alignment, spec: PermutationSpec) -> Alignment:
    """A start with the identity on the axes that it leaves out."""
    fixed = [axis for axis in start.transforms if axis not in spec.symmetric_axes]
    if fixed:
        raise AlignmentError(
            f"the start moves {', '.join(fixed)}, which the permutation spec holds fixed; "
            "find it with the same choice of axes"
        )
    return Alignment(spec, {**spec.identity_alignment().transforms, **start.transforms})


def _random_start(reference: Parameters, generator: torch.Generator) -> Alignment:
    """Random transforms of the axes that the checkpoint's tensors use."""
    spec = reference.binding.spec
    random = spec.random_alignment(generator).transforms
    used = {axis: random[axis] for axis in reference.binding.symmetric_axes}
    return Alignment(spec, {**spec.identity_alignment().transforms, **used})


@dataclass(frozen=True)
class _Start:
    """Where the sweeps of one start begin."""

    label: str
    alignment: Alignment
    objective: float


@dataclass(frozen=True)
class _Descent:
    """Where the sweeps of one start end."""

    alignment: Alignment
    objective: float
    converged: bool
    gap: float
    sweeps: Sequence[Sweep]


def _descend(
    gains: Gains, groups: list[Group], start: _Start, max_sweeps: int, generator: torch.Generator, progress: Progress
) -> _Descent:
    """Sweeps over the groups in random order until nothing improves."""
    transforms, objective = dict(start.alignment.transforms), start.objective
    # Groups that share no tensor with another do not depend on its transforms: one visit is enough for them.
    independent = _are_independent(gains, groups)
    gap, converged, sweeps = 0.0, False, list[Sweep]()
    while not converged and len(sweeps) < max_sweeps:
        number = len(sweeps) + 1
        told = partial(progress, f"weight matching, {start.label} start, sweep {number}")
        rise, gap_here = sweep_over(groups, gains, transforms, generator, told)
        gap, objective = max(gap, gap_here), objective + rise
        current = Alignment(start.alignment.spec, dict(transforms))
        moved = sum(count for count, _ in current.moved.values())
        sweeps.append(Sweep(start.label, number, objective, moved))
        logger.info("%s start, sweep %d: objective %.6g, %d units moved", start.label, number, objective, moved)
        converged = rise <= CONVERGED * max(abs(objective), 1e-30) or independent
    return _Descent(current, gains.objective(current), converged, gap, sweeps)


def sweep_over(
    groups: Sequence[Group],
    gains: Gains,
    transforms: dict[str, Transform],
    generator: torch.Generator,
    told: Callable[[int, int], None],
) -> tuple[float, float]:
    """Matches every group once, in random order.

    Args:
        groups: All groups.
        gains: The two models.
        transforms: The present transforms, which are brought up to date.
        generator: Source of the order.
        told: Called with the groups done and all groups.

    Returns:
        By how much the objective rises, and by how much more it could at most with exact assignments.
    """
    order = [groups[index] for index in torch.randperm(len(groups), generator=generator).tolist()]
    solutions = _solve_all(gains, [(group, frozenset()) for group in order], transforms, told)
    return sum(solution.gain for solution in solutions), sum(solution.gap for solution in solutions)


def _are_independent(gains: Gains, groups: list[Group]) -> bool:
    """Whether no tensor holds two of the groups, or one axis twice."""
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for group in groups:
        keys = set(gains.keys(group.axes))
        if keys & seen or any(
            [use.axis for use in gains.a.binding.tensors[gains.a.keys[key]].spec.axes].count(group.axis) > 1
            for key in keys
        ):
            return False
        seen |= keys
    return True


def _uninformed_start(gains: Gains, groups: list[Group], identity: Alignment, progress: Progress) -> Alignment:
    """Matches every group once, the best anchored first, averaging over the axes that are not matched yet."""
    transforms = dict(identity.transforms)
    waiting = list(groups)
    visits: list[Visit] = []
    while waiting:
        undetermined = frozenset(axis for group in waiting for axis in group.matched)
        anchoring = [gains.anchoring(group, undetermined - group.axes) for group in waiting]
        group = waiting.pop(max(range(len(waiting)), key=anchoring.__getitem__))
        visits.append((group, undetermined))
    _solve_all(gains, visits, transforms, partial(progress, "weight matching, uninformed start"), keep_all=True)
    return Alignment(identity.spec, transforms)


def _solve_all(
    gains: Gains,
    visits: Sequence[Visit],
    transforms: dict[str, Transform],
    told: Callable[[int, int], None],
    *,
    keep_all: bool = False,
) -> list[Solution]:
    """Solves groups in order; groups that do not depend on each other are solved at the same time.

    Args:
        gains: The two models.
        visits: The groups, in order.
        transforms: The present transforms, which are brought up to date.
        told: Called with the visits done and all visits.
        keep_all: Whether a solution that is no improvement is taken, too.

    Returns:
        The solutions, in the order of the visits.
    """
    solutions: dict[int, Solution] = {}
    for wave in _waves(gains, [group for group, _ in visits]):
        present = Alignment(gains.spec, dict(transforms))
        finished = count(len(solutions) + 1)
        told(len(solutions), len(visits))

        def solve(index: int, present: Alignment = present, workers: Workers = ALONE) -> Solution:
            group, undetermined = visits[index]
            return gains.solve(group, present, undetermined, workers=workers)

        def on_done(finished: Iterator[int] = finished, last: int = len(solutions) + len(wave)) -> None:
            done = next(finished)
            if done < last:
                told(done, len(visits))

        groups = {index: visits[index][0] for index in wave}
        together, apart = _divided(gains, groups)
        for index in together:
            solutions[index] = solve(index, workers=gains.workers)
            on_done()
        costs = [gains.cost(groups[index]) for index in apart]
        solutions |= zip(apart, gains.workers.map(solve, apart, costs=costs, on_done=on_done), strict=True)
        for index in wave:
            if keep_all or solutions[index].gain > 0:
                transforms.update(solutions[index].transforms)
    return [solutions[index] for index in range(len(visits))]


def _divided(gains: Gains, groups: Mapping[int, Group]) -> tuple[list[int], list[int]]:
    """Divides the groups of a wave into those that all workers solve together, and those that one worker solves alone.

    Workers solve together what can be shared if the worker with the most to do would otherwise have clearly more than
    its share.
    """
    workers = gains.workers.threads * gains.workers.ranks
    shared = [index for index, group in groups.items() if gains.is_shared(group)]
    alone = [index for index in groups if index not in shared]
    costs = {index: gains.cost(group) for index, group in groups.items()}

    def longest(indices: list[int]) -> float:
        loads = [0.0] * workers
        for cost in sorted((costs[index] for index in indices), reverse=True):
            loads[loads.index(min(loads))] += cost
        return max(loads)

    in_turn = sum(gains.cost_together(groups[index]) for index in shared) + longest(alone)
    if shared and longest([*groups]) > IDLE * in_turn:
        return shared, alone
    return [], list(groups)


def _waves(gains: Gains, groups: Sequence[Group]) -> list[list[int]]:
    """Indices of groups in waves: a group comes after all earlier ones that share a tensor with it."""
    last: dict[Key, int] = {}
    waves: list[list[int]] = []
    for index, group in enumerate(groups):
        keys = gains.keys(group.axes)
        wave = max((last[key] + 1 for key in keys if key in last), default=0)
        last |= dict.fromkeys(keys, wave)
        if wave == len(waves):
            waves.append([])
        waves[wave].append(index)
    return waves
