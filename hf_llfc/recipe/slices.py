"""Layers taken from several places: slices, modules, and the ordinary recipes that they come down to.

Each slice is a merge of its own, of a few layers: one method, one base, one set of parameters. So a slice is read as an
ordinary recipe whose models are its sources, and the whole is a list of such recipes, each with the layers it is for.
Parameters are looked up in the source, its slice, its module and the whole recipe, in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_llfc.errors import RecipeError
from hf_llfc.merging.methods import MERGE_METHODS, Base
from hf_llfc.recipe.options import build, documented, join, option, refuse_unknown, settle

if TYPE_CHECKING:
    from hf_llfc.recipe.sections import Recipe

Range = tuple[int, int]
"""The first layer and the one after the last."""

WITHOUT_EFFECT = "int8_mask"
"""A key of mergekit that saves it memory and changes no value; accepted wherever mergekit's recipes have it."""

Content = dict[str, Any]

RANGE = "layer_range"
"""Where a recipe of whole slices has the range of all its models."""

_OF_SLICE = ("sources", "merge_method", "base_model", "parameters")
_OF_MODULE = ("slices", "models", "merge_method", "base_model", "parameters")


def read_range(value: Any) -> Range:
    """A range of layers, as a recipe has it.

    Raises:
        ValueError: What is expected.
    """
    is_pair = isinstance(value, list | tuple) and len(value) == 2 and all(type(each) is int for each in value)
    if not is_pair or not 0 <= value[0] < value[1]:
        raise ValueError("a range of at least one layer, the first and the one after the last, such as [0, 16],")
    return value[0], value[1]


@documented
@dataclass(frozen=True)
class SourceSection:
    """Layers of one model."""

    model: str = option("As in `models`.")
    layer_range: Range = option(
        "The first layer and the one after the last; layers are counted from 0.",
        reads=read_range,
        metavar="RANGE",
    )
    parameters: Mapping[str, Any] | None = option(
        "Parameters of this source, as those of an entry of `models`.", None, shown="those of the slice"
    )
    trust_remote_code: bool = option("Run code that comes with this checkpoint.", False)

    def __post_init__(self) -> None:
        settle(self, RecipeError)

    @property
    def count(self) -> int:
        """The number of layers."""
        return self.layer_range[1] - self.layer_range[0]


@documented
@dataclass(frozen=True)
class SliceSection:
    """Layers of the result, merged from as many layers of every source."""

    sources: tuple[SourceSection, ...] = option("The layers that are merged.")
    merge_method: str | None = option(
        "How these layers are merged.", None, choices=tuple(MERGE_METHODS), shown="that of the recipe"
    )
    base_model: str | None = option(
        "The base of these layers, which may stand among the sources.", None, shown="that of the recipe"
    )
    parameters: Mapping[str, Any] | None = option(
        "Parameters of these layers.", None, shown="those of the module and of the recipe"
    )

    def __post_init__(self) -> None:
        settle(self, RecipeError)


@documented
@dataclass(frozen=True)
class ModuleSection:
    """A part of the model that is merged its own way, such as the text decoder of a multimodal model."""

    slices: tuple[SliceSection, ...] = option("Its layers, as `slices` of the recipe.", (), shown="none")
    models: tuple[Mapping[str, Any], ...] = option("What is merged whole, as `models` of the recipe.", (), shown="none")
    merge_method: str | None = option(
        "How it is merged.", None, choices=tuple(MERGE_METHODS), shown="that of the recipe"
    )
    base_model: str | None = option("Its base.", None, shown="that of the recipe")
    parameters: Mapping[str, Any] | None = option("Parameters of this module.", None, shown="those of the recipe")

    def __post_init__(self) -> None:
        settle(self, RecipeError)


@dataclass(frozen=True)
class PartRecipe:
    """What is merged one way: the layers of a slice, or a whole module.

    Attributes:
        path: Where it stands in the recipe, for messages.
        module: The module that it belongs to; None where the recipe names none.
        recipe: The merge, an ordinary recipe of the sources.
        ranges: Layers of every model of that recipe; empty where all of the module is merged.
        base_range: Layers of its base, where it has one.
    """

    path: str
    module: str | None
    recipe: Recipe
    ranges: tuple[Range, ...] = ()
    base_range: Range | None = None


