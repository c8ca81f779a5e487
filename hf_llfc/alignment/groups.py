"""Groups: an axis with the axes that depend on it, and their best transforms, given what each choice gains.

A group is a root axis with its children: `heads` with `head_dim[heads]` and `value_dim[heads]`, `kv` with `q[kv]` and
`value_dim[kv]`, `experts` with `neurons[experts]`. Entry i of the root in A matched with entry j in B is worth

    value[i, j] = max over the children's permutations π of  Σ_c Σ_a gain_c[i, j, a, π(a)]

where c runs over the sets of children that pieces of tensors hold together, and a over the entries of their product (a
single one for the empty set). The root is then one assignment on these values, and exact.

Children that share no piece are one assignment each, and exact. Children that share one (the output projection of
grouped queries reads `(kv q[kv] value_dim[kv])`) are a bilinear assignment problem, which is NP-hard. With up to four
query heads in a group every choice of theirs is tried, with the best value channels for each, and the answer is exact.
Beyond that it is alternation: each child is assigned exactly with the others held, until nothing improves, from the
present transforms and, once for every child, from that child assigned with the others averaged over. The best is kept,
so that the value never falls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from math import factorial, prod

import torch
from torch import Tensor

from hf_llfc.alignment.assignment import assign
from hf_llfc.symmetry.spec import Binding
from hf_llfc.symmetry.transforms import Permutation, Transform

# A rise of the objective below this fraction of the terms that change is float noise.
NOISE = {torch.float64: 1e-13, torch.float32: 1e-6}

# Children that share a piece are solved by trying every choice of all but the largest, if there are no more than these.
TRIED = 24

# For one pair of root entries: children held together → gain[a, b] over the entries of their product, row-major.
PairGains = Mapping[tuple[str, ...], Tensor]


@dataclass(frozen=True)
class Group:
    """An axis that is matched as a whole, with the axes that depend on it.

    Attributes:
        axis: The root axis.
        size: Its number of entries.
        moves: Whether the root itself is symmetric (else only its children move).
        children: Symmetric axes that depend on it → their size.
    """

    axis: str
    size: int
    moves: bool
    children: Mapping[str, int]

    @property
    def axes(self) -> frozenset[str]:
        """All axes of the group."""
        return frozenset((self.axis, *self.children))

    @property
    def matched(self) -> tuple[str, ...]:
        """The axes that may move."""
        return ((self.axis,) if self.moves else ()) + tuple(self.children)


def groups_of(binding: Binding) -> list[Group]:
    """The groups of the axes that a checkpoint's tensors use, in the order of the spec."""
    spec = binding.spec
    roots: dict[str, dict[str, int]] = {}
    for name in binding.symmetric_axes:
        axis = spec.axes[name]
        assert axis.size is not None
        if axis.parent is None:
            roots.setdefault(name, {})
        else:
            roots.setdefault(axis.parent, {})[name] = axis.size
    groups = []
    for name, children in roots.items():
        size = spec.axes[name].size
        assert size is not None
        groups.append(Group(name, size, spec.axes[name].symmetric, children))
    return groups


@dataclass(frozen=True)
class Solution:
    """The best transforms of one group with everything else held.

    Attributes:
        transforms: Axis → transform.
        gain: By how much they raise the objective against the transforms before, 0 if that is not above float noise.
        value: What the transforms before are worth.
        gap: By how much other transforms could at most raise it beyond that, 0 where the solver is exact.
    """

    transforms: Mapping[str, Transform]
    gain: float
    value: float = 0.0
    gap: float = 0.0


def solve_group(
    group: Group, pairs: Iterable[tuple[int, int, PairGains]], present: Mapping[str, Transform]
) -> Solution:
    """Finds the best transforms of a group, see the module.

    Args:
        group: What to match.
        pairs: (i, j, gains) for every pair of root entries, or for the pairs i = j where the root does not move.
        present: The present transforms of the axes that are matched.

    Returns:
        The transforms, and by how much the value rises.
    """
    size = group.size
    value_ij = torch.zeros(size, size, dtype=torch.float64)
    before_i = torch.zeros(size, dtype=torch.float64)
    perms = {child: torch.zeros(size, size, width, dtype=torch.int32) for child, width in group.children.items()}
    noise = NOISE[torch.float64]
    for i, j, gains in pairs:
        noise = max([noise, *(_noise(gain) for gain in gains.values())])
        is_present = not group.moves or present[group.axis].source(i) == j
        here = {child: _indices(present[child].at(i)) for child in group.children} if is_present else None
        best, value_ij[i, j] = best_children(group.children, gains, here)
        if here is not None:
            before_i[i] = value_of(gains, here)
        for child, perm in best.items():
            perms[child][i, j] = perm
    every = torch.arange(size)
    root = assign(value_ij) if group.moves else every
    transforms: dict[str, Transform] = {group.axis: Permutation(root)} if group.moves else {}
    transforms |= {child: Permutation(perm[every, root].long()) for child, perm in perms.items()}
    after_i = value_ij[every, root]
    rise = float((after_i - before_i).sum())
    floor = noise * float((after_i.abs() + before_i.abs())[after_i != before_i].sum())
    return Solution(transforms, rise if rise > floor else 0.0, float(before_i.sum()))


