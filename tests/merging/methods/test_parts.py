"""A tensor in parts gives what the whole gives; storage types, empty tensors and threads change nothing else."""

import pytest
import torch

from hf_llfc.merging.methods import MERGE_METHODS, Base, Need, find_method
from hf_llfc.merging.methods.parts import PART, parts
from tests.merging.methods.cases import DETERMINISTIC, RANDOM, SPECTRAL, Case, tensors

ONE_OF_EACH = tuple({case.method: case for case in reversed((*DETERMINISTIC, *RANDOM, *SPECTRAL))}.values())


def needs(*needs):
    """The cases that need no more of a tensor."""
    return [case for case in DETERMINISTIC if find_method(case.method).need_with(case.settings()) in needs]


def test_every_method_has_a_case():
    assert {case.method for case in ONE_OF_EACH} == set(MERGE_METHODS)


def pieces(case, kind="fine-tuned", shape=(24, 40)):
    base, models = tensors(kind, shape, case.models, 0)
    return find_method(case.method), models, base if case.has_base else None, case.settings()


@pytest.mark.parametrize("case", needs(Need.ELEMENTWISE, Need.TWO_PASSES), ids=str)
def test_parts_of_any_size_give_the_whole(case):
    method, models, base, settings = pieces(case)
    whole = method.merge(models, base, settings).view(-1)
    for sizes in ([1, 959], [400, 160, 400], [960]):
        columns = [model.view(-1).split(sizes) for model in models]
        of_base = base.view(-1).split(sizes) if base is not None else [None] * len(sizes)
        arguments = [(list(models_c), base_c, settings) for *models_c, base_c in zip(*columns, of_base, strict=True)]
        sums = () if method.measure is None else (sum(method.load(method.measure)(*each) for each in arguments),)
        merged = torch.cat([method.load(method.function)(*each, *sums) for each in arguments])
        assert merged.dtype == torch.float64 or case.method == "passthrough"
        if method.need is Need.ELEMENTWISE:
            assert torch.equal(merged.float(), whole)
        else:
            torch.testing.assert_close(merged.float(), whole, rtol=0, atol=2.0**-24 * whole.abs().max().item())


@pytest.mark.parametrize("case", needs(Need.ELEMENTWISE, Need.PER_ROW), ids=str)
def test_rows_of_a_tensor_of_several_parts_are_merged_as_by_themselves(case):
    method, models, base, settings = pieces(case, shape=(3 * PART // 128 + 1, 128))
    merged = method.merge(models, base, settings)
    rows = slice(PART // 128 - 1, PART // 128 + 1)  # across the edge of the first part
    of_rows = method.merge([model[rows] for model in models], None if base is None else base[rows], settings)
    assert torch.equal(merged[rows], of_rows)


def test_parts_cover_every_element_once():
    tensor = torch.arange(2 * PART + 5)
    covered = [tensor_c for _, (tensor_c,) in parts([tensor])]
    assert torch.equal(torch.cat(covered), tensor) and max(part.numel() for part in covered) == PART


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_stored_halves_are_merged_as_the_numbers_that_they_are(case):
    method, models, base, settings = pieces(case)
    halves = [model.bfloat16() for model in models]
    half = None if base is None else base.bfloat16()
    merged = method.merge(halves, half, settings)
    expected = method.merge([each.float() for each in halves], None if half is None else half.float(), settings)
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, expected.bfloat16())


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)], ids=str)
def test_a_tensor_without_elements_has_none_merged(case, shape):
    method, models, base, settings = pieces(case, shape=shape)
    assert method.merge(models, base, settings).shape == shape


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_a_transposed_view_is_merged_as_its_copy(case):
    method, models, base, settings = pieces(case)
    views = [model.T for model in models]
    base = None if base is None else base.T
    merged = method.merge(views, base, settings)
    assert merged.is_contiguous()
    copies = [view.contiguous() for view in views]
    assert torch.equal(merged, method.merge(copies, None if base is None else base.contiguous(), settings))


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_threads_change_nothing(case):
    method, models, base, settings = pieces(case, shape=(96, 160))
    one = method.merge(models, base, settings)
    try:
        torch.set_num_threads(2)
        two = method.merge(models, base, settings)
    finally:
        torch.set_num_threads(1)
    if method.need is Need.DECOMPOSITION:  # products of matrices are summed in another order
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    else:
        assert torch.equal(one, two)


def test_a_base_where_there_is_none_is_our_own_mistake():
    for name, base in (("linear", torch.ones(2)), ("ties", None)):
        method = find_method(name)
        assert method.base is not Base.OPTIONAL
        with pytest.raises(AssertionError, match="base of"):
            method.merge([torch.ones(2)], base, method.settings({"weight": 1.0}, models=1))
        assert Case(name, 1).has_base == (base is None)
