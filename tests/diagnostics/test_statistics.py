import numpy as np
import pytest
import torch

from hf_llfc.diagnostics import statistics
from hf_llfc.diagnostics.statistics import (
    Distribution,
    RunningMoments,
    cosine_distance,
    products,
    projection_coefficient,
)


@pytest.mark.parametrize("chunk", [1, 13, 2**22])
def test_products_are_those_of_the_blend(chunk, monkeypatch, generator):
    monkeypatch.setattr("hf_llfc.diagnostics.statistics.ELEMENTS_AT_ONCE", chunk)
    merged, a, b = torch.randn(3, 4, 50, generator=generator)
    blend = 0.3 * a.double() + 0.7 * b.double()
    for found, (x, y) in zip(
        products(merged, a, b, 0.3),
        ((merged.double(), merged.double()), (merged.double(), blend), (blend, blend)),
        strict=True,
    ):
        assert found.tolist() == pytest.approx((x * y).sum(dim=1).tolist(), rel=1e-13)
    assert torch.equal(products(merged, a)[1], products(merged, a, b, 1.0)[1])


def test_half_precision_is_added_up_in_float64():
    ones = torch.ones(1, 100_000, dtype=torch.float16)
    assert [value.item() for value in products(ones, ones, ones, 0.5)] == [100_000] * 3


def test_distance_and_coefficient_keep_the_sign():
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[-2.0, -4.0]])
    xx, xy, yy = products(x, y)
    assert cosine_distance(xx, xy, yy).item() == pytest.approx(2)
    assert projection_coefficient(xy, yy).item() == pytest.approx(-0.5)
    assert cosine_distance(xx, xx, xx).item() == 0


def test_dead_features_do_not_pass_for_connected():
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert cosine_distance(*products(zero, one)).item() == 1
    assert cosine_distance(*products(one, zero)).item() == 1
    assert cosine_distance(*products(zero, zero)).item() == 0
    _, xy, yy = products(zero, one)
    assert projection_coefficient(xy, yy).item() == 0
    _, xy, yy = products(zero, zero)
    assert projection_coefficient(xy, yy).isnan()


@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_moments_do_not_depend_on_how_values_arrive(offset):
    values = np.random.default_rng(0).standard_normal((2, 3, 97)) + offset
    values[1, 2, ::5] = np.nan
    expected_mean, expected_std = np.nanmean(values, axis=-1), np.nanstd(values, axis=-1)
    for sizes in ([97], [1] * 97, [40, 50, 7]):
        parts = np.split(values, np.cumsum(sizes)[:-1], axis=-1)
        streamed, first, second = (RunningMoments.zeros(2, 3) for _ in range(3))
        for index, part in enumerate(parts):
            streamed.add(torch.from_numpy(part))
            (first if index % 2 else second).add(torch.from_numpy(part))
        first.merge(second)
        for moments in (streamed, first):
            assert moments.mean.numpy() == pytest.approx(expected_mean, rel=1e-14, abs=1e-14)
            assert moments.std.numpy() == pytest.approx(expected_std, rel=1e-7 if offset else 1e-13)
            assert moments.count.tolist() == (~np.isnan(values)).sum(axis=-1).tolist()


def test_moments_of_nothing_are_no_numbers_but_no_error():
    moments = RunningMoments.zeros(2)
    moments.merge(RunningMoments.zeros(2))
    moments.add(torch.full((2, 3), float("nan")))
    assert moments.count.tolist() == [0, 0]
    assert moments.mean.tolist() == moments.std.tolist() == [0, 0]


def test_quantiles_are_exact_until_more_samples_come_than_are_kept(monkeypatch):
    values = np.random.default_rng(0).standard_normal((2, 300))
    values[1, ::7] = np.nan
    found = Distribution.empty(2)
    for part in np.array_split(np.arange(300), 7):
        found.add(torch.tensor(part), torch.tensor(values[:, part]))
    for series, statistic in zip(values, found.statistics(), strict=True):
        expected = np.nanquantile(series, statistics.LEVELS)
        assert list(statistic.quantiles.values()) == pytest.approx(expected, abs=1e-13)
    # The choice among more samples depends on their numbers alone.
    monkeypatch.setattr(statistics, "KEPT", 50)
    one, other = Distribution.empty(2), Distribution.empty(2)
    numbers = torch.arange(300)
    one.add(numbers, torch.tensor(values))
    for part in (numbers[200:], numbers[:50], numbers[50:200]):
        third = Distribution.empty(2)
        third.add(part, torch.tensor(values)[:, part])
        other.merge(third)
    assert torch.equal(one.kept.keys, other.kept.keys)
    assert one.kept.values.shape == (2, 50)
    chosen = [int((numbers == number).nonzero()) for number in numbers if values[0, number] in one.kept.values[0]]
    assert 90 < np.mean(chosen) < 210  # spread over all, not the first


def test_intervals_cover_the_mean_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 300)
    for kept in (60, 30):
        monkeypatch.setattr(statistics, "KEPT", kept)
        random = np.random.default_rng(1)
        found = Distribution.empty(400)
        found.add(torch.arange(60), torch.tensor(random.exponential(size=(400, 60))))
        intervals = np.array([statistic.interval for statistic in found.statistics()])
        covered = np.mean((intervals[:, 0] <= 1) & (intervals[:, 1] >= 1))
        assert 0.88 < covered < 0.98
        # The interval of a mean over 60 exponential values is about 2 · 1.96 / sqrt(60) wide, however many are kept.
        assert np.mean(intervals[:, 1] - intervals[:, 0]) == pytest.approx(3.92 / 60**0.5, rel=0.1)


def test_one_value_has_no_interval_and_none_no_statistic():
    found = Distribution.empty(2)
    found.add(torch.tensor([4]), torch.tensor([[2.0], [np.nan]]))
    one, none = found.statistics()
    assert (one.mean, one.std, one.interval, one.quantiles["0.5"]) == (2, 0, None, 2)
    assert (none.mean, none.interval, none.quantiles) == (None, None, {})
