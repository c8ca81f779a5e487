"""ViT and the encoders of its layout: patches into a pre-norm encoder, for images and spectrograms.

The families differ from ViT in the rows of `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.blocks import (
    Heads,
    attention,
    gated_mlp,
    head,
    heads_of,
    layer_norm,
    layers,
    linear,
    mlp,
    one_for_all_layers,
    optional_norm,
    within,
)
from hf_llfc.adapters.compose import occurring, only_if, renamed
from hf_llfc.adapters.declare import declare
from hf_llfc.adapters.families.segmentation import SEGMENTATION, Names, segmentation_heads

if TYPE_CHECKING:
    from hf_llfc.symmetry.spec import PermutationSpec


def _mlp(config: Any) -> tuple[list[str], int]:
    return mlp("intermediate.dense", "output.dense", bias=True), config.intermediate_size


def _dinov2_mlp(config: Any) -> tuple[list[str], int]:
    neurons = int(config.hidden_size * config.mlp_ratio)
    if not config.use_swiglu_ffn:
        return mlp("mlp.fc1", "mlp.fc2", bias=True), neurons
    lines = [
        *linear("mlp.weights_in", "neurons.{i} + neurons.{i}", "residual", bias=True),
        *linear("mlp.weights_out", "residual", "neurons.{i}", bias=True),
    ]
    return lines, (int(neurons * 2 / 3) + 7) // 8 * 8


def _dinov3_mlp(config: Any) -> tuple[list[str], int]:
    plain, gated = mlp("mlp.up_proj", "mlp.down_proj"), gated_mlp("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return gated if config.use_gated_mlp else plain, config.intermediate_size


def _position_bias(order: str) -> list[str]:
    """BEiT's table of biases, one column a head, and what older checkpoints hold to look it up."""
    index = "attention.attention.relative_position_bias.relative_position_index"
    return [f"attention.attention.{TABLE}?  distances {order}", f"{index}?~  window window"]


def _classifier(config: Any) -> list[str]:
    return head("classifier")


def _two_token_classifier(config: Any) -> list[str]:
    """From the class token beside the mean of the patches."""
    return head("classifier", into="residual + residual")


def _deit_heads(config: Any) -> list[str]:
    return [*head("classifier"), *head("cls_classifier"), *head("distillation_classifier"), *_masked_patches(config)]


def _vit_heads(config: Any) -> list[str]:
    return [*head("classifier"), *_masked_patches(config)]


def _masked_patches(config: Any) -> list[str]:
    return ["decoder.0.weight?  pixels residual 1 1", "decoder.0.bias?  pixels"]


def _beit_heads(config: Any) -> list[str]:
    auxiliary, concatenates = config.auxiliary_num_convs, config.auxiliary_concat_input
    return [
        *head("classifier"),
        *optional_norm("layernorm"),
        *head("lm_head", out="vocab"),
        *segmentation_heads(
            len(config.pool_scales),
            auxiliary,
            concatenates=concatenates,
            names=Names("conv", "bn", "psp_modules.{scale}.1", "bottleneck")
            if config.model_type == "beit"
            else Names(),
        ),
    ]


def _audio_classifier(config: Any) -> list[str]:
    return [*optional_norm("classifier.layernorm"), *head("classifier.dense")]


def _detection_heads(config: Any) -> list[str]:
    """Two MLPs that read every detection token, for its class and its box."""
    lines = []
    for name, out in (("class_labels_classifier", "labels"), ("bbox_predictor", "coordinates")):
        lines += linear(f"{name}.layers.0", f"detection.{name}.0", "residual", optional=True)
        lines += linear(f"{name}.layers.1", f"detection.{name}.1", f"detection.{name}.0", optional=True)
        lines += head(f"{name}.layers.2", into=f"detection.{name}.1", out=out)
    return lines


def _mae_decoder(config: Any) -> list[str]:
    """A narrower encoder of the same layout that paints the masked patches."""
    encoder = layers(
        "decoder.decoder_encoder.layer",
        config.decoder_num_hidden_layers,
        layer_norm("layernorm_before"),
        attention(*ATTENTION, _decoder_heads(config), bias=None, output_bias=True),
        layer_norm("layernorm_after"),
        mlp("intermediate.dense", "output.dense", bias=True),
    )
    decoder = only_if(
        "decoder.mask_token",
        linear("decoder.decoder_embed", "decoder_residual", "residual", bias=True),
        ["decoder.decoder_pos_embed  1 decoder_positions decoder_residual"],
        renamed(encoder, residual="decoder_residual", neurons="decoder_neurons"),
        layer_norm("decoder.decoder_norm", "decoder_residual"),
        linear("decoder.decoder_pred", "pixels", "decoder_residual", bias=True),
    )
    return ["decoder.mask_token?  1 1 decoder_residual", *decoder]


