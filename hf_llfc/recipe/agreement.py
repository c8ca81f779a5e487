"""What the keys of a recipe say together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_llfc.errors import RecipeError, suggest
from hf_llfc.foundation.choices import AUTO, CHAT_TEMPLATES, UNION
from hf_llfc.merging.methods import REQUIRED, Base, MergeMethod
from hf_llfc.recipe.calibration import label_problems

if TYPE_CHECKING:
    from hf_llfc.recipe.sections import Recipe


def disagreements(recipe: Recipe) -> list[str]:
    """What no single key can tell: keys that contradict or lack each other, one line each, as `key: what`."""
    problems: list[str] = []
    if not recipe.output_dir:
        problems.append("output_dir: missing; name the folder to write")
    problems += _disagreements_of_adapter(recipe)
    if recipe.slices or recipe.modules:
        return [*problems, *_disagreements_with_parts(recipe)]
    if recipe.merge_method == "task_arithmetic" and recipe.base_model is None and not recipe.is_adapter:
        problems.append("base_model: task_arithmetic needs one")
    if recipe.merge_method == "linear" and recipe.parameters.scale != 1.0:
        problems.append("parameters.lambda: has no meaning for a linear merge")
    if recipe.method is not None:
        problems += _disagreements_with_method(recipe, recipe.method)
    problems += _disagreements_on_importance(recipe)
    problems += _disagreements_on_calibration(recipe)
    is_beside = recipe.base is not None or recipe.base_model in (None, *(each.model for each in recipe.models[:1]))
    if not is_beside:
        problems.append(f"base_model: {recipe.merge_method} has none beside its models; list it as the first of them")
    given = [entry.parameters is not None for entry in recipe.models]
    if any(given) and not all(given) and recipe.method is None and recipe.parameters.weight is None:
        missing = [f"models.{place}" for place, has in enumerate(given) if not has]
        problems.append(f"{', '.join(missing)}: parameters.weight is missing; give every model a weight or none")
    try:
        if recipe.weights is None and recipe.keep_where_broken is not None and recipe.method is None:
            problems.append("keep_where_broken: needs one weight a model, and these differ among tensors")
    except RecipeError as error:
        problems.append(f"models: {error}")
    names = [entry.model for entry in recipe.models]
    reference = recipe.align.reference
    if isinstance(reference, int) and not 0 <= reference < len(names):
        problems.append(f"align.reference: there is no model {reference}; models are counted from 0")
    if isinstance(reference, str) and reference not in names:
        problems.append(f"align.reference: {reference!r} is not one of the models{suggest(reference, names)}")
    problems += _disagreements_about_data(recipe)
    keep = recipe.keep_where_broken
    if keep is not None:
        if recipe.diagnose is None:
            problems.append("keep_where_broken: needs `diagnose` with the data to measure on")
        if recipe.merge_method != "linear" or len(names) < 2:
            problems.append("keep_where_broken: has a meaning for a linear merge of two models or more only")
        if not 0 <= keep.model < len(names):
            problems.append(f"keep_where_broken.model: there is no model {keep.model}; models are counted from 0")
    if recipe.tokenizer_source == UNION:
        if recipe.align.uses_data:
            problems.append(
                "align: with `tokenizer_source: union` models cannot be run before they are aligned, since the rows "
                "that one lacks come from the others afterwards; use weight_matching, and no `start`"
            )
    elif recipe.tokenizer_source == "base" and recipe.base_model is None:
        problems.append("tokenizer_source: `base` needs a base_model")
    elif isinstance(recipe.tokenizer_source, int) and not 0 <= recipe.tokenizer_source < len(names):
        problems.append(f"tokenizer_source: there is no model {recipe.tokenizer_source}; models are counted from 0")
    return problems + _disagreements_of_tokenizer(recipe)


def _disagreements_of_adapter(recipe: Recipe) -> list[str]:
    """What an adapter as the result leaves no room for."""
    if not recipe.is_adapter:
        given = {"rank": recipe.rank != AUTO, "max_error": recipe.max_error is not None}
        return [f"{key}: is of an adapter; add `save_as: adapter`, or remove it" for key, told in given.items() if told]
    problems = []
    if recipe.rank != AUTO and recipe.max_error is not None:
        problems.append("max_error: stands beside a rank, which says the same; leave one out")
    impossible = {
        "align": recipe.align.method != "none",
        "calibrate": recipe.calibrate is not None,
        "keep_where_broken": recipe.keep_where_broken is not None,
        "slices": bool(recipe.slices),
        "modules": bool(recipe.modules),
        "layer_range": recipe.layer_range is not None,
        "tie_word_embeddings": recipe.tie_word_embeddings is not None,
        "tokenizer": recipe.tokenizer is not None,
        "tokenizer_source": recipe.tokenizer_source is not None,
    }
    if recipe.measures_importance:
        problems.append(
            f"merge_method: {recipe.merge_method} weighs single elements of whole models; merge into a model"
        )
    problems += [
        f"{key}: is not possible with `save_as: adapter`, which keeps the base as it is; remove one of them"
        for key, told in impossible.items()
        if told
    ]
    return problems


def _disagreements_of_tokenizer(recipe: Recipe) -> list[str]:
    tokenizer, problems = recipe.tokenizer, []
    if tokenizer is not None and tokenizer.source is not None:
        problems.append("tokenizer.source: stands beside tokenizer_source, which says the same; leave one out")
    names = [entry.model for entry in recipe.models]
    names += [recipe.base_model, "base"] if recipe.base_model is not None else []
    for token, rule in tokenizer.tokens.items() if tokenizer is not None else ():
        source = rule.source if isinstance(rule.source, str | None) else rule.source.model
        if source is not None and source not in names:
            problems.append(
                f"tokenizer.tokens.{token}.source: {source!r} is none of the models{suggest(source, names)}"
            )
    named = [*names, recipe.tokenizer_source]
    for name in recipe.override_architecture:
        if name not in named:
            problems.append(f"override_architecture: {name!r} is none of the models{suggest(name, names)}")
    text = recipe.chat_template
    if text is not None and text not in (AUTO, *CHAT_TEMPLATES) and "{" not in text:
        problems.append(
            f"chat_template: {text[:40]!r} is no template{suggest(text, (AUTO, *CHAT_TEMPLATES))} (auto, "
            f"{', '.join(CHAT_TEMPLATES)}, or the text of one in Jinja)"
        )
    return problems


def _disagreements_on_importance(recipe: Recipe) -> list[str]:
    given = {"importance": recipe.importance}
    given |= {f"models.{index}.importance": entry.importance for index, entry in enumerate(recipe.models)}
    if recipe.measures_importance:
        lacking = [path for path, data in list(given.items())[1:] if data is None and recipe.importance is None]
        advice = "give task and dataset of samples, under `importance` for all models or under that of each"
        return [f"{lacking[0]}: missing, and {recipe.merge_method} needs it; {advice}"] if lacking else []
    return [
        f"{path}: has no meaning for {recipe.merge_method}; fisher and feedback measure importance"
        for path, data in given.items()
        if data is not None
    ]


def _disagreements_on_calibration(recipe: Recipe) -> list[str]:
    section = recipe.calibrate
    given = {f"models.{index}.calibrate_on": entry.calibrate_on for index, entry in enumerate(recipe.models)}
    if section is None or section.targets != "own":
        return [
            f"{path}: has no meaning without `calibrate` and its `targets: own`; remove it, or write both"
            for path, data in given.items()
            if data is not None
        ] + (_disagreements_of_blend(recipe) if section is not None else [])
    problems = [
        f"{path}: missing; with the targets own every model needs unlabelled samples of its own task"
        for path, data in given.items()
        if data is None
    ]
    problems += [
        f"{path}.{problem}" for path, data in given.items() if data is not None for problem in label_problems(data)
    ]
    return problems + _disagreements_of_any_target(recipe)


def _disagreements_of_blend(recipe: Recipe) -> list[str]:
    problems = _disagreements_of_any_target(recipe)
    try:
        weights = recipe.weights if recipe.merge_method == "linear" else None
    except RecipeError:
        return problems  # which is said elsewhere
    if weights is not None and min(weights, default=0.0) < 0:
        problems.append(
            "calibrate: the weights of the models are those of the blend that is imitated, and one is below 0; give "
            "none below 0, or leave calibrate out"
        )
    return problems


def _disagreements_of_any_target(recipe: Recipe) -> list[str]:
    problems = []
    if len(recipe.models) < 2:
        problems.append("calibrate: brings a merge to the blend of two models or more, and there is one; remove it")
    if recipe.diagnose is not None and recipe.diagnose.offload:
        problems.append(
            "calibrate: holds the merge and all models in memory, which `offload` in `diagnose` is there to avoid; "
            "leave one of them out"
        )
    return problems


def _disagreements_about_data(recipe: Recipe) -> list[str]:
    if recipe.align.calibration is not None and not recipe.align.uses_data:
        return [
            f"align.calibration: has no meaning for the method {recipe.align.method}; remove it, or write "
            "a method that looks at data (activation_matching, commutativity_matching, learned_matching), "
            "`start: activation_matching`, or `label_order: match`"
        ]
    return []


def _disagreements_with_parts(recipe: Recipe) -> list[str]:
    """What a recipe of slices or modules says together; its parts are recipes of their own."""
    problems = _disagreements_about_data(recipe)
    if not recipe.parts:
        return [*problems, "slices: are read by load_recipe; give it what the YAML says"]
    has_base = any(part.recipe.base_model is not None for part in recipe.parts)
    if recipe.align.method != "none":
        if recipe.columns == 1 and not has_base:
            problems.append("align: every slice has one source, so there is nothing to align; remove it")
        reference = recipe.align.reference
        if not isinstance(reference, int) or not 0 <= reference < recipe.columns:
            problems.append(
                f"align.reference: of slices, the sources at one place are one model of the alignment; name their "
                f"place, from 0 to {recipe.columns - 1}, not {reference!r}"
            )
    if recipe.importance is not None and not recipe.measures_importance:
        problems.append("importance: has no meaning here; no part is merged by fisher or feedback, which measure it")
    if recipe.measures_importance and recipe.align.method != "none":
        problems.append(
            "align: importance is measured in the models of these slices as they are, not aligned; remove it, or merge "
            "whole models under `models`"
        )
    if recipe.keep_where_broken is not None:
        problems.append("keep_where_broken: has a meaning for a linear merge of whole models only")
    if recipe.calibrate is not None:
        problems.append(
            "calibrate: layers from several places have no parents of the same layers, whose features could be "
            "blended; merge whole models under `models`"
        )
    if recipe.tokenizer_source == "base" and recipe.base_model is None:
        problems.append("tokenizer_source: `base` needs a base_model")
    elif isinstance(recipe.tokenizer_source, int) and not 0 <= recipe.tokenizer_source < len(recipe.models):
        problems.append(f"tokenizer_source: there is no model {recipe.tokenizer_source}; models are counted from 0")
    return problems + _disagreements_of_tokenizer(recipe)


def _disagreements_with_method(recipe: Recipe, method: MergeMethod) -> list[str]:
    problems = []
    name = recipe.merge_method
    if method.base is Base.REQUIRED and recipe.base_model is None and not recipe.is_adapter:
        problems.append(f"base_model: {name} needs one")
    least, most = method.inputs
    count = len(recipe.models)
    if count < least or (most is not None and count > most):
        wanted = str(least) if most == least else f"at least {least}" if most is None else f"{least} to {most}"
        beside = "" if method.base is Base.NONE else " beside the base"
        problems.append(f"models: {name} takes {wanted} models{beside}; there are {count}")
    for parameter in method.parameters:
        key = parameter.name
        lacking = [
            index
            for index, entry in enumerate(recipe.models)
            if entry.parameters is None or key not in entry.parameters.settings
        ]
        if parameter.default is not REQUIRED or key in recipe.parameters.settings or not lacking:
            continue
        where = f"models.{lacking[0]}.parameters.{key}" if parameter.per_model else f"parameters.{key}"
        also = "; give every model one, or one for all under `parameters`" if parameter.per_model else ""
        problems.append(f"{where}: missing, and {name} has no default for it{also}")
    return problems
