"""Classes in another order: found by names or by answers, and brought into the order of the first model."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForImageClassification

import hf_llfc
from hf_llfc.cli import main
from hf_llfc.errors import AlignmentError, CheckpointError
from hf_llfc.evaluation import EvaluationConfig
from hf_llfc.parents.opening import open_models
from hf_llfc.pipeline.planning import plan
from hf_llfc.recipe import AlignSection, load_recipe
from tests.parents.test_what_fits import BERT, LLAMA, model
from tests.pipeline.test_mergeability import image_rows, trained, with_rows
from tests.runs import saved

NAMES = ["north", "east", "south", "west"]
ORDER = [2, 0, 3, 1]
"""Rows of the second model: its class i is the class ORDER[i] of the first."""

BACK = (1, 3, 0, 2)


def named(model: Any, names: list[str]) -> Any:
    model = copy.deepcopy(model)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """Two models of one start that know the same."""
    trunk = trained(0)
    return named(trunk, NAMES), named(trained(1, start=trunk, steps=20), NAMES)


@pytest.fixture(scope="module")
def paths(pair: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two models; the second with its classes in another order, which its config says, or not."""
    folder = tmp_path_factory.mktemp("labels")
    other = named(with_rows(pair[1], ORDER), [NAMES[index] for index in ORDER])
    models = {"a": pair[0], "b": pair[1], "other": other, "unnamed": named(other, NAMES)}
    return {name: str(saved(model, folder / name)) for name, model in models.items()}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    Dataset.from_dict({"image": list(image_rows(200, seed=1)[0])}).to_parquet(path)
    return str(path)


def merged(folder: Path) -> Any:
    return AutoModelForImageClassification.from_pretrained(folder)


def recipe_of(models: list[str], out: Path, **align: Any) -> dict[str, Any]:
    return {
        "models": [{"model": model} for model in models],
        "merge_method": "linear",
        "align": {"method": "none", **align},
        "output_dir": str(out),
    }


def data_of(samples: str) -> dict[str, Any]:
    return {"task": "image-classification", "dataset": samples, "labels": False}


@pytest.mark.parametrize("by", ["names", "match"])
def test_a_merge_is_that_of_models_in_one_order(by: str, paths: dict[str, str], samples: str, tmp_path: Path) -> None:
    align: dict[str, Any] = {"label_order": by}
    if by == "match":
        align["calibration"] = data_of(samples)
    other = paths["other" if by == "names" else "unnamed"]
    hf_llfc.run(recipe_of([paths["a"], paths["b"]], tmp_path / "straight"))
    result = hf_llfc.run(recipe_of([paths["a"], other], tmp_path / "ordered", **align))
    expected, found = merged(tmp_path / "straight"), merged(tmp_path / "ordered")
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in expected.state_dict().items())
    assert list(found.config.id2label.values()) == NAMES
    assert any("were brought into the order of" in warning for warning in result.warnings)
    card = (tmp_path / "ordered" / "README.md").read_text()
    assert "were brought into the order of" in card
    assert str(tmp_path.parent) not in card


@pytest.mark.parametrize("by", ["names", "match"])
def test_a_plan_says_what_is_done(by: str, paths: dict[str, str], samples: str, tmp_path: Path) -> None:
    align: dict[str, Any] = {"label_order": by, **({"calibration": data_of(samples)} if by == "match" else {})}
    planned = plan(load_recipe(recipe_of([paths["a"], paths["other"]], tmp_path / "out", **align)))
    told = [step["what"] for step in planned["steps"] if step["step"] == "labels"]
    assert len(told) == 1
    assert "into the order of" in told[0]


def test_other_orders_of_names_are_refused_with_the_way_out(paths: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="label_order: names"):
        hf_llfc.run(recipe_of([paths["a"], paths["other"]], tmp_path / "out"))


def test_rows_move_with_weight_matching_and_in_a_diagnosis(paths: dict[str, str], samples: str) -> None:
    data = EvaluationConfig("image-classification", samples, labels=False)
    align = {"method": "weight_matching", "label_order": "names"}
    report = hf_llfc.diagnose(paths["a"], paths["other"], data=data, align=align)
    assert report.verdict.answer == "merge"
    assert report.contradiction is None
    assert "by their names" in report.alignment["labels"][0]
    straight = hf_llfc.diagnose(paths["a"], paths["b"], data=data, align="weight_matching")
    assert report.decomposition == straight.decomposition


