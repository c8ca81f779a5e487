"""Every method that mergekit has, against mergekit's own function on the same tensors, and both against float64."""

import pytest
import torch

from hf_llfc.merging.methods import find_method
from tests.merging.methods.cases import DETERMINISTIC, KINDS, RANDOM, SHAPES, Case, exact, masks_of, tensors

api = pytest.importorskip("mergekit.merge_methods.api", reason="mergekit, the oracle for values, is not installed")

TOLERANCE = 2e-6
"""Of the largest entry."""

HALF_ULP = 2.0**-24
"""Of the largest entry: what rounding a result to float32 costs by itself."""


WITH_EQUALS = ("rounded", "constant")
"""Kinds of tensors in which many magnitudes are equal."""


def stable_sorts(patch: pytest.MonkeyPatch) -> None:
    """Makes mergekit's sorts stable: which of equal elements it keeps is otherwise left to the processor."""
    argsort, sort = torch.argsort, torch.sort

    def stable_argsort(values, dim=-1, descending=False):
        return argsort(values, dim=dim, descending=descending, stable=True)

    def stable_sort(values, dim=-1, descending=False):
        return sort(values, dim=dim, descending=descending, stable=True)

    def stable_topk(values, k, largest):
        assert largest
        return tuple(each[:k] for each in stable_sort(values, descending=True))

    patch.setattr(torch, "argsort", stable_argsort)
    patch.setattr(torch.Tensor, "argsort", stable_argsort)
    patch.setattr(torch, "sort", stable_sort)
    patch.setattr(torch, "topk", stable_topk)


def theirs(case: Case, base, models):
    """What mergekit's function makes of the tensors."""
    inputs, base_index = ([base, *models], 0) if case.has_base else (models, None)
    return api.merge_tensors(inputs, case.method, parameters=dict(case.values), base_index=base_index)


def compare(case: Case, base, models, settings):
    method = find_method(case.method)
    before = [tensor.clone() for tensor in (base, *models)]
    ours = method.merge(models, base if case.has_base else None, settings)
    assert all(torch.equal(*pair) for pair in zip(before, (base, *models), strict=True)), "an input was changed"
    assert ours.dtype == torch.float32 and ours.shape == base.shape
    reference = exact(case, base, models, settings)
    largest = reference.abs().max().item()
    error = (ours.double() - reference).abs().max().item()
    return ours, reference, largest, error


SELECTING = ("arcee_fusion", "sce")
"""Methods that choose elements by numbers that rounding in float32 may put in another order than the oracle's."""


def check(case, ours, found, reference, largest, error):
    """Ours are near mergekit's, and no farther from the oracle.

    Where mergekit's rounding alone takes it farther than the tolerance from its own formula, which ill-conditioned rows
    do, that distance counts.
    """
    error_of_theirs = (found.double() - reference).abs().max().item()
    if case.method not in SELECTING:
        assert error_of_theirs <= 5 * TOLERANCE * largest, (tuple(ours.shape), error_of_theirs, largest)
    distance = (ours - found).abs().max().item()
    allowed = TOLERANCE * largest if case.method in SELECTING else max(TOLERANCE * largest, 1.1 * error_of_theirs)
    assert distance <= allowed, (tuple(ours.shape), distance, largest)
    assert error <= max(error_of_theirs, HALF_ULP * largest), (tuple(ours.shape), error, error_of_theirs)


def mergekit_stops(case: Case, kind: str) -> bool:
    """Whether mergekit raises: where three and more models are all zero, or all equal to the base."""
    return kind == "zero" and case.method == "multislerp" and case.models > 2


PAIRS = [(case, kind) for case in DETERMINISTIC for kind in KINDS if not mergekit_stops(case, kind)]


@pytest.mark.parametrize(("case", "kind"), PAIRS, ids=str)
def test_values_are_those_of_mergekit(case, kind, monkeypatch):
    if kind in WITH_EQUALS:
        stable_sorts(monkeypatch)
    for seed, shape in enumerate(SHAPES):
        base, models = tensors(kind, shape, case.models, seed)
        compared = compare(case, base, models, case.settings())
        check(case, compared[0], theirs(case, base, models), *compared[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", RANDOM, ids=str)
def test_the_same_mask_gives_the_same_values(case, kind, monkeypatch):
    drawn = []

    def bernoulli(probabilities):
        return torch.from_numpy(drawn.pop(0)).reshape(probabilities.shape).to(probabilities.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    for seed, shape in enumerate(SHAPES):
        base, models = tensors(kind, shape, case.models, seed)
        settings = case.settings(seed=seed, tensor="weight")
        if case.method.startswith("della") and (not shape or 1 in shape[1:]):
            continue  # mergekit divides by zero where an element is alone in its row
        compared = compare(case, base, models, settings)
        drawn += [mask for mask in masks_of(case, base, models, settings) if mask is not None]
        check(case, compared[0], theirs(case, base, models), *compared[1:])
        assert not drawn
