"""Models whose layers come from several places, as checkpoints of their own.

The sources at one place of all slices make one checkpoint, a column: it has the layers of the result, renumbered, under
the config of the result. So a merge of slices is one of whole models, and what is aligned, diagnosed and verified is
what is merged. A slice with fewer sources than others lends its first one to the remaining columns.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hf_llfc.checkpoints import Checkpoint, compare
from hf_llfc.checkpoints.comparison import listed
from hf_llfc.checkpoints.header import natural_order
from hf_llfc.checkpoints.planned import planned
from hf_llfc.checkpoints.settings import Settings
from hf_llfc.checkpoints.views.stacked import Origin, StackedWeights
from hf_llfc.errors import CheckpointError, SpecError, raise_all
from hf_llfc.parents.depth import LayerOrigin, Path, changed, changes_for, kinds_of, values_of, without_further
from hf_llfc.parents.layers import Anatomy, Module, Place, Stack, anatomy_of, stacks_by_name
from hf_llfc.parents.specs import bind, spec_of
from hf_llfc.recipe import Recipe
from hf_llfc.recipe.slices import RANGE, PartRecipe, Range

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Section:
    """Tensors of the result that are merged one way.

    Attributes:
        path: Where the recipe says how.
        recipe: How, as a recipe of the sources.
        names: The tensors.
        own_names: Of every source, name → name in its model.
        layers: Which layers of the result they are; None where the section is no slice.
        module: The module that they are of.
        sources: What is merged, in words.
    """

    path: str
    recipe: Recipe
    names: tuple[str, ...]
    own_names: tuple[Mapping[str, str], ...]
    layers: Range | None
    module: str
    sources: tuple[str, ...]

    @property
    def what(self) -> str:
        """What becomes of which layers, in a few words."""
        return f"{self.recipe.merge_method} of {', '.join(self.sources)}"

    @property
    def where(self) -> str:
        """The layers of the result, in a few words."""
        module = "" if self.module == "default" else f"{self.module} "
        return module + ("whole" if self.layers is None else f"layers {self.layers[0]} to {self.layers[1] - 1}")


@dataclass(frozen=True)
class Stacked:
    """The columns of a recipe.

    Attributes:
        parents: One a source of the slice with most sources.
        base: That of the bases, where there are any.
        sections: What is merged how.
    """

    parents: Sequence[Checkpoint]
    base: Checkpoint | None
    sections: tuple[Section, ...]


@dataclass
class _Column:
    """A checkpoint in the making: where every tensor comes from, and every layer of a stack."""

    origins: dict[str, Origin] = field(default_factory=dict)
    layers: dict[Stack, list[LayerOrigin]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


def stacked(recipe: Recipe, models: Mapping[str, Checkpoint]) -> Stacked:
    """The columns of a recipe with slices or modules, or with layers of one range.

    Args:
        recipe: Says which layers of which models.
        models: The models and bases, by the names that the recipe has for them.

    Raises:
        CheckpointError: Layers are not there, or models do not fit each other.
    """
    parts = recipe.parts or (_as_part(recipe),)
    return _Stacking(parts, models).made()


def is_whole(recipe: Recipe, models: Sequence[Checkpoint]) -> bool:
    """Whether the only range of a recipe is all layers of its models, told by the names of their tensors alone."""
    if recipe.layer_range is None:
        return not recipe.parts
    return all(stacks_by_name(model) == [recipe.layer_range[1]] for model in models) and recipe.layer_range[0] == 0


def _as_part(recipe: Recipe) -> PartRecipe:
    assert recipe.layer_range is not None, "a recipe of layers"
    base_range = recipe.layer_range if recipe.base_model is not None else None
    return PartRecipe(recipe.range_path, None, recipe, (recipe.layer_range,) * len(recipe.models), base_range)


def _is_slice(part: PartRecipe) -> bool:
    """Whether the sources of a part stand in a slice, not under `models` with one range for all."""
    return bool(part.ranges) and part.path != RANGE


class _Stacking:
    """Makes the columns."""

    def __init__(self, parts: Sequence[PartRecipe], models: Mapping[str, Checkpoint]) -> None:
        self.parts = parts
        self.models = models
        self.anatomies: dict[int, Anatomy] = {}
        self.first = models[parts[0].recipe.models[0].model]
        count = max(len(part.recipe.models) for part in parts)
        self.columns = [_Column() for _ in range(count)]
        self.base = _Column() if any(part.recipe.base_model is not None for part in parts) else None
        self.problems: list[str] = []

    def anatomy(self, checkpoint: Checkpoint) -> Anatomy:
        if id(checkpoint) not in self.anatomies:
            self.anatomies[id(checkpoint)] = anatomy_of(checkpoint)
        return self.anatomies[id(checkpoint)]

    def made(self) -> Stacked:
        self.refuse_other_kinds()
        own = self.anatomy(self.first)
        by_module: dict[str, list[PartRecipe]] = {}
        for part in self.parts:
            by_module.setdefault(own.module(part.module, part.path.partition(".slices")[0]).name, []).append(part)
        sections: list[Section] = []
        for name, module in own.modules.items():
            if name in by_module:
                sections += self.of_module(module, by_module[name])
            else:
                self.take_over(module)
        raise_all(self.problems, CheckpointError, "these layers cannot be merged")
        changes = self.changes()
        self.refuse_unlike(changes)
        settings = changed(self.first.settings, changes, self.first.label) if changes else self.first.settings
        parents = [self.checkpoint(column, settings) for column in self.columns]
        base = self.checkpoint(self.base, settings) if self.base is not None else None
        self.say_what_is_left()
        return Stacked(parents, base, tuple(sections))

    def refuse_other_kinds(self) -> None:
        """Refuses models of another architecture."""
        for path, _, checkpoint in self.used():
            for what, own, other in (
                ("model type", self.first.settings.model_type, checkpoint.settings.model_type),
                ("architecture", self.first.architecture, checkpoint.architecture),
            ):
                if own != other:
                    raise CheckpointError(
                        f"{path}: {checkpoint.label} has the {what} {other}, {self.first.label} has {own}; layers are "
                        "taken from models of one architecture"
                    )

    def say_what_is_left(self) -> None:
        """Warns of tensors that models have beside those of their class, such as layers that predict further tokens."""
        for checkpoint in {id(each): each for _, _, each in self.used()}.values():
            if checkpoint.spare:
                logger.warning(
                    "%s: %s does not use %s: left out, since they were trained behind the last layer of this model",
                    checkpoint.label,
                    checkpoint.architecture,
                    listed(list(checkpoint.spare)),
                )

    def used(self) -> Iterator[tuple[str, Range | None, Checkpoint]]:
        """Every source and base: where the recipe names it, its layers and its model."""
        for part in self.parts:
            ranges = part.ranges or (None,) * len(part.recipe.models)
            for index, (entry, wanted) in enumerate(zip(part.recipe.models, ranges, strict=True)):
                named = f"{part.path}.sources[{index}]" if _is_slice(part) else part.path
                yield named, wanted, self.models[entry.model]
            if part.recipe.base_model is not None:
                yield f"{part.path}.base_model", part.base_range, self.models[part.recipe.base_model]

    def of_module(self, module: Module, parts: Sequence[PartRecipe]) -> list[Section]:
        """The tensors of a module that the recipe speaks of, in all columns."""
        if not parts[0].ranges:
            if len(parts) > 1:
                self.problems.append(f"{parts[1].path}: the module {module.name} is merged twice; name it once")
            names = self.all_of(module)
            return [self.section(parts[0], names, [names] * self.width(parts[0]), None, module)]
        if module.stack is None:
            self.problems.append(f"{parts[0].path}: {module.name} has no layers; merge it whole, under `models`")
            return []
        sections = []
        done = 0
        for number, part in enumerate(parts):
            count = part.ranges[0][1] - part.ranges[0][0]
            layers = (done, done + count)
            if not self.fits(part, module.stack):
                continue
            outside = [*(module.before if number == 0 else ()), *(module.after if part is parts[-1] else ())]
            rows = [dict(zip(outside, outside, strict=True)) for _ in range(self.width(part))]
            ranges = [*part.ranges, *([part.base_range] if part.base_range is not None else [])]
            for checkpoint, wanted, row in zip(self.checkpoints(part), ranges, rows, strict=True):
                for index in range(count):
                    row.update(self.layer(checkpoint, module.stack, wanted[0] + index, done + index, part))
            names = tuple(rows[0])
            for row in rows[1:]:
                if row.keys() != rows[0].keys():
                    odd = sorted(row.keys() ^ rows[0].keys())
                    self.problems.append(
                        f"{part.path}: the sources have not the same tensors in these layers: {odd[0]} and "
                        f"{len(odd) - 1} more are in one alone; take layers of one kind"
                    )
            if self.problems:
                continue
            sections.append(
                self.section(part, names, [tuple(row[name] for name in names) for row in rows], layers, module)
            )
            done += count
        return sections

    def all_of(self, module: Module) -> tuple[str, ...]:
        """The names of all tensors of a module."""
        places = self.anatomy(self.first).places
        prefix = module.stack.prefix if module.stack is not None else None
        of_layers = [name for name, place in places.items() if place is not None and place.stack == prefix]
        return (*module.before, *of_layers, *module.after)

    def take_over(self, module: Module) -> None:
        """Takes a module that the recipe does not speak of from the first model, or the base of the whole recipe."""
        names = self.all_of(module)
        for column in (*self.columns, *([self.base] if self.base is not None else [])):
            column.origins.update({name: Origin(self.first, name) for name in names})

    def width(self, part: PartRecipe) -> int:
        """How many models a part has, the base among them."""
        return len(part.recipe.models) + (part.recipe.base_model is not None)

    def checkpoints(self, part: PartRecipe) -> list[Checkpoint]:
        """The models of a part, the base last."""
        names = [entry.model for entry in part.recipe.models]
        return [self.models[name] for name in (*names, *filter(None, [part.recipe.base_model]))]

    def fits(self, part: PartRecipe, stack: Stack) -> bool:
        """Whether all layers of a part are there."""
        before = len(self.problems)
        ranges = [*part.ranges, *([part.base_range] if part.base_range is not None else [])]
        for index, (checkpoint, wanted) in enumerate(zip(self.checkpoints(part), ranges, strict=True)):
            depth = self.stack_of(checkpoint, stack).depth
            if wanted[1] > depth:
                is_source = _is_slice(part) and index < len(part.ranges)
                where = f"{part.path}.sources[{index}].layer_range" if is_source else part.path
                self.problems.append(
                    f"{where}: [{wanted[0]}, {wanted[1]}] goes beyond the {depth} layers of {checkpoint.label}, 0 to "
                    f"{depth - 1}"
                )
        return len(self.problems) == before

    def stack_of(self, checkpoint: Checkpoint, stack: Stack) -> Stack:
        """The same stack in another model, which may have more layers."""
        for module in self.anatomy(checkpoint).modules.values():
            if module.stack is not None and module.stack.prefix == stack.prefix:
                return module.stack
        raise CheckpointError(f"{checkpoint.label}: has no layers {stack.prefix}, as {self.first.label} has")

    def layer(
        self, checkpoint: Checkpoint, stack: Stack, index: int, target: int, part: PartRecipe
    ) -> Iterator[tuple[str, str]]:
        """The tensors of one layer: name in the result and in the model.

        The first layer may have more than others (a table of positions that all share), or less (no norm of its own).
        """
        of_layers = self.rests(checkpoint, stack)
        own, first = of_layers[index], of_layers[0]
        others = of_layers[1] if len(of_layers) > 1 else first
        extra, lacking = first.keys() - others.keys(), others.keys() - first.keys()
        if bool(extra) == bool(lacking):
            extra, lacking = set(), set()
        if target == 0 and index != 0:
            own = {rest: place for rest, place in own.items() if rest not in lacking}
            own |= {rest: first[rest] for rest in first if rest in extra}
        if target != 0 and index == 0:
            own = {rest: place for rest, place in own.items() if rest not in extra}
            if lacking:
                self.problems.append(
                    f"{part.path}: layer 0 of {checkpoint.label} has no {min(lacking)}, which all layers but the first "
                    "need; it can only be the first"
                )
        for place in own.values():
            at = index if place.rest not in extra else 0
            yield place.name(target), place.name(at)

    def rests(self, checkpoint: Checkpoint, stack: Stack) -> list[dict[str, Place]]:
        """The tensors of every layer, by what follows the index in their names."""
        layers: list[dict[str, Place]] = [{} for _ in range(self.stack_of(checkpoint, stack).depth)]
        for place in self.anatomy(checkpoint).places.values():
            if place is not None and place.stack == stack.prefix:
                layers[place.index][place.rest] = place
        return layers

    def section(
        self,
        part: PartRecipe,
        names: tuple[str, ...],
        own_names: Sequence[Sequence[str]],
        layers: Range | None,
        module: Module,
    ) -> Section:
        """Puts the tensors of a part into all columns."""
        checkpoints = self.checkpoints(part)
        ranges = [*part.ranges, *([part.base_range] if part.base_range is not None else [])]
        count = len(part.recipe.models)
        rows = [dict(zip(names, own, strict=True)) for own in own_names]
        words = [
            each.id if not part.ranges else f"{each.id} {wanted[0]} to {wanted[1] - 1}"
            for each, wanted in zip(checkpoints, ranges or [(0, 0)] * len(checkpoints), strict=True)
        ]
        if module.stack is not None and ranges:
            self.refuse_other_layers(part, module.stack, checkpoints, ranges)
        for number, column in enumerate([*self.columns, *([self.base] if self.base is not None else [])]):
            is_base = number == len(self.columns)
            at = count if is_base and len(checkpoints) > count else number if not is_base and number < count else 0
            missing = [own for own in rows[at].values() if own not in checkpoints[at].tensors]
            if missing:
                self.problems.append(f"{part.path}: {checkpoints[at].label} has no tensor {missing[0]}")
                continue
            column.origins.update({name: Origin(checkpoints[at], own) for name, own in rows[at].items()})
            column.said.append(words[at].rstrip("/").rpartition("/")[2])
            if module.stack is not None:
                wanted = ranges[at] if ranges else None
                column.layers.setdefault(module.stack, []).extend(
                    self.layer_origins(checkpoints[at], module.stack, wanted)
                )
        told = [*words[:count], *(f"base {each}" for each in words[count:])]
        return Section(part.path, part.recipe, names, tuple(rows), layers, module.name, tuple(told))

    def layer_origins(self, checkpoint: Checkpoint, stack: Stack, wanted: Range | None) -> list[LayerOrigin]:
        """What a config says of layers of a model; of all where no range is given."""
        depth = self.stack_of(checkpoint, stack).depth
        values = values_of(checkpoint.settings)
        return [LayerOrigin(values, depth, index) for index in range(*(wanted or (0, depth)))]

    def refuse_other_layers(
        self, part: PartRecipe, stack: Stack, checkpoints: Sequence[Checkpoint], ranges: Sequence[Range]
    ) -> None:
        """Notes sources whose layers are of another kind than those that they are merged with."""
        kinds = [
            kinds_of(stack.key, self.layer_origins(checkpoint, stack, wanted))
            for checkpoint, wanted in zip(checkpoints, ranges, strict=True)
        ]
        for index, own in enumerate(kinds):
            for key in sorted(own.keys() & kinds[0].keys()):
                if own[key] != kinds[0][key]:
                    self.problems.append(
                        f"{part.path}.sources[{index}].layer_range: {key} of these layers is {own[key]}, and of those "
                        f"of sources[0] {kinds[0][key]}; layers that are merged are of one kind"
                    )

    def changes(self) -> dict[Path, object]:
        """What the config of the result says of its layers."""
        found: dict[Path, object] = {}
        for stack in self.columns[0].layers:
            layers = self.columns[0].layers[stack]
            found |= changes_for(stack.key, layers) | without_further(stack.key, layers)
        return found

    def refuse_unlike(self, changes: Mapping[Path, object]) -> None:
        """Refuses models that differ in more than what their layers are: in width, in the vocabulary."""
        loose = [name for name, place in self.anatomy(self.first).places.items() if place is None]
        alike = self.loosened(self.first, loose, changes)
        seen = {id(self.first)}
        problems = []
        for path, _, checkpoint in self.used():
            if id(checkpoint) not in seen:
                seen.add(id(checkpoint))
                problems += [
                    f"{path}: {problem}" for problem in compare([alike, self.loosened(checkpoint, loose, changes)])
                ]
        raise_all(problems, CheckpointError, "these checkpoints cannot be merged")
        for column in (*self.columns[1:], *([self.base] if self.base is not None else [])):
            for name, origin in column.origins.items():
                own = self.columns[0].origins[name]
                shapes = [each.checkpoint.tensors[each.name].shape for each in (own, origin)]
                if shapes[0] != shapes[1]:
                    problems.append(
                        f"{origin.name} of {origin.checkpoint.label} has shape {list(shapes[1])}, {own.name} of "
                        f"{own.checkpoint.label} has {list(shapes[0])}"
                    )
        raise_all(problems, CheckpointError, "these layers cannot be merged")

    def loosened(self, checkpoint: Checkpoint, loose: Sequence[str], changes: Mapping[Path, object]) -> Checkpoint:
        """A model without its layers, under the config that all have."""
        settings = changed(checkpoint.settings, changes, checkpoint.label) if changes else checkpoint.settings
        places = self.anatomy(checkpoint).places
        tensors = {name: checkpoint.tensors[name] for name in checkpoint.tensors if places[name] is None}
        ordered = {name: tensors[name] for name in loose if name in tensors}
        return replace(checkpoint, settings=settings, tensors={**ordered, **tensors}, unused=())

    def checkpoint(self, column: _Column, settings: Settings) -> Checkpoint:
        """A column as a checkpoint; the model itself where the column is one."""
        outside = next(iter(column.origins.values())).checkpoint
        if column.origins.keys() == outside.tensors.keys() and all(
            origin == Origin(outside, name) for name, origin in column.origins.items()
        ):
            return outside
        weights = StackedWeights(column.origins)
        said = ", ".join(dict.fromkeys(column.said))
        made = replace(
            outside,
            id=said,
            label=said,
            revision=None,
            settings=settings,
            tensors={name: weights.infos[name] for name in sorted(weights.infos, key=natural_order)},
            unused=(),
            weights=weights,
            adapter=None,
        )
        if made.model_class is not None:
            return planned(made, weights, f"{said}: these layers do not make a {made.model_class.__name__}")
        try:
            spec = spec_of(made)
        except SpecError:
            return made  # names are all there is to go by
        bind(spec, made)
        return made
