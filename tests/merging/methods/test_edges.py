"""Inputs at the edge of a formula, and where we differ from mergekit on purpose."""

import pytest
import torch

from hf_llfc.errors import RecipeError
from hf_llfc.merging.methods import find_method
from tests.merging.methods import oracle
from tests.merging.methods.cases import tensors

DTYPE = torch.float64


def merge(method, models, base=None, **values):
    chosen = find_method(method)
    return chosen.merge(models, base, chosen.settings(values, models=len(models), tensor="some.weight"))


@pytest.fixture
def vector(generator):
    return torch.randn(50, generator=generator, dtype=DTYPE)


@pytest.mark.parametrize("factor", [1.0, 2.5, -1.0, -0.3])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_collinear_and_opposite_vectors_are_interpolated_linearly(vector, factor, t):
    expected = (1 - t) * vector + t * factor * vector
    torch.testing.assert_close(merge("slerp", [factor * vector], vector, t=t), expected)
    torch.testing.assert_close(merge("nuslerp", [vector, factor * vector], weight=[1 - t, t]), expected)
    rows = torch.stack([vector, vector.flip(0)])
    found = merge("nuslerp", [rows, factor * rows], weight=[1 - t, t], nuslerp_flatten=False)
    torch.testing.assert_close(found, (1 - t) * rows + t * factor * rows)


def test_slerp_meets_both_ends_and_keeps_the_norm_of_unit_vectors(vector):
    other = vector.flip(0)
    first, second = vector / vector.norm(), other / other.norm()
    for t in (0.0, 0.2, 0.5, 1.0):
        merged = merge("slerp", [second], first, t=t)
        assert merged.norm().item() == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(merge("slerp", [second], first, t=0.0), first)
    torch.testing.assert_close(merge("slerp", [second], first, t=1.0), second)


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_a_zero_vector_counts_as_orthogonal(vector, t):
    zero = torch.zeros_like(vector)
    expected = torch.from_numpy(oracle.slerp([vector.numpy()], zero.numpy(), t))
    torch.testing.assert_close(merge("slerp", [vector], zero, t=t), expected)
    assert merge("nuslerp", [vector, zero], weight=[1.0, 2.0]).isfinite().all()


def test_opposite_vectors_have_no_mean_on_the_sphere(vector):
    torch.testing.assert_close(merge("karcher", [vector, -vector]), vector)
    torch.testing.assert_close(merge("karcher", [vector, -vector, 0 * vector]), vector * 2 / 3)


def test_the_karcher_mean_is_where_the_pulls_cancel(generator):
    models = [torch.randn(40, generator=generator, dtype=DTYPE) for _ in range(4)]
    units = [model / model.norm() for model in models]
    merged = merge("karcher", models, max_iter=100, tol=1e-12)
    mean = merged / merged.norm()
    assert merged.norm().item() == pytest.approx(sum(model.norm().item() for model in models) / 4, rel=1e-12)
    cosines = [unit @ mean for unit in units]
    pulls = [c.acos() / c.acos().sin() * (unit - c * mean) for unit, c in zip(units, cosines, strict=True)]
    assert sum(pulls).norm() <= 1e-10


def test_directions_that_cancel_are_an_error_for_three_models_and_linear_for_two(vector):
    merged = merge("multislerp", [vector, -3 * vector], weight=[0.5, 0.5])
    torch.testing.assert_close(merged, -vector)
    with pytest.raises(RecipeError, match=r"some\.weight: the weighted directions of the models cancel"):
        merge("multislerp", [vector, vector, -vector], weight=[0.25, 0.25, 0.5])


@pytest.mark.parametrize("count", [2, 3])
def test_multislerp_of_models_equal_to_the_base_is_the_base(vector, count):
    vector = vector.float()
    assert torch.equal(merge("multislerp", [vector] * count, vector, weight=1.0), vector)


@pytest.mark.parametrize("weight", [[1.0, -1.0], [0.1, 0.2, -0.3], [0.0, 0.0]])
def test_weights_that_sum_to_zero_cannot_be_divided_by_their_sum(vector, weight):
    models = [vector * (i + 1) for i in range(len(weight))]
    with pytest.raises(RecipeError, match=r"some\.weight: the values of weight, .* sum to zero"):
        merge("linear", models, weight=weight)
    with pytest.raises(RecipeError, match="normalize_weights"):
        merge("multislerp", models, weight=weight)
    expected = sum(w * model for w, model in zip(weight, models, strict=True))
    torch.testing.assert_close(merge("linear", models, weight=weight, normalize=False), expected, rtol=0, atol=1e-15)
    change = merge("task_arithmetic", models, torch.zeros_like(vector), weight=weight, normalize=True)
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-15)


