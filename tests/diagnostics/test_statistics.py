import numpy as np
import pytest
import torch

from hf_llfc.diagnostics.statistics import RunningMoments, cosine_distance, products, projection_coefficient


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
