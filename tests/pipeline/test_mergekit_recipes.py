"""Recipes as people copy them from each other: what mergekit makes of them, to a rounding of float32."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

import hf_llfc
from tests.pipeline.test_methods import TOLERANCE, by_mergekit, tensors
from tests.vocabularies import save, trained

NAMES = "abc"
FILTERS = [{"filter": "self_attn", "value": [0.2, 0.9]}, {"filter": "*", "value": 0.4}]


def entries(names: str, **parameters: object) -> list[dict]:
    return [{"model": name, **({"parameters": parameters} if parameters else {})} for name in names]


# Models are named by their folders here, and by whole paths when they are run.
RECIPES: dict[str, dict] = {
    "int8_mask": {"models": entries("ab", weight=0.4), "parameters": {"int8_mask": True}, "int8_mask": True},
    "numbers for switches": {"models": entries("ab", weight=0.4), "parameters": {"normalize": 0.0}},
    "weight for all": {"models": entries("ab"), "parameters": {"weight": [0.2, 0.9]}},
    "own rules, then those for all": {
        "models": [
            {"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": 0.9}]}},
            {"model": "b", "parameters": {"weight": 0.1}},
        ],
        "parameters": {"weight": FILTERS},
    },
    "filters and gradients everywhere": {
        "merge_method": "breadcrumbs",
        "base_model": "c",
        "models": entries("ab", weight=FILTERS, density=[0.6, 0.9], gamma=[{"filter": "mlp", "value": 0.1}]),
        "parameters": {"lambda": [{"filter": "o_proj", "value": 0.3}], "normalize": [True, False], "gamma": 0.02},
    },
    "lambda by layer": {
        "merge_method": "task_arithmetic",
        "base_model": "c",
        "models": entries("ab", weight=0.5),
        "parameters": {"lambda": [0.1, 1.0], "normalize": FILTERS[:1] and [{"filter": "mlp", "value": True}]},
    },
    "normalize by layer": {"models": entries("ab", weight=0.3), "parameters": {"normalize": [False, True]}},
    "base with parameters among the models": {
        "merge_method": "task_arithmetic",
        "base_model": "a",
        "models": entries("abc", weight=0.5, density=0.5),
        "parameters": {"normalize": True, "int8_mask": True, "density": 0.3},
    },
    "base of a slerp among the models": {
        "merge_method": "slerp",
        "base_model": "b",
        "models": entries("ba"),
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"value": 0.5}]},
    },
    "linear with a base": {"base_model": "b", "models": entries("ab", weight=0.3)},
    "linear with a base beside": {"base_model": "c", "models": entries("ab"), "parameters": {"weight": 0.3}},
    "karcher with a base": {"merge_method": "karcher", "base_model": "b", "models": entries("ab")},
    "models as mappings": {
        "merge_method": "ties",
        "base_model": {"model": {"path": "c"}},
        "models": [{"model": {"model": {"path": name}}, "parameters": {"weight": 0.5}} for name in "ab"],
        "dtype": "torch.float32",
    },
    "another class": {
        "base_model": {"model": "strange", "override_architecture": "LlamaForCausalLM"},
        "models": [
            {
                "model": {"model": {"path": "strange"}, "override_architecture": "LlamaForCausalLM"},
                "parameters": {"weight": 0.7},
            },
            *entries("a", weight=0.3),
        ],
    },
}

ZERO, RULE = {"kind": "zero"}, "tokenizer"
VOCABULARIES: dict[str, dict] = {
    "tokens of the base": {
        "merge_method": "task_arithmetic",
        "base_model": "c",
        "models": entries("ab", weight=0.5),
        "tokenizer_source": "base",
    },
    "tokens of a model": {"models": entries("ab", weight=0.5), "tokenizer_source": "b"},
    "tokens united over a base that is a model": {
        "base_model": "b",
        "models": entries("abc", weight=[0.2, 0.8]),
        "tokenizer": {"source": "union"},
    },
    "rules of tokens": {
        "models": entries("abc", weight=0.4),
        "base_model": "a",
        RULE: {
            "source": "union",
            "tokens": {
                "<one>": {"source": {"kind": "model_token", "model": "b", "token_id": 7}},
                "<two>": {"source": {"kind": "model_token", "model": "a", "token": "</s>"}, "force": True},
                "<three>": {"source": "c", "force": True},
                "e": {"source": ZERO, "force": True},
                "<new>": {"source": ZERO},
                "<newer>": {"source": {"kind": "model_token", "model": {"model": {"path": "c"}}, "token": "<three>"}},
            },
            "pad_to_multiple_of": 64,
        },
    },
    "rules of tokens over a base": {
        "merge_method": "ties",
        "base_model": "c",
        "models": entries("ab", weight=0.5, density=1.0),
        RULE: {"source": "a", "tokens": {"<two>": {"source": "b"}}, "pad_to_multiple_of": 32},
    },
}


def located(value: object, folder: Path) -> object:
    """A recipe with whole paths in place of the names of the folders."""
    if isinstance(value, dict):
        return {key: located(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [located(each, folder) for each in value]
    return str(folder / value) if value in (*NAMES, "strange") else value


def merge_all(folder: Path) -> list[tuple[Path, Path]]:
    """The folder that each recipe makes, and that of mergekit; recipes of models of one vocabulary first."""
    for name in NAMES:
        save(folder / "one" / name, trained("BPE", "a"), "llama", "causal-lm", ord(name))
        save(folder / "several" / name, trained("BPE", name), "llama", "causal-lm", ord(name))
    save(folder / "one" / "strange", trained("BPE", "a"), "llama", "causal-lm", 5)
    path = folder / "one" / "strange" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["StrangeForCausalLM"]}))
    recipes = [located(each, folder / "one") for each in RECIPES.values()]
    recipes += [located(each, folder / "several") for each in VOCABULARIES.values()]
    configs = [{"merge_method": "linear", "dtype": "float32", **each} for each in recipes]
    by_mergekit(configs, folder / "oracle")
    for number, config in enumerate(configs):
        hf_llfc.run({**config, "output_dir": str(folder / f"out-{number}")})
    return [(folder / f"out-{number}", folder / "oracle" / str(number)) for number in range(len(configs))]


def differences(folder: Path, oracle: Path) -> dict[str, float]:
    """Tensor → the largest difference between two results, in units of its largest entry.

    Rows are compared token by token: in a union the ids of tokens that the first model lacks are in no order that
    mergekit promises.
    """
    found, expected = tensors(folder), tensors(oracle)
    assert found.keys() == expected.keys()
    ours = AutoTokenizer.from_pretrained(folder).get_vocab()
    theirs = ours
    if (oracle / "tokenizer.json").is_file():
        theirs = AutoTokenizer.from_pretrained(oracle).get_vocab()
    assert ours.keys() == theirs.keys()
    rows = range(len(ours), AutoConfig.from_pretrained(folder).vocab_size)
    own = torch.tensor([*(ours[token] for token in sorted(ours)), *rows])
    other = torch.tensor([*(theirs[token] for token in sorted(ours)), *rows])
    result = {}
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        has_rows = name in ("model.embed_tokens.weight", "lm_head.weight")
        difference = found[name][own] - tensor[other] if has_rows else found[name] - tensor
        result[name] = difference.abs().max().item() / tensor.abs().max().item()
    return result


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> list[tuple[Path, Path]]:
    pytest.importorskip("mergekit", reason="mergekit, the oracle for values, is not installed")
    return merge_all(tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize("number", range(len(RECIPES) + len(VOCABULARIES)), ids=[*RECIPES, *VOCABULARIES])
def test_a_recipe_gives_the_checkpoint_of_mergekit(number, merged):
    off = differences(*merged[number])
    assert off == {name: pytest.approx(0, abs=TOLERANCE) for name in off}
