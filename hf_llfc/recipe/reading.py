"""From YAML to a recipe: every problem is collected, and raised once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import yaml

from hf_llfc.errors import RecipeError, raise_all, suggest
from hf_llfc.foundation.choices import (
    ALIGNMENT_METHODS,
    GROUPS,
    MEASURES,
    SOLVERS,
    STARTS,
    SUGGESTIONS,
    TOGETHER,
    TRACKERS,
    UNION,
    UNITS,
)
from hf_llfc.foundation.limited_yaml import read_yaml
from hf_llfc.merging.mergekit_methods import MERGEKIT_METHODS, MergekitMethod
from hf_llfc.recipe.agreement import disagreements
from hf_llfc.recipe.data import EvaluationConfig
from hf_llfc.recipe.fitting import as_weight, describe, fit, is_number, is_weight, setting_problem
from hf_llfc.recipe.overrides import apply_override
from hf_llfc.recipe.sections import (
    DTYPES,
    MERGE_METHODS,
    AlignSection,
    BatchNormSection,
    DiagnoseSection,
    KeepSection,
    MergeParameters,
    ModelEntry,
    ModelParameters,
    PublishSection,
    Recipe,
    Setting,
    Weight,
    WeightRule,
    copied,
)

# Keys of other tools that people paste in, and what to write instead.
FOREIGN_KEYS = {
    "slices": "layers cannot be taken from different places; merge whole models under `models`",
    "modules": "parts cannot be merged apart; merge whole models under `models`, with weights by `filter`",
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

_BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        source: A YAML file, or what it says.
        overrides: `key.sub=value` replacements; values are YAML, list entries go by index (`models.0.model=…`).

    Raises:
        RecipeError: Everything that is wrong with it.
    """
    if isinstance(source, Mapping):
        content, where, folder = copied(source), "the recipe", None
    else:
        content, where, folder = _read(Path(source)), str(source), Path(source).parent
    for override in overrides:
        apply_override(content, override)
    reader = _Reader(folder)
    recipe = reader.recipe(content)
    raise_all(reader.problems, RecipeError, f"{where} cannot be run")
    assert recipe is not None
    return recipe


def load_align(settings: Mapping[str, Any]) -> AlignSection:
    """Reads and checks the section `align` of a recipe alone; its `calibration` may also be an `EvaluationConfig`.

    Raises:
        RecipeError: Everything that is wrong with it.
    """
    calibration = settings.get("calibration")
    is_read = isinstance(calibration, EvaluationConfig)
    reader = _Reader(None)
    section = reader.align({**copied(settings), "calibration": None} if is_read else copied(settings), "align")
    raise_all(reader.problems, RecipeError, "the models cannot be aligned")
    assert section is not None
    return dataclasses.replace(section, calibration=calibration) if is_read else section


