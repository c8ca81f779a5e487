"""SegFormer: attention to a shrunken grid, MLPs with a depthwise convolution, a head that joins all stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_llfc.adapters.blocks import (
    attention,
    batch_norm,
    convolution,
    head,
    heads_of,
    layer_norm,
    layers_of_stage,
    linear,
    sizes_in_stage,
    within,
)
from hf_llfc.adapters.compose import only_if
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from transformers import SegformerConfig

    from hf_llfc.symmetry.spec import PermutationSpec


def segformer(config: SegformerConfig) -> PermutationSpec:
    """SegFormer with a head for classification or segmentation; each stage has a width of its own."""
    blocks: list[str] = []
    sizes: dict[str, int | None] = {}
    symmetric = dict.fromkeys(("channels", "neurons", "reduced", "projected", "fused"))
    stages = range(config.num_encoder_blocks)
    into = "colours"
    for stage in stages:
        width, count, depth = config.hidden_sizes[stage], config.num_attention_heads[stage], config.depths[stage]
        channels, ratio = f"channels.{stage}", config.sr_ratios[stage]
        heads = heads_of(count, head_dim=width // count, free_channels=True)
        patches = f"encoder.patch_embeddings.{stage}"
        blocks += convolution(f"{patches}.proj", channels, into, config.patch_sizes[stage], bias=True)
        blocks += layer_norm(f"{patches}.layer_norm", channels)
        context = "reduced.{i}" if ratio > 1 else channels
        name = "attention.self"
        parts = (f"{name}.query", f"{name}.key", f"{name}.value", "attention.output.dense")
        blocks += layers_of_stage(
            f"encoder.block.{stage}",
            stage,
            depth,
            layer_norm("layer_norm_1", channels),
            attention(*parts, heads, residual=channels, context=context, output_bias=True),
            convolution(f"{name}.sr", context, channels, ratio, bias=True) if ratio > 1 else [],
            layer_norm(f"{name}.layer_norm", context) if ratio > 1 else [],
            layer_norm("layer_norm_2", channels),
            linear("mlp.dense1", "neurons.{i}", channels, bias=True),
            convolution("mlp.dwconv.dwconv", "neurons.{i}", "1", 3, bias=True),
            linear("mlp.dense2", channels, "neurons.{i}", bias=True),
        )
        blocks += layer_norm(f"encoder.layer_norm.{stage}", channels)
        inside = {**heads.sizes, "reduced": width, "neurons": int(width * config.mlp_ratios[stage])}
        sizes |= {channels: width, **sizes_in_stage(stage, depth, inside)}
        symmetric |= dict.fromkeys(heads.symmetric)
        into = channels
    joined = " + ".join(f"projected.{stage}" for stage in reversed(stages))
    decoder = [
        *(
            line
            for stage in stages
            for line in linear(
                f"decode_head.linear_c.{stage}.proj", f"projected.{stage}", f"channels.{stage}", bias=True
            )
        ),
        *convolution("decode_head.linear_fuse", "fused", joined, 1, bias=False),
        *batch_norm("decode_head.batch_norm", "fused"),
        "decode_head.classifier.bias  labels",
    ]
    return declare(
        config,
        within("segformer", blocks),
        head("classifier", into=into),
        only_if("decode_head.classifier.weight", decoder),
        ["decode_head.classifier.weight?  labels fused 1 1"],
        sizes={
            **sizes,
            "colours": config.num_channels,
            "projected": config.decoder_hidden_size,
            "fused": config.decoder_hidden_size,
            "labels": None,
        },
        symmetric=tuple(symmetric),
        outputs=(into,),
        prefix="segformer.",
    )
