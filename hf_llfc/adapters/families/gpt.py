"""The GPT line before Llama: learned or ALiBi positions, LayerNorm, fused projections of several layouts.

What differs from one family to the next is a row of `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_llfc.adapters.blocks import (
    Heads,
    embedding,
    head,
    heads_of,
    layers,
    linear,
    mlp,
    norm,
    within,
)
from hf_llfc.adapters.compose import occurring
from hf_llfc.adapters.declare import declare
from hf_llfc.adapters.families.llama_parts import rotary_channels

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hf_llfc.symmetry.spec import PermutationSpec

# Buffers of old checkpoints: the causal mask, and what a masked score became.
OLD_BUFFERS = ("bias?  1 1 positions positions", "masked_bias?", "rotary_emb.inv_freq?  frequencies")

DENSE = tuple(mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"))
DENSE_WITH_BIASES = tuple(mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", bias=True))


def _free_heads(config: PreTrainedConfig) -> Heads:
    count = config.num_attention_heads
    return heads_of(count, head_dim=config.hidden_size // count, free_channels=True)


def _neox_heads(config: PreTrainedConfig) -> Heads:
    count = config.num_attention_heads
    head_dim = config.hidden_size // count
    return heads_of(count, head_dim=head_dim, rotary_dim=rotary_channels(config.to_dict(), head_dim))


def _falcon_heads(config: PreTrainedConfig) -> Heads:
    """The heads of the first or the second architecture."""
    count = config.num_attention_heads
    kv_heads = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else count
    return heads_of(count, kv_heads, head_dim=config.hidden_size // count, free_channels=config.alibi)


def _dbrx_heads(config: PreTrainedConfig) -> Heads:
    return heads_of(config.n_heads, config.attn_config.kv_n_heads, head_dim=config.d_model // config.n_heads)


def _fused(block: str, query_key_value: str, output: str, heads: Heads, *, bias: bool | None = None) -> list[str]:
    """Attention with one projection that gives queries, keys and values head by head."""
    lines = [
        *linear(query_key_value, heads.by_head, "residual", bias=bias),
        *linear(output, "residual", heads.output, bias=bias),
    ]
    return within(block, lines)


def _dbrx_layer(heads: Heads) -> list[str]:
    """All experts of a layer share one tensor."""
    return [
        *within(
            "norm_attn_norm",
            norm("norm_1"),
            linear("attn.Wqkv", heads.fused, "residual", bias=False),
            linear("attn.out_proj", "residual", heads.output, bias=False),
            norm("norm_2"),
        ),
        *linear("ffn.router.layer", "experts.{i}", "residual", bias=False),
        *(f"ffn.experts.mlp.{name}  (experts.{{i}} neurons.{{i}}[experts])  residual" for name in ("w1", "v1", "w2")),
    ]


def _falcon_layer(heads: Heads) -> list[str]:
    norms = ("input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp")
    return [
        *(line for name in norms for line in _optional(norm(name))),
        *_fused("self_attention", "query_key_value", "dense", heads),
        *(f"self_attention.{name}.inv_freq?  frequencies" for name in ("rotary_emb", "maybe_rotary")),
        *DENSE,
    ]


@dataclass(frozen=True)
class Layout:
    """What a family of the GPT line has in place of GPT-Neo's parts.

    Attributes:
        heads: Gives the axes of its attention for a config.
        layer: Declares a layer, given its heads.
        neurons: Gives the width of its MLP for a config; four times the residual stream where None.
        root: The head prefix.
        embeddings: The embedding, and what stands before the layers beside it.
        layers: Where the layers are.
        last_norm: The norm after all layers.
        output: The output head.
        alibi: Whether positions are biases of the scores, with a slope of its own for each head.
    """

    heads: Callable[[PreTrainedConfig], Heads]
    layer: Callable[[Heads], list[str]]
    neurons: Callable[[PreTrainedConfig], int | None] = lambda config: None
    root: str = "transformer"
    embeddings: tuple[str, ...] = tuple(embedding("wte"))
    layers: str = "h"
    last_norm: str = "ln_f"
    output: str = "lm_head"
    alibi: Callable[[PreTrainedConfig], bool] = lambda config: False


LAYOUTS: dict[str, Layout] = {
    "bloom": Layout(
        _free_heads,
        lambda heads: [
            *norm("input_layernorm"),
            *_fused("self_attention", "query_key_value", "dense", heads, bias=True),
            *norm("post_attention_layernorm"),
            *DENSE_WITH_BIASES,
        ],
        embeddings=(*embedding("word_embeddings"), *norm("word_embeddings_layernorm")),
        alibi=lambda config: True,
    ),
    "dbrx": Layout(
        _dbrx_heads,
        _dbrx_layer,
        lambda config: config.ffn_config.ffn_hidden_size,
        layers="blocks",
        last_norm="norm_f",
    ),
    "falcon": Layout(
        _falcon_heads,
        _falcon_layer,
        lambda config: config.ffn_hidden_size,
        embeddings=tuple(embedding("word_embeddings")),
        alibi=lambda config: config.alibi,
    ),
    "gpt_neox": Layout(
        _neox_heads,
        lambda heads: [
            *norm("input_layernorm"),
            *norm("post_attention_layernorm"),
            *_fused("attention", "query_key_value", "dense", heads),
            *within("attention", ["dense_bias?  residual"], OLD_BUFFERS),
            *DENSE,
        ],
        lambda config: config.intermediate_size,
        root="gpt_neox",
        embeddings=tuple(embedding("embed_in")),
        layers="layers",
        last_norm="final_layer_norm",
        output="embed_out",
    ),
}


def gpt(config: PreTrainedConfig) -> PermutationSpec:
    """A family of `LAYOUTS` with any of its heads."""
    layout = LAYOUTS[config.model_type]
    heads, width = layout.heads(config), config.hidden_size
    lines = [
        *within(
            layout.root,
            layout.embeddings,
            layers(layout.layers, config.num_hidden_layers, layout.layer(heads)),
            norm(layout.last_norm),
        ),
        *head(layout.output, out="vocab"),
        *(line for name in ("score", "classifier", "qa_outputs") for line in head(name)),
    ]
    fixed = ("heads", "kv", "q") if layout.alibi(config) else ()
    return declare(
        config,
        lines,
        sizes={
            "vocab": config.vocab_size,
            "positions": None,
            "frequencies": None,
            "residual": width,
            "neurons": layout.neurons(config) or 4 * width,
            "labels": None,
            **heads.sizes,
            "experts": config.ffn_config.moe_num_experts if config.model_type == "dbrx" else None,
        },
        symmetric=[
            axis for axis in occurring(("residual", *heads.symmetric, "neurons", "experts"), lines) if axis not in fixed
        ],
        outputs=("residual",),
        prefix=f"{layout.root}.",
        other_prefixes=() if layout.root == "transformer" else ("transformer.",),
    )


def _optional(lines: Iterable[str]) -> list[str]:
    return [line.replace(".weight  ", ".weight?  ") for line in lines]
