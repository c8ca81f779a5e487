"""ESM: BERT's names, rotary or learned positions, and a head that reads contacts from all heads of all layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_llfc.adapters.blocks import (
    attention,
    embedding,
    heads_of,
    layer_norm,
    layers,
    mlp,
    optional_norm,
    within,
)
from hf_llfc.adapters.declare import declare
from hf_llfc.adapters.families.bert import OLD_ENDINGS, classifier, deep_classifier, masked_tokens

if TYPE_CHECKING:
    from transformers import EsmConfig

    from hf_llfc.symmetry.spec import PermutationSpec


def esm(config: EsmConfig) -> PermutationSpec:
    """ESM-2 and its kin with any of their heads, but for folding."""
    depth = config.num_hidden_layers
    heads = heads_of(
        config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        free_channels=config.position_embedding_type != "rotary",
    )
    return declare(
        config,
        within(
            "esm",
            embedding("embeddings.word_embeddings"),
            ["embeddings.position_embeddings.weight?  positions residual", "embeddings.position_ids?  1 positions"],
            optional_norm("embeddings.layer_norm"),
            layers(
                "encoder.layer",
                depth,
                layer_norm("attention.LayerNorm"),
                attention(
                    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
                    heads,
                    bias=True,
                    output_bias=True,
                ),
                ["attention.self.rotary_embeddings.inv_freq?  frequencies"],
                layer_norm("LayerNorm"),
                mlp("intermediate.dense", "output.dense", bias=True),
            ),
            # `save_pretrained` writes one table for all layers, under a name with a literal star.
            ["encoder.layer.*.attention.self.rotary_embeddings.inv_freq?  frequencies"],
            ["rotary_embeddings.inv_freq?  frequencies"],
            layer_norm("encoder.emb_layer_norm_after"),
            [f"contact_head.regression.weight?  1 {' + '.join(f'heads.{layer}' for layer in range(depth))}"],
            ["contact_head.regression.bias?  1"],
        ),
        masked_tokens("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
        deep_classifier(),
        classifier("esm.pooler.dense"),
        sizes={
            "vocab": config.vocab_size,
            "positions": config.max_position_embeddings,
            "frequencies": None,
            **dict.fromkeys(("residual", "pooled", "classifier"), config.hidden_size),
            **heads.sizes,
            "neurons": config.intermediate_size,
            "labels": None,
        },
        symmetric=("residual", "pooled", "classifier", "neurons", *heads.symmetric),
        outputs=("residual", "pooled"),
        prefix="esm.",
        old_endings=OLD_ENDINGS,
    )
