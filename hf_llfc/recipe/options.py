"""One description of every option: recipes, the command line, Python and the documentation are made from it.

A field of a section says its type, default, range, choices and one sentence of help. The section judges its values with
`settle` when it is made; `build` makes a section from plain data and collects what is wrong with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any, TypeVar, get_args, get_type_hints

from hf_llfc.errors import LLFCError, raise_all, suggest
from hf_llfc.recipe.fitting import describe, fit, is_number, parts_of

Kind = TypeVar("Kind")

REQUIRED = object()
"""The default of an option that has none."""


@dataclass(frozen=True)
class Option:
    """One option of a section, or one parameter of a merge method.

    Attributes:
        help: One sentence, as recipes, command line and documentation show it.
        choices: The words that are valid; any where empty.
        at_least: Smallest valid number.
        above: Number that a valid one is larger than.
        at_most: Largest valid number.
        reads: Turns what a user may write into the value; raises `ValueError` with what is expected.
        formerly: Older names of the option, still read.
        key: Name in a recipe, where it is not that of the field.
        name: Name of the field.
        type: Its type.
        default: Its default, or `REQUIRED`.
        shown: The default in words, where the value says too little.
        metavar: What the help of the command line calls the value.
    """

    help: str
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    reads: Callable[[Any], Any] | None = None
    formerly: tuple[str, ...] = ()
    key: str = ""
    name: str = ""
    type: Any = str
    default: Any = REQUIRED
    shown: str | None = None
    metavar: str = ""

    @property
    def is_required(self) -> bool:
        """Whether there is no default."""
        return self.default is REQUIRED

    @property
    def default_words(self) -> str:
        """The default as help and documentation show it."""
        return self.shown or ("none" if self.default in (None, (), {}) else str(self.default).lower())

    @property
    def section(self) -> Any:
        """The section that the value is, or None."""
        return next((kind for kind in (self.type, *get_args(self.type)) if dataclasses.is_dataclass(kind)), None)

    def read(self, value: Any) -> tuple[Any, list[str]]:
        """The value in its type, and what is wrong with it, to be written behind the option's key."""
        if self.reads is not None and (value is not None or self.default is not None):
            try:
                return self.reads(value), []
            except ValueError as error:
                return None, [f": {error} is expected, found {value!r}"]
        if self.section in parts_of(self.type) and isinstance(value, Mapping):
            problems: list[str] = []
            return build(self.section, value, "", problems), [f".{problem}" for problem in problems]
        fits, converted = fit(value, self.type)
        if fits:
            return converted, self._wrong(value, converted)
        if value is None and not self.is_required:
            return self.default, []
        expected = "a mapping of keys" if self.section is not None else describe(self.type)
        return None, [f": {expected} is expected, found {value!r}"]

    def _wrong(self, value: Any, converted: Any) -> list[str]:
        if self.choices:
            words = (
                {f"[{i}]": word for i, word in enumerate(converted)}
                if isinstance(converted, tuple)
                else {"": converted}
            )
            return [
                f"{place}: unknown {word!r}{suggest(word, self.choices)} (known: {', '.join(self.choices)})"
                for place, word in words.items()
                if word is not None and word not in self.choices
            ]
        if not is_number(converted):
            return []
        is_low = self.at_least is not None and converted < self.at_least
        is_low = is_low or (self.above is not None and converted <= self.above)
        is_high = self.at_most is not None and converted > self.at_most
        return [f": {self.range} is expected, found {value!r}"] if is_low or is_high else []

    @property
    def range(self) -> str:
        """The numbers that are valid, in words."""
        parts = [f"at least {self.at_least:g}"] if self.at_least is not None else []
        parts += [f"a number above {self.above:g}"] if self.above is not None else []
        parts += [f"at most {self.at_most:g}"] if self.at_most is not None else []
        return " and ".join(parts)


def option(help: str, default: Any = MISSING, **settings: Any) -> Any:
    """A field of a section.

    Args:
        help: One sentence.
        default: The default; a value is required without it. A callable makes it.
        settings: Other attributes of `Option`.
    """
    described = {"option": Option(help, **settings)}
    if callable(default):
        return field(default_factory=default, metadata=described)
    return field(default=default, metadata=described)


def derived(help: str, default: Any, *, compare: bool = True) -> Any:
    """A field of a section that is made from the others, and that nobody writes.

    Args:
        help: One sentence.
        default: Its value where there is nothing to make it from.
        compare: Whether two sections are equal only if it is.
    """
    return field(default=default, compare=compare, metadata={"help": help})