class SliceReader:
    """Reads `slices` and `modules` from plain data."""

    def __init__(
        self,
        content: Mapping[str, Any],
        read: Callable[[Content], tuple[Recipe | None, list[str]]],
        name_of: Callable[[Any, str], Any],
    ) -> None:
        """Takes the recipe.

        Args:
            content: All of it, as plain data.
            read: Reads an ordinary recipe; returns it with what is wrong with it.
            name_of: What a model is called, from what the recipe says of it and where that stands.
        """
        self._content = content
        self._read = read
        self._name_of = name_of
        self.problems: list[str] = []
        self._used: set[str] = set()
        self._known: set[str] = set()
        self._uses_base = False

    def lifted(self) -> Content | None:
        """The recipe with `models` in place of its only slice, where every source gives the same layers.

        None where there is more to it. What is then wrong with the models has their path: see `as_slice`.
        """
        slices = self._content.get("slices")
        if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], Mapping):
            return None
        (only,) = slices
        sources = only.get("sources")
        if not isinstance(sources, list) or not sources or not all(isinstance(each, Mapping) for each in sources):
            return None
        ranges = [each.get("layer_range") for each in sources]
        names = [str(each.get("model")) for each in sources]
        try:
            wanted = read_range(ranges[0])
        except ValueError:
            return None
        if any(each != ranges[0] for each in ranges) or len({*names}) < len(names):
            return None
        refuse_unknown(only, _OF_SLICE, "slices[0]", self.problems)
        content = {key: value for key, value in self._content.items() if key != "slices"}
        content["models"] = [{key: value for key, value in each.items() if key != "layer_range"} for each in sources]
        content["layer_range"] = list(wanted)
        for key in ("merge_method", "base_model"):
            if only.get(key) is not None:
                content[key] = only[key]
        scopes = [only.get("parameters"), self._content.get("parameters")]
        if all(isinstance(scope, Mapping | None) for scope in scopes) and any(scopes):
            content["parameters"] = layered(*scopes)
        elif scopes[0] is not None:
            content["parameters"] = scopes[0]
        return content

    def sections(self) -> tuple[tuple[SliceSection, ...], dict[str, ModuleSection]]:
        """The typed sections; what is wrong is noted."""
        slices = self._slices(self._content["slices"], "slices") if "slices" in self._content else ()
        modules: dict[str, ModuleSection] = {}
        value = self._content.get("modules")
        if value is not None and (not isinstance(value, Mapping) or not value):
            self.problems.append(f"modules: a mapping from the names of modules is expected, found {value!r}")
            value = None
        for name, each in (value or {}).items():
            module = self._module(each, f"modules.{name}")
            if module is not None:
                modules[str(name)] = module
        return slices, modules

    def _slices(self, value: Any, path: str) -> tuple[SliceSection, ...]:
        if not isinstance(value, list) or not value:
            self.problems.append(f"{path}: a list of at least one `- sources: …` is expected, found {value!r}")
            return ()
        read = [self._slice(each, f"{path}[{index}]") for index, each in enumerate(value)]
        return tuple(each for each in read if each is not None)

    def _slice(self, value: Any, path: str) -> SliceSection | None:
        if not isinstance(value, Mapping):
            self.problems.append(f"{path}: `sources: …` is expected, found {value!r}")
            return None
        refuse_unknown(value, _OF_SLICE, path, self.problems)
        given = value.get("sources")
        if not isinstance(given, list) or not given:
            self.problems.append(f"{path}.sources: a list of at least one source is expected, found {given!r}")
            return None
        before = len(self.problems)
        sources = [self._source(each, f"{path}.sources[{index}]") for index, each in enumerate(given)]
        counts = [each.count for each in sources if each is not None]
        if len(counts) == len(given):
            self.problems += [
                f"{path}.sources[{index}].layer_range: has {count} layers, and sources[0] has {counts[0]}; all sources "
                "of a slice give as many"
                for index, count in enumerate(counts)
                if count != counts[0]
            ]
        known = {key: value[key] for key in ("merge_method", "base_model", "parameters") if key in value}
        if known.get("base_model") is not None:
            known["base_model"] = self._name_of(known["base_model"], join(path, "base_model"))
        if len(self.problems) > before:
            return None
        return build(SliceSection, {**known, "sources": tuple(sources)}, path, self.problems)

    def _source(self, value: Any, path: str) -> SourceSection | None:
        if not isinstance(value, Mapping):
            self.problems.append(f"{path}: `model: …` and `layer_range: …` are expected, found {value!r}")
            return None
        named = value
        if "model" in value:
            named = {**value, "model": self._name_of(value["model"], f"{path}.model")}
        return build(SourceSection, named, path, self.problems)

    def _module(self, value: Any, path: str) -> ModuleSection | None:
        if not isinstance(value, Mapping):
            self.problems.append(f"{path}: `slices: …` or `models: …` is expected, found {value!r}")
            return None
        before = len(self.problems)
        refuse_unknown(value, _OF_MODULE, path, self.problems)
        if ("slices" in value) == ("models" in value):
            both = "both" if "slices" in value else "neither"
            self.problems.append(f"{path}: has {both} of `slices` and `models`; write one of the two")
            return None
        known = {key: value[key] for key in ("merge_method", "base_model", "parameters") if key in value}
        if known.get("base_model") is not None:
            known["base_model"] = self._name_of(known["base_model"], join(path, "base_model"))
        if "slices" in value:
            known["slices"] = self._slices(value["slices"], f"{path}.slices")
        elif not isinstance(value["models"], list) or not all(isinstance(each, Mapping) for each in value["models"]):
            self.problems.append(f"{path}.models: a list of `- model: …` is expected, found {value['models']!r}")
        else:
            known["models"] = tuple(
                {**each, **({"model": self._name_of(each["model"], f"{path}.models[{i}]")} if "model" in each else {})}
                for i, each in enumerate(value["models"])
            )
        return build(ModuleSection, known, path, self.problems) if len(self.problems) == before else None

    def parts(self, slices: Sequence[SliceSection], modules: Mapping[str, ModuleSection]) -> tuple[PartRecipe, ...]:
        """The ordinary recipes that the sections come down to; what is wrong with them is noted."""
        parts = [self._part(each, f"slices[{index}]", None, None) for index, each in enumerate(slices)]
        for name, module in modules.items():
            path = f"modules.{name}"
            if module.models:
                parts.append(self._whole(module, path, name))
            parts += [
                self._part(each, f"{path}.slices[{index}]", name, module) for index, each in enumerate(module.slices)
            ]
        given = self._content.get("parameters")
        if isinstance(given, Mapping):
            unused = [key for key in given if key not in self._used and key != WITHOUT_EFFECT]
            refuse_unknown(unused, sorted(self._known), "parameters", self.problems)
        self.problems = list(dict.fromkeys(self.problems))
        return tuple(part for part in parts if part is not None)

    def _whole(self, module: ModuleSection, path: str, name: str) -> PartRecipe | None:
        recipe = self._ordinary([dict(each) for each in module.models], path, [module], "models")
        return None if recipe is None else PartRecipe(path, name, recipe)

    def _part(
        self, section: SliceSection, path: str, name: str | None, module: ModuleSection | None
    ) -> PartRecipe | None:
        scopes: list[SliceSection | ModuleSection] = [section, *([module] if module is not None else [])]
        entries = [
            {
                "model": source.model,
                **({"parameters": source.parameters} if source.parameters is not None else {}),
                **({"trust_remote_code": True} if source.trust_remote_code else {}),
            }
            for source in section.sources
        ]
        recipe = self._ordinary(entries, path, scopes, "sources")
        if recipe is None:
            return None
        ranges = [source.layer_range for source in section.sources]
        named = [source.model for source in section.sources]
        base_range = None
        if recipe.base_model is not None:
            place = named.index(recipe.base_model) if recipe.base_model in named else None
            if place is None and len(set(ranges)) > 1:
                self.problems.append(
                    f"{path}.base_model: {recipe.base_model} is not among the sources, whose layers differ; list it "
                    "there with its layer_range"
                )
            base_range = ranges[place or 0]
            if place is not None and len(recipe.models) < len(named):
                del ranges[place]
        return PartRecipe(path, name, recipe, tuple(ranges), base_range)

    def _ordinary(
        self, entries: list[Content], path: str, scopes: Sequence[SliceSection | ModuleSection], list_name: str
    ) -> Recipe | None:
        """The recipe of a part, of what stands in it and in what it is part of."""

        def said(key: str) -> Any:
            return next((vars(scope)[key] for scope in scopes if vars(scope)[key] is not None), None)

        name = said("merge_method") or self._content.get("merge_method") or "linear"
        method = MERGE_METHODS.get(str(name))
        if method is None:
            return None  # said of the whole recipe
        if method.importance and self._content.get("importance") is None:
            self.problems.append(f"importance: missing, and {name} needs it; give task and dataset of samples")
            return None
        own_base = said("base_model")
        base = own_base if own_base is not None else self._content.get("base_model")
        if method.base is Base.NONE:
            if own_base is not None:
                self.problems.append(f"{path}.base_model: has no meaning for {name}; list it under `{list_name}`")
            base = None
        self._uses_base |= base is not None and own_base is None
        known = {parameter.name for parameter in method.parameters}
        self._known |= known
        outer: list[Content] = []
        for scope in [*(vars(scope)["parameters"] for scope in scopes[1:]), self._content.get("parameters")]:
            given = scope if isinstance(scope, Mapping) else {}
            self._used |= known & given.keys()
            outer.append({key: value for key, value in given.items() if key in known})
        shared = layered(scopes[0].parameters, *outer)
        entries = [
            {**entry, "parameters": _completed(entry["parameters"], shared)}
            if isinstance(entry.get("parameters"), Mapping)
            else entry
            for entry in entries
        ]
        if name in ("linear", "task_arithmetic") and "weight" in shared:  # there every model has its own
            weight = {"weight": shared.pop("weight")}
            entries = [
                {**entry, "parameters": {**weight, **(entry.get("parameters") or {})}}
                if isinstance(entry.get("parameters"), Mapping | None) and entry.get("model") != base
                else entry
                for entry in entries
            ]
        content = {
            "models": entries,
            "merge_method": name,
            **({"base_model": base} if base is not None else {}),
            **({"parameters": shared} if shared else {}),
            **{key: self._content[key] for key in ("dtype", "out_dtype", "seed") if key in self._content},
            **({"importance": self._content["importance"]} if method.importance else {}),
            "output_dir": ".",
        }
        recipe, problems = self._read(content)
        local = {key for key in (scopes[0].parameters or {})}
        self.problems += [_renamed(problem, path, list_name, local) for problem in problems]
        return recipe if not problems else None


