"""Slices, modules and documents as they are read: every problem at once, with the path that the user wrote."""

from pathlib import Path

import pytest
import yaml

from hf_llfc.errors import RecipeError
from hf_llfc.recipe import dump_recipe, load_recipe
from hf_llfc.recipe.slices import layered


def source(model: str, first: int = 0, end: int = 2, **parameters) -> dict:
    return {"model": model, "layer_range": [first, end], **({"parameters": parameters} if parameters else {})}


def problems_of(recipe: dict) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"output_dir": "out", **recipe})
    return str(caught.value)


def stack(*slices: list[dict], **more) -> dict:
    return {"slices": [{"sources": each} for each in slices], "merge_method": "passthrough", "output_dir": "o", **more}


def test_all_problems_are_told_at_once():
    message = problems_of(
        {
            "slices": [
                {"sources": [source("a", 0, 3), source("b", 0, 2)]},
                {"sources": [source("a", 1, 1)], "parametrs": {}},
                {"sources": [{"modle": "a", "layer_range": 3}]},
                {"sources": []},
                {"sourcs": [source("a")]},
                {"sources": [source("a")], "merge_method": "slurp"},
                "a",
            ],
            "layer_range": [0, 3],
        }
    )
    for expected in (
        "slices[0].sources[1].layer_range: has 2 layers, and sources[0] has 3",
        "slices[1].sources[0].layer_range: a range of at least one layer, the first and the one after the last, such",
        "slices[1].parametrs: unknown key; did you mean 'parameters'?",
        "slices[2].sources[0].modle: unknown key; did you mean 'model'?",
        "slices[2].sources[0].model: missing",
        "slices[2].sources[0].layer_range: a range of at least one layer",
        "slices[3].sources: a list of at least one source is expected, found []",
        "slices[4].sourcs: unknown key; did you mean 'sources'?",
        "slices[5].merge_method: unknown 'slurp'; did you mean 'slerp'?",
        "slices[6]: `sources: …` is expected, found 'a'",
        "layer_range: has no meaning beside sources",
    ):
        assert expected in message


TWO = [[source("a")], [source("b", 1, 3)]]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"models": [{"model": "a"}], "slices": []}, "slices: stands beside `models`; a recipe has one of them"),
        ({"slices": []}, "slices: a list of at least one `- sources: …` is expected, found []"),
        ({"modules": {}}, "modules: a mapping from the names of modules is expected"),
        ({"modules": {"x": {"models": [], "slices": []}}}, "modules.x: has both of `slices` and `models`"),
        ({"modules": {"x": {"model": []}}}, "modules.x.model: unknown key; did you mean 'models'?"),
        (
            {"modules": {"x": {"models": [{"model": "a", "parameters": {"wait": 1}}]}}},
            "modules.x.models[0].parameters.wait: unknown key",
        ),
        (stack([source("a")], [source("b", 1, 3, scal=1)]), "slices[1].sources[0].parameters.scal: unknown key"),
        (stack([source("a", scal=1)]), "slices[0].sources[0].parameters.scal: unknown key; did you mean 'scale'?"),
        (stack(*TWO, parameters={"scle": 1}), "parameters.scle: unknown key; did you mean 'scale'?"),
        (stack([source("a"), source("b")], [source("a")]), "slices[0].sources: passthrough takes 1 models"),
        (stack(*TWO, merge_method="slerp", parameters={"t": 1}), "slices[0].base_model: slerp needs one"),
        (
            stack([source("a"), source("b")], [source("a"), source("b")], merge_method="slerp", base_model="a"),
            "slices[0].parameters.t: missing, and slerp has no default for it",
        ),
        (
            stack(
                [source("a"), source("b", 1, 3)], [source("a")], merge_method="task_arithmetic", base_model="c",
                parameters={"weight": 1},
            ),
            "slices[0].base_model: c is not among the sources, whose layers differ; list it there",
        ),
        (stack(*TWO, merge_method="fisher"), "importance: missing, and fisher needs it; give task and dataset"),
        (
            stack(*TWO, importance={"task": "text-generation", "dataset": "texts"}),
            "importance: has no meaning here; no part is merged by fisher or feedback, which measure it",
        ),
        (
            stack(
                [source("a"), source("b")], [source("b"), source("a")], merge_method="fisher",
                importance={"task": "text-generation", "dataset": "texts"}, align={"method": "weight_matching"},
            ),
            "align: importance is measured in the models of these slices as they are, not aligned; remove it",
        ),
        (stack([source("a", scale=[0.5])], [source("b")]), "slices[0].sources[0].parameters.scale: a gradient has two"),
        (stack(*TWO, parameters={"scale": {"filter": "mlp", "value": [1]}}), "parameters.scale: a gradient has two"),
        (stack(*TWO, align={"method": "weight_matching"}), "align: every slice has one source, so there is nothing"),
        (
            stack([source("a"), source("b")], [source("c")], merge_method="linear", align={"reference": "a"}),
            "align.reference: of slices, the sources at one place are one model",
        ),
        (stack(*TWO, keep_where_broken={"model": 0}), "keep_where_broken: has a meaning for a linear merge of whole"),
    ],
)  # fmt: skip
def test_a_problem_has_its_path(recipe, expected):
    assert expected in problems_of(recipe)


