"""Convolutions, pooling, and what else has places in space or time."""

from __future__ import annotations

from torch import Tensor

from hf_llfc.adapters.derived.rules.table import RULES, dim_of, dims_of, fixed_terms, outputs_of, put_result, rule
from hf_llfc.adapters.derived.terms import Term, cut, divide, fix, product, unify
from hf_llfc.adapters.derived.trace import Call, Trace


def _spatial(trace: Trace, tensor: Tensor, kept: int) -> list[Term]:
    """The first dimensions of a tensor, the others being places in space or time, and fixed."""
    dims = trace.label(tensor).dims
    for term in dims[kept:]:
        fix(term)
    trace.mix(dims[kept:], dims[:kept])
    return dims[:kept]


@rule("convolution", "_convolution", "mkldnn_convolution", "convolution_overrideable")
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
    put_result(trace, call.result, [*dims, *fixed_terms(call.result.shape[len(dims) :])])


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
    for output in outputs_of(call):
        put_result(trace, output, [*kept, *fixed_terms(output.shape[len(kept) :])])


for _name in _SPATIAL_RANK:
    RULES[_name] = _pooling


@rule("pixel_shuffle")
def _pixel_shuffle(trace: Trace, call: Call) -> None:
    tensor, factor = call["self"], int(call["upscale_factor"])
    kept = _spatial(trace, tensor, tensor.ndim - 2)
    halves = divide(kept[-1], factor * factor)
    if halves is None:
        fix(kept[-1])
        channels = Term(kept[-1].size // factor**2, fixed=True)
    else:
        channels, places = halves
        fix(places)
    put_result(trace, call.result, [*kept[:-1], channels, *fixed_terms(call.result.shape[-2:])])


@rule("pixel_unshuffle")
def _pixel_unshuffle(trace: Trace, call: Call) -> None:
    tensor, factor = call["self"], int(call["downscale_factor"])
    kept = _spatial(trace, tensor, tensor.ndim - 2)
    channels = product([kept[-1], Term(factor * factor, fixed=True)])
    put_result(trace, call.result, [*kept[:-1], channels, *fixed_terms(call.result.shape[-2:])])


@rule("channel_shuffle")
def _channel_shuffle(trace: Trace, call: Call) -> None:
    for tensor in call.tensors:
        trace.fix(tensor)
    put_result(trace, call.result, fixed_terms(call.result.shape))


@rule("im2col")
def _im2col(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    kept = _spatial(trace, tensor, tensor.ndim - 2)
    kernel = Term(call.result.shape[-2] // kept[-1].size, fixed=True)
    put_result(trace, call.result, [*kept[:-1], product([kept[-1], kernel]), Term(call.result.shape[-1], fixed=True)])


@rule("unfold")
def _unfold(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    dim = int(call["dimension"]) % tensor.ndim
    dims = list(trace.label(tensor).dims)
    fix(dims[dim])
    trace.mix([dims[dim]], [*dims[:dim], *dims[dim + 1 :]])
    dims[dim] = Term(call.result.shape[dim], fixed=True)
    put_result(trace, call.result, [*dims, Term(call.result.shape[-1], fixed=True)])


@rule("glu")
def _glu(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    dims, dim = list(trace.label(tensor).dims), dim_of(call, tensor)
    halves = cut(dims[dim], dims[dim].size // 2)
    if halves is None:
        fix(dims[dim])
        dims[dim] = Term(dims[dim].size // 2, fixed=True)
    else:
        unify(*halves)
        dims[dim] = halves[0]
    put_result(trace, call.result, dims)


@rule("_fft_c2c", "_fft_r2c", "_fft_c2r")
def _fourier(trace: Trace, call: Call) -> None:
    tensor = call["self"]
    dims = list(trace.label(tensor).dims)
    places = dims_of(call["dim"], tensor)
    for dim in places:
        fix(dims[dim])
    trace.mix([dims[dim] for dim in places], [term for dim, term in enumerate(dims) if dim not in places])
    for dim in places:
        dims[dim] = Term(call.result.shape[dim], fixed=True)
    put_result(trace, call.result, dims)
