"""The cost matrices of weight matching, contracted straight from the axis expressions.

Matching maximises Σ_tensors ⟨A, T·B⟩ over the transforms T. With every other axis held, the terms that hold one
axis x are linear in the permutation of x:

    Σ_i gain[i, perm[i]],   gain[i, j] = Σ_pieces Σ_others A[.. i ..] · B'[.. j ..]

where B' is B moved along every other axis. A *group* is an axis together with the axes that depend on it
(`kv` with `q[kv]`, `experts` with `neurons[experts]`): for every pair (i, j) of parents the best permutation of the
children is an assignment of its own, so that the group's optimum is exact.

Axes that are not determined yet are averaged over in B' and summed over in A: the expectation under a uniformly
random permutation.

Shape suffixes: i, j an entry of the group's axis in A and B; a, b an entry of a child; k everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_llfc.alignment.assignment import assign
from hf_llfc.alignment.sources import Parameters
from hf_llfc.symmetry.alignment import Alignment
from hf_llfc.symmetry.expressions import Atom, AxisUse
from hf_llfc.symmetry.spec import Binding
from hf_llfc.symmetry.transforms import Permutation, Transform
from hf_llfc.symmetry.views import pieces

# Up to this width gains are accumulated in float64; wider ones in float32, whose matrix products are twice as fast.
DOUBLE_UP_TO = 1024

# A tensor: its declared name, and its index along the axes in the name.
Key = tuple[str, tuple[int, ...]]


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
        gain: What they change the objective by, against the transforms before; exact.
    """

    transforms: Mapping[str, Transform]
    gain: float


@dataclass(frozen=True)
class Pair:
    """A piece of a tensor of A and of B with the same atoms."""

    a: Tensor
    b: Tensor
    atoms: tuple[Atom, ...]


