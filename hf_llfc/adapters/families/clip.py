"""CLIP, SigLIP and their kin: a tower for text, one for images, and what compares the two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.blocks import (
    Heads,
    attention,
    embedding,
    head,
    heads_of,
    layer_norm,
    layers,
    linear,
    mlp,
    optional_norm,
    within,
)
from hf_llfc.adapters.compose import only_if, part_of
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from hf_llfc.symmetry.spec import PermutationSpec


def _heads(config: Any, prefix: str = "") -> Heads:
    heads = config.num_attention_heads
    return heads_of(heads, head_dim=config.hidden_size // heads, free_channels=True, prefix=prefix)


def _layers(config: Any) -> list[str]:
    return layers(
        "encoder.layers",
        config.num_hidden_layers,
        layer_norm("layer_norm1"),
        attention(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
            _heads(config),
            bias=True,
        ),
        layer_norm("layer_norm2"),
        mlp("mlp.fc1", "mlp.fc2", bias=True),
    )


def text(config: Any) -> PermutationSpec:
    """The text tower; CLIP projects its last token outside of it, SigLIP inside."""
    heads = _heads(config)
    return declare(
        config,
        within(
            "text_model",
            embedding("embeddings.token_embedding"),
            embedding("embeddings.position_embedding", "positions"),
            ["embeddings.position_ids?  1 positions"],
            _layers(config),
            layer_norm("final_layer_norm"),
            linear("head", "projection", "residual", optional=True),
        ),
        linear("text_projection", "projection", "residual", bias=False, optional=True),
        sizes={
            "vocab": config.vocab_size,
            "positions": config.max_position_embeddings,
            "residual": config.hidden_size,
            **heads.sizes,
            "neurons": config.intermediate_size,
            "projection": None,
        },
        symmetric=("residual", "neurons", *heads.symmetric),
        outputs=("residual",),
        prefix="text_model.",
    )


def vision(config: Any) -> PermutationSpec:
    """The image tower; CLIP reads a class token, SigLIP pools by attention with one learned query."""
    own, pool = _heads(config), _heads(config, "pool_")
    qkv = f"{pool.queries} + {pool.keys} + {pool.values}"
    pooling = [
        "head.probe  1 1 residual",
        f"head.attention.in_proj_weight  {qkv}  residual",
        f"head.attention.in_proj_bias  {qkv}",
        *linear("head.attention.out_proj", "residual", pool.output, bias=True),
        *layer_norm("head.layernorm"),
        *linear("head.mlp.fc1", "neurons.pool", "residual", bias=True),
        *linear("head.mlp.fc2", "residual", "neurons.pool", bias=True),
    ]
    pools = "siglip" in config.model_type and config.to_dict().get("vision_use_head", True)
    return declare(
        config,
        within(
            "vision_model",
            ["embeddings.class_embedding?  residual", "embeddings.position_ids?  1 positions"],
            [
                "embeddings.patch_embedding.weight  residual pixels"
                if config.model_type == "siglip2_vision_model"
                else "embeddings.patch_embedding.weight  residual colours patch patch"
            ],
            ["embeddings.patch_embedding.bias?  residual"],
            embedding("embeddings.position_embedding", "positions"),
            optional_norm("pre_layrnorm"),  # CLIP's own spelling
            _layers(config),
            layer_norm("post_layernorm"),
        ),
        only_if("vision_model.head.probe", within("vision_model", [line.replace("{i}", "pool") for line in pooling]))
        if pools
        else [],
        linear("visual_projection", "projection", "residual", bias=False, optional=True),
        head("classifier"),
        sizes={
            **dict.fromkeys(("positions", "colours", "patch", "pixels", "projection", "labels"), None),
            "residual": config.hidden_size,
            **own.sizes,
            **pool.sizes,
            "neurons": config.intermediate_size,
        },
        symmetric=("residual", "neurons", *own.symmetric, *(pool.symmetric if pools else ())),
        outputs=("residual",),
        prefix="vision_model.",
    )


def two_towers(config: Any) -> PermutationSpec:
    """Both towers, or the image tower under a classifier.

    What is compared stays put where it is what the model returns: CLIP's projection, and in SigLIP the residual stream
    of the image tower, into which the text tower's head leads.
    """
    siglip = "siglip" in config.model_type
    projection = "vision_residual" if siglip else "projection"
    words = part_of(config.text_config, "text_model", axes="text_", shared={"projection": projection})
    images = part_of(config.vision_config, "vision_model", axes="vision_")
    first = words.lines[0].split()[0]
    return declare(
        config,
        only_if(first, words.lines),
        images.lines,
        linear("text_projection", projection, "text_residual", bias=False, optional=True),
        linear("visual_projection", projection, "vision_residual", bias=False, optional=True),
        head("classifier", into="vision_residual"),
        ["logit_scale?  1", "logit_bias?  1"] if siglip else ["logit_scale?"],
        sizes={**words.sizes, **images.sizes, "projection": None, "labels": None},
        symmetric=(*words.symmetric, *images.symmetric),
        outputs=("vision_residual",) if siglip else (),
    )
