"""Output heads that are the embedding or are not, whatever configs say: told by the tensors, settled by one key."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_llfc
from hf_llfc.checkpoints import load_model, open_checkpoint
from hf_llfc.cli import main
from hf_llfc.errors import CheckpointError, RecipeError
from hf_llfc.pipeline.planning import plan
from hf_llfc.recipe import load_recipe
from tests.checkpoints.conftest import quiet
from tests.parents.test_what_fits import BERT, GPT2, LLAMA, config, having, model, tensors_of

__all__ = ["quiet"]

FAMILIES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "Llama": (
        "LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}, "lm_head.weight", "model.embed_tokens.weight"
    ),
    "GPT-2": ("GPT2LMHeadModel", GPT2, "lm_head.weight", "transformer.wte.weight"),
    "BERT": (
        "BertForMaskedLM", BERT, "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
    ),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def shelf(request, tmp_path, monkeypatch) -> tuple[str, str]:
    """Tied models `a` and `b`; `own`, whose config ties it and whose file has another head; `untied` of its own head.

    Gives the names of head and embedding.
    """
    monkeypatch.chdir(tmp_path)
    architecture, values, head, body = FAMILIES[request.param]
    for seed, name in enumerate(("a", "b", "own")):
        model(architecture, seed, **values).save_pretrained(name)
    having(**{head: torch.randn(tensors_of(Path("own"))[body].shape)})(Path("own"))
    model(architecture, 3, **{**values, "tie_word_embeddings": False}).save_pretrained("untied")
    return head, body


def tensor(folder: str, name: str) -> torch.Tensor:
    return tensors_of(Path(folder))[name].double()


def mean(*tensors: torch.Tensor) -> torch.Tensor:
    return sum(tensors) / len(tensors)


@pytest.mark.parametrize("other", ["own", "untied"])
def test_a_head_is_written_and_a_model_without_one_gives_its_embedding(other, shelf):
    head, body = shelf
    hf_llfc.merge(["a", other], out="out", tie_word_embeddings=False)
    assert torch.allclose(tensor("out", head), mean(tensor("a", body), tensor(other, head)), atol=1e-7)
    assert torch.allclose(tensor("out", body), mean(tensor("a", body), tensor(other, body)), atol=1e-7)
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is False
    loaded = load_model(open_checkpoint("out"))
    weights = [loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight]
    assert [torch.allclose(w.double(), tensor("out", n)) for w, n in zip(weights, (head, body), strict=True)] == [
        True
    ] * 2
    card = Path("out/README.md").read_text().replace("\\", "")
    assert f"A: {head} is a copy of {body}" in card


@pytest.mark.parametrize(("models", "where"), [(["a", "own"], "own"), (["own", "b"], "own")])
def test_two_tensors_where_the_config_has_one_are_told_before_a_merge(models, where, shelf):
    head, body = shelf
    words = (
        f"{where}: the config ties {head} to {body}, but the file holds two different .* `tie_word_embeddings: false`"
    )
    recipe = load_recipe({"models": [{"model": each} for each in models], "output_dir": "out"})
    with pytest.raises(CheckpointError, match=words):
        plan(recipe)
    with pytest.raises(CheckpointError, match=words):
        hf_llfc.merge(models, out="out")
    assert not Path("out").exists()


@pytest.mark.parametrize("models", [["a", "untied"], ["untied", "a"]])
def test_a_tied_and_an_untied_model_are_refused_with_the_key(models, shelf):
    with pytest.raises(
        CheckpointError, match=r"of a is its embedding, that of untied is its own; `tie_word_emb"
    ) as error:
        hf_llfc.merge(models, out="out")
    assert "problems" not in str(error.value)


def test_a_head_that_an_untied_config_lacks_is_the_embedding_on_request(shelf):
    head, body = shelf
    config(tie_word_embeddings=False)(Path("b"))
    with pytest.raises(CheckpointError, match="if its output head is its embedding, say so"):
        hf_llfc.merge(["untied", "b"], out="out")
    hf_llfc.merge(["untied", "b"], out="out", tie_word_embeddings=False)
    assert torch.allclose(tensor("out", head), mean(tensor("untied", head), tensor("b", body)), atol=1e-7)
    hf_llfc.merge(["a", "b"], out="tied", tie_word_embeddings=True)
    assert head not in tensors_of(Path("tied"))
    assert json.loads(Path("tied/config.json").read_text())["tie_word_embeddings"] is True


def test_two_heads_are_not_made_one(shelf):
    with pytest.raises(CheckpointError, match="the file holds two different tensors"):
        hf_llfc.merge(["a", "untied"], out="out", tie_word_embeddings=True)


def test_the_plan_says_where_heads_come_from(shelf):
    head, body = shelf
    models = [{"model": "a"}, {"model": "own"}]
    steps = plan(load_recipe({"models": models, "output_dir": "out", "tie_word_embeddings": False}))["steps"]
    of_a, of_own = [step["what"] for step in steps if step["step"] == "head"]
    assert of_a.startswith(f"a: {head} is a copy of {body}")
    assert of_own.endswith(f"{head} is its own, though its config ties it to {body}")


def test_the_command_line_has_it(shelf, capsys):
    assert main(["merge", "a", "own", "--out", "out", "--no-tie-word-embeddings", "--quiet"]) == 0
    assert shelf[0] in tensors_of(Path("out"))


@pytest.mark.parametrize(
    ("architecture", "values"),
    [("BertForSequenceClassification", BERT), ("LlamaForSequenceClassification", LLAMA), ("BertModel", BERT)],
)
def test_a_model_without_such_a_head_is_refused(architecture, values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model(architecture, 0, **values).save_pretrained("a")
    with pytest.raises(CheckpointError, match="has no output head that could be its embedding"):
        hf_llfc.merge(["a", "a"], out="out", tie_word_embeddings=False)


def test_a_model_in_memory_and_an_adapter_as_the_result_are_refused(shelf):
    loaded = load_model(open_checkpoint("a"))
    with pytest.raises(CheckpointError, match="is in memory with its head as it is"):
        hf_llfc.merge([loaded, "b"], out="out", tie_word_embeddings=False)
    with pytest.raises(RecipeError, match="tie_word_embeddings: is not possible with `save_as: adapter`"):
        hf_llfc.merge(["a", "b"], out="out", tie_word_embeddings=False, save_as="adapter")
