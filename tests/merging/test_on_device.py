"""Sums by a device's own operations have the bits of those by NumPy, here on the one device that is always there."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_llfc.merging.combination import Combination, Scratch
from hf_llfc.merging.on_device import DeviceScratch
from tests.merging.oracle import SIGNIFICAND_BITS

DTYPES = list(SIGNIFICAND_BITS)
COMBINATIONS = [
    Combination((0.3, 0.7)),
    Combination((1.5, -0.5)),
    Combination((1e-7, 1.0)),
    Combination((0.6,), over_base=True),
]


def both(combination, columns, out):
    """What NumPy and the device make of the same, and whether each says that it is finite."""
    results = [torch.zeros(columns[0].numel(), dtype=out) for _ in range(2)]
    makers = (Scratch(64), DeviceScratch(torch.device("cpu")))
    finite = [maker.combine(combination, columns, result) for maker, result in zip(makers, results, strict=True)]
    return *results, *finite


def assert_the_same(combination, columns, out):
    ours, of_device, is_finite, is_finite_on_device = both(combination, columns, out)
    assert is_finite == is_finite_on_device
    if is_finite:
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[out.itemsize]
        assert torch.equal(ours.view(integers), of_device.view(integers))


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
@pytest.mark.parametrize(("stored", "out"), list(itertools.product(DTYPES, DTYPES)))
def test_numbers_of_all_sizes(stored, out, combination, generator):
    for scale in (1.0, 2.0**-14, 2.0**-126, 2.0**-132):
        columns = [(torch.randn(999, generator=generator).double() * scale).to(stored) for _ in range(2)]
        assert_the_same(combination, columns, out)


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16])
def test_every_number_of_a_half_type_and_the_ties_between(out):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(out)
    every = every[every.isfinite()]
    neighbours = torch.roll(every, 1)
    assert_the_same(Combination((0.5, 0.5)), [every, neighbours], out)
    assert_the_same(Combination((0.3, 0.7)), [every, neighbours], out)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_numbers(data):
    stored, out = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    numbers = st.lists(st.floats(width=64, allow_nan=False), min_size=5, max_size=5)
    columns = [torch.tensor(data.draw(numbers), dtype=torch.float64).to(stored) for _ in range(2)]
    assert_the_same(data.draw(st.sampled_from(COMBINATIONS)), columns, out)


@pytest.mark.gpu
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
@pytest.mark.parametrize(("stored", "out"), list(itertools.product(DTYPES, DTYPES)))
def test_an_accelerator_has_the_same_bits(stored, out, combination, generator):
    device = torch.accelerator.current_accelerator()
    columns = [(torch.randn(99999, generator=generator).double() * 2.0**-14).to(stored) for _ in range(2)]
    results = [torch.zeros(99999, dtype=out) for _ in range(2)]
    for maker, result in zip((Scratch(), DeviceScratch(device)), results, strict=True):
        assert maker.combine(combination, columns, result)
    assert torch.equal(*results)
