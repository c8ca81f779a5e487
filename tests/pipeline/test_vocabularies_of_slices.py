"""Slices of models of different vocabularies."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_llfc.errors import CheckpointError
from hf_llfc.pipeline.planning import plan
from hf_llfc.recipe import load_recipe
from tests.pipeline.test_methods import tensors
from tests.pipeline.test_slices import run, source, stacked
from tests.vocabularies import save, trained, vocabulary


@pytest.fixture(scope="module")
def tongues(tmp_path_factory) -> Path:
    """Two models of two layers and vocabularies of their own."""
    folder = tmp_path_factory.mktemp("tongues")
    for seed, name in enumerate("ab"):
        save(folder / name, trained("BPE", name), "llama", "causal-lm", seed)
    return folder


def test_layers_of_models_of_different_vocabularies(tongues, tmp_path):
    """Rows that the source of a table lacks are those of the model that has them, whichever slice that is in."""
    a, b = (tensors(tongues / name) for name in "ab")
    ids = [vocabulary(tongues / name) for name in "ab"]
    recipe = stacked(tongues, [source("a", 0, 2)], [source("b", 0, 2)], tokenizer_source="union")
    found = run(recipe, tmp_path / "union")
    of_union = vocabulary(tmp_path / "union")
    assert of_union.keys() == ids[0].keys() | ids[1].keys() and len(found["model.embed_tokens.weight"]) == len(of_union)
    for token, row in of_union.items():
        first, second = (each.get(token) for each in ids)
        for name, order in (("model.embed_tokens.weight", (0, 1)), ("lm_head.weight", (1, 0))):
            rows = [(a[name], first), (b[name], second)]
            expected = next(rows[index][0][rows[index][1]] for index in order if rows[index][1] is not None)
            assert torch.equal(found[name][row], expected)
    own = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(found[own.format(1)], a[own.format(1)]) and torch.equal(found[own.format(3)], b[own.format(1)])
    AutoModelForCausalLM.from_pretrained(tmp_path / "union")
    steps = {each["step"]: each["what"] for each in plan(load_recipe({**recipe, "output_dir": "o"}))["steps"]}
    lacking = [len(of_union.keys() - each.keys()) for each in ids]
    assert (
        f"{len(of_union)} tokens; {tongues / 'a'} lacks {lacking[0]}, {tongues / 'b'} lacks {lacking[1]}"
        in (steps["vocabulary"])
    )


def test_slices_take_a_vocabulary_and_rules_of_tokens(tongues, tmp_path):
    new = {"<new>": {"source": {"kind": "model_token", "model": str(tongues / "a"), "token": "<one>"}}}
    slices = ([source("a", 0, 2, weight=0.25), source("b", 0, 2, weight=0.75)], [source("b", 1, 2, weight=1.0)])
    more = {"merge_method": "linear", "tokenizer_source": str(tongues / "b"), "tokenizer": {"tokens": new}}
    found = run({**stacked(tongues, *slices), **more}, tmp_path / "out")["model.embed_tokens.weight"]
    a, b = (tensors(tongues / name)["model.embed_tokens.weight"] for name in "ab")
    ids = [vocabulary(tongues / name) for name in "ab"]
    assert len(found) == len(b) + 1
    torch.testing.assert_close(found[-1], a[ids[0]["<one>"]])
    for token, row in ids[1].items():
        own = a[ids[0][token]] if token in ids[0] else b[row]
        torch.testing.assert_close(found[row], 0.25 * own + 0.75 * b[row])
    aligned = {**stacked(tongues, *slices), **more, "align": {"method": "weight_matching"}}
    with pytest.raises(CheckpointError, match="have different vocabularies, and the rows that one lacks come from"):
        run(aligned, tmp_path / "aligned")
    assert not (tmp_path / "aligned").exists()
