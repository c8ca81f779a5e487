"""Tiny seeded models of every model type of transformers: shrunken default configs with random weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from hf_llfc.adapters.derived.inputs import sample_inputs
from hf_llfc.adapters.derived.shrink import _DEPTH, _kind_of, shrunken
from hf_llfc.adapters.derived.spec import model_with_random_weights
from hf_llfc.adapters.model_classes import model_class_for
from tests.tiny_models import FullDouble

__all__ = [
    "VARIANTS",
    "FullDouble",
    "ZooResult",
    "default_config",
    "varied_config",
    "zoo_config",
    "zoo_model",
    "zoo_reason",
    "zoo_result",
    "zoo_types",
]


# What default configs leave open, or set in a way that no model can be built from.
_SERIES = {"prediction_length": 8, "context_length": 16, "num_time_features": 2}
_T5GEMMA2 = {"dropout_rate": 0.0}
_QSA = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
_RESNET = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
_DETR = {"backbone_config": _RESNET, "use_timm_backbone": False}
_GLM4V = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [8, 12, 12],
}
_GEMMA4 = {"vision_config": {"model_type": "gemma4_vision"}, "audio_config": {"model_type": "gemma4_audio"}}
_HUNYUAN = {
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 16, 16, 16]},
}
_COMPLETED: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 2560},
    "autoformer": _SERIES,
    "blip-2": {"image_token_index": 50265},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "conditional_detr": _DETR,
    "dab-detr": _DETR,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 11, "num_experts_per_tok": 6}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense"] + ["sparse"] * 11, "num_experts_per_tok": 6},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "deformable_detr": _DETR,
    "detr": _DETR,
    "diffusion_gemma": {"text_config": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}},
    "diffusion_gemma_text": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "gemma4": _GEMMA4,
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}},
    "glm46v": {"text_config": {"model_type": "glm4v_text", "rope_parameters": _GLM4V, "num_attention_heads": 32}},
    "glm4v": {"text_config": {"rope_parameters": _GLM4V}},
    "glm4v_moe": {"text_config": {"head_dim": 128}},
    "glm4v_moe_text": {"head_dim": 128},
    "glm4v_text": {"rope_parameters": _GLM4V},
    "glm_image_text": {"rope_parameters": _GLM4V},
    "glmga": {"text_config": {"rope_parameters": _GLM4V}},
    "granite_speech": {"projector_config": {"model_type": "blip_2_qformer", "encoder_hidden_size": 1024}},
    "granite_speech_plus": {"projector_config": {"model_type": "blip_2_qformer", "encoder_hidden_size": 1024}},
    "granitemoehybrid": {
        "layers_block_type": ["linear_attention"] * 5 + ["full_attention"] + ["linear_attention"] * 26
    },
    "hiera": {"decoder_hidden_size": 512, "decoder_depth": 8, "decoder_num_heads": 16},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config": _HUNYUAN},
    "hunyuan_vl_text": _HUNYUAN,
    "informer": _SERIES,
    "instructblip": {"image_token_index": 50265},
    "instructblipvideo": {"video_token_index": 50265},
    "janus": {"vision_config": {"projection_dim": 4096}},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "ovis2": {"hidden_size": 4096},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 151652},
    "qwen2_vl": {"vision_config": {"hidden_size": 8192}},
    "qwen3_omni_moe": {"talker_config": {"text_config": {"shared_expert_intermediate_size": 768}}},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 768},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "reformer": {"is_decoder": True},
    "sapiens2": {"head_config": {"upsample_out_channels": [256, 128], "conv_out_channels": [128]}},
    "step3p5": {"sliding_window": 512},
    "step3p7": {"text_config": {"sliding_window": 512}},
    "t5gemma2_decoder": _T5GEMMA2,
    "t5gemma2_encoder": {"text_config": _T5GEMMA2},
    "t5gemma2_text": _T5GEMMA2,
    "table-transformer": _DETR,
    "time_series_transformer": _SERIES,
    "vitmatte": {"fusion_hidden_sizes": [256, 128, 64, 32], "convstream_hidden_sizes": [48, 96, 192]},
    "voxtral": {"audio_token_id": 24},
    "wav2vec2-bert": {"vocab_size": 32},
    "xmod": {"default_language": "en_XX"},
}


def zoo_types() -> list[str]:
    """Every registered model type, parts of other models included."""
    return list(CONFIG_MAPPING_NAMES)


@dataclass(frozen=True)
class ZooResult:
    """How far a model type gets.

    Attributes:
        stage: What failed: "config", "class", "shrink", "build" or "inputs"; "forward" if nothing has.
        reason: Why, or None.
        model: In eval mode, if it could be built.
        inputs: For its forward pass, if they could be made.
    """

    stage: str
    reason: str | None = None
    model: PreTrainedModel | None = None
    inputs: dict[str, torch.Tensor] | None = None
    error: Exception | None = None


def zoo_config(model_type: str) -> PreTrainedConfig:
    """The shrunken default config of a model type."""
    return shrunken(default_config(model_type))


def zoo_model(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A tiny model in eval mode whose every parameter and running statistic is drawn from `seed`, and inputs for it."""
    result = zoo_result(model_type, seed=seed, dtype=dtype)
    if result.error is not None:
        raise result.error
    assert result.model is not None and result.inputs is not None
    return result.model, result.inputs