def test_a_model_that_is_in_order_stays_as_it_is(paths: dict[str, str], samples: str) -> None:
    for align in (
        AlignSection("none", label_order="names"),
        AlignSection("none", label_order="match", calibration=EvaluationConfig(**data_of(samples))),
    ):
        assert [each.relabelling for each in open_models([paths["a"], paths["b"]], align=align).parents] == [None, None]
        moved = open_models(
            [paths["a"], paths["b"], paths["other"]], align=AlignSection("none", label_order="names")
        ).parents
        assert [each.relabelling and each.relabelling.order for each in moved] == [None, None, BACK]


def test_the_command_takes_it(paths: dict[str, str], samples: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    words = ["--label-order", "match", "--task", "image-classification", "--dataset", samples, "--out", str(out)]
    assert main(["merge", paths["a"], paths["unnamed"], *words]) == 0
    assert list(merged(out).config.id2label.values()) == NAMES
    recipe = (out / "llfc" / "recipe.yaml").read_text()
    assert "label_order: match" in recipe
    capsys.readouterr()
    words = [*words[:-2], "--no-labels", "--format", "json"]
    assert main(["diagnose", paths["a"], paths["unnamed"], *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"]["answer"] == "merge"


def test_what_cannot_be_matched_is_refused(paths: dict[str, str], pair: Any, samples: str) -> None:
    with pytest.raises(AlignmentError, match=r"north, east.*are not those of|are not those of.*north, east"):
        open_models([named(pair[0], list("abcd")), pair[1]], align=AlignSection("none", label_order="names"))
    with pytest.raises(AlignmentError, match="needs calibration data"):
        AlignSection("none", label_order="match")
    stranger = trained(5, steps=0)
    config = EvaluationConfig(**data_of(samples))
    with pytest.raises(AlignmentError, match="in no order of its classes"):
        open_models([pair[0], stranger], align=AlignSection("none", label_order="match", calibration=config))
    texts = EvaluationConfig("text-generation", samples)
    with pytest.raises(AlignmentError, match="text-generation has no classes"):
        open_models(list(pair), align=AlignSection("none", label_order="match", calibration=texts))
    with pytest.raises(AlignmentError, match="what a model answers; `merge`"):
        hf_llfc.align_all(list(pair), label_order="names")


def test_a_base_is_brought_into_the_order_too(paths: dict[str, str], samples: str, tmp_path: Path) -> None:
    def sums(base: str, out: str, **align: Any) -> Any:
        recipe = recipe_of([paths["a"], paths["a"]], tmp_path / out, **align)
        parameters = {"weight": 0.2}
        hf_llfc.run({**recipe, "merge_method": "task_arithmetic", "base_model": base, "parameters": parameters})
        return merged(tmp_path / out).state_dict()

    expected, found = sums(paths["b"], "straight"), sums(paths["other"], "ordered", label_order="names")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    with pytest.raises(AlignmentError, match="has classes of its own"):
        sums(paths["unnamed"], "matched", label_order="match", calibration=data_of(samples))


@pytest.mark.parametrize("order", ["names", "match"])
@pytest.mark.parametrize(
    ("architecture", "config", "reason"),
    [
        ("LlamaForCausalLM", LLAMA, "it has no classes"),
        ("BertForMaskedLM", BERT, "it has no classes"),
        ("BertModel", BERT, "it has no classes"),
        ("BertForSequenceClassification", {**BERT, "num_labels": 1}, "its outputs are numbers"),
        (
            "BertForSequenceClassification",
            {**BERT, "num_labels": 3, "problem_type": "regression"},
            "outputs are numbers",
        ),
        ("LlamaForSequenceClassification", {**LLAMA, "num_labels": 1}, "its outputs are numbers"),
    ],
)
def test_models_without_classes_have_no_order_of_them(architecture, config, reason, order, tmp_path):
    for seed, name in enumerate("ab"):
        saved(model(architecture, seed, **config), tmp_path / name)
    data = {"calibration": {"task": "text-classification", "dataset": "rows.jsonl"}} if order == "match" else {}
    recipe = recipe_of([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out", label_order=order, **data)
    with pytest.raises(AlignmentError, match=reason) as error:
        plan(load_recipe(recipe))
    assert "remove `label_order`" in str(error.value) and "\n" not in str(error.value)
