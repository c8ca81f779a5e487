"""The tokenizer of a result is chosen on purpose, and is one that the merged weights were made for."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hf_llfc
from hf_llfc.cli import main
from hf_llfc.errors import CheckpointError, RecipeError
from hf_llfc.pipeline.planning import plan
from hf_llfc.recipe import load_recipe
from tests.checkpoints.conftest import WORDS, save_tokenizer
from tests.parents.test_what_fits import LLAMA
from tests.tiny_models import tiny_model


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch) -> Path:
    """Three models of one vocabulary, each with a chat template of its own, and one of another vocabulary."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b", "c", "other", "long", "none")):
        tiny_model("bert", "sequence-classification", seed).to(torch.bfloat16).save_pretrained(tmp_path / name)
        words = {"other": [*WORDS[::-1]], "long": [*WORDS, *(f"word{place}" for place in range(60))]}.get(name, WORDS)
        if name != "none":
            save_tokenizer(tmp_path / name, words)
            (tmp_path / name / "chat_template.jinja").write_text(name)
    return tmp_path


@pytest.mark.parametrize(("source", "expected"), [(None, "a"), (0, "a"), (1, "b"), ("b", "b"), ("c", "c")])
def test_the_tokenizer_is_that_of_the_source(source, expected, shelf):
    hf_llfc.merge(["a", "b"], out="out", tokenizer_source=source)
    assert (shelf / "out" / "chat_template.jinja").read_text() == expected
    assert yaml.safe_load((shelf / "out" / "llfc" / "recipe.yaml").read_text()).get("tokenizer_source") == source


@pytest.mark.parametrize(("source", "expected"), [("1", "b"), ("c", "c"), ("base", "c")])
def test_the_command_line_offers_it(source, expected, shelf):
    arithmetic = ["--merge-method", "task_arithmetic", "--base-model", "c"] if source == "base" else []
    words = ["merge", "a", "b", "--out", "out", "--tokenizer-source", source, "--dtype", "float32", *arithmetic]
    assert main([*words, "--quiet"]) == 0
    assert (shelf / "out" / "chat_template.jinja").read_text() == expected
    assert "float32" in (shelf / "out" / "config.json").read_text()


def test_rows_are_brought_to_a_tokenizer_of_another_vocabulary(shelf):
    hf_llfc.merge(["a"], out="out", tokenizer_source="other")
    name = "bert.embeddings.word_embeddings.weight"
    before, after = (load_file(shelf / folder / "model.safetensors")[name] for folder in ("a", "out"))
    assert len(after) == len(WORDS)
    for row, word in enumerate(WORDS[::-1]):
        assert torch.equal(after[row], before[WORDS.index(word)])


def test_a_source_without_a_tokenizer_is_refused(shelf):
    with pytest.raises(CheckpointError, match="tokenizer_source: none: has no tokenizer that can be read"):
        hf_llfc.merge(["a", "b"], out="out", tokenizer_source="none")
    assert not (shelf / "out").exists()


