"""ResNet: convolutions with BatchNorm; the channels of a stage are shared along its identity shortcuts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_llfc.adapters.blocks import head, normalized_convolution, within
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from transformers import ResNetConfig

    from hf_llfc.symmetry.spec import PermutationSpec

BOTTLENECK_REDUCTION = 4


def resnet(config: ResNetConfig) -> PermutationSpec:
    """ResNet of basic or bottleneck blocks, with or without its classification head."""
    channels = "channels.stem"
    sizes: dict[str, int | None] = {
        channels: config.embedding_size,
        "colours": config.num_channels,
        "labels": None,
    }
    blocks = normalized_convolution("embedder.embedder", channels, "colours", 7)
    for stage, (width, depth) in enumerate(zip(config.hidden_sizes or (), config.depths or (), strict=True)):
        for block in range(depth):
            prefix = f"encoder.stages.{stage}.layers.{block}"
            strided = block == 0 and (stage > 0 or config.downsample_in_first_stage)
            into = channels
            if strided or sizes[channels] != width:
                channels = f"channels.{stage}"
                sizes[channels] = width
                blocks += normalized_convolution(f"{prefix}.shortcut", channels, into, 1)
            inner = [f"inner.{stage}.{block}.{position}" for position in range(2)]
            if config.layer_type == "basic":
                sizes[inner[0]] = width
                steps = [(inner[0], into, 3), (channels, inner[0], 3)]
            else:
                sizes[inner[0]] = sizes[inner[1]] = width // BOTTLENECK_REDUCTION
                steps = [(inner[0], into, 1), (inner[1], inner[0], 3), (channels, inner[1], 1)]
            for position, (out, source, kernel) in enumerate(steps):
                blocks += normalized_convolution(f"{prefix}.layer.{position}", out, source, kernel)
    returns_every_stage = "ResNetBackbone" in (config.architectures or ())
    return declare(
        config,
        within("resnet", blocks),
        head("classifier.1", into=channels),
        sizes=sizes,
        symmetric=("channels", "inner"),
        outputs=("channels",) if returns_every_stage else (channels,),
        prefix="resnet.",
    )
