"""The Llama line: an embedding, layers of attention and MLP or routed experts, a norm, an output head.

What differs from Llama is a row of `LAYOUTS`: names, norms, fused projections, biases, experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from hf_llfc.adapters.compose import occurring
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hf_llfc.symmetry.spec import PermutationSpec

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
BOTH_NORMS = (*PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
GATED = tuple(gated_mlp("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
GATED_FUSED = (
    *linear("mlp.gate_up_proj", "neurons.{i} + neurons.{i}", "residual"),
    *linear("mlp.down_proj", "residual", "neurons.{i}"),
)
PLAIN = tuple(mlp("mlp.up_proj", "mlp.down_proj"))
ROUTED = tuple(mixture_of_experts("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"))
CORRECTION = ("mlp.gate.e_score_correction_bias  experts.{i}",)


def shared_experts(name: str) -> tuple[str, ...]:
    """A gated MLP that every token passes beside its routed experts."""
    parts = (f"{name}.{part}_proj" for part in ("gate", "up", "down"))
    return tuple(gated_mlp(*parts, neurons="shared.{i}"))


# Dots1, GLM-4 MoE, Solar and DeepSeek route alike.
DEEPSEEK_ROUTED = (*ROUTED, *CORRECTION, *shared_experts("mlp.shared_experts"))


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
        norms: The norms of a layer.
        last_norm: The norm after all layers.
        block: The attention block.
        projections: Its query, key, value and output projections.
        fused: One projection for queries, keys and values, instead of three.
        qk_norms: Norms on queries and on keys.
        qk_flag: The config's name for whether there are such norms, where it says so.
        qk_gain: What the gain of those runs over: the `channels` that heads share, all of a `projection`, or each of
            the `heads` on its own.
        without_rotary: Whether a layer has no rotary embedding, given the config's values and the layer.
        mlp: Declarations of the MLP.
        experts: The routed layers.
        more: Further declarations of a layer, given its heads.
        neurons: The config's name for the width of the MLP.
    """

    norms: tuple[str, ...] = PRE_NORMS
    last_norm: str = "norm"
    block: str = "self_attn"
    projections: tuple[str, str, str, str] = PROJECTIONS
    fused: str = ""
    qk_norms: tuple[str, ...] = ()
    qk_flag: str = ""
    qk_gain: str = "channels"
    without_rotary: Callable[[dict[str, Any], int], bool] | None = None
    mlp: tuple[str, ...] = GATED
    experts: Experts | None = None
    more: Callable[[Heads], Sequence[str]] = lambda heads: ()
    neurons: str = "intermediate_size"


def full_attention_layers(values: dict[str, Any], index: int) -> bool:
    """Whether a layer has no rotary embedding where only those with a window have one."""
    return bool(values["sliding_window"] and values["layer_types"][index] != "sliding_attention")


QK_NORMS = ("q_norm", "k_norm")
QWEN_ROUTED = Experts(ROUTED, layers=every_so_often)