def zoo_reason(model_type: str) -> str | None:
    """Why a model type cannot be built or run, or None if it can."""
    return zoo_result(model_type).reason


def zoo_result(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> ZooResult:
    """A tiny model and its inputs, or what stood in the way."""
    stage, model = "config", None
    try:
        config = default_config(model_type)
        stage = "class"
        model_class_for(config)
        stage = "shrink"
        config = shrunken(config)
        stage = "build"
        model = model_with_random_weights(model_class_for(config), config, seed, dtype)
        stage = "inputs"
        return ZooResult("forward", model=model, inputs=sample_inputs(model, seed=seed))
    except Exception as error:  # whatever stands in the way is the result
        return ZooResult(stage, f"{type(error).__name__}: {error}", model, error=error)


def default_config(model_type: str) -> PreTrainedConfig:
    """The default config of a model type, completed where it leaves open what a model needs."""
    return CONFIG_MAPPING[model_type](**copy.deepcopy(_COMPLETED.get(model_type, {})))


VARIANTS = ("shallow", "deep", "wide")
"""Configs of other sizes: the first three layers; two more, with the lists of layers the other way round; twice the
widths and heads, and a larger vocabulary."""


def varied_config(model_type: str, variant: str) -> PreTrainedConfig:
    """The default config of a model type with other sizes throughout.

    Raises:
        Exception: Whatever the config class raises of such sizes.
    """
    config = default_config(model_type)
    values = config.to_dict()
    _change(values, _changed(config, variant))
    return type(config).from_dict(values)


def _changed(config: PreTrainedConfig, variant: str) -> dict[str, Any]:
    """The fields of a config and its parts that differ."""
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    depth = next((values[name] for name in _DEPTH if type(values.get(name)) is int), 0)
    count = {"shallow": 3, "deep": depth + 2}.get(variant, depth)
    changed: dict[str, Any] = {}
    for name, value in values.items():
        kind = _kind_of(name)
        if isinstance(value, PreTrainedConfig):
            changed[name] = _changed(value, variant)
        elif variant == "wide":
            least = {"width": 16, "ffn": 16, "heads": 2, "kv_heads": 2}.get(kind or "")
            if type(value) is int and least is not None and value >= least:
                changed[name] = 2 * value
            elif type(value) is int and kind == "vocab":
                changed[name] = value + 40
        elif kind == "depths" and isinstance(value, list | tuple):
            changed[name] = [1 if variant == "shallow" else each + 1 for each in value]
        elif _is_staged(values) or depth <= 3:
            continue
        elif name in _DEPTH and value == depth:
            changed[name] = count
        elif isinstance(value, list | tuple) and len(value) == depth and name != "stage_names":
            numbers = all(type(each) is int for each in value) and name.endswith("_layers") and max(value) > 1
            turned = [*value] if variant == "shallow" else [*value[::-1], *value]
            changed[name] = list(range(count)) if numbers else turned[:count]
    return changed


def _is_staged(values: dict[str, Any]) -> bool:
    return any(_kind_of(name) == "depths" and isinstance(value, list | tuple) for name, value in values.items())


def _change(values: dict[str, Any], changed: dict[str, Any]) -> None:
    for name, value in changed.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            _change(values[name], value)
        elif not isinstance(value, dict):
            values[name] = value
