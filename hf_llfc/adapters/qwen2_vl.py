"""Qwen2-VL and Qwen2.5-VL: an image tower with rotary positions, a merger of four patches, a Qwen2 language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.blocks import gated_mlp, heads_of, layers, linear, mlp, norm, within
from hf_llfc.adapters.compose import part_of, renamed
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from hf_llfc.symmetry.spec import PermutationSpec


def qwen2_vl(config: Any) -> PermutationSpec:
    """Qwen2-VL, with LayerNorm and plain MLPs in its image tower, and Qwen2.5-VL, with RMSNorm and gated ones."""
    images, gated = config.vision_config, config.model_type == "qwen2_5_vl"
    width = images.hidden_size if gated else images.embed_dim
    neurons = images.intermediate_size if gated else int(width * images.mlp_ratio)
    merged = images.spatial_merge_size**2
    heads = heads_of(images.num_heads, head_dim=width // images.num_heads, prefix="vision_")
    feed_forward = gated_mlp("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj") if gated else mlp("mlp.fc1", "mlp.fc2")
    tower = [
        "patch_embed.proj.weight  residual colours frames patch patch",
        *layers(
            "blocks",
            images.depth,
            norm("norm1"),
            linear("attn.qkv", f"{heads.queries} + {heads.keys} + {heads.values}", "residual"),
            linear("attn.proj", "residual", heads.output),
            norm("norm2"),
            feed_forward,
        ),
        *norm("merger.ln_q"),
    ]
    words = part_of(config.text_config, "model.language_model", heads={"lm_head": "lm_head"})
    return declare(
        config,
        within("model.visual", renamed(tower, residual="vision_residual", neurons="vision_neurons")),
        linear("model.visual.merger.mlp.0", "merger", f"({merged} vision_residual)"),
        linear("model.visual.merger.mlp.2", "residual", "merger"),
        words.lines,
        sizes={
            **words.sizes,
            **heads.sizes,
            "vision_residual": width,
            "vision_neurons": neurons,
            "merger": merged * width,
            **dict.fromkeys(("colours", "frames", "patch"), None),
        },
        symmetric=(*words.symmetric, *heads.symmetric, "vision_residual", "vision_neurons", "merger"),
        outputs=("residual",),
        prefix="model.",
        # The language model alone was under `model`.
        other_places={"model.language_model.": "model."},
    )
