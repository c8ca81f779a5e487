"""Elementwise operations, copies, constants, and what hands a number to Python."""

from __future__ import annotations

from hf_llfc.adapters.derived.rules.table import (
    RULES,
    broadcast,
    fixed_terms,
    outputs_of,
    put_result,
    rule,
    settle_values,
)
from hf_llfc.adapters.derived.trace import Call, Trace


def pointwise(trace: Trace, call: Call) -> None:
    """Dimensions that meet are the same, sizes of one broadcast."""
    tensors = call.tensors
    settle_values(trace, tensors)
    dims = broadcast([trace.label(tensor).dims for tensor in tensors])
    for output in outputs_of(call):
        kept = dims if len(dims) == output.ndim else dims[-output.ndim :] if output.ndim else []
        put_result(trace, output, kept)


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
    "hardswish",
    "log_sigmoid_forward",
    "nan_to_num",
    "real",
    "imag",
    "logical_not",
    "bitwise_not",
):
    RULES[_name] = pointwise


@rule(
    "clone",
    "detach",
    "alias",
    "_to_copy",
    "lift_fresh",
    "lift",
    "positive",
    "contiguous",
    "_conj",
    "_neg_view",
    "resolve_conj",
    "resolve_neg",
    "dropout",
)
def _copy(trace: Trace, call: Call) -> None:
    label = trace.label(call.tensors[0])
    is_constant = label.constant or str(call.func._schema.name).startswith("aten::lift")
    put_result(trace, call.result, label.dims, label.values)
    trace.label(call.result).constant = is_constant


@rule("native_dropout")
def _native_dropout(trace: Trace, call: Call) -> None:
    label = trace.label(call["input"])
    for output in outputs_of(call):
        put_result(trace, output, label.dims)


@rule("copy")
def _copy_into(trace: Trace, call: Call) -> None:
    target, source = call["self"], call["src"]
    settle_values(trace, [source])
    broadcast([trace.label(target).dims, trace.label(source).dims])


@rule(
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


@rule("fill", "zero")
def _fill(trace: Trace, call: Call) -> None:
    label = trace.label(call.tensors[0])
    put_result(trace, call.result, label.dims)


@rule(
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
    for output in outputs_of(call):
        put_result(trace, output, fixed_terms(output.shape))


@rule(
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
    settle_values(trace, call.tensors)
