"""LLaVA and the models of its layout: an image tower, a projector, a language model.

Image and language models are whichever the config names; their specs are embedded as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.blocks import linear, rms_norm
from hf_llfc.adapters.compose import occurring, part_of
from hf_llfc.adapters.declare import declare, with_other_places

if TYPE_CHECKING:
    from hf_llfc.symmetry.spec import PermutationSpec


def llava(config: Any) -> PermutationSpec:
    """LLaVA and LLaVA-NeXT, PaliGemma, Gemma 3; the residual stream of the language model is all that is returned."""
    words = part_of(
        config.text_config,
        "language_model.model",
        heads={"lm_head": "language_model.lm_head", "score": "score"},
    )
    images = part_of(config.vision_config, "vision_tower", axes="vision_")
    if config.model_type == "paligemma":
        projector = linear("multi_modal_projector.linear", "residual", "vision_residual")
    elif config.model_type == "gemma3":
        projector = [
            "multi_modal_projector.mm_input_projection_weight  vision_residual residual",
            *rms_norm("multi_modal_projector.mm_soft_emb_norm", "vision_residual"),
        ]
    else:
        chosen = config.vision_feature_layer
        into = " + ".join(["vision_residual"] * (1 if isinstance(chosen, int) else len(chosen)))
        projector = [
            *linear("multi_modal_projector.linear_1", "projector", into),
            *linear("multi_modal_projector.linear_2", "residual", "projector"),
        ]
    spec = declare(
        config,
        images.lines,
        projector,
        ["image_newline?  residual"],
        words.lines,
        sizes={**images.sizes, **words.sizes, "projector": config.text_config.hidden_size},
        symmetric=(
            *images.symmetric,
            *words.symmetric,
            *occurring(("projector",), projector),
        ),
        outputs=("residual",),
        # CLIP and SigLIP towers were stored under one more name.
    )
    return with_other_places(spec, config, {"vision_tower.": "vision_tower.vision_model."})
