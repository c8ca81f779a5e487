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

A child that is not permuted but transformed by a group of matrices is the same with the nearest matrix (Procrustes) in
place of the assignment: `Σ_{a,b} gain[a, b] M[a, b]`, in closed form. A *choice* for a child is therefore an index
array `[n]` or a matrix `[n, n]`.

Where the only child is a sign (of gated neurons, whose gate does not follow it), value[i, j] is gain_()[i, j] +
|gain_sign[i, j]|, and all pairs are solved at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations, product
from math import factorial, prod

import torch
from torch import Tensor

from hf_llfc.alignment.assignment.assignment import assign, assign_with_gap
from hf_llfc.symmetry.binding import Binding
from hf_llfc.symmetry.declarations import PERMUTATION
from hf_llfc.symmetry.matrix_groups import MATRIX_GROUPS
from hf_llfc.symmetry.orthogonal import Orthogonal
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
        matrices: Axis → group of matrices, for those of its axes that are not permuted.
    """

    axis: str
    size: int
    moves: bool
    children: Mapping[str, int]
    matrices: Mapping[str, str] = field(default_factory=dict)

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
        matrices = {axis: spec.axes[axis].group for axis in (name, *children) if spec.axes[axis].group != PERMUTATION}
        groups.append(Group(name, size, spec.axes[name].symmetric, children, matrices))
    return groups


@dataclass(frozen=True)
class Solution:
    """The best transforms of one group with everything else held.

    Attributes:
        transforms: Axis → transform.
        gain: Rise of the objective against the transforms before, 0 if that is not above float noise.
        value: Objective of the transforms before.
        gap: Largest further rise that other transforms could bring, 0 where the solver is exact.
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
    choices = {
        child: torch.zeros(size, size, width, width, dtype=torch.float64)
        if child in group.matrices
        else torch.zeros(size, size, width, dtype=torch.int32)
        for child, width in group.children.items()
    }
    noise = NOISE[torch.float64]
    for i, j, gains in pairs:
        noise = max([noise, *(_noise(gain) for gain in gains.values())])
        is_present = not group.moves or present[group.axis].source(i) == j
        here = {child: _choice_of(present[child].at(i)) for child in group.children} if is_present else None
        best, value_ij[i, j] = best_children(group.children, gains, here, group.matrices)
        if here is not None:
            before_i[i] = value_of(gains, here)
        for child, choice in best.items():
            choices[child][i, j] = choice
    every = torch.arange(size)
    root = assign(value_ij) if group.moves else every
    transforms: dict[str, Transform] = {group.axis: Permutation(root)} if group.moves else {}
    for child, chosen in choices.items():
        of_root = chosen[every, root]
        transforms[child] = Orthogonal(of_root) if child in group.matrices else Permutation(of_root.long())
    after_i = value_ij[every, root]
    rise = float((after_i - before_i).sum())
    floor = noise * float((after_i.abs() + before_i.abs())[after_i != before_i].sum())
    return Solution(transforms, rise if rise > floor else 0.0, float(before_i.sum()))


def tried(group: Group) -> int:
    """Approximate number of assignments for the children of one pair of root entries."""
    sizes = sorted(group.children.values())
    choices = prod(factorial(min(size, TRIED)) for size in sizes[:-1])
    return choices if choices <= TRIED else 4 * len(sizes)


def signs_of(group: Group) -> str | None:
    """The only child of a group that is permuted, if that child is a sign: an axis of one entry and a matrix."""
    if not group.moves or group.axis in group.matrices or list(group.children.values()) != [1]:
        return None
    (child,) = group.children
    return child if child in group.matrices else None


