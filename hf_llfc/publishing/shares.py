"""The parents of a merge and the weight that each has in it, from the recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.errors import PublishingError
from hf_llfc.foundation.model_names import split_revision
from hf_llfc.merging.mergekit_methods import MERGEKIT_METHODS


def models_of(recipe: Mapping[str, Any], report: ConnectivityReport | None) -> list[dict[str, Any]]:
    """The parents as the recipe names them, else as the report does.

    Returns:
        `id` and, where known, `revision`, `weight`, `share` (the weight in words) and `is_base`, for each.

    Raises:
        PublishingError: Neither names any.
    """
    entries = list(recipe.get("models") or [])
    models: list[dict[str, Any]] = []
    for entry, weight in zip(entries, _weights(recipe, entries), strict=True):
        model_id, revision = split_revision(str(entry["model"]))
        share = _settings(entry) if recipe.get("merge_method") in MERGEKIT_METHODS else None
        models.append({"id": model_id, "revision": revision, "weight": weight, "share": share})
    if not models and report is not None:
        models = [{"id": m.id, "revision": m.revision, "weight": m.weight} for m in report.models if m.id is not None]
    if recipe.get("base_model"):
        model_id, revision = split_revision(str(recipe["base_model"]))
        models.append({"id": model_id, "revision": revision, "is_base": True})
    if not models:
        raise PublishingError(
            "the card must name the parents: there is neither llfc/recipe.yaml nor a report that does"
        )
    return models


def _weights(recipe: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """The weight that each model has in the merge; None where it is not one number for all tensors."""
    if recipe.get("merge_method") in MERGEKIT_METHODS:
        return [None for _ in entries]  # no sum: what a model was given says more
    if not any("parameters" in entry for entry in entries):
        return [1 / len(entries) for _ in entries]
    given = [(entry.get("parameters") or {}).get("weight", 1.0) for entry in entries]
    settings = recipe.get("parameters") or {}
    weights = [float(weight) if isinstance(weight, int | float) else None for weight in given]
    total = math.fsum(weight for weight in weights if weight is not None)
    if settings.get("normalize") is True:
        weights = [None if None in weights or total == 0 or weight is None else weight / total for weight in weights]
    scale = settings.get("lambda", 1.0)
    return [None if weight is None else weight * scale for weight in weights]


def _settings(entry: Mapping[str, Any]) -> str:
    """What one model was given, the weight in front and without its name."""
    settings = dict(entry.get("parameters") or {})
    words = [setting_in_words(settings.pop("weight"))] if "weight" in settings else []
    words += [f"{key} {setting_in_words(value)}" for key, value in settings.items()]
    return ", ".join(words) or "–"


def setting_in_words(value: Any) -> str:
    """A parameter of a merge method, which may be one for all tensors, one a layer or one a pattern of names."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple) and value and all(isinstance(each, int | float) for each in value):
        return " … ".join(f"{each:.4g}" for each in value) + " by layer"
    return "by tensor"
