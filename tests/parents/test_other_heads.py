"""Task vectors over a base with another head, or none, are those of the body; the head is that of the first model."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hf_llfc
from hf_llfc.errors import CheckpointError
from hf_llfc.pipeline.planning import plan
from hf_llfc.recipe import load_recipe
from tests.checkpoints.conftest import quiet
from tests.tiny_models import randomise

__all__ = ["quiet"]

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 48}
PAIRS = {
    "a bare BERT": ("BertModel", "BertForSequenceClassification", {"num_labels": 3}),
    "a BERT for masked tokens": ("BertForMaskedLM", "BertForSequenceClassification", {"num_labels": 3}),
    "a RoBERTa for masked tokens": ("RobertaForMaskedLM", "RobertaForTokenClassification", {"num_labels": 3}),
    "a Llama that writes": ("LlamaForCausalLM", "LlamaForSequenceClassification", {"num_labels": 3}),
    "a bare ViT": ("ViTModel", "ViTForImageClassification", {"image_size": 8, "patch_size": 4, "num_labels": 3}),
}


def saved(architecture: str, folder: Path, seed: int, **config) -> Path:
    """A tiny model with random weights in a folder."""
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**config))
    randomise(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=PAIRS)
def shelf(request, tmp_path) -> tuple[str, list[str], str]:
    """A base, two models from it, and the prefix that their tensors have."""
    of_base, of_models, config = PAIRS[request.param]
    own = {key: value for key, value in config.items() if key != "num_labels"}
    base = saved(of_base, tmp_path / "base", 0, **SMALL, **own)
    models = [saved(of_models, tmp_path / name, seed, **SMALL, **config) for seed, name in enumerate("ab", start=1)]
    prefix = getattr(transformers, of_models).base_model_prefix
    return str(base), [str(each) for each in models], f"{prefix}."


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def by_hand(base, models, prefix, folder: Path) -> tuple[str, list[str]]:
    """The base and the models with the head of the first, as one would put them together oneself."""
    first, start = tensors_of(models[0]), tensors_of(base)
    made = []
    for source in (base, *models):
        tensors = {**tensors_of(source), **{prefix + name: each for name, each in tensors_of(source).items()}}
        whole = {
            name: tensors[name] if name in start or name.removeprefix(prefix) in start else each
            for name, each in first.items()
        }
        shutil.copytree(models[0], folder / Path(source).name)
        save_file(whole, folder / Path(source).name / "model.safetensors", metadata={"format": "pt"})
        made.append(str(folder / Path(source).name))
    return made[0], made[1:]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("task_arithmetic", {"lambda": 0.5}), ("ties", {"density": 0.5, "weight": 1.0})],
    ids=["task_arithmetic", "ties"],
)
def test_the_body_is_that_of_the_task_vectors_and_the_head_the_first_models(
    shelf, method, parameters, tmp_path, caplog
):
    base, models, prefix = shelf
    with caplog.at_level(logging.WARNING, logger="hf_llfc"):
        hf_llfc.merge(models, out=tmp_path / "out", merge_method=method, base_model=base, parameters=parameters)
    assert "is a base without the head of the models" in caplog.text
    whole, wholes = by_hand(base, models, prefix, tmp_path / "by hand")
    hf_llfc.merge(wholes, out=tmp_path / "expected", merge_method=method, base_model=whole, parameters=parameters)
    found, expected, first = (tensors_of(folder) for folder in (tmp_path / "out", tmp_path / "expected", models[0]))
    assert found.keys() == first.keys()
    heads = [name for name in found if torch.equal(found[name], first[name])]
    assert heads and all(torch.equal(found[name], expected[name]) for name in found)


def test_the_plan_says_whose_head_it_is(shelf, tmp_path):
    base, models, _ = shelf
    recipe = load_recipe(
        {
            "models": [{"model": each} for each in models],
            "merge_method": "ties",
            "base_model": base,
            "parameters": {"density": 0.5, "weight": 1.0},
            "output_dir": str(tmp_path / "out"),
        }
    )
    steps = {step["step"]: step["what"] for step in plan(recipe)["steps"]}
    assert steps["head"].startswith(f"that of {models[0]}: ") and f"which {base} lacks" in steps["head"]


def test_a_base_of_another_body_is_refused(tmp_path):
    base = saved("BertModel", tmp_path / "base", 0, **{**SMALL, "num_hidden_layers": 1})
    models = [saved("BertForSequenceClassification", tmp_path / name, seed, **SMALL) for seed, name in enumerate("ab")]
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        hf_llfc.merge(models, out=tmp_path / "out", merge_method="ties", base_model=base, parameters={"weight": 1.0})
    assert not (tmp_path / "out").exists()
