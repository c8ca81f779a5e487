"""`check` of a recipe, and the verdict of a merge that lies on no line: both are about the merge that is made."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import hf_llfc
from hf_llfc.cli import main
from hf_llfc.errors import EvaluationError, PublishingError, RecipeError
from hf_llfc.pipeline.written import JUDGED
from hf_llfc.publishing.hub.folder import check_sanity
from tests.runs import moved, saved, text_data, trained_llama

DATA = {"task": "text-generation", "tokenizer": "bytes", "max_length": 32, "batch_size": 4}


def tuned(folder, seed):
    """A child of the base, a little away from it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    saved(trained_llama(0), folder / "base")
    for seed, name in enumerate(("a", "b", "c")):
        saved(tuned(folder / "base", seed), folder / name)
    saved(trained_llama(1), folder / "stranger")
    saved(moved(trained_llama(0), 3), folder / "moved")
    text_data(folder)
    return folder


def recipe_of(shelf, *names, **keys):
    models = [{"model": str(shelf / name)} for name in names]
    return {"models": models, "output_dir": str(shelf / "never"), **keys}


def over_base(shelf, method="task_arithmetic", scale=1.0, **keys):
    parameters = {"lambda": scale, "weight": 0.5}
    return recipe_of(
        shelf, "a", "b", merge_method=method, base_model=str(shelf / "base"), parameters=parameters, **keys
    )


def data_of(shelf):
    return {**DATA, "dataset": str(shelf / "text.txt")}


@pytest.mark.parametrize(
    ("method", "scale", "answer"),
    [
        ("task_arithmetic", 1.0, "merge"),
        ("ties", 1.0, "merge"),
        ("task_arithmetic", 300.0, "do not merge"),
        ("ties", 300.0, "do not merge"),
    ],
)
def test_the_answer_is_about_the_merge_that_is_made(shelf, method, scale, answer):
    found = hf_llfc.check(over_base(shelf, method, scale), data=data_of(shelf))
    assert (found.answer, found.level, bool(found)) == (answer, 2, answer == "merge")
    assert found.outputs.weights == (0.5, 0.5) and all(each.holds for each in found.criteria) == bool(found)
    *_, merge = found.changes.values()
    assert list(found.changes)[-1] == "the merge"
    assert merge > 1 if scale > 1 else merge < 0.02
    assert not (shelf / "never").exists()


def test_three_models_are_asked_together(shelf):
    found = hf_llfc.check(recipe_of(shelf, "a", "b", "c"), data=data_of(shelf))
    assert found.answer == "merge" and found.outputs.weights == pytest.approx((1 / 3,) * 3)
    assert found.layers[-1].layer == "logits" and found.changes == {}


def test_models_that_the_recipe_aligns_are_compared_where_they_are_then(shelf):
    pair = recipe_of(shelf, "base", "moved")
    assert hf_llfc.check(pair, data=data_of(shelf)).answer == "align"
    found = hf_llfc.check({**pair, "align": {"method": "weight_matching"}}, data=data_of(shelf))
    assert (found.answer, found.aligned) == ("merge", True)


def test_the_data_of_the_diagnosis_are_taken(shelf):
    recipe = over_base(shelf, diagnose={**data_of(shelf), "alphas": 3})
    assert hf_llfc.check(recipe).level == 2
    assert hf_llfc.check(recipe, level=1).level == 1


def test_levels_without_data(shelf):
    near = hf_llfc.check(over_base(shelf))
    assert (near.answer, near.level) == ("undecided", 1) and near.task_vectors["pairs"]
    far = hf_llfc.check(recipe_of(shelf, "base", "stranger"))
    assert far.answer == "do not merge" and "far apart" in far.because
    assert hf_llfc.check(over_base(shelf), level=0).answer == "undecided"
    with pytest.raises(EvaluationError, match="level 2 runs the models: give task and dataset"):
        hf_llfc.check(over_base(shelf), level=2)


def test_what_has_no_parents_of_its_depth_is_refused(shelf):
    part = {"sources": [{"model": str(shelf / "a"), "layer_range": [0, 1]}]}
    stack = {"slices": [part, part, part], "merge_method": "passthrough", "output_dir": str(shelf / "never")}
    with pytest.raises(RecipeError, match="layers from several places"):
        hf_llfc.check(stack, data=data_of(shelf))


def test_the_command_takes_a_recipe(shelf, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(over_base(shelf, "ties", 300.0)), encoding="utf-8")
    words = [f"--{name.replace('_', '-')}={value}" for name, value in data_of(shelf).items()]
    assert main(["check", str(file), *words, "--format", "json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["answer"] == "do not merge" and told["changes"]["the merge"] > 1
    assert main(["check", str(file)]) == 1
    assert "how far the models and the merge" not in capsys.readouterr().out
    assert main(["check", str(shelf / "a")]) == 2


def test_the_verdict_of_a_run_is_that_of_the_merge_it_made(shelf, tmp_path):
    diagnose = {**data_of(shelf), "alphas": 3}
    broken = hf_llfc.run({**over_base(shelf, "ties", 300.0, diagnose=diagnose), "output_dir": str(tmp_path / "broken")})
    assert broken.report.verdict.answer == "do not merge" and JUDGED in broken.report.verdict.because
    assert broken.report.data["judged"] == JUDGED and broken.report.barrier.loss < 0.1
    with pytest.raises(PublishingError, match="should not be published"):
        check_sanity(broken.folder)
    sound = hf_llfc.run({**over_base(shelf, "ties", diagnose=diagnose), "output_dir": str(tmp_path / "sound")})
    assert sound.report.verdict.answer == "merge" and sound.report.outputs.merged_divergence < 0.01


def test_sums_of_related_models_are_not_to_be_aligned(shelf):
    """Their base lies farther away than they do from each other; what breaks the merge is the size of its weights."""
    recipe = over_base(shelf, "task_arithmetic", 300.0)
    found = hf_llfc.check({**recipe, "base_model": str(shelf / "stranger")}, data=data_of(shelf))
    assert found.answer == "do not merge" and "smaller weights" in found.because and "at α" not in found.because


def test_one_sample_gives_no_range(shelf):
    found = hf_llfc.check(recipe_of(shelf, "a", "b"), data={**data_of(shelf), "samples": 1})
    assert found.outputs.loss_barrier_range is None and "in 95 of 100" not in found.because


def test_a_model_alone_is_no_recipe(shelf):
    with pytest.raises(RecipeError, match="give a second model"):
        hf_llfc.check(shelf / "a")