class Gains:
    """Solves one group at a time for two models.

    Args:
        a: The reference.
        b: The model that moves.
    """

    def __init__(self, a: Parameters, b: Parameters) -> None:
        self.a, self.b = a, b
        self.spec = a.binding.spec
        self.names: dict[str, list[Key]] = {}
        for key, name in a.keys.items():
            bound = a.binding.tensors[name]
            if not bound.spec.statistic:
                for axis in dict.fromkeys(use.axis for use in bound.spec.axes):
                    self.names.setdefault(axis, []).append(key)

    def keys(self, axes: Set[str]) -> list[Key]:
        """The tensors that hold one of the axes, each once."""
        return list(dict.fromkeys(key for axis in self.names if axis in axes for key in self.names[axis]))

    def objective(self, alignment: Alignment) -> float:
        """Σ ⟨A, T·B⟩ over all tensors that hold a symmetric axis."""
        total = 0.0
        for key in self.keys(set(self.spec.symmetric_axes)):
            a_tensor = self.a.read(self.a.keys[key])
            b_tensor = self.b.aligned(self.b.keys[key], alignment)
            total += _inner(a_tensor, b_tensor)
        return total

    def norms(self) -> tuple[float, float]:
        """The norms of A and of B over the tensors of the objective."""
        squares = [0.0, 0.0]
        for key in self.keys(set(self.spec.symmetric_axes)):
            for model, parameters in enumerate((self.a, self.b)):
                tensor = parameters.read(parameters.keys[key])
                squares[model] += _inner(tensor, tensor)
        return squares[0] ** 0.5, squares[1] ** 0.5

    def anchoring(self, group: Group, undetermined: Set[str]) -> float:
        """How many weights of each unit of the group lie in rows that no undetermined axis shuffles."""
        known = 0
        for key in self.keys({group.axis}):
            tensor = self.a.binding.tensors[self.a.keys[key]].spec
            others = [use.axis for use in tensor.axes if use.axis != group.axis]
            if not any(axis in undetermined for axis in others):
                shape = tensor.shape(self.a.binding.sizes)
                known += torch.Size(shape).numel()
        return known / group.size

    def solve(self, group: Group, alignment: Alignment, undetermined: Set[str] = frozenset()) -> Solution:
        """Finds the best transforms of a group with all others held.

        Args:
            group: What to match.
            alignment: The present transforms of all axes.
            undetermined: Axes whose transforms are unknown and averaged over.

        Returns:
            The transforms, and by how much the objective rises.
        """
        held = Alignment(
            self.spec,
            {
                axis: transform
                for axis, transform in alignment.transforms.items()
                if axis not in group.axes and axis not in undetermined
            },
        )
        present = {axis: alignment.transforms[axis] for axis in group.matched}
        if group.children:
            return self._solve_family(group, held, present, undetermined - group.axes)
        return self._solve_single(group, held, present[group.axis], undetermined)

    def _solve_single(self, group: Group, held: Alignment, present: Transform, undetermined: Set[str]) -> Solution:
        dtype = torch.float64 if group.size <= DOUBLE_UP_TO else torch.float32
        gain_ij = torch.zeros(group.size, group.size, dtype=dtype)
        repeated: list[Pair] = []
        own_is_known = group.axis not in undetermined
        held_pairs = (
            pair for key in self.keys(group.axes) for pair in self._key_pairs(key, key, held, undetermined - group.axes)
        )
        for pair in held_pairs:
            places = [dim for dim, atom in enumerate(pair.atoms) if _is(atom, group.axis)]
            if len(places) > 1 and own_is_known:
                repeated.append(pair)
            for place in places:
                a, b = pair.a, pair.b
                for other in places:
                    if other != place and own_is_known:
                        b = present.apply(b, other)
                    elif other != place:
                        a, b = a.sum(other, keepdim=True), b.mean(other, keepdim=True)
                gain_ij += _rows(a, place, dtype) @ _rows(b, place, dtype).T
        perm = assign(gain_ij)
        proposal = Permutation(perm)
        change = _along(gain_ij, proposal) - _along(gain_ij, present)
        for pair in repeated:  # the objective is quadratic in an axis that a tensor holds twice: count exactly
            places = [dim for dim, atom in enumerate(pair.atoms) if _is(atom, group.axis)]
            before, after = _moved(pair.b, places, present), _moved(pair.b, places, proposal)
            change += _inner(pair.a, after) - _inner(pair.a, before)
            for place in places:
                a, b = pair.a, pair.b
                for other in places:
                    if other != place:
                        b = present.apply(b, other)
                change -= _inner(a, proposal.apply(b, place)) - _inner(a, present.apply(b, place))
        if own_is_known and change <= 0:
            return Solution({group.axis: present}, 0.0)
        return Solution({group.axis: proposal}, change)

    def _solve_family(
        self, group: Group, held: Alignment, present: Mapping[str, Transform], undetermined: Set[str]
    ) -> Solution:
        size = group.size
        gain_ij = torch.full((size, size), -torch.inf, dtype=torch.float64)
        best: dict[tuple[int, int], dict[str, Tensor]] = {}
        value_of_present = 0.0
        entry_pairs = self._entry_pairs(group, held, undetermined)
        for i in range(size):
            source = present[group.axis].source(i) if group.moves else i
            for j in range(size) if group.moves else (i,):
                base, gains = _base_and_child_gains(entry_pairs(i, j), group.children)
                best[i, j] = {child: assign(gain_ab) for child, gain_ab in gains.items()}
                gain_ij[i, j] = base + sum(
                    _along(gain_ab, Permutation(best[i, j][child])) for child, gain_ab in gains.items()
                )
                if j == source:
                    value_of_present += base + sum(
                        _along(gain_ab, present[child].at(i)) for child, gain_ab in gains.items()
                    )
        perm = assign(gain_ij) if group.moves else torch.arange(size)
        change = float(gain_ij[torch.arange(size), perm].sum()) - value_of_present
        transforms: dict[str, Transform] = {group.axis: Permutation(perm)} if group.moves else {}
        for child in group.children:
            transforms[child] = Permutation(torch.stack([best[i, int(perm[i])][child] for i in range(size)]))
        return Solution(transforms, change)

    def _entry_pairs(
        self, group: Group, held: Alignment, undetermined: Set[str]
    ) -> Callable[[int, int], Iterator[Pair]]:
        """Gives, for entries i of A and j of B along a group's root, the pieces that hold them."""
        in_shapes: list[tuple[Pair, int]] = []
        in_names: dict[tuple[Any, ...], dict[int, Key]] = {}
        for key in self.keys(group.axes):
            name_axes = self.a.binding.tensors[self.a.keys[key]].spec.name_axes
            if group.axis in name_axes:
                position = name_axes.index(group.axis)
                others = (key[0], key[1][:position], key[1][position + 1 :])
                in_names.setdefault(others, {})[key[1][position]] = key
                continue
            for pair in self._key_pairs(key, key, held, undetermined):
                places = [dim for dim, atom in enumerate(pair.atoms) if _is(atom, group.axis)]
                in_shapes += [(pair, place) for place in places]

        def entry_pairs(i: int, j: int) -> Iterator[Pair]:
            for pair, place in in_shapes:
                atoms = (*pair.atoms[:place], *pair.atoms[place + 1 :])
                yield Pair(pair.a.select(place, i), pair.b.select(place, j), atoms)
            for keys in in_names.values():
                yield from self._key_pairs(keys[i], keys[j], held, undetermined)

        return entry_pairs

    def _key_pairs(
        self,
        a_key: Key,
        b_key: Key,
        held: Alignment,
        undetermined: Set[str],
    ) -> Iterator[Pair]:
        """The pieces of a tensor of A beside those of the (moved) tensor of B, unknown axes averaged over."""
        bound = self.a.binding.tensors[self.a.keys[a_key]]
        a_tensor = self.a.read(self.a.keys[a_key])
        b_tensor = self.b.aligned(self.b.keys[b_key], held)
        sizes = self.a.binding.sizes
        for (a, atoms), (b, _) in zip(
            pieces(a_tensor, bound.spec.dimensions, sizes),
            pieces(b_tensor, bound.spec.dimensions, sizes),
            strict=True,
        ):
            unknown = [dim for dim, atom in enumerate(atoms) if _in(atom, undetermined)]
            if unknown:
                a, b = a.double().sum(unknown, keepdim=True), b.double().mean(unknown, keepdim=True)
            yield Pair(a, b, atoms)


