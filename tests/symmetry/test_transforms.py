import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_llfc.errors import AlignmentError
from hf_llfc.symmetry import Permutation

SEEDS = st.integers(0, 2**31)
SIZES = st.integers(1, 6)


def generators(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def move(p: list[int], q: list[list[int]], original: list[list]) -> list[list]:
    """`aligned[e][n] = original[p[e]][q[e][n]]`."""
    return [[original[p[e]][q[e][n]] for n in range(len(q[e]))] for e in range(len(p))]


@given(SEEDS, SIZES, SIZES)
def test_a_permutation_says_where_each_entry_comes_from(seed, size, others):
    permutation = Permutation.random(size, generator=generators(seed))
    perm = permutation.perm.tolist()
    tensor = torch.randn(others, size, 2, generator=generators(seed))
    aligned = permutation.apply(tensor, 1)
    for entry in range(size):
        assert torch.equal(aligned[:, entry], tensor[:, perm[entry]])
        assert permutation.source(entry) == perm[entry]
    assert permutation.moved == sum(place != source for place, source in enumerate(perm))
    assert permutation.units == permutation.size == size
    assert permutation.is_identity == (perm == sorted(perm))


@given(SEEDS, SIZES, SIZES, st.booleans())
def test_a_dependent_permutation_moves_inside_each_entry_of_its_parent(seed, parents, size, parent_first):
    random = generators(seed)
    p = Permutation.random(parents, generator=random)
    q = Permutation.random(size, parents, generator=random)
    original = torch.arange(parents * size).reshape(parents, size)
    expected = torch.tensor(move(p.perm.tolist(), q.perm.tolist(), original.tolist()))
    if parent_first:
        aligned = q.apply(p.apply(original[:, None], 0), 2, 0)[:, 0]
    else:
        aligned = q.apply(p.apply(original.T[..., None], 1), 0, 1)[..., 0].T
    assert torch.equal(aligned, expected)
    for parent in range(parents):
        assert torch.equal(aligned[parent], q.at(parent).apply(original[p.source(parent)], 0))
    assert (q.size, q.units) == (size, parents * size)


@given(SEEDS, SIZES, SIZES, st.booleans())
def test_inverse_and_composition_against_loops(seed, parents, size, parent_moves):
    random = generators(seed)
    p1, p2 = (
        Permutation.random(parents, generator=random) if parent_moves else Permutation.identity(parents)
        for _ in range(2)
    )
    q1, q2 = (Permutation.random(size, parents, generator=random) for _ in range(2))
    original = torch.arange(parents * size).reshape(parents, size).tolist()
    once = move(p1.perm.tolist(), q1.perm.tolist(), original)
    twice = move(p2.perm.tolist(), q2.perm.tolist(), once)
    parent1, parent2 = (p1, p2) if parent_moves else (None, None)
    p12, q12 = p1.then(p2), q1.then(q2, parent2)
    assert move(p12.perm.tolist(), q12.perm.tolist(), original) == twice
    back_p, back_q = p1.inverse(), q1.inverse(parent1)
    assert move(back_p.perm.tolist(), back_q.perm.tolist(), once) == original
    assert p1.then(back_p).is_identity and q1.then(back_q, back_p if parent_moves else None).is_identity


def test_random_permutations_are_uniform():
    random = generators(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(600):
        for row in Permutation.random(3, 2, generator=random).perm.tolist():
            counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    assert len(counts) == 6
    # 200 expected each; the standard deviation is 13
    assert all(150 < count < 250 for count in counts.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.int8])
def test_every_dtype_moves_unchanged(dtype):
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    moved = Permutation(torch.tensor([2, 0, 1])).apply(tensor, 0)
    assert moved.dtype == dtype and torch.equal(moved, tensor[[2, 0, 1]])


def test_nan_and_negative_zero_move_bit_for_bit():
    tensor = torch.tensor([float("nan"), -0.0, 0.0, float("-inf")])
    moved = Permutation(torch.tensor([1, 3, 0, 2])).apply(tensor, 0)
    assert moved.view(torch.int32).tolist() == tensor.view(torch.int32)[[1, 3, 0, 2]].tolist()


def test_permutations_are_values():
    assert Permutation(torch.tensor([1, 0])) == Permutation(torch.tensor([1, 0])) != Permutation.identity(2)
    assert hash(Permutation(torch.tensor([1, 0]))) == hash(Permutation(torch.tensor([1, 0])))
    assert Permutation.identity(2) != [0, 1]


@pytest.mark.parametrize(
    "perm",
    [
        torch.tensor([0, 0]),
        torch.tensor([1, 2]),
        torch.tensor([-1, 0]),
        torch.tensor([[0, 1], [1, 1]]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor(0),
        torch.zeros(1, 1, 1, dtype=torch.int64),
    ],
)
def test_what_is_no_permutation_is_refused(perm):
    with pytest.raises(AlignmentError, match="not a permutation"):
        Permutation(perm)


def test_stored_and_read_back():
    for permutation, sizes in [
        (Permutation.random(5, generator=generators(0)), (5,)),
        (Permutation.random(3, 4, generator=generators(0)), (3, 4)),
    ]:
        parts = permutation.tensors()
        assert parts["perm"].dtype == torch.int32
        assert Permutation.from_tensors(parts, *sizes) == permutation
    for wrong in ({}, {"perm": torch.arange(3)}, {"perm": torch.arange(4, dtype=torch.int32)}):
        with pytest.raises(AlignmentError, match=r"int32 index array of shape \[3\] expected"):
            Permutation.from_tensors(wrong, 3)
