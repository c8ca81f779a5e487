"""Gemma 3n and Gemma 4: inputs to every layer, keys and values that later layers share, streams mixed by AltUp."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.blocks import embedding, gated_mlp, head, heads_of, layer, linear, norm, within
from hf_llfc.adapters.compose import Part, occurring
from hf_llfc.adapters.declare import declare
from hf_llfc.adapters.families.llama_parts import BOTH_NORMS, fused_experts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedConfig

    from hf_llfc.symmetry.spec import PermutationSpec

MLP = gated_mlp("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

# One gain runs over the inputs of all layers, so that their channels can only move in all layers alike.
LAYER_INPUT = (
    *linear("per_layer_input_gate", "layer_input", "residual"),
    *linear("per_layer_projection", "residual", "layer_input"),
    *norm("post_per_layer_input_norm"),
)


def _attention(config: PreTrainedConfig, index: int, source: int, *, head_dim: int, kv_heads: int) -> Part:
    """Attention whose keys and values come from layer `source`, this one or an earlier one of its kind."""
    kind = config.layer_types[index]
    heads = heads_of(
        config.num_attention_heads, kv_heads, head_dim=head_dim, prefix="" if kind == "sliding_attention" else "global_"
    )
    values = heads.values
    # Where values are keys before their norm, they lie on channels with a rotary embedding.
    same = bool(config.to_dict().get("attention_k_eq_v")) and kind != "sliding_attention"
    output = re.sub(r"value_dim\.\{i\}(\[\w+\])?", "head_dim", heads.output) if same else heads.output
    lines = [
        *linear("q_proj", heads.queries, "residual"),
        *norm("q_norm", heads.channels),
        *linear("o_proj", "residual", output),
    ]
    if source == index:
        lines += [*linear("k_proj", heads.keys, "residual"), *norm("k_norm", heads.channels)]
        lines += [] if same else linear("v_proj", values, "residual")
    return Part(tuple(within("self_attn", [_of_source(line, source) for line in lines])), heads.sizes, heads.symmetric)


def _of_source(line: str, source: int) -> str:
    line = re.sub(r"(\w*(?:kv|heads|value_dim))\.\{i\}", rf"\1.{source}", line)
    return re.sub(r"\[(\w+)\]", rf"[\1.{source}]", line)


def _sources(config: PreTrainedConfig) -> list[int]:
    """The layer that each layer has its keys and values from."""
    latest: dict[str, int] = {}
    sources = []
    for index, (kind, mode) in enumerate(zip(config.layer_types, config.kv_sharing_modes, strict=True)):
        if mode != "reuse":
            latest[kind] = index
        sources.append(latest[kind])
    return sources


def _declared(
    config: PreTrainedConfig,
    stack: Sequence[Part],
    before: Sequence[str],
    after: Sequence[str],
    sizes: dict[str, int | None],
) -> PermutationSpec:
    symmetric = ["residual", "neurons", "experts", "layer_input", "laurel", "modalities"]
    for part in stack:
        symmetric += [axis for axis in part.symmetric if axis not in symmetric]
        sizes = {**sizes, **part.sizes}
    lines = [
        *within("model", embedding("embed_tokens"), before, *(part.lines for part in stack), after),
        *head("lm_head", out="vocab"),
        *head("score"),
    ]
    values: dict[str, Any] = config.to_dict()
    return declare(
        config,
        lines,
        sizes={
            "vocab": config.vocab_size,
            "layer_vocab": values.get("vocab_size_per_layer_input"),
            "layers": config.num_hidden_layers,
            "layer_input": values.get("hidden_size_per_layer_input"),
            "residual": config.hidden_size,
            "labels": None,
            **sizes,
        },
        symmetric=occurring(symmetric, lines),
        outputs=("residual",),
        prefix="model.",
    )


def _layer_inputs() -> list[str]:
    return [
        *embedding("embed_tokens_per_layer", rows="layer_vocab", axis="(layers layer_input)"),
        *linear("per_layer_model_projection", "(layers layer_input)", "residual"),
        *norm("per_layer_projection_norm", "layer_input"),
    ]


def gemma3n(config: PreTrainedConfig) -> PermutationSpec:
    """Gemma 3n's language model with any of its heads."""
    streams = config.altup_num_inputs
    mixed = [
        *(f"altup.{name}  residual" for name in ("correct_output_scale", "router_norm.weight")),
        f"altup.correction_coefs.weight  {streams}  modalities.{{i}}",
        f"altup.prediction_coefs.weight  {streams**2}  modalities.{{i}}",
        "altup.modality_router.weight  modalities.{i}  residual",
        *linear("laurel.linear_left", "laurel.{i}", "residual"),
        *linear("laurel.linear_right", "residual", "laurel.{i}"),
        *norm("laurel.post_laurel_norm"),
    ]
    stack = []
    for index, source in enumerate(_sources(config)):
        block = _attention(config, index, source, head_dim=config.head_dim, kv_heads=config.num_key_value_heads)
        norms = [line for name in BOTH_NORMS for line in norm(name)]
        lines = layer("layers", index, mixed, norms, block.lines, MLP, LAYER_INPUT)
        stack.append(Part(tuple(lines), block.sizes, block.symmetric))
    return _declared(
        config,
        stack,
        [
            *_layer_inputs(),
            *(
                line
                for name in ("altup_projections", "altup_unembed_projections")
                for stream in range(streams - 1)
                for line in linear(f"{name}.{stream}", "residual", "residual")
            ),
        ],
        norm("norm"),
        {
            "laurel": config.laurel_rank,
            "modalities": streams,
            **{f"neurons.{index}": width for index, width in enumerate(config.intermediate_size)},
        },
    )


def gemma4(config: PreTrainedConfig) -> PermutationSpec:
    """Gemma 4's language model with any of its heads."""
    values = config.to_dict()
    routed = [
        "router.scale  residual",
        "router.proj.weight  experts.{i}  residual",
        "router.per_expert_scale  experts.{i}",
        *fused_experts("experts", "unused", "gate_up_proj", "down_proj")[1:],
        *(line for name in ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2") for line in norm(name)),
        *norm("pre_feedforward_layernorm_2"),
    ]
    routed = [line.replace("neurons.{i}", "expert_neurons.{i}") for line in routed]
    stack = []
    widths: dict[str, int | None] = {"experts": values.get("num_experts")}
    for index, (source, own) in enumerate(zip(_sources(config), config.per_layer_config, strict=True)):
        block = _attention(config, index, source, head_dim=own.head_dim, kv_heads=own.num_key_value_heads)
        doubled = values["use_double_wide_mlp"] and config.kv_sharing_modes[index] == "reuse"
        widths[f"neurons.{index}"] = config.intermediate_size * (2 if doubled else 1)
        widths["expert_neurons"] = values.get("moe_intermediate_size")
        lines = layer(
            "layers",
            index,
            [line for name in BOTH_NORMS for line in norm(name)],
            block.lines,
            MLP,
            routed if values["enable_moe_block"] else [],
            LAYER_INPUT if values["hidden_size_per_layer_input"] else [],
            ["layer_scalar?~  1"],
        )
        stack.append(Part(tuple(lines), block.sizes, (*block.symmetric, "expert_neurons")))
    return _declared(
        config, stack, _layer_inputs() if values["hidden_size_per_layer_input"] else [], norm("norm"), widths
    )