def _decoder_heads(config: Any) -> Heads:
    heads = config.decoder_num_attention_heads
    return heads_of(heads, head_dim=config.decoder_hidden_size // heads, free_channels=True, prefix="decoder_")


TABLE = "relative_position_bias.relative_position_bias_table"
ATTENTION = (
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
    "attention.output.dense",
)
TOKENS = {"cls_token": "1 1", "mask_token": "1 1"}


@dataclass(frozen=True)
class Layout:
    """What sets a family apart from ViT.

    Attributes:
        prefix: The head prefix.
        heads: Declares its task heads.
        tokens: Tokens beside the patches, and the axes before the residual stream.
        patches: The convolution of the patches.
        layers: Where the layers are.
        attention: The projections of a layer.
        norms: The norms of a layer.
        last_norm: The norm after the last layer; with `?` if only some checkpoints have it, or pool and then normalise.
        scales: Learned scales of what a layer adds to the residual stream.
        feed_forward: Declares the MLP of a layer and counts its neurons.
        rotary: Whether positions rotate queries and keys.
    """

    prefix: str
    heads: Callable[[Any], list[str]] = _classifier
    tokens: dict[str, str] = field(default_factory=lambda: TOKENS)
    patches: str = "embeddings.patch_embeddings.projection"
    layers: str = "encoder.layer"
    attention: tuple[str, str, str, str] = ATTENTION
    norms: tuple[str, str] = ("layernorm_before", "layernorm_after")
    last_norm: str = "layernorm"
    scales: tuple[str, ...] = ()
    feed_forward: Callable[[Any], tuple[list[str], int]] = _mlp
    rotary: bool = False


DINOV2 = Layout(
    "dinov2",
    tokens={"cls_token": "1 1", "register_tokens": "1 registers", "mask_token": "1"},
    norms=("norm1", "norm2"),
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    heads=_two_token_classifier,
    feed_forward=_dinov2_mlp,
)
BEIT = Layout("beit", _beit_heads, last_norm="layernorm?", scales=("lambda_1?", "lambda_2?"))

LAYOUTS: dict[str, Layout] = {
    "audio-spectrogram-transformer": Layout(
        "audio_spectrogram_transformer", _audio_classifier, tokens={"cls_token": "1 1", "distillation_token": "1 1"}
    ),
    "beit": BEIT,
    "data2vec-vision": replace(BEIT, prefix="data2vec_vision"),
    "deit": Layout("deit", _deit_heads, tokens={**TOKENS, "distillation_token": "1 1"}),
    "dinov2": DINOV2,
    "dinov2_with_registers": replace(DINOV2, prefix="dinov2_with_registers"),
    "dinov3_vit": replace(
        DINOV2,
        prefix="model",
        tokens={**DINOV2.tokens, "mask_token": "1 1"},
        patches="embeddings.patch_embeddings",
        layers="layer",
        attention=("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
        last_norm="norm",
        feed_forward=_dinov3_mlp,
        rotary=True,
    ),
    "ijepa": Layout("ijepa"),
    "vit": Layout("vit", _vit_heads),
    "vit_mae": Layout("vit", _mae_decoder),
    "vit_msn": Layout("vit"),
    "yolos": Layout("vit", _detection_heads, tokens={"cls_token": "1 1", "detection_tokens": "1 detections"}),
}


def vit(config: Any) -> PermutationSpec:
    """A family of `LAYOUTS` with any of its heads."""
    layout, options = LAYOUTS[config.model_type], config.to_dict()
    heads = heads_of(
        config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        free_channels=not layout.rotary,
    )
    if options.get("use_shared_relative_position_bias"):
        heads = one_for_all_layers(heads)
    order = "heads.all" if options.get("use_shared_relative_position_bias") else "heads.{i}"
    feed_forward, neurons = layout.feed_forward(config)
    optional = layout.last_norm.endswith("?")
    last_norm = (
        [*optional_norm(layout.last_norm[:-1]), *optional_norm("pooler.layernorm")]
        if optional
        else layer_norm(layout.last_norm)
    )
    blocks = [
        *within(
            layout.prefix,
            [f"embeddings.{token}?  {axes} residual" for token, axes in layout.tokens.items()],
            ["embeddings.position_embeddings?  1 positions residual"],
            ["encoder.mid_position_embeddings?  depth 1 positions residual"] if config.model_type == "yolos" else [],
            [
                f"{layout.patches}.weight  residual channels patch_height patch_width",
                f"{layout.patches}.bias  residual",
            ],
            [f"encoder.{TABLE}?  distances heads.all"] if order == "heads.all" else [],
            layers(
                layout.layers,
                config.num_hidden_layers,
                layer_norm(layout.norms[0]),
                attention(*layout.attention, heads),
                _position_bias(order) if "use_relative_position_bias" in options else [],
                layer_norm(layout.norms[1]),
                feed_forward,
                [f"{scale}  residual" for scale in layout.scales],
            ),
            last_norm,
            linear("pooler.dense", "pooled", "residual", optional=True),
        ),
        *layout.heads(config),
    ]
    unknown = (
        "patch_height",
        "patch_width",
        "positions",
        "distances",
        "window",
        "registers",
        "detections",
        "depth",
        "labels",
        "coordinates",
        "pixels",
    )
    decoder = _decoder_heads(config) if config.model_type == "vit_mae" else None
    return declare(
        config,
        blocks,
        sizes={
            **dict.fromkeys((*unknown, "decoder_positions"), None),
            "residual": config.hidden_size,
            "pooled": options.get("pooler_output_size"),
            **heads.sizes,
            "neurons": neurons,
            "channels": options.get("num_channels", 1),
            "vocab": options.get("vocab_size"),
            **(decoder.sizes if decoder else {}),
            "decoder_residual": options.get("decoder_hidden_size"),
            "decoder_neurons": options.get("decoder_intermediate_size"),
            **dict.fromkeys((*SEGMENTATION, "detection"), config.hidden_size),
            "auxiliary": options.get("auxiliary_channels"),
        },
        symmetric=occurring(
            (
                *(
                    "residual",
                    "neurons",
                    "decoder_residual",
                    "decoder_neurons",
                    *heads.symmetric,
                    *SEGMENTATION,
                    "auxiliary",
                    "detection",
                ),
                *(decoder.symmetric if decoder else ()),
            ),
            blocks,
        ),
        outputs=("residual",),
        prefix=f"{layout.prefix}.",
    )
