"""Writes the tables of options in docs/recipe.md from the fields they describe: `python docs/options.py`."""

from __future__ import annotations

import re
from pathlib import Path

from hf_llfc.recipe import sections
from hf_llfc.recipe.fitting import describe
from hf_llfc.recipe.options import Option, options_of

PAGE = Path(__file__).parent / "recipe.md"
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
    if each.section is not None:
        return "keys" if each.name != "models" else "list"
    if each.name in ("max_shard_size", "max_memory"):
        return "bytes, or a size such as 5GB"
    if each.name == "alphas":
        return "a whole number or a list of numbers"
    if each.name == "dataset":
        return "text"
    words = describe(each.type).removesuffix(" or nothing")
    return each.range if each.range.startswith("a ") else f"{words}, {each.range}" if each.range else words


def written(page: str) -> str:
    """The page with its tables made anew."""

    def fill(match: re.Match[str]) -> str:
        kind = vars(sections)[match[2]]
        spread = {"DiagnoseSection": ("data",), "BatchNormSection": ("data",), "MergeParameters": ("settings",)}
        options = [each for name, each in options_of(kind).items() if name not in spread.get(match[2], ())]
        return f"{match[1]}{table(options)}\n{match[3]}"

    return MARKED.sub(fill, page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
