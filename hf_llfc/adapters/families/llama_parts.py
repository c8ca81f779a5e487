"""What the layouts of Llama-like models are made of: kinds of attention, of MLPs and of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.blocks import (
    Heads,
    attention,
    embedding,
    gated_mlp,
    heads_of,
    linear,
    mixture_of_experts,
    mlp,
    norm,
)
from hf_llfc.adapters.compose import Part

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
BOTH_NORMS = (*PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
GLM4_NORMS = (*PRE_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm")
GATED = tuple(gated_mlp("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
GATED_FUSED = (
    *linear("mlp.gate_up_proj", "neurons.{i} + neurons.{i}", "residual"),
    *linear("mlp.down_proj", "residual", "neurons.{i}"),
)
PLAIN = tuple(mlp("mlp.up_proj", "mlp.down_proj"))
ROUTED = tuple(mixture_of_experts("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"))


def shared_experts(name: str) -> tuple[str, ...]:
    """A gated MLP that every token passes beside its routed experts."""
    parts = (f"{name}.{part}_proj" for part in ("gate", "up", "down"))
    return tuple(gated_mlp(*parts, neurons="shared.{i}"))


def fused_experts(block: str, router: str, up: str, down: str) -> tuple[str, ...]:
    """Routed gated MLPs whose experts are one dimension of a tensor, `[expert, out, into]`."""
    return (
        f"{block}.{router}.weight  experts.{{i}}  residual",
        f"{block}.{up}  experts.{{i}}  neurons.{{i}}[experts] + neurons.{{i}}[experts]  residual",
        f"{block}.{down}  experts.{{i}}  residual  neurons.{{i}}[experts]",
    )


def latent_attention(config: PreTrainedConfig, index: int) -> Part:
    """Multi-head latent attention: keys and values go through a latent vector, and mostly queries, too.

    In a head, the channels without rotary embedding come first; the keys of those with one are the same in all heads.
    """
    query = "(heads.{i} nope.{i}[heads] + rotary)"
    key_and_value = "(heads.{i} nope.{i}[heads] + value_dim.{i}[heads])"
    sizes: dict[str, int | None] = {
        "heads": config.num_attention_heads,
        "nope": config.qk_nope_head_dim,
        "rotary": config.qk_rope_head_dim,
        "value_dim": config.v_head_dim,
        "latent": config.kv_lora_rank,
    }
    if config.q_lora_rank:
        sizes["query_latent"] = config.q_lora_rank
        queries = [
            *linear("q_a_proj", "query_latent.{i}", "residual"),
            *norm("q_a_layernorm", "query_latent.{i}"),
            *linear("q_b_proj", query, "query_latent.{i}"),
        ]
    else:
        queries = linear("q_proj", query, "residual")
    lines = [
        *queries,
        *linear("kv_a_proj_with_mqa", "latent.{i} + rotary", "residual"),
        *norm("kv_a_layernorm", "latent.{i}"),
        *linear("kv_b_proj", key_and_value, "latent.{i}"),
        *linear("o_proj", "residual", "(heads.{i} value_dim.{i}[heads])"),
        "rotary_emb.inv_freq?  frequencies",
    ]
    return Part(tuple(lines), sizes, tuple(axis for axis in sizes if axis != "rotary"))


def indexed_attention(config: PreTrainedConfig, index: int) -> Part:
    """The same over the tokens that an indexer picks, by scores of heads of its own against one key."""
    block = latent_attention(config, index)
    if dict(enumerate(config.to_dict().get("indexer_types") or ())).get(index) == "shared":
        return block
    channels = "rotary + index_dim.{i}"
    lines = [
        *linear("indexer.wq_b", f"(index_heads.{{i}} {channels})", "query_latent.{i}"),
        *linear("indexer.wk", channels, "residual"),
        *norm("indexer.k_norm", channels),
        *linear("indexer.weights_proj", "index_heads.{i}", "residual"),
    ]
    sizes: dict[str, int | None] = {
        "index_heads": config.index_n_heads,
        "index_dim": config.index_head_dim - config.qk_rope_head_dim,
    }
    return Part((*block.lines, *lines), {**block.sizes, **sizes}, (*block.symmetric, *sizes))


def differential_attention(config: PreTrainedConfig, index: int) -> Part:
    """DiffLlama's: heads of the first half are paired with those of the second, each with half of the values."""
    values = config.to_dict()
    pairs = config.num_key_value_heads // 2
    lines = [
        *linear("q_proj", "(2 pairs.{i} q.{i}[pairs] head_dim)", "residual"),
        *linear("k_proj", "(2 pairs.{i} head_dim)", "residual"),
        *linear("v_proj", "(pairs.{i} first_dim.{i}[pairs]) + (pairs.{i} second_dim.{i}[pairs])", "residual"),
        *linear("o_proj", "residual", "(pairs.{i} q.{i}[pairs] first_dim.{i}[pairs] + second_dim.{i}[pairs])"),
        *(f"lambda_{name}  head_dim" for name in ("q1", "k1", "q2", "k2")),
    ]
    head_dim = values.get("head_dim") or config.hidden_size // config.num_attention_heads
    sizes: dict[str, int | None] = {
        "pairs": pairs,
        "q": config.num_attention_heads // config.num_key_value_heads,
        "first_dim": head_dim,
        "second_dim": head_dim,
        "head_dim": head_dim,
    }
    return Part(tuple(lines), sizes, tuple(axis for axis in sizes if axis != "head_dim"))


