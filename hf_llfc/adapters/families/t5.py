"""T5 and its line: encoder and decoder over one embedding, positions as biases of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.blocks import (
    Heads,
    attention,
    embedding,
    head,
    heads_of,
    layers,
    linear,
    one_for_all_layers,
    rms_norm,
    within,
)
from hf_llfc.adapters.compose import occurring, only_if, renamed
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from hf_llfc.symmetry.spec import PermutationSpec

# LongT5's encoder attends to windows, or to windows and block sums.
ENCODER_ATTENTION = {"local": "LocalSelfAttention", "transient-global": "TransientGlobalSelfAttention"}


def t5(config: Any) -> PermutationSpec:
    """T5, mT5, UMT5 and LongT5 with any of their heads, or the encoder alone."""
    # UMT5 has a table of position biases in each layer; elsewhere the first layer's serves all, in one order of heads.
    own_table = config.model_type == "umt5"
    encoder, decoder, cross = (
        heads_of(config.num_heads, head_dim=config.d_kv, free_channels=True, prefix=prefix)
        for prefix in ("encoder_", "decoder_", "cross_")
    )
    if not own_table:
        encoder, decoder = one_for_all_layers(encoder), one_for_all_layers(decoder)
    attention_name = ENCODER_ATTENTION.get(config.to_dict().get("encoder_attention_type", ""), "SelfAttention")

    def attend(layer: int, name: str, norm: str, heads: Heads) -> list[str]:
        parts = (f"{name}.q", f"{name}.k", f"{name}.v", f"{name}.o")
        block = [*attention(parts, heads, bias=False, output_bias=False), *rms_norm(norm)]
        return within(f"layer.{layer}", block)

    def feed_forward(layer: int, neurons: str) -> list[str]:
        name = f"layer.{layer}.DenseReluDense"
        ups = ("wi_0", "wi_1") if config.is_gated_act else ("wi",)
        block = [
            *(line for up in ups for line in linear(f"{name}.{up}", "neurons.{i}", "residual", bias=False)),
            *linear(f"{name}.wo", "residual", "neurons.{i}", bias=False),
            *rms_norm(f"layer.{layer}.layer_norm"),
        ]
        return renamed(block, neurons=neurons)

    def table(stack: str, count: int, name: str) -> list[str]:
        line = f"layer.0.{name}.relative_attention_bias.weight  distances {stack}_heads."
        return layers(f"{stack}.block", count, [line + "{i}"]) if own_table else [f"{stack}.block.0.{line}all"]

    local_to_global: Sequence[str] = ()
    if attention_name == "TransientGlobalSelfAttention":
        blocks_table = f"layer.0.{attention_name}.global_relative_attention_bias.weight"
        local_to_global = [
            f"encoder.block.0.{blocks_table}  distances encoder_heads.all",
            *layers("encoder.block", config.num_layers, rms_norm(f"layer.0.{attention_name}.global_input_layer_norm")),
        ]
    blocks = [
        *within(
            "transformer",
            embedding("shared"),
            ["encoder.embed_tokens.weight?  vocab residual", "decoder.embed_tokens.weight?  vocab residual"],
            table("encoder", config.num_layers, attention_name),
            local_to_global,
            layers(
                "encoder.block",
                config.num_layers,
                attend(0, attention_name, "layer_norm", encoder),
                feed_forward(1, "encoder_neurons"),
            ),
            rms_norm("encoder.final_layer_norm"),
        ),
        *only_if(
            "transformer.decoder.final_layer_norm.weight",
            within(
                "transformer",
                table("decoder", config.num_decoder_layers, "SelfAttention"),
                layers(
                    "decoder.block",
                    config.num_decoder_layers,
                    attend(0, "SelfAttention", "layer_norm", decoder),
                    attend(1, "EncDecAttention", "layer_norm", cross),
                    feed_forward(2, "decoder_neurons"),
                ),
            ),
        ),
        "transformer.decoder.final_layer_norm.weight?  residual",
        # The first checkpoints hold a table that nothing reads.
        "transformer.decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight?~  distances cross_heads.0",
        *head("lm_head", out="vocab"),
        *head("qa_outputs"),
        *linear("classification_head.dense", "classifier", "residual", optional=True),
        *head("classification_head.out_proj", into="classifier"),
        *head("classifier"),
    ]
    axes = ("residual", "classifier", "encoder_neurons", "decoder_neurons")
    return declare(
        config,
        blocks,
        sizes={
            "vocab": config.vocab_size,
            "distances": config.relative_attention_num_buckets,
            **dict.fromkeys(("residual", "classifier"), config.d_model),
            **encoder.sizes,
            **decoder.sizes,
            **cross.sizes,
            **dict.fromkeys(("encoder_neurons", "decoder_neurons"), config.d_ff),
            "labels": None,
        },
        symmetric=occurring((*axes, *encoder.symmetric, *decoder.symmetric, *cross.symmetric), blocks),
        outputs=("residual",),
        prefix="transformer.",
    )
