"""Every rule against the operation itself: what it leaves free may be moved, before the operation or after it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_llfc.adapters.derived.naming import names_of
from hf_llfc.adapters.derived.rules import rule_for
from hf_llfc.adapters.derived.terms import find, leaves
from hf_llfc.adapters.derived.trace import Trace
from hf_llfc.adapters.derived.writing import Writer
from hf_llfc.symmetry import PermutationSpec
from hf_llfc.symmetry.declarations import TensorSpec

Function = Callable[..., Tensor]


def heads(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
    """Attention with 4 heads of 3 channels."""
    query, key, value = (F.linear(x, weight).view(2, 5, 4, 3).transpose(1, 2) for weight in (q, k, v))
    mixed = torch.softmax(query @ key.transpose(-1, -2), -1) @ value
    return F.linear(mixed.transpose(1, 2).reshape(2, 5, 12), o)


def experts(x: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Two of 4 experts, looked up by index."""
    scores, chosen = torch.topk(torch.softmax(F.linear(x, router), -1), 2, -1)
    wide = torch.einsum("nr,nkhr->nkh", x, up[chosen]).relu()
    return torch.einsum("nkh,nkrh,nk->nr", wide, down[chosen], scores)


def one_hot(x: Tensor, router: Tensor, experts: Tensor) -> Tensor:
    """The best of 4 experts, through a mask."""
    chosen = F.linear(x, router).argmax(-1)
    mask = torch.zeros(x.shape[0], 4).scatter_(1, chosen[:, None], 1.0)
    return torch.einsum("ne,neh->nh", mask, torch.einsum("nr,ehr->neh", x, experts))


def rotary(x: Tensor) -> Tensor:
    """A rotation of halves, by angles that are data."""
    first, second = x.chunk(2, -1)
    return x * torch.arange(6.0).cos() + torch.cat([-second, first], -1) * torch.arange(6.0).sin()


def written_in_parts(x: Tensor, y: Tensor) -> Tensor:
    """A constant that is filled part by part."""
    out = torch.zeros(3, 9)
    out[:, :4] = x
    out[:, 4:] = y
    return out


