from itertools import product

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hf_llfc.symmetry import parse
from hf_llfc.symmetry.expressions import size_of
from hf_llfc.symmetry.views import map_pieces, pieces
from tests.symmetry.oracle import FIXED, SIZES, USES, entries_in, expressions, tensor_coordinates

SHAPES = st.lists(expressions(USES + FIXED), min_size=0, max_size=3).map(tuple)


def numbered(dimensions):
    """A tensor that holds the position of each of its entries."""
    assume(entries_in(dimensions) <= 3000)
    shape = [size_of(dimension, SIZES) for dimension in dimensions]
    return torch.arange(entries_in(dimensions)).reshape(shape)


@given(SHAPES)
def test_pieces_hold_every_entry_once_and_where_its_coordinate_says(dimensions):
    tensor = numbered(dimensions)
    entries = tensor_coordinates(dimensions)
    seen = []
    for view, atoms in pieces(tensor, dimensions, SIZES):
        assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr(), "a view, not a copy"
        for index in product(*map(range, view.shape)):
            position = int(view[index])
            assert entries[position][1] == tuple(zip(atoms, index, strict=True))
            seen.append(position)
    assert sorted(seen) == list(range(tensor.numel()))


@given(SHAPES)
def test_mapping_nothing_puts_the_tensor_together_again(dimensions):
    tensor = numbered(dimensions)
    assert torch.equal(map_pieces(tensor, dimensions, SIZES, lambda piece, atoms: piece), tensor)
    reversed_dims = list(range(tensor.ndim))[::-1]
    column_major = tensor.permute(reversed_dims).contiguous().permute(reversed_dims)
    assert torch.equal(map_pieces(column_major, dimensions, SIZES, lambda piece, atoms: piece), tensor)


@given(SHAPES)
def test_what_is_done_to_a_piece_happens_to_its_entries(dimensions):
    tensor = numbered(dimensions)
    mapped = map_pieces(tensor, dimensions, SIZES, lambda piece, atoms: torch.full_like(piece, len(atoms)))
    expected = [len(atoms) for _, atoms in tensor_coordinates(dimensions)]
    assert mapped.flatten().tolist() == expected


def test_an_empty_tensor_and_a_scalar():
    (empty, _), *more = pieces(torch.empty(0, 6), parse("vocab (heads 3)"), {"vocab": 0, "heads": 2})
    assert (empty.shape, more) == ((0, 2, 3), [])
    assert [(view.item(), atoms) for view, atoms in pieces(torch.tensor(7), (), {})] == [(7, ())]
