"""BERT, RoBERTa and DistilBERT: encoders with the norm after each block, one residual stream throughout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_llfc.adapters.blocks import Heads, attention, embedding, head, heads_of, layer_norm, layers, linear, mlp, within
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from transformers import BertConfig, DistilBertConfig, RobertaConfig

    from hf_llfc.symmetry.spec import PermutationSpec

SYMMETRIC = ("residual", "pooled", "neurons")

# Checkpoints converted from TensorFlow, bert-base-uncased for one.
OLD_ENDINGS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def _heads(config: BertConfig | RobertaConfig) -> Heads:
    heads = config.num_attention_heads
    return heads_of(heads, head_dim=config.hidden_size // heads, free_channels=True)


def _encoder(config: BertConfig | RobertaConfig, prefix: str) -> list[str]:
    return within(
        prefix,
        embedding("embeddings.word_embeddings"),
        embedding("embeddings.position_embeddings", rows="positions"),
        embedding("embeddings.token_type_embeddings", rows="token_types"),
        layer_norm("embeddings.LayerNorm"),
        ["embeddings.position_ids?  1 positions", "embeddings.token_type_ids?  1 positions"],
        layers(
            "encoder.layer",
            config.num_hidden_layers,
            attention(
                "attention.self.query",
                "attention.self.key",
                "attention.self.value",
                "attention.output.dense",
                _heads(config),
                bias=True,
                output_bias=True,
            ),
            layer_norm("attention.output.LayerNorm"),
            mlp("intermediate.dense", "output.dense", bias=True),
            layer_norm("output.LayerNorm"),
        ),
        linear("pooler.dense", "pooled", "residual", optional=True),
    )


def _sizes(config: BertConfig | RobertaConfig) -> dict[str, int | None]:
    return {
        "vocab": config.vocab_size,
        "positions": config.max_position_embeddings,
        "token_types": config.type_vocab_size,
        "residual": config.hidden_size,
        "pooled": config.hidden_size,
        **_heads(config).sizes,
        "neurons": config.intermediate_size,
        "labels": None,
    }


def bert(config: BertConfig) -> PermutationSpec:
    """BERT with any of its heads."""
    return declare(
        config,
        _encoder(config, "bert"),
        linear("cls.predictions.transform.dense", "residual", "residual", optional=True),
        [
            "cls.predictions.transform.LayerNorm.weight?  residual",
            "cls.predictions.transform.LayerNorm.bias?  residual",
        ],
        ["cls.predictions.bias?  vocab"],
        head("cls.predictions.decoder", out="vocab"),
        head("cls.seq_relationship", into="pooled"),
        [f"{line}  if bert.pooler.dense.weight" for line in head("classifier", into="pooled")],
        [f"{line}  unless bert.pooler.dense.weight" for line in head("classifier")],
        head("qa_outputs"),
        sizes=_sizes(config),
        symmetric=(*SYMMETRIC, *_heads(config).symmetric),
        outputs=("residual", "pooled"),
        prefix="bert.",
        old_endings=OLD_ENDINGS,
    )


def roberta(config: RobertaConfig) -> PermutationSpec:
    """RoBERTa with any of its heads."""
    return declare(
        config,
        _encoder(config, "roberta"),
        linear("lm_head.dense", "residual", "residual", optional=True),
        ["lm_head.layer_norm.weight?  residual", "lm_head.layer_norm.bias?  residual"],
        ["lm_head.bias?  vocab"],
        head("lm_head.decoder", out="vocab"),
        linear("classifier.dense", "classifier", "residual", optional=True),
        head("classifier.out_proj", into="classifier"),
        [f"{line}  if roberta.pooler.dense.weight" for line in head("classifier", into="pooled")],
        [f"{line}  unless roberta.pooler.dense.weight" for line in head("classifier")],
        head("qa_outputs"),
        sizes={**_sizes(config), "classifier": config.hidden_size},
        symmetric=(*SYMMETRIC, *_heads(config).symmetric, "classifier"),
        outputs=("residual", "pooled"),
        prefix="roberta.",
        old_endings=OLD_ENDINGS,
    )


def distilbert(config: DistilBertConfig) -> PermutationSpec:
    """DistilBERT with any of its heads."""
    heads = heads_of(config.n_heads, head_dim=config.dim // config.n_heads, free_channels=True)
    return declare(
        config,
        within(
            "distilbert",
            embedding("embeddings.word_embeddings"),
            embedding("embeddings.position_embeddings", rows="positions"),
            layer_norm("embeddings.LayerNorm"),
            ["embeddings.position_ids?  1 positions"],
            layers(
                "transformer.layer",
                config.n_layers,
                attention(
                    "attention.q_lin",
                    "attention.k_lin",
                    "attention.v_lin",
                    "attention.out_lin",
                    heads,
                    bias=True,
                    output_bias=True,
                ),
                layer_norm("sa_layer_norm"),
                mlp("ffn.lin1", "ffn.lin2", bias=True),
                layer_norm("output_layer_norm"),
            ),
        ),
        linear("vocab_transform", "residual", "residual", optional=True),
        ["vocab_layer_norm.weight?  residual", "vocab_layer_norm.bias?  residual"],
        head("vocab_projector", out="vocab"),
        linear("pre_classifier", "pooled", "residual", optional=True),
        [f"{line}  if pre_classifier.weight" for line in head("classifier", into="pooled")],
        [f"{line}  unless pre_classifier.weight" for line in head("classifier")],
        head("qa_outputs"),
        sizes={
            "vocab": config.vocab_size,
            "positions": config.max_position_embeddings,
            "residual": config.dim,
            "pooled": config.dim,
            **heads.sizes,
            "neurons": config.hidden_dim,
            "labels": None,
        },
        symmetric=(*SYMMETRIC, *heads.symmetric),
        outputs=("residual",),
        prefix="distilbert.",
    )