def test_ids_beyond_the_embeddings_are_refused(shelf):
    for name in ("a", "b"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (shelf / name / file).unlink()
    with pytest.raises(CheckpointError, match=r"gives 'word59' the id 66, but the embeddings of a have 61 rows"):
        hf_llfc.merge(["a", "b"], out="out", tokenizer_source="long")
    hf_llfc.merge(["a", "b"], out="out", tokenizer_source="c")


def test_a_place_without_a_model_is_refused(shelf):
    with pytest.raises(RecipeError, match="tokenizer_source: there is no model 2; models are counted from 0"):
        hf_llfc.merge(["a", "b"], out="out", tokenizer_source=2)


def test_a_source_that_is_not_there_is_named_with_what_may_have_been_meant(shelf):
    with pytest.raises(CheckpointError, match=r"tokenizer_source: \./unoin: there is no such folder"):
        hf_llfc.merge(["a", "b"], out="out", tokenizer_source="./unoin")
    with pytest.raises(CheckpointError, match=r"(?s)tokenizer_source: unoin: .*did you mean 'union'"):
        hf_llfc.merge(["a", "b"], out="out", tokenizer_source="unoin")


# -- added tokens in another order


def with_added(folder: str, tokens: list[str], where: str) -> None:
    """A tiny model with a row for every token; the added ones stand in tokenizer.json, or in a file beside it alone."""
    from transformers import PreTrainedTokenizerFast

    config = LlamaConfig(**{**LLAMA, "vocab_size": len(WORDS) + len(tokens)})
    torch.manual_seed(len(folder) + ord(folder[0]))
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(Path(folder))
    if where == "tokenizer.json":
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.add_tokens(tokens)
        tokenizer.save_pretrained(folder)
        return
    ids = {token: len(WORDS) + place for place, token in enumerate(tokens)}
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "special"), False)
    values = {str(index): {"content": token, "normalized": True, **flags} for token, index in ids.items()}
    path = Path(folder, where)
    settings = json.loads(path.read_text()) if path.exists() else {}
    added = {"added_tokens_decoder": values} if where == "tokenizer_config.json" else ids
    path.write_text(json.dumps({**settings, **added}))


@pytest.mark.parametrize("where", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_added_tokens_in_another_order_are_merged_by_token_never_by_id(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    orders = {"a": ["<x>", "<y>"], "b": ["<y>", "<x>"]}
    for name, tokens in orders.items():
        with_added(name, tokens, where)
    with pytest.raises(CheckpointError, match=r"id 7 is '<y>' against '<x>', id 8 is '<x>' against '<y>'"):
        hf_llfc.merge(["a", "b"], out="out")
    first = len(WORDS)
    for place, source in enumerate(("union", "a", "b")):
        out = f"out{place}"
        hf_llfc.merge(["a", "b"], out=out, tokenizer_source=source)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = {each: load_file(Path(each, "model.safetensors"))[name][first:] for each in ("a", "b", out)}
            expected = (rows["a"] + rows["b"].flip(0)) / 2
            assert torch.allclose(rows[out], expected.flip(0) if source == "b" else expected, atol=1e-7)
        ids = AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(orders["b" if source == "b" else "a"])
        assert ids == [first, first + 1]


def test_a_model_without_a_tokenizer_is_named(shelf):
    recipe = load_recipe({"models": [{"model": "a"}, {"model": "none"}], "output_dir": "out"})
    sentence = "none has no tokenizer, so that its rows are taken to be of the same tokens as those of a"
    assert sentence in plan(recipe)["warnings"]
    hf_llfc.merge(["a", "none"], out="out")
    assert sentence[1:] in (shelf / "out" / "README.md").read_text()


def test_chat_templates_that_differ_are_in_plan_record_and_card(shelf, capsys):
    told = ['b: chat template is "b", but that of a is "a"', 'c: chat template is "c", but that of a is "a"']
    models = [{"model": name} for name in "abc"]
    for keys, start in (
        ({}, "inputs are prepared as a does"),
        ({"chat_template": "chatml"}, "the chat template is"),
    ):
        warnings = plan(load_recipe({"models": models, "output_dir": "out", **keys}))["warnings"]
        assert [each.split(": ", 1)[1] for each in warnings] == told and all(
            each.startswith(start) for each in warnings
        )
    assert main(["merge", *"abc", "--out", "out", "--dry-run"]) == 0
    assert f"warning: inputs are prepared as a does: {told[0]}\n" in capsys.readouterr().out
    assert main(["merge", *"abc", "--out", "out", "--quiet"]) == 0
    record = json.loads((shelf / "out" / "llfc" / "run.json").read_text())
    card = (shelf / "out" / "README.md").read_text().replace("\\", "")
    assert all(any(each.endswith(line) for each in record["warnings"]) and line in card for line in told)
