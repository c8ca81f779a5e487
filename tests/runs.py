"""Small runs for the tests of pipeline, command line and launcher: models, data and recipes in a folder."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, ResNetConfig, ResNetForImageClassification

from hf_llfc import PermutationSpec

TEXT = "the merged model is the linear blend of its parents, layer by layer, or it is not. " * 12


def byte_llama(seed: int, **changes) -> LlamaForCausalLM:
    """A random Llama over bytes, with every kind of axis."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 256,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def small_resnet(seed: int) -> ResNetForImageClassification:
    """A random ResNet with BatchNorm statistics that are not those of its initialisation."""
    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = ResNetForImageClassification(config)
    with torch.no_grad():
        for _ in range(3):
            model(pixel_values=torch.randn(16, 1, 32, 32))
    return model.eval()


def moved(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The same function in other coordinates."""
    alignment = PermutationSpec.from_config(model.config).random_alignment(torch.Generator().manual_seed(seed))
    model.load_state_dict(alignment.apply(model.state_dict()))
    return model


def saved(model: PreTrainedModel, path: Path) -> Path:
    """Saves a model."""
    model.save_pretrained(path)
    return path


def text_data(folder: Path) -> Path:
    """A text file, one sentence a line."""
    path = folder / "text.txt"
    path.write_text("\n".join(TEXT.split(", ")))
    return path


def image_data(folder: Path, name: str = "images", count: int = 24) -> Path:
    """Noise images with three labels, as a parquet file."""
    generator = np.random.default_rng(0)
    images = generator.standard_normal((count, 1, 32, 32)).astype(np.float32)
    path = folder / f"{name}.parquet"
    columns = {"image": list(images), "label": [place % 3 for place in range(count)]}
    datasets.Dataset.from_dict(columns).to_parquet(str(path))
    return path


def text_recipe(a: Path, b: Path, data: Path, out: Path, **changes) -> dict:
    """A recipe over every stage, for two byte-level models."""
    recipe = {
        "models": [{"model": str(model), "parameters": {"weight": 0.5}} for model in (a, b)],
        "align": {"method": "weight_matching"},
        "diagnose": {
            "task": "text-generation",
            "dataset": str(data),
            "tokenizer": "bytes",
            "max_length": 32,
            "batch_size": 4,
            "alphas": 5,
        },
        "output_dir": str(out),
    }
    return {**recipe, **changes}


def written(recipe: dict, folder: Path, name: str = "recipe") -> Path:
    """Writes a recipe file."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def command_line(*words: str, launcher: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m hf_llfc …` in a process of its own, or under a launcher."""
    import os

    command = [sys.executable, *launcher, "-m", "hf_llfc", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=240)


def answer(run: subprocess.CompletedProcess[str]) -> dict:
    """The JSON on stdout."""
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def trained_llama(seed: int, start: LlamaForCausalLM | None = None, steps: int = 40) -> LlamaForCausalLM:
    """A Llama over bytes that knows the text of `text_data`; from a start of its own, or onward from another one."""
    model = byte_llama(seed)
    if start is not None:
        model.load_state_dict(start.state_dict())
    ids = torch.tensor(list(TEXT.encode()))
    optimiser = torch.optim.Adam(model.parameters(), 1e-2 if start is None else 1e-3)
    for _ in range(steps):
        places = torch.randint(len(ids) - 32, (8, 1)) + torch.arange(32)
        model(input_ids=ids[places], labels=ids[places]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()
