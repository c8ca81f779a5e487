"""Which weight a model has for which tensor: one number, a gradient over the layers, or rules by pattern."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from hf_llfc.errors import RecipeError, raise_all
from hf_llfc.symmetry.declarations import matches_axis

SUM_TOLERANCE = 1e-6
"""How far the weights of a linear merge may be from a sum of one: enough for 0.333333 three times."""

_LAYER = re.compile(r"(?:^|\.)(?P<index>\d+)(?=\.|$)")


@dataclass(frozen=True)
class Rule:
    """A weight for the tensors that match.

    Attributes:
        pattern: Part of a tensor's name, a shell pattern for all of it, or the name of an axis that it carries
            (`heads.3`, or `heads` for all of them); every tensor where None.
        values: One weight, or a gradient of two and more over the layers.
    """

    pattern: str | None
    values: tuple[float, ...]

    def matches(self, name: str, axes_of: Callable[[str], Sequence[str]]) -> bool:
        """Whether the rule applies to a tensor; its axes are looked up only if its name does not tell."""
        pattern = self.pattern
        if pattern is None or pattern in name or fnmatchcase(name, pattern):
            return True
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
    """

    rules: tuple[Rule, ...]
    model: str = "model"
    axes_of: Callable[[str], Sequence[str]] = field(default=lambda name: (), compare=False)

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
        return next((i for i, rule in enumerate(self.rules) if rule.matches(name, self.axes_of)), None)


def resolve_weights(
    names: Sequence[str],
    schedules: Sequence[WeightSchedule],
    *,
    normalize: bool | None = None,
    scale: float = 1.0,
    sum_to_one: bool = True,
) -> dict[str, tuple[float, ...]]:
    """The weights of every tensor, one a model, from what a recipe says of the models.

    Args:
        names: The tensors.
        schedules: One a model.
        normalize: True divides the weights of each tensor by their sum, False takes them as they are, None does so
            too but heeds `sum_to_one`.
        scale: Factor on all weights, after normalisation: λ of task arithmetic.
        sum_to_one: Whether weights that do not sum to one are an error, as in a linear merge.

    Raises:
        RecipeError: A tensor that no rule matches, a rule that decides nothing, or weights of a wrong sum.
    """
    depths = layer_depths(names)
    problems: list[str] = []
    columns = [_column(names, schedule, depths, problems) for schedule in schedules]
    raise_all(problems, RecipeError, "the weights do not fit the models")

    weights: dict[str, tuple[float, ...]] = {}
    for name, row in zip(names, zip(*columns, strict=True), strict=True):
        total = math.fsum(row)
        shown = " + ".join(f"{weight:.6g}" for weight in row)
        if normalize and abs(total) < SUM_TOLERANCE:
            problems.append(f"{name}: the weights {shown} sum to 0 and cannot be normalized")
        elif normalize:
            row = tuple(weight / total for weight in row)
        elif normalize is None and sum_to_one and abs(total - 1) > SUM_TOLERANCE:
            problems.append(
                f"{name}: the weights {shown} sum to {total:.6g}, not to 1; write `parameters: {{normalize: true}}` to "
                "divide them by their sum, or `normalize: false` if this is meant"
            )
        weights[name] = tuple(scale * weight for weight in row)
    if len(problems) > 3:
        problems[2:] = [f"and {len(problems) - 2} more tensors"]
    raise_all(problems, RecipeError, "the weights cannot be used")
    return weights


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


def _column(
    names: Sequence[str], schedule: WeightSchedule, depths: Mapping[str, float], problems: list[str]
) -> list[float]:
    """The weights of one model; notes tensors without a rule and rules without a tensor."""
    decided = [schedule.rule(name) for name in names]
    for i, rule in enumerate(schedule.rules):
        if i not in decided:
            problems.append(
                f"{schedule.model}: the filter {rule.pattern!r} decides the weight of no tensor; correct it, or move "
                "it before the rule that hides it"
            )
    without = [name for name, i in zip(names, decided, strict=True) if i is None]
    if without:
        problems.append(
            f"{schedule.model}: no filter matches {without[0]} ({len(without)} such tensors); end the list of weights "
            "with an entry without a filter (`- value: …`)"
        )
    return [
        math.nan if i is None else _interpolated(schedule.rules[i].values, depths[name])
        for name, i in zip(names, decided, strict=True)
    ]


def _interpolated(values: tuple[float, ...], depth: float) -> float:
    place = depth * (len(values) - 1)
    below = min(int(place), len(values) - 1)
    above = min(below + 1, len(values) - 1)
    share = place - below
    return (1 - share) * values[below] + share * values[above]