def solve_signed(
    group: Group,
    plain_ij: Tensor | None,
    signed_ij: Tensor | None,
    present: Mapping[str, Transform],
    solver: str = "exact",
) -> Solution:
    """Finds the best transforms of a group whose only child is a sign, see the module.

    Args:
        group: What to match.
        plain_ij: `[n, n]`, what root entry i of A matched with j of B is worth whatever the sign; None for nothing.
        signed_ij: What else it is worth with the sign +1.
        present: The present transforms of root and child.
        solver: One of `SOLVERS`.

    Returns:
        The transforms, and by how much the value rises.
    """
    child = signs_of(group)
    known = [gain for gain in (plain_ij, signed_ij) if gain is not None]
    if child is None or not known:
        return Solution(present, 0.0)
    nothing = torch.zeros_like(known[0])
    plain_ij, signed_ij = (nothing if gain is None else gain for gain in (plain_ij, signed_ij))
    root, gap = assign_with_gap(plain_ij + signed_ij.abs(), solver=solver)
    root = root.cpu()
    every = torch.arange(group.size)
    held, signs = present[group.axis].apply(every, 0), Orthogonal.of(present[child]).matrix.flatten()
    before_i = plain_ij[every, held].cpu().double() + signs * signed_ij[every, held].cpu().double()
    chosen = torch.where(signed_ij[every, root].cpu() < 0, -1.0, 1.0).double()
    after_i = plain_ij[every, root].cpu().double() + chosen * signed_ij[every, root].cpu().double()
    rise = float((after_i - before_i).sum())
    floor = _noise(known[0]) * float((after_i.abs() + before_i.abs())[after_i != before_i].sum())
    transforms: dict[str, Transform] = {group.axis: Permutation(root), child: Orthogonal(chosen[:, None, None])}
    return Solution(transforms, rise if rise > floor else 0.0, float(before_i.sum()), gap)


