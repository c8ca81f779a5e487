"""ConvNeXt and ConvNeXt v2: depthwise convolutions and MLPs over channels, stages of growing width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.blocks import (
    convolution,
    head,
    layer_norm,
    layers_of_stage,
    linear,
    optional_norm,
    sizes_in_stage,
    within,
)
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from hf_llfc.symmetry.spec import PermutationSpec

EXPANSION = 4


def convnext(config: Any) -> PermutationSpec:
    """ConvNeXt with its learned scales, or ConvNeXt v2, whose neurons are normalised by their response."""
    prefix = config.model_type
    blocks = [
        *convolution("embeddings.patch_embeddings", "channels.0", "colours", config.patch_size, bias=True),
        *layer_norm("embeddings.layernorm", "channels.0"),
    ]
    sizes: dict[str, int | None] = {}
    for stage, (width, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
        channels, name = f"channels.{stage}", f"encoder.stages.{stage}"
        if stage:
            blocks += layer_norm(f"{name}.downsampling_layer.0", f"channels.{stage - 1}")
            blocks += convolution(f"{name}.downsampling_layer.1", channels, f"channels.{stage - 1}", 2, bias=True)
        blocks += layers_of_stage(
            f"{name}.layers",
            stage,
            depth,
            convolution("dwconv", channels, "1", 7, bias=True),
            layer_norm("layernorm", channels),
            linear("pwconv1", "neurons.{i}", channels, bias=True),
            ["grn.weight?  1 1 1 neurons.{i}", "grn.bias?  1 1 1 neurons.{i}"],
            linear("pwconv2", channels, "neurons.{i}", bias=True),
            [f"layer_scale_parameter?  {channels}"],
        )
        sizes[channels] = width
        sizes |= sizes_in_stage(stage, depth, {"neurons": EXPANSION * width})
    last = f"channels.{len(config.depths) - 1}"
    returns_every_stage = "Backbone" in "".join(config.architectures or ())
    stages = range(len(config.depths))
    return declare(
        config,
        within(prefix, blocks, optional_norm("layernorm", last)),
        head("classifier", into=last),
        optional_norm("hidden_states_norms.stem", "channels.0"),
        *(optional_norm(f"hidden_states_norms.stage{stage + 1}", f"channels.{stage}") for stage in stages),
        sizes={**sizes, "colours": config.num_channels, "labels": None},
        symmetric=("channels", "neurons"),
        outputs=("channels",) if returns_every_stage else (last,),
        prefix=f"{prefix}.",
    )
