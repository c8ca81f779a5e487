"""Shortest augmenting paths from the largest entries of the rows: the optimum, or nothing within bounded work."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from hf_llfc.alignment.assignment import assignment
from hf_llfc.alignment.assignment.assignment import assign
from hf_llfc.alignment.assignment.augmenting import complete
from hf_llfc.errors import AlignmentError


def optimum(gain):
    double = np.asarray(gain, dtype=np.float64)
    return double[linear_sum_assignment(double, maximize=True)].sum()


def value(gain, perm):
    assert sorted(perm) == list(range(len(gain)))
    return np.asarray(gain, dtype=np.float64)[np.arange(len(gain)), perm].sum()


def planted(size, height, seed, dtype=np.float32):
    random = np.random.default_rng(seed)
    gain = random.standard_normal((size, size)).astype(dtype)
    gain[np.arange(size), random.permutation(size)] += height
    return gain


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("height", [0.0, 2.0, 4.0, 6.0])
@pytest.mark.parametrize("size", [1, 2, 5, 60, 300])
def test_is_the_optimum_from_any_start(size, height, dtype):
    gain = planted(size, height, size, dtype)
    perm = complete(gain, gain.argmax(1), size**2)
    assert value(gain, perm) == pytest.approx(optimum(gain), rel=1e-13, abs=1e-13)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 7).flatmap(lambda size: st.lists(st.integers(-3, 3), min_size=size**2, max_size=size**2)))
def test_is_the_optimum_where_much_is_equal(numbers):
    size = round(len(numbers) ** 0.5)
    gain = np.array(numbers, dtype=np.float64).reshape(size, size)
    assert value(gain, complete(gain, gain.argmax(1), size**2 + 1)) == optimum(gain)


def test_one_column_that_all_want():
    gain = np.zeros((40, 40), dtype=np.float32)
    gain[:, 7] = np.arange(40)
    assert value(gain, complete(gain, gain.argmax(1), 1600)) == 39


def test_gives_up_beyond_its_steps():
    gain = planted(200, 0.0, 0)
    assert complete(gain, gain.argmax(1), 20) is None
    assert complete(gain, gain.argmax(1), 40_000) is not None


@pytest.mark.parametrize("size", [300, 1200])
def test_where_most_rows_have_a_column_of_their_own_no_other_solver_is_asked(size, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("another solver was asked")

    gain = planted(size, 5.0, 1)
    best = optimum(gain)
    monkeypatch.setattr(assignment.auction, "solve", refuse)
    monkeypatch.setattr(assignment, "linear_sum_assignment", refuse)
    assert np.unique(gain.argmax(1)).size < size
    assert value(gain, assign(torch.from_numpy(gain)).numpy()) == pytest.approx(best, rel=1e-13)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (599, 599), (300, 2)])
def test_every_number_is_looked_at(bad, place):
    gain = torch.from_numpy(planted(600, 6.0, 2))
    gain[place] = bad
    with pytest.raises(AlignmentError, match="NaN or Inf"):
        assign(gain)
