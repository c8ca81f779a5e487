"""State spaces and other recurrences, alone and among attention: Mamba, Mamba-2, RG-LRU, delta rule, RWKV, xLSTM.

A recurrence keeps one state a channel or a head, so its channels or heads move as neurons do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.blocks import (
    attention,
    embedding,
    gated_mlp,
    head,
    heads_of,
    layer,
    layers,
    linear,
    mixture_of_experts,
    mlp,
    norm,
    within,
)
from hf_llfc.adapters.compose import Part, occurring
from hf_llfc.adapters.declare import declare
from hf_llfc.adapters.families.llama import (
    MIXTRAL_EXPERTS,
    fused_experts,
    optional,
    rotary_channels,
    shared_experts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hf_llfc.symmetry.spec import PermutationSpec

SYMMETRIC = ("residual", "neurons", "shared", "experts", "expert_latent")


def _model(
    config: PreTrainedConfig,
    root: str,
    *parts: Part | Sequence[str],
    sizes: dict[str, int | None],
    other_prefixes: Iterable[str] = (),
    beside: Sequence[str] = (),
) -> PermutationSpec:
    """A decoder of parts, all below `root`, with any of its heads and what stands `beside` it."""
    blocks: list[str] = []
    found: dict[str, int | None] = {}
    symmetric = list(SYMMETRIC)
    for part in parts:
        if isinstance(part, Part):
            found |= part.sizes
            symmetric += [axis for axis in part.symmetric if axis not in symmetric]
            blocks += part.lines
        else:
            blocks += part
    lines = [
        *within(root, blocks),
        *beside,
        *(line for name in ("lm_head", "head") for line in head(name, out="vocab")),
        *(line for name in ("score", "qa_outputs") for line in head(name)),
    ]
    return declare(
        config,
        lines,
        sizes={"vocab": config.vocab_size, "residual": config.hidden_size, "labels": None, **found, **sizes},
        symmetric=occurring(symmetric, lines),
        outputs=("residual",),
        prefix=f"{root}.",
        other_prefixes=other_prefixes,
    )


def _layer(stack: str, index: int, *parts: Part | Sequence[str]) -> Part:
    """One layer of parts."""
    lines: list[str] = []
    sizes: dict[str, int | None] = {}
    symmetric: dict[str, None] = {}
    for part in parts:
        if isinstance(part, Part):
            sizes |= part.sizes
            symmetric |= dict.fromkeys(part.symmetric)
        lines += part.lines if isinstance(part, Part) else part
    return Part(tuple(layer(stack, index, lines)), sizes, tuple(symmetric))


def _attention(
    name: str,
    config: PreTrainedConfig,
    *,
    output: str = "o_proj",
    norms: Sequence[str] = (),
    rotary: bool = True,
    gated: bool = False,
) -> Part:
    """Attention among other layers.

    Args:
        name: The block.
        config: The model config.
        output: The output projection.
        norms: Norms on queries and keys, whose gain all heads share.
        rotary: Whether there is a rotary embedding.
        gated: Whether the query projection gives a gate on each head's output, too.
    """
    values, count = config.to_dict(), config.num_attention_heads
    head_dim = values.get("head_dim") or config.hidden_size // count
    heads = heads_of(
        count,
        config.num_key_value_heads,
        head_dim=head_dim,
        free_channels=not rotary,
        rotary_dim=rotary_channels(values, head_dim) if rotary else None,
        shared_channels=bool(norms),
    )
    queries = heads.queries_and_gates if gated else heads.queries
    lines = [
        *linear("q_proj", queries, "residual"),
        *linear("k_proj", heads.keys, "residual"),
        *linear("v_proj", heads.values, "residual"),
        *linear(output, "residual", heads.output),
        *(line for each in norms for line in norm(each, heads.channels)),
    ]
    return Part(tuple(within(name, lines)), heads.sizes, heads.symmetric)


def selective_scan(name: str, *, width: int, state: int, rank: int, kernel: int, norms: bool = False) -> Part:
    """Mamba's mixer: every channel has a state of its own; the entries of the state and of the time rank move, too.

    Args:
        name: The block.
        width: Inner channels.
        state: Entries of a channel's state.
        rank: Width of the bottleneck before the time steps.
        kernel: Length of the convolution.
        norms: Whether there are gains on time steps, inputs and outputs of the state.
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
    if norms:
        lines += [*norm("dt_layernorm", "time_rank.{i}"), *norm("b_layernorm", "state.{i}")]
        lines += norm("c_layernorm", "state.{i}")
    sizes: dict[str, int | None] = {"inner": width, "state": state, "time_rank": rank}
    return Part(tuple(within(name, lines)), sizes, ("inner", "state", "time_rank"))


