"""ALBERT: an embedding of its own width, and few groups of layers that are gone through again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_llfc.adapters.blocks import (
    attention,
    embedding,
    head,
    heads_of,
    layer_norm,
    layers_of_stage,
    linear,
    mlp,
    within,
)
from hf_llfc.adapters.declare import declare
from hf_llfc.adapters.families.bert import OLD_ENDINGS, masked_tokens

if TYPE_CHECKING:
    from transformers import AlbertConfig

    from hf_llfc.symmetry.spec import PermutationSpec


def albert(config: AlbertConfig) -> PermutationSpec:
    """ALBERT with any of its heads; what layers share is one tensor, and so one axis."""
    heads = heads_of(
        config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        free_channels=True,
    )
    layer = [
        *attention(
            "attention.query",
            "attention.key",
            "attention.value",
            "attention.dense",
            heads,
            bias=True,
            output_bias=True,
        ),
        *layer_norm("attention.LayerNorm"),
        *mlp("ffn", "ffn_output", bias=True),
        *layer_norm("full_layer_layer_norm"),
    ]
    groups = [
        line
        for group in range(config.num_hidden_groups)
        for line in layers_of_stage(
            f"encoder.albert_layer_groups.{group}.albert_layers", group, config.inner_group_num, layer
        )
    ]
    return declare(
        config,
        within(
            "albert",
            embedding("embeddings.word_embeddings", axis="embedding"),
            embedding("embeddings.position_embeddings", "positions", "embedding"),
            embedding("embeddings.token_type_embeddings", "token_types", "embedding"),
            layer_norm("embeddings.LayerNorm", "embedding"),
            ["embeddings.position_ids?  1 positions", "embeddings.token_type_ids?  1 positions"],
            linear("encoder.embedding_hidden_mapping_in", "residual", "embedding", bias=True),
            groups,
            linear("pooler", "pooled", "residual", optional=True),
        ),
        masked_tokens(
            "predictions.dense", "predictions.LayerNorm", "predictions.decoder", "predictions.bias", "embedding"
        ),
        head("sop_classifier.classifier", into="pooled"),
        [f"{line}  if albert.pooler.weight" for line in head("classifier", into="pooled")],
        [f"{line}  unless albert.pooler.weight" for line in head("classifier")],
        head("qa_outputs"),
        sizes={
            "vocab": config.vocab_size,
            "positions": config.max_position_embeddings,
            "token_types": config.type_vocab_size,
            "embedding": config.embedding_size,
            "residual": config.hidden_size,
            "pooled": config.hidden_size,
            **heads.sizes,
            "neurons": config.intermediate_size,
            "labels": None,
        },
        symmetric=("embedding", "residual", "pooled", "neurons", *heads.symmetric),
        outputs=("residual", "pooled"),
        prefix="albert.",
        old_endings=OLD_ENDINGS,
    )
