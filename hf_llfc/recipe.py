"""A recipe: the YAML of a run as typed, strict data.

A superset of what the merging community writes (`models`, `merge_method`, `base_model`, `parameters`, `dtype`,
`out_dtype`, `tokenizer_source`), plus `align`, `diagnose`, `publish` and `output_dir`. Everything that is wrong is
collected and raised once; an unknown key names its path and the nearest key.

A relative path of a model, tokenizer or dataset is looked up beside the recipe file first, then in the working
directory; what is in neither place is a Hub id. `output_dir` is relative to the working directory.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from hf_llfc.choices import ALIGNMENT_METHODS, GROUPS, MEASURES, METHODS_WITH_DATA, SOLVERS, STARTS, SUGGESTIONS, UNITS
from hf_llfc.errors import RecipeError, raise_all, suggest
from hf_llfc.evaluation.config import EvaluationConfig
from hf_llfc.limited_yaml import parse_yaml, read_yaml
from hf_llfc.methods import MERGEKIT_METHODS, SHARES, SWITCHES, MergekitMethod

MERGE_METHODS = ("linear", "task_arithmetic", *MERGEKIT_METHODS)
DTYPES = ("float64", "float32", "bfloat16", "float16")

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

Weight = float | tuple[float, ...]

Setting = bool | float | list[Any] | dict[str, Any]
"""A value of mergekit's, a gradient of values over the layers, or values with filters, as its YAML."""


@dataclass(frozen=True)
class WeightRule:
    """A weight for the tensors or axes that match a pattern.

    Attributes:
        filter: Shell pattern or part of a tensor's name, or the name of an axis that the tensor carries; every tensor
            where None.
        value: One weight, or a gradient over the layers.
    """

    filter: str | None
    value: Weight


@dataclass(frozen=True)
class ModelParameters:
    """Parameters of one model.

    Attributes:
        weight: One number, a gradient over the layers, or rules of which the first that matches counts.
        settings: Of a method that mergekit computes all parameters, the weight among them, as in its YAML.
    """

    weight: Weight | tuple[WeightRule | float, ...] = 1.0
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelEntry:
    """One model of the merge.

    Attributes:
        model: Hub id, `id@revision`, or a local folder; `base+adapter` for a base with an adapter of peft folded in.
        parameters: Its parameters; equal shares where no model of the recipe has a weight.
        trust_remote_code: Whether code that comes with this checkpoint may be run.
    """

    model: str
    parameters: ModelParameters | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class MergeParameters:
    """Parameters of the merge.

    Attributes:
        normalize: True divides the weights by their sum; False allows weights that do not sum to one. Without it a
            linear merge whose weights do not sum to one is an error.
        scale: Key `lambda`; task arithmetic: factor on every model's weight.
        settings: Of a method that mergekit computes all parameters, as in its YAML.
    """

    normalize: bool | None = None
    scale: float = 1.0
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class AlignSection:
    """How the models are brought into the coordinates of the reference.

    Attributes:
        method: One of `ALIGNMENT_METHODS`.
        reference: Index of the model that stays, or its id; task arithmetic aligns onto `base_model` instead.
        axes: Patterns of the axes that may move; all symmetric axes where empty.
        exclude: Patterns of axes that stay, for example `residual`.
        groups: `permutation`, or `full`: all that the architecture allows, between models in canonical form.
        start: `identity`, or `activation_matching` to start weight matching from.
        solver: How wide axes are assigned, one of `SOLVERS`.
        restarts: Starts of weight matching.
        max_sweeps: Sweeps per start.
        seed: Seed of visit orders and random starts; that of the recipe if left out.
        steps: Of learned matching; 500 where None.
        learning_rate: Of learned matching; 0.02 where None.
        calibration: Data for activation matching and learned matching. With labels, what is learned has a low loss at
            the merge; without, a small LLFC gap.
    """

    method: str = "weight_matching"
    reference: int | str = 0
    axes: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    groups: str = "permutation"
    start: str = "identity"
    solver: str = "exact"
    restarts: int = 2
    max_sweeps: int = 50
    seed: int = 0
    steps: int | None = None
    learning_rate: float | None = None
    calibration: EvaluationConfig | None = None

    @property
    def uses_data(self) -> bool:
        """Whether models are run on calibration data."""
        return self.method != "none" and any(each in METHODS_WITH_DATA for each in (self.method, self.start))


