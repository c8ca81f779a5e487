"""Tensors seen through their axis expressions.

Products are unflattened and concatenations are split until every dimension is a single axis or a fixed size;
what is left is a set of *pieces*, views whose dimensions are atoms. Cost matrices are contracted from pieces,
transforms are applied to pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from hf_llfc.symmetry.expressions import Atom, AxisUse, Concatenation, Expression, Fixed, Product, size_of


def pieces(
    tensor: Tensor, dimensions: tuple[Expression, ...], sizes: Mapping[str, int]
) -> Iterator[tuple[Tensor, tuple[Atom, ...]]]:
    """Yields views of a tensor whose dimensions are single axes or fixed sizes.

    Args:
        tensor: Any tensor whose shape follows `dimensions`.
        dimensions: Its axis expressions.
        sizes: Size of every named axis.

    Yields:
        A view and its atoms, one piece per combination of concatenated parts.
    """
    for position, dimension in enumerate(dimensions):
        before, after = dimensions[:position], dimensions[position + 1 :]
        if isinstance(dimension, Product):
            unflattened = tensor.unflatten(position, [size_of(factor, sizes) for factor in dimension.factors])
            yield from pieces(unflattened, (*before, *dimension.factors, *after), sizes)
            return
        if isinstance(dimension, Concatenation):
            parts = tensor.split([size_of(part, sizes) for part in dimension.parts], dim=position)
            for view, part in zip(parts, dimension.parts, strict=True):
                yield from pieces(view, (*before, part, *after), sizes)
            return
    yield tensor, _as_atoms(dimensions)


def map_pieces(
    tensor: Tensor,
    dimensions: tuple[Expression, ...],
    sizes: Mapping[str, int],
    function: Callable[[Tensor, tuple[Atom, ...]], Tensor],
) -> Tensor:
    """Applies a shape-keeping function to every piece and puts the tensor together again.

    Args:
        tensor: Any tensor whose shape follows `dimensions`.
        dimensions: Its axis expressions.
        sizes: Size of every named axis.
        function: From a piece and its atoms to a tensor of the same shape.

    Returns:
        A tensor of the shape of `tensor`.
    """
    for position, dimension in enumerate(dimensions):
        before, after = dimensions[:position], dimensions[position + 1 :]
        if isinstance(dimension, Product):
            unflattened = tensor.unflatten(position, [size_of(factor, sizes) for factor in dimension.factors])
            result = map_pieces(unflattened, (*before, *dimension.factors, *after), sizes, function)
            return result.flatten(position, position + len(dimension.factors) - 1)
        if isinstance(dimension, Concatenation):
            parts = tensor.split([size_of(part, sizes) for part in dimension.parts], dim=position)
            return torch.cat(
                [
                    map_pieces(view, (*before, part, *after), sizes, function)
                    for view, part in zip(parts, dimension.parts, strict=True)
                ],
                dim=position,
            )
    return function(tensor, _as_atoms(dimensions))


def _as_atoms(dimensions: tuple[Expression, ...]) -> tuple[Atom, ...]:
    atoms: list[Atom] = []
    for dimension in dimensions:
        assert isinstance(dimension, AxisUse | Fixed)
        atoms.append(dimension)
    return tuple(atoms)