def dump_recipe(recipe: Recipe) -> str:
    """Writes a recipe as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(path, RecipeError)
    if not isinstance(content, dict):
        found = "an empty file" if content is None else "a list" if isinstance(content, list) else repr(content)[:80]
        raise RecipeError(f"{path}: a recipe is a mapping of keys that begins with `models:`, found {found}")
    return content


class _Reader:
    """Turns plain data into a recipe and collects what is wrong."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.seed = 0
        self.mergekit: MergekitMethod | None = None
        self.problems: list[str] = []

    def recipe(self, content: Mapping[str, Any]) -> Recipe | None:
        self.mergekit = MERGEKIT_METHODS.get(str(content.get("merge_method")))
        content = self._without_foreign(content, FOREIGN_KEYS, "")
        for key in ("max_shard_size", "max_memory"):
            if isinstance(content.get(key), str):
                content[key] = self._bytes(content[key], key)
        for key in ("base_model", "tokenizer_source"):
            if isinstance(content.get(key), str) and content[key] not in ("base", UNION):
                content[key] = self._located(content[key])
        fits, seed = fit(content.get("seed"), int)
        self.seed = seed if fits else 0
        self._known(content, [each.name for each in dataclasses.fields(Recipe)], "")
        values: dict[str, Any] = {
            "models": self._models(content.get("models")),
            "parameters": self._section(content, "parameters", self._merge_parameters) or MergeParameters(),
            "align": self._section(content, "align", self.align) or AlignSection(method="none"),
            "diagnose": self._section(content, "diagnose", self._diagnose),
            "keep_where_broken": self._section(
                content, "keep_where_broken", lambda each, path: self._build(KeepSection, each, path)
            ),
            "publish": self._section(content, "publish", lambda each, path: self._build(PublishSection, each, path)),
        }
        plain = {
            key: value for key, value in content.items() if key not in values and key in Recipe.__dataclass_fields__
        }
        values |= self._typed(Recipe, plain, "")
        if not values.get("output_dir"):
            self.problems.append("output_dir: missing; name the folder to write")
        method = values.get("merge_method", MERGE_METHODS[0])
        if method not in MERGE_METHODS:
            self.problems.append(
                f"merge_method: {method!r} is not supported{suggest(method, MERGE_METHODS)} "
                f"(supported: {', '.join(MERGE_METHODS)})"
            )
        for key in ("dtype", "out_dtype"):
            if values.get(key) is not None:
                self._choice(values[key], DTYPES, key)
        for place, name in enumerate(values.get("log_with", ())):
            self._choice(name, TRACKERS, f"log_with[{place}]")
        if self.problems:
            return None
        if values.get("base_model") is not None:
            self._drop_base(values)
        recipe = Recipe(**values)
        self.problems += disagreements(recipe)
        return recipe

    def _without_foreign(self, content: Mapping[str, Any], foreign: Mapping[str, str], path: str) -> dict[str, Any]:
        self.problems += [f"{_join(path, key)}: {advice}" for key, advice in foreign.items() if key in content]
        return {key: value for key, value in content.items() if key not in foreign}

    def _bytes(self, text: str, path: str) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
        if match is None or match[2] not in _BYTES:
            self.problems.append(f"{path}: bytes, or a size such as 5GB or 500MiB, is expected, found {text!r}")
            return 1
        return int(float(match[1]) * _BYTES[match[2]])

    def _drop_base(self, values: dict[str, Any]) -> None:
        """Recipes of other tools also list the base of task arithmetic among the models, without a weight."""
        models, align = values["models"], values["align"]
        place = next((i for i, each in enumerate(models) if each.model == values["base_model"]), None)
        if place is None or len(models) == 1:
            return
        if models[place].parameters is not None and self.mergekit is None:
            return
        if models[place].parameters is not None and models[place].parameters.settings:
            self.problems.append(f"models.{place}.parameters: this is the base_model, which has no parameters")
        values["models"] = models[:place] + models[place + 1 :]
        if isinstance(align.reference, int) and align.reference > place:
            values["align"] = dataclasses.replace(align, reference=align.reference - 1)

    def _section(self, content: Mapping[str, Any], key: str, read: Any) -> Any:
        value = content.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.problems.append(f"{key}: a mapping of keys is expected, found {value!r}")
            return None
        return read(value, key)

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
            parameters = each.get("parameters")
            rest = {key: entry for key, entry in each.items() if key != "parameters"}
            self._known(each, [field.name for field in dataclasses.fields(ModelEntry)], path)
            typed = self._typed(
                ModelEntry, {k: v for k, v in rest.items() if k in ModelEntry.__dataclass_fields__}, path
            )
            if "model" not in typed:
                if "model" not in rest:
                    self.problems.append(f"{path}.model: missing")
                continue
            typed["model"] = self._located(typed["model"])
            entries.append(ModelEntry(**typed, parameters=self._model_parameters(parameters, f"{path}.parameters")))
        return tuple(entries)

    def _model_parameters(self, value: Any, path: str) -> ModelParameters | None:
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.problems.append(f"{path}: a mapping of parameters is expected, found {value!r}")
            return None
        if self.mergekit is not None:
            return ModelParameters(settings=self._settings(value, path, self.mergekit.of_model))
        value = self._without_foreign(value, FOREIGN_PARAMETERS, path)
        self._known(value, ["weight"], path)
        return ModelParameters(self._weight(value.get("weight", 1.0), f"{path}.weight"))

    def _weight(self, value: Any, path: str) -> Weight | tuple[WeightRule | float, ...]:
        value = [value] if isinstance(value, Mapping) else value
        if is_weight(value):
            return as_weight(value)
        if not isinstance(value, list) or not value or not all(isinstance(each, Mapping) for each in value):
            self.problems.append(
                f"{path}: a finite number, a list of numbers or of filter/value pairs is expected, found {value!r}"
            )
            return 1.0
        rules: list[WeightRule | float] = []
        for place, each in enumerate(value):
            self._known(each, ["filter", "value"], f"{path}.{place}")
            pattern = each.get("filter")
            if pattern is not None and not isinstance(pattern, str):
                self.problems.append(f"{path}.{place}.filter: text is expected, found {pattern!r}")
            elif is_weight(each.get("value")):
                rules.append(WeightRule(pattern, as_weight(each["value"])))
            else:
                self.problems.append(
                    f"{path}.{place}.value: a finite number or a list of numbers is expected, found "
                    f"{each.get('value')!r}"
                )
        return tuple(rules)

    def _merge_parameters(self, value: Mapping[str, Any], path: str) -> MergeParameters | None:
        if self.mergekit is not None:
            return MergeParameters(settings=self._settings(value, path, self.mergekit.parameters))
        advice = "give each entry of `models` its own `parameters: {weight: …}`"
        value = self._without_foreign(value, {**FOREIGN_PARAMETERS, "weight": advice}, path)
        renamed = {("scale" if key == "lambda" else key): each for key, each in value.items() if key != "scale"}
        self._known(value, ["normalize", "lambda"], path)
        return self._build(MergeParameters, {k: v for k, v in renamed.items() if k in ("normalize", "scale")}, path)

    def _settings(self, value: Mapping[str, Any], path: str, names: Sequence[str]) -> dict[str, Setting]:
        """Parameters of a method that mergekit computes, which are given to it as they are."""
        assert self.mergekit is not None
        misplaced = [key for key in value if key in self.mergekit.of_merge and key not in names]
        self.problems += [
            f"{_join(path, key)}: is one of the whole merge; write it under `parameters`" for key in misplaced
        ]
        self._known({key: each for key, each in value.items() if key not in misplaced}, names, path)
        for key, each in value.items():
            if key in names and (problem := setting_problem(key, each)):
                self.problems.append(f"{_join(path, key)}: {problem}, found {each!r}")
        return dict(value)

    def align(self, value: Mapping[str, Any], path: str) -> AlignSection | None:
        calibration = self._data(value.get("calibration"), f"{path}.calibration")
        settings = {"seed": self.seed, **value, "calibration": calibration}
        if isinstance(settings.get("reference"), str):
            settings["reference"] = self._located(settings["reference"])
        built: AlignSection | None = self._build(AlignSection, settings, path)
        if built is not None:
            self._choice(built.method, ALIGNMENT_METHODS, f"{path}.method")
            self._choice(built.start, STARTS, f"{path}.start")
            self._choice(built.groups, GROUPS, f"{path}.groups")
            self._choice(built.together, TOGETHER, f"{path}.together")
            self._choice(built.solver, SOLVERS, f"{path}.solver")
            for name in ("restarts", "max_sweeps", "steps"):
                if vars(built)[name] is not None and vars(built)[name] < 1:
                    self.problems.append(f"{path}.{name}: at least 1 is expected, found {vars(built)[name]}")
            for name in ("learning_rate", "anchors"):
                if vars(built)[name] is not None and not 0 < vars(built)[name] < float("inf"):
                    self.problems.append(f"{path}.{name}: a number above 0 is expected, found {vars(built)[name]}")
            if built.method in ("none", "activation_matching") and built.anchors is not None:
                self.problems.append(f"{path}.anchors: has no meaning for the method {built.method}; weights have them")
            if built.method != "learned_matching":
                self.problems += [
                    f"{path}.{name}: has no meaning for the method {built.method}; only learned_matching learns"
                    for name in ("steps", "learning_rate")
                    if vars(built)[name] is not None
                ]
        return built

    def _diagnose(self, value: Mapping[str, Any], path: str) -> DiagnoseSection | None:
        own = ("alphas", "layers", "unit", "measures", "suggest", "offload", "batch_norm")
        settings = {key: each for key, each in value.items() if key not in own}
        data = self._data(settings, path, more=own)
        alphas = self._alphas(value.get("alphas", 11), f"{path}.alphas")
        layers = self._words(value.get("layers"), f"{path}.layers", "module patterns")
        measures = self._words(value.get("measures"), f"{path}.measures", "measures")
        for place, measure in enumerate(measures):
            self._choice(measure, MEASURES, f"{path}.measures[{place}]")
        unit = value.get("unit", "sample")
        self._choice(unit, UNITS, f"{path}.unit")
        suggested = value.get("suggest")
        if suggested is not None:
            self._choice(suggested, SUGGESTIONS, f"{path}.suggest")
        offload = value.get("offload", False)
        if not isinstance(offload, bool):
            self.problems.append(f"{path}.offload: true or false is expected, found {offload!r}")
        batch_norm = value.get("batch_norm")
        section = BatchNormSection()
        if isinstance(batch_norm, Mapping):
            calibration = {key: each for key, each in batch_norm.items() if key != "recompute"}
            recompute = batch_norm.get("recompute", True)
            if not isinstance(recompute, bool):
                self.problems.append(f"{path}.batch_norm.recompute: true or false is expected, found {recompute!r}")
            if calibration:
                calibration = {**settings, **calibration, "labels": False}
            section = BatchNormSection(recompute is True, self._data(calibration or None, f"{path}.batch_norm"))
        elif batch_norm is not None:
            self.problems.append(f"{path}.batch_norm: a mapping of keys is expected, found {batch_norm!r}")
        return (
            None if data is None else DiagnoseSection(data, alphas, layers, unit, measures, suggested, offload, section)
        )

    def _words(self, value: Any, path: str, what: str) -> tuple[str, ...]:
        """One word or a list of words."""
        words = [value] if isinstance(value, str) else value or []
        if not isinstance(words, list) or not all(isinstance(each, str) for each in words):
            self.problems.append(f"{path}: a list of {what} is expected, found {words!r}")
            return ()
        return tuple(words)

    def _alphas(self, value: Any, path: str) -> tuple[float, ...]:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 3:
            return tuple(round(step / (value - 1), 12) for step in range(value))
        if isinstance(value, list) and value and all(is_number(each) and 0 <= each <= 1 for each in value):
            return tuple(sorted({float(each) for each in value}))
        self.problems.append(
            f"{path}: a number of at least 3 or a list of values from 0 to 1 is expected, found {value!r}"
        )
        return ()

    def _data(self, value: Any, path: str, more: Sequence[str] = ()) -> EvaluationConfig | None:
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.problems.append(f"{path}: a mapping of keys is expected, found {value!r}")
            return None
        fields = [each.name for each in dataclasses.fields(EvaluationConfig)]
        self._known(value, [*fields, *more], path)
        missing = [name for name in ("task", "dataset") if name not in value]
        self.problems += [f"{path}.{name}: missing" for name in missing]
        before = len(self.problems)
        known = {"seed": self.seed, **{key: each for key, each in value.items() if key in fields}}
        typed = self._typed(EvaluationConfig, known, path)
        for key in ("dataset", "tokenizer"):
            if isinstance(typed.get(key), str):
                typed[key] = self._located(typed[key])
        if not typed.keys() >= {"task", "dataset"}:
            return None
        try:
            config = EvaluationConfig(**typed)
            return config if len(self.problems) == before else None
        except ValueError as error:
            heading, *lines = str(error).splitlines()
            lines = [line.strip(" -") for line in lines] or [heading.partition(": ")[2]]
            self.problems += [f"{path}: {line}" for line in lines]
        return None

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

    def _build(self, kind: Any, value: Mapping[str, Any], path: str) -> Any:
        names = [each.name for each in dataclasses.fields(kind)]
        self._known(value, names, path)
        before = len(self.problems)
        typed = self._typed(kind, {key: each for key, each in value.items() if key in names}, path)
        for each in dataclasses.fields(kind):
            if _is_required(each) and each.name not in value:
                self.problems.append(f"{path}.{each.name}: missing")
        return kind(**typed) if len(self.problems) == before else None

    def _typed(self, kind: Any, value: Mapping[str, Any], path: str) -> dict[str, Any]:
        # A recipe names its data; a loaded dataset is for callers from Python.
        hints = get_type_hints(kind, localns={"datasets": SimpleNamespace(Dataset=str)})
        has_default = {each.name for each in dataclasses.fields(kind) if not _is_required(each)}
        typed = {}
        for key, each in value.items():
            fits, converted = fit(each, hints[key])
            if each is None and not fits and key in has_default:
                continue  # `key:` with nothing after it, also as an override, is the default.
            if fits:
                typed[key] = converted
            else:
                shown = _join(path, "lambda" if kind is MergeParameters and key == "scale" else key)
                self.problems.append(f"{shown}: {describe(hints[key])} is expected, found {each!r}")
        return typed

    def _known(self, value: Mapping[str, Any], names: Sequence[str], path: str) -> None:
        for key in value:
            if key not in names:
                hint = suggest(str(key), names) or f" (known: {', '.join(names)})"
                self.problems.append(f"{_join(path, str(key))}: unknown key{hint}")

    def _choice(self, value: str, choices: Sequence[str], path: str) -> None:
        if value not in choices:
            self.problems.append(f"{path}: unknown {value!r}{suggest(value, choices)} (known: {', '.join(choices)})")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _is_required(each: dataclasses.Field[Any]) -> bool:
    return each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
