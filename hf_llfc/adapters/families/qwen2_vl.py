"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: an image tower with rotary positions, a merger of patches, a language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.blocks import gated_mlp, heads_of, layer_norm, layers, linear, mlp, norm, within
from hf_llfc.adapters.compose import part_of, renamed
from hf_llfc.adapters.declare import declare, with_other_places

if TYPE_CHECKING:
    from hf_llfc.symmetry.spec import PermutationSpec

FEED_FORWARDS = {
    "qwen2_vl": tuple(mlp("mlp.fc1", "mlp.fc2", bias=True)),
    "qwen2_5_vl": tuple(gated_mlp("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", bias=True)),
    "qwen3_vl": tuple(mlp("mlp.linear_fc1", "mlp.linear_fc2", bias=True)),
}


def qwen2_vl(config: Any) -> PermutationSpec:
    """Qwen's models for images and text; neighbouring patches lie side by side when they enter the language model."""
    images, values = config.vision_config, config.vision_config.to_dict()
    width = images.embed_dim if config.model_type == "qwen2_vl" else images.hidden_size
    neurons = values.get("intermediate_size") or int(width * images.mlp_ratio)
    merged = f"({images.spatial_merge_size**2} residual)"
    heads = heads_of(images.num_heads, head_dim=width // images.num_heads, prefix="vision_")
    if config.model_type == "qwen3_vl":
        mergers = [
            "pos_embed.weight  positions residual",
            *layer_norm("merger.norm"),
            *_merger("merger.linear_fc1", "merger.linear_fc2", merged, "merger.last"),
        ]
        # Features of earlier blocks enter the first layers of the language model.
        for place, _ in enumerate(images.deepstack_visual_indexes):
            name = f"deepstack_merger_list.{place}"
            mergers += layer_norm(f"{name}.norm", merged)
            mergers += _merger(f"{name}.linear_fc1", f"{name}.linear_fc2", merged, f"merger.{place}")
    else:
        mergers = [*norm("merger.ln_q"), *_merger("merger.mlp.0", "merger.mlp.2", merged, "merger.last")]
    tower = [
        "patch_embed.proj.weight  residual colours frames patch patch",
        "patch_embed.proj.bias?  residual",
        *layers(
            "blocks",
            images.depth,
            norm("norm1"),
            linear("attn.qkv", f"{heads.queries} + {heads.keys} + {heads.values}", "residual", bias=True),
            linear("attn.proj", "residual", heads.output, bias=True),
            norm("norm2"),
            FEED_FORWARDS[config.model_type],
        ),
        *mergers,
    ]
    words = part_of(config.text_config, "model.language_model", heads={"lm_head": "lm_head"})
    spec = declare(
        config,
        within("model.visual", renamed(tower, residual="vision_residual", neurons="vision_neurons", out="residual")),
        words.lines,
        sizes={
            **words.sizes,
            **heads.sizes,
            "vision_residual": width,
            "vision_neurons": neurons,
            "merger": images.spatial_merge_size**2 * width,
            **dict.fromkeys(("colours", "frames", "patch", "positions"), None),
        },
        symmetric=(*words.symmetric, *heads.symmetric, "vision_residual", "vision_neurons", "merger"),
        outputs=("residual",),
        prefix="model.",
        # The language model alone was under `model`.
    )
    return with_other_places(spec, config, {"model.language_model.": "model."})


def _merger(first: str, second: str, into: str, neurons: str) -> list[str]:
    return [*linear(first, neurons, into, bias=True), *linear(second, "out", neurons, bias=True)]
