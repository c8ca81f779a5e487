"""The Llama line: an embedding, layers of attention and MLP or routed experts, a norm, an output head.

What differs from Llama is a row of `LAYOUTS`: names, norms, fused projections, biases, experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.blocks import (
    Heads,
    attention,
    embedding,
    gated_mlp,
    head,
    heads_of,
    layer,
    linear,
    mixture_of_experts,
    mlp,
    norm,
    within,
)
from hf_llfc.adapters.compose import Part, occurring
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hf_llfc.symmetry.spec import PermutationSpec

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


def fused_experts_transposed(block: str, up: str, down: str) -> tuple[str, ...]:
    """The same with tensors `[expert, into, out]`."""
    return (
        f"{block}.router.weight  experts.{{i}}  residual",
        f"{block}.{up}  experts.{{i}}  residual  neurons.{{i}}[experts] + neurons.{{i}}[experts]",
        f"{block}.{down}  experts.{{i}}  neurons.{{i}}[experts]  residual",
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
    head_dim = config.head_dim
    heads = heads_of(
        config.num_attention_heads,
        config.num_key_value_heads * (2 if window else 1),
        head_dim=head_dim,
        value_dim=config.v_head_dim,
        rotary_dim=rotary_channels(config.to_dict(), head_dim, index, default=0.334),
        prefix="window_" if window else "",
    )
    sink = [f"attention_sink_bias  {heads.query_heads}"] if window else []
    return Part((*attention(*PROJECTIONS, heads), *sink), heads.sizes, heads.symmetric)


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


def ernie_interval(values: dict[str, Any], index: int) -> bool:
    """Whether a layer is routed as ERNIE 4.5 does it."""
    first, last = values["moe_layer_start_index"], values["moe_layer_end_index"]
    return bool(first <= index <= last and (index + 1) % values["moe_layer_interval"] == 0)


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
GRANITE_EXPERTS = Experts(
    fused_experts("block_sparse_moe", "router.layer", "input_linear.weight", "output_linear.weight"),
    count="num_local_experts",
    neurons=("intermediate_size",),
)
GRANITE_SHARED = (
    *linear("shared_mlp.input_linear", "shared.{i} + shared.{i}", "residual", bias=False),
    *linear("shared_mlp.output_linear", "residual", "shared.{i}", bias=False),
)

LAYOUTS: dict[str, Layout] = {
    "afmoe": Layout(
        norms=(*PRE_NORMS, "pre_mlp_layernorm", "post_mlp_layernorm"),
        qk_norms=QK_NORMS,
        without_rotary=lambda values, index: values["layer_types"][index] != "sliding_attention",
        more=lambda heads: linear("self_attn.gate_proj", heads.output, "residual"),
        experts=Experts(
            (
                *mixture_of_experts("mlp.router.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
                "mlp.expert_bias  experts.{i}",
                *SHARED_EXPERTS,
            ),
            shared=("num_shared_experts", "moe_intermediate_size"),
            layers=lambda values, index: bool(index >= values["num_dense_layers"]),
        ),
    ),
    "apertus": Layout(
        norms=("attention_layernorm", "feedforward_layernorm"),
        qk_norms=QK_NORMS,
        mlp=PLAIN,
        more=lambda heads: [
            *(f"mlp.act_fn.{name}?  1" for name in ("alpha_p", "alpha_n")),
            "mlp.act_fn.beta?~",
            "mlp.act_fn.eps?~",
        ],
    ),
    "arcee": Layout(mlp=PLAIN),
    "aria_text": Layout(
        experts=Experts(
            (
                *fused_experts_transposed("mlp", "experts.fc1.weight", "experts.fc2.weight"),
                *SHARED_EXPERTS,
            ),
            count="moe_num_experts",
            neurons=("intermediate_size",),
            shared=("moe_num_shared_experts", "intermediate_size"),
        )
    ),
    "axk1": Layout(
        norms=(*PRE_NORMS, "post_mlp_layernorm?"),
        attention=latent_attention,
        experts=replace(DEEPSEEK_EXPERTS, layers=as_listed),
    ),
    "bitnet": Layout(
        more=lambda heads: norm("self_attn.attn_sub_norm", heads.output),
        mlp=(*GATED, *norm("mlp.ffn_sub_norm", "neurons.{i}")),
    ),
    "cohere": Layout(norms=("input_layernorm",), qk_norms=QK_NORMS, qk_flag="use_qk_norm", qk_gain="heads"),
    "cohere2": Layout(norms=("input_layernorm",), without_rotary=full_attention_layers),
    "cohere2_moe": Layout(
        norms=("input_layernorm",),
        without_rotary=lambda values, index: (
            full_attention_layers(values, index)
            and not (values["mlp_layer_types"][index] == "dense" and values["prefix_dense_sliding_window_pattern"] == 1)
        ),
        neurons="prefix_dense_intermediate_size",
        experts=Experts(
            (*ROUTED, *SHARED_EXPERTS),
            neurons=("intermediate_size",),
            shared=("num_shared_experts", "intermediate_size"),
            layers=as_listed,
        ),
    ),
    "deepseek_v2": Layout(attention=latent_attention, experts=DEEPSEEK_EXPERTS),
    "deepseek_v3": Layout(predicts_further=True, attention=latent_attention, experts=DEEPSEEK_EXPERTS),
    "deepseek_v32": Layout(
        predicts_further=True, attention=indexed_attention, experts=replace(DEEPSEEK_EXPERTS, layers=as_listed)
    ),
    "diffllama": Layout(attention=differential_attention),
    "dots1": Layout(qk_norms=QK_NORMS, experts=DEEPSEEK_EXPERTS),
    "ernie4_5_moe": Layout(
        experts=Experts(
            (
                *ROUTED,
                "mlp.moe_statics.e_score_correction_bias  1  experts.{i}",
                *SHARED_EXPERTS,
            ),
            count="moe_num_experts",
            shared=("moe_num_shared_experts", "moe_intermediate_size"),
            layers=ernie_interval,
        )
    ),
    "exaone4": Layout(norms=POST_NORMS, qk_norms=QK_NORMS, without_rotary=full_attention_layers),
    "exaone_moe": Layout(
        qk_norms=QK_NORMS,
        without_rotary=full_attention_layers,
        experts=Experts(
            (*ROUTED, "mlp.e_score_correction_bias  experts.{i}", *SHARED_EXPERTS),
            shared=("num_shared_experts", "moe_intermediate_size"),
            layers=as_listed,
        ),
    ),
    "flex_olmo": Layout(
        norms=POST_NORMS,
        qk_norms=QK_NORMS,
        qk_gain="projection",
        experts=Experts(ROUTED, neurons=("intermediate_size",)),
    ),
    "gemma2": Layout(norms=BOTH_NORMS),
    "gemma3_text": Layout(norms=BOTH_NORMS, qk_norms=QK_NORMS),
    "glm": Layout(partial_rotary=True, mlp=GATED_FUSED),
    "glm4": Layout(partial_rotary=True, norms=GLM4_NORMS, mlp=GATED_FUSED),
    "glm4_moe": Layout(
        predicts_further=True, partial_rotary=True, qk_norms=QK_NORMS, qk_flag="use_qk_norm", experts=DEEPSEEK_EXPERTS
    ),
    "glm4_moe_lite": Layout(
        predicts_further=True, attention=latent_attention, experts=replace(DEEPSEEK_EXPERTS, layers=as_listed)
    ),
    "glm4v_moe_text": Layout(
        partial_rotary=True, experts=replace(DEEPSEEK_EXPERTS, lines=(*FUSED_ROUTED, *CORRECTION, *SHARED_EXPERTS))
    ),
    "glm4v_text": Layout(partial_rotary=True, norms=GLM4_NORMS, mlp=GATED_FUSED),
    "glm_image_text": Layout(partial_rotary=True, norms=GLM4_NORMS, mlp=GATED_FUSED),
    "glm_moe_dsa": Layout(
        predicts_further=True, attention=indexed_attention, experts=replace(DEEPSEEK_EXPERTS, layers=as_listed)
    ),
    "glm_ocr_text": Layout(partial_rotary=True, norms=GLM4_NORMS, mlp=GATED_FUSED),
    "gpt_oss": Layout(
        more=sinks("sinks"),
        experts=Experts(
            (
                "mlp.router.weight  experts.{i}  residual",
                "mlp.router.bias  experts.{i}",
                "mlp.experts.gate_up_proj  experts.{i}  residual  (neurons.{i}[experts] 2)",
                "mlp.experts.gate_up_proj_bias  experts.{i}  (neurons.{i}[experts] 2)",
                "mlp.experts.down_proj  experts.{i}  neurons.{i}[experts]  residual",
                "mlp.experts.down_proj_bias  experts.{i}  residual",
            ),
            count="num_local_experts",
            neurons=("intermediate_size",),
        ),
    ),
    "granite_swa": Layout(more=sinks("sinks")),
    "granitemoe": Layout(experts=GRANITE_EXPERTS),
    "granitemoe_swa": Layout(
        more=sinks("sinks"),
        experts=replace(
            GRANITE_EXPERTS,
            lines=(
                *fused_experts("block_sparse_moe", "router", "experts.gate_up_proj", "experts.down_proj"),
                *GRANITE_SHARED,
            ),
            shared=("shared_intermediate_size",),
        ),
    ),
    "granitemoeshared": Layout(
        experts=replace(
            GRANITE_EXPERTS,
            lines=(*GRANITE_EXPERTS.lines, *GRANITE_SHARED),
            shared=("shared_intermediate_size",),
        )
    ),
    "hunyuan_v1_dense": Layout(qk_norms=("query_layernorm", "key_layernorm")),
    "hunyuan_v1_moe": Layout(
        qk_norms=("query_layernorm", "key_layernorm"),
        experts=Experts(
            (
                *mixture_of_experts("mlp.gate.wg", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
                *shared_experts("mlp.shared_mlp"),
            ),
            neurons=("intermediate_size",),
            shared=("intermediate_size",),
        ),
    ),
    "hy_v3": Layout(
        qk_norms=QK_NORMS,
        experts=Experts(
            (
                *mixture_of_experts("mlp.router.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
                "mlp.expert_bias  experts.{i}",
                *shared_experts("mlp.shared_mlp"),
            ),
            shared=("num_shared_experts", "moe_intermediate_size"),
            layers=as_listed,
        ),
    ),
    "hyperclovax": Layout(norms=(*PRE_NORMS, "post_norm1?", "post_norm2?")),
    "jais2": Layout(mlp=PLAIN),
    "jetmoe": Layout(
        block="self_attention",
        attention=expert_attention,
        experts=Experts(
            (
                *fused_experts("mlp", "router.layer", "input_linear.weight", "output_linear.weight"),
                "mlp.bias  residual",
            ),
            count="num_local_experts",
            neurons=("intermediate_size",),
        ),
    ),
    "llama4_text": Layout(
        without_rotary=lambda values, index: not values["no_rope_layers"][index],
        mlp=tuple(gated_mlp("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj")),
        neurons="intermediate_size_mlp",
        experts=Experts(
            (
                *fused_experts_transposed("feed_forward", "experts.gate_up_proj", "experts.down_proj"),
                *shared_experts("feed_forward.shared_expert"),
            ),
            count="num_local_experts",
            neurons=("intermediate_size",),
            shared=("intermediate_size",),
            layers=lambda values, index: index in values["moe_layers"],
        ),
    ),
    "mellum": Layout(qk_norms=QK_NORMS, experts=Experts(ROUTED, layers=as_listed)),
    "mimo_v2_flash": Layout(
        attention=mimo_attention,
        experts=Experts(
            (*ROUTED, "mlp.gate.e_score_correction_bias  experts.{i}"), count="n_routed_experts", layers=as_listed
        ),
    ),
    "minicpm3": Layout(attention=latent_attention),
    "minimax_m2": Layout(
        partial_rotary=True,
        qk_norms=QK_NORMS,
        qk_gain="projection",
        experts=replace(
            MIXTRAL_EXPERTS,
            lines=(*MIXTRAL_EXPERTS.lines, "block_sparse_moe.e_score_correction_bias  experts.{i}"),
        ),
    ),
    "mixtral": Layout(experts=MIXTRAL_EXPERTS),
    "nanochat": Layout(norms=(), last_norm="", mlp=tuple(mlp("mlp.fc1", "mlp.fc2"))),
    "nemotron": Layout(partial_rotary=True, mlp=PLAIN),
    "olmo": Layout(norms=(), last_norm=""),
    "olmo2": Layout(norms=POST_NORMS, qk_norms=QK_NORMS, qk_gain="projection"),
    "olmo3": Layout(norms=POST_NORMS, qk_norms=QK_NORMS, qk_gain="projection"),
    "olmoe": Layout(qk_norms=QK_NORMS, qk_gain="projection", experts=Experts(ROUTED, neurons=("intermediate_size",))),
    "persimmon": Layout(
        partial_rotary=True,
        last_norm="final_layernorm",
        fused="query_key_value",
        by_head=True,
        projections=("", "", "", "dense"),
        qk_norms=("q_layernorm", "k_layernorm"),
        qk_flag="qk_layernorm",
        mlp=tuple(mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
    ),
    "phi": Layout(
        partial_rotary=True,
        norms=("input_layernorm",),
        last_norm="final_layernorm",
        projections=("q_proj", "k_proj", "v_proj", "dense"),
        qk_norms=("q_layernorm", "k_layernorm"),
        qk_flag="qk_layernorm",
        mlp=tuple(mlp("mlp.fc1", "mlp.fc2")),
    ),
    "phi3": Layout(partial_rotary=True, fused="qkv_proj", mlp=GATED_FUSED),
    "phimoe": Layout(experts=MIXTRAL_EXPERTS),
    "qwen2_moe": Layout(
        experts=Experts(
            (*ROUTED, *shared_experts("mlp.shared_expert"), "mlp.shared_expert_gate.weight  1  residual"),
            shared=("shared_expert_intermediate_size",),
            layers=every_so_often,
        )
    ),
    "qwen3": Layout(qk_norms=QK_NORMS),
    "qwen3_moe": Layout(qk_norms=QK_NORMS, experts=Experts(ROUTED, layers=every_so_often)),
    "qwen3_omni_moe_text": Layout(qk_norms=QK_NORMS, experts=Experts(ROUTED, layers=every_so_often)),
    "qwen3_vl_moe_text": Layout(qk_norms=QK_NORMS, experts=Experts(FUSED_ROUTED, layers=every_so_often)),
    "qwen3_vl_text": Layout(qk_norms=QK_NORMS),
    "smollm3": Layout(without_rotary=lambda values, index: not values["no_rope_layers"][index]),
    "solar_open": Layout(experts=replace(DEEPSEEK_EXPERTS, layers=lambda values, index: True)),
    "stablelm": Layout(
        partial_rotary=True,
        norms=("input_layernorm", "post_attention_layernorm?"),
        qk_norms=("q_layernorm", "k_layernorm"),
        qk_flag="qk_layernorm",
        qk_gain="names",
    ),
    "starcoder2": Layout(mlp=tuple(mlp("mlp.c_fc", "mlp.c_proj"))),
    "unlimited_ocr_text": Layout(experts=replace(DEEPSEEK_EXPERTS, layers=as_listed)),
    "vaultgemma": Layout(norms=("input_layernorm", "pre_feedforward_layernorm")),
    "youtu": Layout(attention=latent_attention),
}


def llama(config: PreTrainedConfig) -> PermutationSpec:
    """Llama and the families that differ from it by a row of `LAYOUTS`, with any of their heads."""
    layout, values = LAYOUTS.get(config.model_type, Layout()), config.to_dict()
    sizes: dict[str, int | None] = {
        "vocab": config.vocab_size,
        "residual": config.hidden_size,
        "labels": None,
        "frequencies": None,
    }
    stack: list[str] = []
    symmetric = ["residual", "neurons", "shared"]
    count = config.num_hidden_layers
    further = (values.get("num_nextn_predict_layers") or 0) if layout.predicts_further else 0
    for index in range(count + further):
        block, heads = _attention(config, layout, values, index)
        is_routed = layout.experts is not None and (index >= count or layout.experts.layers(values, index))
        routed = layout.experts if is_routed else None
        widths = _widths(config, layout, index, routed)
        feed_forward = routed.lines if routed else layout.mlp
        if not widths.get("shared"):
            feed_forward = tuple(line for line in feed_forward if "shared.{i}" not in line)
        sizes |= {**block.sizes, **widths}
        symmetric += [axis for axis in block.symmetric if axis not in symmetric]
        lines = layer(
            "layers",
            index,
            [line for name in layout.norms for line in _norm(name)],
            within(layout.block, block.lines),
            layout.more(heads) if heads is not None else [],
            feed_forward,
        )
        stack += lines if index < count else optional([*lines, *layer("layers", index, FURTHER)])
    # Where experts are chosen group by group, they could only move inside their group.
    if (values.get("n_group") or 1) == 1:
        symmetric.append("experts")
    lines = within("model", embedding("embed_tokens"), stack, norm(layout.last_norm) if layout.last_norm else [])
    return declare(
        config,
        lines,
        linear("lm_head", "vocab", "residual", optional=True),
        head("score"),
        head("qa_outputs"),
        sizes=sizes,
        symmetric=occurring(symmetric, lines),
        outputs=("residual",),
        prefix="model.",
        other_prefixes=("transformer.",),  # LlamaForQuestionAnswering and its kin
    )


def optional(lines: Sequence[str]) -> list[str]:
    """Declarations that a checkpoint may lack."""
    split = [line.partition("  ") for line in lines]
    return [f"{name.rstrip('?')}?{gap}{shape}" for name, gap, shape in split]


def _norm(name: str) -> list[str]:
    if name.endswith("?"):
        return [f"{name[:-1]}.weight?  residual", f"{name[:-1]}.bias?  residual"]
    return norm(name)


def _heads(config: PreTrainedConfig, layout: Layout, values: dict[str, Any], index: int) -> Heads:
    # A config may leave head_dim out or set it to None; both mean an even split of the residual stream.
    head_dim = values.get("head_dim") or config.hidden_size // config.num_attention_heads
    heads = partial(heads_of, config.num_attention_heads, values.get("num_key_value_heads"), head_dim=head_dim)
    if _has_qk_norms(layout, values) and layout.qk_gain == "names" and "q" in heads().sizes:
        # The name of a query head's norm counts through all groups: an index along two axes.
        return replace(heads(), symmetric=("value_dim",))
    shared = _has_qk_norms(layout, values) and layout.qk_gain == "channels"
    without = layout.without_rotary
    if without is not None and without(values, index):
        return heads(free_channels=True, shared_channels=shared)
    rotary_dim = rotary_channels(values, head_dim, index) if layout.partial_rotary else head_dim
    if rotary_dim == head_dim and without is None:
        return heads()
    return heads(rotary_dim=rotary_dim, shared_channels=shared)


def _norm_of_each_head(name: str, heads: Heads) -> list[str]:
    """Norms with tensors of their own, numbered by head."""
    if "heads" in heads.sizes:
        return norm(f"{name}.norms.<heads.{{i}}>", heads.channels)
    count = (
        (heads.sizes.get("kv") or 1) * (heads.sizes["q"] or 1) if name.startswith("q") else heads.sizes.get("kv") or 1
    )
    return [line for index in range(count) for line in norm(f"{name}.norms.{index}", heads.channels)]


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


def _widths(config: PreTrainedConfig, layout: Layout, index: int, routed: Experts | None) -> dict[str, int | None]:
    if routed is None:
        return {f"neurons.{index}": getattr(config, layout.neurons)}
    return {
        f"neurons.{index}": prod(getattr(config, name) for name in routed.neurons),
        "experts": getattr(config, routed.count),
        "shared": prod(getattr(config, name) for name in routed.shared) if routed.shared else None,
    }


def _has_qk_norms(layout: Layout, values: dict[str, Any]) -> bool:
    return bool(layout.qk_norms) and (not layout.qk_flag or bool(values[layout.qk_flag]))


def _attention(
    config: PreTrainedConfig, layout: Layout, values: dict[str, Any], index: int
) -> tuple[Part, Heads | None]:
    """The attention block of a layer, and its heads where they are of the usual kind."""
    if layout.attention is not None:
        return layout.attention(config, index), None
    heads = _heads(config, layout, values, index)
    if layout.fused:
        lines = [
            *linear(layout.fused, heads.by_head if layout.by_head else heads.fused, "residual"),
            *linear(layout.projections[-1], "residual", heads.output),
        ]
    else:
        lines = attention(*layout.projections, heads)
    if _has_qk_norms(layout, values) and layout.qk_gain == "names":
        lines += [line for name in layout.qk_norms for line in _norm_of_each_head(name, heads)]
    elif _has_qk_norms(layout, values):
        gains = {
            "channels": (heads.channels, heads.channels),
            "projection": (heads.queries, heads.keys),
            "heads": (f"{heads.query_heads}  {heads.channels}", f"{heads.key_heads}  {heads.channels}"),
        }[layout.qk_gain]
        lines += [line for name, gain in zip(layout.qk_norms, gains, strict=True) for line in norm(name, gain)]
    return Part((*lines, "rotary_emb.inv_freq?  frequencies"), heads.sizes, heads.symmetric), heads
