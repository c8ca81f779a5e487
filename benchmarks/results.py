"""What was measured: RESULTS.md, a table of claims, and results/, pages of sections that a run of a benchmark replaces.

    python benchmarks/results.py    # writes RESULTS.md again, from claims.yaml and the sections

A page of results/ is an introduction and then sections, one after another, each between its two markers and under a
heading with its name. The pages are the only list of sections: a benchmark replaces a section that is there. A row of
RESULTS.md takes claim, number and peer from claims.yaml, command and link from the section. Each of its numbers has to
stand in that section, so the table cannot say what was not measured.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "RESULTS.md"
PAGES = (
    "correctness",
    "merging",
    "which_method",
    "matching",
    "llfc",
    "verdict",
    "many_models",
    "symmetries",
    "calibration",
)
"""The pages of results/, in the order of RESULTS.md."""

MARKER = re.compile(r"<!-- (/?)(\S+) -->")
COMMAND = re.compile(r"`((?:python|hf-llfc) [^`]+)`|^    ((?:python|hf-llfc) .+)$", re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.-])(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?(?!\.?\d)")
"""A whole number of a text: 0.3 is not found in 0.31, nor the 2 of GPT-2."""


@dataclass(frozen=True)
class Section:
    """A section of a page of results/."""

    name: str
    page: str
    """The page's name, as in `PAGES`."""
    text: str
    """What is between the markers, without the heading; empty if nothing has been measured yet."""
    lines: tuple[int, int]
    """The lines of the page that hold its opening and its closing marker, counted from 0."""

    @property
    def link(self) -> str:
        """A link from RESULTS.md."""
        return f"[`{self.name}`](results/{self.page}.md#{self.name})"

    @property
    def command(self) -> str | None:
        """The command that measured it: the first one that the section shows."""
        found = COMMAND.search(self.text)
        return (found[1] or found[2]) if found else None


