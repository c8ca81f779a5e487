"""Fragments that families share: each returns the declarations of one block, `name  axis expression` a line.

`{i}` stands for the layer and is filled in by `layers`. A `?` after a name says that a checkpoint may lack it, a `~`
that it is a statistic.
"""

from __future__ import annotations

from collections.abc import Sequence

MULTI_HEAD = "(heads.{i} head_dim)"
GROUPED_QUERIES = "(kv.{i} q.{i}[kv] head_dim)"
GROUPED_KEYS = "(kv.{i} head_dim)"


def layers(prefix: str, count: int, *blocks: Sequence[str]) -> list[str]:
    """Repeats blocks for layers 0 … count − 1; names get `prefix.{i}.` in front."""
    return [f"{prefix}.{i}.{line}".replace("{i}", str(i)) for i in range(count) for block in blocks for line in block]


def within(prefix: str, *blocks: Sequence[str]) -> list[str]:
    """Puts `prefix.` in front of the names of blocks."""
    return [f"{prefix}.{line}" for block in blocks for line in block]


def linear(name: str, out: str, into: str, *, bias: bool | None = None, optional: bool = False) -> list[str]:
    """A linear map, weight `[out, into]`; `bias` None means that a checkpoint may or may not have one."""
    mark = "?" if optional else ""
    lines = [f"{name}.weight{mark}  {out}  {into}"]
    if bias is not False:
        lines.append(f"{name}.bias{'?' if optional or bias is None else ''}  {out}")
    return lines


def conv1d(name: str, out: str, into: str) -> list[str]:
    """GPT-2's transposed linear map, weight `[into, out]`."""
    return [f"{name}.weight  {into}  {out}", f"{name}.bias  {out}"]


def convolution(name: str, out: str, into: str, kernel: int, *, bias: bool | None = None) -> list[str]:
    """A 2-D convolution, weight `[out, into, kernel, kernel]`."""
    lines = [f"{name}.weight  {out}  {into}  {kernel}  {kernel}"]
    if bias is not False:
        lines.append(f"{name}.bias{'?' if bias is None else ''}  {out}")
    return lines


def embedding(name: str, rows: str = "vocab", axis: str = "residual") -> list[str]:
    """A table with one row of `axis` per entry of `rows`."""
    return [f"{name}.weight  {rows}  {axis}"]


def rms_norm(name: str, axis: str = "residual") -> list[str]:
    """A norm with a gain only."""
    return [f"{name}.weight  {axis}"]


def layer_norm(name: str, axis: str = "residual") -> list[str]:
    """A norm with gain and shift."""
    return [f"{name}.weight  {axis}", f"{name}.bias  {axis}"]


def batch_norm(name: str, axis: str) -> list[str]:
    """BatchNorm with its running statistics."""
    parts = ("weight", "bias", "running_mean~", "running_var~")
    return [*(f"{name}.{part}  {axis}" for part in parts), f"{name}.num_batches_tracked?~"]


def attention(
    query: str,
    key: str,
    value: str,
    output: str,
    *,
    queries: str = MULTI_HEAD,
    keys: str = MULTI_HEAD,
    bias: bool | None = None,
    output_bias: bool | None = None,
) -> list[str]:
    """Attention with separate projections; whole heads move, query heads inside their group."""
    return [
        *linear(query, queries, "residual", bias=bias),
        *linear(key, keys, "residual", bias=bias),
        *linear(value, keys, "residual", bias=bias),
        *linear(output, "residual", queries, bias=output_bias),
    ]


def mlp(up: str, down: str, *, bias: bool | None = None) -> list[str]:
    """Two linear maps with a pointwise nonlinearity between them."""
    return [
        *linear(up, "neurons.{i}", "residual", bias=bias),
        *linear(down, "residual", "neurons.{i}", bias=bias),
    ]


def gated_mlp(gate: str, up: str, down: str, *, bias: bool | None = None, neurons: str = "neurons.{i}") -> list[str]:
    """A gated MLP: gate and up projections share their neurons."""
    return [
        *linear(gate, neurons, "residual", bias=bias),
        *linear(up, neurons, "residual", bias=bias),
        *linear(down, "residual", neurons, bias=bias),
    ]


def mixture_of_experts(router: str, experts: str, gate: str, up: str, down: str) -> list[str]:
    """Routed gated MLPs, one set of tensors an expert: experts move, and neurons inside their expert."""
    expert = f"{experts}.<experts.{{i}}>"
    return [
        *linear(router, "experts.{i}", "residual", bias=False),
        *gated_mlp(
            f"{expert}.{gate}",
            f"{expert}.{up}",
            f"{expert}.{down}",
            bias=False,
            neurons="neurons.{i}[experts]",
        ),
    ]


def head(name: str, into: str = "residual", out: str = "labels") -> list[str]:
    """A task head that a checkpoint may lack."""
    return linear(name, out, into, optional=True)


def head_sizes(heads: int, kv_heads: int | None, head_dim: int) -> tuple[dict[str, int | None], str, str]:
    """Sizes and the expressions of queries and keys, for multi-head or grouped-query attention."""
    if kv_heads is None or kv_heads == heads:
        return {"heads": heads, "head_dim": head_dim}, MULTI_HEAD, MULTI_HEAD
    return {"kv": kv_heads, "q": heads // kv_heads, "head_dim": head_dim}, GROUPED_QUERIES, GROUPED_KEYS
