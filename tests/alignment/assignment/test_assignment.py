from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from hf_llfc.alignment.assignment.assignment import assign
from hf_llfc.errors import AlignmentError


def value(gain: torch.Tensor, perm) -> float:
    return float(gain.double()[torch.arange(len(gain)), torch.as_tensor(perm)].sum())


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(st.integers(1, 6).flatmap(lambda n: st.lists(st.integers(-4, 4), min_size=n * n, max_size=n * n)))
def test_no_other_permutation_gains_more(entries):
    size = round(len(entries) ** 0.5)
    gain = torch.tensor(entries, dtype=torch.float64).reshape(size, size)
    found = assign(gain)
    assert found.dtype == torch.int64 and sorted(found.tolist()) == list(range(size))
    assert value(gain, found) == max(value(gain, perm) for perm in permutations(range(size)))


def test_seven_by_brute_force(generator):
    gain = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    best = max(permutations(range(7)), key=lambda perm: value(gain, perm))
    assert assign(gain).tolist() == list(best)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["noise", "product", "planted", "constant", "ties"])
def test_the_optimum_of_scipy(kind, dtype, generator):
    size = 80
    noise = torch.randn(size, size, generator=generator)
    gain = {
        "noise": noise,
        "product": noise @ noise.T,
        "planted": noise / 10 + 5 * torch.eye(size)[torch.randperm(size, generator=generator)],
        "constant": torch.full((size, size), 0.5),
        "ties": noise.round(),
    }[kind].to(dtype)
    rows, columns = linear_sum_assignment(gain.double().numpy(), maximize=True)
    assert value(gain, assign(gain)) == pytest.approx(float(gain.double()[rows, columns].sum()), rel=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e290])
@pytest.mark.parametrize("kind", ["noise", "decaying", "columns apart", "one far row", "constant", "ties", "low rank"])
def test_the_optimum_of_scipy_from_prices(kind, scale, generator):
    size = 300
    noise, other = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    gain = {
        "noise": noise,
        "decaying": noise / torch.arange(1, size + 1) @ other,
        "columns apart": noise + 1e6 * other[0],
        "one far row": noise * (1 + 1e8 * (torch.arange(size) == 3))[:, None],
        "constant": torch.full((size, size), 0.5, dtype=torch.float64),
        "ties": noise.round(),
        "low rank": noise[:, :1] @ other[:1],
    }[kind] * scale
    for each in (gain, gain.float()) if scale < 1e30 else (gain,):
        rows, columns = linear_sum_assignment(each.double().numpy(), maximize=True)
        best = float((each.double() / scale)[rows, columns].sum())
        assert value(each.double() / scale, assign(each)) == pytest.approx(best, rel=1e-11)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad):
    gain = torch.eye(3)
    gain[1, 2] = bad
    with pytest.raises(AlignmentError, match="NaN or Inf"):
        assign(gain)
