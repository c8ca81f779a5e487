"""MPNet: BERT with one table of relative positions that gives each head of every layer its bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_llfc.adapters.blocks import (
    attention,
    embedding,
    head,
    heads_of,
    layer_norm,
    layers,
    mlp,
    one_for_all_layers,
    within,
)
from hf_llfc.adapters.declare import declare
from hf_llfc.adapters.families.bert import classifier, deep_classifier, masked_tokens

if TYPE_CHECKING:
    from transformers import MPNetConfig

    from hf_llfc.symmetry.spec import PermutationSpec


def mpnet(config: MPNetConfig) -> PermutationSpec:
    """MPNet with any of its heads."""
    head_dim = config.hidden_size // config.num_attention_heads
    heads = one_for_all_layers(heads_of(config.num_attention_heads, head_dim=head_dim, free_channels=True))
    return declare(
        config,
        within(
            "mpnet",
            embedding("embeddings.word_embeddings"),
            embedding("embeddings.position_embeddings", "positions"),
            ["embeddings.position_ids?  1 positions"],
            layer_norm("embeddings.LayerNorm"),
            ["encoder.relative_attention_bias.weight  distances heads.all"],
            layers(
                "encoder.layer",
                config.num_hidden_layers,
                attention(
                    ("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"),
                    heads,
                    bias=True,
                    output_bias=True,
                ),
                layer_norm("attention.LayerNorm"),
                mlp("intermediate.dense", "output.dense", bias=True),
                layer_norm("output.LayerNorm"),
            ),
        ),
        masked_tokens("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
        deep_classifier(),
        classifier("mpnet.pooler.dense"),
        head("qa_outputs"),
        sizes={
            "vocab": config.vocab_size,
            "positions": config.max_position_embeddings,
            "distances": config.relative_attention_num_buckets,
            **dict.fromkeys(("residual", "pooled", "classifier"), config.hidden_size),
            **heads.sizes,
            "neurons": config.intermediate_size,
            "labels": None,
        },
        symmetric=("residual", "pooled", "classifier", "neurons", *heads.symmetric),
        outputs=("residual", "pooled"),
        prefix="mpnet.",
    )
