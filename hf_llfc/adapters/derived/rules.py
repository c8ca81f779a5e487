"""What every operation does to the dimensions of its tensors.

A rule says under which conditions on its arguments an operation commutes with moving the entries of a dimension, and
how the dimensions of its result follow: `x + y` commutes with a permutation of a dimension that x and y share, so
theirs unify and the result's is the same; `x[2]` does not, so that dimension is fixed. A rule may ask for more than
it must (an axis is then missed), never for less (an axis would be wrong).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_llfc.adapters.derived.terms import Term, concatenation, cut, divide, find, fix, product, regroup, unify
from hf_llfc.adapters.derived.trace import Call, Label, Rule, Trace

_RULES: dict[str, Rule] = {}


def rule_for(func: Any) -> Rule | None:
    """The rule of an operation, or None."""
    name = str(func._schema.name).removeprefix("aten::")
    rule = _RULES.get(name)
    if rule is None and name.endswith("_"):
        rule = _RULES.get(name[:-1])
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = _pointwise
    return rule


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for name in names:
            assert name not in _RULES, name
            _RULES[name] = rule
        return rule

    return register


# --- helpers --------------------------------------------------------------------------------------------------------


def _one() -> Term:
    return Term(1)


def _fixed(sizes: Iterable[int]) -> list[Term]:
    return [Term(size, fixed=True) for size in sizes]


def _dim(call: Call, tensor: Tensor, name: str = "dim") -> int:
    return int(call[name]) % max(1, tensor.ndim)


def _dims(value: Any, tensor: Tensor) -> list[int]:
    """The dimensions that an argument names: one, several, or all."""
    if value is None or (isinstance(value, list | tuple) and not value):
        return list(range(tensor.ndim))
    return [each % max(1, tensor.ndim) for each in (value if isinstance(value, list | tuple) else [value])]


def _broadcast(shapes: Sequence[Sequence[Term]]) -> list[Term]:
    """The dimensions of a result of broadcasting; those that meet unify."""
    ndim = max((len(shape) for shape in shapes), default=0)
    found: list[Term] = []
    for place in range(-ndim, 0):
        present = [shape[place] for shape in shapes if len(shape) >= -place]
        wide = [term for term in present if term.size != 1]
        for other in wide[1:]:
            unify(wide[0], other)
        found.append(wide[0] if wide else _one())
    return found


def _settle_values(trace: Trace, tensors: Iterable[Tensor]) -> None:
    """Fixes what tensors of indices point into, for an operation that takes them for numbers."""
    for tensor in tensors:
        values = trace.label(tensor).values
        if values is not None:
            fix(values)


def _result(trace: Trace, tensor: Any, dims: Sequence[Term], values: Term | None = None) -> None:
    """Labels a result; of one that was written in place the dimensions unify with what is known of it."""
    if not isinstance(tensor, Tensor):
        return
    trace.put(tensor, Label(dims, values))


def _outputs(call: Call) -> list[Tensor]:
    result = call.result
    return [each for each in (result if isinstance(result, list | tuple) else [result]) if isinstance(each, Tensor)]


# --- elementwise, copies, constants ---------------------------------------------------------------------------------


def _pointwise(trace: Trace, call: Call) -> None:
    tensors = call.tensors
    _settle_values(trace, tensors)
    dims = _broadcast([trace.label(tensor).dims for tensor in tensors])
    for output in _outputs(call):
        kept = dims if len(dims) == output.ndim else dims[-output.ndim :] if output.ndim else []
        _result(trace, output, kept)


for _name in (
    "where",
    "masked_fill",
    "clamp",
    "polar",
    "complex",
    "lerp",
    "addcmul",
    "addcdiv",
    "prelu",
    "_prelu_kernel",
    "hardtanh",
    "leaky_relu",
    "floor_divide",
    "nan_to_num",
    "real",
    "imag",
    "logical_not",
    "bitwise_not",
):
    _RULES[_name] = _pointwise


@_rule(
    "clone",
    "detach",
    "alias",
    "_to_copy",
    "lift_fresh",
    "lift",
    "positive",
    "contiguous",
    "view_as_real_copy",
    "_conj",
    "_neg_view",
    "resolve_conj",
    "resolve_neg",
    "dropout",
    "_nested_tensor_from_mask",
)
def _copy(trace: Trace, call: Call) -> None:
    label = trace.label(call.tensors[0])
    is_constant = label.constant or str(call.func._schema.name).startswith("aten::lift")
    _result(trace, call.result, label.dims, label.values)
    trace.label(call.result).constant = is_constant


@_rule("native_dropout")
def _native_dropout(trace: Trace, call: Call) -> None:
    label = trace.label(call["input"])
    for output in _outputs(call):
        _result(trace, output, label.dims)


@_rule("copy")
def _copy_into(trace: Trace, call: Call) -> None:
    target, source = call["self"], call["src"]
    _settle_values(trace, [source])
    _broadcast([trace.label(target).dims, trace.label(source).dims])


@_rule(
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "scalar_tensor",
    "empty_strided",
    "new_empty_strided",
    "empty_permuted",
)
def _constant(trace: Trace, call: Call) -> None:
    trace.put_leaf(call.result)


@_rule("fill", "zero")
def _fill(trace: Trace, call: Call) -> None:
    label = trace.label(call.tensors[0])
    _result(trace, call.result, label.dims)


@_rule(
    "arange",
    "linspace",
    "eye",
    "rand",
    "randn",
    "randint",
    "rand_like",
    "randn_like",
    "bernoulli",
    "normal",
    "randperm",
    "tril_indices",
    "triu_indices",
    "logspace",
    "hann_window",
    "exponential",
    "uniform",
)
def _data(trace: Trace, call: Call) -> None:
    for tensor in call.tensors:
        trace.fix(tensor)
    for output in _outputs(call):
        _result(trace, output, _fixed(output.shape))


@_rule(
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "_assert_async",
    "_assert_tensor_metadata",
    "sym_size",
    "is_same_size",
    "_is_all_true",
    "_is_any_true",
)
def _to_python(trace: Trace, call: Call) -> None:
    _settle_values(trace, call.tensors)


# --- views ----------------------------------------------------------------------------------------------------------


@_rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten", "_reshape_copy")
def _view(trace: Trace, call: Call) -> None:
    source, result = call.tensors[0], call.result
    label = trace.label(source)
    if source.dtype != result.dtype or not source.numel():
        trace.fix(source)
        _result(trace, result, _fixed(result.shape))
        return
    _result(trace, result, regroup(label.dims, list(result.shape)), label.values)


@_rule("permute")
def _permute(trace: Trace, call: Call) -> None:
    label = trace.label(call["self"])
    _result(trace, call.result, [label.dims[dim] for dim in _dims(call["dims"], call["self"])], label.values)


@_rule("t", "transpose", "swapaxes", "numpy_T", "mT")
def _transpose(trace: Trace, call: Call) -> None:
    tensor = call.tensors[0]
    label = trace.label(tensor)
    dims = list(label.dims)
    if len(dims) >= 2:
        first, second = (int(call.get(name, default)) for name, default in (("dim0", 0), ("dim1", 1)))
        dims[first], dims[second] = dims[second], dims[first]
    _result(trace, call.result, dims, label.values)


@_rule("movedim")
def _movedim(trace: Trace, call: Call) -> None:
    trace.fix(call["self"])
    _result(trace, call.result, _fixed(call.result.shape))


@_rule("unsqueeze", "squeeze")
def _squeeze(trace: Trace, call: Call) -> None:
    label = trace.label(call["self"])
    wide = [term for term in label.dims if term.size != 1]
    found = iter(wide)
    _result(trace, call.result, [next(found) if size != 1 else _one() for size in call.result.shape], label.values)


@_rule("expand", "broadcast_to", "expand_copy")
def _expand(trace: Trace, call: Call) -> None:
    label = trace.label(call["self"])
    result = call.result
    before = [_one()] * (result.ndim - len(label.dims)) + label.dims
    dims = [
        term if term.size == size else Term(size)  # copies of one entry: equal, so that they may move
        for term, size in zip(before, result.shape, strict=True)
    ]
    _result(trace, result, dims, label.values)


@_rule("repeat")
def _repeat(trace: Trace, call: Call) -> None:
    label = trace.label(call["self"])
    repeats = list(call["repeats"])
    before = [_one()] * (len(repeats) - len(label.dims)) + label.dims
    dims = [product([Term(count), term]) for count, term in zip(repeats, before, strict=True)]
    _result(trace, call.result, dims, label.values)


@_rule("repeat_interleave")
def _repeat_interleave(trace: Trace, call: Call) -> None:
    for tensor in call.tensors:
        trace.fix(tensor)
    _result(trace, call.result, _fixed(call.result.shape))


def _parts(term: Term, sizes: Sequence[int]) -> list[Term]:
    """A dimension cut into parts of the given sizes."""
    found: list[Term] = []
    rest = term
    for size in sizes[:-1]:
        if size in (0, rest.size):
            found.append(rest if size else Term(0, fixed=True))
            rest = rest if not size else Term(0, fixed=True)
            continue
        halves = cut(rest, size)
        if halves is None:
            fix(term)
            return _fixed(sizes)
        found.append(halves[0])
        rest = halves[1]
    return [*found, rest]


@_rule(
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split",
    "unsafe_chunk",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "split_copy",
    "split_with_sizes_copy",
)
def _split(trace: Trace, call: Call) -> None:
    tensor = call.tensors[0]
    dim = _dim(call, tensor)
    label = trace.label(tensor)
    sizes = [part.shape[dim] for part in call.result]
    if trace.converting and len(sizes) > 1 and set(sizes) == {1}:
        for part in call.result:
            _result(trace, part, [*label.dims[:dim], _one(), *label.dims[dim + 1 :]])
        trace.take(label.dims[dim], [(part, index) for index, part in enumerate(call.result)])
        return
    for part, term in zip(call.result, _parts(label.dims[dim], sizes), strict=True):
        _result(trace, part, [*label.dims[:dim], term, *label.dims[dim + 1 :]], label.values)


@_rule("slice", "slice_copy", "narrow")
def _slice(trace: Trace, call: Call) -> None:
    tensor, result = call["self"], call.result
    label = trace.label(tensor)
    dim = _dim(call, tensor)
    before, after = tensor.shape[dim], result.shape[dim]
    dims = list(label.dims)
    if before != after:
        step = int(call.get("step", 1) or 1)
        start = call.get("start") or 0
        start = max(0, start + before) if start < 0 else start
        if step == 1 and after:
            sizes = [start, after, before - start - after]
            dims[dim] = _parts(label.dims[dim], sizes)[1]
        else:
            fix(label.dims[dim])
            dims[dim] = Term(after, fixed=True)
    _result(trace, result, dims, label.values)


@_rule("select", "select_copy")
def _select(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    label = trace.label(tensor)
    dim = _dim(call, tensor)
    _result(trace, call.result, [*label.dims[:dim], *label.dims[dim + 1 :]], label.values)
    trace.take(label.dims[dim], [(call.result, int(call["index"]) % tensor.shape[dim])])


@_rule("unbind", "unbind_copy")
def _unbind(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    label = trace.label(tensor)
    dim = _dim(call, tensor)
    for each in call.result:
        _result(trace, each, [*label.dims[:dim], *label.dims[dim + 1 :]], label.values)
    trace.take(label.dims[dim], [(each, index) for index, each in enumerate(call.result)])


@_rule("cat", "concat")
def _cat(trace: Trace, call: Call) -> None:
    result = call.result
    tensors = [tensor for tensor in call["tensors"] if tensor.numel() or tensor.ndim == result.ndim]
    tensors = [tensor for tensor in tensors if tensor.ndim == result.ndim]
    dim = _dim(call, result)
    shapes = [trace.label(tensor).dims for tensor in tensors]
    _settle_values(trace, tensors)
    for shape in shapes[1:]:
        for place, (first, other) in enumerate(zip(shapes[0], shape, strict=True)):
            if place != dim:
                unify(first, other)
    joined = concatenation([shape[dim] for shape in shapes if shape[dim].size])
    _result(trace, result, [*shapes[0][:dim], joined, *shapes[0][dim + 1 :]])


@_rule("stack")
def _stack(trace: Trace, call: Call) -> None:
    tensors, result = call["tensors"], call.result
    dim = int(call["dim"]) % result.ndim
    _settle_values(trace, tensors)
    dims = _broadcast([trace.label(tensor).dims for tensor in tensors])
    _result(trace, result, [*dims[:dim], Term(len(tensors), fixed=True), *dims[dim:]])


@_rule("view_as_complex")
def _view_as_complex(trace: Trace, call: Call) -> None:
    label = trace.label(call["self"])
    fix(label.dims[-1])
    _result(trace, call.result, label.dims[:-1])


@_rule("view_as_real")
def _view_as_real(trace: Trace, call: Call) -> None:
    _result(trace, call.result, [*trace.label(call["self"]).dims, Term(2, fixed=True)])


@_rule("flip", "roll")
def _reorder(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    label = trace.label(tensor)
    places = _dims(call["dims"], tensor)
    for dim in places:
        fix(label.dims[dim])
    trace.mix([label.dims[dim] for dim in places], [term for dim, term in enumerate(label.dims) if dim not in places])
    _result(trace, call.result, label.dims, label.values)


@_rule("tril", "triu")
def _triangle(trace: Trace, call: Call) -> None:
    dims = trace.label(call["self"]).dims
    for term in dims[-2:]:
        fix(term)
    _result(trace, call.result, dims)


@_rule("constant_pad_nd")
def _pad(trace: Trace, call: Call) -> None:
    tensor, pad = call["self"], list(call["pad"])
    dims = list(trace.label(tensor).dims)
    for position in range(len(pad) // 2):
        before, after = pad[2 * position : 2 * position + 2]
        dim = tensor.ndim - 1 - position
        if before < 0 or after < 0:
            fix(dims[dim])
            dims[dim] = Term(call.result.shape[dim], fixed=True)
        elif before or after:
            parts = [Term(before)] * bool(before) + [dims[dim]] + [Term(after)] * bool(after)
            dims[dim] = concatenation(parts)
    _result(trace, call.result, dims)


# --- reductions and what mixes the entries of a dimension -----------------------------------------------------------


@_rule(
    "sum",
    "mean",
    "amax",
    "amin",
    "prod",
    "any",
    "all",
    "logsumexp",
    "var",
    "std",
    "linalg_vector_norm",
    "norm",
    "max",
    "min",
    "argmax",
    "argmin",
    "nansum",
    "nanmean",
    "median",
    "aminmax",
    "var_mean",
    "std_mean",
    "count_nonzero",
    "mode",
)
def _reduction(trace: Trace, call: Call) -> None:
    tensors = call.tensors
    if len(tensors) == 2:  # maximum of two tensors goes by the same name
        _pointwise(trace, call)
        return
    tensor = tensors[0]
    _settle_values(trace, [tensor])
    dims = trace.label(tensor).dims
    name = str(call.func._schema.name)
    reduced = _dims(call.get("dim"), tensor)
    outputs = _outputs(call)
    keeps = bool(outputs) and outputs[0].ndim == tensor.ndim
    kept = [_one() if dim in reduced else term for dim, term in enumerate(dims) if keeps or dim not in reduced]
    for position, output in enumerate(outputs):
        picks = "arg" in name or (position == 1 and name.removeprefix("aten::") in ("max", "min", "median", "mode"))
        values = None
        if picks:
            if call.get("dim") is None and tensor.ndim > 1:
                trace.fix(tensor)
            else:
                values = dims[reduced[0]] if dims else None
        _result(trace, output, kept, values)


@_rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax")
def _softmax(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    label = trace.label(tensor)
    dim = _dim(call, tensor)
    trace.mix([label.dims[dim]], [*label.dims[:dim], *label.dims[dim + 1 :]])
    _result(trace, call.result, label.dims)


@_rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "diff")
def _cumulative(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    dims = trace.label(tensor).dims
    _settle_values(trace, [tensor])
    if dims:
        dim = _dim(call, tensor)
        fix(dims[dim])
        trace.mix([dims[dim]], [*dims[:dim], *dims[dim + 1 :]])
    for output in _outputs(call):
        _result(trace, output, dims)


@_rule("topk", "sort", "argsort", "kthvalue")
def _ordered(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    label = trace.label(tensor)
    _settle_values(trace, [tensor])
    dim = _dim(call, tensor)
    size = _outputs(call)[0].shape[dim] if _outputs(call)[0].ndim else 1
    # The entries come in the order of their values, whatever their places were.
    order = Term(size, fixed=True)
    order.chooses = label.dims[dim]
    outputs = _outputs(call)
    for position, output in enumerate(outputs):
        dims = [*label.dims[:dim], order, *label.dims[dim + 1 :]] if output.ndim == tensor.ndim else label.dims[:dim]
        _result(trace, output, dims, label.dims[dim] if position == len(outputs) - 1 else None)


# --- linear algebra -------------------------------------------------------------------------------------------------


@_rule("mm", "bmm", "_scaled_mm", "_int_mm")
def _matmul(trace: Trace, call: Call) -> None:
    a, b = (trace.label(tensor).dims for tensor in call.tensors[:2])
    unify(a[-1], b[-2])
    for x, y in zip(a[:-2], b[:-2], strict=True):
        unify(x, y)
    _result(trace, call.result, [*a[:-2], a[-2], b[-1]])


@_rule("addmm", "baddbmm", "addbmm")
def _addmm(trace: Trace, call: Call) -> None:
    names = ("mat1", "mat2") if call.get("mat1") is not None else ("batch1", "batch2")
    a, b = (trace.label(call[name]).dims for name in names)
    unify(a[-1], b[-2])
    for x, y in zip(a[:-2], b[:-2], strict=True):
        unify(x, y)
    dims = _broadcast([trace.label(call["self"]).dims, [*a[:-2], a[-2], b[-1]]])
    _result(trace, call.result, dims)


@_rule("mv", "addmv")
def _mv(trace: Trace, call: Call) -> None:
    a, b = (
        trace.label(call.get("mat") if call.get("mat") is not None else call["self"]).dims,
        trace.label(call["vec"]).dims,
    )
    unify(a[-1], b[0])
    dims = [a[0]]
    if call.get("mat") is not None:
        dims = _broadcast([trace.label(call["self"]).dims, dims])
    _result(trace, call.result, dims)


@_rule("dot", "vdot")
def _dot(trace: Trace, call: Call) -> None:
    a, b = (trace.label(tensor).dims for tensor in call.tensors)
    unify(a[0], b[0])
    _result(trace, call.result, [])


@_rule("linear")
def _linear(trace: Trace, call: Call) -> None:
    x, weight = trace.label(call["input"]).dims, trace.label(call["weight"]).dims
    unify(x[-1], weight[-1])
    if call.get("bias") is not None:
        unify(weight[0], trace.label(call["bias"]).dims[0])
    _result(trace, call.result, [*x[:-1], *weight[:-1]])


@_rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_cudnn_attention",
)
def _attention(trace: Trace, call: Call) -> None:
    query, key, value = (trace.label(call[name]).dims for name in ("query", "key", "value"))
    for place in range(len(query) - 2):
        if query[place].size == key[place].size == value[place].size:
            _broadcast([[query[place]], [key[place]], [value[place]]])
        else:
            for dims in (query, key, value):
                fix(dims[place])
    unify(query[-1], key[-1])
    unify(key[-2], value[-2])
    mask = call.get("attn_mask") if call.get("attn_mask") is not None else call.get("attn_bias")
    if mask is not None:
        _broadcast([trace.label(mask).dims, [*query[:-2], query[-2], key[-2]]])
    outputs = _outputs(call)
    _result(trace, outputs[0], [*query[:-2], query[-2], value[-1]])
    for other in outputs[1:]:
        _result(trace, other, [*query[:-1]] if other.ndim == len(query) - 1 else _fixed(other.shape))


def _spatial(trace: Trace, tensor: Tensor, kept: int) -> list[Term]:
    """The first dimensions of a tensor, the others being places in space or time, and fixed."""
    dims = trace.label(tensor).dims
    for term in dims[kept:]:
        fix(term)
    trace.mix(dims[kept:], dims[:kept])
    return dims[:kept]


@_rule("convolution", "_convolution", "mkldnn_convolution", "convolution_overrideable")
def _convolution(trace: Trace, call: Call) -> None:
    x, weight = call["input"], call["weight"]
    batched = x.ndim == weight.ndim
    kept = _spatial(trace, x, 2 if batched else 1)
    w = _spatial(trace, weight, 2)
    groups, transposed = int(call["groups"]), bool(call["transposed"])
    source, target = (0, 1) if transposed else (1, 0)
    channels = kept[-1]
    if groups == 1:
        unify(channels, w[source])
        out = w[target]
    else:
        out_of_groups = int(call.result.shape[1 if batched else 0])
        parts = divide(channels, channels.size // groups)
        # A transposed convolution stacks the groups along the inputs, an ordinary one along the outputs.
        stacked = divide(w[0], w[0].size // groups)
        if parts is None or stacked is None:
            for term in (channels, *w):
                fix(term)
            out = Term(out_of_groups, fixed=True)
        else:
            unify(parts[0], stacked[0])
            if transposed:
                unify(parts[1], stacked[1])
                out = product([parts[0], w[1]])
            else:
                unify(parts[1], w[1])
                out = w[0]
    if call.get("bias") is not None:
        unify(out, trace.label(call["bias"]).dims[0])
    dims = [*kept[:-1], out]
    _result(trace, call.result, [*dims, *_fixed(call.result.shape[len(dims) :])])


_SPATIAL_RANK = {
    name: rank
    for rank in (1, 2, 3)
    for name in (
        f"max_pool{rank}d_with_indices", f"max_pool{rank}d", f"avg_pool{rank}d", f"adaptive_avg_pool{rank}d",
        f"_adaptive_avg_pool{rank}d", f"adaptive_max_pool{rank}d",
        f"upsample_nearest{rank}d", f"_upsample_nearest_exact{rank}d",
        f"reflection_pad{rank}d", f"replication_pad{rank}d", f"grid_sampler_{rank}d",
    )
} | {
    "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "upsample_linear1d": 1, "upsample_trilinear3d": 3,
    "_upsample_bilinear2d_aa": 2, "_upsample_bicubic2d_aa": 2, "mkldnn_max_pool2d": 2,
}  # fmt: skip


def _pooling(trace: Trace, call: Call) -> None:
    tensor = call.tensors[0]
    rank = _SPATIAL_RANK[str(call.func._schema.name).removeprefix("aten::")]
    kept = _spatial(trace, tensor, tensor.ndim - rank)
    for other in call.tensors[1:]:
        trace.fix(other)
    for output in _outputs(call):
        _result(trace, output, [*kept, *_fixed(output.shape[len(kept) :])])


for _name in _SPATIAL_RANK:
    _RULES[_name] = _pooling


@_rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def _shuffle(trace: Trace, call: Call) -> None:
    for tensor in call.tensors:
        trace.fix(tensor)
    _result(trace, call.result, _fixed(call.result.shape))


@_rule("im2col")
def _im2col(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    kept = _spatial(trace, tensor, tensor.ndim - 2)
    kernel = Term(call.result.shape[-2] // kept[-1].size, fixed=True)
    _result(trace, call.result, [*kept[:-1], product([kept[-1], kernel]), Term(call.result.shape[-1], fixed=True)])


@_rule("unfold")
def _unfold(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    dim = int(call["dimension"]) % tensor.ndim
    dims = list(trace.label(tensor).dims)
    fix(dims[dim])
    trace.mix([dims[dim]], [*dims[:dim], *dims[dim + 1 :]])
    dims[dim] = Term(call.result.shape[dim], fixed=True)
    _result(trace, call.result, [*dims, Term(call.result.shape[-1], fixed=True)])


@_rule("glu")
def _glu(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    dims, dim = list(trace.label(tensor).dims), _dim(call, tensor)
    halves = cut(dims[dim], dims[dim].size // 2)
    if halves is None:
        fix(dims[dim])
        dims[dim] = Term(dims[dim].size // 2, fixed=True)
    else:
        unify(*halves)
        dims[dim] = halves[0]
    _result(trace, call.result, dims)


@_rule("_fft_c2c", "_fft_r2c", "_fft_c2r")
def _fourier(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    dims = list(trace.label(tensor).dims)
    places = _dims(call["dim"], tensor)
    for dim in places:
        fix(dims[dim])
    trace.mix([dims[dim] for dim in places], [term for dim, term in enumerate(dims) if dim not in places])
    for dim in places:
        dims[dim] = Term(call.result.shape[dim], fixed=True)
    _result(trace, call.result, dims)


# --- norms ----------------------------------------------------------------------------------------------------------


@_rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def _layer_norm(trace: Trace, call: Call) -> None:
    tensor = call["input"]
    dims = trace.label(tensor).dims
    kept = tensor.ndim - len(call["normalized_shape"])
    for name in ("weight", "bias"):
        if call.get(name) is not None:
            for term, other in zip(dims[kept:], trace.label(call[name]).dims, strict=True):
                unify(term, other)
    trace.mix(dims[kept:], dims[:kept])
    outputs = _outputs(call)
    _result(trace, outputs[0], dims)
    for other in outputs[1:]:
        _result(trace, other, [*dims[:kept], *[_one() for _ in range(other.ndim - kept)]])


@_rule("native_group_norm")
def _group_norm(trace: Trace, call: Call) -> None:
    tensor, groups = call["input"], int(call["group"])
    dims = trace.label(tensor).dims
    channels = dims[1]
    halves = divide(channels, channels.size // groups)
    if halves is None:
        fix(channels)
    else:
        trace.mix([halves[1], *dims[2:]], [halves[0]])
    for name in ("weight", "bias"):
        if call.get(name) is not None:
            unify(channels, trace.label(call[name]).dims[0])
    outputs = _outputs(call)
    _result(trace, outputs[0], dims)
    for other in outputs[1:]:
        _result(trace, other, _fixed(other.shape))


@_rule(
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit",
    "cudnn_batch_norm",
    "_batch_norm_impl_index",
    "_batch_norm_no_update",
    "batch_norm",
    "instance_norm",
)
def _batch_norm(trace: Trace, call: Call) -> None:
    tensor = call["input"]
    dims = trace.label(tensor).dims
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.get(name) is not None:
            unify(dims[1], trace.label(call[name]).dims[0])
    outputs = _outputs(call)
    _result(trace, outputs[0], dims)
    for other in outputs[1:]:
        _result(trace, other, [dims[1]] if list(other.shape) == [dims[1].size] else _fixed(other.shape))


@_rule("_weight_norm_interface")
def _weight_norm(trace: Trace, call: Call) -> None:
    v, g = trace.label(call["v"]).dims, trace.label(call["g"]).dims
    dim = int(call["dim"])
    trace.mix([term for place, term in enumerate(v) if place != dim], [v[dim]])
    weight, norms = _outputs(call)
    _result(trace, weight, _broadcast([v, g]))
    _result(trace, norms, g)


# --- look-ups -------------------------------------------------------------------------------------------------------


def _point(trace: Trace, table: Term, index: Tensor) -> None:
    """Positions along a dimension are looked up: fine if they are known to point into it, else it is fixed."""
    values = trace.label(index).values
    if values is not None and find(values).size == find(table).size:
        unify(values, table)
        return
    if values is not None:
        fix(values)
    if trace.label(index).constant and index.numel() == 1:
        place = int(index) % table.size
        fix(_parts(table, [place, 1, table.size - place - 1])[1])
        return
    fix(table)


@_rule("embedding")
def _embedding(trace: Trace, call: Call) -> None:
    weight, indices = trace.label(call["weight"]), trace.label(call["indices"])
    _point(trace, weight.dims[0], call["indices"])
    _result(trace, call.result, [*indices.dims, *weight.dims[1:]])


@_rule("index_select")
def _index_select(trace: Trace, call: Call) -> None:
    tensor, index = call["self"], call["index"]
    dims, dim = trace.label(tensor).dims, _dim(call, tensor)
    _point(trace, dims[dim], index)
    _result(trace, call.result, [*dims[:dim], *trace.label(index).dims, *dims[dim + 1 :]], trace.label(tensor).values)


def _indexed(trace: Trace, tensor: Tensor, indices: Sequence[Tensor | None]) -> tuple[list[Term], int] | None:
    """The dimensions that indices put in place of those they look up in, and where; None for masks."""
    dims = trace.label(tensor).dims
    present = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for _, index in present):
        dim = 0
        for index in indices:
            width = 1 if index is None or index.dtype not in (torch.bool, torch.uint8) else index.ndim
            if index is not None:
                trace.fix(index)
                for term in dims[dim : dim + width]:
                    fix(term)
            dim += width
        return None
    for dim, index in present:
        _point(trace, dims[dim], index)
    places = [dim for dim, _ in present]
    adjacent = places == list(range(places[0], places[-1] + 1))
    return _broadcast([trace.label(index).dims for _, index in present]), places[0] if adjacent else 0


@_rule("index", "_unsafe_index")
def _index(trace: Trace, call: Call) -> None:
    tensor, indices, result = call["self"], call["indices"], call.result
    values = trace.label(tensor).values
    found = _indexed(trace, tensor, indices)
    dims = trace.label(tensor).dims
    if found is None:
        # Behind (or before) what the mask covers the dimensions stay.
        covered = sum(1 if index is None or index.dtype != torch.bool else index.ndim for index in indices)
        trailing = dims[covered:]
        leading = 0
        while leading < len(indices) and indices[leading] is None:
            leading += 1
        middle = result.ndim - leading - len(trailing)
        if middle != 1 or any(index is None for index in indices[leading:]):
            trace.fix(tensor)
            _result(trace, result, _fixed(result.shape), values)
            return
        kept = [*dims[:leading], Term(result.shape[leading], fixed=True), *trailing]
        _result(trace, result, kept, values)
        return
    looked_up, place = found
    rest = [term for dim, term in enumerate(dims) if dim >= len(indices) or indices[dim] is None]
    _result(trace, result, [*rest[:place], *looked_up, *rest[place:]], values)


@_rule("index_put", "_index_put_impl", "_unsafe_index_put")
def _index_put(trace: Trace, call: Call) -> None:
    tensor, indices, source = call["self"], call["indices"], call["values"]
    _settle_values(trace, [source])
    found = _indexed(trace, tensor, indices)
    dims = trace.label(tensor).dims
    if found is None:
        covered = sum(1 if index is None or index.dtype != torch.bool else index.ndim for index in indices)
        trailing = dims[covered:]
        written = trace.label(source).dims
        for term in written[: max(0, len(written) - len(trailing))]:
            fix(term)
        _broadcast([trailing, written[max(0, len(written) - len(trailing)) :]])
        if any(index is None for index in indices):
            trace.fix(tensor)
            trace.fix(source)
    else:
        looked_up, place = found
        rest = [term for dim, term in enumerate(dims) if dim >= len(indices) or indices[dim] is None]
        _broadcast([[*rest[:place], *looked_up, *rest[place:]], trace.label(source).dims])
    _result(trace, call.result, dims)


def _along_index(trace: Trace, tensor: Tensor, index: Tensor, dim: int, others: Sequence[Tensor] = ()) -> list[Term]:
    """Unifies the dimensions beside the one that is looked up; gives those of the index."""
    dims, found = trace.label(tensor).dims, trace.label(index).dims
    if not dims or not found:
        return list(found)
    shapes = [found, *(trace.label(other).dims for other in others)]
    for place, term in enumerate(dims):
        if place == dim:
            for shape in shapes[1:]:
                if shape[place].size == found[place].size:
                    unify(shape[place], found[place])
            continue
        for shape in shapes:
            if shape[place].size == term.size:
                unify(shape[place], term)
            else:
                fix(shape[place])
                fix(term)
    _point(trace, dims[dim], index)
    return list(found)


@_rule("gather")
def _gather(trace: Trace, call: Call) -> None:
    tensor, index = call["self"], call["index"]
    values = trace.label(tensor).values
    dim = _dim(call, tensor)
    _result(trace, call.result, _along_index(trace, tensor, index, dim), values)


@_rule("scatter", "scatter_add", "scatter_reduce")
def _scatter(trace: Trace, call: Call) -> None:
    tensor, index = call["self"], call["index"]
    source = call.get("src")
    others = [source] if isinstance(source, Tensor) else []
    _settle_values(trace, [tensor, *others])
    _along_index(trace, tensor, index, _dim(call, tensor), others)
    _result(trace, call.result, trace.label(tensor).dims)


@_rule("index_add", "index_copy", "index_fill")
def _index_add(trace: Trace, call: Call) -> None:
    tensor, index = call["self"], call["index"]
    dims, dim = trace.label(tensor).dims, _dim(call, tensor)
    source = call.get("source")
    _point(trace, dims[dim], index)
    if isinstance(source, Tensor) and source.ndim == tensor.ndim:
        found = trace.label(source).dims
        unify(found[dim], trace.label(index).dims[0])
        for place, (term, other) in enumerate(zip(dims, found, strict=True)):
            if place != dim:
                unify(term, other)
    _result(trace, call.result, dims)


@_rule("masked_scatter")
def _masked_scatter(trace: Trace, call: Call) -> None:
    tensor, mask, source = call["self"], call["mask"], call["source"]
    dims = _broadcast([trace.label(tensor).dims, trace.label(mask).dims])
    written = trace.label(source).dims
    # Rows of features go to rows of tokens: the last dimension is theirs, the order of the rows is not free.
    for row in (*dims[:-1], *written[:-1]):
        fix(row)
    if dims[-1].size == written[-1].size:
        unify(dims[-1], written[-1])
    else:
        fix(dims[-1])
        fix(written[-1])
    _result(trace, call.result, dims)
