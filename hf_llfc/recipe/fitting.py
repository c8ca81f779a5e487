"""Whether plain values of YAML fit the types of a recipe."""

from __future__ import annotations

import collections.abc
import re
from collections.abc import Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from hf_llfc.errors import RecipeError
from hf_llfc.foundation.choices import AUTO
from hf_llfc.merging.methods import Parameter

_BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether a plain value fits a type, and the value in that type."""
    if get_origin(hint) in (Union, UnionType):
        for option in get_args(hint):
            fits, converted = fit(value, option)
            if fits:
                return True, converted
        return False, None
    if get_origin(hint) is collections.abc.Mapping:
        fits = isinstance(value, Mapping) and all(fit(each, get_args(hint)[1])[0] for each in value.values())
        return fits, dict(value) if fits else None
    if get_origin(hint) in (tuple, collections.abc.Sequence):
        entries = [value] if isinstance(value, str) else value
        if not isinstance(entries, list | tuple):
            return False, None
        fitted = [fit(each, get_args(hint)[0]) for each in entries]
        return all(fits for fits, _ in fitted), tuple(converted for _, converted in fitted)
    if hint is Any:
        return True, value
    if hint is type(None):
        return value is None, None
    if hint is float:
        return is_number(value), float(value) if is_number(value) else None
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if hint is str:
        # `output_dir: 2024` is a folder name all the same.
        return isinstance(value, str) or is_number(value), str(value)
    return isinstance(value, hint), value


def parts_of(hint: Any) -> list[Any]:
    """The types that a type allows, nothing aside; of lists and mappings what holds the values."""
    union = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [get_origin(each) or each for each in union if each is not type(None)]


def describe(hint: Any) -> str:
    """What a type expects, in the words of an error."""
    words = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false", type(None): "nothing"}
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(describe(option) for option in get_args(hint))
    if get_origin(hint) in (tuple, collections.abc.Sequence):
        return f"a list of {describe(get_args(hint)[0])}"
    if get_origin(hint) is collections.abc.Mapping:
        return f"a mapping to {describe(get_args(hint)[1])}"
    return words.get(hint, str(hint))


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def is_weight(value: Any) -> bool:
    """Whether a value is a number or a gradient of numbers."""
    return is_number(value) or (isinstance(value, list) and len(value) > 1 and all(map(is_number, value)))


def gradient_problem(value: Any) -> str | None:
    """What is wrong with a list that is meant as a gradient of values over the layers, if anything is."""
    if not isinstance(value, list) or any(isinstance(entry, Mapping | list) for entry in value):
        return None
    if not value:
        return "an empty list is no gradient; give values from the first layer to the last"
    if len(value) == 1:
        return f"a gradient has two values or more, from the first layer to the last; write {value[0]} for one value"
    return None


def as_switch(value: Any) -> bool:
    """True or false, for which 1 and 0 may stand too.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(value, bool) or (is_number(value) and value in (0, 1)):
        return bool(value)
    raise ValueError("true or false")


def as_rank(value: Any) -> int | str:
    """A rank of at least 1, or auto.

    Raises:
        ValueError: It is neither.
    """
    if value == AUTO:
        return AUTO
    if str(value).isdigit() and not isinstance(value, bool) and int(value) > 0:
        return int(value)
    raise ValueError("a whole number above 0, or auto")


def as_size(value: Any) -> int:
    """Bytes, or a size such as 5GB.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", value.strip().upper()) if isinstance(value, str) else None
    if match is None or match[2] not in _BYTES:
        raise ValueError("bytes, or a size such as 5GB or 500MiB,")
    return int(float(match[1]) * _BYTES[match[2]])


def as_weight(value: Any) -> float | tuple[float, ...]:
    """What `is_weight` in its type."""
    return tuple(float(each) for each in value) if isinstance(value, list) else float(value)


def setting_problem(parameter: Parameter, value: Any) -> str | None:
    """What is wrong with a parameter of a merge method: a value, a gradient of values, or values with filters."""
    rules = [value] if isinstance(value, Mapping) else value
    if isinstance(rules, list) and rules and all(isinstance(rule, Mapping) for rule in rules):
        if not all(rule.keys() <= {"filter", "value"} and "value" in rule for rule in rules):
            return "pairs of `filter` and `value` are expected"
        if not all(isinstance(rule.get("filter"), str | None) for rule in rules):
            return "a filter is text"
        return next(filter(None, (setting_problem(parameter, rule["value"]) for rule in rules)), None)
    if problem := gradient_problem(value):
        return problem
    for entry in value if isinstance(value, list) else [value]:
        try:
            parameter.checked(entry)
        except RecipeError as error:
            return str(error)
    return None
