"""The sections of a card, each as plain values for the template: parents, method, layers, recipe, limits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.foundation.model_names import parts_of
from hf_llfc.merging.methods import MERGE_METHODS
from hf_llfc.publishing.card.results import standard_error
from hf_llfc.publishing.lineage import ParentInfo, display_name, setting_in_words
from hf_llfc.publishing.numbers import decimal_text, distance_text, weight_text
from hf_llfc.publishing.reading import merge_point, shown_layers
from hf_llfc.publishing.record import MeasuredData, Result
from hf_llfc.recipe import Recipe, plain_documents


def number_word(number: int) -> str:
    """A number up to ten as a word, at the beginning of a sentence."""
    words = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")
    return words[number] if number < len(words) else str(number)


def letters_of(parents: Sequence[ParentInfo]) -> list[str]:
    """A, B, … for the parents, θ₀ for the base."""
    names = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    return ["θ₀" if parent.is_base else next(names, "…") for parent in parents]


def method_words(recipe: Recipe | None, parents: Sequence[ParentInfo]) -> str:
    """How the parents were combined, as a formula where it is short."""
    if recipe is not None and recipe.parts:
        names = dict.fromkeys(MERGE_METHODS[part.recipe.merge_method].title for part in recipe.parts)
        return f"layers from several places, by {' and '.join(names)} (see below)"
    if recipe is not None and recipe.method is not None:
        method = recipe.method
        given = [f"{key} {setting_in_words(value)}" for key, value in recipe.parameters.settings.items()]
        given += [f"seed {recipe.seed}"] if method.random else []
        settings = f" with {', '.join(given)}" if given else ""
        return f"{method.title}{settings} ({method.paper})"
    is_arithmetic = recipe is not None and recipe.merge_method == "task_arithmetic"
    name, start = ("task arithmetic", "θ₀ + ") if is_arithmetic else ("weighted average", "")
    terms = "Σ λᵢ·(θᵢ − θ₀)" if is_arithmetic else "Σ wᵢ·θᵢ"
    weights = [(letter, p.weight) for letter, p in zip(letters_of(parents), parents, strict=True) if not p.is_base]
    if len(weights) <= 4 and all(weight is not None for _, weight in weights):
        term = "{}·({} − θ₀)" if is_arithmetic else "{}·{}"
        terms = " + ".join(term.format(weight_text(weight), letter) for letter, weight in weights)
    return f"{name}, {start}{terms}"


def stack_table(recipe: Recipe | None) -> list[tuple[str, str, str]]:
    """Which layers of the result come from where, and how they are merged, of slices and modules."""
    rows: list[tuple[str, str, str]] = []
    done: dict[str | None, int] = {}
    for part in recipe.parts if recipe is not None else ():
        method = part.recipe.method
        entries = [
            (display_name(entry.model), wanted) for entry, wanted in zip(part.recipe.models, part.ranges, strict=False)
        ]
        if part.recipe.base_model is not None and part.base_range is not None:
            entries.append((f"base {display_name(part.recipe.base_model)}", part.base_range))
        if not part.ranges:
            named = ", ".join(display_name(entry.model) for entry in part.recipe.models)
            rows.append((str(part.module), named, MERGE_METHODS[part.recipe.merge_method].title))
            continue
        start = done.get(part.module, 0)
        done[part.module] = end = start + part.ranges[0][1] - part.ranges[0][0]
        where = f"{start}–{end - 1}" if part.module is None else f"{part.module} {start}–{end - 1}"
        sources = ", ".join(f"{name} {first}–{last - 1}" for name, (first, last) in entries)
        settings = part.recipe.parameters.settings if method is not None else {}
        given = ", ".join(f"{key} {setting_in_words(value)}" for key, value in settings.items())
        title = MERGE_METHODS[part.recipe.merge_method].title
        rows.append((where, sources, f"{title} with {given}" if given else title))
    return rows


def layer_table(report: ConnectivityReport | None) -> list[tuple[str, ...]]:
    """LLFC, baseline, their ratio and the coefficient of every layer shown, as text behind the layer's name."""
    return [
        (
            row.layer,
            *(distance_text(value, 2) for value in (row.llfc.mean, row.baseline.mean, row.ratio)),
            decimal_text(row.coefficient.mean, 3),
        )
        for row in (shown_layers(report) if report is not None else ())
    ]