def _is(atom: Atom, axis: str) -> bool:
    return isinstance(atom, AxisUse) and atom.axis == axis


def _in(atom: Atom, axes: Set[str] | Mapping[str, int]) -> bool:
    return isinstance(atom, AxisUse) and atom.axis in axes


def _base_and_child_gains(pairs: Iterable[Pair], children: Mapping[str, int]) -> tuple[float, dict[str, Tensor]]:
    """The inner product of the pieces without a child axis, and the gains of each child over the others."""
    base = 0.0
    gains: dict[str, Tensor] = {}
    for pair in pairs:
        places = [(dim, atom) for dim, atom in enumerate(pair.atoms) if _in(atom, children)]
        if not places:
            base += _inner(pair.a, pair.b)
            continue
        place, atom = places[0]
        assert len(places) == 1 and isinstance(atom, AxisUse), "a piece holds one child axis at most"
        dtype = torch.float64 if children[atom.axis] <= DOUBLE_UP_TO else torch.float32
        gain_ab = _rows(pair.a, place, dtype) @ _rows(pair.b, place, dtype).T
        gains[atom.axis] = gains[atom.axis] + gain_ab if atom.axis in gains else gain_ab
    return base, gains


def _rows(tensor: Tensor, place: int, dtype: torch.dtype) -> Tensor:
    """The tensor as `[entries of one dimension, everything else]`."""
    return tensor.movedim(place, 0).flatten(1).to(dtype) if tensor.ndim > 1 else tensor.to(dtype)[:, None]


def _moved(tensor: Tensor, places: list[int], transform: Transform) -> Tensor:
    for place in places:
        tensor = transform.apply(tensor, place)
    return tensor


def _along(gain: Tensor, transform: Transform) -> float:
    """Σ_i gain[i, perm[i]], in float64."""
    return float(transform.apply(gain, 1).diagonal().double().sum())


def _inner(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.reshape(-1).double(), b.reshape(-1).double()))
