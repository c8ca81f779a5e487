"""The pages of results: markers, the table of claims, what benchmarks write, and every link that leads to them."""

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import lockstep, real_input, weights
from benchmarks.results import (
    FOLDER,
    NUMBER,
    PAGES,
    page_path,
    read_sections,
    replace_section,
    require_sections,
    results_page,
    sections_of,
    table_of,
)
from hf_llfc.cli.arguments import parse

ROOT = FOLDER.parent
SECTIONS = read_sections()
SCRIPTS = sorted(FOLDER.glob("*.py"))
PAGE = """# A page

What it says.

<!-- first -->
## first

`python benchmarks/first.py`

| one | other |
| --- | --- |
| 0.31 | 2 |
<!-- /first -->

<!-- second -->
## second

One.
<!-- /second -->
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of everything that a benchmark may write."""
    shutil.copytree(FOLDER / "results", tmp_path / "results")
    for name in ("claims.yaml", "RESULTS.md"):
        shutil.copy(FOLDER / name, tmp_path)
    return tmp_path


def texts(folder: Path) -> dict[str, str]:
    """The text of every section."""
    return {name: section.text for name, section in read_sections(folder).items()}


def test_the_table_is_what_claims_and_sections_make():
    page, faults = results_page()
    assert faults == []
    assert (FOLDER / "RESULTS.md").read_text(encoding="utf-8") == page, "run `python benchmarks/results.py`"


def test_every_section_holds_a_result():
    assert {section.page for section in SECTIONS.values()} == set(PAGES)
    assert [name for name, section in SECTIONS.items() if not section.text] == []
    assert {path.stem for path in (FOLDER / "results").iterdir()} == set(PAGES)


@pytest.mark.parametrize("name", [name for name, section in SECTIONS.items() if section.command])
def test_the_command_of_a_section_is_one_that_its_program_takes(name):
    program, *words = (SECTIONS[name].command or "").split()
    if program == "hf-llfc":
        assert parse(words).command == words[0]
        return
    source = (ROOT / words[0]).read_text(encoding="utf-8")
    assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == []


def test_a_page_is_read_section_by_section():
    first, second = sections_of("page", PAGE)
    assert (first.name, first.command, first.link) == (
        "first",
        "python benchmarks/first.py",
        "[`first`](results/page.md#first)",
    )
    assert second.text == "One." and second.command is None
    assert [PAGE.splitlines()[line] for line in second.lines] == ["<!-- second -->", "<!-- /second -->"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # As `zoo` once stood behind the marker of `minilm_planted`, which deleted it when it was written again.
        ("## second", "## other\n\nTwo.\n\n## second", "line 16: section second has a heading '## other'"),
        ("One.", "One.\n\n## other\n\nTwo.", "line 20: section second has a heading '## other'"),
        ("## second\n", "", "section second does not begin with its heading"),
        ("## second\n", "\n## second\n", "section second has a heading '## second'"),
        ("<!-- /first -->\n", "", "section second begins inside first"),
        ("<!-- /second -->\n", "", "section second is never closed"),
        ("<!-- second -->\n", "", "'## second' is in no section"),
        ("<!-- /second -->", "<!-- /first -->", "section first ends, but second is open"),
        ("<!-- second -->", "<!-- /second -->\n<!-- second -->", "section second ends, but none is open"),
        ("second", "first", "section first begins a second time"),
        ("<!-- second -->", "Text by hand.\n\n<!-- second -->", "'Text by hand.' is in no section"),
        ("What it says.", "## What it says", "'## What it says' is in no section"),
        ("<!-- second -->", " <!-- second -->", "is no marker"),
        ("<!-- second -->", "<!--second-->", "is no marker"),
    ],
)
def test_a_page_with_a_fault_is_rejected(old, new, message):
    assert old in PAGE
    with pytest.raises(ValueError, match=re.escape(message)):
        sections_of("page", PAGE.replace(old, new))


def test_a_section_on_two_pages_is_rejected(folder):
    for page in ("llfc", "verdict"):
        with page_path(page, folder).open("a", encoding="utf-8") as file:
            file.write("\n<!-- new -->\n<!-- /new -->\n")
    with pytest.raises(ValueError, match="section new is on two pages: llfc and verdict"):
        read_sections(folder)