def test_what_rounding_leaves_of_a_sum_of_weights_divides_nothing(vector):
    """.1 + .2 − .3 is not zero in float64, nor in float32, and would enlarge the sum by 10¹⁶."""
    models = [vector, 2 * vector, -vector]
    merged = merge("ties", models, torch.zeros_like(vector), weight=[0.1, 0.2, -0.3], normalize=True)
    torch.testing.assert_close(merged, 0.8 * vector)


def test_nothing_is_rescaled_where_nothing_is_left(vector):
    for method in ("dare_linear", "dare_ties", "ties", "breadcrumbs"):
        merged = merge(method, [vector + 1], vector, weight=1.0, density=0.0, rescale=True)
        assert torch.equal(merged, vector)


def test_rescaling_keeps_the_l1_norm(vector):
    for method in ("dare_linear", "della_linear", "ties", "breadcrumbs"):
        merged = merge(method, [vector], torch.zeros_like(vector), weight=1.0, density=0.5, rescale=True)
        assert merged.abs().sum().item() == pytest.approx(vector.abs().sum().item(), rel=1e-12)
        assert 0 < torch.count_nonzero(merged) < vector.numel()


def test_della_asks_for_probabilities_between_0_and_1(vector):
    with pytest.raises(RecipeError, match=r"some\.weight: density 0\.9 and epsilon 0\.15 of model 1 give"):
        merge("della", [vector, vector], 0 * vector, weight=1.0, density=[0.5, 0.9])


@pytest.mark.parametrize("shape", [(30, 1), (1,), ()], ids=str)
def test_della_draws_elements_alone_in_their_rows(shape):
    base, models = tensors("fine-tuned", shape, 2, 0)
    assert merge("della", models, base, weight=1.0, density=0.5).isfinite().all()


def test_arcee_fusion_takes_exact_quartiles_of_large_tensors(generator):
    base = torch.randn(1100, 1000, generator=generator)
    model = base + 0.1 * torch.randn(1100, 1000, generator=generator)
    one, two = (merge("arcee_fusion", [model], base) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.where(one == model, model, base), one)
    assert 0.01 < (one == model).double().mean().item() < 0.3


def test_nearswap_swaps_what_is_near(vector):
    model = vector.clone()
    model[0] += 1e-3
    model[1] += 1.0
    merged = merge("nearswap", [model], vector, t=0.01)
    assert torch.equal(merged[[0]], model[[0]]) and torch.equal(merged[2:], vector[2:])
    assert (merged[1] - vector[1]).item() == pytest.approx(0.01, rel=1e-9)


def test_model_stock_of_opposite_changes_stays_at_the_base(vector):
    base = torch.zeros_like(vector)
    torch.testing.assert_close(merge("model_stock", [vector, -vector], base), base)
    torch.testing.assert_close(merge("model_stock", [vector, -vector], base, filter_wise=True), base)


def fisher(models, importances, **values):
    """Merges one tensor."""
    method = find_method("fisher")
    return method.merge([*models, *importances], None, method.settings(values, models=len(models)))


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
def test_fisher_is_the_importance_weighted_mean(weights, generator):
    models = [torch.randn(7, 9, generator=generator) for _ in range(3)]
    importances = [torch.rand(7, 9, generator=generator) ** 4 for _ in range(3)]
    expected = oracle.fisher(oracle.arrays(models), oracle.arrays(importances), weights or [1.0] * 3)
    merged = fisher(models, importances, floor=0.0, **({"weight": weights} if weights else {}))
    torch.testing.assert_close(merged.double(), torch.from_numpy(expected), rtol=1e-6, atol=1e-6)


def test_what_no_model_finds_important_is_averaged(generator):
    models = [torch.randn(5, generator=generator, dtype=DTYPE) for _ in range(2)]
    importances = [torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])]
    merged = fisher(models, importances, weight=[1.0, 3.0], floor=1e-12)
    mean = (models[0] + 3 * models[1]) / 4
    expected = torch.stack([models[0][0], models[1][1], mean[2], mean[3], mean[4]])
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(fisher(models, [torch.zeros(5)] * 2), (models[0] + models[1]) / 2)


@pytest.mark.parametrize(
    ("weights", "message"), [([1.0, -1.0], "weight must be at least 0"), ([0.0, 0.0], "must not be all zero")]
)
def test_weights_of_an_importance_weighted_merge_are_checked(weights, message):
    with pytest.raises(RecipeError, match=message):
        fisher([torch.ones(3)] * 2, [torch.ones(3)] * 2, weight=weights)
