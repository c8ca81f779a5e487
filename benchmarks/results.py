"""RESULTS.md: tables, and sections between markers that a run replaces."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table."""
    names = list(rows[0])
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(str(each[name]) for name in names) for each in rows]
    return "\n".join(f"| {line} |" for line in lines)


def table_of(name: str) -> list[dict[str, str]]:
    """The rows of the first table of a section, as they are shown; none where there is no such section."""
    found = re.search(rf"<!-- {name} -->(.*?)<!-- /{name} -->", RESULTS.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for line in (found[1] if found else "").splitlines() if line.startswith("|")]
    names, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] or [[], []]
    return [dict(zip(names, row, strict=True)) for row in rows]


def replace_section(name: str, text: str) -> None:
    """Puts a section between its markers in RESULTS.md, at the end if it is new."""
    content = RESULTS.read_text(encoding="utf-8")
    section = f"<!-- {name} -->\n## {name}\n\n{text}\n<!-- /{name} -->"
    pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
    content = (
        pattern.sub(lambda _: section, content) if pattern.search(content) else f"{content.rstrip()}\n\n{section}\n"
    )
    RESULTS.write_text(content, encoding="utf-8")
