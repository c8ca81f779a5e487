"""The one rule of weights: what a recipe gives a model, and what the model has in the merge.

A recipe gives one number, a gradient over the layers, or rules by pattern. Where the merge is normalized, what is given
is divided by its sum; then it is multiplied by λ. Merge, diagnosis and card all ask `effective_weights`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial

from hf_llfc.errors import RecipeError, raise_all, suggest

ZERO_SUM = 1e-6
"""Weights whose sum is nearer to zero cannot be divided by it."""

_LAYER = re.compile(r"(?:^|\.)(?P<index>\d+)(?=\.|$)")


@dataclass(frozen=True)
class Rule:
    """A weight for the tensors that match.

    Attributes:
        pattern: Part of a tensor's name, a shell pattern for all of it, or the name of an axis that it carries
            (`heads.3`, or `heads` for all of them); every tensor where None.
        values: One weight, or a gradient of two and more over the layers.
        may_be_idle: Whether it may decide nothing: it is that of all models, and one may have rules of its own.
    """

    pattern: str | None
    values: tuple[float, ...]
    may_be_idle: bool = False

    def matches(self, name: str, axes_of: Callable[[str], Sequence[str]]) -> bool:
        """Whether the rule applies to a tensor; its axes are looked up only if its name does not tell."""
        pattern = self.pattern
        if pattern is None or pattern in name or fnmatchcase(name, pattern):
            return True
        from hf_llfc.symmetry.spec import matches_axis  # reading a recipe does not wait for torch

        return any(matches_axis(axis, pattern) for axis in axes_of(name))


@dataclass(frozen=True)
class WeightSchedule:
    """The weight of one model for every tensor.

    A gradient is interpolated linearly over the depth of the network: the first value belongs to the first layer, the
    last to the last one, and tensors outside the layers take the first value, all as in mergekit.

    Attributes:
        rules: The first that matches counts.
        model: What the model is called, for messages.
        axes_of: Gives the axes that a tensor carries (`heads.3`), so that rules may name an axis.
        own_names: Name of a tensor → its name in this model, where that is another.
    """

    rules: tuple[Rule, ...]
    model: str = "model"
    axes_of: Callable[[str], Sequence[str]] = field(default=lambda name: (), compare=False)
    own_names: Mapping[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def constant(cls, weight: float, model: str = "model") -> WeightSchedule:
        """One weight for every tensor."""
        return cls((Rule(None, (weight,)),), model)

    @property
    def is_constant(self) -> bool:
        """Whether one number says it all."""
        return len(self.rules) == 1 and self.rules[0].pattern is None and len(self.rules[0].values) == 1

    def rule(self, name: str) -> int | None:
        """The index of the rule that decides the weight of a tensor; None if none matches."""
        own = self.own_names.get(name, name)
        return next((i for i, rule in enumerate(self.rules) if rule.matches(own, lambda _: self.axes_of(name))), None)


class RuleUse:
    """Which rules decide something, where several merges share them: one that does in none is a mistake."""

    def __init__(self) -> None:
        """No rule has been seen."""
        self._used: dict[tuple[str, Rule], bool] = {}
        self._schedules: dict[tuple[str, Rule], WeightSchedule] = {}
        self._names: dict[tuple[str, Rule], list[str]] = {}

    def note(self, schedule: WeightSchedule, what: str, decided: Collection[int | None], names: Sequence[str]) -> None:
        """Notes the rules of a schedule, and those of them that decided the value of one of some tensors."""
        for index, rule in enumerate(schedule.rules):
            self._used[what, rule] = self._used.get((what, rule), False) or index in decided
            self._schedules.setdefault((what, rule), schedule)
            self._names.setdefault((what, rule), []).extend(names)

    def refuse_unused(self) -> None:
        """Refuses rules that decide nothing.

        Raises:
            RecipeError: There are some.
        """
        problems = [
            f"{self._schedules[key].model}: {_why_idle(key[1], self._names[key], self._schedules[key])}"
            for key, used in self._used.items()
            if not used and key[1].pattern is not None and not key[1].may_be_idle
        ]
        raise_all(problems, RecipeError, "the parameters do not fit the models")


def effective_weights(weights: Sequence[float], *, normalize: bool, scale: float = 1.0) -> tuple[float, ...]:
    """The weights that models have in a merge.

    Args:
        weights: What is given, one number a model.
        normalize: Whether they are divided by their sum.
        scale: λ of task arithmetic; multiplies what the division leaves.

    Raises:
        RecipeError: The weights sum to zero and are to be divided by that.
    """
    total = math.fsum(weights)
    if normalize and abs(total) < ZERO_SUM:
        shown = " + ".join(f"{weight:.6g}" for weight in weights)
        raise RecipeError(
            f"the weights {shown} sum to 0 and cannot be divided by their sum; change them, or write "
            "`parameters: {normalize: false}` to take them as they are"
        )
    return tuple(scale * (weight / total if normalize else weight) for weight in weights)


def resolve_weights(
    names: Sequence[str],
    schedules: Sequence[WeightSchedule],
    *,
    normalize: bool = True,
    scale: float = 1.0,
    uses: RuleUse | None = None,
) -> dict[str, tuple[float, ...]]:
    """The weights of every tensor, one a model, from what a recipe says of the models.

    Args:
        names: The tensors.
        schedules: One a model.
        normalize: As for `effective_weights`, tensor by tensor.
        scale: As for `effective_weights`.
        uses: As for `resolve_values`.

    Raises:
        RecipeError: A tensor that no rule matches, a rule that decides nothing, or weights that sum to zero.
    """
    problems: list[str] = []
    weights: dict[str, tuple[float, ...]] = {}
    for name, row in resolve_values(names, schedules, "weights", uses).items():
        try:
            weights[name] = effective_weights(row, normalize=normalize, scale=scale)
        except RecipeError as error:
            problems.append(f"{name}: {error}")
    if len(problems) > 3:
        problems[2:] = [f"and {len(problems) - 2} more tensors"]
    raise_all(problems, RecipeError, "the weights cannot be used")
    return weights


def resolve_values(
    names: Sequence[str],
    schedules: Sequence[WeightSchedule],
    what: str,
    uses: RuleUse | None = None,
    *,
    steps: bool = False,
) -> dict[str, tuple[float, ...]]:
    """The values that schedules give to every tensor, one a schedule.

    Args:
        names: The tensors.
        schedules: One a model.
        what: Plural name of the values, for messages.
        uses: Where other merges share the rules: notes which decide something, in place of an error here.
        steps: Whether a gradient goes from value to value in steps, as true and false must: a value begins where the
            layers have come as far as it, and the last is that of the last layer alone.

    Raises:
        RecipeError: A tensor that no rule matches, or a rule that decides nothing.
    """
    depths = layer_depths(names)
    problems: list[str] = []
    columns = [
        [_value(schedule, each, depths[each], steps) for each in names]
        for schedule in schedules
        if _judge(names, schedule, problems, what, uses)
    ]
    raise_all(problems, RecipeError, f"the {what} do not fit the models")
    return dict(zip(names, zip(*columns, strict=True), strict=True))


def layer_depths(names: Iterable[str]) -> dict[str, float]:
    """How deep every tensor lies, from 0 for the first layer to 1 for the last; tensors outside the layers at 0.

    The layer is the first whole number among the dotted parts of a tensor's name. Names that agree up to that number
    form a stack (`model.layers`, `vision.encoder.layer`), and every stack goes from 0 to 1; a single layer is at 1.
    """
    names = list(names)
    places = {
        name: (name[: match.start("index")], int(match["index"])) for name in names if (match := _LAYER.search(name))
    }
    stacks: dict[str, set[int]] = {}
    for stack, index in places.values():
        stacks.setdefault(stack, set()).add(index)
    ranks = {stack: {index: rank for rank, index in enumerate(sorted(found))} for stack, found in stacks.items()}
    depths = dict.fromkeys(names, 0.0)
    for name, (stack, index) in places.items():
        last = len(ranks[stack]) - 1
        depths[name] = ranks[stack][index] / last if last else 1.0
    return depths


def _judge(
    names: Sequence[str], schedule: WeightSchedule, problems: list[str], what: str, uses: RuleUse | None
) -> bool:
    """Notes tensors without a rule and rules without a tensor; returns whether every tensor has a rule."""
    decided = [schedule.rule(name) for name in names]
    if uses is not None:
        uses.note(schedule, what, set(decided), names)
    else:
        problems += [
            f"{schedule.model}: {_why_idle(rule, names, schedule)}"
            for i, rule in enumerate(schedule.rules)
            if i not in decided and not rule.may_be_idle
        ]
    without = [name for name, i in zip(names, decided, strict=True) if i is None]
    if without:
        problems.append(
            f"{schedule.model}: no filter matches {without[0]} ({len(without)} such tensors); end the list of weights "
            "with an entry without a filter (`- value: …`)"
        )
    return not without


def _value(schedule: WeightSchedule, name: str, depth: float, steps: bool) -> float:
    rule = schedule.rule(name)
    assert rule is not None, "judged before"
    return _interpolated(schedule.rules[rule].values, depth, steps)


def _why_idle(rule: Rule, names: Sequence[str], schedule: WeightSchedule) -> str:
    """Why a rule decides the value of no tensor, with what it may have meant."""
    pattern, axes_of = rule.pattern, schedule.axes_of
    own = {name: schedule.own_names.get(name, name) for name in names}
    if pattern is None or any(rule.matches(own[name], partial(_axes, axes_of, name)) for name in names):
        which = "the entry without a filter" if pattern is None else f"the filter {pattern!r}"
        return f"{which} decides nothing, since entries before it match all of its tensors; move it before them"
    length = pattern.count(".") + 1
    parts = [[part for part in name.split(".") if not part.isdigit()] for name in own.values()]
    near = {".".join(each[i : i + length]): None for each in parts for i in range(len(each) - length + 1)}
    axes = {axis.split(".")[0]: None for name in names for axis in axes_of(name)}
    hint = suggest(pattern, [*near, *axes])
    if not hint:
        hint = f" (names are made of {', '.join(dict.fromkeys(part for each in parts for part in each))})"
    return f"the filter {pattern!r} matches no tensor and no axis{hint}"


def _axes(axes_of: Callable[[str], Sequence[str]], name: str, _: str) -> Sequence[str]:
    return axes_of(name)


def _interpolated(values: tuple[float, ...], depth: float, steps: bool) -> float:
    place = depth * (len(values) - 1)
    below = min(int(place), len(values) - 1)
    if steps:
        return values[below]
    above = min(below + 1, len(values) - 1)
    share = place - below
    return (1 - share) * values[below] + share * values[above]
