"""What a recipe says of every tensor of the merge: its dtype, and the weight of each parent in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_llfc.checkpoints import Checkpoint, TensorInfo
from hf_llfc.checkpoints.settings import most_common_dtype
from hf_llfc.checkpoints.source import Source
from hf_llfc.errors import RecipeError
from hf_llfc.merging import Merge, Merges, Rule, RuleUse, WeightSchedule, merged_infos, resolve_weights
from hf_llfc.merging.methods import REQUIRED, Parameter, Settings
from hf_llfc.merging.schedule import resolve_values
from hf_llfc.parents.parent import Parent
from hf_llfc.parents.stacking import Section
from hf_llfc.recipe import ModelEntry, Recipe, WeightRule
from hf_llfc.recipe.sections import Setting, Weight


@dataclass(frozen=True)
class Broken:
    """Where features are not connected.

    Attributes:
        blocks: Names of the modules.
        tensors: Names on disk of their tensors.
    """

    blocks: Sequence[str]
    tensors: Sequence[str]


NO_IMPORTANCES: Mapping[str, Sequence[Source]] = {}


def merge_infos(first: Checkpoint, recipe: Recipe) -> dict[str, TensorInfo]:
    """Dtype and shape of every merged tensor."""
    return merged_infos(first.tensors, getattr(torch, recipe.result_dtype) if recipe.result_dtype else None)


def working_dtype(infos: Mapping[str, TensorInfo]) -> torch.dtype:
    """The dtype in which models run that are calibrated."""
    return torch.promote_types(most_common_dtype(infos) or torch.float32, torch.float32)


def plan_merge(
    models: tuple[Sequence[Parent], Parent | None],
    recipe: Recipe,
    broken: Broken | None = None,
    importances: Mapping[str, Sequence[Source]] = NO_IMPORTANCES,
    sections: Sequence[Section] = (),
) -> Merge | Merges:
    """What becomes of every tensor; weights that do not fit are refused before anything is read.

    Args:
        models: The parents, and the base model.
        recipe: How they are merged.
        broken: What is kept as it is in one model.
        importances: See `stages.measure_importances`.
        sections: What of them is merged how, where that is not one way.

    Raises:
        RecipeError: Weights that sum to zero, or rules that do not fit the tensors.
    """
    parents, base = models
    infos = merge_infos(parents[0].checkpoint, recipe)
    if sections:
        return _plan_sections(sections, parents, base, infos, importances)
    if recipe.method is not None:
        merge = _plan_method(recipe, parents, base, infos)
        return replace(merge, importances=importances.get("", ()))
    keeper = recipe.keep_where_broken.model if recipe.keep_where_broken is not None else 0
    return Merge.plan(
        [parent.source for parent in parents],
        infos,
        [schedule(entry, recipe, parent) for entry, parent in zip(recipe.models, parents, strict=True)],
        normalize=recipe.normalizes,
        base=base.source if base is not None else None,
        scale=recipe.parameters.scale,
        kept=dict.fromkeys(broken.tensors, keeper) if broken is not None else None,
    )


def _plan_sections(
    sections: Sequence[Section],
    parents: Sequence[Parent],
    base: Parent | None,
    infos: Mapping[str, TensorInfo],
    importances: Mapping[str, Sequence[Source]],
) -> Merges:
    """What becomes of every tensor of slices and modules; what none of them names is that of the first parent."""
    uses = RuleUse()
    parts = []
    for section in sections:
        recipe = section.recipe
        own = list(parents[: len(recipe.models)])
        own_base = base if recipe.base is not None else None
        of_section = {name: infos[name] for name in section.names}
        try:
            if recipe.method is not None:
                part = _plan_method(recipe, own, own_base, of_section, (section, uses))
            else:
                schedules = [
                    schedule(entry, recipe, parent, own_names)
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
        parts.append(replace(part, importances=importances.get(section.path, ())))
    uses.refuse_unused()
    named = {name for section in sections for name in section.names}
    rest = {name: info for name, info in infos.items() if name not in named}
    if rest:
        parts.append(Merge.copy(parents[0].source, rest))
    return Merges(infos, tuple(parts))


def _plan_method(
    recipe: Recipe,
    parents: Sequence[Parent],
    base: Parent | None,
    infos: Mapping[str, TensorInfo],
    within: tuple[Section, RuleUse] | None = None,
) -> Merge:
    """What becomes of every tensor by a method that is no sum."""
    method = recipe.method
    assert method is not None
    settings = method_settings(parents, recipe, list(infos), within)
    sources = [parent.source for parent in parents]
    if method.name == "passthrough":  # a sum of one
        return Merge(sources, infos, {name: each.numbers("scale") for name, each in settings.items()})
    return Merge(sources, infos, {}, base.source if base is not None else None, method, settings)


def schedule(
    entry: ModelEntry, recipe: Recipe, parent: Parent, own_names: Mapping[str, str] | None = None
) -> WeightSchedule:
    """What a recipe says of one model's weights: its own rules, then those of all models.

    Args:
        entry: The model.
        recipe: The recipe.
        parent: Tells the axes of tensors.
        own_names: The names that its tensors have there, in which filters are looked for.
    """
    own = entry.parameters.weight if entry.parameters is not None else None
    of_all = recipe.parameters.weight
    if own is None and of_all is None:
        own = 1 / len(recipe.models)
    rules = _rules(own) if own is not None else ()
    where = f"{entry.model}, parameters.weight" if own is not None else "parameters.weight"
    if of_all is not None and all(rule.pattern is not None for rule in rules):
        rules += tuple(replace(rule, may_be_idle=own is not None) for rule in _rules(of_all))
    return WeightSchedule(rules, where, parent.axes_of, own_names or {})


def _rules(weight: Weight | tuple[WeightRule | float, ...]) -> tuple[Rule, ...]:
    if isinstance(weight, float):
        return (Rule(None, (weight,)),)
    if all(isinstance(value, float) for value in weight):
        return (Rule(None, tuple(value for value in weight if isinstance(value, float))),)
    return tuple(
        Rule(rule.filter, rule.value if isinstance(rule.value, tuple) else (rule.value,))
        if isinstance(rule, WeightRule)
        else Rule(None, (rule,))
        for rule in weight
    )


def method_settings(
    parents: Sequence[Parent],
    recipe: Recipe,
    names: Sequence[str],
    within: tuple[Section, RuleUse] | None = None,
) -> dict[str, Settings]:
    """The values of the method's parameters for every tensor.

    Args:
        parents: The models.
        recipe: Gives each parameter a value, a gradient over the layers or rules, one a model or one for all.
        names: The tensors.
        within: The slice or module that they are of, if it is one, and which rules of all of these decide something.

    Raises:
        RecipeError: A tensor that no rule matches, or a rule that decides nothing.
    """
    method, (section, uses) = recipe.method, within or (None, None)
    assert method is not None
    given_to_all = recipe.parameters.settings
    values: dict[str, dict[str, tuple[float, ...]]] = {}
    for parameter in method.parameters:
        key = parameter.name
        of_models = [entry.parameters.settings if entry.parameters is not None else {} for entry in recipe.models]
        of_all = given_to_all.get(key)
        told = [settings.get(key) for settings in of_models] if parameter.per_model else [None]
        if of_all is None and all(value is None for value in told):
            continue
        # Filters of one model are looked for in the names that its tensors have there.
        own_names = section.own_names if section is not None and parameter.per_model else [{}] * len(parents)
        schedules = [
            WeightSchedule(
                rules_of(value, parameter, of_all),
                _where(section, entry if value is not None else None, key),
                parent.axes_of,
                own,
            )
            for value, entry, parent, own in zip(told, recipe.models, parents, own_names, strict=False)
        ]
        values[key] = resolve_values(names, schedules, f"values of {key}", uses, steps=parameter.kind is bool)
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


def _where(section: Section | None, entry: ModelEntry | None, key: str) -> str:
    """What messages call a parameter: of a slice or module, of a model, or of all."""
    if section is not None:
        return f"{section.path}, {key}"
    return f"{entry.model}, parameters.{key}" if entry is not None else f"parameters.{key}"


def rules_of(value: Setting | None, parameter: Parameter, of_all: Setting | None = None) -> tuple[Rule, ...]:
    """What a recipe says of a parameter, as rules of which the first that matches counts.

    Args:
        value: What it says of one model; nothing where None.
        parameter: Gives the default, which comes last.
        of_all: What it says of all models, which comes before the default.
    """
    rules = _rules_of(value)
    if all(rule.pattern is not None for rule in rules):
        rules += tuple(replace(rule, may_be_idle=value is not None) for rule in _rules_of(of_all))
    if parameter.default is not REQUIRED and all(rule.pattern is not None for rule in rules):
        rules += tuple(replace(rule, may_be_idle=True) for rule in _rules_of(parameter.default))
    return rules


def _rules_of(value: Setting | None) -> tuple[Rule, ...]:
    if value is None:
        return ()
    value = [value] if isinstance(value, Mapping) else value
    if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        return tuple(
            Rule(None if entry.get("filter") == "*" else entry.get("filter"), rule.values)
            for entry in value
            for rule in _rules_of(entry["value"])
        )
    return (Rule(None, tuple(float(entry) for entry in (value if isinstance(value, list) else [value]))),)


def _in_its_kind(parameter: Parameter, row: tuple[float, ...]) -> Any:
    """Values of one parameter for one tensor, one a model or one for all."""
    values = [round(value) if parameter.kind is int else parameter.kind(value) for value in row]
    return values if parameter.per_model else values[0]
