"""Views, splits and concatenations."""

from __future__ import annotations

from hf_llfc.adapters.derived.rules.table import (
    broadcast,
    dim_of,
    dims_of,
    fixed_terms,
    one,
    parts_at,
    put_result,
    rule,
    settle_values,
)
from hf_llfc.adapters.derived.terms import Term, concatenation, divide, fix, product, regroup, unify
from hf_llfc.adapters.derived.trace import Call, Trace


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten", "_reshape_copy")
def _view(trace: Trace, call: Call) -> None:
    source, result = call.tensors[0], call.result
    label = trace.label(source)
    if source.dtype != result.dtype or not source.numel():
        trace.fix(source)
        put_result(trace, result, fixed_terms(result.shape))
        return
    put_result(trace, result, regroup(label.dims, list(result.shape)), label.values)


@rule("permute")
def _permute(trace: Trace, call: Call) -> None:
    label = trace.label(call["self"])
    put_result(trace, call.result, [label.dims[dim] for dim in dims_of(call["dims"], call["self"])], label.values)


@rule("t", "transpose", "swapaxes", "numpy_T", "mT")
def _transpose(trace: Trace, call: Call) -> None:
    tensor = call.tensors[0]
    label = trace.label(tensor)
    dims = list(label.dims)
    if len(dims) >= 2:
        first, second = (int(call.get(name, default)) for name, default in (("dim0", 0), ("dim1", 1)))
        dims[first], dims[second] = dims[second], dims[first]
    put_result(trace, call.result, dims, label.values)


@rule("unsqueeze", "squeeze")
def _squeeze(trace: Trace, call: Call) -> None:
    label = trace.label(call["self"])
    wide = [term for term in label.dims if term.size != 1]
    found = iter(wide)
    put_result(trace, call.result, [next(found) if size != 1 else one() for size in call.result.shape], label.values)


@rule("expand", "broadcast_to", "expand_copy")
def _expand(trace: Trace, call: Call) -> None:
    label = trace.label(call["self"])
    result = call.result
    before = [one()] * (result.ndim - len(label.dims)) + label.dims
    dims = [
        term if term.size == size else Term(size)  # copies of one entry: equal, so that they may move
        for term, size in zip(before, result.shape, strict=True)
    ]
    put_result(trace, result, dims, label.values)


@rule("repeat")
def _repeat(trace: Trace, call: Call) -> None:
    label = trace.label(call["self"])
    repeats = list(call["repeats"])
    before = [one()] * (len(repeats) - len(label.dims)) + label.dims
    dims = [product([Term(count), term]) for count, term in zip(repeats, before, strict=True)]
    put_result(trace, call.result, dims, label.values)


@rule("repeat_interleave")
def _repeat_interleave(trace: Trace, call: Call) -> None:
    for tensor in call.tensors:
        trace.fix(tensor)
    put_result(trace, call.result, fixed_terms(call.result.shape))


@rule(
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
    dim = dim_of(call, tensor)
    label = trace.label(tensor)
    sizes = [part.shape[dim] for part in call.result]
    if trace.converting and len(sizes) > 1 and set(sizes) == {1}:
        for part in call.result:
            put_result(trace, part, [*label.dims[:dim], one(), *label.dims[dim + 1 :]])
        trace.take(label.dims[dim], [(part, index) for index, part in enumerate(call.result)])
        return
    for part, term in zip(call.result, parts_at(label.dims[dim], sizes), strict=True):
        put_result(trace, part, [*label.dims[:dim], term, *label.dims[dim + 1 :]], label.values)


@rule("slice", "slice_copy", "narrow")
def _slice(trace: Trace, call: Call) -> None:
    tensor, result = call["self"], call.result
    label = trace.label(tensor)
    dim = dim_of(call, tensor)
    before, after = tensor.shape[dim], result.shape[dim]
    dims = list(label.dims)
    if before != after:
        step = int(call.get("step", 1) or 1)
        start = call.get("start") or 0
        start = max(0, start + before) if start < 0 else start
        halves = divide(label.dims[dim], step) if step > 1 and before == after * step and start < step else None
        if step == 1 and after:
            sizes = [start, after, before - start - after]
            dims[dim] = parts_at(label.dims[dim], sizes)[1]
        elif halves is not None:  # one of the entries that take turns
            fix(halves[1])
            dims[dim] = halves[0]
        else:
            fix(label.dims[dim])
            dims[dim] = Term(after, fixed=True)
    put_result(trace, result, dims, label.values)


@rule("select", "select_copy")
def _select(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    label = trace.label(tensor)
    dim = dim_of(call, tensor)
    put_result(trace, call.result, [*label.dims[:dim], *label.dims[dim + 1 :]], label.values)
    trace.take(label.dims[dim], [(call.result, int(call["index"]) % tensor.shape[dim])])


@rule("unbind", "unbind_copy")
def _unbind(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    label = trace.label(tensor)
    dim = dim_of(call, tensor)
    for each in call.result:
        put_result(trace, each, [*label.dims[:dim], *label.dims[dim + 1 :]], label.values)
    trace.take(label.dims[dim], [(each, index) for index, each in enumerate(call.result)])


@rule("cat", "concat")
def _cat(trace: Trace, call: Call) -> None:
    result = call.result
    tensors = [tensor for tensor in call["tensors"] if tensor.numel() or tensor.ndim == result.ndim]
    tensors = [tensor for tensor in tensors if tensor.ndim == result.ndim]
    dim = dim_of(call, result)
    shapes = [trace.label(tensor).dims for tensor in tensors]
    settle_values(trace, tensors)
    for shape in shapes[1:]:
        for place, (first, other) in enumerate(zip(shapes[0], shape, strict=True)):
            if place != dim:
                unify(first, other)
    joined = concatenation([shape[dim] for shape in shapes if shape[dim].size])
    put_result(trace, result, [*shapes[0][:dim], joined, *shapes[0][dim + 1 :]])


@rule("stack")
def _stack(trace: Trace, call: Call) -> None:
    tensors, result = call["tensors"], call.result
    dim = int(call["dim"]) % result.ndim
    settle_values(trace, tensors)
    dims = broadcast([trace.label(tensor).dims for tensor in tensors])
    put_result(trace, result, [*dims[:dim], Term(len(tensors), fixed=True), *dims[dim:]])


@rule("view_as_complex")
def _view_as_complex(trace: Trace, call: Call) -> None:
    label = trace.label(call["self"])
    fix(label.dims[-1])
    put_result(trace, call.result, label.dims[:-1])


@rule("view_as_real")
def _view_as_real(trace: Trace, call: Call) -> None:
    put_result(trace, call.result, [*trace.label(call["self"]).dims, Term(2, fixed=True)])


@rule("flip", "roll")
def _reorder(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    label = trace.label(tensor)
    places = dims_of(call["dims"], tensor)
    for dim in places:
        fix(label.dims[dim])
    trace.mix([label.dims[dim] for dim in places], [term for dim, term in enumerate(label.dims) if dim not in places])
    put_result(trace, call.result, label.dims, label.values)


@rule("tril", "triu")
def _triangle(trace: Trace, call: Call) -> None:
    dims = trace.label(call["self"]).dims
    for term in dims[-2:]:
        fix(term)
    put_result(trace, call.result, dims)


@rule("constant_pad_nd")
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
    put_result(trace, call.result, dims)
