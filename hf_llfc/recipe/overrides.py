"""`key.sub=value` on top of a recipe, as the command line has it."""

from __future__ import annotations

from typing import Any

from hf_llfc.errors import RecipeError
from hf_llfc.foundation.limited_yaml import parse_yaml


def apply_override(content: dict[str, Any], override: str) -> None:
    """Replaces one value of a recipe's plain data in place.

    Args:
        content: The recipe.
        override: `key.sub=value`; the value is YAML, list entries go by index.

    Raises:
        RecipeError: It is not of that form, or there is no such place.
    """
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
