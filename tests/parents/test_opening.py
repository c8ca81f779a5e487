"""The tokenizer of a result is chosen on purpose, and is one that the merged weights were made for."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import hf_llfc
from hf_llfc.cli import main
from hf_llfc.errors import CheckpointError, RecipeError
from tests.checkpoints.conftest import WORDS, save_tokenizer
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
