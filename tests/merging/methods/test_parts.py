"""A tensor in parts gives what the whole gives; storage types, empty tensors and threads change nothing else."""

from dataclasses import dataclass, field

import pytest
import torch

from hf_llfc.merging.methods import MERGE_METHODS, Base, Need, find_method
from hf_llfc.merging.methods.parts import PART, InMemory, merged_parts
from tests.merging.methods.cases import DETERMINISTIC, RANDOM, SPECTRAL, Case, tensors

ONE_OF_EACH = tuple({case.method: case for case in reversed((*DETERMINISTIC, *RANDOM, *SPECTRAL))}.values())


def of_need(need):
    """The cases of methods that need this of a tensor."""
    return [case for case in DETERMINISTIC if find_method(case.method).need is need]


def test_every_method_has_a_case():
    without_data = {name for name, method in MERGE_METHODS.items() if not method.importance}
    assert {case.method for case in ONE_OF_EACH} == without_data


def pieces(case, kind="fine-tuned", shape=(24, 40)):
    base, models = tensors(kind, shape, case.models, 0)
    return find_method(case.method), models, base if case.has_base else None, case.settings()


@pytest.mark.parametrize("case", of_need(Need.ELEMENTWISE), ids=str)
def test_parts_of_any_size_give_the_whole(case):
    method, models, base, settings = pieces(case)
    whole = method.merge(models, base, settings).view(-1)
    for sizes in ([1, 959], [400, 160, 400], [960]):
        columns = [model.view(-1).split(sizes) for model in models]
        of_base = base.view(-1).split(sizes) if base is not None else [None] * len(sizes)
        merged = [
            method.function()(list(models_c), base_c, settings)
            for *models_c, base_c in zip(*columns, of_base, strict=True)
        ]
        assert torch.equal(torch.cat(merged).float(), whole)


@dataclass(frozen=True)
class Watched:
    """A stream in memory that gives out small parts, and keeps how they were asked for."""

    stream: InMemory
    size: int
    passes: list = field(default_factory=list)

    @property
    def shape(self):
        return self.stream.shape

    @property
    def models(self):
        return self.stream.models

    @property
    def has_base(self):
        return self.stream.has_base

    @property
    def dtype(self):
        return self.stream.dtype

    def parts(self, width=1, *, size=PART, only=None):
        self.passes.append(width)
        return self.stream.parts(width, size=min(size, self.size), only=only)


PASSING = [
    case for case in (*DETERMINISTIC, *RANDOM, *SPECTRAL) if find_method(case.method).need is not Need.ELEMENTWISE
]


@pytest.mark.parametrize("case", PASSING, ids=str)
@pytest.mark.parametrize("shape", [(24, 40), (70,), (6, 5, 3)], ids=str)
def test_a_tensor_in_small_parts_is_merged_as_in_one(case, shape):
    method, models, base, settings = pieces(case, shape=shape)
    whole = method.merge(models, base, settings)
    for size in (1, 17, 160):
        stream = Watched(InMemory(models, base), size)
        parts_of = list(merged_parts(method.prepared(stream, settings), stream))
        merged = torch.cat([part.reshape(-1) for part in parts_of]).view(shape)
        assert merged.dtype == torch.float64 or method.name == "arcee_fusion"
        torch.testing.assert_close(merged.float(), whole, rtol=0, atol=1e-6 * whole.abs().max().item())
        assert len(parts_of) == -(-whole.numel() // (max(1, size // stream.passes[-1]) * stream.passes[-1]))


def test_parts_cover_every_element_once():
    tensor = torch.arange(2 * PART + 5)
    covered = [tensor_c for (tensor_c,), _ in InMemory([tensor], None).parts()]
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
