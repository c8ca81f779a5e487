"""The sections of a card, each as plain values for the template: parents, method, layers, recipe, limits."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.foundation.model_names import parts_of
from hf_llfc.publishing.card.results import standard_error
from hf_llfc.publishing.lineage import ParentInfo
from hf_llfc.publishing.reading import merge_point, shown_layers
from hf_llfc.publishing.shares import setting_in_words
from hf_llfc.publishing.words import measured_on


def number_word(number: int) -> str:
    """A number up to ten as a word, at the beginning of a sentence."""
    words = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")
    return words[number] if number < len(words) else str(number)


def _letters(parents: Sequence[ParentInfo]) -> list[str]:
    """A, B, … for the parents, 0 for the base."""
    names = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    return ["θ₀" if parent.is_base else next(names, "…") for parent in parents]


def parent_rows(parents: Sequence[ParentInfo]) -> list[dict[str, Any]]:
    """A row a parent: its letter in the formula, the models it is made of, its weight and its licence."""
    return [
        {
            "letter": letter,
            "parts": [
                {"name": part.name, "is_on_hub": part.is_on_hub, "id": part.id, "revision": part.revision}
                for part in parent.parts
            ],
            "weight": "base" if parent.is_base else parent.share_in_words,
            "license": parent.license,
        }
        for letter, parent in zip(_letters(parents), parents, strict=True)
    ]


def method_words(recipe: Mapping[str, Any], parents: Sequence[ParentInfo], elsewhere: Mapping[str, Any] | None) -> str:
    """How the parents were combined, as a formula where it is short."""
    if elsewhere is not None:
        settings = ", ".join(
            f"{key} {setting_in_words(value)}" for key, value in (elsewhere.get("parameters") or {}).items()
        )
        computed = f"{elsewhere.get('title')}, computed by mergekit {elsewhere.get('mergekit')}"
        return f"{computed} with {settings} and seed {elsewhere.get('seed')}" if settings else computed
    tensors = [(letter, p.weight) for letter, p in zip(_letters(parents), parents, strict=True) if not p.is_base]
    is_short = len(tensors) <= 4 and all(weight is not None for _, weight in tensors)
    if recipe.get("merge_method") == "task_arithmetic":
        terms = (
            " + ".join(f"{weight:.4g}·({letter} − θ₀)" for letter, weight in tensors) if is_short else "Σ λᵢ·(θᵢ − θ₀)"
        )
        return f"task arithmetic, θ₀ + {terms}"
    terms = " + ".join(f"{weight:.4g}·{letter}" for letter, weight in tensors) if is_short else "Σ wᵢ·θᵢ"
    return f"weighted average, {terms}"


def layer_table(report: ConnectivityReport | None) -> list[dict[str, str]]:
    """LLFC, baseline, their ratio and the coefficient of every layer shown, as text."""
    if report is None:
        return []
    return [
        {
            "layer": row.layer,
            "llfc": _small(row.llfc.mean),
            "baseline": _small(row.baseline.mean),
            "ratio": _small(row.ratio),
            "coefficient": "–" if row.coefficient.mean is None else f"{row.coefficient.mean:.3f}",
        }
        for row in shown_layers(report)
    ]


def _small(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return "0" if value == 0 else _two_digits(value) if abs(value) >= 1e-3 else f"{value:.1e}"


def _two_digits(value: float) -> str:
    """Two digits that count, also where the second is a zero."""
    return f"{value:#.2g}".rstrip(".") if abs(value) < 100 else f"{value:.0f}"


def recipe_text(recipe: Mapping[str, Any]) -> str | None:
    """The recipe as YAML for others: names in place of the paths of local folders, and nothing about the upload."""
    import yaml

    shown = {key: value for key, value in recipe.items() if key != "publish"}
    if not shown:
        return None
    # Lists of numbers go into one line.
    return yaml.safe_dump(
        _without_paths(shown), sort_keys=False, allow_unicode=True, width=100, default_flow_style=None
    )


def seeds_of(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every seed of the recipe by its key, those of sections behind their section's name."""
    seeds = [{"key": "seed", "value": recipe["seed"]}] if "seed" in recipe else []
    sections = {key: value for key, value in recipe.items() if isinstance(value, Mapping) and "seed" in value}
    return seeds + [{"key": f"{key}.seed", "value": value["seed"]} for key, value in sections.items()]


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and len(parts := parts_of(value)) > 1:
        return "+".join(str(_without_paths(part)) for part in parts)
    if isinstance(value, str | PurePath) and os.path.isabs(value):
        return f"./{PurePath(value).name}"
    return str(value) if isinstance(value, PurePath) else value


def limits_of(
    report: ConnectivityReport | None,
    data: Mapping[str, Any],
    parents: Sequence[ParentInfo],
    rows: Sequence[Mapping[str, Any]],
) -> list[str]:
    """What a reader must not conclude from this card."""
    limits = []
    if report is None:
        limits.append("Nothing was measured: whether this model can do what its parents can is not known.")
    ordinary = [parent for parent in parents if not parent.is_base]
    if report is not None:
        samples = f"{data['samples']} samples of one data set" if data.get("samples") else "one data set"
        limits.append(
            f"All numbers come from {samples}. On other data, languages or domains the merge was not measured."
        )
        if len(report.path) > 2:
            points = f"{len(report.path)} values of α" if report.region == "line" else f"{len(report.path)} points"
            limits.append(f"The barrier is the largest among {points}; between them it may be higher.")
        if (error := standard_error(data, rows)) is not None:
            limits.append(error)
        if report.barrier.loss is None:
            limits.append("There were no labels: features were compared, loss and metric were not measured.")
        if len(ordinary) > 2 and report.region == "line":
            limits.append(f"Path and layers were measured for two of the {len(ordinary)} parents.")
        elif merge_point(report) is None:
            limits.append("The merge itself does not lie on the path that was measured.")
    limits.append("What the parents get wrong, and the biases they learnt, can be inherited by the merge.")
    local = [parent.name for parent in parents if not parent.is_on_hub]
    if local:
        limits.append(f"Not on the Hub, so that others cannot repeat the merge: {', '.join(local)}.")
    source = measured_on(data) if report is not None else None
    if source is not None and source["link"] is None:
        limits.append(f"Not on the Hub, so that others cannot repeat the measurement: {source['name']}.")
    return limits
