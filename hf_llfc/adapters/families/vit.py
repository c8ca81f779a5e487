"""ViT and the encoders of its layout: patches of an image into a pre-norm encoder.

The families differ from ViT in the rows of `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.blocks import (
    attention,
    head,
    heads_of,
    layer_norm,
    layers,
    linear,
    mlp,
    within,
)
from hf_llfc.adapters.declare import declare

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


CLASSIFIER = tuple(head("classifier"))
# From the class token beside the mean of the patches.
TWO_TOKEN_CLASSIFIER = tuple(head("classifier", into="residual + residual"))
MASKED_PATCHES = ("decoder.0.weight?  pixels residual 1 1", "decoder.0.bias?  pixels")
DEIT_HEADS = (*CLASSIFIER, *head("cls_classifier"), *head("distillation_classifier"), *MASKED_PATCHES)

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
        heads: Its task heads.
        tokens: Tokens beside the patches, and the axes before the residual stream.
        norms: The norms of a layer.
        scales: Learned scales of what a layer adds to the residual stream.
        feed_forward: Declares the MLP of a layer and counts its neurons.
    """

    prefix: str
    heads: tuple[str, ...] = CLASSIFIER
    tokens: dict[str, str] = field(default_factory=lambda: TOKENS)
    norms: tuple[str, str] = ("layernorm_before", "layernorm_after")
    scales: tuple[str, ...] = ()
    feed_forward: Callable[[Any], tuple[list[str], int]] = _mlp


DINOV2 = Layout(
    "dinov2",
    tokens={"cls_token": "1 1", "register_tokens": "1 registers", "mask_token": "1"},
    norms=("norm1", "norm2"),
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    heads=TWO_TOKEN_CLASSIFIER,
    feed_forward=_dinov2_mlp,
)

LAYOUTS: dict[str, Layout] = {
    "deit": Layout("deit", DEIT_HEADS, tokens={**TOKENS, "distillation_token": "1 1"}),
    "dinov2": DINOV2,
    "dinov2_with_registers": replace(DINOV2, prefix="dinov2_with_registers"),
    "ijepa": Layout("ijepa", tokens={"mask_token": "1 1"}),
    "vit": Layout("vit", (*CLASSIFIER, *MASKED_PATCHES)),
    "vit_msn": Layout("vit"),
}


def _height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _patches(config: Any, layout: Layout) -> dict[str, int | None]:
    """The size of a patch, and how many positions an image has."""
    (height, width), (patch_height, patch_width) = (
        _height_and_width(size) for size in (config.image_size, config.patch_size)
    )
    beside = sum(token in layout.tokens for token in ("cls_token", "distillation_token"))
    positions = (height // patch_height) * (width // patch_width) + beside
    return {"patch_height": patch_height, "patch_width": patch_width, "positions": positions}


def vit(config: Any) -> PermutationSpec:
    """A family of `LAYOUTS` with any of its heads."""
    layout, options = LAYOUTS[config.model_type], config.to_dict()
    count = config.num_attention_heads
    head_dim = options.get("head_dim") or config.hidden_size // count
    heads = heads_of(count, head_dim=head_dim, free_channels=True)
    feed_forward, neurons = layout.feed_forward(config)
    blocks = [
        *within(
            layout.prefix,
            [f"embeddings.{token}?  {axes} residual" for token, axes in layout.tokens.items()],
            ["embeddings.position_embeddings?  1 positions residual"],
            [
                "embeddings.patch_embeddings.projection.weight  residual channels patch_height patch_width",
                "embeddings.patch_embeddings.projection.bias  residual",
            ],
            layers(
                "encoder.layer",
                config.num_hidden_layers,
                layer_norm(layout.norms[0]),
                attention(ATTENTION, heads),
                layer_norm(layout.norms[1]),
                feed_forward,
                [f"{scale}  residual" for scale in layout.scales],
            ),
            layer_norm("layernorm"),
            linear("pooler.dense", "pooled", "residual", optional=True),
        ),
        *layout.heads,
    ]
    return declare(
        config,
        blocks,
        sizes={
            **_patches(config, layout),
            "registers": options.get("num_register_tokens"),
            **dict.fromkeys(("labels", "pixels"), None),
            "residual": config.hidden_size,
            "pooled": options.get("pooler_output_size"),
            **heads.sizes,
            "neurons": neurons,
            "channels": config.num_channels,
        },
        symmetric=("residual", "neurons", *heads.symmetric),
        outputs=("residual",),
        prefix=f"{layout.prefix}.",
    )
