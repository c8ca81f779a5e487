"""Models of one tokenizer whose embeddings have other numbers of rows: some are padded to a multiple, say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_llfc
from hf_llfc.cli import main
from hf_llfc.errors import CheckpointError
from hf_llfc.pipeline.planning import plan
from hf_llfc.recipe import load_recipe
from tests.checkpoints.conftest import WORDS, quiet, save_tokenizer
from tests.parents.test_what_fits import BERT, GPT2, LLAMA, model, tensors_of

__all__ = ["quiet"]

TOKENS, MORE = len(WORDS), 9
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "an untied Llama": ("LlamaForCausalLM", LLAMA, ["model.embed_tokens.weight", "lm_head.weight"]),
    "a tied BERT": (
        "BertForMaskedLM", BERT, ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"]
    ),
    "a GPT-2": ("GPT2LMHeadModel", GPT2, ["transformer.wte.weight"]),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def shelf(request, tmp_path, monkeypatch) -> list[str]:
    """Models with and without rows of no token, and a base without; the names of tensors with a row a token."""
    monkeypatch.chdir(tmp_path)
    architecture, config, names = FAMILIES[request.param]
    for seed, (name, rows) in enumerate({"a": TOKENS, "wide": TOKENS + MORE, "base": TOKENS}.items()):
        model(architecture, seed, **{**config, "vocab_size": rows}).save_pretrained(name)
        save_tokenizer(Path(name))
    return names


def rows(folder: str, name: str) -> torch.Tensor:
    return tensors_of(Path(folder))[name].double()


def test_rows_beyond_the_tokenizer_are_cut_where_the_first_has_none(shelf):
    hf_llfc.merge(["a", "wide"], out="out")
    for name in shelf:
        expected = (rows("a", name) + rows("wide", name)[:TOKENS]) / 2
        assert torch.allclose(rows("out", name), expected, atol=1e-7)
        assert len(rows("out", name)) == TOKENS == json.loads(Path("out/config.json").read_text())["vocab_size"]


def test_rows_beyond_the_tokenizer_are_the_firsts_where_it_has_some(shelf):
    hf_llfc.merge(["wide", "a"], out="out")
    for name in shelf:
        expected = rows("wide", name).clone()
        expected[:TOKENS] = (expected[:TOKENS] + rows("a", name)) / 2
        assert torch.allclose(rows("out", name), expected, atol=1e-7)


def test_task_vectors_over_a_base_without_them_keep_those_of_the_first(shelf):
    hf_llfc.merge(["wide"], out="out", merge_method="task_arithmetic", base_model="base", parameters={"lambda": 0.5})
    for name in shelf:
        expected = rows("wide", name).clone()
        expected[:TOKENS] = (expected[:TOKENS] + rows("base", name)) / 2
        assert torch.allclose(rows("out", name), expected, atol=1e-7)


@pytest.mark.parametrize("first", ["a", "wide"])
def test_plan_and_card_say_the_rule(first, shelf):
    other = {"a": "wide", "wide": "a"}[first]
    counts = {"a": TOKENS, "wide": TOKENS + MORE}
    sentence = (
        f"all models have the {TOKENS} tokens of {first}, whose {counts[first]} rows the result has ({other} has "
        f"{counts[other]}); rows of no token are cut, or are those of {first}"
    )
    models = [{"model": first}, {"model": other}]
    steps = {step["step"]: step["what"] for step in plan(load_recipe({"models": models, "output_dir": "out"}))["steps"]}
    assert steps["vocabulary"] == sentence
    hf_llfc.merge([first, other], out="out")
    assert sentence[1:] in Path("out/README.md").read_text().replace("\\", "")


@pytest.mark.parametrize("model_without", ["a", "wide"])
def test_without_a_tokenizer_nobody_knows_whose_rows_they_are(model_without, shelf):
    (Path(model_without) / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="once both models have their tokenizer beside them"):
        hf_llfc.merge(["a", "wide"], out="out")
    assert not Path("out").exists()


def test_other_commands_take_them_too(shelf):
    assert hf_llfc.check("a", "wide", level=0).answer == "undecided"
    assert hf_llfc.align("wide", to="a").moved == hf_llfc.align("wide", to="a").moved
    assert main(["align", "wide", "--to", "a", "--out", "aligned", "--quiet"]) == 0
    assert all(len(rows("aligned", name)) == TOKENS + MORE for name in shelf)
    assert main(["align", "a", "--to", "wide", "--out", "narrow", "--quiet"]) == 0
    assert all(len(rows("narrow", name)) == TOKENS for name in shelf)
