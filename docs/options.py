"""Writes the tables of docs/recipe.md, methods.md and mergekit.md from what they describe: `python docs/options.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from hf_llfc.cli.mergekit_options import ANSWERS
from hf_llfc.merging.methods import MERGE_METHODS, REQUIRED, Base, MergeMethod, Parameter
from hf_llfc.recipe import sections, slices
from hf_llfc.recipe.fitting import describe
from hf_llfc.recipe.options import Option, options_of

PAGE = Path(__file__).parent / "recipe.md"
METHODS_PAGE = Path(__file__).parent / "methods.md"
VALUES = {
    **dict.fromkeys(("models", "slices", "sources"), "list"),
    "layer_range": "a list of two whole numbers",
    "modules": "keys by name",
    "parameters": "keys",
    "max_shard_size": "bytes, or a size such as 5GB",
    "max_memory": "bytes, or a size such as 5GB",
    "alphas": "a whole number or a list of numbers",
    "dataset": "text",
    "weight": "a number, a gradient, or rules of filter and value",
    "tokens": "a mapping of tokens to keys",
    "ridge": "a number above 0, or `auto`",
}
"""Options whose type says too little of what may be written."""

MERGEKIT_PAGE = Path(__file__).parent / "mergekit.md"
MARKED = re.compile(r"(<!-- options: (\w+) -->\n).*?(<!-- end of options -->)", re.DOTALL)


def table(options: list[Option]) -> str:
    """A Markdown table, one row an option."""
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for each in options:
        default = "required" if each.is_required else each.default_words
        rows.append(f"| `{each.key}` | {_value(each)} | {default} | {each.help} |")
    return "\n".join(rows)


def _value(each: Option) -> str:
    if each.choices:
        return ", ".join(f"`{choice}`" for choice in each.choices)
    if each.name in VALUES:
        return VALUES[each.name]
    if each.section is not None:
        return "text, or keys" if str in get_args(each.type) else "keys"
    words = describe(each.type).removesuffix(" or nothing")
    return each.range if each.range.startswith("a ") else f"{words}, {each.range}" if each.range else words


def written(page: str) -> str:
    """The page with its tables made anew."""

    def fill(match: re.Match[str]) -> str:
        kind = {**vars(slices), **vars(sections)}[match[2]]
        spread = dict.fromkeys(("DiagnoseSection", "BatchNormSection", "CalibrateSection"), ("data",))
        spread["MergeParameters"] = ("settings",)
        options = [each for name, each in options_of(kind).items() if name not in spread.get(match[2], ())]
        return f"{match[1]}{table(options)}\n{match[3]}"

    return MARKED.sub(fill, page)


MARKED_METHODS = re.compile(r"(<!-- methods -->\n).*?(<!-- end of methods -->)", re.DOTALL)


def methods_written(page: str) -> str:
    """The page of merge methods with its sections made anew."""
    sections_of_methods = "\n".join(_method(method) for method in MERGE_METHODS.values())
    return MARKED_METHODS.sub(lambda match: f"{match[1]}\n{sections_of_methods}\n{match[2]}", page)


def _method(method: MergeMethod) -> str:
    low, high = method.inputs
    count = f"{low} model{'s' * (low > 1)}" if low == high else f"{low} or more models" if high is None else ""
    base = {Base.REQUIRED: "and a base model", Base.OPTIONAL: "and a base model if you like", Base.NONE: "and no base"}
    drawn = " Draws random numbers from the recipe's `seed`." if method.random else ""
    rows = ["", "| parameter | value | default | |", "|---|---|---|---|", *map(_parameter, method.parameters)]
    return "\n".join(
        [
            f"### {method.name}",
            "",
            f"{method.title}: {method.help} Takes {count} {base[method.base]}.{drawn} Source: {method.paper}.",
            *(rows if method.parameters else ()),
            "",
        ]
    )


def _parameter(parameter: Parameter) -> str:
    kind = {bool: "true or false", int: "whole number", float: "number"}[parameter.kind]
    bounds = [f"from {parameter.low:g}"] if parameter.low is not None else []
    bounds += [f"to {parameter.high:g}"] if parameter.high is not None else []
    value = " ".join([kind, *bounds]) + (", one a model" if parameter.per_model else "")
    default = "required" if parameter.default is REQUIRED else str(parameter.default).lower()
    return f"| `{parameter.name}` | {value} | {default} | {parameter.help} |"


MARKED_MERGEKIT = re.compile(r"(<!-- options of mergekit -->\n).*?(<!-- end of options of mergekit -->)", re.DOTALL)


def mergekit_written(page: str) -> str:
    """The page for those who come from mergekit with the table of its options made anew."""
    rows = ["| option | | here |", "|---|---|---|"]
    for flag, answer in ANSWERS.items():
        rows.append(f"| `{' '.join([flag, answer.value]).strip()}` | {answer.kind} | {answer.words} |")
    table = "\n".join(rows)
    return MARKED_MERGEKIT.sub(lambda match: f"{match[1]}{table}\n{match[2]}", page)


if __name__ == "__main__":
    MERGEKIT_PAGE.write_text(mergekit_written(MERGEKIT_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    METHODS_PAGE.write_text(methods_written(METHODS_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
