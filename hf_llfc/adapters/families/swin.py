"""Swin and Swin v2: attention in windows, stages of growing width, patches merged between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_llfc.adapters.blocks import (
    attention,
    head,
    heads_of,
    layer_norm,
    layers_of_stage,
    linear,
    mlp,
    optional_norm,
    sizes_in_stage,
    within,
)
from hf_llfc.adapters.compose import renamed
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from transformers import SwinConfig, Swinv2Config

    from hf_llfc.symmetry.spec import PermutationSpec

# Swin v2 computes the bias of positions by a small MLP of this width.
BIAS_NEURONS = 512


def swin(config: SwinConfig | Swinv2Config) -> PermutationSpec:
    """Swin with its tables of position biases, or Swin v2, with any of their heads; each stage has its own width."""
    second = config.model_type == "swinv2"
    prefix, name = config.model_type, "attention.self"
    last = f"channels.{len(config.depths) - 1}"
    blocks = [
        "embeddings.mask_token?  1 1 channels.0",
        "embeddings.position_embeddings?  1 positions channels.0",
        "embeddings.patch_embeddings.projection.weight  channels.0 colours patch patch",
        "embeddings.patch_embeddings.projection.bias  channels.0",
        *layer_norm("embeddings.norm", "channels.0"),
    ]
    sizes: dict[str, int | None] = {}
    symmetric = {"channels": None, "neurons": None}
    for stage, (depth, count) in enumerate(zip(config.depths, config.num_heads, strict=True)):
        width, channels = config.embed_dim * 2**stage, f"channels.{stage}"
        heads = heads_of(count, head_dim=width // count, free_channels=True)
        order = "heads.{i}" if count > 1 else "1"
        positions = (
            [
                f"{name}.logit_scale  {order} 1 1",
                *linear(f"{name}.continuous_position_bias_mlp.0", "bias_neurons.{i}", "2", bias=True),
                *linear(f"{name}.continuous_position_bias_mlp.2", order, "bias_neurons.{i}", bias=False),
            ]
            if second
            else [f"{name}.relative_position_bias_table  distances {order}"]
        )
        parts = (f"{name}.query", f"{name}.key", f"{name}.value", "attention.output.dense")
        blocks += layers_of_stage(
            f"encoder.layers.{stage}.blocks",
            stage,
            depth,
            layer_norm("layernorm_before", channels),
            attention(parts, heads, residual=channels, output_bias=True),
            positions,
            # Buffers of older checkpoints.
            [f"{name}.relative_position_index?~  window.{stage} window.{stage}"],
            [f"{name}.relative_coords_table?~  1 offsets.{stage} offsets.{stage} 2"] if second else [],
            layer_norm("layernorm_after", channels),
            renamed(mlp("intermediate.dense", "output.dense", bias=True), residual=channels),
        )
        if channels != last:
            # Four neighbours side by side become one patch of twice the width.
            merged, wider, merge = f"(4 {channels})", f"channels.{stage + 1}", f"encoder.layers.{stage}.downsample"
            blocks += linear(f"{merge}.reduction", wider, merged, bias=False)
            blocks += layer_norm(f"{merge}.norm", wider if second else merged)
        sizes[channels] = width
        sizes |= sizes_in_stage(stage, depth, {**heads.sizes, "neurons": int(width * config.mlp_ratio)})
        symmetric |= dict.fromkeys(heads.symmetric)
    returns_every_stage = "Backbone" in "".join(config.architectures or ())
    return declare(
        config,
        within(prefix, blocks, optional_norm("layernorm", last)),
        head("classifier", into=last),
        [f"decoder.0.weight?  pixels {last} 1 1", "decoder.0.bias?  pixels"],
        optional_norm("hidden_states_norms.stem", "channels.0"),
        *(
            optional_norm(f"hidden_states_norms.stage{stage + 1}", f"channels.{stage}")
            for stage in range(len(config.depths))
        ),
        sizes={
            **sizes,
            **dict.fromkeys(("positions", "distances", "window", "offsets", "patch", "pixels", "labels"), None),
            "colours": config.num_channels,
            "bias_neurons": BIAS_NEURONS,
        },
        symmetric=(*symmetric, *(("bias_neurons",) if second else ())),
        outputs=("channels",) if returns_every_stage else (last,),
        prefix=f"{prefix}.",
    )