def best_children(
    children: Mapping[str, int], gains: PairGains, present: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], float]:
    """Finds the best permutations of the children for one pair of root entries, see the module.

    Args:
        children: Child → its size.
        gains: What each choice is worth.
        present: Child → present permutation, from which a coupled problem starts and which stays where nothing is
            better.

    Returns:
        Child → indices, and what they are worth.
    """
    coupled = [child for child in children if any(len(axes) > 1 and child in axes for axes in gains)]
    chosen: dict[str, Tensor] = {}
    for child, size in children.items():
        if child not in coupled:
            stays = torch.arange(size) if present is None else present[child]
            gain = gains.get((child,))
            chosen[child] = stays if gain is None else _assigned(gain, None if present is None else stays)
    if coupled:
        chosen |= _best_coupled(
            {child: children[child] for child in coupled},
            {axes: gain for axes, gain in gains.items() if any(axis in coupled for axis in axes)},
            None if present is None else {child: present[child] for child in coupled},
        )
    return chosen, value_of(gains, chosen)


def value_of(gains: PairGains, perms: Mapping[str, Tensor]) -> float:
    """What permutations of the children are worth, in float64."""
    total = 0.0
    for axes, gain in gains.items():
        index = torch.zeros(1, dtype=torch.int64)
        for axis in axes:
            index = (index[:, None] * perms[axis].numel() + perms[axis]).flatten()
        total += float(gain.gather(1, index[:, None].to(gain.device)).sum(dtype=torch.float64))
    return total


def _best_coupled(
    sizes: Mapping[str, int], gains: PairGains, present: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The best of what trying every choice, or alternating from several starts, comes to."""
    noise = max(_noise(gain) for gain in gains.values())
    shaped = {
        axes: gain.reshape(*(sizes[axis] for axis in axes), *(sizes[axis] for axis in axes))
        for axes, gain in gains.items()
    }

    def assigned(perms: Mapping[str, Tensor], order: Sequence[str]) -> dict[str, Tensor]:
        found = dict(perms)
        for child in order:
            found[child] = assign(_slope(child, shaped, found))
        return found

    def alternate(perms: dict[str, Tensor], order: Sequence[str]) -> dict[str, Tensor]:
        value = value_of(gains, perms)
        while True:
            following = assigned(perms, order)
            value_there = value_of(gains, following)
            if value_there - value <= noise * abs(value):
                return perms
            perms, value = following, value_there

    *tried, largest = sorted(sizes, key=sizes.__getitem__)
    answers = [] if present is None else [dict(present)]
    if prod(factorial(sizes[child]) for child in tried) <= TRIED:
        for choice in product(*(permutations(range(sizes[child])) for child in tried)):
            perms = {child: torch.tensor(perm) for child, perm in zip(tried, choice, strict=True)}
            answers.append(assigned(perms, [largest]))
    else:
        orders = [[first, *(child for child in sizes if child != first)] for first in sizes]
        answers = [alternate(perms, orders[0]) for perms in answers]
        answers += [alternate(assigned({}, order), order) for order in orders]
    best, value = answers[0], value_of(gains, answers[0])
    for answer in answers[1:]:
        value_there = value_of(gains, answer)
        if value_there - value > noise * abs(value):
            best, value = answer, value_there
    return best


def _slope(child: str, gains: Mapping[tuple[str, ...], Tensor], perms: Mapping[str, Tensor]) -> Tensor:
    """The gains of one child, `[a, b]`, with the others held, or averaged over where they are unknown."""
    total: Tensor | None = None
    for axes, joint in gains.items():
        if child not in axes:
            continue
        left = list(axes)
        for other in reversed(axes):
            if other == child:
                continue
            place, size = left.index(other), joint.shape[left.index(other)]
            if other in perms:
                held = joint.movedim((place, len(left) + place), (0, 1))[torch.arange(size), perms[other]]
                joint = held.sum(0)
            else:
                joint = joint.sum((place, len(left) + place)) / size
            left.remove(other)
        total = joint if total is None else total + joint
    assert total is not None
    return total


def _assigned(gain: Tensor, present: Tensor | None) -> Tensor:
    """The best permutation, or the present one where that is as good."""
    best = assign(gain)
    if present is None:
        return best
    every = torch.arange(len(best))
    before, after = (gain[every, perm].double() for perm in (present, best))
    changed = best != present
    floor = _noise(gain) * float((before.abs() + after.abs())[changed].sum())
    return best if float((after - before).sum()) > floor else present


def _indices(transform: Transform) -> Tensor:
    return transform.apply(torch.arange(transform.size), 0)


def _noise(gain: Tensor) -> float:
    return NOISE[gain.dtype]
