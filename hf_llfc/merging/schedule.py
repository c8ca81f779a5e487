"""Which weight a model has for which tensor: one number, a gradient over the layers, or rules by pattern."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from hf_llfc.errors import RecipeError

_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<index>\d+)\.")


@dataclass(frozen=True)
class Rule:
    """A weight for the tensors that match.

    Attributes:
        pattern: Shell pattern or part of a tensor's name, or the name of an axis it carries; every tensor where None.
        values: One weight, or a gradient of two and more over the layers.
    """

    pattern: str | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class WeightSchedule:
    """The weight of one model for every tensor.

    A gradient is interpolated linearly over the depth of the network: the first value belongs to the first layer, the
    last to the last one. Tensors outside the layers take the first value if they are embeddings, else the last.

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

    def weight(self, name: str, depths: dict[str, float]) -> float:
        """The weight for one tensor.

        Args:
            name: The tensor.
            depths: What `layer_depths` says of the model.

        Raises:
            RecipeError: No rule matches.
        """
        axes = self.axes_of(name)
        for rule in self.rules:
            if rule.pattern is None or _matches(rule.pattern, name, axes):
                return _interpolated(rule.values, depths[name])
        raise RecipeError(
            f"{name}: no weight of {self.model} matches this tensor; end the list with a rule without a filter (`- value: …`)"
        )


def layer_depths(names: Iterable[str]) -> dict[str, float]:
    """How deep every tensor lies, from 0 for the first layer to 1 for the last.

    The layer is the first number in a tensor's name; tensors without one are at 0 if they are embeddings, else at 1.
    """
    names = list(names)
    layers = {name: (match["stack"], int(match["index"])) for name in names if (match := _LAYER.match(name))}
    last: dict[str, int] = {}
    for stack, index in layers.values():
        last[stack] = max(last.get(stack, 0), index)
    depths = {}
    for name in names:
        if name in layers:
            stack, index = layers[name]
            depths[name] = index / last[stack] if last[stack] else 0.0
        else:
            depths[name] = 0.0 if "embed" in name or name.split(".")[-2:-1] in (["wte"], ["wpe"]) else 1.0
    return depths


def _interpolated(values: tuple[float, ...], depth: float) -> float:
    place = depth * (len(values) - 1)
    below = min(int(place), len(values) - 1)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (place - below)


def _matches(pattern: str, name: str, axes: Sequence[str]) -> bool:
    if pattern in name or fnmatchcase(name, pattern):
        return True
    return any(fnmatchcase(axis, pattern) or axis.split(".")[0] == pattern for axis in axes)
