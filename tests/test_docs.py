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


def test_every_family_of_the_registry_is_in_the_readme():
    from hf_llfc.adapters.registry import FAMILIES

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("| family |") :]
    for model_type in FAMILIES:
        assert re.search(rf"\b{model_type}\b", table), model_type
