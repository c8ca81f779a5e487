"""DeBERTa and DeBERTa-v2/v3: BERT with relative positions as a stream of their own, projected like queries and keys."""

from __future__ import annotations

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
    within,
)
from hf_llfc.adapters.compose import occurring
from hf_llfc.adapters.declare import declare
from hf_llfc.adapters.families.bert import OLD_ENDINGS, classifier, masked_tokens

if TYPE_CHECKING:
    from transformers import DebertaConfig, DebertaV2Config

    from hf_llfc.symmetry.spec import PermutationSpec


def deberta(config: DebertaConfig) -> PermutationSpec:
    """DeBERTa: queries, keys and values fused head by head; only queries and values have a bias."""
    heads = _heads(config)
    # Every head's channels lie together: its query, its key, its value.
    fused = f"(heads.{{i}} {' + '.join(_inside(part) for part in (heads.queries, heads.keys, heads.values))})"
    attend = [
        *linear("attention.self.in_proj", fused, "residual", bias=False),
        f"attention.self.q_bias  {heads.queries}",
        f"attention.self.v_bias  {heads.values}",
        *linear("attention.self.pos_proj", heads.keys, "residual", bias=False, optional=True),
        *linear("attention.self.pos_q_proj", heads.queries, "residual", optional=True),
        "attention.self.head_logits_proj.weight?  heads.{i} heads.{i}",
        "attention.self.head_weights_proj.weight?  heads.{i} heads.{i}",
        *linear("attention.output.dense", "residual", heads.output, bias=True),
    ]
    return _declare(config, heads, attend, [])


def deberta_v2(config: DebertaV2Config) -> PermutationSpec:
    """DeBERTa-v2 and v3: separate projections, which relative positions share or not; a convolution beside layer 0."""
    heads = _heads(config)
    options = config.to_dict()
    name = "attention.self"
    attend = [
        *attention(
            (f"{name}.query_proj", f"{name}.key_proj", f"{name}.value_proj", "attention.output.dense"),
            heads,
            bias=True,
            output_bias=True,
        ),
        *linear(f"{name}.pos_key_proj", heads.keys, "residual", optional=True),
        *linear(f"{name}.pos_query_proj", heads.queries, "residual", optional=True),
    ]
    groups = options.get("conv_groups", 1)
    into = "residual" if groups == 1 else str(config.hidden_size // groups)
    convolution = [
        f"encoder.conv.conv.weight?  residual {into} kernel",
        "encoder.conv.conv.bias?  residual",
        *optional_norm("encoder.conv.LayerNorm"),
        *optional_norm("encoder.LayerNorm"),
    ]
    return _declare(config, heads, attend, convolution, fixed=() if groups == 1 else ("residual",))


def _heads(config: DebertaConfig | DebertaV2Config) -> Heads:
    head_dim = config.hidden_size // config.num_attention_heads
    return heads_of(config.num_attention_heads, head_dim=head_dim, free_channels=True)


def _inside(expression: str) -> str:
    """The channels of `(heads.{i} channels)`."""
    return expression.removeprefix("(heads.{i} ").removesuffix(")")


def _declare(
    config: DebertaConfig | DebertaV2Config,
    heads: Heads,
    attend: list[str],
    extra: list[str],
    fixed: tuple[str, ...] = (),
) -> PermutationSpec:
    width = config.to_dict().get("embedding_size") or config.hidden_size
    axis = "residual" if width == config.hidden_size else "embedding"
    blocks = [
        *within(
            "deberta",
            embedding("embeddings.word_embeddings", axis=axis),
            [f"embeddings.position_embeddings.weight?  positions {axis}"],
            [f"embeddings.token_type_embeddings.weight?  token_types {axis}"],
            linear("embeddings.embed_proj", "residual", axis, bias=False) if axis == "embedding" else [],
            layer_norm("embeddings.LayerNorm"),
            ["embeddings.position_ids?  1 positions"],
            layers(
                "encoder.layer",
                config.num_hidden_layers,
                attend,
                layer_norm("attention.output.LayerNorm"),
                mlp("intermediate.dense", "output.dense", bias=True),
                layer_norm("output.LayerNorm"),
            ),
            ["encoder.rel_embeddings.weight?  distances residual"],
            extra,
        ),
        *masked_tokens(
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
            "cls.predictions.bias",
            axis,
        ),
        *masked_tokens(
            "lm_predictions.lm_head.dense",
            "lm_predictions.lm_head.LayerNorm",
            "lm_predictions.lm_head.decoder",
            "lm_predictions.lm_head.bias",
        ),
        # The discriminator that DeBERTa-v3 was trained with; transformers has no class for it.
        *linear("mask_predictions.dense", "discriminator", "residual", optional=True),
        *optional_norm("mask_predictions.LayerNorm", "discriminator"),
        *head("mask_predictions.classifier", into="discriminator"),
        *classifier("pooler.dense"),
        *head("qa_outputs"),
    ]
    symmetric = tuple(
        name
        for name in ("embedding", "residual", "pooled", "discriminator", "neurons", *heads.symmetric)
        if name not in fixed
    )
    return declare(
        config,
        blocks,
        sizes={
            "vocab": config.vocab_size,
            "positions": config.max_position_embeddings,
            "token_types": config.type_vocab_size,
            "distances": None,
            "kernel": None,
            "embedding": width,
            "residual": config.hidden_size,
            "pooled": config.hidden_size,
            "discriminator": config.hidden_size,
            **heads.sizes,
            "neurons": config.intermediate_size,
            "labels": None,
        },
        symmetric=occurring(symmetric, blocks),
        outputs=("residual",),
        prefix="deberta.",
        old_endings=OLD_ENDINGS,
    )
