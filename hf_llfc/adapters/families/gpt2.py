"""GPT-2: norm before each block, one fused projection for queries, keys and values, linear maps stored transposed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_llfc.adapters.blocks import conv1d, embedding, head, heads_of, layer_norm, layers, within
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from transformers import GPT2Config

    from hf_llfc.symmetry.spec import PermutationSpec


def gpt2(config: GPT2Config) -> PermutationSpec:
    """GPT-2 with any of its heads."""
    head_dim = config.n_embd // config.n_head
    heads = heads_of(config.n_head, head_dim=head_dim, free_channels=True)
    cross = heads_of(config.n_head, head_dim=head_dim, free_channels=True, prefix="cross_")
    cross_attention = [
        *conv1d("crossattention.c_attn", f"{cross.keys} + {cross.values}", "context"),
        *conv1d("crossattention.q_attn", cross.queries, "residual"),
        *conv1d("crossattention.c_proj", "residual", cross.output),
        *layer_norm("ln_cross_attn"),
    ]
    return declare(
        config,
        within(
            "transformer",
            embedding("wte"),
            embedding("wpe", rows="positions"),
            layers(
                "h",
                config.n_layer,
                layer_norm("ln_1"),
                conv1d("attn.c_attn", f"{heads.queries} + {heads.keys} + {heads.values}", "residual"),
                conv1d("attn.c_proj", "residual", heads.output),
                ["attn.bias?  1 1 positions positions", "attn.masked_bias?"],
                cross_attention if config.add_cross_attention else [],
                layer_norm("ln_2"),
                conv1d("mlp.c_fc", "neurons.{i}", "residual"),
                conv1d("mlp.c_proj", "residual", "neurons.{i}"),
            ),
            layer_norm("ln_f"),
        ),
        head("lm_head", out="vocab"),
        head("score"),
        head("classifier"),
        head("qa_outputs"),
        head("multiple_choice_head.summary"),
        sizes={
            "vocab": config.vocab_size,
            "positions": config.n_positions,
            "residual": config.n_embd,
            "context": config.n_embd,
            **heads.sizes,
            **cross.sizes,
            "neurons": config.n_inner or 4 * config.n_embd,
            "labels": None,
        },
        symmetric=(
            "residual",
            *heads.symmetric,
            "neurons",
            *(cross.symmetric if config.add_cross_attention else ()),
        ),
        outputs=("residual",),
        prefix="transformer.",
    )
