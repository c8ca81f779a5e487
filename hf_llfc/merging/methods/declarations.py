"""How a merge method is described: its parameters, its inputs, and how its tensors may be streamed.

Nothing here loads a tensor library, so that recipes can be read and `--help` answered at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from importlib import import_module
from math import isfinite, prod

from hf_llfc.errors import RecipeError, raise_all, suggest
from hf_llfc.merging.methods.settings import Settings, Value

TYPE_CHECKING = False
if TYPE_CHECKING:  # the typing module alone takes as long to load as Python takes to start
    from typing import Any

    import torch
    from torch import Tensor

    from hf_llfc.merging.methods.parts import Prepared, Stream


class Need(Enum):
    """What a method must see of a tensor at once, from the least to the most."""

    ELEMENTWISE = "elementwise"
    """Any part of the elements: the merge of the parts is part of the merge."""

    PASSES = "passes"
    """Any part of the elements or whole rows, from the beginning on in order, and several times: what is merged depends
    on norms, counts, cuts or draws of the whole tensor."""

    DECOMPOSITION = "decomposition"
    """Several passes, and matrices in float64 as large as the tensor or its smaller side."""


class Base(Enum):
    """Whether a method has a base model beside the models that it merges."""

    REQUIRED = "required"
    OPTIONAL = "optional"
    NONE = "none"


class Sees(Enum):
    """What of its models a method goes by, from the most to the least."""

    WEIGHTS = "weights"
    """The weights themselves."""

    CHANGES = "changes"
    """The models' changes of the base: added to another base, they give that base with the same change."""

    SUBSPACE = "subspace"
    """Of the changes only what stays when all are rotated alike, and framed by zeros: the rotated, framed changes give
    the rotated, framed result."""


class _Required(Enum):
    REQUIRED = "required"


REQUIRED = _Required.REQUIRED
"""Stands where a default would if a parameter has none."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a merge method, as mergekit calls it where mergekit has it.

    Attributes:
        name: Key in a recipe.
        kind: `float`, `int` or `bool`.
        default: The value where none is given; `REQUIRED` if one must be.
        help: One sentence.
        low: The smallest value; none where None.
        high: The largest value; none where None.
        per_model: Whether every model has its own value.
    """

    name: str
    kind: type[float] | type[int] | type[bool]
    default: Value | _Required
    help: str
    low: float | None = None
    high: float | None = None
    per_model: bool = False

    def checked(self, value: object) -> Value:
        """A value that was given, as `kind`.

        Raises:
            RecipeError: It is of another kind or out of range; the message begins with the name.
        """
        if self.kind is bool:
            # Recipes of mergekit also have 1 and 0.
            if not isinstance(value, bool) and not (isinstance(value, int | float) and value in (0, 1)):
                raise RecipeError(f"{self.name} must be true or false, not {value!r}")
            return bool(value)
        noun = "a whole number" if self.kind is int else "a number"
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else int | float):
            raise RecipeError(f"{self.name} must be {noun}, not {value!r}")
        if not isfinite(value):
            raise RecipeError(f"{self.name} must be finite, not {value!r}")
        if self.low is not None and value < self.low:
            raise RecipeError(f"{self.name} must be at least {self.low:g}, not {value!r}")
        if self.high is not None and value > self.high:
            raise RecipeError(f"{self.name} must be at most {self.high:g}, not {value!r}")
        return self.kind(value)


