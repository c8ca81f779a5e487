"""The cost matrices of weight matching, contracted straight from the axis expressions.

Matching maximises Σ_tensors ⟨A, T·B⟩ over the transforms T. With every other axis held, the terms that hold one
axis x are linear in the permutation of x:

    Σ_i gain[i, perm[i]],   gain[i, j] = Σ_pieces Σ_others A[.. i ..] · B'[.. j ..]

where B' is B moved along every other axis. A *group* is an axis together with the axes that depend on it
(`kv` with `q[kv]`, `experts` with `neurons[experts]`): for every pair (i, j) of parents the best permutation of the
children is an assignment of its own, so that the group's optimum is exact.

Axes that are not determined yet are averaged over in B' and summed over in A: the expectation under a uniformly
random permutation.

Gains live on the device of A's tensors. Shape suffixes: i, j an entry of the group's axis in A and B; a, b an entry of
a child; k everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_llfc.alignment.assignment import assign
from hf_llfc.alignment.sources import Parameters
from hf_llfc.errors import AlignmentError, raise_all
from hf_llfc.symmetry.alignment import Alignment
from hf_llfc.symmetry.expressions import Atom, AxisUse
from hf_llfc.symmetry.spec import Binding
from hf_llfc.symmetry.transforms import Permutation, Transform
from hf_llfc.symmetry.views import pieces

# Up to this width gains are accumulated in float64; wider ones in float32, whose matrix products are twice as fast.
DOUBLE_UP_TO = 1024

# A rise of the objective below this fraction of the terms that change is float noise.
NOISE = {torch.float64: 1e-13, torch.float32: 1e-6}

# Tensors are cast this many elements at a time: casts that leave the cache are ten times slower and take gigabytes.
CHUNK = 1 << 20

ROLES = ("the reference", "the model that moves")

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
        gain: By how much they raise the objective against the transforms before, 0 if that is not above float noise.
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
            total += _inner(a_tensor, b_tensor.to(a_tensor.device))
        return total

    def norms(self) -> tuple[float, float]:
        """The norms of A and of B over the tensors of the objective.

        Raises:
            AlignmentError: A tensor holds NaN or Inf.
        """
        squares = [0.0, 0.0]
        problems = []
        for key in self.keys(set(self.spec.symmetric_axes)):
            for model, parameters in enumerate((self.a, self.b)):
                name = parameters.keys[key]
                tensor = parameters.read(name)
                square = _inner(tensor, tensor)
                squares[model] += square
                if not math.isfinite(square):
                    problems.append(f"{name} of {parameters.label or ROLES[model]}")
        raise_all(problems, AlignmentError, "weight matching needs finite weights, NaN or Inf found")
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
        if group.children or self._is_in_names(group.axis):
            return self._solve_entrywise(group, held, present, undetermined - group.axes)
        return self._solve_at_once(group, held, present[group.axis], undetermined)

    def _is_in_names(self, axis: str) -> bool:
        return any(axis in self.a.binding.tensors[self.a.keys[key]].spec.name_axes for key in self.keys({axis}))

    def _solve_at_once(self, group: Group, held: Alignment, present: Transform, undetermined: Set[str]) -> Solution:
        """One gain matrix from all tensors, one assignment."""
        dtype = _accumulator(group.size)
        gain_ij: Tensor | None = None
        repeated: list[tuple[Pair, list[int]]] = []
        own_is_known = group.axis not in undetermined
        for pair in self._pairs(self.keys(group.axes), held, undetermined - group.axes):
            places = [dim for dim, atom in enumerate(pair.atoms) if _is(atom, group.axis)]
            if len(places) > 1 and own_is_known:
                repeated.append((pair, places))
            for place in places:
                others = [other for other in places if other != place]
                a, b = pair.a, pair.b
                if others and own_is_known:
                    b = _moved(b, others, present)
                elif others:
                    a, b = _averaged(a, b, others)
                gain_ij = _add(gain_ij, _gain(a, b, place, dtype))
        if gain_ij is None:
            return Solution({group.axis: present}, 0.0)
        proposal = Permutation(assign(gain_ij))
        before_i, after_i = _along(gain_ij, present), _along(gain_ij, proposal)
        change = float((after_i - before_i).sum())
        noise = NOISE[dtype] * float((after_i.abs() + before_i.abs())[after_i != before_i].sum())
        for pair, places in repeated:
            # The objective is quadratic in an axis that a tensor holds twice: the gains are only its slope there.
            for place in places:
                b = _moved(pair.b, [other for other in places if other != place], present)
                change -= _inner(pair.a, proposal.apply(b, place)) - _inner(pair.a, present.apply(b, place))
            before, after = _moved(pair.b, places, present), _moved(pair.b, places, proposal)
            change += _inner(pair.a, after) - _inner(pair.a, before)
        return Solution({group.axis: proposal}, change if change > noise else 0.0)

    def _solve_entrywise(
        self, group: Group, held: Alignment, present: Mapping[str, Transform], undetermined: Set[str]
    ) -> Solution:
        """For every pair of entries of the root an assignment of its children, and one assignment of the root."""
        size = group.size
        gain_ij = torch.zeros(size, size, dtype=torch.float64)
        best: dict[tuple[int, int], dict[str, Permutation]] = {}
        value_of_present = 0.0
        entry_pairs = self._entry_pairs(group, held, undetermined)
        for i in range(size):
            source = present[group.axis].source(i) if group.moves else i
            for j in range(size) if group.moves else (i,):
                base, gains = _base_and_child_gains(entry_pairs(i, j), group.children)
                best[i, j] = {child: Permutation(assign(gain_ab)) for child, gain_ab in gains.items()}
                gain_ij[i, j] = base + sum(
                    float(_along(gain_ab, best[i, j][child]).sum()) for child, gain_ab in gains.items()
                )
                if j == source:
                    value_of_present += base + sum(
                        float(_along(gain_ab, present[child].at(i)).sum()) for child, gain_ab in gains.items()
                    )
        root = Permutation(assign(gain_ij)) if group.moves else Permutation.identity(size)
        value = float(_along(gain_ij, root).sum())
        transforms: dict[str, Transform] = {group.axis: root} if group.moves else {}
        for child in group.children:
            transforms[child] = Permutation(torch.stack([best[i, root.source(i)][child].perm for i in range(size)]))
        noise = max(NOISE[_accumulator(child_size)] for child_size in (1, *group.children.values())) * abs(value)
        return Solution(transforms, value - value_of_present if value - value_of_present > noise else 0.0)

    def _entry_pairs(
        self, group: Group, held: Alignment, undetermined: Set[str]
    ) -> Callable[[int, int], Iterator[Pair]]:
        """Gives, for entries i of A and j of B along a group's root, the pieces that hold them."""
        keys_in_shapes: list[Key] = []
        in_names: dict[tuple[Any, ...], dict[int, Key]] = {}
        for key in self.keys(group.axes):
            name_axes = self.a.binding.tensors[self.a.keys[key]].spec.name_axes
            if group.axis in name_axes:
                position = name_axes.index(group.axis)
                others = (key[0], key[1][:position], key[1][position + 1 :])
                in_names.setdefault(others, {})[key[1][position]] = key
            else:
                keys_in_shapes.append(key)
        in_shapes = [
            (pair, use[0])
            for pair in self._pairs(keys_in_shapes, held, undetermined)
            if (use := _only_use(pair, {group.axis})) is not None
        ]

        def entry_pairs(i: int, j: int) -> Iterator[Pair]:
            for pair, place in in_shapes:
                atoms = (*pair.atoms[:place], *pair.atoms[place + 1 :])
                yield Pair(pair.a.select(place, i), pair.b.select(place, j), atoms)
            for keys in in_names.values():
                yield from self._key_pairs(keys[i], keys[j], held, undetermined)

        return entry_pairs

    def _pairs(self, keys: Iterable[Key], held: Alignment, undetermined: Set[str]) -> Iterator[Pair]:
        """The pieces of A beside those of the (moved) B, unknown axes averaged over, also those in names."""
        alike: dict[tuple[str, tuple[int | None, ...]], list[Key]] = {}
        for name, index in keys:
            name_axes = self.a.binding.tensors[self.a.keys[name, index]].spec.name_axes
            known = tuple(None if axis in undetermined else place for axis, place in zip(name_axes, index, strict=True))
            alike.setdefault((name, known), []).append((name, index))
        for first, *more in alike.values():
            pairs = list(self._key_pairs(first, first, held, undetermined))
            for key in more:
                added = self._key_pairs(key, key, held, undetermined)
                pairs = [
                    Pair(total.a.double() + pair.a, total.b.double() + pair.b, pair.atoms)
                    for total, pair in zip(pairs, added, strict=True)
                ]
            for pair in pairs:
                yield Pair(pair.a, pair.b / (1 + len(more)), pair.atoms) if more else pair

    def _key_pairs(self, a_key: Key, b_key: Key, held: Alignment, undetermined: Set[str]) -> Iterator[Pair]:
        """The pieces of a tensor of A beside those of the (moved) tensor of B, unknown axes averaged over."""
        bound = self.a.binding.tensors[self.a.keys[a_key]]
        a_tensor = self.a.read(self.a.keys[a_key])
        b_tensor = self.b.aligned(self.b.keys[b_key], held).to(a_tensor.device)
        sizes = self.a.binding.sizes
        for (a, atoms), (b, _) in zip(
            pieces(a_tensor, bound.spec.dimensions, sizes),
            pieces(b_tensor, bound.spec.dimensions, sizes),
            strict=True,
        ):
            unknown = [dim for dim, atom in enumerate(atoms) if _in(atom, undetermined)]
            yield Pair(*_averaged(a, b, unknown), atoms)


