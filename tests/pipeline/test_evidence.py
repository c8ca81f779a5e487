"""The recipe in an output says what everything stood for when it was run."""

from pathlib import Path

import pytest

from hf_llfc.parents.opening import open_recipe
from hf_llfc.pipeline.evidence import resolved
from hf_llfc.recipe import Recipe, dump_recipe, load_recipe
from tests.publishing.samples import as_report, make_report
from tests.runs import byte_llama, saved

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def recipe_on(dataset: str, folder: Path) -> Recipe:
    saved(byte_llama(0), folder / "a")
    return load_recipe(
        {
            "models": [{"model": str(folder / "a")}, {"model": str(folder / "a")}],
            "diagnose": {"task": "text-generation", "dataset": dataset},
            "output_dir": str(folder / "out"),
        }
    )


@pytest.mark.parametrize(
    ("asked", "split"),
    [("ada/reviews", "validation"), ("ada/reviews", None), ("ada/other", "test"), ("rows.csv", None)],
)
def test_data_of_the_hub_are_pinned_as_they_were_read(tmp_path: Path, asked: str, split: str | None) -> None:
    recipe = recipe_on(asked, tmp_path)
    report = as_report(make_report(data={"dataset": f"ada/reviews@{COMMIT}", "split": split}))
    found = resolved(recipe, open_recipe(recipe), report)
    assert found.diagnose is not None and recipe.diagnose is not None
    if asked == "ada/reviews":
        assert (found.diagnose.data.dataset, found.diagnose.data.split) == (f"ada/reviews@{COMMIT}", split)
        assert f"dataset: ada/reviews@{COMMIT}" in dump_recipe(found)
    else:
        assert found.diagnose == recipe.diagnose
    assert resolved(recipe, open_recipe(recipe)).diagnose == recipe.diagnose
