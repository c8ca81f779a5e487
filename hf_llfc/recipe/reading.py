"""From YAML to a recipe: every problem is collected, and raised once."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from hf_llfc.errors import EvaluationError, RecipeError, raise_all, suggest
from hf_llfc.foundation.choices import UNION
from hf_llfc.foundation.limited_yaml import read_documents
from hf_llfc.foundation.model_names import existing, without_paths
from hf_llfc.merging.methods import MERGE_METHODS, MergeMethod, Parameter
from hf_llfc.recipe.base import settle_base
from hf_llfc.recipe.data import EvaluationConfig
from hf_llfc.recipe.documents import INHERITED, OF_MODELS, documents_of, folder_of, with_names
from hf_llfc.recipe.fitting import as_weight, gradient_problem, is_weight, setting_problem
from hf_llfc.recipe.options import Option, build, copied, fitted_values, join, made, options_of, refuse_unknown
from hf_llfc.recipe.overrides import apply_override
from hf_llfc.recipe.references import read_reference
from hf_llfc.recipe.sections import (
    SUMS,
    AlignSection,
    BatchNormSection,
    CalibrateSection,
    DiagnoseSection,
    MergeParameters,
    ModelEntry,
    ModelParameters,
    Recipe,
    Setting,
    Weight,
    WeightRule,
)
from hf_llfc.recipe.slices import WITHOUT_EFFECT, PartRecipe, SliceReader, as_slice
from hf_llfc.recipe.tokenizer import TokenizerSection, TokenRule

logger = logging.getLogger(__name__)

# Keys of other tools that people paste in, and what to write instead.
FOREIGN_KEYS = {
    "architecture": "the architecture is read from config.json; remove it",
    "merge": "one recipe is one merge; write its keys at the top",
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


def dump_recipe(recipe: Recipe, names: Mapping[str, str] | None = None) -> str:
    """Writes a recipe as YAML that `load_recipe` reads back, with the documents that it refers to.

    Args:
        recipe: The recipe.
        names: Names of models, data or folders → what stands in their place.
    """
    plain = [_with_shown_names(each, names or {}) for each in plain_documents(recipe)]
    return yaml.safe_dump_all(plain, sort_keys=False, allow_unicode=True) if len(plain) > 1 else _dumped(plain[0])


_NAMING = OF_MODELS | {"dataset", "tokenizer", "output_dir", "logging_dir"}


def _with_shown_names(value: Any, names: Mapping[str, str], key: str = "") -> Any:
    """Plain data in which names stand in place of others, where a recipe names a model, data or a folder.

    Elsewhere a word may be the same as a name: that of a merge method, say, for a folder that is called like it.
    """
    if isinstance(value, Mapping):
        return {
            (names.get(name, name) if key == "override_architecture" else name): _with_shown_names(each, names, name)
            for name, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [_with_shown_names(each, names, key) for each in value]
    if isinstance(value, str) and value in names and key not in _NAMING and not Path(value).is_absolute():
        return value
    return without_paths(value, names)


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
        base, tokenizer = recipe.base_model, recipe.tokenizer
        return replace(
            recipe,
            models=tuple(replace(entry, model=names.get(entry.model, entry.model)) for entry in recipe.models),
            base_model=base if base is None else names.get(base, base),
            tokenizer=tokenizer if tokenizer is None else tokenizer.renamed(names),
            override_architecture={names.get(name, name): each for name, each in recipe.override_architecture.items()},
        )

    plain = recipe.to_dict()
    moved = with_names({key: plain[key] for key in ("slices", "modules", "base_model") if key in plain}, names)
    return replace(load_recipe({**plain, **moved}), earlier=recipe.earlier)


def _read(path: Path) -> list[dict[str, Any]]:
    contents = [each for each in read_documents(path, RecipeError) if each is not None]
    if len(contents) < 2 and not (contents and isinstance(contents[0], dict)):
        found = "a list" if contents and isinstance(contents[0], list) else repr(contents[0])[:80] if contents else None
        raise RecipeError(
            f"{path}: a recipe is a mapping of keys that begins with `models:`, found {found or 'an empty file'}"
        )
    try:
        os.fsencode(repr(contents))
    except UnicodeEncodeError:
        logger.warning(
            "%s: has letters that the locale (%s) does not know; files of such names are not found: set PYTHONUTF8=1",
            path,
            sys.getfilesystemencoding(),
        )
    return contents


def _ordinary(content: dict[str, Any]) -> tuple[Recipe | None, list[str]]:
    """A recipe of whole models, and what is wrong with it."""
    reader = _Reader(None)
    return reader.recipe(content), reader.problems


def of_sums() -> dict[str, Option]:
    """The parameters of a weighted sum."""
    return {name: each for name, each in options_of(MergeParameters).items() if name != "settings"}


def _varies(parameters: Mapping[str, Any]) -> bool:
    """Whether λ or the way to normalize differs among tensors, so that weights are no longer one rule."""
    return any(isinstance(parameters.get(key), list | Mapping) for key in ("normalize", "lambda"))


class _Reader:
    """Turns plain data into a recipe and collects what is wrong."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.seed = 0
        self.name = "linear"
        self.method: MergeMethod | None = None
        self.has_weight_for_all = False
        self.is_slice = False
        self.architectures: dict[str, str] = {}
        self.problems: list[str] = []

    def recipe(self, content: Mapping[str, Any]) -> Recipe | None:
        content = {key: value for key, value in content.items() if key != WITHOUT_EFFECT}
        shared = content.get("parameters")
        named = str(content.get("merge_method"))
        self.name = named if named in MERGE_METHODS else "linear"  # another name is refused below
        self.method = MERGE_METHODS[self.name]
        if self.name in SUMS and not (isinstance(shared, Mapping) and _varies(shared)):
            self.method = None
        content = self._without_foreign(self._without_parameters(content), FOREIGN_KEYS, "")
        seed = content.get("seed", content.get("random_seed"))
        self.seed = seed if isinstance(seed, int) and not isinstance(seed, bool) else 0
        for key in ("dtype", "out_dtype"):
            if isinstance(content.get(key), str):
                content[key] = content[key].removeprefix("torch.")
        self._name_models(content)
        parts: tuple[PartRecipe, ...] = ()
        beside = [key for key in ("models", "slices", "modules") if key in content]
        for key in beside[1:]:
            self.problems.append(f"{key}: stands beside `{beside[0]}`; a recipe has one of them")
            del content[key]
        if beside and beside[0] != "models":
            reader = SliceReader(content, _ordinary, self._reference)
            if (lifted := reader.lifted()) is not None:
                return self._lifted(lifted, reader.problems)
            content, parts = self._of_parts(content, reader)
        else:
            if isinstance(shared, Mapping):
                content["parameters"] = self._merge_parameters(shared, "parameters")
            content["models"] = self._models(content.get("models"))
        readers = {"align": self.align, "calibrate": self._calibrate, "diagnose": self._diagnose}
        for key, read in {**readers, "tokenizer": self._tokenizer}.items():
            if isinstance(content.get(key), Mapping):
                content[key] = read(content[key], key)
        if isinstance(content.get("importance"), Mapping):
            content["importance"] = self._data(content["importance"], "importance")
        if self.architectures:
            content["override_architecture"] = {**(content.get("override_architecture") or {}), **self.architectures}
        values = fitted_values(Recipe, content, "", self.problems)
        values["parts"] = parts
        if self.problems:
            return None
        if values.get("base_model") is not None and not parts:
            self.problems += settle_base(values, is_slice=self.is_slice)
        return made(Recipe, values, "", self.problems) if not self.problems else None

    def _name_models(self, content: dict[str, Any]) -> None:
        """Models outside `models`, by their names."""
        for key in ("base_model", "tokenizer_source"):
            content[key] = self._reference(content.get(key), key)

    def _reference(self, value: Any, path: str) -> Any:
        """A model by its name; what names none, such as an index, as it is."""
        if value in (None, "base", UNION) or isinstance(value, int):
            return value
        read = read_reference(value, path, self.problems, self._located)
        if read is None:
            return None
        architecture = read.architecture
        if architecture is not None and self.architectures.setdefault(read.name, architecture) != architecture:
            self.problems.append(
                f"{join(path, 'override_architecture')}: {read.name} is {self.architectures[read.name]} elsewhere in "
                f"the recipe, and {architecture} here; give it one class"
            )
        return read.name

    def _without_parameters(self, content: dict[str, Any]) -> dict[str, Any]:
        """Parameters of the method that stand at the top, where mergekit overlooks them."""
        names = {parameter.name for parameter in MERGE_METHODS[self.name].parameters}
        stray = [key for key in content if key in names]
        self.problems += [f"{key}: stands under `parameters`; move it there, or remove it" for key in stray]
        return {key: value for key, value in content.items() if key not in stray}

    def _lifted(self, content: Mapping[str, Any], problems: Sequence[str]) -> Recipe | None:
        """The recipe of one slice, whose models were moved to `models`."""
        before = len(self.problems)
        self.is_slice = True
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
            if entry.get("model") is not None:
                before = len(self.problems)
                entry["model"] = self._reference(entry["model"], f"{path}.model")
                if len(self.problems) > before:
                    continue
            if isinstance(entry.get("importance"), Mapping):
                entry["importance"] = self._data(entry["importance"], f"{path}.importance")
            if isinstance(entry.get("calibrate_on"), Mapping):
                entry["calibrate_on"] = self._unlabelled(entry["calibrate_on"], f"{path}.calibrate_on")
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
            settings = self._settings(value, path, of_model)
            return ModelParameters(settings=settings) if settings else None
        value = self._without_effect(value, path, ["weight"])
        if "weight" not in value and self.has_weight_for_all:
            return None
        return ModelParameters(self._weight(value.get("weight", 1.0), f"{path}.weight"))

    def _weight(self, value: Any, path: str) -> Weight | tuple[WeightRule | float, ...]:
        value = [value] if isinstance(value, Mapping) else value
        if is_weight(value):
            return as_weight(value)
        if problem := gradient_problem(value):
            self.problems.append(f"{path}: {problem}")
            return 1.0
        if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
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
            elif problem := gradient_problem(each.get("value")):
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
        before = len(self.problems)
        value = self._without_effect(value, path, [each.key for each in of_sums().values()])
        weight = value.get("weight")
        self.has_weight_for_all = weight is not None
        given = {**value, "weight": self._weight(weight, f"{path}.weight") if weight is not None else None}
        fitted = fitted_values(MergeParameters, given, path, self.problems, without=("settings",))
        return made(MergeParameters, fitted, path, self.problems) if len(self.problems) == before else None

    def _without_effect(self, value: Mapping[str, Any], path: str, known: Sequence[str]) -> dict[str, Any]:
        """Parameters of a sum, less those that mergekit has for it and that change nothing; others are refused."""
        idle = {WITHOUT_EFFECT, *(each.name for each in MERGE_METHODS[self.name].parameters)} - {*known}
        idle -= {each.key for each in of_sums().values()}
        for key in value:
            if key in idle and key != WITHOUT_EFFECT:
                logger.warning("%s: changes nothing in %s, here as in mergekit", join(path, key), self.name)
        self._refuse_unknown([key for key in value if key not in idle], known, path)
        return {key: entry for key, entry in value.items() if key in known}

    def _settings(self, value: Mapping[str, Any], path: str, known: Sequence[Parameter]) -> dict[str, Setting]:
        """Parameters of a method other than a sum, as they stand in the YAML."""
        assert self.method is not None
        parameters = {parameter.name: parameter for parameter in known}
        of_merge = [parameter.name for parameter in self.method.parameters if parameter.name not in parameters]
        if WITHOUT_EFFECT not in parameters and WITHOUT_EFFECT not in of_merge:
            value = {key: entry for key, entry in value.items() if key != WITHOUT_EFFECT}
        self.problems += [
            f"{join(path, key)}: is one of the whole merge; write it under `parameters`"
            for key in value
            if key in of_merge
        ]
        self._refuse_unknown([key for key in value if key not in of_merge], list(parameters), path)
        for key, entry in value.items():
            if key in parameters and (problem := setting_problem(parameters[key], entry)):
                self.problems.append(f"{join(path, key)}: {problem}")
        return dict(value)

    def _refuse_unknown(self, keys: Iterable[str], known: Sequence[str], path: str) -> None:
        """Appends a problem for each parameter that the method does not have, with those that do or the nearest."""
        unknown = [key for key in keys if key not in known]
        elsewhere = {
            key: [name for name, method in MERGE_METHODS.items() if any(each.name == key for each in method.parameters)]
            for key in unknown
        }
        for key, methods in elsewhere.items():
            of_whom = f"{self.name} has {', '.join(known) or 'none'}"
            others = [name for name in methods if name != self.name]
            if others:
                of_whom += f"; {key} is one of {', '.join(others)}"
            hint = suggest(str(key), known) if not others else ""
            self.problems.append(f"{join(path, str(key))}: unknown key{hint} ({of_whom})")

    def _tokenizer(self, value: Mapping[str, Any], path: str) -> TokenizerSection | None:
        before = len(self.problems)
        given = {**value, "source": self._reference(value.get("source"), join(path, "source"))}
        tokens, rules = value.get("tokens") or {}, {}
        if not isinstance(tokens, Mapping):
            self.problems.append(f"{path}.tokens: a mapping of tokens to rules is expected, found {tokens!r}")
            return None
        for token, rule in tokens.items():
            at = f"{path}.tokens.{token}"
            if not isinstance(token, str) or not token:
                self.problems.append(f"{at}: a token is text; put it in quotes")
            elif rule is not None and not isinstance(rule, Mapping):
                self.problems.append(f"{at}: `source` and `force` are expected, found {rule!r}")
            else:
                rules[token] = build(TokenRule, self._token_rule(rule or {}, at), at, self.problems)
        fitted = fitted_values(TokenizerSection, {**given, "tokens": rules}, path, self.problems)
        return made(TokenizerSection, fitted, path, self.problems) if len(self.problems) == before else None

    def _token_rule(self, rule: Mapping[str, Any], path: str) -> dict[str, Any]:
        """The rule of a token with its models by their names."""
        source = rule.get("source")
        if isinstance(source, Mapping) and "kind" in source:
            named = {"model": self._reference(source["model"], f"{path}.source.model")} if "model" in source else {}
            return {**rule, "source": {**source, **named}}
        return {**rule, "source": self._reference(source, f"{path}.source")}

    def align(self, value: Mapping[str, Any], path: str) -> AlignSection | None:
        before = len(self.problems)
        settings = {"seed": self.seed, **value}
        if isinstance(settings.get("calibration"), Mapping):
            settings["calibration"] = self._data(settings["calibration"], f"{path}.calibration")
        settings["reference"] = self._reference(settings.get("reference"), f"{path}.reference")
        fitted = fitted_values(AlignSection, settings, path, self.problems)
        return made(AlignSection, fitted, path, self.problems) if len(self.problems) == before else None

    def _calibrate(self, value: Mapping[str, Any], path: str) -> CalibrateSection | None:
        before = len(self.problems)
        own = [key for key in options_of(CalibrateSection) if key != "data"]
        given = {key: each for key, each in value.items() if key not in own}
        data = self._unlabelled(given, path, more=own) if given else None
        settings = {key: each for key, each in value.items() if key in own}
        fitted = fitted_values(CalibrateSection, settings, path, self.problems, without=("data",))
        fitted["data"] = data
        return made(CalibrateSection, fitted, path, self.problems) if len(self.problems) == before else None

    def _unlabelled(self, value: Mapping[str, Any], path: str, more: Sequence[str] = ()) -> EvaluationConfig | None:
        """Data whose labels are not looked at."""
        if value.get("labels") not in (None, False):
            self.problems.append(f"{path}.labels: a calibration looks at no labels; remove it")
        return self._data({**value, "labels": False}, path, more)

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

    def _located(self, name: str) -> str:
        """A relative path beside the recipe file where there is one, else the name as it is; of `base+adapter` both."""
        if self._is_beside(name):
            assert self.folder is not None
            return str(self.folder / name)
        base, plus, adapter = name.partition("+")
        if plus and existing(name) is None and (self._is_beside(base) or self._is_beside(adapter)):
            return f"{self._located(base)}+{self._located(adapter)}"
        return name

    def _is_beside(self, name: str) -> bool:
        """Whether a name is a path beside the recipe file."""
        return self.folder is not None and not Path(name).is_absolute() and existing(self.folder / name) is not None