def _is(atom: Atom, axis: str) -> bool:
    return isinstance(atom, AxisUse) and atom.axis == axis


def _only_use(pair: Pair, axes: Set[str] | Mapping[str, int]) -> tuple[int, str] | None:
    """Where a piece holds one of the axes, and which; None if it holds none."""
    uses = [(dim, atom.axis) for dim, atom in enumerate(pair.atoms) if isinstance(atom, AxisUse) and atom.axis in axes]
    if len(uses) > 1:
        names = " and ".join(axis for _, axis in uses)
        raise AlignmentError(f"weight matching cannot match {names} of one tensor together; hold one of them fixed")
    return uses[0] if uses else None


def _in(atom: Atom, axes: Set[str] | Mapping[str, int]) -> bool:
    return isinstance(atom, AxisUse) and atom.axis in axes


def _accumulator(size: int) -> torch.dtype:
    return torch.float64 if size <= DOUBLE_UP_TO else torch.float32


def _base_and_child_gains(pairs: Iterable[Pair], children: Mapping[str, int]) -> tuple[float, dict[str, Tensor]]:
    """The inner product of the pieces without a child axis, and the gains of each child over the others."""
    base = 0.0
    gains: dict[str, Tensor | None] = dict.fromkeys(children)
    for pair in pairs:
        use = _only_use(pair, children)
        if use is None:
            base += _inner(pair.a, pair.b)
            continue
        place, child = use
        gains[child] = _add(gains[child], _gain(pair.a, pair.b, place, _accumulator(children[child])))
    return base, {
        child: torch.zeros(children[child], children[child]) if g is None else g for child, g in gains.items()
    }


