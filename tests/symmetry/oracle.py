"""A plain oracle for axis expressions: every entry of a tensor by name, in loops over indices.

The *coordinate* of an entry is which concatenated parts it lies in, and its index along every atom, in order.
"""

import math
from collections.abc import Mapping
from itertools import product

import torch
from hypothesis import strategies as st
from torch import Tensor

from hf_llfc.symmetry.expressions import AxisUse, Concatenation, Expression, Fixed, Product

# Every axis of the expressions that `expressions` draws; `inner` depends on `outer`.
SIZES = {"outer": 3, "inner": 4, "wide": 5, "heads.3": 2, "heads.12": 3}
USES = [AxisUse("outer"), AxisUse("inner", "outer"), AxisUse("wide"), AxisUse("heads.3"), AxisUse("heads.12")]
FIXED = [Fixed(1), Fixed(2), Fixed(3)]

Coordinate = tuple[tuple[int, ...], tuple[tuple[Expression, int], ...]]


def coordinates(expression: Expression, sizes: Mapping[str, int] = SIZES) -> list[Coordinate]:
    """The coordinate of each entry along one dimension, first to last."""
    match expression:
        case Fixed(size=size):
            return [((), ((expression, index),)) for index in range(size)]
        case AxisUse(axis=axis):
            return [((), ((expression, index),)) for index in range(sizes[axis])]
        case Concatenation(parts=parts):
            return [
                ((number, *path), atoms)
                for number, part in enumerate(parts)
                for path, atoms in coordinates(part, sizes)
            ]
        case Product(factors=factors):
            return [joined(entry) for entry in product(*(coordinates(factor, sizes) for factor in factors))]


def joined(entry: tuple[Coordinate, ...]) -> Coordinate:
    return tuple(step for path, _ in entry for step in path), tuple(atom for _, atoms in entry for atom in atoms)


def tensor_coordinates(dimensions: tuple[Expression, ...], sizes: Mapping[str, int] = SIZES) -> list[Coordinate]:
    """The coordinate of each entry of a tensor, in row-major order."""
    return [joined(entry) for entry in product(*(coordinates(dimension, sizes) for dimension in dimensions))]


def moved(
    tensor: Tensor,
    dimensions: tuple[Expression, ...],
    permutations: Mapping[str, list],
    sizes: Mapping[str, int] = SIZES,
) -> Tensor:
    """`aligned[e, n] = original[p[e], q[e][n]]`, entry by entry.

    Args:
        tensor: the original.
        dimensions: its axis expressions.
        permutations: indices by axis; for a dependent axis, one list per index of its parent.
        sizes: size of every axis.
    """
    entries = tensor_coordinates(dimensions, sizes)
    position_of = {entry: position for position, entry in enumerate(entries)}
    sources = []
    for path, atoms in entries:
        index_of = {atom.axis: index for atom, index in atoms if isinstance(atom, AxisUse)}
        source = []
        for atom, index in atoms:
            if isinstance(atom, AxisUse) and atom.axis in permutations:
                permutation = permutations[atom.axis]
                index = permutation[index] if atom.parent is None else permutation[index_of[atom.parent]][index]
            source.append((atom, index))
        sources.append(position_of[path, tuple(source)])
    return tensor.flatten()[torch.tensor(sources, dtype=torch.long)].reshape(tensor.shape)


def expressions(atoms: list[Expression], depth: int = 2) -> st.SearchStrategy[Expression]:
    """Expressions as the parser builds them: products and concatenations of at least two, no `(a + b) + c`."""
    expression = st.sampled_from(atoms)
    for _ in range(depth):
        several = st.lists(expression, min_size=2, max_size=3).map(tuple)
        expression = st.one_of(expression, several.map(Product), several.map(concatenation))
    return expression


def concatenation(parts: tuple[Expression, ...]) -> Concatenation:
    flat = (part.parts if isinstance(part, Concatenation) else (part,) for part in parts)
    return Concatenation(tuple(part for several in flat for part in several))


def entries_in(dimensions: tuple[Expression, ...]) -> int:
    return math.prod(len(coordinates(dimension)) for dimension in dimensions)
