"""Ranks against a stable sort, and what random draws keep."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_llfc.merging.methods import find_method
from hf_llfc.merging.methods.ranking import (
    Draws,
    between,
    find_cuts,
    keep_by_rank,
    largest,
    order_in_rows,
)
from tests.merging.methods.cases import tensors

MAGNITUDES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 7.0]), min_size=1, max_size=40)
WIDTHS = st.sampled_from([torch.float32, torch.float64])


def pieces_of(values, size):
    """The elements in pieces of one size, beside others that nobody looks for."""
    return lambda: ([piece, 3 - piece] for piece in values.split(size))


def chosen(selections, values, size):
    """Which elements the first of two selections chooses, in two passes that agree."""
    passes = []
    for _ in range(2):
        chosen_of = selections[0].begin()
        passes.append(torch.cat([chosen_of(piece) for piece in values.split(size)]))
    assert torch.equal(*passes)
    return passes[0].tolist()


@given(MAGNITUDES, st.integers(0, 45), WIDTHS)
def test_the_largest_are_those_of_a_stable_sort(magnitudes, count, dtype):
    order = sorted(range(len(magnitudes)), key=lambda i: -magnitudes[i])
    expected = [i in order[:count] for i in range(len(magnitudes))]
    values = torch.tensor(magnitudes, dtype=dtype)
    assert chosen(largest(pieces_of(values, 7), len(magnitudes), [count, 0]), values, 5) == expected


@given(MAGNITUDES, st.integers(0, 45), st.integers(0, 45), WIDTHS)
def test_the_middle_is_that_of_a_stable_sort(magnitudes, low, high, dtype):
    order = sorted(range(len(magnitudes)), key=lambda i: magnitudes[i])
    expected = [i in order[low:high] for i in range(len(magnitudes))]
    values = torch.tensor(magnitudes, dtype=dtype)
    bounds = [(low, high), (0, 0)]
    assert chosen(between(pieces_of(values, 7), len(magnitudes), bounds), values, 5) == expected


@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 2**32), WIDTHS)
def test_the_order_in_rows_is_that_of_a_stable_sort(rows, columns, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.randint(0, 9, (rows, columns), generator=generator).to(dtype) / 8
    assert torch.equal(order_in_rows(magnitudes), magnitudes.argsort(dim=1, stable=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decades", [0.0, 30.0])
def test_cuts_are_those_of_a_sort(dtype, decades, generator):
    """For numbers of one size, and for numbers from the smallest to the largest that there are."""
    values = torch.randn(5000, generator=generator, dtype=torch.float64).abs()
    values *= 10 ** (decades * torch.randn(5000, generator=generator, dtype=torch.float64).clamp(-1.2, 1.2))
    values[:40] = 0
    values[40:80] = values[80]
    values[::3] *= -1
    values = values.to(dtype)
    ordered = values.sort().values
    places = [0, 39, 40, 1234, 2500, 4998, 4999]
    cuts, others = find_cuts(pieces_of(values, 333), [places, [17]])
    assert others[0].value == (3 - values).sort().values[17]
    for place, cut in zip(places, cuts, strict=True):
        assert cut.value == ordered[place]
        assert cut.below == (values < ordered[place]).sum() and cut.equal == (values == ordered[place]).sum()


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(0, 2**64 - 1))
def test_draws_do_not_depend_on_how_many_are_asked_for_at_a_time(counts, seed):
    draws = Draws(seed)
    pieces = [draws.bits(count).copy() for count in counts]
    assert np.array_equal(np.concatenate([*pieces, []]), Draws(seed).bits(sum(counts)))


def test_draws_are_the_same_with_every_version():
    assert Draws(12345).bits(4).tolist() == [3003105693, 976400781, 3387213022, 1360466709]


@pytest.mark.parametrize("probability", [0.0, 1e-3, 0.3, 0.5, 0.999, 1.0])
def test_the_share_that_is_kept_is_the_probability(probability):
    count = 1_000_000
    kept = int(Draws(7).keep(probability, count).sum())
    spread = (count * probability * (1 - probability)) ** 0.5
    assert abs(kept - count * probability) <= 4 * spread


def test_elements_are_kept_with_mergekits_probabilities(monkeypatch):
    sparsify = pytest.importorskip("mergekit.sparsify", reason="mergekit is not installed")
    magnitudes = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    asked = []
    monkeypatch.setattr(torch, "bernoulli", lambda probabilities: asked.append(probabilities) or probabilities)
    sparsify.della_magprune(magnitudes, density=0.6, epsilon=0.25)
    trials = 4000
    kept = sum(keep_by_rank(magnitudes, 0.35, 0.85, Draws(seed)).double() for seed in range(trials))
    spread = (asked[0] * (1 - asked[0]) / trials).sqrt()
    assert ((kept / trials - asked[0]).abs() <= 4 * spread).all()


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_draws_are_repeated_for_the_same_seed_tensor_and_model_alone(method):
    base, models = tensors("fine-tuned", (40, 50), 2, 0)
    values = {"weight": [1.0, 0.5], "density": 0.5}

    def merged(**options):
        return find_method(method).merge(
            models, base, find_method(method).settings(values, models=2, **({"seed": 1, "tensor": "a"} | options))
        )

    assert torch.equal(merged(), merged())
    assert not torch.equal(merged(), merged(seed=2))
    assert not torch.equal(merged(), merged(tensor="b"))
    state = torch.get_rng_state()
    merged()
    assert torch.equal(state, torch.get_rng_state()), "the global generator was touched"


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_models_are_drawn_apart_and_the_expected_share_is_kept(method):
    base = torch.zeros(300, 400)
    models = [torch.ones_like(base), torch.ones_like(base)]
    values = {"weight": [1.0, 10.0], "density": 0.4, "rescale": False}
    merged = find_method(method).merge(models, base, find_method(method).settings(values, models=2))
    shares = [(merged == value).double().mean().item() for value in (0, 1, 10, 11)]
    expected = (0.36, 0.24, 0.24, 0.16)
    if method == "della_linear":  # equal magnitudes rank by place, so both models favour the same columns
        chances = np.linspace(0.25, 0.55, 400)
        expected = [float(np.mean(a * b)) for a in (1 - chances, chances) for b in (1 - chances, chances)]
        expected = [expected[0], expected[2], expected[1], expected[3]]
    assert shares == pytest.approx(expected, abs=0.006)


def test_an_element_alone_in_its_row_is_kept_with_the_density():
    kept = keep_by_rank(torch.ones(100_000, 1), 0.2, 0.6, Draws(0))
    assert kept.double().mean().item() == pytest.approx(0.4, abs=0.006)
