"""The cost matrices of weight matching, contracted straight from the axis expressions.

Matching maximises Σ_tensors ⟨A, T·B⟩ over the transforms T. With every other axis held, the terms that hold one
axis x are linear in the permutation of x:

    Σ_i gain[i, perm[i]],   gain[i, j] = Σ_pieces Σ_others A[.. i ..] · B'[.. j ..]

where B' is B moved along every other axis. An axis is matched together with the axes that depend on it (`heads` with
`value_dim[heads]`, say): the gains of every pair (i, j) of its entries are blocks of one large matrix product,
`[i, a, j, b]`; `hf_llfc.alignment.groups` says what is then solved exactly.

Axes that are not determined yet are averaged over in B' and summed over in A: the expectation under a uniformly
random permutation. The expectation under a group of matrices is zero, so that a tensor that holds an undetermined axis
of that kind says nothing. The best matrix of such an axis, with its gain, is in closed form what the assignment is for
a permutation: Σ_ij gain[i, j] M[i, j] is largest for the nearest matrix of the group
(`hf_llfc.symmetry.matrix_groups`).

Gains live on the device of A's tensors. Shape suffixes: i, j an entry of the group's axis in A and B; a, b an entry of
a child; k everything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import chain, product
from math import prod
from typing import Any

import torch
from torch import Tensor

from hf_llfc.alignment.assignment.assignment import assign_with_gap
from hf_llfc.alignment.groups import NOISE, Group, PairGains, Solution, signs_of, solve_group, solve_signed, tried
from hf_llfc.alignment.sources import Parameters
from hf_llfc.errors import AlignmentError, raise_all
from hf_llfc.parallel.workers import ALONE, Workers, largest_share
from hf_llfc.symmetry.declarations import PERMUTATION
from hf_llfc.symmetry.expressions import Atom, AxisUse, atoms_of_pieces
from hf_llfc.symmetry.matrix_groups import MATRIX_GROUPS
from hf_llfc.symmetry.orthogonal import Orthogonal
from hf_llfc.symmetry.spec import Alignment
from hf_llfc.symmetry.transforms import Permutation, Transform
from hf_llfc.symmetry.views import pieces

# Up to this width gains are accumulated in float64; wider ones in float32, whose matrix products are twice as fast.
DOUBLE_UP_TO = 1024

# Tensors are cast this many elements at a time: casts that leave the cache are ten times slower and take gigabytes.
CHUNK = 1 << 20

# Inner products cast fewer at a time, which never leave the cache: ten times as fast again.
CACHED = 1 << 16

# How often a number is written again on its way into a matrix product: moved along its axes, and cast.
CASTS = 3

ROLES = ("the reference", "the model that moves")

# A block of gains between entries of a group's root holds at most this many numbers, or one pair of entries.
BLOCK = 1 << 26

# A gain matrix that takes more operations than this is summed in so many parts, which workers share. The parts are
# always the same, so that the sum does not depend on the workers.
SHARED_FROM = 1e10
PARTS = 8

# What one assignment of a pair of root entries takes, in operations of a matrix product: half a millisecond.
ONE_ASSIGNMENT = 2e7

# What it takes to send an entry of a gain matrix to another process, in operations of a matrix product: 10 ns.
SENT = 1500

# A tensor: its declared name, and its index along the axes in the name.
Key = tuple[str, tuple[int, ...]]


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
        workers: Where tensors are worked on.
        solver: One of `SOLVERS`.
    """

    def __init__(self, a: Parameters, b: Parameters, *, workers: Workers = ALONE, solver: str = "exact") -> None:
        self.a, self.b = a, b
        self.workers, self.solver = workers, solver
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
        keys = self.keys(set(self.spec.symmetric_axes))
        return sum(self.workers.map(lambda key: self._inner(key, alignment), keys, costs=self._elements(keys)))

    def _inner(self, key: Key, alignment: Alignment) -> float:
        """⟨A, T·B⟩ of one tensor."""
        a_tensor = self.a.read(self.a.keys[key])
        return _inner(a_tensor, self.b.aligned(self.b.keys[key], alignment).to(a_tensor.device))

    def _elements(self, keys: Iterable[Key]) -> list[float]:
        tensors = (self.a.binding.tensors[self.a.keys[key]].spec for key in keys)
        return [float(prod(tensor.shape(self.a.binding.sizes))) for tensor in tensors]

    def norms(self) -> tuple[float, float, float]:
        """The norms of A and of B over the tensors of the objective, and the objective where nothing moves.

        Raises:
            AlignmentError: A tensor holds NaN or Inf.
        """

        def products_of(key: Key) -> list[float]:
            a, b = (parameters.read(parameters.keys[key]) for parameters in (self.a, self.b))
            b = b.to(a.device)
            products = [0.0, 0.0, 0.0]
            for a_part, b_part in zip(a.reshape(-1).split(CACHED), b.reshape(-1).split(CACHED), strict=True):
                a_part, b_part = a_part.double(), b_part.double()
                for index, (left, right) in enumerate(((a_part, a_part), (b_part, b_part), (a_part, b_part))):
                    products[index] += float(torch.dot(left, right))
            return products

        keys = self.keys(set(self.spec.symmetric_axes))
        totals = [0.0, 0.0, 0.0]
        problems = []
        for key, products in zip(keys, self.workers.map(products_of, keys, costs=self._elements(keys)), strict=True):
            totals = [total + product for total, product in zip(totals, products, strict=True)]
            for model, (parameters, square) in enumerate(zip((self.a, self.b), products[:2], strict=True)):
                if not math.isfinite(square):
                    problems.append(f"{parameters.keys[key]} of {parameters.label or ROLES[model]}")
        raise_all(problems, AlignmentError, "weight matching needs finite weights, NaN or Inf found")
        return totals[0] ** 0.5, totals[1] ** 0.5, totals[2]

    def elements(self, group: Group) -> float:
        """Number of elements in the tensors of a group, in one of the models."""
        return sum(self._elements(self.keys(group.axes)))

    def operations(self, group: Group) -> float:
        """Number of additions and multiplications for the gains of a group."""
        keys = self.keys(group.axes)
        size = group.size if group.moves else 1
        widths = (size * self._width(key, group) for key in keys)
        return sum(2.0 * elements * width for elements, width in zip(self._elements(keys), widths, strict=True))

    def cost(self, group: Group) -> float:
        """Cost of solving a group, in operations of a matrix product: its gains, and the choices of children."""
        pairs = group.size**2 if group.moves else group.size
        return self.operations(group) + (ONE_ASSIGNMENT * pairs * tried(group) if group.children else 0.0)

    def cost_together(self, group: Group) -> float:
        """Cost for each worker of solving a group together, in the unit of `cost`: its part, and sending it."""
        parts = [sum(self._elements(part)) for part in self._shares(self.keys(group.axes), frozenset())]
        share = largest_share(parts, self.workers.ranks) / sum(parts) / self.workers.threads
        return share * self.cost(group) + (SENT * group.size**2 if self.workers.ranks > 1 else 0.0)

    def is_shared(self, group: Group) -> bool:
        """Whether workers can share the gains of one group."""
        return not (
            group.children
            or self._is_in_names(group.axis)
            or self._quadratic(group)
            or self.operations(group) < SHARED_FROM
        )

    def anchoring(self, group: Group, undetermined: Set[str]) -> float:
        """Number of weights of each unit of the group in rows that no undetermined axis shuffles."""
        known = 0.0
        for key in self.keys({group.axis}):
            tensor = self.a.binding.tensors[self.a.keys[key]].spec
            others = [use.axis for use in tensor.axes if use.axis != group.axis]
            if not any(axis in undetermined for axis in others):
                shape = tensor.shape(self.a.binding.sizes)
                known += torch.Size(shape).numel() / self._width(key, group)
        return known / group.size

    def solve(
        self,
        group: Group,
        alignment: Alignment,
        undetermined: Set[str] = frozenset(),
        *,
        workers: Workers = ALONE,
    ) -> Solution:
        """Finds the best transforms of a group with all others held.

        Args:
            group: What to match.
            alignment: The present transforms of all axes.
            undetermined: Axes whose transforms are unknown and averaged over.
            workers: Where the tensors of a large group are worked on.

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
            return self._solve_with_children(group, held, present, undetermined - group.axes)
        return self._solve_at_once(group, held, present[group.axis], undetermined, workers)

    def _is_in_names(self, axis: str) -> bool:
        return any(axis in self.a.binding.tensors[self.a.keys[key]].spec.name_axes for key in self.keys({axis}))

    def _solve_at_once(
        self, group: Group, held: Alignment, present: Transform, undetermined: Set[str], workers: Workers
    ) -> Solution:
        """One gain matrix from all tensors, one assignment."""
        dtype = _accumulator(group.size)
        quadratic = set(self._quadratic(group))
        repeated: list[tuple[Pair, list[int]]] = []
        own_is_known = group.axis not in undetermined

        def gain_of(keys: list[Key]) -> Tensor | None:
            gain_ij: Tensor | None = None
            for pair in self._pairs(keys, held, undetermined - group.axes):
                dims = [dim for dim, atom in enumerate(pair.atoms) if _is(atom, group.axis)]
                if len(dims) > 1 and own_is_known:
                    repeated.append((pair, dims))
                for dim in dims:
                    others = [other for other in dims if other != dim]
                    a, b = pair.a, pair.b
                    if others and own_is_known:
                        b = _moved(b, others, present)
                    elif others:
                        a, b = _summed(a, others), _averaged(b, others)
                    gain_ij = _add(gain_ij, _gain(a, b, [dim], dtype))
            return gain_ij

        keys = self._telling(self.keys(group.axes), undetermined - group.axes)
        if group.axis in group.matrices and not own_is_known:
            keys = [key for key in keys if key not in quadratic]
        if not self.is_shared(group):
            gain_ij = gain_of(keys)
        else:
            gain_ij = workers.sum(gain_of, self._shares(keys, undetermined - group.axes))
        if gain_ij is None:
            return Solution({group.axis: present}, 0.0)
        proposal, gap = self._best(group, gain_ij)
        before_i, after_i = _along(gain_ij, present), _along(gain_ij, proposal)
        change = float((after_i - before_i).sum())
        noise = NOISE[dtype] * float((after_i.abs() + before_i.abs())[after_i != before_i].sum())
        for pair, dims in repeated:
            # The objective is quadratic in an axis that a tensor holds twice: the gains are only its slope there.
            for dim in dims:
                b = _moved(pair.b, [other for other in dims if other != dim], present)
                change -= _inner(pair.a, proposal.apply(b, dim)) - _inner(pair.a, present.apply(b, dim))
            before, after = _moved(pair.b, dims, present), _moved(pair.b, dims, proposal)
            change += _inner(pair.a, after) - _inner(pair.a, before)
        return Solution({group.axis: proposal}, change if change > noise else 0.0, gap=gap)

    def _best(self, group: Group, gain_ij: Tensor) -> tuple[Transform, float]:
        """The best transform of a root by its gains, and by how much another could be better at most."""
        if group.axis in group.matrices:
            return Orthogonal(MATRIX_GROUPS[group.matrices[group.axis]].nearest(gain_ij.cpu().double())), 0.0
        perm, gap = assign_with_gap(gain_ij, solver=self.solver)
        return Permutation(perm), gap

    def _shares(self, keys: list[Key], undetermined: Set[str]) -> list[list[Key]]:
        """Tensors in at most `PARTS` parts of about the same size; those that are averaged together stay together."""
        name_axes = (self.a.binding.tensors[self.a.keys[key]].spec.name_axes for key in keys)
        if any(axis in undetermined for axes in name_axes for axis in axes):
            return [keys]
        elements = self._elements(keys)
        parts: list[list[Key]] = [[] for _ in range(PARTS)]
        loads = [0.0] * PARTS
        for key, size in sorted(zip(keys, elements, strict=True), key=lambda item: -item[1]):
            lightest = loads.index(min(loads))
            parts[lightest].append(key)
            loads[lightest] += size
        return [part for part in parts if part]

    def _solve_with_children(
        self, group: Group, held: Alignment, present: Mapping[str, Transform], undetermined: Set[str]
    ) -> Solution:
        """The best transforms of a root with its children.

        The objective is quadratic in an axis that a tensor holds twice (mixed heads, `heads heads`, or a recurrence
        inside each head). Such tensors take no part in the choice; they decide whether it is an improvement.
        """
        keys, quadratic = self._telling(self.keys(group.axes), undetermined), self._quadratic(group)
        linear = [key for key in keys if key not in quadratic]
        if signs_of(group) is not None and not quadratic:
            return self._solve_signed(linear, group, held, present, undetermined)
        solution = solve_group(group, self._pair_gains(linear, group, held, undetermined), present)
        if not quadratic or not solution.gain:
            return solution
        before, after = (
            sum(self._inner(key, Alignment(self.spec, {**held.transforms, **transforms})) for key in quadratic)
            for transforms in (present, solution.transforms)
        )
        return replace(solution, gain=max(0.0, solution.gain + after - before))

    def _solve_signed(
        self, keys: list[Key], group: Group, held: Alignment, present: Mapping[str, Transform], undetermined: Set[str]
    ) -> Solution:
        """The best transforms of a root whose only child is a sign."""
        gains: dict[bool, Tensor] = {}
        for rows, columns, of_block in self._blocks(keys, group, held, undetermined):
            for children, gain in of_block.items():
                whole = gains.setdefault(
                    bool(children), torch.zeros(group.size, group.size, dtype=gain.dtype, device=gain.device)
                )
                whole[rows.start : rows.stop, columns.start : columns.stop] += gain[:, 0, :, 0]
        return solve_signed(group, gains.get(False), gains.get(True), present, self.solver)

    def _telling(self, keys: list[Key], undetermined: Set[str]) -> list[Key]:
        """The tensors that do not vanish on average over the axes that are not determined."""
        silent = {axis for axis in undetermined if self.spec.axes[axis].group != PERMUTATION}
        return [
            key
            for key in keys
            if silent.isdisjoint(use.axis for use in self.a.binding.tensors[self.a.keys[key]].spec.axes)
        ]

    def _quadratic(self, group: Group) -> list[Key]:
        """The tensors that hold an axis of the group twice."""

        def holds_twice(key: Key) -> bool:
            dimensions = self.a.binding.tensors[self.a.keys[key]].spec.dimensions
            return any(
                sum(_is(atom, axis) for atom in atoms) > 1
                for atoms in atoms_of_pieces(dimensions)
                for axis in group.axes
            )

        return [key for key in self.keys(group.axes) if holds_twice(key)]

    def _pair_gains(
        self, keys: list[Key], group: Group, held: Alignment, undetermined: Set[str]
    ) -> Iterator[tuple[int, int, PairGains]]:
        """The gains of every pair of entries of the root, or of each entry with itself where the root does not move."""
        for rows, columns, gain_iajb in self._blocks(keys, group, held, undetermined):
            if len(rows) > 1:  # many small assignments, which are solved on the CPU
                gain_iajb = {axes: gain.cpu() for axes, gain in gain_iajb.items()}
            for (row, i), (column, j) in product(enumerate(rows), enumerate(columns)):
                yield i, j, {axes: gain[row, :, column] for axes, gain in gain_iajb.items()}

    def _blocks(
        self, keys: list[Key], group: Group, held: Alignment, undetermined: Set[str]
    ) -> Iterator[tuple[range, range, dict[tuple[str, ...], Tensor]]]:
        """Gains `[i, a, j, b]` of a block of root entries of A with one of B, or of single entries with themselves."""
        in_names = self._by_root(keys, group.axis)
        named = {key for of_root in in_names for key in of_root.values()}
        in_shapes = [
            _root_first(pair, dim)
            for pair in self._pairs([key for key in keys if key not in named], held, undetermined)
            if (dim := _place(pair.atoms, group.axis)) is not None
        ]
        widest = max((self._width(key, group) for key in keys), default=1)
        step = max(1, math.isqrt(BLOCK) // widest) if group.moves else 1
        parts = [range(start, min(start + step, group.size)) for start in range(0, group.size, step)]
        for rows, columns in product(parts, parts) if group.moves else zip(parts, parts, strict=True):
            gain_iajb: dict[tuple[str, ...], Tensor] = {}
            stacked = (self._stacked(of_root, rows, columns, held, undetermined) for of_root in in_names)
            for pair in chain((_part(pair, rows, columns) for pair in in_shapes), *stacked):
                dim_of = {child: _place(pair.atoms, child) for child in group.children}
                children = tuple(child for child, dim in dim_of.items() if dim is not None)
                dims = [1 + dim for dim in dim_of.values() if dim is not None]
                width = prod(group.children[child] for child in children)
                gain = _gain(pair.a, pair.b, [0, *dims], _accumulator(group.size * width))
                gain = gain.reshape(len(rows), width, len(columns), width)
                gain_iajb[children] = _add(gain_iajb.get(children), gain)
            yield rows, columns, gain_iajb

    def _by_root(self, keys: Iterable[Key], root: str) -> list[dict[int, Key]]:
        """The tensors whose name carries the index along a root, each with its kin: index → tensor."""
        kin: dict[tuple[Any, ...], dict[int, Key]] = {}
        for name, index in keys:
            name_axes = self.a.binding.tensors[self.a.keys[name, index]].spec.name_axes
            if root in name_axes:
                position = name_axes.index(root)
                kin.setdefault((name, index[:position], index[position + 1 :]), {})[index[position]] = (name, index)
        return list(kin.values())

    def _width(self, key: Key, group: Group) -> int:
        """Number of entries of the group's children that a tensor holds together for one entry of the root."""
        dimensions = self.a.binding.tensors[self.a.keys[key]].spec.dimensions
        return max(
            prod(
                group.children[atom.axis] for atom in atoms if isinstance(atom, AxisUse) and atom.axis in group.children
            )
            for atoms in atoms_of_pieces(dimensions)
        )

    def _stacked(
        self, keys: Mapping[int, Key], rows: range, columns: range, held: Alignment, undetermined: Set[str]
    ) -> Iterator[Pair]:
        """The pieces of tensors that have the root in their names, with the root as first dimension."""
        a_pieces = [list(self._pieces_of_a(keys[i], undetermined)) for i in rows]
        b_pieces = [list(self._pieces_of_b(keys[j], held, undetermined)) for j in columns]
        for number, (_, atoms) in enumerate(a_pieces[0]):
            a, b = (torch.stack([pieces[number][0] for pieces in side]) for side in (a_pieces, b_pieces))
            yield Pair(a, b.to(a.device), atoms)

    def _pairs(self, keys: Iterable[Key], held: Alignment, undetermined: Set[str]) -> Iterator[Pair]:
        """The pieces of A beside those of the (moved) B, unknown axes averaged over, also those in names."""
        alike: dict[tuple[str, tuple[int | None, ...]], list[Key]] = {}
        for name, index in keys:
            name_axes = self.a.binding.tensors[self.a.keys[name, index]].spec.name_axes
            known = tuple(None if axis in undetermined else entry for axis, entry in zip(name_axes, index, strict=True))
            alike.setdefault((name, known), []).append((name, index))
        for first, *more in alike.values():
            pairs = list(self._key_pairs(first, held, undetermined))
            for key in more:
                added = self._key_pairs(key, held, undetermined)
                pairs = [
                    Pair(total.a.double() + pair.a, total.b.double() + pair.b, pair.atoms)
                    for total, pair in zip(pairs, added, strict=True)
                ]
            for pair in pairs:
                yield Pair(pair.a, pair.b / (1 + len(more)), pair.atoms) if more else pair

    def _key_pairs(self, key: Key, held: Alignment, undetermined: Set[str]) -> Iterator[Pair]:
        """The pieces of a tensor of A beside those of the (moved) tensor of B, unknown axes averaged over."""
        a_pieces, b_pieces = self._pieces_of_a(key, undetermined), self._pieces_of_b(key, held, undetermined)
        for (a, atoms), (b, _) in zip(a_pieces, b_pieces, strict=True):
            yield Pair(a, b.to(a.device), atoms)

    def _pieces_of_a(self, key: Key, undetermined: Set[str]) -> Iterator[tuple[Tensor, tuple[Atom, ...]]]:
        """The pieces of a tensor of A, summed over unknown axes."""
        dimensions = self.a.binding.tensors[self.a.keys[key]].spec.dimensions
        for piece, atoms in pieces(self.a.read(self.a.keys[key]), dimensions, self.a.binding.sizes):
            yield _summed(piece, _unknown(atoms, undetermined)), atoms

    def _pieces_of_b(
        self, key: Key, held: Alignment, undetermined: Set[str]
    ) -> Iterator[tuple[Tensor, tuple[Atom, ...]]]:
        """The pieces of a tensor of the moved B, averaged over unknown axes."""
        dimensions = self.a.binding.tensors[self.a.keys[key]].spec.dimensions
        for piece, atoms in pieces(self.b.aligned(self.b.keys[key], held), dimensions, self.a.binding.sizes):
            yield _averaged(piece, _unknown(atoms, undetermined)), atoms