def expert_attention(config: PreTrainedConfig, index: int) -> Part:
    """JetMoE's: query and output projections are experts, whose heads all meet the same keys and values."""
    lines = [
        "experts.router.layer.weight  attention_experts.{i}  residual",
        "experts.input_linear.weight  attention_experts.{i}  (heads.{i} head_dim)  residual",
        "experts.output_linear.weight  attention_experts.{i}  residual  (heads.{i} value_dim.{i}[heads])",
        "experts.bias  residual",
        *linear("kv_proj", "(heads.{i} head_dim) + (heads.{i} value_dim.{i}[heads])", "residual"),
    ]
    sizes: dict[str, int | None] = {
        "attention_experts": config.num_local_experts,
        "heads": config.num_key_value_heads,
        "head_dim": config.kv_channels,
        "value_dim": config.kv_channels,
    }
    return Part(tuple(lines), sizes, ("attention_experts", "heads", "value_dim"))


def mimo_attention(config: PreTrainedConfig, index: int) -> Part:
    """MiMo-V2's: layers with a window have twice the key/value heads, and a score that no token has."""
    window = config.layer_types[index] == "sliding_attention"
    prefix = "window_" if window else ""
    heads = heads_of(
        config.num_attention_heads,
        config.num_key_value_heads * (2 if window else 1),
        head_dim=config.head_dim,
        rotary_dim=rotary_channels(config.to_dict(), config.head_dim, index, default=0.334),
        prefix=prefix,
    )
    sizes = {**heads.sizes, f"{prefix}value_dim": config.v_head_dim}
    sink = [f"attention_sink_bias  {heads.query_heads}"] if window else []
    return Part((*attention(PROJECTIONS, heads), *sink), sizes, heads.symmetric)


@dataclass(frozen=True)
class Experts:
    """The routed layers of a mixture of experts.

    Attributes:
        lines: Their declarations, over `experts.{i}`, `neurons.{i}[experts]` and `shared.{i}`.
        count: The config's name for the number of experts.
        neurons: Its names for the width of an expert; the product where there are several.
        shared: Its names for the width of the shared experts, likewise.
        layers: Whether a layer is routed, given the config's values and the layer.
    """

    lines: tuple[str, ...]
    count: str = "num_experts"
    neurons: tuple[str, ...] = ("moe_intermediate_size",)
    shared: tuple[str, ...] = ()
    layers: Callable[[dict[str, Any], int], bool] = lambda values, index: True


def after_dense(values: dict[str, Any], index: int) -> bool:
    """Whether a layer is routed where some dense ones come first, as DeepSeek does it."""
    return bool(index >= values["first_k_dense_replace"])


def every_so_often(values: dict[str, Any], index: int) -> bool:
    """Whether a layer is routed as Qwen's mixtures do it."""
    return index not in values["mlp_only_layers"] and (index + 1) % values["decoder_sparse_step"] == 0


def as_listed(values: dict[str, Any], index: int) -> bool:
    """Whether a layer is routed where the config lists the kind of each."""
    return bool(values["mlp_layer_types"][index] == "sparse")


