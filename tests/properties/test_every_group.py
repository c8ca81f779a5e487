"""Every family with a canonical form: its heads and what its config may say, under the groups `full`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_llfc.adapters.canonical_forms import FORMS, canonical_form
from hf_llfc.adapters.derived import answer_of, relative_change, sample_inputs
from hf_llfc.adapters.derived.spec import model_with_random_weights
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.checkpoints.models import load_model
from hf_llfc.checkpoints.views.canonical import canonical_checkpoint
from tests.alignment.test_full_groups import CHANNELS, DECODER, GPT2, IMAGE
from tests.properties.invariance import RELATIVE_CHANGE

DECODERS = {
    "gemma": "Gemma",
    "granite": "Granite",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
PATCHES = {**IMAGE, "encoder_stride": 4}
HEADS = (
    (4, 4),  # queries, keys and values
    (4, 2),
    (4, 1),
    (1, 1),
)
FLAGS: tuple[dict[str, Any], ...] = (
    {"attention_bias": True},
    {"hidden_act": "relu"},
    {"mlp_bias": True},
    {"partial_rotary_factor": 0.5},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
)
TABLE: list[tuple[str, dict[str, Any]]] = [
    *(
        (f"{name}ForCausalLM", {**DECODER, "num_attention_heads": queries, "num_key_value_heads": keys})
        for name in DECODERS.values()
        for queries, keys in HEADS
    ),
    *((f"{name}ForCausalLM", {**DECODER, **flag}) for name in DECODERS.values() for flag in FLAGS),
    *(
        (f"Llama{head}", DECODER)
        for head in ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model")
    ),
    *(
        (f"GPT2{head}", GPT2)
        for head in ("DoubleHeadsModel", "ForTokenClassification", "ForQuestionAnswering", "LMHeadModel", "Model")
    ),
    ("GPT2LMHeadModel", {**GPT2, "n_head": 1}),
    ("GPT2LMHeadModel", {**GPT2, "tie_word_embeddings": False}),
    ("GPT2LMHeadModel", {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
    *(
        (f"{name}{head}", PATCHES)
        for name in ("ViT", "DeiT")
        for head in ("ForImageClassification", "ForMaskedImageModeling", "Model")
    ),
    ("DeiTForImageClassificationWithTeacher", PATCHES),
    ("ViTForImageClassification", {**PATCHES, "num_attention_heads": 1}),
    ("ViTForImageClassification", {**PATCHES, "qkv_bias": False}),
    ("ViTForImageClassification", {**PATCHES, "hidden_act": "relu"}),
    ("ResNetModel", CHANNELS),
    ("ResNetBackbone", {**CHANNELS, "out_features": ["stage1", "stage2"]}),
]


def model_of(name: str, values: dict[str, Any]) -> PreTrainedModel:
    model_class = getattr(transformers, name)
    config = model_class.config_class(**values)
    config.architectures = [name]
    config.pad_token_id = 0
    return model_with_random_weights(model_class, config, 0)


def inputs_for(model: PreTrainedModel) -> dict[str, Tensor]:
    inputs = sample_inputs(model)
    if "MaskedImage" in type(model).__name__:
        inputs["bool_masked_pos"] = torch.arange(4).remainder(2).bool().repeat(2, 1)
    return inputs


@pytest.mark.parametrize(("name", "values"), TABLE, ids=[f"{place}-{name}" for place, (name, _) in enumerate(TABLE)])
def test_canonical_form_and_random_transforms_keep_the_answers(name: str, values: dict[str, Any]):
    model = model_of(name, values)
    inputs = inputs_for(model)
    expected = answer_of(model, inputs)
    form = canonical_form(model.config)
    checkpoint = canonical_checkpoint(open_checkpoint(model), form)
    state = dict(checkpoint.state_dict())
    random = form.spec.random_alignment(torch.Generator().manual_seed(0))
    for tensors in (state, random.apply(state)):
        moved = load_model(checkpoint, state_dict=tensors, dtype=torch.float64).eval()
        assert relative_change(expected, answer_of(moved, inputs)) <= RELATIVE_CHANGE


def test_the_table_has_every_family():
    assert {getattr(transformers, name).config_class.model_type for name, _ in TABLE} == set(FORMS)
