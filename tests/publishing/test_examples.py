"""The cards in model_cards/examples are what their runs found, whole, small, and fit to be looked at."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_llfc.publishing import write_card
from hf_llfc.publishing.card.templates import template_folder
from hf_llfc.recipe import load_recipe
from tests.hub_double import validate_card
from tests.publishing.card_page import write_card_page

EXAMPLES = sorted((template_folder() / "examples").iterdir())
LARGEST = 300_000

by_name = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)


def test_there_are_verdicts_of_every_kind() -> None:
    openings = [next(line for line in card_of(example).splitlines() if line.startswith("> ")) for example in EXAMPLES]
    leads = {re.match(r"> \*\*(.*?)\*\*", opening).group(1) for opening in openings}  # type: ignore[union-attr]
    assert {
        "Verdict: merge.",
        "Verdict on an average of the parents: merge.",
        "Warning. The merge is far worse than its parents.",
    } <= leads


def card_of(example: Path) -> str:
    return (example / "README.md").read_text(encoding="utf-8")


@by_name
def test_a_card_is_what_its_evidence_gives(example: Path, tmp_path: Path) -> None:
    """`python benchmarks/example_cards.py --render` writes them again, and then read what changed."""
    copy = tmp_path / example.name
    shutil.copytree(example, copy)
    pictures = {path.name for path in (example / "llfc").glob("*.png")}
    write_card(copy)
    assert (copy / "README.md").read_text(encoding="utf-8") == card_of(example)
    assert {path.name for path in (copy / "llfc").glob("*.png")} == pictures
    assert (copy / "llfc" / "report.html").read_text(encoding="utf-8") == (example / "llfc" / "report.html").read_text(
        encoding="utf-8"
    )


@by_name
def test_an_example_is_whole_small_and_tells_nothing_of_a_disk(example: Path) -> None:
    card = card_of(example)
    assert validate_card(card) == ([], [])
    for picture in re.findall(r"!\[[^\]]*\]\((.*?)\)", card):
        assert (example / picture).is_file(), picture
    files = [path for path in example.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LARGEST
    for path in files:
        if path.suffix != ".png":
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w.:/-])/(root|home|tmp|work|Users)/", text), path
    recipe = load_recipe(example / "llfc" / "recipe.yaml")
    assert recipe.diagnose is not None
    assert ModelCard(card).data.eval_results[0].dataset_args["samples"] == recipe.diagnose.data.samples
    assert yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)[0]) == recipe.to_dict()


@by_name
def test_the_numbers_of_the_card_are_those_of_the_run(example: Path) -> None:
    run = json.loads((example / "llfc" / "run.json").read_text(encoding="utf-8"))
    card = card_of(example)
    for row in run["results"]:
        assert f"{row['loss']:.4f}" in card
    measured = {result.metric_type: result.metric_value for result in ModelCard(card).data.eval_results}
    merged = run["results"][-1]
    assert merged["is_merge"]
    assert measured["loss"] == pytest.approx(merged["loss"], rel=1e-5)
    assert run["hardware"] in card.replace("\\_", "_")


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1000])
@by_name
def test_a_card_fits_the_page_and_shows_its_pictures(
    browse: Any, example: Path, tmp_path: Path, dark: bool, width: int
) -> None:
    page = browse(write_card_page(example, tmp_path / "card.html").as_uri(), dark=dark, width=width, script=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    shown = page.evaluate("[...document.images].map(each => [each.naturalWidth, each.clientWidth])")
    assert len(shown) >= 3
    assert all(natural == 1600 and 300 <= drawn <= width for natural, drawn in shown)
    assert page.locator("blockquote").first.bounding_box()["y"] < 250
