"""Fragments that families share: each returns the declarations of one block, `name  axis expression` a line.

`{i}` stands for the layer and is filled in by `layers`. A `?` after a name says that a checkpoint may lack it, a `~`
that it is a statistic.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Heads:
    """The axes of an attention block: what its projections give out, and which of it may move.

    Attributes:
        queries: Axis expression of what the query projection gives out.
        keys: Of what the key projection gives out.
        values: Of what the value projection gives out.
        output: Of what the output projection reads.
        by_head: Of what one projection gives out for all three where each head (each group) has its own after another.
        query_heads: Of one number a query head.
        key_heads: Of one number a key/value head.
        channels: Of the query or key channels of a head, beside its head.
        sizes: Size of each axis, by the part of its name before the dot.
        symmetric: The symmetric axes, named likewise.
    """

    queries: str
    keys: str
    values: str
    output: str
    by_head: str
    query_heads: str
    key_heads: str
    channels: str
    sizes: dict[str, int | None]
    symmetric: tuple[str, ...]

    @property
    def fused(self) -> str:
        """Of what one projection gives out for all three: all queries, then all keys, then all values."""
        return f"{self.queries} + {self.keys} + {self.values}"

    @property
    def queries_and_gates(self) -> str:
        """Of what a query projection gives out that gives a gate on the head's output after each query."""
        queries, output = self.queries.strip("()"), self.output.rstrip(")").split()[-1]
        return f"({queries} + {output})"