# Name → operation, shapes of its tensors, and the sizes of the axes that must stay free (sorted).
OPERATIONS: dict[str, tuple[Function, list[tuple[int, ...]], list[int]]] = {
    "add": (torch.add, [(3, 4), (3, 4)], [3, 4]),
    "add, broadcast": (torch.add, [(3, 4), (4,)], [3, 4]),
    "a row against data": (lambda x: x + torch.arange(4.0), [(3, 4)], [3]),
    "in place": (lambda x, y: x.clone().mul_(y), [(3, 4), (3, 1)], [3, 4]),
    "where": (lambda x, y: torch.where(x > 0, x, y), [(3, 4), (4,)], [3, 4]),
    "full constants": (lambda x: x + torch.ones(3, 4), [(3, 4)], [3, 4]),
    "matrix product": (torch.matmul, [(3, 4), (4, 5)], [3, 4, 5]),
    "batched product": (torch.matmul, [(2, 3, 4), (2, 4, 5)], [2, 3, 4, 5]),
    "linear": (F.linear, [(2, 3, 4), (5, 4), (5,)], [2, 3, 4, 5]),
    "einsum": (lambda x, y: torch.einsum("abc,dc->bda", x, y), [(2, 3, 4), (5, 4)], [2, 3, 4, 5]),
    "attention": (heads, [(2, 5, 7), (12, 7), (12, 7), (12, 7), (6, 12)], [2, 3, 3, 4, 5, 6, 7]),
    "fused attention": (F.scaled_dot_product_attention, [(2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7)], [2, 3, 4, 5, 6, 7]),
    "experts": (experts, [(5, 6), (4, 6), (4, 7, 6), (4, 6, 7)], [4, 5, 6, 6, 7]),
    "one-hot experts": (one_hot, [(5, 6), (4, 6), (4, 7, 6)], [4, 5, 6, 7]),
    "rotary": (rotary, [(5, 6)], [5]),
    "split and concatenate": (lambda x: torch.cat(x.split([2, 3], 1)[::-1], 1), [(4, 5)], [2, 3, 4]),
    "gated": (lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1].sigmoid(), [(3, 8)], [3, 4]),
    "glu": (lambda x: F.glu(x, -1), [(3, 8)], [3, 4]),
    "view, product": (lambda x: x.view(3, 2, 4), [(3, 8)], [2, 3, 4]),
    "view, merged": (lambda x: x.view(6, 4), [(2, 3, 4)], [2, 3, 4]),
    "view across factors": (lambda x: x.view(3, 4), [(4, 3)], []),
    "two factorings": (lambda x, y: x.view(2, 6) + y.view(4, 3).view(2, 6), [(12,), (12,)], [2, 2, 3]),
    "interleaved groups": (lambda x: x.view(3, 4, 5).transpose(1, 2).reshape(3, 20), [(3, 20)], [3, 4, 5]),
    "expand": (lambda x: x[:, None].expand(3, 2, 4).reshape(6, 4), [(3, 4)], [3, 4]),
    "repeat": (lambda x: x.repeat(2, 1), [(3, 4)], [3, 4]),
    "one entry": (lambda x: x[:, 1] * 2, [(3, 4)], [3]),
    "only the shape of one entry": (lambda x: torch.zeros(x[:, 1].shape)[:, None] + x, [(3, 4)], [3, 4]),
    "a constant index": (lambda x: x[:, [-2]], [(3, 4)], [2, 3]),
    "every second entry": (lambda x: x[:, ::2] * 2, [(3, 8)], [3, 4]),
    "every third of some": (lambda x: x[:, ::3] * 2, [(3, 8)], [3]),
    "interleaved gate": (lambda x: x[:, ::2] * x[:, 1::2].sigmoid(), [(3, 8)], [3, 4]),
    "flip": (lambda x: x.flip(1), [(3, 4)], [3]),
    "roll": (lambda x: x.roll(1, 0), [(3, 4)], [4]),
    "cumulative sum": (lambda x: x.cumsum(0), [(3, 4)], [4]),
    "pad": (lambda x: F.pad(x, (1, 2)), [(3, 4)], [3, 4]),
    "written in parts": (written_in_parts, [(3, 4), (3, 5)], [3, 4, 5]),
    "softmax": (lambda x: x.softmax(-1), [(3, 4)], [3, 4]),
    "mean": (lambda x: x.mean(1), [(3, 4, 5)], [3, 4, 5]),
    "variance, kept": (lambda x: x - x.var(-1, keepdim=True), [(3, 4)], [3, 4]),
    "largest": (lambda x: x.max(1).values, [(3, 4)], [3, 4]),
    "the best three": (lambda x: x.topk(3, 1).values, [(5, 4)], [4, 5]),
    "sorted": (lambda x: x.sort(1).values, [(5, 4)], [4, 5]),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b), [(3, 4), (4,), (4,)], [3, 4]),
    "RMS norm": (lambda x, w: F.rms_norm(x, (4,), w), [(3, 4), (4,)], [3, 4]),
    "group norm": (lambda x, w, b: F.group_norm(x, 2, w, b), [(2, 6, 5), (6,), (6,)], [2, 2, 3, 5]),
    "batch norm": (lambda x, m, v, w: F.batch_norm(x, m, v.exp(), w), [(3, 4, 5), (4,), (4,), (4,)], [3, 4, 5]),
    "convolution": (F.conv2d, [(2, 3, 8, 8), (5, 3, 3, 3), (5,)], [2, 3, 5]),
    "depthwise convolution": (lambda x, w: F.conv1d(x, w, groups=4), [(2, 4, 8), (4, 1, 3)], [2, 4]),
    "multiplied depthwise": (lambda x, w: F.conv1d(x, w, groups=4), [(2, 4, 8), (8, 1, 3)], [2, 2, 4]),
    "grouped convolution": (lambda x, w: F.conv1d(x, w, groups=2), [(2, 6, 8), (10, 3, 3)], [2, 2, 3, 5]),
    "transposed convolution": (F.conv_transpose1d, [(2, 3, 8), (3, 5, 3)], [2, 3, 5]),
    "pooling": (lambda x: F.max_pool2d(x, 2), [(2, 3, 8, 8)], [2, 3]),
    "interpolation": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), [(2, 3, 4, 4)], [2, 3]),
    "patches": (lambda x, w: F.unfold(x, 2).transpose(1, 2) @ w, [(2, 3, 4, 4), (12, 5)], [2, 3, 5]),
    "weight norm": (lambda v, g, x: x @ torch._weight_norm(v, g, 0).T, [(4, 5), (4, 1), (3, 5)], [3, 4, 5]),
    "look-up of tokens": (lambda w: F.embedding(torch.tensor([[0, 2]]), w), [(3, 4)], [4]),
    "gather": (lambda x: x.gather(1, torch.tensor([[0, 2], [1, 1], [0, 0]])), [(3, 4)], []),
    "index add": (lambda x, y: x.index_add(0, torch.tensor([1, 0]), y), [(3, 4), (2, 4)], [4]),
    "how many a mask selects": (lambda x: x + x[x > 9].numel(), [(3, 4)], [3, 4]),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), [(2, 12, 4, 4)], [2, 3]),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(x, 2), [(2, 3, 4, 4)], [2, 3]),
    "boolean mask": (lambda x: x[torch.tensor([True, False, True])] * 2, [(3, 4)], [4]),
    "masked rows": (
        lambda x, y: x.masked_scatter(torch.tensor([True, False, True])[:, None].expand(3, 4), y),
        [(3, 4), (2, 4)],
        [4],
    ),
    "Fourier transform": (lambda x: torch.fft.fft(x, dim=-1).real, [(3, 4)], [3]),
    "an operation without a rule": (lambda x: torch.linalg.inv(x), [(3, 3)], []),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_a_rule_leaves_free_commutes_with_the_operation(name: str):
    function, shapes, expected = OPERATIONS[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    trace = Trace(rule_for)
    labels = [trace.put_leaf(tensor) for tensor in inputs]
    with torch.no_grad(), trace:
        output = function(*inputs)
    dims = {f"in.{place}.weight": label.dims for place, label in enumerate(labels)}
    free = {leaf for each in dims.values() for term in each for leaf in leaves(term) if not leaf.fixed}
    assert sorted(leaf.size for leaf in free) == expected

    dims["out.weight"] = trace.label(output).dims
    writer = Writer(names_of(dims, {}, set()), {})
    declarations = tuple(TensorSpec(name, writer.shape(each)) for name, each in dims.items())
    spec = PermutationSpec("", writer.axes(), declarations)
    tensors = dict(zip(dims, [*inputs, output], strict=True))
    for seed in range(3 if free else 0):
        moved = spec.random_alignment(torch.Generator().manual_seed(seed)).apply(tensors)
        again = function(*(moved[name] for name in dims if name.startswith("in.")))
        torch.testing.assert_close(again, moved["out.weight"], rtol=1e-4, atol=1e-5)


def test_an_operation_without_a_rule_is_reported():
    trace = Trace(rule_for)
    x = torch.eye(3)
    trace.put_leaf(x)
    with trace:
        torch.linalg.inv(x)
    assert "aten.linalg_inv_ex.default" in trace.unknown


def test_a_hollow_tensor_takes_no_memory_and_gives_hollow_results():
    trace = Trace(rule_for)
    weight = torch.zeros(()).expand(1 << 20, 1 << 20)
    trace.put_leaf(weight, hollow=True)
    with torch.no_grad(), trace:
        wide = torch.ones(2, 1 << 20) @ weight.T
        chosen = wide.argmax(-1)
    assert trace.label(wide).hollow and not trace.label(chosen).hollow
    assert wide.untyped_storage().nbytes() == 4
    assert find(trace.label(chosen).values) is find(trace.label(weight).dims[0])
