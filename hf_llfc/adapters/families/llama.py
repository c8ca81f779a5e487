"""The Llama line: an embedding, layers of attention and MLP or routed experts, a norm, an output head.

What differs from Llama is a row of `LAYOUTS`: names, norms, fused projections, biases, experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.blocks import (
    Heads,
    attention,
    embedding,
    head,
    heads_of,
    layer,
    linear,
    mlp,
    norm,
    within,
)
from hf_llfc.adapters.compose import Part, occurring
from hf_llfc.adapters.declare import declare
from hf_llfc.adapters.families.llama_parts import (
    BOTH_NORMS,
    CORRECTION,
    DEEPSEEK_EXPERTS,
    FURTHER,
    FUSED_ROUTED,
    GATED_FUSED,
    GLM4_NORMS,
    MIXTRAL_EXPERTS,
    PLAIN,
    POST_NORMS,
    PRE_NORMS,
    QK_NORMS,
    ROUTED,
    SHARED_EXPERTS,
    Experts,
    Layout,
    as_listed,
    differential_attention,
    every_so_often,
    expert_attention,
    full_attention_layers,
    fused_experts,
    indexed_attention,
    latent_attention,
    mimo_attention,
    rotary_channels,
    shared_experts,
    sinks,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hf_llfc.symmetry.spec import PermutationSpec

LAYOUTS: dict[str, Layout] = {
    "arcee": Layout(mlp=PLAIN),
    "cohere": Layout(norms=("input_layernorm",), qk_norms=QK_NORMS, qk_flag="use_qk_norm", qk_gain="heads"),
    "cohere2": Layout(norms=("input_layernorm",), without_rotary=full_attention_layers),
    "deepseek_v2": Layout(attention=latent_attention, experts=DEEPSEEK_EXPERTS),
    "deepseek_v3": Layout(predicts_further=True, attention=latent_attention, experts=DEEPSEEK_EXPERTS),
    "deepseek_v32": Layout(
        predicts_further=True, attention=indexed_attention, experts=replace(DEEPSEEK_EXPERTS, layers=as_listed)
    ),
    "diffllama": Layout(attention=differential_attention),
    "dots1": Layout(qk_norms=QK_NORMS, experts=DEEPSEEK_EXPERTS),
    "exaone4": Layout(norms=POST_NORMS, qk_norms=QK_NORMS, without_rotary=full_attention_layers),
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
    "hunyuan_v1_dense": Layout(qk_norms=("query_layernorm", "key_layernorm")),
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
    "mellum": Layout(qk_norms=QK_NORMS, experts=Experts(ROUTED, layers=as_listed)),
    "mimo_v2_flash": Layout(
        attention=mimo_attention,
        experts=Experts(
            (*ROUTED, "mlp.gate.e_score_correction_bias  experts.{i}"), count="n_routed_experts", layers=as_listed
        ),
    ),
    "minicpm3": Layout(attention=latent_attention),
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
    # Where queries, keys and values of a head lie together, every head has its own.
    kv_heads = None if layout.by_head else values.get("num_key_value_heads")
    heads = partial(heads_of, config.num_attention_heads, kv_heads, head_dim=head_dim)
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
        lines = attention(layout.projections, heads)
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