def _gain(a: Tensor, b: Tensor, place: int, dtype: torch.dtype) -> Tensor:
    """Σ_k A[.. i ..] B[.. j ..] over everything but one dimension, `[i, j]`."""
    size = a.shape[place]
    a_ki, b_kj = (tensor.movedim(place, -1).reshape(-1, size) for tensor in (a, b))
    gain_ij = torch.zeros(size, size, dtype=dtype, device=a.device)
    rows = max(1, CHUNK // size)
    for a_part, b_part in zip(a_ki.split(rows), b_kj.split(rows), strict=True):
        gain_ij.addmm_(a_part.to(dtype).T, b_part.to(dtype))
    return gain_ij


def _add(total: Tensor | None, gain: Tensor) -> Tensor:
    return gain if total is None else total.add_(gain)


def _averaged(a: Tensor, b: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """A summed and B averaged over dimensions, in float64."""
    if not dims:
        return a, b
    return a.sum(dims, keepdim=True, dtype=torch.float64), b.mean(dims, keepdim=True, dtype=torch.float64)


def _moved(tensor: Tensor, places: list[int], transform: Transform) -> Tensor:
    for place in places:
        tensor = transform.apply(tensor, place)
    return tensor


def _along(gain_ij: Tensor, transform: Transform) -> Tensor:
    """gain[i, perm[i]] for every i, in float64."""
    return transform.apply(gain_ij, 1).diagonal().double()


def _inner(a: Tensor, b: Tensor) -> float:
    """⟨A, B⟩ in float64."""
    parts = zip(a.reshape(-1).split(CHUNK), b.reshape(-1).split(CHUNK), strict=True)
    return sum(float(torch.dot(a_part.double(), b_part.double())) for a_part, b_part in parts)
