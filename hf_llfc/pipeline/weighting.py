"""What a recipe says of every tensor of the merge: its dtype, and the weight of each parent in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_llfc.checkpoints import Checkpoint, TensorInfo
from hf_llfc.checkpoints.source import Source
from hf_llfc.merging import Merge, Rule, WeightSchedule, merged_infos
from hf_llfc.merging.methods import REQUIRED, MergeMethod, Parameter, Settings
from hf_llfc.merging.schedule import resolve_values
from hf_llfc.parents.parent import Parent
from hf_llfc.recipe import ModelEntry, Recipe, WeightRule
from hf_llfc.recipe.sections import Setting


@dataclass(frozen=True)
class Broken:
    """Where features are not connected.

    Attributes:
        blocks: Names of the modules.
        tensors: Names on disk of their tensors.
    """

    blocks: Sequence[str]
    tensors: Sequence[str]


def merge_infos(first: Checkpoint, recipe: Recipe) -> dict[str, TensorInfo]:
    """Dtype and shape of every merged tensor."""
    return merged_infos(first.tensors, getattr(torch, recipe.result_dtype) if recipe.result_dtype else None)


def plan_merge(
    parents: Sequence[Parent],
    base: Parent | None,
    recipe: Recipe,
    broken: Broken | None = None,
    importances: Sequence[Source] = (),
) -> Merge:
    """What becomes of every tensor; weights that do not fit are refused before anything is read."""
    if recipe.method is not None:
        infos = merge_infos(parents[0].checkpoint, recipe)
        base_source = base.source if base is not None else None
        settings = method_settings(recipe.method, parents, recipe, list(infos))
        sources = [parent.source for parent in parents]
        return Merge(sources, infos, {}, base_source, recipe.method, settings, importances)
    keeper = recipe.keep_where_broken.model if recipe.keep_where_broken is not None else 0
    return Merge.plan(
        [parent.source for parent in parents],
        merge_infos(parents[0].checkpoint, recipe),
        [schedule(entry, len(parents), parent) for entry, parent in zip(recipe.models, parents, strict=True)],
        normalize=recipe.normalizes,
        base=base.source if base is not None else None,
        scale=recipe.parameters.scale,
        kept=dict.fromkeys(broken.tensors, keeper) if broken is not None else None,
    )


def schedule(entry: ModelEntry, count: int, parent: Parent) -> WeightSchedule:
    """What a recipe says of one model's weights."""
    weight = entry.parameters.weight if entry.parameters is not None else 1 / count
    if isinstance(weight, float):
        return WeightSchedule.constant(weight, entry.model)
    if all(isinstance(value, float) for value in weight):
        return WeightSchedule((Rule(None, tuple(value for value in weight if isinstance(value, float))),), entry.model)
    rules = [
        Rule(rule.filter, rule.value if isinstance(rule.value, tuple) else (rule.value,))
        if isinstance(rule, WeightRule)
        else Rule(None, (rule,))
        for rule in weight
    ]
    return WeightSchedule(tuple(rules), entry.model, parent.axes_of)


def method_settings(
    method: MergeMethod, parents: Sequence[Parent], recipe: Recipe, names: Sequence[str]
) -> dict[str, Settings]:
    """The values of a method's parameters for every tensor.

    Args:
        method: The method.
        parents: The models.
        recipe: Gives each parameter a value, a gradient over the layers or rules, one a model or one for all.
        names: The tensors.

    Raises:
        RecipeError: A tensor that no rule matches, or a rule that decides nothing.
    """
    given_to_all = recipe.parameters.settings
    values: dict[str, dict[str, tuple[float, ...]]] = {}
    for parameter in method.parameters:
        key = parameter.name
        of_models = [entry.parameters.settings if entry.parameters is not None else {} for entry in recipe.models]
        told = [settings.get(key, given_to_all.get(key)) for settings in (of_models if parameter.per_model else [{}])]
        if all(value is None for value in told):
            continue
        schedules = [
            WeightSchedule(rules_of(value, parameter), f"{parent.checkpoint.label}, {key}", parent.axes_of)
            for value, parent in zip(told, parents, strict=False)
        ]
        values[key] = resolve_values(names, schedules, f"values of {key}")
    return {
        name: method.settings(
            {
                parameter.name: _in_its_kind(parameter, values[parameter.name][name])
                for parameter in method.parameters
                if parameter.name in values
            },
            models=len(parents),
            seed=recipe.seed,
            tensor=name,
        )
        for name in names
    }


def rules_of(value: Setting | None, parameter: Parameter) -> tuple[Rule, ...]:
    """What a recipe says of a parameter, as rules of which the first that matches counts; the default comes last."""
    if value is None:
        value = [] if parameter.default is REQUIRED else parameter.default
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        rules = [
            Rule(None if entry.get("filter") == "*" else entry.get("filter"), rule.values)
            for entry in value
            for rule in rules_of(entry["value"], parameter)
        ]
        if parameter.default is not REQUIRED and all(rule.pattern is not None for rule in rules):
            rules += rules_of(None, parameter)
        return tuple(rules)
    return (Rule(None, tuple(float(entry) for entry in (value if isinstance(value, list) else [value]))),)


def _in_its_kind(parameter: Parameter, row: tuple[float, ...]) -> Any:
    """Values of one parameter for one tensor, one a model or one for all."""
    values = [parameter.kind(value) for value in row]
    return values if parameter.per_model else values[0]
