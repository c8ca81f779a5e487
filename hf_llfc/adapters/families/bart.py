"""BART and the encoder-decoders of its layout, for text and, as Whisper, speech.

Encoder and decoder have a residual stream each; a shared embedding makes them one axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.blocks import (
    Heads,
    attention,
    head,
    heads_of,
    layer_norm,
    layers,
    linear,
    mlp,
    windowed_attention,
    within,
)
from hf_llfc.adapters.compose import only_if, renamed
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from hf_llfc.symmetry.spec import PermutationSpec


def _embedded_tokens(config: Any) -> list[str]:
    return ["embed_tokens.weight?  vocab encoder_residual", "embed_positions.weight?  positions encoder_residual"]


def _two_convolutions(config: Any) -> list[str]:
    return [
        "conv1.weight  stem features 3",
        "conv1.bias  stem",
        "conv2.weight  encoder_residual stem 3",
        "conv2.bias  encoder_residual",
        "embed_positions.weight  frames encoder_residual",
    ]


def _audio_classifier() -> list[str]:
    return [
        "layer_weights?  all_layers",
        *linear("projector", "projection", "encoder_residual", optional=True),
        *head("classifier", into="projection"),
    ]


@dataclass(frozen=True)
class Layout:
    """What sets a family apart.

    Attributes:
        prefix: The head prefix.
        embedding_norm: Whether a norm follows the embeddings.
        last_norm: Whether a norm follows the last layer.
        computed_positions: Whether positions are computed where a checkpoint does not hold them, so that the order of
            the residual stream is given.
        shared_embedding: Whether encoder and decoder have one embedding, and so one order of their residual streams.
        front: Declares what comes before the encoder's layers.
    """

    prefix: str = "model"
    embedding_norm: bool = False
    last_norm: bool = True
    computed_positions: bool = False
    shared_embedding: bool = True
    front: Callable[[Any], list[str]] = _embedded_tokens


LAYOUTS: dict[str, Layout] = {
    "bart": Layout(embedding_norm=True, last_norm=False),
    "blenderbot": Layout(),
    "blenderbot-small": Layout(embedding_norm=True, last_norm=False),
    "led": Layout("led", embedding_norm=True, last_norm=False),
    "m2m_100": Layout(computed_positions=True),
    "marian": Layout(last_norm=False, computed_positions=True),
    "mbart": Layout(embedding_norm=True),
    "pegasus": Layout(computed_positions=True),
    "plbart": Layout(embedding_norm=True, last_norm=False),
    "whisper": Layout(shared_embedding=False, front=_two_convolutions),
}


def bart(config: Any) -> PermutationSpec:
    """A family of `LAYOUTS` with any of its heads, the decoder alone, or the encoder alone under a classifier."""
    layout = LAYOUTS[config.model_type]
    options = config.to_dict()
    heads = {
        "encoder": heads_of_stack(config.encoder_attention_heads, config.d_model, "encoder_"),
        "decoder": heads_of_stack(config.decoder_attention_heads, config.d_model, "decoder_"),
        "cross": heads_of_stack(config.decoder_attention_heads, config.d_model, "cross_"),
    }

    def attend(name: str, heads: Heads, residual: str, context: str | None = None) -> list[str]:
        parts = (f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj", f"{name}.out_proj")
        block = attention(parts, heads, residual=residual, context=context, output_bias=True)
        return [*block, *layer_norm(f"{name}_layer_norm", residual)]

    def stack(name: str, count: int, *attentions: list[str]) -> list[str]:
        residual = f"{name}_residual"
        feed_forward = renamed(mlp("fc1", "fc2", bias=True), residual=residual, neurons=f"{name}_neurons")
        return [
            *(layer_norm("layernorm_embedding", residual) if layout.embedding_norm else []),
            *layers("layers", count, *attentions, feed_forward, layer_norm("final_layer_norm", residual)),
            *(layer_norm("layer_norm", residual) if layout.last_norm else []),
        ]

    longformer, whisper = config.model_type == "led", config.model_type == "whisper"
    encoder_attention = (
        [
            *windowed_attention(
                "self_attn.longformer_self_attn",
                "self_attn.output",
                heads["encoder"],
                "global_head_dim",
                residual="encoder_residual",
            ),
            *layer_norm("self_attn_layer_norm", "encoder_residual"),
        ]
        if longformer
        else attend("self_attn", heads["encoder"], "encoder_residual")
    )
    encoder = within(
        f"{layout.prefix}.encoder",
        layout.front(config),
        stack("encoder", config.encoder_layers, encoder_attention),
    )
    decoder = within(
        f"{layout.prefix}.decoder",
        ["embed_tokens.weight?  decoder_vocab decoder_residual"],
        ["embed_positions.weight?  decoder_positions decoder_residual"],
        stack(
            "decoder",
            config.decoder_layers,
            attend("self_attn", heads["decoder"], "decoder_residual"),
            attend("encoder_attn", heads["cross"], "decoder_residual", "encoder_residual"),
        ),
    )
    blocks = [
        f"{layout.prefix}.shared.weight?  vocab decoder_residual",
        *only_if(f"{layout.prefix}.encoder.layers.0.fc1.weight", encoder),
        *only_if(f"{layout.prefix}.decoder.layers.0.fc1.weight", decoder),
        "final_logits_bias?  1 decoder_vocab",
        *head("lm_head", "decoder_residual", "decoder_vocab"),
        *head("proj_out", "decoder_residual", "decoder_vocab"),
        *linear("classification_head.dense", "classifier", "decoder_residual", optional=True),
        *head("classification_head.out_proj", into="classifier"),
        *head("qa_outputs", "decoder_residual"),
        *(_audio_classifier() if whisper else ()),
    ]
    shared = layout.shared_embedding and options.get("share_encoder_decoder_embeddings", True)
    if shared:
        blocks = renamed(blocks, encoder_residual="residual", decoder_residual="residual", decoder_vocab="vocab")
    residuals = ("residual",) if shared else ("encoder_residual", "decoder_residual")
    return declare(
        config,
        blocks,
        sizes={
            "vocab": config.vocab_size,
            "decoder_vocab": options.get("decoder_vocab_size") or config.vocab_size,
            **dict.fromkeys(("positions", "decoder_positions", "frames", "features", "all_layers"), None),
            **dict.fromkeys((*residuals, "classifier"), config.d_model),
            "stem": config.d_model,
            "projection": options.get("classifier_proj_size"),
            **{axis: size for each in heads.values() for axis, size in each.sizes.items()},
            **({"global_head_dim": heads["encoder"].sizes["encoder_head_dim"]} if longformer else {}),
            "encoder_neurons": config.encoder_ffn_dim,
            "decoder_neurons": config.decoder_ffn_dim,
            "labels": None,
        },
        symmetric=(
            *(() if layout.computed_positions else residuals),
            *("encoder_neurons", "decoder_neurons", "classifier"),
            *(("stem", "projection") if whisper else ()),
            *(axis for each in heads.values() for axis in each.symmetric),
            *(("global_head_dim",) if longformer else ()),
        ),
        outputs=() if layout.computed_positions else residuals,
        prefix=f"{layout.prefix}.",
    )


def heads_of_stack(heads: int, width: int, prefix: str) -> Heads:
    """The heads of a stack without rotary positions."""
    return heads_of(heads, head_dim=width // heads, free_channels=True, prefix=prefix)
