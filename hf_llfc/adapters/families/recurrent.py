"""State spaces and other recurrences, alone and among attention: Mamba, Mamba-2, lightning attention, the delta rule.

A recurrence keeps one state a channel or a head, so its channels or heads move as neurons do. A family is a list of
layers, each made of norms, mixers (attention or a recurrence) and an MLP or experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.blocks import (
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
from hf_llfc.adapters.families.llama import optional
from hf_llfc.adapters.families.llama_parts import MIXTRAL_EXPERTS, fused_experts, rotary_channels, shared_experts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hf_llfc.symmetry.spec import PermutationSpec

    Block = Part | Sequence[str]

SYMMETRIC = ("residual", "neurons", "shared", "experts", "expert_latent")


def _decoder(
    config: PreTrainedConfig,
    stack: Sequence[Sequence[Block]],
    *,
    last_norm: str,
    sizes: dict[str, int | None] | None = None,
    root: str = "model",
    embeddings: str = "embed_tokens",
    beside: Sequence[str] = (),
) -> PermutationSpec:
    """Declares a decoder with any of its heads.

    Args:
        config: The model config.
        stack: The blocks of every layer.
        last_norm: The norm after all layers.
        sizes: Sizes of the axes that no `Part` declares.
        root: The head prefix.
        embeddings: The embedding.
        beside: Declarations outside of `root`.
    """
    declared: dict[str, int | None] = {}
    symmetric = dict.fromkeys(SYMMETRIC)
    lines = embedding(embeddings)
    for index, blocks in enumerate(stack):
        for block in blocks:
            if isinstance(block, Part):
                declared |= block.sizes
                symmetric |= dict.fromkeys(block.symmetric)
            lines += layer("layers", index, block.lines if isinstance(block, Part) else block)
    lines = [
        *within(root, lines, norm(last_norm)),
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
        prefix=f"{root}.",
    )


def _attention(
    name: str,
    config: PreTrainedConfig,
    *,
    output: str = "o_proj",
    norms: Sequence[str] = (),
    rotary: bool = True,
    partial: bool = False,
    gated: bool = False,
) -> Part:
    """Declares attention among other layers.

    Args:
        name: The block.
        config: The model config.
        output: The output projection.
        norms: Norms on queries and keys, whose gain all heads share.
        rotary: Whether there is a rotary embedding.
        partial: Whether the model reads `partial_rotary_factor`.
        gated: Whether the query projection gives a gate on each head's output, too.
    """
    values, count = config.to_dict(), config.num_attention_heads
    head_dim = values.get("head_dim") or config.hidden_size // count
    heads = heads_of(
        count,
        config.num_key_value_heads,
        head_dim=head_dim,
        free_channels=not rotary,
        rotary_dim=(rotary_channels(values, head_dim) if partial else head_dim) if rotary else None,
        shared_channels=bool(norms),
    )
    lines = [
        *linear("q_proj", heads.queries_and_gates if gated else heads.queries, "residual"),
        *linear("k_proj", heads.keys, "residual"),
        *linear("v_proj", heads.values, "residual"),
        *linear(output, "residual", heads.output),
        *(line for gain in norms for line in norm(gain, heads.channels)),
    ]
    return Part(tuple(within(name, lines)), heads.sizes, heads.symmetric)


def selective_scan(name: str, *, width: int, state: int, rank: int, kernel: int) -> Part:
    """Declares Mamba's mixer: a state for every channel, whose entries move, and those of the time rank.

    Args:
        name: The block.
        width: Inner channels.
        state: Entries of a channel's state.
        rank: Width of the bottleneck before the time steps.
        kernel: Length of the convolution.
    """
    lines = [
        *linear("in_proj", "inner.{i} + inner.{i}", "residual"),
        f"conv1d.weight  inner.{{i}}  1  {kernel}",
        "conv1d.bias?  inner.{i}",
        *linear("x_proj", "time_rank.{i} + state.{i} + state.{i}", "inner.{i}"),
        *linear("dt_proj", "inner.{i}", "time_rank.{i}"),
        "A_log  inner.{i}  state.{i}",
        "D  inner.{i}",
        *linear("out_proj", "residual", "inner.{i}"),
    ]
    sizes: dict[str, int | None] = {"inner": width, "state": state, "time_rank": rank}
    return Part(tuple(within(name, lines)), sizes, ("inner", "state", "time_rank"))


def grouped_scan(name: str, *, heads: int, head_dim: int, groups: int, state: int, kernel: int) -> Part:
    """Declares Mamba-2's mixer: heads, of which each group shares inputs and outputs of the state.

    Args:
        name: The block.
        heads: Heads in all.
        head_dim: Channels of a head.
        groups: Groups of heads.
        state: Entries of a channel's state.
        kernel: Length of the convolution.
    """
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
        f"conv1d.weight  {convolved}  1  {kernel}",
        f"conv1d.bias?  {convolved}",
        *(f"{part}  {by_head}" for part in ("dt_bias", "A_log", "D")),
        f"norm.weight?  {inner}",
        *linear("out_proj", "residual", inner),
    ]
    sizes: dict[str, int | None] = {
        "groups": groups,
        "scan_heads": heads // groups,
        "scan_dim": head_dim,
        "state": state,
    }
    return Part(tuple(within(name, lines)), sizes, symmetric)


def delta_rule(name: str, config: PreTrainedConfig, *, fused: bool) -> Part:
    """Declares a gated delta net: value heads in groups that share a query/key head; all share the gain of one norm.

    Args:
        name: The block.
        config: The model config.
        fused: Whether one projection gives queries, keys, values and gates head by head.
    """
    keys = "(delta_keys.{i} delta_dim.{i}[delta_keys])"
    by_head = "(delta_keys.{i} delta_heads.{i}[delta_keys])"
    values = "(delta_keys.{i} delta_heads.{i}[delta_keys] delta_values.{i})"
    own = "(delta_heads.{i}[delta_keys] delta_values.{i})"
    if fused:
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
    return Part(tuple(within(name, lines)), sizes, ("delta_keys", "delta_heads", "delta_dim", "delta_values"))


def mamba(config: PreTrainedConfig) -> PermutationSpec:
    """Mamba and Falcon Mamba with any of their heads."""
    mixer = selective_scan(
        "mixer",
        width=config.intermediate_size,
        state=config.state_size,
        rank=config.time_step_rank,
        kernel=config.conv_kernel,
    )
    stack = [(norm("norm"), mixer)] * config.num_hidden_layers
    return _decoder(config, stack, last_norm="norm_f", root="backbone", embeddings="embeddings")


def _mamba2_mixer(config: PreTrainedConfig) -> Part:
    return grouped_scan(
        "mamba",
        heads=config.mamba_n_heads,
        head_dim=config.mamba_d_head,
        groups=config.mamba_n_groups,
        state=config.mamba_d_state,
        kernel=config.mamba_d_conv,
    )


def falcon_h1(config: PreTrainedConfig) -> PermutationSpec:
    """Falcon-H1 with any of its heads: attention and Mamba-2 side by side."""
    blocks = (
        norm("input_layernorm"),
        _mamba2_mixer(config),
        _attention("self_attn", config),
        norm("pre_ff_layernorm"),
        gated_mlp("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"),
    )
    stack = [blocks] * config.num_hidden_layers
    return _decoder(config, stack, last_norm="final_layernorm", sizes={"neurons": config.intermediate_size})


def granitemoehybrid(config: PreTrainedConfig) -> PermutationSpec:
    """Granite 4 with any of its heads: Mamba-2 and attention, experts beside a shared MLP."""
    mixers = {
        "linear_attention": _mamba2_mixer(config),
        "full_attention": _attention("self_attn", config, rotary=config.position_embedding_type == "rope"),
    }
    routed = fused_experts("block_sparse_moe", "router.layer", "input_linear.weight", "output_linear.weight")
    feed_forward = (
        norm("post_attention_layernorm"),
        routed if config.num_local_experts else (),
        linear("shared_mlp.input_linear", "shared.{i} + shared.{i}", "residual"),
        linear("shared_mlp.output_linear", "residual", "shared.{i}"),
    )
    return _decoder(
        config,
        [(norm("input_layernorm"), mixers[kind], *feed_forward) for kind in config.layer_types],
        last_norm="norm",
        sizes={
            "neurons": config.intermediate_size,
            "experts": config.num_local_experts,
            "shared": config.shared_intermediate_size,
        },
    )


def nemotron_h(config: PreTrainedConfig) -> PermutationSpec:
    """Nemotron-H with any of its heads: one block a layer, Mamba-2, attention, MLP or experts."""
    latent = config.to_dict().get("moe_latent_size")
    inside = "expert_latent.{i}" if latent else "residual"
    expert = "mixer.experts.<experts.{i}>"
    routed = [
        "mixer.gate.weight  experts.{i}  residual",
        "mixer.gate.e_score_correction_bias  experts.{i}",
        *linear(f"{expert}.up_proj", "neurons.{i}[experts]", inside),
        *linear(f"{expert}.down_proj", inside, "neurons.{i}[experts]"),
        *linear("mixer.shared_experts.up_proj", "shared.{i}", "residual"),
        *linear("mixer.shared_experts.down_proj", "residual", "shared.{i}"),
    ]
    if latent:
        routed += linear("mixer.fc1_latent_proj", inside, "residual")
        routed += linear("mixer.fc2_latent_proj", "residual", inside)
    mixers: dict[str, Block] = {
        "linear_attention": grouped_scan(
            "mixer",
            heads=config.mamba_num_heads,
            head_dim=config.mamba_head_dim,
            groups=config.n_groups,
            state=config.ssm_state_size,
            kernel=config.conv_kernel,
        ),
        "full_attention": _attention("mixer", config, rotary=False),
        "mlp": mlp("mixer.up_proj", "mixer.down_proj"),
        "moe": routed,
    }
    widths = {"mlp": config.intermediate_size, "moe": config.moe_intermediate_size}
    kinds = config.layers_block_type
    spec = _decoder(
        config,
        [(norm("norm"), mixers[kind]) for kind in kinds],
        last_norm="norm_f",
        sizes={
            **{f"neurons.{index}": widths[kind] for index, kind in enumerate(kinds) if kind in widths},
            "experts": config.n_routed_experts,
            "shared": config.moe_shared_expert_intermediate_size,
            "expert_latent": latent,
        },
        root="backbone",
        embeddings="embeddings",
    )
    spec = replace(spec, other_prefixes=("model.",))
    # Experts chosen group by group could only move inside their group.
    return spec.fix("experts") if config.n_group > 1 and "moe" in kinds else spec


def lfm2(config: PreTrainedConfig) -> PermutationSpec:
    """LFM2 and LFM2-MoE with any of their heads: short gated convolutions and attention."""
    values = config.to_dict()
    convolution = [
        *linear("conv.in_proj", "inner.{i} + inner.{i} + inner.{i}", "residual"),
        f"conv.conv.weight  inner.{{i}}  1  {config.conv_L_cache}",
        "conv.conv.bias?  inner.{i}",
        *linear("conv.out_proj", "residual", "inner.{i}"),
    ]
    mixers = {
        "conv": Part(tuple(convolution), {"inner": config.hidden_size}, ("inner",)),
        "full_attention": _attention("self_attn", config, output="out_proj", norms=("q_layernorm", "k_layernorm")),
    }
    dense = gated_mlp("feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
    routed = [
        *mixture_of_experts("feed_forward.gate", "feed_forward.experts", "w1", "w3", "w2"),
        "feed_forward.expert_bias?  experts.{i}",
    ]
    first_routed = values.get("num_dense_layers", config.num_hidden_layers)
    dense_width = _lfm2_width(values)
    return _decoder(
        config,
        [
            (norm("operator_norm"), mixers[kind], norm("ffn_norm"), dense if index < first_routed else routed)
            for index, kind in enumerate(config.layer_types)
        ],
        last_norm="embedding_norm",
        sizes={
            **{
                f"neurons.{index}": dense_width if index < first_routed else values["moe_intermediate_size"]
                for index in range(config.num_hidden_layers)
            },
            "experts": values.get("num_experts"),
        },
    )


def _lfm2_width(values: dict[str, Any]) -> int:
    """The width that LFM2 makes of its config's."""
    width: int = values["intermediate_size"]
    if not values.get("block_auto_adjust_ff_dim"):
        return width
    width = int(2 * width / 3)
    if values["block_ffn_dim_multiplier"] is not None:
        width = int(values["block_ffn_dim_multiplier"] * width)
        multiple: int = values["block_multiple_of"]
        width = multiple * ((width + multiple - 1) // multiple)
    return width


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
        "full_attention": _attention("self_attn", config),
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
    attention = _attention("self_attn", config, norms=("q_norm", "k_norm"), partial=True, gated=True)
    mixers = {
        "linear_attention": delta_rule("linear_attn", config, fused=config.model_type == "qwen3_next"),
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
