"""RegNet: bottlenecks whose middle convolution runs in groups, with or without squeeze and excitation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_llfc.adapters.blocks import convolution, head, normalized_convolution, within
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from transformers import RegNetConfig

    from hf_llfc.symmetry.spec import PermutationSpec


def regnet(config: RegNetConfig) -> PermutationSpec:
    """RegNet X or Y; groups move whole, channels inside their group, before and after the grouped convolution."""
    channels = "channels.stem"
    sizes: dict[str, int | None] = {channels: config.embedding_size, "colours": config.num_channels, "labels": None}
    blocks = normalized_convolution("embedder.embedder", channels, "colours", 3)
    for stage, (width, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
        groups = max(1, width // config.groups_width)
        for layer in range(depth):
            name, place = f"encoder.stages.{stage}.layers.{layer}", f"{stage}.{layer}"
            into, previous = channels, sizes[channels]
            strided = layer == 0 and (stage > 0 or config.downsample_in_first_stage)
            if strided or previous != width:
                channels = f"channels.{stage}"
                blocks += normalized_convolution(f"{name}.shortcut", channels, into, 1)
            inner, outer = f"inner.{place}", f"outer.{place}"
            sizes |= {channels: width, inner: width // groups, outer: width // groups}
            before, after, within_group = inner, outer, inner
            if groups > 1:
                sizes[f"groups.{place}"] = groups
                within_group = f"{inner}[groups]"
                before, after = f"(groups.{place} {within_group})", f"(groups.{place} {outer}[groups])"
            blocks += normalized_convolution(f"{name}.layer.0", before, into, 1)
            blocks += normalized_convolution(f"{name}.layer.1", after, within_group, 3)
            if config.layer_type == "y":
                squeezed = f"squeezed.{place}"
                sizes[squeezed] = round((previous or 0) / 4)
                blocks += convolution(f"{name}.layer.2.attention.0", squeezed, after, 1, bias=True)
                blocks += convolution(f"{name}.layer.2.attention.2", after, squeezed, 1, bias=True)
            position = 3 if config.layer_type == "y" else 2
            blocks += normalized_convolution(f"{name}.layer.{position}", channels, after, 1)
    symmetric = ["channels", "inner", "outer"]
    symmetric += [axis for axis in ("groups", "squeezed") if any(name.split(".")[0] == axis for name in sizes)]
    return declare(
        config,
        within("regnet", blocks),
        head("classifier.1", into=channels),
        sizes=sizes,
        symmetric=symmetric,
        outputs=(channels,),
        prefix="regnet.",
    )
