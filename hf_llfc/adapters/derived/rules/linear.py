"""Matrix products and attention."""

from __future__ import annotations

from hf_llfc.adapters.derived.rules.table import broadcast, fixed_terms, outputs_of, put_result, rule
from hf_llfc.adapters.derived.terms import fix, unify
from hf_llfc.adapters.derived.trace import Call, Trace


@rule("mm", "bmm", "_scaled_mm", "_int_mm")
def _matmul(trace: Trace, call: Call) -> None:
    a, b = (trace.label(tensor).dims for tensor in call.tensors[:2])
    unify(a[-1], b[-2])
    for x, y in zip(a[:-2], b[:-2], strict=True):
        unify(x, y)
    put_result(trace, call.result, [*a[:-2], a[-2], b[-1]])


@rule("addmm", "baddbmm", "addbmm")
def _addmm(trace: Trace, call: Call) -> None:
    names = ("mat1", "mat2") if call.get("mat1") is not None else ("batch1", "batch2")
    a, b = (trace.label(call[name]).dims for name in names)
    unify(a[-1], b[-2])
    for x, y in zip(a[:-2], b[:-2], strict=True):
        unify(x, y)
    dims = broadcast([trace.label(call["self"]).dims, [*a[:-2], a[-2], b[-1]]])
    put_result(trace, call.result, dims)


@rule("mv", "addmv")
def _mv(trace: Trace, call: Call) -> None:
    a, b = (
        trace.label(call.get("mat") if call.get("mat") is not None else call["self"]).dims,
        trace.label(call["vec"]).dims,
    )
    unify(a[-1], b[0])
    dims = [a[0]]
    if call.get("mat") is not None:
        dims = broadcast([trace.label(call["self"]).dims, dims])
    put_result(trace, call.result, dims)


@rule("dot", "vdot")
def _dot(trace: Trace, call: Call) -> None:
    a, b = (trace.label(tensor).dims for tensor in call.tensors)
    unify(a[0], b[0])
    put_result(trace, call.result, [])


@rule("linear")
def _linear(trace: Trace, call: Call) -> None:
    x, weight = trace.label(call["input"]).dims, trace.label(call["weight"]).dims
    unify(x[-1], weight[-1])
    if call.get("bias") is not None:
        unify(weight[0], trace.label(call["bias"]).dims[0])
    put_result(trace, call.result, [*x[:-1], *weight[:-1]])


@rule(
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
            broadcast([[query[place]], [key[place]], [value[place]]])
        else:
            for dims in (query, key, value):
                fix(dims[place])
    unify(query[-1], key[-1])
    unify(key[-2], value[-2])
    mask = call.get("attn_mask") if call.get("attn_mask") is not None else call.get("attn_bias")
    if mask is not None:
        broadcast([trace.label(mask).dims, [*query[:-2], query[-2], key[-2]]])
    outputs = outputs_of(call)
    put_result(trace, outputs[0], [*query[:-2], query[-2], value[-1]])
    for other in outputs[1:]:
        put_result(trace, other, [*query[:-1]] if other.ndim == len(query) - 1 else fixed_terms(other.shape))
