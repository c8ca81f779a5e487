"""Sampled inputs: valid, seeded, and every one of them reaches the outputs."""

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedModel

from hf_llfc.adapters.derived.inputs import forward, sample_inputs
from hf_llfc.adapters.derived.precision import full_precision
from hf_llfc.adapters.derived.shrink import build_on_meta
from hf_llfc.errors import SpecError
from tests import zoo

TYPES = (
    "bert",
    "clip",
    "deepseek_v3",
    "gemma3",
    "gpt2",
    "jamba",
    "llava",
    "qwen2_5_vl",
    "qwen2_audio",
    "resnet",
    "swin",
    "t5",
    "time_series_transformer",
    "wav2vec2",
    "whisper",
)


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[PreTrainedModel, dict[str, Tensor]]]:
    return {model_type: zoo.zoo_model(model_type, dtype=torch.float64) for model_type in TYPES}


def change(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """The largest difference of two outputs."""
    return max(
        (before[name] - after[name]).nan_to_num().abs().max().item()
        for name in before
        if before[name].shape == after[name].shape
    )


@pytest.mark.parametrize("model_type", TYPES)
def test_outputs_are_finite_and_in_full_precision(model_type: str, models: dict) -> None:
    model, inputs = models[model_type]
    outputs = forward(model, inputs)
    assert outputs
    for name, value in outputs.items():
        assert value.isfinite().all(), name
        assert value.dtype == torch.float64, name


@pytest.mark.parametrize("model_type", TYPES)
def test_every_input_matters(model_type: str, models: dict) -> None:
    model, inputs = models[model_type]
    others = sample_inputs(model, seed=1)
    outputs = forward(model, inputs)
    for name, value in inputs.items():
        other = torch.ones_like(value) if name == "attention_mask" else others[name]
        if torch.equal(other, value):
            continue  # it describes the other inputs, and no other value of it fits these
        assert change(outputs, forward(model, inputs | {name: other})) > 1e-9, name


@pytest.mark.parametrize("model_type", TYPES)
def test_the_seed_is_all_that_is_random(model_type: str, models: dict) -> None:
    model, inputs = models[model_type]
    again = sample_inputs(model)
    assert list(again) == list(inputs)
    assert all(torch.equal(again[name], value) for name, value in inputs.items())


@pytest.mark.parametrize("model_type", ["bert", "llava", "t5", "vit"])
def test_a_model_without_memory(model_type: str) -> None:
    config = zoo.zoo_config(model_type)
    inputs = sample_inputs(build_on_meta(config))
    real, expected = zoo.zoo_model(model_type)
    assert {name: value.shape for name, value in inputs.items()} == {name: v.shape for name, v in expected.items()}
    assert all(value.device.type == "cpu" for value in inputs.values())
    forward(real, inputs)


def test_the_last_row_is_padded(models: dict) -> None:
    inputs = models["bert"][1]
    assert inputs["attention_mask"][:-1].all()
    assert not inputs["attention_mask"][-1].all()
    assert sample_inputs(models["bert"][0], batch_size=1)["attention_mask"].all()


def test_placeholders_are_as_many_as_features(models: dict) -> None:
    model, inputs = models["qwen2_5_vl"]
    patches = inputs["image_grid_thw"].prod(dim=1).sum()
    merged = patches // model.config.vision_config.spatial_merge_size**2
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == merged


def test_full_precision_ends() -> None:
    before = torch.get_default_dtype()
    with full_precision(torch.float64):
        assert torch.ones(2, dtype=torch.float64).float().dtype == torch.float64
    assert torch.get_default_dtype() == before
    assert torch.ones(2, dtype=torch.float64).float().dtype == torch.float32


class TakesSomethingElse(BertModel):
    def forward(self, weather: Tensor) -> Tensor:
        return weather


def test_inputs_that_cannot_be_made() -> None:
    with torch.device("meta"):
        model = TakesSomethingElse(BertConfig(num_hidden_layers=1))
    with pytest.raises(SpecError, match=r"'bert'.*weather"):
        sample_inputs(model)
