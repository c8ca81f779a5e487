"""ViT: patches into a pre-norm encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_llfc.adapters.blocks import attention, head, heads_of, layer_norm, layers, linear, mlp, within
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from transformers import ViTConfig

    from hf_llfc.symmetry.spec import PermutationSpec


def vit(config: ViTConfig) -> PermutationSpec:
    """ViT with a classification or masked-image head, or none."""
    head_dim = config.hidden_size // config.num_attention_heads
    heads = heads_of(config.num_attention_heads, head_dim=head_dim, free_channels=True)
    return declare(
        config,
        within(
            "vit",
            ["embeddings.cls_token  1 1 residual", "embeddings.mask_token?  1 1 residual"],
            ["embeddings.position_embeddings  1 positions residual"],
            [
                "embeddings.patch_embeddings.projection.weight  residual channels patch_height patch_width",
                "embeddings.patch_embeddings.projection.bias  residual",
            ],
            layers(
                "encoder.layer",
                config.num_hidden_layers,
                layer_norm("layernorm_before"),
                attention(
                    "attention.attention.query",
                    "attention.attention.key",
                    "attention.attention.value",
                    "attention.output.dense",
                    heads,
                    output_bias=True,
                ),
                layer_norm("layernorm_after"),
                mlp("intermediate.dense", "output.dense", bias=True),
            ),
            layer_norm("layernorm"),
            linear("pooler.dense", "pooled", "residual", optional=True),
        ),
        head("classifier"),
        ["decoder.0.weight?  pixels residual 1 1", "decoder.0.bias?  pixels"],
        sizes={
            "residual": config.hidden_size,
            "pooled": config.pooler_output_size,
            **heads.sizes,
            "neurons": config.intermediate_size,
            "channels": config.num_channels,
            "patch_height": None,
            "patch_width": None,
            "positions": None,
            "labels": None,
            "pixels": None,
        },
        symmetric=("residual", *heads.symmetric, "neurons"),
        outputs=("residual",),
        prefix="vit.",
    )
