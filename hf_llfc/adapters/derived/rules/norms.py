"""Normalisation layers."""

from __future__ import annotations

from hf_llfc.adapters.derived.rules.table import broadcast, fixed_terms, one, outputs_of, put_result, rule
from hf_llfc.adapters.derived.terms import divide, fix, unify
from hf_llfc.adapters.derived.trace import Call, Trace


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def _layer_norm(trace: Trace, call: Call) -> None:
    tensor = call["input"]
    dims = trace.label(tensor).dims
    kept = tensor.ndim - len(call["normalized_shape"])
    for name in ("weight", "bias"):
        if call.get(name) is not None:
            for term, same in zip(dims[kept:], trace.label(call[name]).dims, strict=True):
                unify(term, same)
    trace.mix(dims[kept:], dims[:kept])
    outputs = outputs_of(call)
    put_result(trace, outputs[0], dims)
    for other in outputs[1:]:
        put_result(trace, other, [*dims[:kept], *[one() for _ in range(other.ndim - kept)]])


@rule("native_group_norm")
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
    outputs = outputs_of(call)
    put_result(trace, outputs[0], dims)
    for other in outputs[1:]:
        put_result(trace, other, fixed_terms(other.shape))


@rule(
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
    outputs = outputs_of(call)
    put_result(trace, outputs[0], dims)
    for other in outputs[1:]:
        put_result(trace, other, [dims[1]] if list(other.shape) == [dims[1].size] else fixed_terms(other.shape))


@rule("_weight_norm_interface")
def _weight_norm(trace: Trace, call: Call) -> None:
    v, g = trace.label(call["v"]).dims, trace.label(call["g"]).dims
    dim = int(call["dim"])
    trace.mix([term for place, term in enumerate(v) if place != dim], [v[dim]])
    weight, norms = outputs_of(call)
    put_result(trace, weight, broadcast([v, g]))
    put_result(trace, norms, g)
