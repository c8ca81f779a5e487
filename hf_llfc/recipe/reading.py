"""From YAML to a recipe: every problem is collected, and raised once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from hf_llfc.errors import EvaluationError, RecipeError, raise_all
from hf_llfc.foundation.choices import UNION
from hf_llfc.foundation.limited_yaml import read_documents
from hf_llfc.merging.methods import MERGE_METHODS, MergeMethod, Parameter
from hf_llfc.recipe.data import EvaluationConfig
from hf_llfc.recipe.documents import INHERITED, documents_of, folder_of, with_names
from hf_llfc.recipe.fitting import as_weight, is_weight, setting_problem, short_gradient
from hf_llfc.recipe.options import build, fitted_values, join, made, options_of, refuse_unknown
from hf_llfc.recipe.overrides import apply_override
from hf_llfc.recipe.sections import (
    SUMS,
    AlignSection,
    BatchNormSection,
    DiagnoseSection,
    MergeParameters,
    ModelEntry,
    ModelParameters,
    Recipe,
    Setting,
    Weight,
    WeightRule,
    copied,
)
from hf_llfc.recipe.slices import PartRecipe, SliceReader, as_slice

# Keys of other tools that people paste in, and what to write instead.
FOREIGN_KEYS = {
    "tokenizer": "write `tokenizer_source`",
    "chat_template": "the chat template of `tokenizer_source` is kept",
    "int8_mask": "nothing is masked here; remove it",
    "architecture": "the architecture is read from config.json; remove it",
    "merge": "one recipe is one merge; write its keys at the top",
}
FOREIGN_PARAMETERS = {
    "int8_mask": "nothing is masked here; remove it",
    **dict.fromkeys(
        ("density", "epsilon", "gamma", "rescale", "t"),
        "belongs to other merge methods than linear and task_arithmetic (docs/parents.md lists them)",
    ),
}


def load_recipe(
    source: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]], overrides: Iterable[str] = ()
) -> Recipe:
    """Reads and checks a recipe.

    Args:
        source: A YAML file, or what it says; of several documents a list.
        overrides: `key.sub=value` replacements; values are YAML, list entries go by index (`models.0.model=…`). Of
            several documents they are for the last, or with `NAME.` in front for that of this name.

    Returns:
        The recipe; of several documents that of the output, with the others as `earlier`.

    Raises:
        RecipeError: Everything that is wrong with it.
    """
    folder = None
    if isinstance(source, Mapping):
        contents, where = [copied(source)], "the recipe"
    elif isinstance(source, str | Path):
        contents, where, folder = _read(Path(source)), str(source), Path(source).parent
    else:
        contents, where = [copied(each) for each in source], "the recipe"
    problems: list[str] = []
    documents = documents_of(contents, problems)
    raise_all(problems, RecipeError, f"{where} cannot be run")
    assert documents is not None
    last, earlier = documents.last, documents.earlier
    for override in overrides:
        name, dot, rest = override.partition(".")
        is_named = bool(dot) and name in earlier
        apply_override(earlier[name] if is_named else last, rest if is_named else override)
    output_dir = str(last.get("output_dir") or "")
    inherited = {key: last[key] for key in INHERITED if key in last}
    places = {name: str(content.get("output_dir") or folder_of(output_dir, name)) for name, content in earlier.items()}
    recipes: list[Recipe] = []
    for name, content in earlier.items():
        reader = _Reader(folder)
        made_first = tuple(recipes)
        own = with_names({**inherited, **content, "output_dir": places[name]}, places)
        recipe = reader.recipe(own)
        problems += [f"document {name}: {problem}" for problem in reader.problems]
        recipes += [replace(recipe, earlier=made_first)] if recipe is not None else []
    reader = _Reader(folder)
    recipe = reader.recipe(with_names(last, places))
    problems += reader.problems
    raise_all(problems, RecipeError, f"{where} cannot be run")
    assert recipe is not None
    return replace(recipe, earlier=tuple(recipes))


def load_align(settings: Mapping[str, Any]) -> AlignSection:
    """Reads and checks the section `align` of a recipe alone; its `calibration` may also be an `EvaluationConfig`.

    Raises:
        RecipeError: Everything that is wrong with it.
    """
    reader = _Reader(None)
    section = reader.align(copied(settings), "align")
    raise_all(reader.problems, RecipeError, "the models cannot be aligned")
    assert section is not None
    return section


def load_data(settings: EvaluationConfig | Mapping[str, Any]) -> EvaluationConfig:
    """The data to evaluate on, given as such or by its keys.

    Raises:
        EvaluationError: Everything that is wrong with them.
    """
    if isinstance(settings, EvaluationConfig):
        return settings
    if not isinstance(settings, Mapping):
        raise EvaluationError(f"data: an EvaluationConfig or a mapping of its keys is expected, found {settings!r}")
    problems: list[str] = []
    config = build(EvaluationConfig, settings, "", problems)
    raise_all(problems, EvaluationError, "the data cannot be used")
    assert config is not None
    return config


def dump_recipe(recipe: Recipe) -> str:
    """Writes a recipe as YAML that `load_recipe` reads back, with the documents that it refers to."""
    plain = plain_documents(recipe)
    return yaml.safe_dump_all(plain, sort_keys=False, allow_unicode=True) if len(plain) > 1 else _dumped(plain[0])


def plain_documents(recipe: Recipe) -> list[dict[str, Any]]:
    """A recipe as plain data, behind the documents that it refers to."""
    names = {each.output_dir: each.document for each in recipe.earlier if each.document is not None}
    plain: list[dict[str, Any]] = [with_names(each.to_dict(), names) for each in (*recipe.earlier, recipe)]
    for content in plain[:-1]:
        if content["output_dir"] == folder_of(recipe.output_dir, content["name"]):
            del content["output_dir"]
            content.pop("overwrite", None)
    return plain


def _dumped(plain: Mapping[str, Any]) -> str:
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def renamed(recipe: Recipe, names: Mapping[str, str]) -> Recipe:
    """A recipe with other names for its models, in slices and modules as well.

    Args:
        recipe: The recipe.
        names: Name of a model → its new name; others keep theirs.
    """
    if not recipe.parts:
        models = tuple(replace(entry, model=names.get(entry.model, entry.model)) for entry in recipe.models)
        base = recipe.base_model
        return replace(recipe, models=models, base_model=base if base is None else names.get(base, base))

    def other(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {
                key: names.get(entry, entry)
                if key in ("model", "base_model") and isinstance(entry, str)
                else entry
                if key == "parameters"
                else other(entry)
                for key, entry in value.items()
            }
        return [other(entry) for entry in value] if isinstance(value, list) else value

    plain = recipe.to_dict()
    moved: dict[str, Any] = {key: other(plain[key]) for key in ("slices", "modules") if key in plain}
    if "base_model" in plain:
        moved["base_model"] = names.get(plain["base_model"], plain["base_model"])
    return replace(load_recipe({**plain, **moved}), earlier=recipe.earlier)


def _read(path: Path) -> list[dict[str, Any]]:
    contents = [each for each in read_documents(path, RecipeError) if each is not None]
    if len(contents) < 2 and not (contents and isinstance(contents[0], dict)):
        found = "a list" if contents and isinstance(contents[0], list) else repr(contents[0])[:80] if contents else None
        raise RecipeError(
            f"{path}: a recipe is a mapping of keys that begins with `models:`, found {found or 'an empty file'}"
        )
    return contents


def _ordinary(content: dict[str, Any]) -> tuple[Recipe | None, list[str]]:
    """A recipe of whole models, and what is wrong with it."""
    reader = _Reader(None)
    return reader.recipe(content), reader.problems


class _Reader:
    """Turns plain data into a recipe and collects what is wrong."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.seed = 0
        self.method: MergeMethod | None = None
        self.problems: list[str] = []

    def recipe(self, content: Mapping[str, Any]) -> Recipe | None:
        name = str(content.get("merge_method"))
        self.method = MERGE_METHODS.get(name) if name not in SUMS else None
        content = self._without_foreign(content, FOREIGN_KEYS, "")
        for key in ("base_model", "tokenizer_source"):
            if isinstance(content.get(key), str) and content[key] not in ("base", UNION):
                content[key] = self._located(content[key])
        seed = content.get("seed")
        self.seed = seed if isinstance(seed, int) and not isinstance(seed, bool) else 0
        parts: tuple[PartRecipe, ...] = ()
        beside = [key for key in ("models", "slices", "modules") if key in content]
        for key in beside[1:]:
            self.problems.append(f"{key}: stands beside `{beside[0]}`; a recipe has one of them")
            del content[key]
        if beside and beside[0] != "models":
            reader = SliceReader(content, _ordinary, self._model_name)
            if (lifted := reader.lifted()) is not None:
                return self._lifted(lifted, reader.problems)
            content, parts = self._of_parts(content, reader)
        else:
            content["models"] = self._models(content.get("models"))
        for key, read in (("parameters", self._merge_parameters), ("align", self.align), ("diagnose", self._diagnose)):
            if isinstance(content.get(key), Mapping):
                content[key] = read(content[key], key)
        if isinstance(content.get("importance"), Mapping):
            content["importance"] = self._data(content["importance"], "importance")
        values = fitted_values(Recipe, content, "", self.problems)
        values["parts"] = parts
        if self.problems:
            return None
        if values.get("base_model") is not None:
            self._drop_base(values)
        return made(Recipe, values, "", self.problems)

    def _lifted(self, content: Mapping[str, Any], problems: Sequence[str]) -> Recipe | None:
        """The recipe of one slice, whose models were moved to `models`."""
        before = len(self.problems)
        recipe = self.recipe(content)
        self.problems[before:] = [*problems, *map(as_slice, self.problems[before:])]
        return None if self.problems or recipe is None else replace(recipe, range_path="slices[0]")

    def _of_parts(self, content: dict[str, Any], reader: SliceReader) -> tuple[dict[str, Any], tuple[PartRecipe, ...]]:
        """The plain data with slices, modules and all their models in their types; and the merges that they are."""
        if "layer_range" in content:
            self.problems.append("layer_range: has no meaning beside sources, each of which has its own")
        slices, modules = reader.sections()
        parts = () if reader.problems else reader.parts(slices, modules)
        self.problems += reader.problems
        models = {
            entry.model: entry
            for part in parts
            for entry in (
                *part.recipe.models,
                *([ModelEntry(part.recipe.base_model)] if part.recipe.base_model else []),
            )
        }
        named = [replace(entry, parameters=None) for name, entry in models.items() if name != content.get("base_model")]
        parameters = content.get("parameters")
        if isinstance(parameters, Mapping):
            content = {**content, "parameters": MergeParameters(settings=dict(parameters))}
        return {**content, "models": tuple(named), "slices": slices, "modules": modules}, parts

    def _without_foreign(self, content: Mapping[str, Any], foreign: Mapping[str, str], path: str) -> dict[str, Any]:
        self.problems += [f"{join(path, key)}: {advice}" for key, advice in foreign.items() if key in content]
        return {key: value for key, value in content.items() if key not in foreign}

    def _drop_base(self, values: dict[str, Any]) -> None:
        """Recipes of other tools also list the base of task arithmetic among the models, without a weight."""
        models, align = values["models"], values.get("align")
        place = next((i for i, each in enumerate(models) if each.model == values["base_model"]), None)
        if place is None or len(models) == 1:
            return
        if models[place].parameters is not None and self.method is None:
            return
        if models[place].parameters is not None and models[place].parameters.settings:
            self.problems.append(f"models.{place}.parameters: this is the base_model, which has no parameters")
        values["models"] = models[:place] + models[place + 1 :]
        if align is not None and isinstance(align.reference, int) and align.reference > place:
            values["align"] = dataclasses.replace(align, reference=align.reference - 1)

    def _models(self, value: Any) -> tuple[ModelEntry, ...]:
        if not isinstance(value, list) or not value:
            self.problems.append("models: a list of at least one `- model: …` is expected")
            return ()
        entries = []
        for place, each in enumerate(value):
            path = f"models.{place}"
            if not isinstance(each, Mapping):
                self.problems.append(f"{path}: `model: …` is expected, found {each!r}")
                continue
            entry = {**each, "parameters": self._model_parameters(each.get("parameters"), f"{path}.parameters")}
            if isinstance(entry.get("model"), str):
                entry["model"] = self._located(entry["model"])
            if isinstance(entry.get("importance"), Mapping):
                entry["importance"] = self._data(entry["importance"], f"{path}.importance")
            read = build(ModelEntry, entry, path, self.problems)
            entries += [read] if read is not None else []
        return tuple(entries)

    def _model_parameters(self, value: Any, path: str) -> ModelParameters | None:
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.problems.append(f"{path}: a mapping of parameters is expected, found {value!r}")
            return None
        if self.method is not None:
            of_model = [parameter for parameter in self.method.parameters if parameter.per_model]
            return ModelParameters(settings=self._settings(value, path, of_model))
        value = self._without_foreign(value, FOREIGN_PARAMETERS, path)
        refuse_unknown(value, ["weight"], path, self.problems)
        return ModelParameters(self._weight(value.get("weight", 1.0), f"{path}.weight"))

    def _weight(self, value: Any, path: str) -> Weight | tuple[WeightRule | float, ...]:
        value = [value] if isinstance(value, Mapping) else value
        if problem := short_gradient(value):
            self.problems.append(f"{path}: {problem}")
            return 1.0
        if is_weight(value):
            return as_weight(value)
        if not isinstance(value, list) or not value or not all(isinstance(each, Mapping) for each in value):
            self.problems.append(
                f"{path}: a finite number, a list of numbers or of filter/value pairs is expected, found {value!r}"
            )
            return 1.0
        rules: list[WeightRule | float] = []
        for place, each in enumerate(value):
            refuse_unknown(each, ["filter", "value"], f"{path}.{place}", self.problems)
            pattern = each.get("filter")
            if pattern is not None and not isinstance(pattern, str):
                self.problems.append(f"{path}.{place}.filter: text is expected, found {pattern!r}")
            elif problem := short_gradient(each.get("value")):
                self.problems.append(f"{path}.{place}.value: {problem}")
            elif is_weight(each.get("value")):
                rules.append(WeightRule(pattern, as_weight(each["value"])))
            else:
                self.problems.append(
                    f"{path}.{place}.value: a finite number or a list of numbers is expected, found "
                    f"{each.get('value')!r}"
                )
        return tuple(rules)

    def _merge_parameters(self, value: Mapping[str, Any], path: str) -> MergeParameters | None:
        if self.method is not None:
            return MergeParameters(settings=self._settings(value, path, self.method.parameters))
        advice = "give each entry of `models` its own `parameters: {weight: …}`"
        value = self._without_foreign(value, {**FOREIGN_PARAMETERS, "weight": advice}, path)
        before = len(self.problems)
        fitted = fitted_values(MergeParameters, value, path, self.problems, without=("settings",))
        return made(MergeParameters, fitted, path, self.problems) if len(self.problems) == before else None

    def _settings(self, value: Mapping[str, Any], path: str, known: Sequence[Parameter]) -> dict[str, Setting]:
        """Parameters of a method other than a sum, as they stand in the YAML."""
        assert self.method is not None
        parameters = {parameter.name: parameter for parameter in known}
        of_merge = [parameter.name for parameter in self.method.parameters if parameter.name not in parameters]
        self.problems += [
            f"{join(path, key)}: is one of the whole merge; write it under `parameters`"
            for key in value
            if key in of_merge
        ]
        refuse_unknown([key for key in value if key not in of_merge], list(parameters), path, self.problems)
        for key, entry in value.items():
            if key in parameters and (problem := setting_problem(parameters[key], entry)):
                self.problems.append(f"{join(path, key)}: {problem}")
        return dict(value)

    def align(self, value: Mapping[str, Any], path: str) -> AlignSection | None:
        before = len(self.problems)
        settings = {"seed": self.seed, **value}
        if isinstance(settings.get("calibration"), Mapping):
            settings["calibration"] = self._data(settings["calibration"], f"{path}.calibration")
        if isinstance(settings.get("reference"), str):
            settings["reference"] = self._located(settings["reference"])
        fitted = fitted_values(AlignSection, settings, path, self.problems)
        return made(AlignSection, fitted, path, self.problems) if len(self.problems) == before else None

    def _diagnose(self, value: Mapping[str, Any], path: str) -> DiagnoseSection | None:
        before = len(self.problems)
        own = [key for key in options_of(DiagnoseSection) if key != "data"]
        measured = {key: each for key, each in value.items() if key in own}
        settings = {key: each for key, each in value.items() if key not in own}
        data = self._data(settings, path, more=own)
        if isinstance(batch_norm := measured.get("batch_norm"), Mapping):
            measured["batch_norm"] = self._batch_norm(batch_norm, settings, f"{path}.batch_norm")
        fitted = fitted_values(DiagnoseSection, measured, path, self.problems, without=("data",))
        fitted["data"] = data
        return made(DiagnoseSection, fitted, path, self.problems) if len(self.problems) == before else None

    def _batch_norm(self, value: Mapping[str, Any], settings: Mapping[str, Any], path: str) -> BatchNormSection | None:
        """Keys of data replace those of the diagnosis."""
        calibration = {key: each for key, each in value.items() if key != "recompute"}
        data = self._data({**settings, **calibration, "labels": False}, path) if calibration else None
        return build(BatchNormSection, {"recompute": value.get("recompute"), "data": data}, path, self.problems)

    def _data(self, value: Mapping[str, Any], path: str, more: Sequence[str] = ()) -> EvaluationConfig | None:
        keys = list(options_of(EvaluationConfig))
        refuse_unknown(value, [*keys, *more], path, self.problems)
        known = {"seed": self.seed, **{key: each for key, each in value.items() if key in keys}}
        for key in ("dataset", "tokenizer"):
            if isinstance(known.get(key), str):
                known[key] = self._located(known[key])
        if isinstance(known.get("dataset"), int | float):
            known["dataset"] = str(known["dataset"])
        if not isinstance(known.get("dataset"), str | int | float | Path | None):
            # A recipe names its data; a loaded dataset is for callers from Python.
            self.problems.append(f"{path}.dataset: text is expected, found {known['dataset']!r}")
        return build(EvaluationConfig, known, path, self.problems)

    def _model_name(self, value: Any) -> Any:
        """What a model is called, where that is text."""
        return self._located(value) if isinstance(value, str) else value

    def _located(self, name: str) -> str:
        """A relative path beside the recipe file where there is one, else the name as it is; of `base+adapter` both."""
        if self._is_beside(name):
            assert self.folder is not None
            return str(self.folder / name)
        base, plus, adapter = name.partition("+")
        if plus and not Path(name).exists() and (self._is_beside(base) or self._is_beside(adapter)):
            return f"{self._located(base)}+{self._located(adapter)}"
        return name

    def _is_beside(self, name: str) -> bool:
        """Whether a name is a path beside the recipe file."""
        return self.folder is not None and not Path(name).is_absolute() and (self.folder / name).exists()
