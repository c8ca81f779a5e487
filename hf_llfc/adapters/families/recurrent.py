"""Recurrences among attention: Mamba-2, lightning attention, the delta rule.

A recurrence keeps one state a head, so its heads move as neurons do. A family is a list of layers, each made of norms,
mixers (attention or a recurrence) and an MLP or experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hf_llfc.adapters.blocks import (
    embedding,
    gated_mlp,
    head,
    heads_of,
    layer,
    linear,
    mixture_of_experts,
    norm,
    within,
)
from hf_llfc.adapters.compose import Part, occurring
from hf_llfc.adapters.declare import declare
from hf_llfc.adapters.families.llama import optional
from hf_llfc.adapters.families.llama_parts import MIXTRAL_EXPERTS, rotary_channels, shared_experts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hf_llfc.symmetry.spec import PermutationSpec

    Block = Part | Sequence[str]

SYMMETRIC = ("residual", "neurons", "shared", "experts")


def _decoder(
    config: PreTrainedConfig,
    stack: Sequence[Sequence[Block]],
    *,
    last_norm: str,
    sizes: dict[str, int | None] | None = None,
    beside: Sequence[str] = (),
) -> PermutationSpec:
    """Declares a decoder with any of its heads.

    Args:
        config: The model config.
        stack: The blocks of every layer.
        last_norm: The norm after all layers.
        sizes: Sizes of the axes that no `Part` declares.
        beside: Declarations outside of the base model.
    """
    declared: dict[str, int | None] = {}
    symmetric = dict.fromkeys(SYMMETRIC)
    lines = embedding("embed_tokens")
    for index, blocks in enumerate(stack):
        for block in blocks:
            if isinstance(block, Part):
                declared |= block.sizes
                symmetric |= dict.fromkeys(block.symmetric)
            lines += layer("layers", index, block.lines if isinstance(block, Part) else block)
    lines = [
        *within("model", lines, norm(last_norm)),
        *beside,
        *(line for name in ("lm_head", "head") for line in head(name, out="vocab")),
        *(line for name in ("score", "qa_outputs") for line in head(name)),
    ]
    return declare(
        config,
        lines,
        sizes={"vocab": config.vocab_size, "residual": config.hidden_size, "labels": None, **declared, **(sizes or {})},
        symmetric=occurring(symmetric, lines),
        outputs=("residual",),
        prefix="model.",
    )


def _attention(
    config: PreTrainedConfig,
    *,
    norms: Sequence[str] = (),
    partial: bool = False,
    gated: bool = False,
) -> Part:
    """Declares attention among other layers.

    Args:
        config: The model config.
        norms: Norms on queries and keys, whose gain all heads share.
        partial: Whether the model reads `partial_rotary_factor`.
        gated: Whether the query projection gives a gate on each head's output, too.
    """
    values, count = config.to_dict(), config.num_attention_heads
    head_dim = values.get("head_dim") or config.hidden_size // count
    heads = heads_of(
        count,
        config.num_key_value_heads,
        head_dim=head_dim,
        rotary_dim=rotary_channels(values, head_dim) if partial else head_dim,
        shared_channels=bool(norms),
    )
    lines = [
        *linear("q_proj", heads.queries_and_gates if gated else heads.queries, "residual"),
        *linear("k_proj", heads.keys, "residual"),
        *linear("v_proj", heads.values, "residual"),
        *linear("o_proj", "residual", heads.output),
        *(line for gain in norms for line in norm(gain, heads.channels)),
    ]
    return Part(tuple(within("self_attn", lines)), heads.sizes, heads.symmetric)


def _grouped_scan(config: PreTrainedConfig) -> Part:
    """Mamba-2's mixer: heads, of which each group shares inputs and outputs of the state."""
    groups = config.mamba_n_groups
    if groups == 1:
        by_head, shared = "scan_heads.{i}", "state.{i}"
        inner = "(scan_heads.{i} scan_dim.{i}[scan_heads])"
        symmetric: tuple[str, ...] = ("scan_heads", "scan_dim", "state")
    else:
        # A head is an index along two axes, which a channel cannot depend on both: it moves alike in a group's heads.
        by_head, shared = "(groups.{i} scan_heads.{i}[groups])", "(groups.{i} state.{i}[groups])"
        inner = "(groups.{i} scan_heads.{i}[groups] scan_dim.{i}[groups])"
        symmetric = ("groups", "scan_heads", "scan_dim", "state")
    convolved = f"{inner} + {shared} + {shared}"
    lines = [
        *linear("in_proj", f"{inner} + {convolved} + {by_head}", "residual"),
        f"conv1d.weight  {convolved}  1  {config.mamba_d_conv}",
        f"conv1d.bias?  {convolved}",
        *(f"{part}  {by_head}" for part in ("dt_bias", "A_log", "D")),
        f"norm.weight?  {inner}",
        *linear("out_proj", "residual", inner),
    ]
    sizes: dict[str, int | None] = {
        "groups": groups,
        "scan_heads": config.mamba_n_heads // groups,
        "scan_dim": config.mamba_d_head,
        "state": config.mamba_d_state,
    }
    return Part(tuple(within("mamba", lines)), sizes, symmetric)