def best_children(
    children: Mapping[str, int],
    gains: PairGains,
    present: Mapping[str, Tensor] | None = None,
    matrices: Mapping[str, str] | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Finds the best choices for the children of one pair of root entries, see the module.

    Args:
        children: Child → its size.
        gains: Gain of each choice.
        present: Child → present choice, from which a coupled problem starts and which stays where nothing is better.
        matrices: Child → group of matrices, for those that are not permuted.

    Returns:
        Child → choice, and what they are worth.
    """
    matrices = matrices or {}
    coupled = [child for child in children if any(len(axes) > 1 and child in axes for axes in gains)]
    chosen: dict[str, Tensor] = {}
    for child, size in children.items():
        if child not in coupled:
            stays = _unmoved(child, size, matrices) if present is None else present[child]
            gain = gains.get((child,))
            held = None if present is None else stays
            chosen[child] = stays if gain is None else _chosen(child, gain, held, matrices)
    if coupled:
        chosen |= _best_coupled(
            {child: children[child] for child in coupled},
            {axes: gain for axes, gain in gains.items() if any(axis in coupled for axis in axes)},
            None if present is None else {child: present[child] for child in coupled},
            matrices,
        )
    return chosen, value_of(gains, chosen)


def value_of(gains: PairGains, choices: Mapping[str, Tensor]) -> float:
    """Gain of choices for the children, in float64."""
    total = 0.0
    for axes, gain in gains.items():
        if all(choices[axis].ndim == 1 for axis in axes):
            index = torch.zeros(1, dtype=torch.int64)
            for axis in axes:
                index = (index[:, None] * choices[axis].numel() + choices[axis]).flatten()
            total += float(gain.gather(1, index[:, None].to(gain.device)).sum(dtype=torch.float64))
        else:
            joint = _shaped(axes, gain, {axis: len(choices[axis]) for axis in axes}).double()
            for left in range(len(axes), 0, -1):
                joint = _held(joint, left - 1, left, choices[axes[left - 1]])
            total += float(joint)
    return total


def _best_coupled(
    sizes: Mapping[str, int], gains: PairGains, present: Mapping[str, Tensor] | None, matrices: Mapping[str, str]
) -> dict[str, Tensor]:
    """The best of what trying every choice, or alternating from several starts, comes to."""
    noise = max(_noise(gain) for gain in gains.values())
    shaped = {axes: _shaped(axes, gain, sizes) for axes, gain in gains.items()}

    def assigned(choices: Mapping[str, Tensor], order: Sequence[str]) -> dict[str, Tensor]:
        updated = dict(choices)
        for child in order:
            updated[child] = _best(child, _slope(child, shaped, updated, matrices), matrices)
        return updated

    def alternate(choices: dict[str, Tensor], order: Sequence[str]) -> dict[str, Tensor]:
        value = value_of(gains, choices)
        while True:
            following = assigned(choices, order)
            value_there = value_of(gains, following)
            if value_there - value <= noise * abs(value):
                return choices
            choices, value = following, value_there

    # Matrices cannot be tried one by one, and are the last to be chosen.
    *tried, largest = sorted(sizes, key=lambda child: (child in matrices, sizes[child]))
    answers = [] if present is None else [dict(present)]
    is_small = prod(factorial(sizes[child]) for child in tried) <= TRIED
    if is_small and not any(child in matrices for child in tried):
        for choice in product(*(permutations(range(sizes[child])) for child in tried)):
            choices = {child: torch.tensor(perm) for child, perm in zip(tried, choice, strict=True)}
            answers.append(assigned(choices, [largest]))
    else:
        # Averaged over a group of matrices nothing is left, so that these come first.
        firsts = [child for child in sizes if child in matrices] or list(sizes)
        orders = [[first, *(child for child in sizes if child != first)] for first in firsts]
        answers = [alternate(choices, orders[0]) for choices in answers]
        answers += [alternate(assigned({}, order), order) for order in orders]
    best, value = answers[0], value_of(gains, answers[0])
    for answer in answers[1:]:
        value_there = value_of(gains, answer)
        if value_there - value > noise * abs(value):
            best, value = answer, value_there
    return best


def _shaped(axes: Sequence[str], gain: Tensor, sizes: Mapping[str, int]) -> Tensor:
    """Joint gains with a dimension for each child, those of A first."""
    return gain.reshape(*(sizes[axis] for axis in axes), *(sizes[axis] for axis in axes))


def _held(joint: Tensor, dim: int, left: int, choice: Tensor) -> Tensor:
    """Joint gains of `left` children with the one at a dimension held at its choice."""
    beside = joint.movedim((dim, left + dim), (0, 1))
    if choice.ndim == 1:
        return beside[torch.arange(len(choice)), choice].sum(0)
    return torch.tensordot(choice.to(beside), beside, 2)


def _slope(
    child: str, gains: Mapping[tuple[str, ...], Tensor], choices: Mapping[str, Tensor], matrices: Mapping[str, str]
) -> Tensor:
    """The gains of one child, `[a, b]`, with the others held, or averaged over where they are unknown."""
    total: Tensor | None = None
    for axes, joint in gains.items():
        if child not in axes:
            continue
        left = list(axes)
        for other in reversed(axes):
            if other == child:
                continue
            dim, size = left.index(other), joint.shape[left.index(other)]
            if other in choices:
                joint = _held(joint, dim, len(left), choices[other])
            elif other in matrices:
                joint = joint.sum((dim, len(left) + dim)) * 0
            else:
                joint = joint.sum((dim, len(left) + dim)) / size
            left.remove(other)
        total = joint if total is None else total + joint
    assert total is not None
    return total


def _best(child: str, gain: Tensor, matrices: Mapping[str, str]) -> Tensor:
    """The best choice for a child by its gains `[a, b]` alone."""
    return MATRIX_GROUPS[matrices[child]].nearest(gain.cpu().double()) if child in matrices else assign(gain)


def _chosen(child: str, gain: Tensor, present: Tensor | None, matrices: Mapping[str, str]) -> Tensor:
    """The best choice, or the present one where that is as good."""
    best = _best(child, gain, matrices)
    if present is None:
        return best
    if child in matrices:
        before, after = ((gain.cpu().double() * choice).sum(-1) for choice in (present, best))
        changed = before != after
    else:
        every = torch.arange(len(best))
        before, after = (gain[every, choice].double() for choice in (present, best))
        changed = best != present
    floor = _noise(gain) * float((before.abs() + after.abs())[changed].sum())
    return best if float((after - before).sum()) > floor else present


def _unmoved(child: str, size: int, matrices: Mapping[str, str]) -> Tensor:
    return torch.eye(size, dtype=torch.float64) if child in matrices else torch.arange(size)


def _choice_of(transform: Transform) -> Tensor:
    """A transform without a parent as a choice."""
    if isinstance(transform, Orthogonal):
        return transform.matrix
    return transform.apply(torch.arange(transform.size), 0)


def _noise(gain: Tensor) -> float:
    return NOISE[gain.dtype]