LAYOUTS: dict[str, Layout] = {
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
    "cohere": Layout(norms=("input_layernorm",), qk_norms=QK_NORMS, qk_flag="use_qk_norm", qk_gain="heads"),
    "cohere2": Layout(norms=("input_layernorm",), without_rotary=full_attention_layers),
    "exaone4": Layout(norms=POST_NORMS, qk_norms=QK_NORMS),
    "gemma2": Layout(norms=BOTH_NORMS),
    "gemma3_text": Layout(norms=BOTH_NORMS, qk_norms=QK_NORMS),
    "glm": Layout(mlp=GATED_FUSED),
    "glm4": Layout(norms=(*PRE_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm"), mlp=GATED_FUSED),
    "mixtral": Layout(
        experts=Experts(
            tuple(mixture_of_experts("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2")),
            count="num_local_experts",
            neurons=("intermediate_size",),
        )
    ),
    "nemotron": Layout(mlp=PLAIN),
    "olmo": Layout(norms=(), last_norm=""),
    "olmo2": Layout(norms=POST_NORMS, qk_norms=QK_NORMS, qk_gain="projection"),
    "olmo3": Layout(norms=POST_NORMS, qk_norms=QK_NORMS, qk_gain="projection"),
    "olmoe": Layout(qk_norms=QK_NORMS, qk_gain="projection", experts=Experts(ROUTED, neurons=("intermediate_size",))),
    "phi": Layout(
        norms=("input_layernorm",),
        last_norm="final_layernorm",
        projections=("q_proj", "k_proj", "v_proj", "dense"),
        qk_norms=("q_layernorm", "k_layernorm"),
        qk_flag="qk_layernorm",
        mlp=tuple(mlp("mlp.fc1", "mlp.fc2")),
    ),
    "phi3": Layout(fused="qkv_proj", mlp=GATED_FUSED),
    "qwen2_moe": Layout(
        experts=Experts(
            (*ROUTED, *shared_experts("mlp.shared_expert"), "mlp.shared_expert_gate.weight  1  residual"),
            shared=("shared_expert_intermediate_size",),
            layers=every_so_often,
        )
    ),
    "qwen3": Layout(qk_norms=QK_NORMS),
    "qwen3_moe": Layout(qk_norms=QK_NORMS, experts=QWEN_ROUTED),
    "smollm3": Layout(without_rotary=lambda values, index: not values["no_rope_layers"][index]),
    "starcoder2": Layout(mlp=tuple(mlp("mlp.c_fc", "mlp.c_proj"))),
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
    for index in range(config.num_hidden_layers):
        heads = _heads(config, layout, values, index)
        routed = layout.experts if layout.experts is not None and layout.experts.layers(values, index) else None
        sizes |= {**heads.sizes, **_widths(config, layout, index, routed)}
        symmetric += [axis for axis in heads.symmetric if axis not in symmetric]
        stack += layer(
            "layers",
            index,
            [line for name in layout.norms for line in norm(name)],
            within(layout.block, _attention(layout, values, heads)),
            layout.more(heads),
            routed.lines if routed else layout.mlp,
        )
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


def _heads(config: PreTrainedConfig, layout: Layout, values: dict[str, Any], index: int) -> Heads:
    # A config may leave head_dim out or set it to None; both mean an even split of the residual stream.
    head_dim = values.get("head_dim") or config.hidden_size // config.num_attention_heads
    heads = partial(heads_of, config.num_attention_heads, config.num_key_value_heads, head_dim=head_dim)
    if _has_qk_norms(layout, values) and layout.qk_gain == "channels":
        return heads()
    without = layout.without_rotary
    if without is not None and without(values, index):
        return heads(free_channels=True)
    rotary_dim = rotary_channels(values, head_dim, index)
    return heads() if rotary_dim == head_dim and without is None else heads(rotary_dim=rotary_dim)


def rotary_channels(values: dict[str, Any], head_dim: int, index: int = 0) -> int:
    """How many leading channels of a head a rotary embedding acts on.

    Args:
        values: The config's values.
        head_dim: Query and key channels of a head.
        index: The layer.
    """
    rope = values.get("rope_parameters") or {}
    if "rope_type" not in rope and values.get("layer_types"):
        rope = rope.get(values["layer_types"][index]) or {}
    return int(head_dim * (rope.get("partial_rotary_factor") or 1))


def _widths(config: PreTrainedConfig, layout: Layout, index: int, routed: Experts | None) -> dict[str, int | None]:
    if routed is None:
        return {f"neurons.{index}": getattr(config, layout.neurons)}
    return {
        f"neurons.{index}": prod(getattr(config, name) for name in routed.neurons),
        "experts": getattr(config, routed.count),
        "shared": prod(getattr(config, name) for name in routed.shared),
    }


def _has_qk_norms(layout: Layout, values: dict[str, Any]) -> bool:
    return bool(layout.qk_norms) and (not layout.qk_flag or bool(values[layout.qk_flag]))


def _attention(layout: Layout, values: dict[str, Any], heads: Heads) -> list[str]:
    if layout.fused:
        lines = [
            *linear(layout.fused, heads.fused, "residual"),
            *linear(layout.projections[-1], "residual", heads.output),
        ]
    else:
        lines = attention(*layout.projections, heads)
    if _has_qk_norms(layout, values):
        gains = {
            "channels": (heads.channels, heads.channels),
            "projection": (heads.queries, heads.keys),
            "heads": (f"{heads.query_heads}  {heads.channels}", f"{heads.key_heads}  {heads.channels}"),
        }[layout.qk_gain]
        lines += [line for name, gain in zip(layout.qk_norms, gains, strict=True) for line in norm(name, gain)]
    return [*lines, "rotary_emb.inv_freq?  frequencies"]
