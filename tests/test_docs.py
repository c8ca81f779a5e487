"""What the documents show is what the program reads."""

import re
from pathlib import Path

import pytest

from hf_llfc.recipe import load_recipe

ROOT = Path(__file__).parents[1]
BLOCKS = [
    (path.name, block)
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for block in re.findall(r"^```yaml\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
]


@pytest.mark.parametrize(("name", "block"), BLOCKS)
def test_recipes_in_documents_load(name, block, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(block)
    assert load_recipe(path).models


def test_links_lead_somewhere():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_readme_counts_model_types_as_their_page_does():
    readme, page = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/model_types.md"))
    counted = dict(re.findall(r"^\| ([a-z][^|]*) \| (\d+) \|$", page, re.MULTILINE))
    sentence = (
        f"Of {counted['registered']} registered model types {counted['run under 5 M parameters']} run as tiny models; "
        f"{counted['verified']} of these have a verified spec"
    )
    assert sentence in " ".join(readme.split())
    assert f"| {counted['verified, hand-written']} model types" in readme
