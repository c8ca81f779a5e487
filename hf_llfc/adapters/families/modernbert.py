"""ModernBERT: an encoder with rotary positions, fused projections and gated MLPs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_llfc.adapters.blocks import embedding, head, heads_of, layers, linear, norm, optional_norm, within
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from transformers import ModernBertConfig

    from hf_llfc.symmetry.spec import PermutationSpec


def modernbert(config: ModernBertConfig) -> PermutationSpec:
    """ModernBERT with any of its heads."""
    heads = heads_of(config.num_attention_heads, head_dim=config.hidden_size // config.num_attention_heads)
    return declare(
        config,
        within(
            "model",
            embedding("embeddings.tok_embeddings"),
            norm("embeddings.norm"),
            layers(
                "layers",
                config.num_hidden_layers,
                optional_norm("attn_norm"),  # layer 0 reads the norm of the embedding
                linear("attn.Wqkv", f"{heads.queries} + {heads.keys} + {heads.values}", "residual"),
                linear("attn.Wo", "residual", heads.output),
                norm("mlp_norm"),
                linear("mlp.Wi", "neurons.{i} + neurons.{i}", "residual"),
                linear("mlp.Wo", "residual", "neurons.{i}"),
            ),
            norm("final_norm"),
        ),
        linear("head.dense", "residual", "residual", optional=True),
        optional_norm("head.norm"),
        head("decoder", out="vocab"),
        head("classifier"),
        sizes={
            "vocab": config.vocab_size,
            "residual": config.hidden_size,
            **heads.sizes,
            "neurons": config.intermediate_size,
            "labels": None,
        },
        symmetric=("residual", "neurons", *heads.symmetric),
        outputs=("residual",),
        prefix="model.",
    )
