"""Reductions, and operations that mix or order the entries of a dimension."""

from __future__ import annotations

from hf_llfc.adapters.derived.rules.elementwise import pointwise
from hf_llfc.adapters.derived.rules.table import dim_of, dims_of, one, outputs_of, put_result, rule, settle_values
from hf_llfc.adapters.derived.terms import Term, fix
from hf_llfc.adapters.derived.trace import Call, Trace


@rule(
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
        pointwise(trace, call)
        return
    tensor = tensors[0]
    settle_values(trace, [tensor])
    dims = trace.label(tensor).dims
    name = str(call.func._schema.name)
    reduced = dims_of(call.get("dim"), tensor)
    outputs = outputs_of(call)
    keeps = bool(outputs) and outputs[0].ndim == tensor.ndim
    kept = [one() if dim in reduced else term for dim, term in enumerate(dims) if keeps or dim not in reduced]
    for position, output in enumerate(outputs):
        picks = "arg" in name or (position == 1 and name.removeprefix("aten::") in ("max", "min", "median", "mode"))
        values = None
        if picks:
            if call.get("dim") is None and tensor.ndim > 1:
                trace.fix(tensor)
            else:
                values = dims[reduced[0]] if dims else None
        put_result(trace, output, kept, values)


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax")
def _softmax(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    label = trace.label(tensor)
    dim = dim_of(call, tensor)
    trace.mix([label.dims[dim]], [*label.dims[:dim], *label.dims[dim + 1 :]])
    put_result(trace, call.result, label.dims)


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "diff")
def _cumulative(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    dims = trace.label(tensor).dims
    settle_values(trace, [tensor])
    if dims:
        dim = dim_of(call, tensor)
        fix(dims[dim])
        trace.mix([dims[dim]], [*dims[:dim], *dims[dim + 1 :]])
    for output in outputs_of(call):
        put_result(trace, output, dims)


@rule("topk", "sort", "argsort", "kthvalue")
def _ordered(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    label = trace.label(tensor)
    settle_values(trace, [tensor])
    dim = dim_of(call, tensor)
    size = outputs_of(call)[0].shape[dim] if outputs_of(call)[0].ndim else 1
    # The entries come in the order of their values, whatever their places were.
    order = Term(size, fixed=True)
    order.chooses = label.dims[dim]
    outputs = outputs_of(call)
    for position, output in enumerate(outputs):
        dims = [*label.dims[:dim], order, *label.dims[dim + 1 :]] if output.ndim == tensor.ndim else label.dims[:dim]
        put_result(trace, output, dims, label.dims[dim] if position == len(outputs) - 1 else None)
