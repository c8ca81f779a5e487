"""One rule of weights: what is written, what is diagnosed and what the card says are the same numbers."""

import itertools

import pytest
import torch
from safetensors.torch import load_file

import hf_llfc
from hf_llfc.diagnostics.checkpoints import region_of
from hf_llfc.parents.opening import open_recipe
from hf_llfc.pipeline.weighting import plan_merge
from hf_llfc.publishing.lineage import models_of
from hf_llfc.recipe import load_recipe
from tests.runs import byte_llama, saved, text_data

GIVEN = (1.0, 3.0)
FILTERS = {
    "one number": lambda weight: weight,
    "a rule for all": lambda weight: [{"value": weight}],
    "a gradient": lambda weight: [weight, 2 * weight],
    "a filter": lambda weight: [{"filter": "mlp", "value": 2 * weight}, {"value": weight}],
}
CASES = [
    (method, normalize, scale, shape)
    for method, normalize, scale, shape in itertools.product(
        ("linear", "task_arithmetic"), (None, True, False), (None, 0.4), FILTERS
    )
    if not (method == "linear" and scale is not None)  # lambda has a meaning for task vectors only
]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("base", "a", "b")):
        saved(byte_llama(seed), folder / name)
    return folder


def recipe_of(shelf, method, normalize, scale, shape, **more):
    models = [
        {"model": str(shelf / name), "parameters": {"weight": FILTERS[shape](weight)}}
        for name, weight in zip("ab", GIVEN, strict=True)
    ]
    parameters = {"normalize": normalize, "lambda": scale}
    return {
        "models": models,
        "merge_method": method,
        **({"base_model": str(shelf / "base")} if method == "task_arithmetic" else {}),
        "parameters": {key: value for key, value in parameters.items() if value is not None},
        **more,
    }


def expected(method, normalize, scale):
    divided = method == "linear" if normalize is None else normalize
    return [(scale or 1.0) * weight / (sum(GIVEN) if divided else 1) for weight in GIVEN]


@pytest.mark.parametrize(("method", "normalize", "scale", "shape"), CASES)
def test_merge_diagnosis_and_card_have_the_same_weights(shelf, tmp_path, method, normalize, scale, shape):
    content = recipe_of(shelf, method, normalize, scale, shape, output_dir=str(tmp_path / "out"))
    recipe = load_recipe(content)
    opened = open_recipe(recipe)
    written = plan_merge(opened.moved([None, None]), recipe).weights
    weights = expected(method, normalize, scale)
    on_card = [parent.weight for parent in models_of(recipe, None) if not parent.is_base]
    if shape in ("one number", "a rule for all"):
        assert [list(row) for row in set(written.values())] == [pytest.approx(weights)]
        assert recipe.weights == pytest.approx(weights)
        assert on_card == pytest.approx(weights)
        section = load_recipe({**content, "diagnose": {"task": "text-generation", "dataset": "d"}}).diagnose
        points = region_of(recipe.weights, section, arithmetic_over_base=method == "task_arithmetic").points
        if method == "task_arithmetic":  # the base has what is left of one
            assert points[-1].weights == pytest.approx((*weights, 1 - sum(weights)))
    else:
        assert recipe.weights is None and on_card == [None, None]
        first, last = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
        divided = recipe.normalizes  # twice of everything, divided by twice the sum
        doubled = tuple(weight if divided else 2 * weight for weight in weights)
        assert written[last] == pytest.approx(doubled)
        assert written[first] == pytest.approx(weights if shape == "a gradient" else doubled)


def test_normalized_task_vectors_are_diagnosed_as_they_are_written(shelf, tmp_path):
    data = {"task": "text-generation", "dataset": str(text_data(tmp_path)), "tokenizer": "bytes", "max_length": 16}
    result = hf_llfc.run(
        recipe_of(shelf, "task_arithmetic", True, 0.4, "one number", diagnose=data, output_dir=str(tmp_path / "out"))
    )
    folders = (tmp_path / "out", *(shelf / name for name in ("base", "a", "b")))
    merged, base, a, b = (load_file(folder / "model.safetensors") for folder in folders)
    name = "model.layers.0.mlp.up_proj.weight"
    updates = torch.stack([(state[name] - base[name]).double().flatten() for state in (a, b)], dim=1)
    written = torch.linalg.lstsq(updates, (merged[name] - base[name]).double().flatten()[:, None]).solution[:, 0]
    assert written.tolist() == pytest.approx([0.1, 0.3], abs=1e-6)
    assert [model.weight for model in result.report.models] == [pytest.approx(0.1), pytest.approx(0.3), None]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "θ₀ + 0.1·(A − θ₀) + 0.3·(B − θ₀)" in card