@cache
def options_of(kind: Any) -> dict[str, Option]:
    """The options of a section by the name of their field."""
    # A dataset in memory is judged where it is read: nothing here may load `datasets`.
    hints = get_type_hints(kind, localns={"datasets": SimpleNamespace(Dataset=object)})
    found = {}
    for each in dataclasses.fields(kind):
        if "option" not in each.metadata:
            continue
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        default = REQUIRED if default is MISSING else default
        described: Option = each.metadata["option"]
        found[each.name] = dataclasses.replace(
            described, name=each.name, key=described.key or each.name, type=hints[each.name], default=default
        )
    return found


def documented(kind: type[Kind]) -> type[Kind]:
    """Adds the help of the options to the docstring of a section."""
    lines = [
        f"    {each.name}: {each.metadata['option'].help if 'option' in each.metadata else each.metadata['help']}"
        for each in dataclasses.fields(kind)  # type: ignore[arg-type]
    ]
    kind.__doc__ = "\n".join([f"{(kind.__doc__ or '').rstrip()}\n", "Attributes:", *lines])
    return kind


def settle(section: object, error: type[LLFCError], disagreements: Callable[[], Sequence[str]] = list) -> None:
    """Judges a section that is being made, and brings its values into their types.

    Args:
        section: The section, frozen.
        error: The class of the error.
        disagreements: What no single option can tell, asked for where each of them is valid.

    Raises:
        LLFCError: Everything that is wrong, one problem an option.
    """
    problems = []
    kind: Any = type(section)
    for name, each in options_of(kind).items():
        value, wrong = each.read(vars(section)[name])
        problems += [f"{each.key}{problem}" for problem in wrong]
        if not wrong:
            object.__setattr__(section, name, value)
    raise_all(problems or disagreements(), error, f"{_WORDS.get(kind.__name__, 'the recipe')} is not valid")


_WORDS = {
    "AlignSection": "the alignment",
    "CalibrateSection": "the calibration",
    "DiagnoseSection": "the diagnosis",
    "EvaluationConfig": "the evaluation",
}


def build(kind: type[Kind], values: Mapping[str, Any], path: str, problems: list[str]) -> Kind | None:
    """Makes a section from plain data.

    Args:
        kind: The section.
        values: Its values by their keys.
        path: Where they stand in the recipe.
        problems: What is wrong is appended to it, each with its path.

    Returns:
        The section; None where something is wrong with it.
    """
    before = len(problems)
    fitted = fitted_values(kind, values, path, problems)
    return None if len(problems) > before else made(kind, fitted, path, problems)


def made(kind: type[Kind], fitted: Mapping[str, Any], path: str, problems: list[str]) -> Kind | None:
    """Makes a section from values that are valid each; what is wrong with them together is appended to `problems`."""
    try:
        return kind(**fitted)
    except LLFCError as error:
        problems += [join(path, problem) for problem in error.problems]
        return None


def fitted_values(
    kind: type, values: Mapping[str, Any], path: str, problems: list[str], without: Sequence[str] = ()
) -> dict[str, Any]:
    """The values that are valid, by field; what is wrong with the others, or missing, is appended to `problems`.

    Args:
        kind: The section.
        values: Its values by their keys; a key with nothing after it has its default.
        path: Where they stand in the recipe.
        problems: What is wrong.
        without: Fields that are not read here.
    """
    options = {each.key: each for name, each in options_of(kind).items() if name not in without}
    former = {name: key for key, each in options.items() for name in each.formerly}
    problems += [
        f"{join(path, key)}: is given twice, also as {former[key]}" for key in values if former.get(key) in values
    ]
    given = {former.get(key, key): value for key, value in values.items()}
    refuse_unknown(given, list(options), path, problems)
    fitted = {}
    for key, each in options.items():
        if given.get(key) is None:
            problems += [f"{join(path, key)}: missing"] if each.is_required else []
            continue
        fitted[each.name], wrong = each.read(given[key])
        problems += [f"{join(path, key)}{problem}" for problem in wrong]
    return fitted


def refuse_unknown(keys: Iterable[str], known: Sequence[str], path: str, problems: list[str]) -> None:
    """Appends a problem for each key that is not known, with the nearest one that is."""
    for key in keys:
        if key not in known:
            hint = suggest(str(key), known) or f" (known: {', '.join(known)})"
            problems.append(f"{join(path, str(key))}: unknown key{hint}")


def join(path: str, key: str) -> str:
    """A path of keys and one below it."""
    return f"{path}.{key}" if path else key


def copied(value: Any) -> Any:
    """Mappings and lists of plain data that may be changed without changing what was given."""
    if isinstance(value, Mapping):
        return {key: copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [copied(entry) for entry in value]
    return value