@dataclass(frozen=True)
class BatchNormSection:
    """How running statistics of BatchNorm are made for merged weights.

    Attributes:
        recompute: Whether they are measured anew (REPAIR); otherwise they are averaged like weights.
        data: Calibration data; that of `diagnose` without its labels where None. Training data are best.
    """

    recompute: bool = True
    data: EvaluationConfig | None = None


@dataclass(frozen=True)
class DiagnoseSection:
    """What is measured on the merge.

    Attributes:
        data: Task and data; its keys stand in the section itself.
        alphas: The grid of α: a number of equal steps from 0 to 1, or values.
        layers: Patterns of module names; block outputs and the logits where empty.
        unit: `sample`, one feature vector a sample, or `token`, one a token.
        measures: What else to measure on a pair: any of `MEASURES`.
        offload: Whether every module reads its weights when it runs, for models that do not fit into memory.
        suggest: Whether to look for better weights: one of `SUGGESTIONS`, or None.
        batch_norm: See `BatchNormSection`.
    """

    data: EvaluationConfig
    alphas: tuple[float, ...]
    layers: tuple[str, ...] = ()
    unit: str = "sample"
    measures: tuple[str, ...] = ()
    suggest: str | None = None
    offload: bool = False
    batch_norm: BatchNormSection = field(default_factory=BatchNormSection)


@dataclass(frozen=True)
class KeepSection:
    """Layer-selective merging: where features are not connected, one model's weights stay as they are.

    Attributes:
        model: Index of the model whose weights stay.
        ratio: A block is kept where its LLFC exceeds this share of the baseline, measured on the data of `diagnose`.
    """

    model: int = 0
    ratio: float = 0.5