@dataclass(frozen=True)
class Claim:
    """A row of the table of RESULTS.md."""

    claim: str
    number: str
    peer: str
    """What the number is compared with: another program, no alignment, a limit that was set before."""
    section: str

    def faults(self, sections: Mapping[str, Section]) -> Iterator[str]:
        """What the section does not bear out."""
        section = sections.get(self.section)
        if section is None:
            yield f"{self.claim!r}: no page has the section {self.section}"
            return
        if section.command is None:
            yield f"{self.claim!r}: section {self.section} shows no command"
        known = set(NUMBER.findall(section.text))
        for number in NUMBER.findall(f"{self.claim} {self.number} {self.peer}"):
            if number not in known:
                yield f"{self.claim!r}: {number} is not in section {self.section}"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table."""
    names = list(rows[0])
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(str(row[name]) for name in names) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def sections_of(page: str, text: str) -> list[Section]:
    """The sections of a page, in order.

    Raises:
        ValueError: The page is not an introduction and then sections, each opened once, closed once, under its own
            heading. All of that would let a run that replaces one section delete another, or text by hand.
    """
    sections: list[Section] = []
    opened: tuple[str, int] | None = None
    lines = text.splitlines()

    def fault(message: str) -> ValueError:
        return ValueError(f"results/{page}.md, line {index + 1}: {message}")

    for index, line in enumerate(lines):
        marker = MARKER.fullmatch(line)
        if marker is None and "<!--" in line:
            raise fault(f"{line!r} is no marker; a marker is a line like '<!-- name -->' or '<!-- /name -->'")
        if marker is None and opened is None and line.strip() and (sections or line.startswith("## ")):
            raise fault(f"{line!r} is in no section; put it between markers of its own")
        if marker is None and opened is not None and line.startswith("## "):
            name, start = opened
            if index != start + 1 or line != f"## {name}":
                raise fault(f"section {name} has a heading {line!r}; put that section between markers of its own")
        if marker is None:
            continue
        closes, name = marker.groups()
        if closes:
            if opened is None or opened[0] != name:
                raise fault(f"section {name} ends, but {opened[0] if opened else 'none'} is open")
            start = opened[1]
            if index > start + 1 and lines[start + 1] != f"## {name}":
                raise fault(f"section {name} does not begin with its heading '## {name}'")
            sections.append(Section(name, page, "\n".join(lines[start + 2 : index]).strip("\n"), (start, index)))
            opened = None
        elif opened is not None:
            raise fault(f"section {name} begins inside {opened[0]}")
        elif name in {section.name for section in sections}:
            raise fault(f"section {name} begins a second time")
        else:
            opened = name, index
    if opened is not None:
        raise ValueError(f"results/{page}.md: section {opened[0]} is never closed")
    return sections


def page_path(page: str, folder: Path = FOLDER) -> Path:
    """The file of a page."""
    return folder / "results" / f"{page}.md"


def read_sections(folder: Path = FOLDER) -> dict[str, Section]:
    """Name → section, over all pages.

    Raises:
        ValueError: A page is not as `sections_of` needs it, or two pages have a section of one name.
    """
    found: dict[str, Section] = {}
    for page in PAGES:
        for section in sections_of(page, page_path(page, folder).read_text(encoding="utf-8")):
            if section.name in found:
                raise ValueError(f"section {section.name} is on two pages: {found[section.name].page} and {page}")
            found[section.name] = section
    return found


def require_sections(*names: str, folder: Path = FOLDER) -> dict[str, Section]:
    """All sections, after a check that those of the names are there. Call it before a long measurement.

    Raises:
        ValueError: A section is on no page.
    """
    sections = read_sections(folder)
    missing = [name for name in names if name not in sections]
    if missing:
        lines = "".join(f"\n<!-- {name} -->\n<!-- /{name} -->" for name in missing)
        raise ValueError(f"no page of benchmarks/results has these sections; add them where they belong:{lines}")
    return sections


def table_of(name: str, folder: Path = FOLDER) -> list[dict[str, str]]:
    """The rows of the first table of a section, as they are shown; none where the section has no table."""
    text = require_sections(name, folder=folder)[name].text
    table = re.search(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    lines = table[0].splitlines() if table else []
    names, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] or [[], []]
    return [dict(zip(names, row, strict=True)) for row in rows]


def replace_section(name: str, text: str, folder: Path = FOLDER) -> None:
    """Replaces a section of results/ and writes RESULTS.md again; says which claims no longer hold.

    Raises:
        ValueError: A page is not as `sections_of` needs it, before or after the change, or has no such section.
    """
    section = require_sections(name, folder=folder)[name]
    path = page_path(section.page, folder)
    lines = path.read_text(encoding="utf-8").splitlines()
    start, end = section.lines
    lines[start + 1 : end] = [f"## {name}", "", *text.strip("\n").splitlines()]
    content = "\n".join(lines) + "\n"
    sections_of(section.page, content)
    path.write_text(content, encoding="utf-8")
    faults = write_results(folder)
    if faults:
        print("RESULTS.md stays: correct claims.yaml, then run `python benchmarks/results.py`", file=sys.stderr)
        print(*faults, sep="\n", file=sys.stderr)


def results_page(folder: Path = FOLDER) -> tuple[str, list[str]]:
    """RESULTS.md as claims.yaml and the sections make it, and what in claims.yaml no section bears out."""
    sections = read_sections(folder)
    # The base loader leaves 0.0000 the text that it is.
    written = yaml.load((folder / "claims.yaml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    claims = [Claim(**row) for row in written["claims"]]
    faults = [fault for claim in claims for fault in claim.faults(sections)]
    rows = [
        {
            "claim": claim.claim,
            "number": claim.number,
            "peer or floor": claim.peer,
            "command": f"`{sections[claim.section].command}`",
            "link": sections[claim.section].link,
        }
        for page in PAGES
        for claim in claims
        if claim.section in sections and sections[claim.section].page == page
    ]
    contents = [
        f"- [{page_path(page, folder).read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}]"
        f"(results/{page}.md): {', '.join(section.link for section in sections.values() if section.page == page)}"
        for page in PAGES
    ]
    parts = [
        "# Results",
        "<!-- `python benchmarks/results.py` writes this page from claims.yaml and the sections of results/. -->",
        written["introduction"].strip(),
        markdown(rows),
        "## All sections",
        "\n".join(contents),
    ]
    return "\n\n".join(parts) + "\n", faults


def write_results(folder: Path = FOLDER) -> list[str]:
    """Writes RESULTS.md if every claim holds; returns what does not."""
    page, faults = results_page(folder)
    if not faults:
        (folder / "RESULTS.md").write_text(page, encoding="utf-8")
    return faults


if __name__ == "__main__":
    sys.exit("\n".join(write_results()) or None)
