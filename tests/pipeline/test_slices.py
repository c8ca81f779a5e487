"""Slices, modules and documents: the checkpoint is mergekit's, the config follows, and what cannot be is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import hf_llfc
from tests.pipeline.test_methods import TOLERANCE, by_mergekit, tensors
from tests.runs import byte_llama, saved

LAYERS = 4
NAMES = ("base", "a", "b", "c")


def shelf_in(folder: Path) -> Path:
    """Four models of four layers."""
    for seed, name in enumerate(NAMES):
        model = byte_llama(0, num_hidden_layers=LAYERS)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.add_(0.05 * noise)
        saved(model, folder / name)
    return folder


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    return shelf_in(tmp_path_factory.mktemp("slices"))


def at(shelf: Path, value):
    """A recipe with the folders of its models."""
    if isinstance(value, dict):
        return {
            key: str(shelf / each) if key in ("model", "base_model") and each in NAMES else at(shelf, each)
            for key, each in value.items()
        }
    return [at(shelf, each) for each in value] if isinstance(value, list) else value


def source(model: str, first: int, end: int, **parameters) -> dict:
    return {"model": model, "layer_range": [first, end], **({"parameters": parameters} if parameters else {})}


GRADIENTS = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]
WITHOUT_OUTPUT = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]

# Each is also a configuration of mergekit; "gradient-slerp", "44-layer", "linear" and "ties" are its own examples.
RECIPES = {
    "gradient-slerp": {
        "slices": [{"sources": [source("a", 0, 4), source("b", 0, 4)]}],
        "merge_method": "slerp",
        "base_model": "a",
        "parameters": {"t": GRADIENTS},
    },
    "44-layer": {
        "slices": [{"sources": [source("a", 0, 3)]}, {"sources": [source("b", 1, 4)]}],
        "merge_method": "passthrough",
    },
    "linear": {
        "models": [
            {"model": name, "parameters": {"weight": weight}} for name, weight in (("a", 1.0), ("b", 0.3), ("c", 0.5))
        ],
        "merge_method": "linear",
    },
    "ties": {
        "models": [
            {"model": "a", "parameters": {"density": [1, 0.7, 0.1], "weight": 1.0}},
            {"model": "b", "parameters": {"density": 0.5, "weight": [0, 0.3, 0.7, 1]}},
            {
                "model": "c",
                "parameters": {"density": 0.33, "weight": [{"filter": "mlp", "value": 0.5}, {"value": 0}]},
            },
        ],
        "merge_method": "ties",
        "base_model": "base",
        "parameters": {"normalize": True, "int8_mask": True},
    },
    "bio": {
        "models": [{"model": name, "parameters": {"density": 0.5, "weight": 0.5}} for name in ("a", "b")],
        "merge_method": "ties",
        "base_model": "base",
        "parameters": {"normalize": False, "int8_mask": True},
    },
    "scaled": {  # repeated layers that leave the residual stream as it is
        "slices": [
            {"sources": [source("a", 0, 2)]},
            {"sources": [source("a", 1, 3, scale=WITHOUT_OUTPUT)]},
            {"sources": [source("b", 2, 4)]},
        ],
        "merge_method": "passthrough",
    },
    "several": {  # layers at other places, several sources, gradients within each slice
        "slices": [
            {"sources": [source("a", 0, 2), source("b", 0, 2)]},
            {"sources": [source("a", 1, 4), source("c", 0, 3)], "parameters": {"t": [0.1, 0.9]}},
            {"sources": [source("c", 3, 4), source("a", 3, 4)]},
        ],
        "merge_method": "slerp",
        "base_model": "a",
        "parameters": {"t": [{"filter": "mlp", "value": [0.2, 0.6]}, {"filter": "norm", "value": 0.3}, {"value": 0.5}]},
    },
    "weights": {  # a weight by filter of a source's own layer, what it leaves open from the slice and the recipe
        "slices": [
            {
                "sources": [
                    source("a", 0, 2, weight=[{"filter": "layers.1.", "value": 0.9}]),
                    source("b", 1, 3, weight=[{"filter": "layers.1.", "value": 0.2}]),
                ],
                "parameters": {"weight": [{"filter": "mlp", "value": 0.7}]},
            },
            {"sources": [source("b", 2, 4), source("c", 2, 4, weight=[0.1, 0.8])]},
        ],
        "merge_method": "multislerp",
        "parameters": {"weight": 0.4},
    },
    "bases": {  # a base of its own
        "slices": [
            {"sources": [source("base", 0, 3), source("a", 0, 3), source("b", 0, 3)]},
            {"sources": [source("a", 1, 3), source("c", 2, 4)], "base_model": "c"},
        ],
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "parameters": {"weight": 0.6, "lambda": 0.5},
    },
    "module": {
        "modules": {"default": {"slices": [{"sources": [source("a", 0, 1)]}, {"sources": [source("b", 1, 4)]}]}},
        "merge_method": "passthrough",
    },
}


@pytest.fixture(scope="module")
def oracle(shelf) -> dict[str, dict[str, Tensor]]:
    pytest.importorskip("mergekit", reason="mergekit, the oracle for values, is not installed")
    configs = [{**at(shelf, recipe), "dtype": "float32"} for recipe in RECIPES.values()]
    return dict(zip(RECIPES, by_mergekit(configs, shelf / "oracle"), strict=True))


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= TOLERANCE * tensor.abs().max(), name


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_the_checkpoint_of_mergekit(name, shelf, oracle, tmp_path):
    hf_llfc.run({**at(shelf, RECIPES[name]), "output_dir": str(tmp_path / "out")})
    close(tensors(tmp_path / "out"), oracle[name])
    depth = AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers
    assert depth == 1 + max(int(each.split(".")[2]) for each in oracle[name] if "layers." in each)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