@dataclass(frozen=True)
class PublishSection:
    """Where the merge goes on the Hub.

    Attributes:
        repo_id: The repository.
        private: Whether a new repository is private.
        create_pr: Whether a pull request is opened instead of a commit.
        revision: The branch; the main one where None.
        tag: Names the commit.
        licence: What the card says; combined from the parents where None.
    """

    repo_id: str
    private: bool | None = None
    create_pr: bool = False
    revision: str | None = None
    tag: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole run; see the module.

    Attributes:
        models: The parents; the first one's config and names are those of the result.
        output_dir: The folder to write.
        merge_method: One of `MERGE_METHODS`; `linear` and `task_arithmetic` are computed here, the others by mergekit.
        base_model: θ₀ of task arithmetic, or the base of a method that mergekit computes.
        parameters: Of the merge.
        dtype: Dtype of the result unless `out_dtype` is given; arithmetic is always exact to one rounding. That of
            the first model where None.
        out_dtype: Dtype of the result.
        tokenizer_source: Whose tokenizer and processor files are carried over: the index of a model, or a model, which
            need not be one that is merged, or `base`; the first where None.
        align: How the models are aligned; `method: none` where the recipe has no such section.
        diagnose: What is measured; nothing where None.
        keep_where_broken: Where the weights of one model stay; nowhere where None.
        publish: Where the result goes; nowhere where None.
        seed: For every section that gives none of its own.
        overwrite: Whether an earlier output may be replaced.
        allow_pickle: Whether models whose weights are pickled, not safetensors, may be read.
        max_shard_size: Bytes above which weights are split into several files; in YAML also as `5GB`.
        max_memory: Bytes of tensors that have to be moved or made as they are merged and may be in memory together;
            the largest one always may. In YAML also as `1GB`.
    """

    models: tuple[ModelEntry, ...]
    output_dir: str
    merge_method: str = "linear"
    base_model: str | None = None
    parameters: MergeParameters = field(default_factory=MergeParameters)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: int | str | None = None
    align: AlignSection = field(default_factory=lambda: AlignSection(method="none"))
    diagnose: DiagnoseSection | None = None
    keep_where_broken: KeepSection | None = None
    publish: PublishSection | None = None
    seed: int = 0
    overwrite: bool = False
    allow_pickle: bool = False
    max_shard_size: int = 5_000_000_000
    max_memory: int = 1 << 28

    @property
    def mergekit_method(self) -> MergekitMethod | None:
        """What mergekit computes; None of a method that is computed here."""
        return MERGEKIT_METHODS.get(self.merge_method)

    @property
    def reference_index(self) -> int:
        """Which model stays."""
        if isinstance(self.align.reference, int):
            return self.align.reference
        return [entry.model for entry in self.models].index(self.align.reference)

    @property
    def result_dtype(self) -> str | None:
        """Dtype of the written tensors; None keeps that of the first model."""
        return self.out_dtype or self.dtype

    def to_dict(self) -> dict[str, Any]:
        """As plain data that `load_recipe` reads back; defaults left out."""
        plain: dict[str, Any] = _plain(self)
        return plain


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        source: A YAML file, or what it says.
        overrides: `key.sub=value` replacements; values are YAML, list entries go by index (`models.0.model=…`).

    Raises:
        RecipeError: Everything that is wrong with it.
    """
    if isinstance(source, Mapping):
        content, where, folder = _copied(source), "the recipe", None
    else:
        content, where, folder = _read(Path(source)), str(source), Path(source).parent
    for override in overrides:
        _override(content, override)
    reader = _Reader(folder)
    recipe = reader.recipe(content)
    raise_all(reader.problems, RecipeError, f"{where} cannot be run")
    assert recipe is not None
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """Writes a recipe as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(path, RecipeError)
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, found {type(content).__name__}")
    return content


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(entry) for entry in value]
    return value


def _override(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"override {override!r}: write key.sub=value")
    target: Any = content
    *parents, last = path.split(".")
    for place, key in enumerate(parents):
        following = parents[place + 1] if place + 1 < len(parents) else last
        if isinstance(target, list):
            target = target[_index(target, key, override)]
        elif isinstance(target, dict):
            if target.get(key) is None:
                if following.isdigit():
                    raise RecipeError(f"override {override!r}: there is no list {key!r} in the recipe")
                target[key] = {}
            target = target[key]
        else:
            raise RecipeError(f"override {override!r}: {'.'.join(parents[:place])!r} has no keys below it")
    value = parse_yaml(text, f"override {override!r}", RecipeError)
    if isinstance(target, list):
        target[_index(target, last, override)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise RecipeError(f"override {override!r}: {'.'.join(parents)!r} has no keys below it")


def _index(target: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(target):
        raise RecipeError(f"override {override!r}: {key!r} is not one of the {len(target)} entries of that list")
    return int(key)


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
            if isinstance(content.get(key), str):
                content[key] = self._located(content[key])
        fits, seed = _fit(content.get("seed"), int)
        self.seed = seed if fits else 0
        self._known(content, [each.name for each in dataclasses.fields(Recipe)], "")
        values: dict[str, Any] = {
            "models": self._models(content.get("models")),
            "parameters": self._section(content, "parameters", self._merge_parameters) or MergeParameters(),
            "align": self._section(content, "align", self._align) or AlignSection(method="none"),
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
        if "output_dir" not in values:
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
        if self.problems:
            return None
        if values.get("base_model") is not None:
            self._drop_base(values)
        recipe = Recipe(**values)
        self._agree(recipe)
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
        if _is_weight(value):
            return _as_weight(value)
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
            elif _is_weight(each.get("value")):
                rules.append(WeightRule(pattern, _as_weight(each["value"])))
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
            if key in names and (problem := _setting_problem(key, each)):
                self.problems.append(f"{_join(path, key)}: {problem}, found {each!r}")
        return dict(value)

    def _align(self, value: Mapping[str, Any], path: str) -> AlignSection | None:
        calibration = self._data(value.get("calibration"), f"{path}.calibration")
        settings = {"seed": self.seed, **value, "calibration": calibration}
        if isinstance(settings.get("reference"), str):
            settings["reference"] = self._located(settings["reference"])
        built: AlignSection | None = self._build(AlignSection, settings, path)
        if built is not None:
            self._choice(built.method, ALIGNMENT_METHODS, f"{path}.method")
            self._choice(built.start, STARTS, f"{path}.start")
            self._choice(built.groups, GROUPS, f"{path}.groups")
            if built.groups == "full" and "activation_matching" in (built.method, built.start):
                self.problems.append(f"{path}.groups: activation matching knows permutations only; use weight_matching")
            self._choice(built.solver, SOLVERS, f"{path}.solver")
            for name in ("restarts", "max_sweeps", "steps"):
                if vars(built)[name] is not None and vars(built)[name] < 1:
                    self.problems.append(f"{path}.{name}: at least 1 is expected, found {vars(built)[name]}")
            if built.learning_rate is not None and not 0 < built.learning_rate < float("inf"):
                self.problems.append(f"{path}.learning_rate: a number above 0 is expected, found {built.learning_rate}")
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
        if isinstance(value, list) and value and all(_is_number(each) and 0 <= each <= 1 for each in value):
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
            fits, converted = _fit(each, hints[key])
            if each is None and not fits and key in has_default:
                continue  # `key:` with nothing after it, also as an override, is the default.
            if fits:
                typed[key] = converted
            else:
                shown = _join(path, "lambda" if kind is MergeParameters and key == "scale" else key)
                self.problems.append(f"{shown}: {_describe(hints[key])} is expected, found {each!r}")
        return typed

    def _known(self, value: Mapping[str, Any], names: Sequence[str], path: str) -> None:
        for key in value:
            if key not in names:
                hint = suggest(str(key), names) or f" (known: {', '.join(names)})"
                self.problems.append(f"{_join(path, str(key))}: unknown key{hint}")

    def _choice(self, value: str, choices: Sequence[str], path: str) -> None:
        if value not in choices:
            self.problems.append(f"{path}: unknown {value!r}{suggest(value, choices)} (known: {', '.join(choices)})")

    def _agree(self, recipe: Recipe) -> None:
        """What no single key can tell."""
        if recipe.merge_method == "task_arithmetic" and recipe.base_model is None:
            self.problems.append("base_model: task_arithmetic needs one")
        if recipe.merge_method == "linear":
            if recipe.base_model is not None:
                self.problems.append(
                    "base_model: has no meaning for a linear merge; list it under `models` or remove it"
                )
            if recipe.parameters.scale != 1.0:
                self.problems.append("parameters.lambda: has no meaning for a linear merge")
        if recipe.mergekit_method is not None:
            self._agree_with_mergekit(recipe, recipe.mergekit_method)
            if recipe.align.groups == "full":
                self.problems.append(
                    f"align.groups: what mergekit merges is aligned by permutations only; merge by {MERGE_METHODS[0]} "
                    f"or {MERGE_METHODS[1]}"
                )
        given = [entry.parameters is not None for entry in recipe.models]
        if any(given) and not all(given) and recipe.mergekit_method is None:
            missing = [f"models.{place}" for place, has in enumerate(given) if not has]
            self.problems.append(
                f"{', '.join(missing)}: parameters.weight is missing; give every model a weight or none"
            )
        weights = [entry.parameters.weight for entry in recipe.models if entry.parameters is not None]
        plain = [weight for weight in weights if isinstance(weight, float) or isinstance(weight[0], float)]
        is_checked = recipe.merge_method == "linear" and recipe.parameters.normalize is None
        if is_checked and len(plain) == len(given):
            wrong = [total for total in _sums(plain) if abs(total - 1) > 1e-6]  # type: ignore[arg-type]
            if wrong:
                self.problems.append(
                    f"models: the weights sum to {wrong[0]:g}, not to 1; write `parameters: {{normalize: true}}` to "
                    "divide them by their sum, or `normalize: false` if this is meant"
                )
        names = [entry.model for entry in recipe.models]
        reference = recipe.align.reference
        if isinstance(reference, int) and not 0 <= reference < len(names):
            self.problems.append(f"align.reference: there is no model {reference}; models are counted from 0")
        if isinstance(reference, str) and reference not in names:
            self.problems.append(f"align.reference: {reference!r} is not one of the models{suggest(reference, names)}")
        keep = recipe.keep_where_broken
        if keep is not None:
            if recipe.diagnose is None:
                self.problems.append("keep_where_broken: needs `diagnose` with the data to measure on")
            if recipe.merge_method != "linear" or len(names) < 2:
                self.problems.append("keep_where_broken: has a meaning for a linear merge of two models or more only")
            if not 0 <= keep.model < len(names):
                self.problems.append(
                    f"keep_where_broken.model: there is no model {keep.model}; models are counted from 0"
                )
            if keep.ratio <= 0:
                self.problems.append(f"keep_where_broken.ratio: a number above 0 is expected, found {keep.ratio:g}")
        if recipe.align.uses_data and recipe.align.calibration is None:
            name = "learned" if recipe.align.method == "learned_matching" else "activation"
            self.problems.append(f"align.calibration: {name} matching needs calibration data")
        if recipe.align.calibration is not None and not recipe.align.uses_data:
            self.problems.append(
                f"align.calibration: has no meaning for the method {recipe.align.method}; remove it, or write "
                "`method` or `start: activation_matching`, or `method: learned_matching`"
            )
        if recipe.tokenizer_source == "union":
            self.problems.append("tokenizer_source: `union` is not supported; models must share their vocabulary")
        elif recipe.tokenizer_source == "base" and recipe.base_model is None:
            self.problems.append("tokenizer_source: `base` needs a base_model")
        elif isinstance(recipe.tokenizer_source, int) and not 0 <= recipe.tokenizer_source < len(names):
            self.problems.append(
                f"tokenizer_source: there is no model {recipe.tokenizer_source}; models are counted from 0"
            )

    def _agree_with_mergekit(self, recipe: Recipe, method: MergekitMethod) -> None:
        name = recipe.merge_method
        if method.base == "required" and recipe.base_model is None:
            self.problems.append(f"base_model: {name} needs one")
        if method.base == "none" and recipe.base_model is not None:
            self.problems.append(f"base_model: has no meaning for {name}; list it under `models` or remove it")
        count = len(recipe.models) + (recipe.base_model is not None)
        least, most = method.inputs
        if count < least or (most is not None and count > most):
            wanted = str(least) if most == least else f"at least {least}" if most is None else f"{least} to {most}"
            self.problems.append(f"models: {name} takes {wanted} models, the base included; there are {count}")
        for key in method.required:
            lacking = [
                place
                for place, entry in enumerate(recipe.models)
                if entry.parameters is None or key not in entry.parameters.settings
            ]
            if key in recipe.parameters.settings or not lacking:
                continue
            where = f"models.{lacking[0]}.parameters.{key}" if key in method.of_model else f"parameters.{key}"
            also = "; give every model one, or one for all under `parameters`" if key in method.of_model else ""
            self.problems.append(f"{where}: missing, and {name} has no default for it{also}")


def _setting_problem(key: str, value: Any) -> str | None:
    """What is wrong with a parameter of mergekit: a value, a gradient of values, or values with filters."""
    rules = [value] if isinstance(value, Mapping) else value
    if isinstance(rules, list) and rules and all(isinstance(rule, Mapping) for rule in rules):
        if not all(rule.keys() <= {"filter", "value"} and "value" in rule for rule in rules):
            return "pairs of `filter` and `value` are expected"
        if not all(isinstance(rule.get("filter"), str | None) for rule in rules):
            return "a filter is text"
        return next(filter(None, (_setting_problem(key, rule["value"]) for rule in rules)), None)
    values = value if isinstance(value, list) and value else [value]
    if key in SWITCHES:
        return None if all(isinstance(each, bool) for each in values) else "true or false is expected"
    if not all(map(_is_number, values)):
        return "a finite number, a list of numbers or of filter/value pairs is expected"
    if key in SHARES and not all(0 <= each <= 1 for each in values):
        return "a number from 0 to 1 is expected"
    return None


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _is_required(each: dataclasses.Field[Any]) -> bool:
    return each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING


def _sums(weights: Sequence[Weight]) -> list[float]:
    """The sums of numbers and gradients at every depth where one of the gradients bends."""
    gradients = [weight if isinstance(weight, tuple) else (weight,) for weight in weights]
    depths = {place / max(len(values) - 1, 1) for values in gradients for place in range(len(values))}

    def at(values: tuple[float, ...], depth: float) -> float:
        place = depth * (len(values) - 1)
        below = min(int(place), max(len(values) - 2, 0))
        above = min(below + 1, len(values) - 1)
        return values[below] + (values[above] - values[below]) * (place - below)

    return [sum(at(values, depth) for values in gradients) for depth in sorted(depths)]


def _is_weight(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, list) and len(value) > 0 and all(map(_is_number, value)))


def _as_weight(value: Any) -> Weight:
    return tuple(float(each) for each in value) if isinstance(value, list) else float(value)


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether a plain value fits a type, and the value in that type."""
    if get_origin(hint) in (Union, UnionType):
        for option in get_args(hint):
            fits, converted = _fit(value, option)
            if fits:
                return True, converted
        return False, None
    if get_origin(hint) is collections.abc.Mapping:
        fits = isinstance(value, Mapping) and all(_fit(each, get_args(hint)[1])[0] for each in value.values())
        return fits, dict(value) if fits else None
    if get_origin(hint) in (tuple, collections.abc.Sequence):
        entries = [value] if isinstance(value, str) else value
        if not isinstance(entries, list | tuple):
            return False, None
        fitted = [_fit(each, get_args(hint)[0]) for each in entries]
        return all(fits for fits, _ in fitted), tuple(converted for _, converted in fitted)
    if hint is type(None):
        return value is None, None
    if hint is float:
        return _is_number(value), float(value) if _is_number(value) else None
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if hint is str:
        # `output_dir: 2024` is a folder name all the same.
        return isinstance(value, str) or _is_number(value), str(value)
    return isinstance(value, hint), value


