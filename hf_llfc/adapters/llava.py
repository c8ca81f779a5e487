"""LLaVA and the models of its layout: an image tower, a projector, a language model.

Image and language models are whichever the config names; their specs are embedded as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.blocks import linear
from hf_llfc.adapters.compose import part_of
from hf_llfc.adapters.declare import declare

if TYPE_CHECKING:
    from hf_llfc.symmetry.spec import PermutationSpec


def llava(config: Any) -> PermutationSpec:
    """LLaVA, LLaVA-NeXT, PaliGemma; only the residual stream of the language model is seen from outside."""
    words = part_of(
        config.text_config,
        "language_model.model",
        heads={"lm_head": "language_model.lm_head"},
    )
    images = part_of(config.vision_config, "vision_tower", axes="vision_")
    if config.model_type == "paligemma":
        projector = linear("multi_modal_projector.linear", "residual", "vision_residual")
    else:
        chosen = config.vision_feature_layer
        into = " + ".join(["vision_residual"] * (1 if isinstance(chosen, int) else len(chosen)))
        projector = [
            *linear("multi_modal_projector.linear_1", "projector", into),
            *linear("multi_modal_projector.linear_2", "residual", "projector"),
        ]
    return declare(
        config,
        images.lines,
        projector,
        ["image_newline?  residual"],
        words.lines,
        sizes={**images.sizes, **words.sizes, "projector": config.text_config.hidden_size},
        symmetric=(
            *images.symmetric,
            *words.symmetric,
            *(() if config.model_type == "paligemma" else ("projector",)),
        ),
        outputs=("residual",),
        # CLIP and SigLIP towers were stored under one more name.
        other_places={"vision_tower.": "vision_tower.vision_model."},
    )