def grouped_scan(name: str, *, heads: int, head_dim: int, groups: int, state: int, kernel: int) -> Part:
    """Mamba-2's mixer: heads, of which each group shares inputs and outputs of the state.

    Args:
        name: The block.
        heads: Heads in all.
        head_dim: Channels of a head.
        groups: Groups of heads.
        state: Entries of a channel's state.
        kernel: Length of the convolution.
    """
    if groups == 1:
        each, shared = "scan_heads.{i}", "state.{i}"
        inner = "(scan_heads.{i} scan_dim.{i}[scan_heads])"
        symmetric: tuple[str, ...] = ("scan_heads", "scan_dim", "state")
    else:
        # A head is an index along two axes, which a channel cannot depend on both: it moves alike in a group's heads.
        each, shared = "(groups.{i} scan_heads.{i}[groups])", "(groups.{i} state.{i}[groups])"
        inner = "(groups.{i} scan_heads.{i}[groups] scan_dim.{i}[groups])"
        symmetric = ("groups", "scan_heads", "scan_dim", "state")
    convolved = f"{inner} + {shared} + {shared}"
    lines = [
        *linear("in_proj", f"{inner} + {convolved} + {each}", "residual"),
        f"conv1d.weight  {convolved}  1  {kernel}",
        f"conv1d.bias?  {convolved}",
        *(f"{part}  {each}" for part in ("dt_bias", "A_log", "D")),
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
    """Gated delta net: value heads in groups that share a query/key head; one norm's gain runs over all value heads.

    Args:
        name: The block.
        config: The model config.
        fused: Whether one projection gives queries, keys, values and gates head by head.
    """
    keys = "(delta_keys.{i} delta_dim.{i}[delta_keys])"
    each = "(delta_keys.{i} delta_heads.{i}[delta_keys])"
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
            *linear("in_proj_b", each, "residual"),
            *linear("in_proj_a", each, "residual"),
        ]
    lines = [
        *projections,
        f"conv1d.weight  {keys} + {keys} + {values}  1  {config.linear_conv_kernel_dim}",
        f"A_log  {each}",
        f"dt_bias  {each}",
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
    return _backbone(config, mixer)


def mamba2(config: PreTrainedConfig) -> PermutationSpec:
    """Mamba-2 with any of its heads."""
    mixer = grouped_scan(
        "mixer",
        heads=config.num_heads,
        head_dim=config.head_dim,
        groups=config.n_groups,
        state=config.state_size,
        kernel=config.conv_kernel,
    )
    return _backbone(config, mixer)


def _backbone(config: PreTrainedConfig, mixer: Part) -> PermutationSpec:
    """Layers of one mixer each, and nothing else."""
    return _model(
        config,
        "backbone",
        embedding("embeddings"),
        *(_layer("layers", index, norm("norm"), mixer) for index in range(config.num_hidden_layers)),
        norm("norm_f"),
        sizes={},
    )


def _mamba2_mixer(name: str, config: PreTrainedConfig) -> Part:
    return grouped_scan(
        name,
        heads=config.mamba_n_heads,
        head_dim=config.mamba_d_head,
        groups=config.mamba_n_groups,
        state=config.mamba_d_state,
        kernel=config.mamba_d_conv,
    )


def bamba(config: PreTrainedConfig) -> PermutationSpec:
    """Bamba with any of its heads."""
    mixers = {"linear_attention": _mamba2_mixer("mamba", config), "full_attention": _attention("self_attn", config)}
    return _model(
        config,
        "model",
        embedding("embed_tokens"),
        *(
            _layer(
                "layers",
                index,
                norm("input_layernorm"),
                mixers[kind],
                norm("pre_ff_layernorm"),
                gated_mlp("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"),
            )
            for index, kind in enumerate(config.layer_types)
        ),
        norm("final_layernorm"),
        sizes={"neurons": config.intermediate_size},
    )


def falcon_h1(config: PreTrainedConfig) -> PermutationSpec:
    """Falcon-H1 with any of its heads: attention and Mamba-2 side by side."""
    return _model(
        config,
        "model",
        embedding("embed_tokens"),
        *(
            _layer(
                "layers",
                index,
                norm("input_layernorm"),
                _mamba2_mixer("mamba", config),
                _attention("self_attn", config),
                norm("pre_ff_layernorm"),
                gated_mlp("feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"),
            )
            for index in range(config.num_hidden_layers)
        ),
        norm("final_layernorm"),
        sizes={"neurons": config.intermediate_size},
    )


def granitemoehybrid(config: PreTrainedConfig) -> PermutationSpec:
    """Granite 4 with any of its heads: Mamba-2 and attention, experts beside a shared MLP."""
    mixers = {
        "linear_attention": _mamba2_mixer("mamba", config),
        "full_attention": _attention("self_attn", config, rotary=config.position_embedding_type == "rope"),
    }
    routed = fused_experts("block_sparse_moe", "router.layer", "input_linear.weight", "output_linear.weight")
    return _model(
        config,
        "model",
        embedding("embed_tokens"),
        *(
            _layer(
                "layers",
                index,
                norm("input_layernorm"),
                mixers[kind],
                norm("post_attention_layernorm"),
                routed if config.num_local_experts else (),
                linear("shared_mlp.input_linear", "shared.{i} + shared.{i}", "residual"),
                linear("shared_mlp.output_linear", "residual", "shared.{i}"),
            )
            for index, kind in enumerate(config.layer_types)
        ),
        norm("norm"),
        sizes={
            "neurons": config.intermediate_size,
            "experts": config.num_local_experts,
            "shared": config.shared_intermediate_size,
        },
    )


def jamba(config: PreTrainedConfig) -> PermutationSpec:
    """Jamba with any of its heads: Mamba and attention without positions, dense and routed."""
    mixers = {
        "mamba": selective_scan(
            "mamba",
            width=config.mamba_expand * config.hidden_size,
            state=config.mamba_d_state,
            rank=config.mamba_dt_rank,
            kernel=config.mamba_d_conv,
            norms=True,
        ),
        "attention": _attention("self_attn", config, rotary=False),
    }
    dense = gated_mlp("gate_proj", "up_proj", "down_proj")
    routed = mixture_of_experts("router", "experts", "gate_proj", "up_proj", "down_proj")
    return _model(
        config,
        "model",
        embedding("embed_tokens"),
        *(
            _layer(
                "layers",
                index,
                norm("input_layernorm"),
                mixers[kind],
                norm("pre_ff_layernorm"),
                within("feed_forward", routed if experts > 1 else dense),
            )
            for index, (kind, experts) in enumerate(
                zip(config.layers_block_type, config.layers_num_experts, strict=True)
            )
        ),
        norm("final_layernorm"),
        sizes={"neurons": config.intermediate_size, "experts": config.num_experts},
    )


def nemotron_h(config: PreTrainedConfig) -> PermutationSpec:
    """Nemotron-H with any of its heads: one block a layer, Mamba-2, attention, MLP or experts."""
    values = config.to_dict()
    latent = values.get("moe_latent_size")
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
    mixers: dict[str, Part | Sequence[str]] = {
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
    # Experts chosen group by group could only move inside their group.
    grouped = config.n_group > 1
    spec = _model(
        config,
        "backbone",
        embedding("embeddings"),
        *(_layer("layers", index, norm("norm"), mixers[kind]) for index, kind in enumerate(kinds)),
        norm("norm_f"),
        sizes={
            **{f"neurons.{index}": widths[kind] for index, kind in enumerate(kinds) if kind in widths},
            "experts": config.n_routed_experts,
            "shared": config.moe_shared_expert_intermediate_size,
            "expert_latent": latent,
        },
        other_prefixes=("model.",),
    )
    return spec.fix("experts") if grouped and "moe" in kinds else spec


def lfm2(config: PreTrainedConfig) -> PermutationSpec:
    """LFM2 and LFM2-MoE with any of their heads: short gated convolutions and attention."""
    values = config.to_dict()
    convolution = [
        *linear("conv.in_proj", "inner.{i} + inner.{i} + inner.{i}", "residual"),
        f"conv.conv.weight  inner.{{i}}  1  {config.conv_L_cache}",
        "conv.conv.bias?  inner.{i}",
        *linear("conv.out_proj", "residual", "inner.{i}"),
    ]
    mixers: dict[str, Part | Sequence[str]] = {
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
    return _model(
        config,
        "model",
        embedding("embed_tokens"),
        *(
            _layer(
                "layers",
                index,
                norm("operator_norm"),
                mixers[kind],
                norm("ffn_norm"),
                dense if index < first_routed else routed,
            )
            for index, kind in enumerate(config.layer_types)
        ),
        norm("embedding_norm"),
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
    each = heads.query_heads
    lightning = [
        *linear("qkv_proj", heads.by_head, "residual"),
        *linear("output_gate", heads.output, "residual"),
        *norm("norm", heads.output),
        *linear("out_proj", "residual", heads.output),
        f"slope_rate?~  {each}  1  1",
        f"query_decay?~  {each}  block  1",
        f"key_decay?~  {each}  block  1",
        f"diagonal_decay?~  1  {each}  block  block",
    ]
    mixers = {
        "linear_attention": Part(tuple(within("self_attn", lightning)), heads.sizes, heads.symmetric),
        "full_attention": _attention("self_attn", config),
    }
    return _model(
        config,
        "model",
        embedding("embed_tokens"),
        *(
            _layer(
                "layers",
                index,
                norm("input_layernorm"),
                mixers[kind],
                norm("post_attention_layernorm"),
                MIXTRAL_EXPERTS.lines,
            )
            for index, kind in enumerate(config.layer_types)
        ),
        norm("norm"),
        sizes={"neurons": config.intermediate_size, "experts": config.num_local_experts, "block": config.block_size},
        other_prefixes=("transformer.",),
    )


def qwen3_next(config: PreTrainedConfig) -> PermutationSpec:
    """Qwen3-Next and Qwen3.5 with any of their heads: gated delta nets and gated attention, dense or routed."""
    values = config.to_dict()
    mixers = {
        "linear_attention": delta_rule("linear_attn", config, fused=config.model_type == "qwen3_next"),
        "full_attention": _attention("self_attn", config, norms=("q_norm", "k_norm"), gated=True),
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
    block = mixers["full_attention"]
    further = [
        *linear("fc", "residual", "residual + residual"),
        *(line for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm") for line in norm(name)),
        *within(
            "layers.0",
            norm("input_layernorm"),
            block.lines,
            norm("post_attention_layernorm"),
            routed if experts else dense,
        ),
    ]
    return _model(
        config,
        "model",
        embedding("embed_tokens"),
        *(
            _layer(
                "layers",
                index,
                norm("input_layernorm"),
                mixers[kind],
                norm("post_attention_layernorm"),
                routed if is_routed[index] else dense,
            )
            for index, kind in enumerate(config.layer_types)
        ),
        norm("norm"),
        sizes={
            **{
                f"neurons.{index}": values["moe_intermediate_size"] if is_routed[index] else values["intermediate_size"]
                for index in range(config.num_hidden_layers)
            },
            "neurons.mtp": values["moe_intermediate_size"] if experts else values["intermediate_size"],
            "experts": experts,
            "shared": values.get("shared_expert_intermediate_size"),
            **block.sizes,
        },
        # The layer that predicts a further token, which transformers skips.
        beside=optional([line.replace("{i}", "mtp") for line in within("mtp", further)]),
        other_prefixes=("transformer.",),
    )


def recurrent_gemma(config: PreTrainedConfig) -> PermutationSpec:
    """RecurrentGemma with any of its heads: gated linear recurrences, block-diagonal by head, and attention."""
    channels = "(lru_heads.{i} lru_dim.{i}[lru_heads])"
    gate = "lru_heads.{i}  lru_dim.{i}[lru_heads]"
    recurrent = [
        *linear("linear_y", channels, "residual"),
        *linear("linear_x", channels, "residual"),
        *linear("linear_out", "residual", channels),
        f"conv_1d.weight  {channels}  1  {config.conv1d_width}",
        f"conv_1d.bias  {channels}",
        f"rg_lru.recurrent_param  {channels}",
        *(f"rg_lru.{name}_gate_weight  {gate}  lru_dim.{{i}}[lru_heads]" for name in ("input", "recurrent")),
        *(f"rg_lru.{name}_gate_bias  {gate}" for name in ("input", "recurrent")),
    ]
    count = config.num_attention_heads
    sizes: dict[str, int | None] = {"lru_heads": count, "lru_dim": config.lru_width // count}
    mixers = {
        "linear_attention": Part(tuple(within("temporal_block", recurrent)), sizes, ("lru_heads", "lru_dim")),
        "sliding_attention": _attention("temporal_block", config),
    }
    return _model(
        config,
        "model",
        embedding("embed_tokens"),
        *(
            _layer(
                "layers",
                index,
                norm("temporal_pre_norm"),
                mixers[kind],
                norm("channel_pre_norm"),
                gated_mlp("mlp_block.gate_proj", "mlp_block.up_proj", "mlp_block.down_proj"),
            )
            for index, kind in enumerate(config.layer_types)
        ),
        norm("final_norm"),
        sizes={"neurons": config.intermediate_size // 2},
    )


def rwkv(config: PreTrainedConfig) -> PermutationSpec:
    """RWKV with any of its heads."""
    mixed = [f"time_mix_{name}  1  1  residual" for name in ("key", "value", "receptance")]
    time = [
        "time_decay  inner.{i}",
        "time_first  inner.{i}",
        *mixed,
        *(line for name in ("key", "value", "receptance") for line in linear(name, "inner.{i}", "residual")),
        *linear("output", "residual", "inner.{i}"),
    ]
    channel = [
        *(line for line in mixed if "value" not in line),
        *linear("receptance", "residual", "residual"),
        *mlp("key", "value"),
    ]
    return _model(
        config,
        "rwkv",
        embedding("embeddings"),
        layer("blocks", 0, norm("pre_ln")),
        layers(
            "blocks",
            config.num_hidden_layers,
            norm("ln1"),
            within("attention", time),
            norm("ln2"),
            within("feed_forward", channel),
        ),
        Part((), {"inner": config.attention_hidden_size}, ("inner",)),
        norm("ln_out"),
        sizes={"neurons": config.intermediate_size},
    )


def xlstm(config: PreTrainedConfig) -> PermutationSpec:
    """The xLSTM with any of its heads: matrix memories, whose keys meet queries and whose values meet output gates."""
    heads = heads_of(
        config.num_heads,
        head_dim=int(config.hidden_size * config.qk_dim_factor) // config.num_heads,
        value_dim=int(config.hidden_size * config.v_dim_factor) // config.num_heads,
        free_channels=True,
    )
    each = heads.query_heads
    memory = [
        *attention("q", "k", "v", "out_proj", heads),
        *linear("ogate_preact", heads.values, "residual"),
        *linear("igate_preact", each, "residual"),
        *linear("fgate_preact", each, "residual"),
        *norm("multihead_norm", heads.values),
    ]
    return _model(
        config,
        "backbone",
        embedding("embeddings"),
        layers(
            "blocks",
            config.num_blocks,
            norm("norm_mlstm"),
            within("mlstm_layer", memory),
            norm("norm_ffn"),
            gated_mlp("ffn.proj_up_gate", "ffn.proj_up", "ffn.proj_down"),
        ),
        Part((), heads.sizes, heads.symmetric),
        norm("out_norm"),
        sizes={"neurons": _xlstm_width(config)},
    )


def _xlstm_width(config: PreTrainedConfig) -> int:
    """The width that xLSTM makes of its config's factor."""
    multiple = config.ffn_round_up_to_multiple_of
    return int((config.hidden_size * config.ffn_proj_factor + multiple - 1) // multiple * multiple)