def _describe(hint: Any) -> str:
    words = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false", type(None): "nothing"}
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if get_origin(hint) in (tuple, collections.abc.Sequence):
        return f"a list of {_describe(get_args(hint)[0])}"
    if get_origin(hint) is collections.abc.Mapping:
        return f"a mapping to {_describe(get_args(hint)[1])}"
    return words.get(hint, str(hint))


def _plain(value: Any) -> Any:
    """Dataclasses as mappings without their defaults, the diagnose section with its data spread out."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        if isinstance(value, Path):
            return str(value)
        return [_plain(each) for each in value] if isinstance(value, tuple | list) else value
    if isinstance(value, ModelParameters | MergeParameters) and value.settings:
        return _copied(value.settings)
    plain: dict[str, Any] = {}
    for each in dataclasses.fields(value):
        if each.name == "settings":
            continue
        entry = vars(value)[each.name]
        default = each.default_factory() if each.default_factory is not dataclasses.MISSING else each.default
        # A section that is there says what it does, even where that is the default.
        is_told = isinstance(value, WeightRule | ModelParameters) or (
            isinstance(value, AlignSection) and each.name == "method"
        )
        # A section without a seed takes that of the recipe.
        is_told = is_told or each.name == "seed"
        if entry == default and not is_told:
            continue
        key = "lambda" if (isinstance(value, MergeParameters) and each.name == "scale") else each.name
        if each.name == "data" and isinstance(value, DiagnoseSection | BatchNormSection):
            plain |= {
                name: part
                for name, part in _plain(entry).items()
                if name != "labels" or isinstance(value, DiagnoseSection)
            }
        else:
            plain[key] = _plain(entry)
    return plain
