"""GPT-2: norm before each block, one fused projection for queries, keys and values, linear maps stored transposed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_llfc.adapters.blocks import MULTI_HEAD, conv1d, embedding, head, layer_norm, layers, within
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from transformers import GPT2Config

    from hf_llfc.symmetry.spec import PermutationSpec


def gpt2(config: GPT2Config) -> PermutationSpec:
    """GPT-2 with any of its heads."""
    cross_attention = [
        *conv1d("crossattention.c_attn", f"{MULTI_HEAD} + {MULTI_HEAD}", "encoder"),
        *conv1d("crossattention.q_attn", MULTI_HEAD, "residual"),
        *conv1d("crossattention.c_proj", "residual", MULTI_HEAD),
        *layer_norm("ln_cross_attn"),
    ]
    cross_attention = [line.replace("heads.{i}", "cross_heads.{i}") for line in cross_attention]
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
                conv1d("attn.c_attn", f"{MULTI_HEAD} + {MULTI_HEAD} + {MULTI_HEAD}", "residual"),
                conv1d("attn.c_proj", "residual", MULTI_HEAD),
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
            "encoder": config.n_embd,
            "heads": config.n_head,
            "cross_heads": config.n_head,
            "head_dim": config.n_embd // config.n_head,
            "neurons": config.n_inner or 4 * config.n_embd,
            "labels": None,
        },
        symmetric=("residual", "heads", "neurons", *(["cross_heads"] if config.add_cross_attention else [])),
        outputs=("residual",),
        prefix="transformer.",
    )