def as_slice(problem: str) -> str:
    """A problem of a recipe that `SliceReader.lifted` made, with the path that the user wrote."""
    return _models_as(problem, "slices[0].sources")


def layered(*scopes: Mapping[str, Any] | None) -> Content:
    """Parameters of scopes, the innermost first; where its filters match nothing, those of the next one count."""
    found: Content = {}
    for scope in scopes:
        for key, value in (scope or {}).items():
            found[key] = _then(found[key], value) if key in found else value
    return found


def _completed(own: Mapping[str, Any], shared: Mapping[str, Any]) -> Content:
    """Parameters of a source, those with filters alone continued by what all sources have."""
    return {key: _then(value, shared[key]) if key in shared else value for key, value in own.items()}


def _then(inner: Any, outer: Any) -> Any:
    """A parameter, and what counts where none of its filters matches."""
    rules = [inner] if isinstance(inner, Mapping) else inner
    if not isinstance(rules, list) or not rules or not all(isinstance(rule, Mapping) for rule in rules):
        return inner
    if any(rule.get("filter") in (None, "*") for rule in rules):
        return inner
    more = [outer] if isinstance(outer, Mapping) else outer
    if not isinstance(more, list) or not more or not all(isinstance(rule, Mapping) for rule in more):
        more = [{"value": outer}]
    return [*rules, *more]


def _models_as(problem: str, path: str) -> str:
    """A problem with another path in place of `models`."""
    head, dot, rest = problem.partition(".")
    index, stop, more = rest.partition(".")
    digits = index.split(":")[0]
    if head == "models" and dot and digits.isdigit():
        return f"{path}[{digits}]{index[len(digits) :]}{stop}{more}"
    return f"{path}{problem[len('models') :]}" if problem.startswith("models:") else problem


def _renamed(problem: str, path: str, list_name: str, local: set[str]) -> str:
    """A problem of a part with its path in the whole recipe."""
    if problem.startswith("models"):
        renamed = _models_as(problem, f"{path}.{list_name}")
        return renamed
    head, _, rest = problem.partition(".")
    key = rest.partition(":")[0].partition(".")[0]
    # What the whole recipe gives is said once, with its own path.
    if head == "parameters" and key not in local and not rest.startswith(f"{key}: missing"):
        return problem
    return join(path, problem)
