"""The recipe that takes an adapter out of a fine-tune."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_llfc.errors import RecipeError
from hf_llfc.recipe.reading import load_recipe
from hf_llfc.recipe.sections import Recipe


def extraction(base: str, finetuned: str, settings: Mapping[str, Any]) -> Recipe:
    """The whole change that a fine-tune makes to its base, written as an adapter.

    Args:
        base: The base model.
        finetuned: The model that was fine-tuned from it.
        settings: Other keys of the recipe; one of `rank` and `max_error` is among them.

    Raises:
        RecipeError: None is, or a key is not valid.
    """
    if settings.get("rank") is None and settings.get("max_error") is None:
        raise RecipeError(
            "an adapter that holds all of a fine-tune may be as large as the model; give the rank that it may have "
            "(--rank 32), or the error (--max-error 0.1)"
        )
    own = {
        "models": [{"model": finetuned, "parameters": {"weight": 1.0}}],
        "merge_method": "task_arithmetic",
        "base_model": base,
        "save_as": "adapter",
    }
    if refused := [key for key in own if settings.get(key) is not None]:
        raise RecipeError(
            f"{', '.join(refused)}: an extraction has models, method and form of its own; leave out, or run a recipe"
        )
    return load_recipe(
        {
            **own,
            **{key: value for key, value in settings.items() if value is not None},
        }
    )
