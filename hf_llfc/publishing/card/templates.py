"""Where the templates of cards are, and how they are filled in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llfc.errors import PublishingError

if TYPE_CHECKING:
    import jinja2

CARD_TEMPLATE = "card.md.jinja"
# What CommonMark and its tables read as markup, each of which a backslash takes literally.
_MARKUP = re.compile(r"[\\`*_{}\[\]<>#|~!&$]")
_LINKS = re.compile(r"(?i)(://)|\b(www)\.")


def template_folder() -> Path:
    """The folder of templates: inside the package in a wheel, `model_cards/` at the top of a checkout.

    Raises:
        PublishingError: Neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "model_cards", package.parent.parent / "model_cards"):
        if (folder / CARD_TEMPLATE).is_file():
            return folder
    raise PublishingError(f"the card's template {CARD_TEMPLATE} is missing from this installation; install it again")


def environment(folder: Path | None = None, **options: Any) -> jinja2.Environment:
    """What renders templates: an undefined name is an error, and the filters below are known.

    Args:
        folder: Folder of the templates; that of the cards without it.
        options: Further options of jinja2.
    """
    import jinja2

    loader = jinja2.FileSystemLoader(folder or template_folder())
    result = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options
    )
    result.filters |= {"text": plain_text, "code": code_span, "fence": fenced}
    return result


def plain_text(value: Any) -> str:
    """Any value as one line of Markdown that shows exactly its characters, whoever wrote them.

    Args:
        value: Say, a model's name out of the metadata of a stranger's card.
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    line = _MARKUP.sub(lambda match: "\\" + match.group(), line)
    # A bare address would become a link.
    return _LINKS.sub(lambda match: "\\://" if match.group(1) else f"{match.group(2)}\\.", line)


def code_span(value: Any) -> str:
    """Any value as inline code, also inside a table."""
    line = " ".join(str(value).split()).replace("|", "\\|")
    ticks = "`" * (_longest_run_of_ticks(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def fenced(value: str, language: str = "") -> str:
    """Text as a block of code that nothing inside it can end."""
    ticks = "`" * max(3, _longest_run_of_ticks(value) + 1)
    return f"{ticks}{language}\n{value.rstrip()}\n{ticks}"


def _longest_run_of_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
