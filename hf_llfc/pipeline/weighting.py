"""What a recipe says of every tensor of the merge: its dtype, and the weight of each parent in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_llfc.checkpoints import Checkpoint, TensorInfo
from hf_llfc.checkpoints.source import Source
from hf_llfc.errors import RecipeError
from hf_llfc.merging import Merge, Merges, Rule, RuleUse, WeightSchedule, merged_infos, resolve_weights
from hf_llfc.merging.methods import REQUIRED, MergeMethod, Parameter, Settings
from hf_llfc.merging.schedule import resolve_values
from hf_llfc.parents.parent import Parent
from hf_llfc.parents.stacking import Section
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
    sections: Sequence[Section] = (),
) -> Merge | Merges:
    """What becomes of every tensor; weights that do not fit are refused before anything is read.

    Args:
        parents: The models.
        base: The base model.
        recipe: How they are merged.
        broken: What is kept as it is in one model.
        importances: The importance of every parent's weights, where the method asks for it.
        sections: What of them is merged how, where that is not one way.

    Raises:
        RecipeError: Weights that sum to zero, or rules that do not fit the tensors.
    """
    infos = merge_infos(parents[0].checkpoint, recipe)
    if sections:
        return _plan_sections(sections, parents, base, infos)
    if recipe.method is not None:
        merge = _plan_method(recipe.method, recipe, parents, base, infos)
        return replace(merge, importances=importances) if importances else merge
    keeper = recipe.keep_where_broken.model if recipe.keep_where_broken is not None else 0
    return Merge.plan(
        [parent.source for parent in parents],
        infos,
        [schedule(entry, len(parents), parent) for entry, parent in zip(recipe.models, parents, strict=True)],
        normalize=recipe.normalizes,
        base=base.source if base is not None else None,
        scale=recipe.parameters.scale,
        kept=dict.fromkeys(broken.tensors, keeper) if broken is not None else None,
    )


def _plan_sections(
    sections: Sequence[Section], parents: Sequence[Parent], base: Parent | None, infos: Mapping[str, TensorInfo]
) -> Merges:
    """What becomes of every tensor of slices and modules; what none of them names is that of the first parent."""
    uses = RuleUse()
    parts = []
    for section in sections:
        recipe = section.recipe
        own = list(parents[: len(recipe.models)])
        own_base = base if recipe.base_model is not None else None
        of_section = {name: infos[name] for name in section.names}
        try:
            if recipe.method is not None:
                part = _plan_method(recipe.method, recipe, own, own_base, of_section, section, uses)
            else:
                schedules = [
                    schedule(entry, len(own), parent, own_names)
                    for entry, parent, own_names in zip(recipe.models, own, section.own_names, strict=False)
                ]
                weights = resolve_weights(
                    section.names,
                    schedules,
                    normalize=recipe.normalizes,
                    scale=recipe.parameters.scale,
                    uses=uses,
                )
                source = own_base.source if own_base is not None else None
                part = Merge([parent.source for parent in own], of_section, weights, source)
        except RecipeError as error:
            raise RecipeError(f"{section.path}: {error}") from None
        parts.append(part)
    uses.refuse_unused()
    named = {name for section in sections for name in section.names}
    rest = {name: info for name, info in infos.items() if name not in named}
    if rest:
        parts.append(Merge.copy(parents[0].source, rest))
    return Merges(infos, tuple(parts))


def _plan_method(
    method: MergeMethod,
    recipe: Recipe,
    parents: Sequence[Parent],
    base: Parent | None,
    infos: Mapping[str, TensorInfo],
    section: Section | None = None,
    uses: RuleUse | None = None,
) -> Merge:
    """What becomes of every tensor by a method that is no sum."""
    settings = method_settings(method, parents, recipe, list(infos), section, uses)
    sources = [parent.source for parent in parents]
    if method.name == "passthrough":  # a sum of one
        return Merge(sources, infos, {name: each.numbers("scale") for name, each in settings.items()})
    return Merge(sources, infos, {}, base.source if base is not None else None, method, settings)


def schedule(
    entry: ModelEntry, count: int, parent: Parent, own_names: Mapping[str, str] | None = None
) -> WeightSchedule:
    """What a recipe says of one model's weights; filters are looked for in the names that its tensors have there."""
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
    return WeightSchedule(tuple(rules), entry.model, parent.axes_of, own_names or {})


def method_settings(
    method: MergeMethod,
    parents: Sequence[Parent],
    recipe: Recipe,
    names: Sequence[str],
    section: Section | None = None,
    uses: RuleUse | None = None,
) -> dict[str, Settings]:
    """The values of a method's parameters for every tensor.

    Args:
        method: The method.
        parents: The models.
        recipe: Gives each parameter a value, a gradient over the layers or rules, one a model or one for all.
        names: The tensors.
        section: The slice or module that they are of, if it is one.
        uses: Where the rules are those of several sections: which decide something.

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
        # Filters of one model are looked for in the names that its tensors have there.
        where = section.path if section is not None else None
        own_names = section.own_names if section is not None and parameter.per_model else [{}] * len(parents)
        schedules = [
            WeightSchedule(
                rules_of(value, parameter), f"{where or parent.checkpoint.label}, {key}", parent.axes_of, own
            )
            for value, parent, own in zip(told, parents, own_names, strict=False)
        ]
        values[key] = resolve_values(names, schedules, f"values of {key}", uses)
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