def _delta_rule(config: PreTrainedConfig) -> Part:
    """A gated delta net: value heads in groups that share a query/key head; all share the gain of one norm."""
    keys = "(delta_keys.{i} delta_dim.{i}[delta_keys])"
    by_head = "(delta_keys.{i} delta_heads.{i}[delta_keys])"
    values = "(delta_keys.{i} delta_heads.{i}[delta_keys] delta_values.{i})"
    own = "(delta_heads.{i}[delta_keys] delta_values.{i})"
    if config.model_type == "qwen3_next":  # one projection gives queries, keys, values and gates head by head
        dim, of_head = "delta_dim.{i}[delta_keys]", "delta_heads.{i}[delta_keys]"
        projections = [
            *linear("in_proj_qkvz", f"(delta_keys.{{i}} {dim} + {dim} + {own} + {own})", "residual"),
            *linear("in_proj_ba", f"(delta_keys.{{i}} {of_head} + {of_head})", "residual"),
        ]
    else:
        projections = [
            *linear("in_proj_qkv", f"{keys} + {keys} + {values}", "residual"),
            *linear("in_proj_z", values, "residual"),
            *linear("in_proj_b", by_head, "residual"),
            *linear("in_proj_a", by_head, "residual"),
        ]
    lines = [
        *projections,
        f"conv1d.weight  {keys} + {keys} + {values}  1  {config.linear_conv_kernel_dim}",
        f"A_log  {by_head}",
        f"dt_bias  {by_head}",
        "norm.weight  delta_values.{i}",
        *linear("out_proj", "residual", values),
    ]
    count = config.linear_num_key_heads
    sizes: dict[str, int | None] = {
        "delta_keys": count,
        "delta_heads": config.linear_num_value_heads // count,
        "delta_dim": config.linear_key_head_dim,
        "delta_values": config.linear_value_head_dim,
    }
    return Part(tuple(within("linear_attn", lines)), sizes, ("delta_keys", "delta_heads", "delta_dim", "delta_values"))


def falcon_h1(config: PreTrainedConfig) -> PermutationSpec:
    """Falcon-H1 with any of its heads: attention and Mamba-2 side by side."""
    blocks = (
        norm("input_layernorm"),
        _grouped_scan(config),
        _attention(config),
        norm("pre_ff_layernorm"),
        gated_mlp("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"),
    )
    stack = [blocks] * config.num_hidden_layers
    return _decoder(config, stack, last_norm="final_layernorm", sizes={"neurons": config.intermediate_size})


def minimax(config: PreTrainedConfig) -> PermutationSpec:
    """MiniMax with any of its heads: lightning attention, whose heads decay as buffers say, and attention."""
    count = config.num_attention_heads
    head_dim = config.to_dict().get("head_dim") or config.hidden_size // count
    heads = heads_of(count, head_dim=head_dim, free_channels=True, prefix="lightning_")
    decay = heads.query_heads
    lightning = [
        *linear("qkv_proj", heads.by_head, "residual"),
        *linear("output_gate", heads.output, "residual"),
        *norm("norm", heads.output),
        *linear("out_proj", "residual", heads.output),
        f"slope_rate?~  {decay}  1  1",
        f"query_decay?~  {decay}  block  1",
        f"key_decay?~  {decay}  block  1",
        f"diagonal_decay?~  1  {decay}  block  block",
    ]
    mixers = {
        "linear_attention": Part(tuple(within("self_attn", lightning)), heads.sizes, heads.symmetric),
        "full_attention": _attention(config),
    }
    experts = MIXTRAL_EXPERTS.lines
    spec = _decoder(
        config,
        [
            (norm("input_layernorm"), mixers[kind], norm("post_attention_layernorm"), experts)
            for kind in config.layer_types
        ],
        last_norm="norm",
        sizes={"neurons": config.intermediate_size, "experts": config.num_local_experts, "block": config.block_size},
    )
    return replace(spec, other_prefixes=("transformer.",))


def qwen3_next(config: PreTrainedConfig) -> PermutationSpec:
    """Qwen3-Next and Qwen3.5 with any of their heads: gated delta nets and gated attention, dense or routed."""
    values = config.to_dict()
    attention = _attention(config, norms=("q_norm", "k_norm"), partial=True, gated=True)
    mixers = {
        "linear_attention": _delta_rule(config),
        "full_attention": attention,
    }
    dense = gated_mlp("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    experts = values.get("num_experts")
    routed = [
        *mixture_of_experts("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
        *shared_experts("mlp.shared_expert"),
        "mlp.shared_expert_gate.weight  1  residual",
    ]
    is_routed = [
        bool(experts)
        and index not in values.get("mlp_only_layers", ())
        and (index + 1) % values.get("decoder_sparse_step", 1) == 0
        for index in range(config.num_hidden_layers)
    ]

    def blocks(mixer: Part, routes: bool) -> tuple[Block, ...]:
        feed_forward = routed if routes else dense
        return norm("input_layernorm"), mixer, norm("post_attention_layernorm"), feed_forward

    further = [
        *linear("fc", "residual", "residual + residual"),
        *(line for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm") for line in norm(name)),
        *within(
            "layers.0",
            *(block.lines if isinstance(block, Part) else block for block in blocks(attention, bool(experts))),
        ),
    ]
    spec = _decoder(
        config,
        [blocks(mixers[kind], routes) for kind, routes in zip(config.layer_types, is_routed, strict=True)],
        last_norm="norm",
        sizes={
            **{
                f"neurons.{index}": values["moe_intermediate_size" if routes else "intermediate_size"]
                for index, routes in enumerate(is_routed)
            },
            "neurons.mtp": values["moe_intermediate_size" if experts else "intermediate_size"],
            "experts": experts,
            "shared": values.get("shared_expert_intermediate_size"),
            **attention.sizes,
        },
        # The layer that predicts a further token, which transformers skips.
        beside=optional([line.replace("{i}", "mtp") for line in within("mtp", further)]),
    )
    return replace(spec, other_prefixes=("transformer.",))