def test_writing_a_section_again_with_the_same_text_changes_no_file(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    for name, section in SECTIONS.items():
        replace_section(name, section.text, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


@pytest.mark.parametrize("name", SECTIONS)
def test_writing_a_section_leaves_all_others(folder, name):
    replace_section(name, "Measured again.", folder)
    assert texts(folder) == {**texts(FOLDER), name: "Measured again."}


@pytest.mark.parametrize("text", ["One.\n\n## zoo\n\nTwo.", "One.\n<!-- /minilm_planted -->\nTwo."])
def test_a_text_that_would_break_its_page_is_not_written(folder, text):
    with pytest.raises(ValueError, match=r"results/correctness\.md"):
        replace_section("minilm_planted", text, folder)
    assert texts(folder) == texts(FOLDER)


def test_a_new_section_is_added_by_its_markers(folder):
    with pytest.raises(ValueError, match="<!-- new -->\n<!-- /new -->"):
        replace_section("new", "Measured.", folder)
    with page_path("llfc", folder).open("a", encoding="utf-8") as file:
        file.write("\n<!-- new -->\n<!-- /new -->\n")
    replace_section("new", "Measured.", folder)
    assert texts(folder) == {**texts(FOLDER), "new": "Measured."}
    assert "[`new`](results/llfc.md#new)" in (folder / "RESULTS.md").read_text(encoding="utf-8")


def test_a_claim_that_its_section_no_longer_bears_out_is_named(folder, capsys):
    before = (folder / "RESULTS.md").read_text(encoding="utf-8")
    replace_section("merge_speed", SECTIONS["merge_speed"].text.replace("0.24", "0.241"), folder)
    assert "0.24 is not in section merge_speed" in capsys.readouterr().err
    assert (folder / "RESULTS.md").read_text(encoding="utf-8") == before
    claims = (folder / "claims.yaml").read_text(encoding="utf-8")
    (folder / "claims.yaml").write_text(claims.replace("number: 0.24\n", "number: 0.241\n", 1), encoding="utf-8")
    replace_section("merge_speed", SECTIONS["merge_speed"].text.replace("0.24", "0.241"), folder)
    assert "| 0.241 | mergekit 6.70 |" in (folder / "RESULTS.md").read_text(encoding="utf-8")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("| 0.31 | 94.7% |", ["0.31", "94.7"]),
        ("GPT-2 leaves .10, vit-128 (.28).", [".10", ".28"]),
        ("0.1B to 3.0B: 5.4e-16, 1.79 ± 0.13", ["0.1", "3.0", "5.4e-16", "1.79", "0.13"]),
        ("10¹² at 0.0036–0.047, 2.5.", ["10", "0.0036", "0.047", "2.5"]),
        ("version 0.1.5", []),
    ],
)
def test_numbers_are_whole(text, numbers):
    assert NUMBER.findall(text) == numbers


def test_the_first_table_of_a_section_is_read():
    rows = table_of("assignment")
    assert len(rows) == 18 and rows[0]["kind"] == "planted" and rows[0]["n"] == "768"
    assert len(table_of("minilm_sentiment_four")) == 5  # the section has three tables


def written_by(script: Path) -> tuple[set[str], bool]:
    """The sections whose names a script writes out, and whether it computes names of others."""
    calls = [
        node
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "replace_section"
    ]
    names = {call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)}
    return names, len(names) < len(calls)


def test_every_section_that_a_benchmark_writes_exists():
    written = {name for script in SCRIPTS for name in written_by(script)[0]}
    assert {"verdict", "merge_speed", "merge_sizes"} <= written
    require_sections(
        *written, *real_input.SECTIONS, *weights.SECTIONS, *(f"lockstep_{pair}" for pair in lockstep.PAIRS)
    )


@pytest.mark.parametrize("script", [path for path in SCRIPTS if written_by(path)[1]], ids=lambda path: path.name)
def test_a_benchmark_that_computes_names_checks_them_before_it_measures(script):
    assert "    require_sections(" in script.read_text(encoding="utf-8")


PAGES_WITH_LINKS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(FOLDER.rglob("*.md")),
    *sorted((ROOT / "model_cards").rglob("README.md")),
]
TEXTS = [
    *PAGES_WITH_LINKS,
    *sorted((ROOT / "recipes").glob("*.yaml")),
    *SCRIPTS,
    *sorted((ROOT / "hf_llfc").rglob("*.py")),
    *sorted((ROOT / "model_cards").rglob("*.jinja")),
]


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site name them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def links_of(path: Path) -> Iterator[tuple[Path, str]]:
    """The files that a page links to, each with the anchor in it or nothing."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        yield (path.parent / file).resolve() if file else path, anchor


@pytest.mark.parametrize("path", PAGES_WITH_LINKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_to_a_section_leads_to_it(path):
    of_results = [(file, anchor) for file, anchor in links_of(path) if FOLDER in (file.parent, file.parent.parent)]
    missing = [
        (file.name, anchor)
        for file, anchor in of_results
        if not file.exists() or (anchor and anchor not in anchors(file))
    ]
    assert missing == []


def test_the_table_links_to_every_section():
    linked = {(file.stem, anchor) for file, anchor in links_of(FOLDER / "RESULTS.md") if anchor}
    assert linked == {(section.page, name) for name, section in SECTIONS.items()}


def test_sections_that_texts_name_exist():
    """Names of files with an anchor, as in the headers of recipes, and names after the word section in backticks."""
    seen = set()
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        for page, name in re.findall(r"benchmarks/results/(\w+)\.md(?:#([\w-]+))?", text):
            assert page_path(page).exists() and (not name or SECTIONS[name].page == page), f"{path}: {page}#{name}"
            seen.add(path.parent.name)
        if path.parent == FOLDER / "results":
            for names in re.findall(r"[Ss]ections?((?:[ \n](?:and )?\[?`[\w-]+`(?:\]\(\S+\))?,?)+)", text):
                require_sections(*re.findall(r"`([\w-]+)`", names))
                seen.add("results")
    assert {"recipes", "docs", "results"} <= seen


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_names_the_section_of_its_numbers(path):
    (numbers,) = re.findall(r"^# numbers +(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert re.fullmatch(r"benchmarks/results/\w+\.md#[\w-]+|not measured: .+", numbers)
