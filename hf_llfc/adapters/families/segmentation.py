"""Heads for segmentation that several vision families share."""

from __future__ import annotations

from dataclasses import dataclass

from hf_llfc.adapters.blocks import batch_norm, convolution
from hf_llfc.adapters.compose import only_if

SEGMENTATION = ("upsampled", "level", "pool", "lateral", "pyramid", "fused")


@dataclass(frozen=True)
class Names:
    """How a family calls the parts of its segmentation head on disk."""

    convolution: str = "convolution"
    norm: str = "normalization"
    pool: str = "psp_modules.blocks.{scale}.conv"
    bottleneck: str = "psp_bottleneck"


def segmentation_heads(pool_scales: int, auxiliary_layers: int, *, concatenates: bool, names: Names) -> list[str]:
    """BEiT's heads for segmentation: features at four scales, UperNet's decoder, and an auxiliary head.

    The axes of `SEGMENTATION` have the width of the residual stream, `auxiliary` one of its own.

    Args:
        pool_scales: How many scales the pyramid pools to.
        auxiliary_layers: How many convolutions the auxiliary head has.
        concatenates: Whether the auxiliary head reads its input again.
        names: Names on disk.
    """

    def block(name: str, out: str, into: str, kernel: int) -> list[str]:
        return [
            *convolution(f"{name}.{names.convolution}", out, into, kernel, bias=False),
            *batch_norm(f"{name}.{names.norm}", out),
        ]

    pooled = [f"pool.{scale}" for scale in range(pool_scales)]
    lines = [
        "fpn1.0.weight  residual upsampled 2 2",
        "fpn1.0.bias  upsampled",
        *batch_norm("fpn1.1", "upsampled"),
        "fpn1.3.weight  upsampled level.0 2 2",
        "fpn1.3.bias  level.0",
        "fpn2.0.weight  residual level.1 2 2",
        "fpn2.0.bias  level.1",
    ]
    for scale, out in enumerate(pooled):
        lines += block(f"decode_head.{names.pool.format(scale=scale)}", out, "residual", 1)
    lines += block(f"decode_head.{names.bottleneck}", "lateral", " + ".join(["residual", *pooled]), 3)
    for level, into in enumerate(("level.0", "level.1", "residual")):
        lines += block(f"decode_head.lateral_convs.{level}", "lateral", into, 1)
        lines += block(f"decode_head.fpn_convs.{level}", f"pyramid.{level}", "lateral", 3)
    lines += block("decode_head.fpn_bottleneck", "fused", "pyramid.0 + pyramid.1 + pyramid.2 + lateral", 3)
    lines += ["decode_head.classifier.bias  labels"]
    auxiliary, into = [], "residual"
    for layer in range(auxiliary_layers):
        auxiliary += block(f"auxiliary_head.convs.{layer}", f"auxiliary.{layer}", into, 3)
        into = f"auxiliary.{layer}"
    if concatenates:
        auxiliary += block("auxiliary_head.conv_cat", "auxiliary.joined", f"residual + {into}", 3)
        into = "auxiliary.joined"
    auxiliary += ["auxiliary_head.classifier.bias  labels"]
    decoder, other = "decode_head.classifier.weight", "auxiliary_head.classifier.weight"
    return [
        *only_if(decoder, lines),
        f"{decoder}?  labels fused 1 1",
        *only_if(other, auxiliary),
        f"{other}?  labels {into} 1 1",
    ]
