"""The auction with its exact finish against SciPy, and what its bounds are worth."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from hf_llfc.alignment.assignment import auction
from hf_llfc.alignment.assignment.assignment import GAP, assign, assign_with_gap

KINDS = ("planted", "product", "decaying", "low rank", "integers", "huge", "tiny", "offset", "twins", "row offsets")


def gains(kind: str, size: int, generator: torch.Generator) -> torch.Tensor:
    noise, other = (torch.randn(size, size, generator=generator) for _ in range(2))
    product = noise @ other / size**0.5
    if kind == "planted":
        return noise + 6 * torch.eye(size)[torch.randperm(size, generator=generator)]
    if kind == "product":
        return product
    if kind == "decaying":
        return (noise / torch.arange(1, size + 1)) @ other
    if kind == "low rank":
        return noise[:, :5] @ other[:5]
    if kind == "integers":
        return torch.randint(-1000, 1000, (size, size), generator=generator).float()
    if kind == "huge":
        return product * 1e33
    if kind == "tiny":
        return product * 1e-36
    if kind == "offset":
        return product.double() + 1e9
    if kind == "twins":
        return product[torch.arange(size) // 2]
    return product + 10 * noise[:, :1] - 10 * other[:1]


def scipy_value(gain: torch.Tensor) -> tuple[float, float]:
    """The optimum, and the sum of the magnitudes of its terms."""
    exact = gain.double().numpy()
    terms = exact[linear_sum_assignment(exact, maximize=True)]
    return float(terms.sum()), float(abs(terms).sum())


@pytest.mark.parametrize("size", [150, 600])
@pytest.mark.parametrize("kind", KINDS)
def test_the_optimum_of_scipy(kind, size, generator):
    gain = gains(kind, size, generator)
    best, magnitude = scipy_value(gain)
    found = auction.solve(gain)
    assert found is not None and found.is_optimal, "gave up on a matrix that it is for"
    assert found.perm.sort().values.tolist() == list(range(size))
    assert abs(found.value - best) <= 1e-12 * magnitude
    assert found.value == pytest.approx(float(gain.double()[torch.arange(size), found.perm].sum()), rel=1e-12)


@settings(derandomize=True, deadline=None, database=None, max_examples=40)
@given(st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([2, 5, 100, 10**6]), st.booleans())
def test_small_matrices_with_ties(size, seed, levels, double):
    generator = torch.Generator().manual_seed(seed)
    gain = torch.randint(0, levels, (size, size), generator=generator).to(torch.float64 if double else torch.float32)
    found = auction.solve(gain)
    if found is not None:
        assert found.value == scipy_value(gain)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-6])
def test_the_certified_gap_holds(kind, gap, generator):
    gain = gains(kind, 400, generator)
    best, magnitude = scipy_value(gain)
    found = auction.solve(gain, gap=gap)
    assert found is not None
    rounding = 1e-12 * magnitude
    assert found.value <= best + rounding and best <= found.bound + rounding
    assert found.gap <= gap or found.is_optimal


def test_a_bound_is_true_even_where_the_search_was_cut_off(monkeypatch, generator):
    monkeypatch.setattr(auction, "EXTENSIONS", 1)
    monkeypatch.setattr(auction, "NEAREST", 2)
    monkeypatch.setattr(auction, "PASSES", 1)
    gaps = []
    for kind in ("decaying", "product", "low rank"):
        gain = gains(kind, 400, generator)
        found = auction.solve(gain, gap=1e-9)
        assert found is not None
        assert found.value <= scipy_value(gain)[0] <= found.bound
        gaps.append(found.gap)
    assert max(gaps) > 1e-3, "a search that had no time to be right"


@pytest.mark.parametrize("kind", ["constant", "constant rows", "one entry", "bits", "rank one"])
def test_matrices_without_a_clear_answer_end_and_are_exact(kind, generator, monkeypatch):
    size = 520
    monkeypatch.setattr("hf_llfc.alignment.assignment.assignment.WIDE", 512)
    gain = {
        "constant": torch.full((size, size), 0.5),
        "constant rows": torch.randn(size, 1, generator=generator).expand(size, size),
        "one entry": torch.zeros(size, size).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(1.0)),
        "bits": torch.randint(0, 2, (size, size), generator=generator).float(),
        "rank one": torch.outer(torch.rand(size, generator=generator), torch.rand(size, generator=generator)),
    }[kind]
    found = assign(gain)
    assert found.sort().values.tolist() == list(range(size))
    assert float(gain.double()[torch.arange(size), found].sum()) == pytest.approx(scipy_value(gain)[0], rel=1e-12)


def test_the_auction_is_what_decides_wide_matrices(monkeypatch, generator):
    def refuse(*arguments, **options):
        raise AssertionError("SciPy's dense solver was asked")

    gain = gains("decaying", 1100, generator)
    expected = scipy_value(gain)[0]
    monkeypatch.setattr("hf_llfc.alignment.assignment.assignment.linear_sum_assignment", refuse)
    perm, gap = assign_with_gap(gain)
    assert gap == 0 and float(gain.double()[torch.arange(1100), perm].sum()) == pytest.approx(expected, rel=1e-12)
    near, gap = assign_with_gap(gain, solver="auction")
    value = float(gain.double()[torch.arange(1100), near].sum())
    assert value <= expected + 1e-9 <= value + gap + 2e-9 and gap <= GAP * value
