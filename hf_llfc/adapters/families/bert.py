"""BERT and the encoders of its layout: one residual stream throughout, norms after the blocks.

DistilBERT names everything differently; the others differ from BERT in the rows of `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_llfc.adapters.blocks import (
    Heads,
    attention,
    embedding,
    head,
    heads_of,
    layer_norm,
    layers,
    linear,
    mlp,
    optional_norm,
    windowed_attention,
    within,
)
from hf_llfc.adapters.compose import occurring, renamed
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from transformers import BertConfig, DistilBertConfig

    from hf_llfc.symmetry.spec import PermutationSpec

# Checkpoints converted from TensorFlow, bert-base-uncased for one.
OLD_ENDINGS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def classifier(hidden: str) -> list[str]:
    """A linear classifier of what a hidden layer gives out; of every token where a checkpoint has no such layer."""
    return [
        *linear(hidden, "pooled", "residual", optional=True),
        *(f"{line}  if {hidden}.weight" for line in head("classifier", into="pooled")),
        *(f"{line}  unless {hidden}.weight" for line in head("classifier")),
    ]


def deep_classifier(name: str = "classifier") -> list[str]:
    """A classifier of one token, with a hidden layer of its own."""
    return [*linear(f"{name}.dense", "classifier", "residual", optional=True), *head(f"{name}.out_proj", "classifier")]


def masked_tokens(name: str, norm: str, decoder: str, bias: str, axis: str = "residual") -> list[str]:
    """A head that predicts tokens through one more hidden layer, by the embedding of each token."""
    return [
        *linear(name, axis, "residual", optional=True),
        *optional_norm(norm, axis),
        f"{bias}?  vocab",
        *head(decoder, axis, out="vocab"),
    ]


def bert_heads(prefix: str) -> list[str]:
    """BERT's heads: masked tokens, the next sentence, classes from the pooler."""
    name = "cls.predictions"
    return [
        *masked_tokens(f"{name}.transform.dense", f"{name}.transform.LayerNorm", f"{name}.decoder", f"{name}.bias"),
        *head("cls.seq_relationship", into="pooled"),
        *classifier(f"{prefix}.pooler.dense"),
    ]


def roberta_heads(prefix: str) -> list[str]:
    """RoBERTa's heads: masked tokens, classes of sequences, choices from the pooler."""
    return [
        *masked_tokens("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"),
        *deep_classifier(),
        *classifier(f"{prefix}.pooler.dense"),
    ]


def electra_heads(prefix: str) -> list[str]:
    """ELECTRA's generator, whose predictions have the width of the embedding, and its discriminator."""
    name = "generator_predictions"
    return [
        *masked_tokens(f"{name}.dense", f"{name}.LayerNorm", "generator_lm_head", f"{name}.bias", "embedding"),
        *linear("discriminator_predictions.dense", "discriminator", "residual", optional=True),
        *head("discriminator_predictions.dense_prediction", into="discriminator"),
        *deep_classifier(),
        *classifier("sequence_summary.summary"),
    ]


@dataclass(frozen=True)
class Layout:
    """What sets a family apart from BERT.

    Attributes:
        prefix: The head prefix.
        heads: From the head prefix to its task heads and their poolers.
        crosses: Whether it always attends to an encoder and has no types of tokens, as BLIP's text models do; others
            attend to one where their config says so.
        windowed: Whether attention is Longformer's.
        projection: What leads from the width of the embedding to that of the residual stream, where they differ.
    """

    prefix: str
    heads: Callable[[str], list[str]]
    crosses: bool = False
    windowed: bool = False
    projection: str | None = None


ROBERTA = Layout("roberta", roberta_heads)

LAYOUTS: dict[str, Layout] = {
    "bert": Layout("bert", bert_heads),
    "blip_text_model": Layout("bert", bert_heads, crosses=True),
    "camembert": ROBERTA,
    "chinese_clip_text_model": Layout("bert", bert_heads),
    "data2vec-text": Layout("data2vec_text", roberta_heads),
    "electra": Layout("electra", electra_heads, projection="embeddings_project"),
    "longformer": Layout("longformer", roberta_heads, windowed=True),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
}

SYMMETRIC = ("residual", "embedding", "neurons", "pooled", "classifier", "discriminator")


def bert(config: BertConfig) -> PermutationSpec:
    """A family of `LAYOUTS` with any of its heads."""
    layout = LAYOUTS[config.model_type]
    options = config.to_dict()
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    own, cross = (heads_of(heads, head_dim=head_dim, free_channels=True, prefix=prefix) for prefix in ("", "cross_"))
    width = "embedding" if layout.projection and options["embedding_size"] != config.hidden_size else "residual"

    def attend(name: str, heads: Heads, context: str | None = None) -> list[str]:
        parts = (f"{name}.self.query", f"{name}.self.key", f"{name}.self.value", f"{name}.output.dense")
        norm = layer_norm(f"{name}.output.LayerNorm")
        if layout.windowed:
            return [*windowed_attention(f"{name}.self", f"{name}.output.dense", heads, "global_head_dim"), *norm]
        return [*attention(parts, heads, context=context, bias=True, output_bias=True), *norm]

    blocks = [
        *within(
            layout.prefix,
            embedding("embeddings.word_embeddings", axis=width),
            embedding("embeddings.position_embeddings", "positions", width),
            [] if layout.crosses else embedding("embeddings.token_type_embeddings", "token_types", width),
            layer_norm("embeddings.LayerNorm", width),
            ["embeddings.position_ids?  1 positions", "embeddings.token_type_ids?  1 positions"],
            linear(layout.projection, "residual", width, bias=True)
            if layout.projection and width != "residual"
            else [],
            layers(
                "encoder.layer",
                config.num_hidden_layers,
                attend("attention", own),
                attend("crossattention", cross, "context")
                if layout.crosses or options.get("add_cross_attention")
                else [],
                mlp("intermediate.dense", "output.dense", bias=True),
                layer_norm("output.LayerNorm"),
            ),
        ),
        *renamed(layout.heads(layout.prefix), embedding=width),
        *head("qa_outputs"),
    ]
    return declare(
        config,
        blocks,
        sizes={
            "vocab": config.vocab_size,
            "positions": config.max_position_embeddings,
            "token_types": options.get("type_vocab_size"),
            "embedding": options.get("embedding_size"),
            "context": None,
            **dict.fromkeys(("residual", "pooled", "classifier", "discriminator"), config.hidden_size),
            **own.sizes,
            **cross.sizes,
            "global_head_dim": head_dim,
            "neurons": config.intermediate_size,
            "labels": None,
        },
        symmetric=occurring((*SYMMETRIC, "global_head_dim", *own.symmetric, *cross.symmetric), blocks),
        outputs=("residual", "pooled"),
        prefix=f"{layout.prefix}.",
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
                    ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
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
        optional_norm("vocab_layer_norm"),
        head("vocab_projector", out="vocab"),
        classifier("pre_classifier"),
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
        symmetric=("residual", "pooled", "neurons", *heads.symmetric),
        outputs=("residual",),
        prefix="distilbert.",
    )