@dataclass(frozen=True)
class MergeMethod:
    """A merge method: what it is called, takes and needs, and where its functions are.

    The functions take tensors of any floating-point dtype, compute in float64 and change none of their inputs. A part
    of a tensor is one-dimensional.

        elementwise   function(models, base, settings) -> merged, of any part, in float64
        all others    function(stream, settings) -> what merges the parts of a tensor, in order; see `parts.Prepared`

    An engine that streams calls `prepared`; `merge` is for tensors in memory.

    Attributes:
        name: Value of `merge_method` in a recipe.
        title: What its authors call it.
        paper: One reference.
        help: One sentence.
        base: Whether there is a base model.
        inputs: How many models there must be: at least, and at most where there is a limit. The base is not counted.
        need: What the method needs of a tensor.
        module: Where its function is, of the method's name, relative to this package.
        parameters: What may be set.
        reduces: What is computed over all elements of a tensor before it is merged; nothing if empty.
        random: Whether the method draws random numbers, anew for every tensor and model.
        importance: What is measured of every element of a model on data, one of
            `hf_llfc.diagnostics.importance.IMPORTANCES`; the functions then take the tensors of all models, and after
            them the importances of all. Nothing if empty.
        sees: What of the models it goes by. Without a base beside them, only as far as its weights sum to 1.
        by_row: Parameter and value with which rows or columns are merged by themselves, so that rotations matter.
    """

    name: str
    title: str
    paper: str
    help: str
    base: Base
    inputs: tuple[int, int | None]
    need: Need
    module: str
    parameters: tuple[Parameter, ...] = ()
    reduces: str = ""
    random: bool = False
    importance: str = ""
    sees: Sees = Sees.CHANGES
    by_row: tuple[str, bool] | None = None

    def parameter(self, name: str) -> Parameter:
        """A parameter by its name.

        Raises:
            RecipeError: There is none of that name.
        """
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise RecipeError(f"parameters of {self.name}: {self._unknown(name)}")

    def settings(self, values: Mapping[str, object], *, models: int, seed: int = 0, tensor: str = "tensor") -> Settings:
        """Checks values for one tensor, and fills in the defaults.

        Args:
            values: Parameter → its value. A parameter of every model may have one value for all, or a sequence with one
                a model.
            models: How many models are merged, the base not counted.
            seed: The recipe's seed.
            tensor: Name of the tensor.

        Returns:
            What the functions of the method take.

        Raises:
            RecipeError: An unknown parameter, a value of a wrong kind or out of its range, a missing one, or a number
                of models that the method does not take; all of it in one message.
        """
        problems = [self._unknown(name) for name in values if name not in {each.name for each in self.parameters}]
        low, high = self.inputs
        if models < low or (high is not None and models > high):
            limits = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
            beside = " beside the base" if self.base is not Base.NONE else ""
            problems.append(f"{models} models are given{beside}, and it merges {limits}")
        shared: dict[str, Value] = {}
        of_models: dict[str, tuple[Value, ...]] = {}
        for parameter in self.parameters:
            given = values.get(parameter.name, parameter.default)
            if given is REQUIRED:
                problems.append(f"{parameter.name} is missing; {parameter.help}")
                continue
            entries = _entries(given, parameter, models)
            if len(entries) != (models if parameter.per_model else 1):
                problems.append(f"{parameter.name} has {len(entries)} values for {models} models; give one a model")
            try:
                checked = tuple(parameter.checked(entry) for entry in entries)
            except RecipeError as problem:
                problems.append(str(problem))
                continue
            if parameter.per_model:
                of_models[parameter.name] = checked
            else:
                shared[parameter.name] = checked[0]
        raise_all(problems, RecipeError, f"parameters of {self.name}")
        return Settings(shared, of_models, seed, tensor)

    def function(self) -> Callable[..., Any]:
        """The function that computes it; loads its module."""
        function: Callable[..., Any] = vars(import_module(f".{self.module}", __package__))[self.name]
        return function

    def prepared(self, stream: Stream, settings: Settings) -> Prepared:
        """What merges the parts of a tensor, after all passes over it but the last.

        Args:
            stream: The tensor of every model, and of the base if there is one.
            settings: From `settings`, for as many models.
        """
        from hf_llfc.merging.methods.parts import Prepared

        function = self.function()
        # A tensor without elements has no parts.
        if self.need is Need.ELEMENTWISE or not prod(stream.shape):
            return Prepared(lambda models_c, base_c: function(models_c, base_c, settings))
        prepared: Prepared = function(stream, settings)
        return prepared

    def merge(
        self, models: Sequence[Tensor], base: Tensor | None, settings: Settings, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Merges one tensor that is in memory.

        Args:
            models: Tensors of one shape and floating-point dtype; the base is not among them.
            base: That of the base model, if there is one.
            settings: From `settings`, for as many models.
            dtype: Dtype of the result, to which it is rounded once; that of the models where None.

        Returns:
            A new contiguous tensor of that shape.
        """
        assert self.base is Base.OPTIONAL or (base is not None) == (self.base is Base.REQUIRED), f"base of {self.name}"
        from hf_llfc.merging.methods.parts import InMemory, merge_in_parts

        stream = InMemory(models, base)
        return merge_in_parts(self.prepared(stream, settings), stream, dtype)

    def _unknown(self, name: str) -> str:
        names = [parameter.name for parameter in self.parameters]
        known = f"it has {', '.join(names)}" if names else "it has none"
        return f"{self.name} has no parameter '{name}'{suggest(name, names)} ({known})"


def without(parameters: Sequence[Parameter], *names: str) -> tuple[Parameter, ...]:
    """Parameters but for some."""
    return tuple(parameter for parameter in parameters if parameter.name not in names)


def with_default(parameters: Sequence[Parameter], name: str, default: Value) -> tuple[Parameter, ...]:
    """Parameters, one of them with another default."""
    return tuple(replace(each, default=default) if each.name == name else each for each in parameters)


def _entries(given: object, parameter: Parameter, models: int) -> tuple[object, ...]:
    """One value a model, or the one value of the merge."""
    if not parameter.per_model:
        return (given,)
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        return tuple(given)
    return (given,) * models