@dataclass(frozen=True)
class Layout:
    """What a family of the Llama line does differently from Llama.

    Attributes:
        norms: The norms of a layer; `?` after a name that a checkpoint may lack.
        last_norm: The norm after all layers.
        block: The attention block.
        projections: Its query, key, value and output projections.
        fused: One projection for queries, keys and values, instead of three.
        by_head: Whether that one gives them head by head.
        attention: The attention block of a layer, where it is of another kind.
        qk_norms: Norms on queries and on keys.
        qk_flag: The config's name for whether there are such norms, where it says so.
        qk_gain: What the gain of those runs over: the `channels` that heads share, all of a `projection`, or each of
            the `heads` on its own, in one tensor or with a tensor for each (`names`).
        without_rotary: Whether a layer has no rotary embedding, given the config's values and the layer.
        partial_rotary: Whether the model reads `partial_rotary_factor`. The others rotate every channel of a head,
            whatever their config says.
        mlp: Declarations of the MLP.
        experts: The routed layers.
        more: Further declarations of a layer, given its heads.
        neurons: The config's name for the width of the MLP.
        predicts_further: Whether checkpoints may hold layers that predict further tokens, which transformers skips.
    """

    norms: tuple[str, ...] = PRE_NORMS
    last_norm: str = "norm"
    block: str = "self_attn"
    projections: tuple[str, str, str, str] = PROJECTIONS
    fused: str = ""
    by_head: bool = False
    attention: Callable[[PreTrainedConfig, int], Part] | None = None
    qk_norms: tuple[str, ...] = ()
    qk_flag: str = ""
    qk_gain: str = "channels"
    without_rotary: Callable[[dict[str, Any], int], bool] | None = None
    partial_rotary: bool = False
    mlp: tuple[str, ...] = GATED
    experts: Experts | None = None
    more: Callable[[Heads], Sequence[str]] = lambda heads: ()
    neurons: str = "intermediate_size"
    predicts_further: bool = False


def sinks(name: str) -> Callable[[Heads], list[str]]:
    """A score per query head that no token has."""
    return lambda heads: [f"self_attn.{name}?  {heads.query_heads}"]


def full_attention_layers(values: dict[str, Any], index: int) -> bool:
    """Whether a layer has no rotary embedding where only those with a window have one."""
    return bool(values["sliding_window"] and values["layer_types"][index] != "sliding_attention")


QK_NORMS = ("q_norm", "k_norm")

# What a layer that predicts a further token has beside a layer's own tensors: it reads the embedding of the next token
# and the residual stream, each normed.
FURTHER = (
    *norm("enorm"),
    *norm("hnorm"),
    *linear("eh_proj", "residual", "residual + residual"),
    *embedding("embed_tokens"),
    *norm("shared_head.norm"),
    *linear("shared_head.head", "vocab", "residual"),
)

CORRECTION = ("mlp.gate.e_score_correction_bias  experts.{i}",)
SHARED_EXPERTS = shared_experts("mlp.shared_experts")
FUSED_ROUTED = fused_experts("mlp", "gate", "experts.gate_up_proj", "experts.down_proj")

# How DeepSeek routes, and Dots1, GLM-4 and Solar after it.
DEEPSEEK_EXPERTS = Experts(
    (*ROUTED, "mlp.gate.e_score_correction_bias?  experts.{i}", *SHARED_EXPERTS),
    count="n_routed_experts",
    shared=("n_shared_experts", "moe_intermediate_size"),
    layers=after_dense,
)
MIXTRAL_EXPERTS = Experts(
    tuple(mixture_of_experts("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2")),
    count="num_local_experts",
    neurons=("intermediate_size",),
)


def rotary_channels(values: dict[str, Any], head_dim: int, index: int = 0, *, default: float = 1.0) -> int:
    """Counts the leading channels of a head that a rotary embedding acts on, in a model that reads the factor.

    Args:
        values: The config's values.
        head_dim: Query and key channels of a head.
        index: The layer.
        default: The factor of a config that has none.

    Returns:
        Whole pairs: an odd number of channels is rounded up, as the table of frequencies is.
    """
    rope = values.get("rope_parameters") or {}
    if "rope_type" not in rope and values.get("layer_types"):
        rope = rope.get(values["layer_types"][index]) or {}
    rotated = int(head_dim * (rope.get("partial_rotary_factor") or default))
    return min(head_dim, rotated + rotated % 2)