def heads_of(
    heads: int,
    kv_heads: int | None = None,
    *,
    head_dim: int,
    free_channels: bool = False,
    rotary_dim: int | None = None,
    shared_channels: bool = False,
    prefix: str = "",
) -> Heads:
    """The axes of multi-head, grouped-query or multi-query attention.

    Whole heads move, query heads inside their group. The value channels of a head move with the columns of the output
    projection that read them. The query and key channels of a head move together where nothing but their inner
    product is used.

    Args:
        heads: How many query heads.
        kv_heads: How many key/value heads; as many as query heads where None.
        head_dim: Query, key and value channels of a head.
        free_channels: Whether query and key channels may move: not under a rotary embedding, nor where a table of
            positions that all heads share acts on them.
        rotary_dim: How many of a head's leading query and key channels a rotary embedding acts on; the others may move.
        shared_channels: Whether those channels only move in all heads alike, since one norm's gain runs over them.
        prefix: Goes before the names of the axes, for a second attention in one layer (`cross_`).
    """
    sizes: dict[str, int | None] = {"value_dim": head_dim}
    free = f"{prefix}head_dim.{{i}}"
    if rotary_dim is None:
        moves, shared = free_channels, free if free_channels else f"{prefix}head_dim"
        sizes["head_dim"] = head_dim
    else:
        moves = rotary_dim < head_dim
        shared = f"{prefix}rotary + {free}" if moves else f"{prefix}rotary"
        sizes |= {"rotary": rotary_dim, "head_dim": head_dim - rotary_dim} if moves else {"rotary": rotary_dim}
    value, q = f"{prefix}value_dim.{{i}}", f"{prefix}q.{{i}}"
    of_head = shared
    counts: dict[str, int | None]
    if heads == 1:
        counts = {}
        queries = keys = shared
        values = output = value
        by_head = f"{queries} + {keys} + {values}"
        query_heads = key_heads = "1"
    elif kv_heads == 1:
        counts = {"q": heads}
        queries, keys = f"({q} {shared})", shared
        values, output = value, f"({q} {value})"
        by_head = f"{queries} + {keys} + {values}"
        query_heads, key_heads = q, "1"
    else:
        grouped = kv_heads is not None and kv_heads != heads
        root = f"{prefix}kv" if grouped else f"{prefix}heads"
        counts = {"kv": kv_heads, "q": heads // (kv_heads or heads)} if grouped else {"heads": heads}
        # Without free channels all heads share one axis, which stays put.
        of_head = f"{shared}[{root}]" if moves and not shared_channels else shared
        keys, values = f"({root}.{{i}} {of_head})", f"({root}.{{i}} {value}[{root}])"
        queries = f"({root}.{{i}} {q}[{root}] {of_head})" if grouped else keys
        output = f"({root}.{{i}} {q}[{root}] {value}[{root}])" if grouped else values
        own = f"({q}[{root}] {of_head})" if grouped else of_head
        by_head = f"({root}.{{i}} {own} + {of_head} + {value}[{root}])"
        key_heads = f"{root}.{{i}}"
        query_heads = f"({key_heads} {q}[{root}])" if grouped else key_heads
    symmetric = (*counts, *(["head_dim"] if moves else []), "value_dim")
    return Heads(
        queries,
        keys,
        values,
        output,
        by_head,
        query_heads,
        key_heads,
        of_head,
        {f"{prefix}{axis}": size for axis, size in {**counts, **sizes}.items()},
        tuple(f"{prefix}{axis}" for axis in symmetric),
    )


def layers(prefix: str, count: int, *blocks: Sequence[str]) -> list[str]:
    """Repeats blocks for layers 0 … count − 1; names get `prefix.{i}.` in front."""
    return [line for i in range(count) for line in layer(prefix, i, *blocks)]


def layer(prefix: str, index: int, *blocks: Sequence[str]) -> list[str]:
    """The blocks of one layer, where layers differ."""
    return [f"{prefix}.{index}.{line}".replace("{i}", str(index)) for block in blocks for line in block]


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
    names: Sequence[str],
    heads: Heads,
    *,
    residual: str = "residual",
    context: str | None = None,
    bias: bool | None = None,
    output_bias: bool | None = None,
) -> list[str]:
    """Attention with separate projections, see `heads_of`.

    Args:
        names: Names of the projections of queries, keys and values, and of the output.
        heads: Their axes.
        residual: What queries are made from and the output is added to.
        context: What keys and values are made from; `residual` where None.
        bias: Whether queries, keys and values have a bias; None means that a checkpoint may or may not have one.
        output_bias: Whether the output has one.
    """
    query, key, value, output = names
    return [
        *linear(query, heads.queries, residual, bias=bias),
        *linear(key, heads.keys, context or residual, bias=bias),
        *linear(value, heads.values, context or residual, bias=bias),
        *linear(output, residual, heads.output, bias=output_bias),
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


def norm(name: str, axis: str = "residual") -> list[str]:
    """A norm whose shift a config may leave out."""
    return [f"{name}.weight  {axis}", f"{name}.bias?  {axis}"]


def optional_norm(name: str, axis: str = "residual") -> list[str]:
    """A norm that a checkpoint may lack: that of a task head, or of an option."""
    return [f"{name}.weight?  {axis}", f"{name}.bias?  {axis}"]


def one_for_all_layers(heads: Heads) -> Heads:
    """Heads whose order all layers share, as where one table of relative positions gives each head its bias."""

    def shared(expression: str) -> str:
        return re.sub(r"\[(\w*heads)\]", r"[\1.all]", re.sub(r"\b(\w*heads)\.\{i\}", r"\1.all", expression))

    return replace(
        heads,
        queries=shared(heads.queries),
        keys=shared(heads.keys),
        values=shared(heads.values),
        output=shared(heads.output),
    )


def normalized_convolution(name: str, out: str, into: str, kernel: int) -> list[str]:
    """A convolution without bias, and its BatchNorm."""
    return [
        *convolution(f"{name}.convolution", out, into, kernel, bias=False),
        *batch_norm(f"{name}.normalization", out),
    ]


def layers_of_stage(prefix: str, stage: int, count: int, *blocks: Sequence[str]) -> list[str]:
    """Repeats blocks for the layers of a stage; `{i}` becomes the stage and the layer."""
    return layers(prefix, count, [line.replace("{i}", f"{stage}.{{i}}") for block in blocks for line in block])


def sizes_in_stage(stage: int, count: int, sizes: Mapping[str, int | None]) -> dict[str, int | None]:
    """The sizes of axes that every layer of a stage has, by their full names."""
    return {f"{axis}.{stage}.{layer}": size for layer in range(count) for axis, size in sizes.items()}


def windowed_attention(
    name: str, output: str, heads: Heads, global_head_dim: str, *, residual: str = "residual"
) -> list[str]:
    """Longformer's attention: tokens that all attend to have queries, keys and values of their own.

    Both kinds of values pass through one output projection, so they share channels; queries meet keys of their kind.

    Args:
        name: Goes before `query`, `key`, `value` and their global kin.
        output: Name of the output projection.
        heads: Their axes, with free channels.
        global_head_dim: Name of the axis of global queries and keys inside a head, in place of that in `heads`.
        residual: The residual stream.
    """
    globally = re.sub(r"\w*head_dim", global_head_dim, heads.queries)
    projections = (f"{name}.query", f"{name}.key", f"{name}.value")
    return [
        *attention((*projections, output), heads, residual=residual, bias=True, output_bias=True),
        *linear(f"{name}.query_global", globally, residual, bias=True),
        *linear(f"{name}.key_global", globally, residual, bias=True),
        *linear(f"{name}.value_global", heads.values, residual, bias=True),
    ]