def test_parameters_are_looked_up_from_the_inside_out():
    rules = [{"filter": "mlp", "value": 1}]
    assert layered({"t": 1}, {"t": 2, "u": 3}) == {"t": 1, "u": 3}
    assert layered({"t": rules}, {"t": [0, 1]}, {"t": 7}) == {"t": [*rules, {"value": [0, 1]}]}
    assert layered({"t": rules[0]}, {"t": {"filter": "*", "value": 2}}) == {"t": [*rules, {"filter": "*", "value": 2}]}


def test_a_recipe_is_the_same_when_written_and_read():
    recipe = load_recipe(
        {
            "modules": {
                "text_decoder": {
                    "slices": [
                        {"sources": [source("a", weight=[1, 0.5]), source("b", 1, 3, weight=0.5)]},
                        {
                            "sources": [source("c"), source("a")],
                            "merge_method": "slerp",
                            "base_model": "c",
                            "parameters": {"t": [{"filter": "mlp", "value": 0.3}]},
                        },
                    ],
                    "parameters": {"normalize": False},
                },
                "vision_tower": {"models": [{"model": "a"}, {"model": "c"}]},
            },
            "parameters": {"t": 0.5},
            "align": {"method": "weight_matching"},
            "output_dir": "out",
        }
    )
    assert [each.path for each in recipe.parts] == [
        "modules.text_decoder.slices[0]",
        "modules.text_decoder.slices[1]",
        "modules.vision_tower",
    ]
    assert [entry.model for entry in recipe.models] == ["a", "b", "c"]
    assert recipe.parts[1].recipe.parameters.settings == {"t": [{"filter": "mlp", "value": 0.3}, {"value": 0.5}]}
    assert (recipe.parts[1].ranges, recipe.parts[1].base_range, recipe.columns) == (((0, 2),), (0, 2), 2)
    assert load_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_a_whole_slice_is_a_recipe_of_models():
    slices = [{"sources": [source("a", 0, 8), source("b", 0, 8)], "parameters": {"t": 0.2}, "base_model": "a"}]
    recipe = load_recipe({"slices": slices, "merge_method": "slerp", "output_dir": "o"})
    models = [{"model": "a"}, {"model": "b"}]
    same = {"models": models, "merge_method": "slerp", "base_model": "a", "parameters": {"t": 0.2}, "output_dir": "o"}
    assert recipe == load_recipe({**same, "layer_range": [0, 8]}) and not recipe.parts
    assert load_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def file_of(folder: Path, *documents: dict) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump_all(documents) + "---\n")
    return path


FIRST = {"name": "first", "models": [{"model": "a"}, {"model": "b"}]}
SECOND = {"name": "second", "models": [{"model": "first+lora"}, {"model": "c"}], "base_model": None}


def test_documents_are_read_in_the_order_in_which_they_are_made(tmp_path):
    last = {"models": [{"model": "second"}, {"model": "first"}], "output_dir": "out", "device": "cpu"}
    file = file_of(tmp_path, SECOND, last, FIRST)
    recipe = load_recipe(file, ["seed=3", "first.seed=5"])
    assert [each.document for each in recipe.earlier] == ["first", "second"]
    assert [entry.model for entry in recipe.models] == ["out-documents/second", "out-documents/first"]
    assert recipe.earlier[1].models[0].model == "out-documents/first+lora"
    assert [each.seed for each in (*recipe.earlier, recipe)] == [5, 0, 3]
    assert {each.device for each in recipe.earlier} == {"cpu"}
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        (
            [FIRST, {"models": [{"model": "frist"}]}],
            "the last document: there is no document 'frist'; did you mean",
        ),
        ([{**FIRST, "models": [{"model": "first"}]}, SECOND], "document first: refers to itself"),
        ([{**FIRST, "base_model": "second"}, SECOND, {"models": []}], "refer to each other in a circle"),
        ([FIRST, FIRST, {"models": []}], "document 2.name: 'first' is the name of document 1 as well"),
        ([{"models": []}, {"models": []}], "document 1: has no name, so nothing can be made of it"),
        ([{**FIRST, "name": "a/b"}, {"models": []}], "document 1.name: a word that may be the name of a folder"),
        ([FIRST, 3], "document 2: a recipe is a mapping of keys, found 3"),
        (
            [{**FIRST, "modls": 1}, {"models": [{"model": "first"}], "output_dir": "o"}],
            "document first: modls: unknown",
        ),
    ],
)
def test_documents_that_cannot_be_made_are_refused(documents, expected, tmp_path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(file_of(tmp_path, *documents))
    assert expected in str(caught.value)