def recipe_text(recipe: Recipe | None, *, can_run: bool = True) -> str | None:
    """The recipe as YAML for others: no path from the root of a disk, and nothing about the upload.

    Args:
        recipe: As run.
        can_run: Whether its models can be found; they are left out where they cannot.
    """
    import yaml

    if recipe is None:
        return None
    hidden = ("publish",) if can_run else ("publish", "models", "slices", "modules", "base_model")
    shown = [
        _without_paths({key: value for key, value in document.items() if key not in hidden})
        for document in plain_documents(recipe)
    ]
    # Lists of numbers go into one line.
    settings: Any = {"sort_keys": False, "allow_unicode": True, "width": 100, "default_flow_style": None}
    return "---\n".join(str(yaml.safe_dump(document, **settings)) for document in shown)


def seeds_of(recipe: Recipe | None) -> list[tuple[str, int]]:
    """Every seed of the recipe by its key, those of sections behind their section's name."""
    plain = {} if recipe is None else recipe.to_dict()
    seeds = [("seed", plain["seed"])] if "seed" in plain else []
    sections = {key: value for key, value in plain.items() if isinstance(value, Mapping) and "seed" in value}
    return seeds + [(f"{key}.seed", value["seed"]) for key, value in sections.items()]


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and len(parts := parts_of(value)) > 1:
        return "+".join(str(_without_paths(part)) for part in parts)
    if isinstance(value, str | PurePath) and (os.path.isabs(value) or str(value).startswith(("./", "../", "~"))):
        return f"./{PurePath(value).name}"
    return str(value) if isinstance(value, PurePath) else value


def limits_of(
    report: ConnectivityReport | None, data: MeasuredData, parents: Sequence[ParentInfo], rows: Sequence[Result]
) -> list[str]:
    """What a reader must not conclude from this card."""
    limits = []
    if report is None and any(row.loss is not None for row in rows):
        limits.append("Features were not compared: this model does not lie on a path between its parents.")
    elif report is None:
        limits.append("Nothing was measured. Whether this model performs as well as its parents is unknown.")
    else:
        limits += _limits_of_report(report, data, len([parent for parent in parents if not parent.is_base]), rows)
    limits.append("The merge can inherit the errors and biases of its parents.")
    local = [parent.name for parent in parents if not parent.is_on_hub and not parent.is_gone]
    if local:
        limits.append(f"Others cannot repeat the merge, because these parents are not on the Hub: {', '.join(local)}.")
    gone = [parent.name for parent in parents if parent.is_gone]
    if gone:
        limits.append(f"Nobody can repeat the merge, because these parents are kept nowhere: {', '.join(gone)}.")
    if report is not None and data.dataset and data.link is None:
        limits.append(f"Others cannot repeat the measurement, because its data is not on the Hub: {data.id}.")
    return limits


def _limits_of_report(
    report: ConnectivityReport, data: MeasuredData, parents: int, rows: Sequence[Result]
) -> list[str]:
    """What the numbers of a report do not say."""
    samples = f"{data.samples} samples of one data set" if data.samples else "one data set"
    limits = [f"All numbers come from {samples}. The merge was not measured on other data, languages or domains."]
    if len(report.path) > 2:
        points = f"{len(report.path)} values of α" if report.region == "line" else f"{len(report.path)} points"
        limits.append(f"The barrier is the largest among {points}; between them it may be higher.")
    if (error := standard_error(data.samples, rows)) is not None:
        limits.append(error)
    if report.barrier.loss is None:
        limits.append("The data has no labels. Features were compared, but loss and metrics were not measured.")
    if parents > 2 and report.region == "line":
        limits.append(f"Path and layers were measured for two of the {parents} parents.")
    elif merge_point(report) is None:
        limits.append("The merge itself does not lie on the measured path.")
    return limits
