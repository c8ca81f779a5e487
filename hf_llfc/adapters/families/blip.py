"""BLIP: an image tower that text encoders and decoders attend to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.blocks import head, heads_of, layer_norm, layers, linear, mlp, within
from hf_llfc.adapters.compose import occurring, only_if, part_of, renamed
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from hf_llfc.symmetry.spec import PermutationSpec


def vision(config: Any) -> PermutationSpec:
    """The image tower."""
    count = config.num_attention_heads
    heads = heads_of(count, head_dim=config.hidden_size // count, free_channels=True)
    return declare(
        config,
        within(
            "vision_model",
            ["embeddings.class_embedding  1 1 residual", "embeddings.position_embedding  1 positions residual"],
            ["embeddings.patch_embedding.weight  residual colours patch patch"],
            ["embeddings.patch_embedding.bias  residual"],
            layers(
                "encoder.layers",
                config.num_hidden_layers,
                layer_norm("layer_norm1"),
                linear("self_attn.qkv", f"{heads.queries} + {heads.keys} + {heads.values}", "residual"),
                linear("self_attn.projection", "residual", heads.output, bias=True),
                layer_norm("layer_norm2"),
                mlp("mlp.fc1", "mlp.fc2", bias=True),
            ),
            layer_norm("post_layernorm"),
        ),
        sizes={
            **dict.fromkeys(("positions", "colours", "patch"), None),
            "residual": config.hidden_size,
            **heads.sizes,
            "neurons": config.intermediate_size,
        },
        symmetric=("residual", "neurons", *heads.symmetric),
        outputs=("residual",),
        prefix="vision_model.",
    )


def blip(config: Any) -> PermutationSpec:
    """BLIP for captions, for answers, for retrieval, or bare.

    Text attends to the image, but for a decoder of answers, which attends to the encoded question. What is compared
    across image and text stays put.
    """
    images = part_of(config.vision_config, "vision_model", axes="vision_")
    bare = part_of(config.text_config, "text_model", axes="text_", shared={"context": "vision_residual"})
    questions = part_of(config.text_config, "text_encoder", axes="text_", shared={"context": "vision_residual"})
    answers = part_of(
        config.text_config,
        "text_decoder.bert",
        axes="decoder_",
        heads={"cls.predictions": "text_decoder.cls.predictions"},
    )
    asked = "text_encoder.embeddings.word_embeddings.weight"
    across = [line for line in answers.lines if occurring(("decoder_context",), [line])]
    decoder = only_if(
        "text_decoder.bert.embeddings.word_embeddings.weight",
        [line for line in answers.lines if line not in across],
    )
    blocks = [
        *images.lines,
        *(line for part in (bare, questions) for line in only_if(part.lines[0].split()[0], part.lines)),
        *decoder,
        # The weight before the first blank of a line becomes optional, since either encoder may be there.
        *only_if(asked, (line.replace(" ", "? ", 1) for line in renamed(across, decoder_context="text_residual"))),
        *(
            f"{line.replace(' ', '? ', 1)}  unless {asked}"
            for line in renamed(across, decoder_context="vision_residual")
        ),
        "logit_scale?",
        *linear("text_projection", "projection", "text_pooled", bias=False, optional=True),
        *linear("visual_projection", "projection", "vision_residual", bias=False, optional=True),
        *linear("text_proj", "projection", "text_residual", optional=True),
        *linear("vision_proj", "projection", "vision_residual", optional=True),
        *head("itm_head", into="text_residual"),
    ]
    return declare(
        config,
        blocks,
        sizes={**bare.sizes, **questions.sizes, **answers.sizes, **images.sizes, "projection": None, "labels": None},
        symmetric=(*images.symmetric, *bare.symmetric, *answers.symmetric),
    )