def _is(atom: Atom, axis: str) -> bool:
    return isinstance(atom, AxisUse) and atom.axis == axis


def _root_first(pair: Pair, dim: int) -> Pair:
    """The pair with the root as first dimension, left out of the atoms."""
    atoms = (*pair.atoms[:dim], *pair.atoms[dim + 1 :])
    return Pair(pair.a.movedim(dim, 0), pair.b.movedim(dim, 0), atoms)


def _place(atoms: Iterable[Atom], axis: str) -> int | None:
    return next((dim for dim, atom in enumerate(atoms) if _is(atom, axis)), None)


def _unknown(atoms: Iterable[Atom], undetermined: Set[str]) -> list[int]:
    return [dim for dim, atom in enumerate(atoms) if isinstance(atom, AxisUse) and atom.axis in undetermined]


def _part(pair: Pair, rows: range, columns: range) -> Pair:
    """Some entries along the first dimension, rows of A and columns of B."""
    return Pair(pair.a[rows.start : rows.stop], pair.b[columns.start : columns.stop], pair.atoms)


def _accumulator(size: int) -> torch.dtype:
    return torch.float64 if size <= DOUBLE_UP_TO else torch.float32


def _gain(a: Tensor, b: Tensor, dims: list[int], dtype: torch.dtype) -> Tensor:
    """Σ_k A[.. i ..] B[.. j ..] over everything but some dimensions, `[i, j]`, of several their row-major product."""
    a_ki, b_kj = (_entries_last(tensor, dims) for tensor in (a, b))
    gain_ij = torch.zeros(a_ki.shape[1], b_kj.shape[1], dtype=dtype, device=a.device)
    rows = max(1, CHUNK // a_ki.shape[1])
    for a_part, b_part in zip(_cast(a_ki.split(rows), dtype), _cast(b_kj.split(rows), dtype), strict=True):
        gain_ij.addmm_(a_part.T, b_part)
    return gain_ij


def _cast(parts: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Parts in another dtype, one after the other in the same memory: fresh memory takes longer than the cast."""
    room: Tensor | None = None
    for part in parts:
        if part.dtype == dtype:
            yield part
        else:
            room = torch.empty_like(part, dtype=dtype) if room is None else room
            fitting = room if room.shape == part.shape else torch.empty_like(part, dtype=dtype)
            yield fitting.copy_(part)


def _entries_last(tensor: Tensor, dims: list[int]) -> Tensor:
    size = prod(tensor.shape[dim] for dim in dims)
    return tensor.movedim(dims, list(range(-len(dims), 0))).reshape(-1, size)


def _add(total: Tensor | None, gain: Tensor) -> Tensor:
    return gain if total is None else total.add_(gain)


def _summed(tensor: Tensor, dims: list[int]) -> Tensor:
    """Summed over dimensions in float64, if there are any."""
    return tensor.sum(dims, keepdim=True, dtype=torch.float64) if dims else tensor


def _averaged(tensor: Tensor, dims: list[int]) -> Tensor:
    """Averaged over dimensions in float64, if there are any."""
    return tensor.mean(dims, keepdim=True, dtype=torch.float64) if dims else tensor


def _moved(tensor: Tensor, dims: list[int], transform: Transform) -> Tensor:
    for dim in dims:
        tensor = transform.apply(tensor, dim)
    return tensor


def _along(gain_ij: Tensor, transform: Transform) -> Tensor:
    """gain[i, perm[i]] for every i, in float64."""
    return transform.apply(gain_ij, 1).diagonal().double()


def _inner(a: Tensor, b: Tensor) -> float:
    """⟨A, B⟩ in float64."""
    parts = zip(a.reshape(-1).split(CACHED), b.reshape(-1).split(CACHED), strict=True)
    return sum(float(torch.dot(a_part.double(), b_part.double())) for a_part, b_part in parts)
