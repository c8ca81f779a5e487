"""The base model among the models: what a recipe says of both, brought to one form."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from hf_llfc.merging.methods import MERGE_METHODS, Base
from hf_llfc.recipe.sections import MergeParameters, ModelEntry

logger = logging.getLogger(__name__)


def settle_base(values: dict[str, Any], *, is_slice: bool) -> list[str]:
    """Takes the base out of the models, or into them, as the method has it.

    A method with a base has it beside its models: listed among them as well, it is taken out, and parameters that it
    has there count for nothing. To a method without one it is a model like the others, and comes first: it gives config
    and tokenizer.

    Args:
        values: The values of a recipe, each valid; changed in place.
        is_slice: Whether the models are the sources of a slice, which are all that is merged.

    Returns:
        What is wrong, each with its path.
    """
    base, models, method = values["base_model"], values["models"], values.get("merge_method", "linear")
    place = next((index for index, each in enumerate(models) if each.model == base), None)
    if MERGE_METHODS[method].base is Base.NONE:
        if place is None and is_slice:
            return [f"base_model: {method} has none; list it among the sources, or remove it"]
        problems = [] if place is not None else _problems_of_adding(values)
        entry = models[place] if place is not None else ModelEntry(base)
        others = [index for index in range(len(models)) if index != place]
        values["models"] = (entry, *(models[index] for index in others))
        _renumber(
            values, {**({place: 0} if place is not None else {}), **{old: new for new, old in enumerate(others, 1)}}
        )
        return problems
    if place is None or len(models) == 1:
        return []
    entry = models[place]
    if entry.parameters is not None:
        logger.warning("models.%d.parameters: this is the base_model, whose parameters count for nothing", place)
    values["models"] = models[:place] + models[place + 1 :]
    _renumber(values, {old: old - (old > place) for old in range(len(models)) if old != place}, of_base=place)
    return []


def _problems_of_adding(values: dict[str, Any]) -> list[str]:
    """Why the base cannot be one more of the models, if it cannot."""
    method, models, parameters = values.get("merge_method", "linear"), values["models"], values.get("parameters")
    _, most = MERGE_METHODS[method].inputs
    if most is not None and len(models) >= most:
        return [f"base_model: {method} has no base, and takes {most} model; remove one of them"]
    of_all = parameters if isinstance(parameters, MergeParameters) else MergeParameters()
    needs_weight = any(each.name == "weight" for each in MERGE_METHODS[method].parameters)
    if needs_weight and of_all.weight is None and "weight" not in of_all.settings:
        return [
            f"base_model: {method} has no base and merges it as one more model, which has no weight; list it under "
            "`models` with one, or remove it"
        ]
    return []


def _renumber(values: dict[str, Any], places: dict[int, int], of_base: int | None = None) -> None:
    """Lets indices of models follow them to their new places.

    Args:
        values: The values of a recipe; changed in place.
        places: Index before → index now.
        of_base: Index before of the base, which is no longer among the models.
    """
    align, keep, source = values.get("align"), values.get("keep_where_broken"), values.get("tokenizer_source")
    if align is not None and isinstance(align.reference, int):
        values["align"] = dataclasses.replace(align, reference=places.get(align.reference, align.reference))
    if keep is not None:
        values["keep_where_broken"] = dataclasses.replace(keep, model=places.get(keep.model, keep.model))
    if isinstance(source, int):
        values["tokenizer_source"] = "base" if source == of_base else places.get(source, source)
