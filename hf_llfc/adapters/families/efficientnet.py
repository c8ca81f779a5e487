"""EfficientNet: inverted residuals with squeeze and excitation; a stage shares its channels along its shortcuts."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from hf_llfc.adapters.blocks import batch_norm, convolution, head, within
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from transformers import EfficientNetConfig

    from hf_llfc.symmetry.spec import PermutationSpec

STEM, TOP = 32, 1280


def efficientnet(config: EfficientNetConfig) -> PermutationSpec:
    """EfficientNet B0 to B7, with or without its classification head."""
    from transformers.models.efficientnet.modeling_efficientnet import round_filters

    channels = "channels.stem"
    sizes: dict[str, int | None] = {
        channels: round_filters(config, STEM),
        "top": round_filters(config, TOP),
        "colours": config.num_channels,
        "labels": None,
    }
    blocks = [
        *convolution("embeddings.convolution", channels, "colours", 3, bias=False),
        *batch_norm("embeddings.batchnorm", channels),
    ]
    layer = 0
    for stage, repeats in enumerate(config.num_block_repeats):
        width, ratio = round_filters(config, config.out_channels[stage]), config.expand_ratios[stage]
        for _ in range(ceil(config.depth_coefficient * repeats)):
            name, into = f"encoder.blocks.{layer}", channels
            previous = sizes[into] or 0
            channels = f"channels.{stage}"
            sizes[channels] = width
            if ratio != 1:
                wide = f"expanded.{layer}"
                sizes[wide] = previous * ratio
                blocks += convolution(f"{name}.expansion.expand_conv", wide, into, 1, bias=False)
                blocks += batch_norm(f"{name}.expansion.expand_bn", wide)
            else:
                wide = into
            squeezed = f"squeezed.{layer}"
            sizes[squeezed] = max(1, int(previous * config.squeeze_expansion_ratio))
            depthwise = f"{name}.depthwise_conv"
            blocks += convolution(f"{depthwise}.depthwise_conv", wide, "1", config.kernel_sizes[stage], bias=False)
            blocks += batch_norm(f"{depthwise}.depthwise_norm", wide)
            blocks += convolution(f"{name}.squeeze_excite.reduce", squeezed, wide, 1, bias=True)
            blocks += convolution(f"{name}.squeeze_excite.expand", wide, squeezed, 1, bias=True)
            blocks += convolution(f"{name}.projection.project_conv", channels, wide, 1, bias=False)
            blocks += batch_norm(f"{name}.projection.project_bn", channels)
            layer += 1
    blocks += convolution("encoder.top_conv", "top", channels, 1, bias=False)
    blocks += batch_norm("encoder.top_bn", "top")
    return declare(
        config,
        within("efficientnet", blocks),
        head("classifier", into="top"),
        sizes=sizes,
        symmetric=("channels", "expanded", "squeezed", "top"),
        outputs=("top",),
        prefix="efficientnet.",
    )
