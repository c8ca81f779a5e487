"""MobileNet v2: inverted residuals, narrow streams between wide depthwise convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_llfc.adapters.blocks import head, normalized_convolution, within
from hf_llfc.adapters.compose import only_if
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from transformers import MobileNetV2Config

    from hf_llfc.symmetry.spec import PermutationSpec

WIDTHS = (16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320)
STRIDES = (2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
STEM, TOP, SEGMENTATION = 32, 1280, 256


def mobilenet_v2(config: MobileNetV2Config) -> PermutationSpec:
    """MobileNet v2 with a head for classification or segmentation; the streams are shared along identity shortcuts."""
    from transformers.models.mobilenet_v2.modeling_mobilenet_v2 import apply_depth_multiplier, make_divisible

    widths = [apply_depth_multiplier(config, width) for width in WIDTHS]
    channels = "channels.stem"
    sizes: dict[str, int | None] = {
        channels: widths[0],
        "stem": apply_depth_multiplier(config, STEM),
        "top": TOP
        if config.finegrained_output and config.depth_multiplier < 1
        else apply_depth_multiplier(config, TOP),
        "segmentation": SEGMENTATION,
        "colours": config.num_channels,
        "labels": None,
    }
    blocks = normalized_convolution("conv_stem.first_conv", "stem.first", "colours", 3)
    wide = "stem.first"
    if not config.first_layer_is_expansion:
        wide = "stem.expanded"
        blocks += normalized_convolution("conv_stem.expand_1x1", wide, "stem.first", 1)
    blocks += normalized_convolution("conv_stem.conv_3x3", wide, "1", 3)
    blocks += normalized_convolution("conv_stem.reduce_1x1", channels, wide, 1)
    reached = 2  # the stem's own stride
    for layer, stride in enumerate(STRIDES):
        # At the output stride that the config asks for, dilation takes the place of strides.
        stride = 1 if reached == config.output_stride else stride
        reached *= stride
        name, into, wide = f"layer.{layer}", channels, f"expanded.{layer}"
        if stride > 1 or widths[layer] != widths[layer + 1]:
            channels = f"channels.{layer}"
        expanded = round(widths[layer] * config.expand_ratio)
        sizes[wide] = make_divisible(expanded, config.depth_divisible_by, config.min_depth)
        sizes[channels] = widths[layer + 1]
        blocks += normalized_convolution(f"{name}.expand_1x1", wide, into, 1)
        blocks += normalized_convolution(f"{name}.conv_3x3", wide, "1", 3)
        blocks += normalized_convolution(f"{name}.reduce_1x1", channels, wide, 1)
    blocks += normalized_convolution("conv_1x1", "top", channels, 1)
    segmentation = [
        *normalized_convolution("segmentation_head.conv_pool", "segmentation.pool", channels, 1),
        *normalized_convolution("segmentation_head.conv_aspp", "segmentation.aspp", channels, 1),
        *normalized_convolution(
            "segmentation_head.conv_projection", "segmentation.joined", "segmentation.pool + segmentation.aspp", 1
        ),
        "segmentation_head.classifier.convolution.bias  labels",
    ]
    classifier = "segmentation_head.classifier.convolution.weight"
    return declare(
        config,
        within("mobilenet_v2", blocks),
        head("classifier", into="top"),
        [f"{classifier}?  labels segmentation.joined 1 1"],
        only_if(classifier, segmentation),
        sizes=sizes,
        symmetric=("channels", "stem", "expanded", "top", "segmentation"),
        outputs=("top",),
        prefix="mobilenet_v2.",
    )
