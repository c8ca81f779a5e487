"""Valid inputs for any model, made from the signature of its forward pass and its config.

`_ALWAYS` says what an argument is filled with wherever a forward pass has it, `_IF_REQUIRED` what it is filled with
only where it has no default, `_OF_TYPE` what single model types want otherwise. Arguments of no table keep their
default. Only config and signature are read, and the number of image and audio features that the model's own
`get_image_features` and its like hand out, so that as many placeholder tokens stand in the text.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_llfc.adapters.derived import builders as make
from hf_llfc.adapters.derived.answers import run
from hf_llfc.adapters.derived.builders import Builder, Request
from hf_llfc.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def sample_inputs(model: PreTrainedModel, *, seed: int = 0, batch_size: int = 2) -> dict[str, Tensor]:
    """Valid inputs of a model's forward pass that exercise every part of it.

    Args:
        model: Any model of transformers; the values of its parameters do not matter.
        seed: Of the draw.
        batch_size: Rows; the last of several is padded where the model takes a mask.

    Returns:
        Arguments by name, on the CPU, floating-point ones in the model's dtype.

    Raises:
        SpecError: No inputs can be made for a model of this type.
    """
    arguments = dict(inspect.signature(model.forward).parameters)
    request = Request(model, arguments, torch.Generator().manual_seed(seed), batch_size)
    own = _OF_TYPE.get(model.config.model_type, {})
    required = {
        name
        for name, argument in arguments.items()
        if argument.default is inspect.Parameter.empty
        and argument.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    }
    names = [*(name for name in own if name not in _ALWAYS), *_ALWAYS]
    names += [name for name in _IF_REQUIRED if name in required and name not in names]
    for name in names:
        builder = own[name] if name in own else _ALWAYS.get(name) or _IF_REQUIRED.get(name)
        if name not in arguments or builder is None:
            continue
        try:
            value = builder(request)
        except SpecError:
            raise
        except Exception as error:
            raise _failure(request, f"no value for {name}: {type(error).__name__}: {error}") from error
        if value is not None:
            request.made[name] = value
    missing = required - set(request.made)
    if missing:
        raise _failure(request, f"no value can be made for {', '.join(sorted(missing))}")
    if not request.made:
        raise _failure(request, f"none of its arguments can be made: {', '.join(arguments)}")
    return _for_head(model, request.made)


def _for_head(model: PreTrainedModel, made: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs in the form that some heads ask for: two choices a row, the end of a text that the decoder reads too."""
    head = type(model).__name__
    if "MultipleChoice" in head:
        return {name: value[:, None].repeat_interleave(2, dim=1) for name, value in made.items()}
    if "SequenceClassification" in head and "decoder_input_ids" in made:
        made = {name: value for name, value in made.items() if not name.startswith("decoder_")}
        made["input_ids"][made["input_ids"] == model.config.eos_token_id] = 5
        made["input_ids"][:, -1] = model.config.eos_token_id
    return made


def forward(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point outputs of one pass in evaluation mode, without a cache.

    Args:
        model: Any model; it is left in evaluation mode.
        inputs: As `sample_inputs` makes them.

    Returns:
        Every floating-point tensor of the output by its path, for example ``"logits"`` or ``"backbone_features.1"``.
    """
    return dict(_tensors(run(model, inputs), ""))


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield path or "output", value
        return
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for name, inner in items:
        yield from _tensors(inner, f"{path}.{name}" if path else str(name))


def _failure(request: Request, what: str) -> SpecError:
    return SpecError(f"model type {request.config.model_type!r}: {what} of {type(request.model).__name__}.forward")


_ALWAYS: dict[str, Builder] = {
    "grid_thw": make.grid,
    "image_grid_thw": make.grid,
    "image_sizes": lambda request: None,
    "hidden_states": lambda request: make.hidden_states(request) if "grid_thw" in request.made else None,
    "pixel_values": make.pixel_values,
    "pixel_values_videos": make.video,
    "input_values": make.normal("b 4000"),
    "input_features": make.features,
    "input_features_mask": make.features_mask,
    "feature_attention_mask": make.features_mask,
    "past_values": make.series,
    "input_ids": make.input_ids,
    "attention_mask": make.attention_mask,
    "token_type_ids": make.token_type_ids,
    "mm_token_type_ids": make.media_types,
    "bbox": make.boxes,
    "decoder_input_ids": make.decoder_input_ids,
}

_IF_REQUIRED: dict[str, Builder] = {
    "inputs_embeds": lambda request: make.normal(f"b t {request.text['hidden_size']}")(request),
    "hidden_states": make.hidden_states,
    "past_time_features": lambda request: request.normal(
        *request.made["past_values"].shape[:2], request.size("num_time_features")
    ),
    "past_observed_mask": lambda request: torch.ones_like(request.made["past_values"]),
    "qformer_input_ids": make.integers(3, "vocab_size", "b 5"),
}

# Values that several model types take.
_PLACED: dict[str, Builder | None] = {
    "pixel_values": make.placed_patches,
    "image_position_ids": make.places,
    "pixel_position_ids": make.places,
    "pixel_values_videos": None,
}
_SUBSAMPLED: dict[str, Builder | None] = {"input_features": make.normal("b 64 subsampling_conv_channels?")}
_VIDEO: dict[str, Builder | None] = {
    "pixel_values": lambda request: make.normal(f"b {make.frame_count(request)} c hw")(request)
}
_WITH_QFORMER: dict[str, Builder | None] = {
    "qformer_input_ids": make.integers(3, "qformer_config.vocab_size", "b 5"),
    "qformer_attention_mask": make.filled(1, "b 5"),
}
_QFORMER: dict[str, Builder | None] = {
    "query_embeds": make.normal("b t hidden_size"),
    "encoder_hidden_states": make.normal("b t encoder_hidden_size"),
}

# The model types of a row, and what they want otherwise; an argument that is None keeps its default.
_ROWS: dict[str, dict[str, Builder | None]] = {
    "audio-spectrogram-transformer": {"input_values": make.normal("b max_length num_mel_bins")},
    "autoformer informer time_series_transformer": {
        "future_values": make.normal("b prediction_length"),
        "future_time_features": make.normal("b prediction_length num_time_features"),
    },
    "blip_2_qformer": _QFORMER,
    "bridgetower_vision_model": {"image": make.pixel_values},
    "canary_decoder": {"encoder_hidden_states": make.normal("b t cross_attention_hidden_size|hidden_size|d_model")},
    "canine": {"input_ids": make.integers(10, 1000, "b 40")},
    "clap clap_audio_model": {"input_features": make.normal("b 1 64 num_mel_bins")},
    "clvp": {"input_features": make.normal("b feature_size 64")},
    "colmodernvbert idefics2 idefics3 modernvbert smolvlm ultravbert efficientloftr lightglue superglue": {
        "pixel_values": make.normal("b 2 c hw")
    },
    "dac encodec mimi mimi_encoder pe_audio pe_audio_encoder pocket_tts_audio_tokenizer "
    "pocket_tts_audio_tokenizer_encoder vibevoice_acoustic_tokenizer xcodec": {"input_values": make.normal("b 1 4000")},
    "decision_transformer": {
        "states": make.normal("b t state_dim"),
        "actions": make.normal("b t act_dim"),
        "rewards": make.normal("b t 1"),
        "returns_to_go": make.normal("b t 1"),
        "timesteps": make.rows(*range(make.LENGTH)),
    },
    "deepseek_vl_hybrid": {
        "high_res_pixel_values": make.normal("b 3 high_res_vision_config.image_size high_res_vision_config.image_size")
    },
    "depth_pro": {"pixel_values": make.normal("b 3 128 128")},
    "dia": {
        "input_ids": make.integers(1, 90, "b t"),
        "decoder_input_ids": make.integers(0, 90, "b t num_channels"),
    },
    "dia_decoder": {
        "input_ids": make.integers(0, 90, "b t num_channels"),
        "attention_mask": None,
        "encoder_hidden_states": make.normal("b t cross_hidden_size"),
    },
    "diffusion_gemma": {
        "self_conditioning_logits": lambda request: make.normal(f"b 9 {request.text['vocab_size']}")(request)
    },
    "embedding_gemma2 gemma4": {**_SUBSAMPLED, **_PLACED},
    "evolla EvollaModel": {
        "protein_input_ids": make.integers(3, 20, "b 10"),
        "protein_attention_mask": make.filled(1, "b 10"),
    },
    "fastspeech2_conformer_hifigan speecht5_hifigan": {"spectrogram": make.normal("b t model_in_dim")},
    "flava": {"codebook_pixel_values": make.normal("b 3 64 64")},
    "flava_multimodal_model": {"hidden_states": make.normal("b t hidden_size")},
    "florence_vision": {"hidden_states": make.pixel_values},
    "fun_asr_nano fun_asr_nano_encoder": {"input_features": make.normal("b 32 num_mel_bins*num_stacked_frames")},
    "fuyu neomme": {"pixel_values": make.normal("b p c*patch_size*patch_size")},
    "gemma3n_audio": {"audio_mel": make.normal("b 64 input_feat_size"), "audio_mel_mask": make.filled(False, "b 64")},
    "gemma4_audio": _SUBSAMPLED,
    "gemma4_unified": {"input_features": make.normal("b 8 audio_embed_dim?"), **_PLACED},
    "gemma4_vision": _PLACED,
    "glm_image_vqmodel": {"input": make.normal("b hidden_size 4 4")},
    "glmasr glmasr_encoder voxtral_realtime voxtral_realtime_encoder": {
        "input_features": make.normal("b num_mel_bins 64")
    },
    "granite4_vision llava_next llava_next_video llava_onevision": {
        "image_sizes": make.image_sizes,
        "pixel_values": make.tiles,
    },
    "granite_docling": {"pixel_values": make.normal("b 2 c hw"), "pixel_attention_mask": make.filled(True, "b 2")},
    "granite_speech granite_speech_plus": {
        "input_features": make.normal("b 64 input_dim"),
        "input_features_mask": None,
    },
    "granite_speech5_ctc granite_speech5_encoder": {"input_features": make.normal("b 32 4*num_mel_bins")},
    "granite_speech_encoder granite_speech_plus_encoder": {"hidden_states": make.normal("b 64 input_dim")},
    "idefics": {"pixel_values": make.normal("b 1 c hw"), "image_attention_mask": make.filled(1, "b t 1")},
    "idefics2_perceiver": {"context": make.normal("b t hidden_size"), "attention_mask": make.filled(1, "b t")},
    "inkling2 inkling2_vision": {
        "image_grid_thw": make.rows(1, *make.GRID),
        "pixel_values": make.normal("b*6 spatial_merge_size*patch_size spatial_merge_size*patch_size 3"),
    },
    "inkling_audio": {"audio_input_ids": make.integers(0, "mel_vocab_size", "b t n_mel_bins")},
    "instructblip": _WITH_QFORMER,
    "instructblip_qformer instructblipvideo_qformer": {**_QFORMER, "attention_mask": None},
    "instructblipvideo": {**_VIDEO, **_WITH_QFORMER},
    "kimi_k25 kimi_k25_vision paddleocr_vl": {"pixel_values": make.patches_of(square=True)},
    "kosmos-2": {"image_embeds_position_mask": make.latents},
    "kosmos-2.5": {"flattened_patches": make.positioned_patches, "image_embeds_position_mask": make.latents},
    "kosmos_2_5_vision_model pix2struct pix2struct_vision_model": {"flattened_patches": make.positioned_patches},
    "led longformer": {"global_attention_mask": make.rows(1, *[0] * (make.LENGTH - 1))},
    "lfm2_vl siglip2 siglip2_vision_model": {
        "pixel_values": make.normal("b p c*patch_size*patch_size"),
        "pixel_attention_mask": make.filled(1, "b p"),
        "spatial_shapes": make.SPATIAL_SHAPES,
    },
    "lighton_ocr mistral3 mistral_large4": {"image_sizes": make.image_sizes},
    "lxmert": {
        "visual_feats": make.normal("b 5 visual_feat_dim"),
        "visual_pos": lambda request: torch.rand(
            request.batch, 5, 4, generator=request.generator, dtype=torch.float64
        ).to(request.model.dtype),
    },
    "mimi_decoder pocket_tts_audio_tokenizer_decoder": {"latents": make.normal("b hidden_size t")},
    "minicpm_ocr_vision minicpmv4_6_vision minicpmv4_7_vision": {
        "pixel_values": make.normal("1 3 patch_size patch_size*b*16"),
        "target_sizes": make.rows(4, 4),
    },
    "mllama mllama_vision_model": {
        "pixel_values": make.normal("b 1 max_num_tiles c hw"),
        "aspect_ratio_ids": make.filled(1, "b 1"),
        "aspect_ratio_mask": make.filled(1, "b 1 max_num_tiles"),
        "cross_attention_mask": make.filled(1, "b t 1 max_num_tiles"),
    },
    "molmo2_vision": {"pixel_values": make.normal("b 64 48")},
    "muse_glimmer_assistant": {
        "noise_embeds": make.normal("b t hidden_size"),
        "context_hidden_states": lambda request: make.normal(
            f"b t hidden_size*{len(request.size('target_layer_ids'))}"
        )(request),
    },
    "muse_spark_audio": {"input_values": make.normal("b 3840")},
    "musicgen": {"decoder_input_ids": make.decoder_codebooks},
    "musicgen_decoder musicgen_melody_decoder": {
        "input_ids": make.integers(0, "vocab_size", "b*num_codebooks t"),
        "attention_mask": None,
    },
    "musicgen_melody": {
        "input_features": make.normal("b 64 num_chroma"),
        "decoder_input_ids": make.decoder_codebooks,
    },
    "nemotron_h_omni": {
        "image_grid_hw": make.SPATIAL_SHAPES,
        "pixel_values": make.normal("p*b 3*patch_size*patch_size"),
    },
    "neucodec xcodec2": {
        "input_values": make.normal("b 1 20480"),
        "input_features": make.normal("b 64 feature_projection_input_dim"),
    },
    "oneformer": {"task_inputs": make.integers(1, 90, "b task_seq_len")},
    "paddleocr_vl_vision": {"pixel_values": make.patches_of(1, square=True)},
    "phi4_multimodal_audio": {"hidden_states": make.normal("b 64 input_size"), "mask": make.filled(True, "b 64")},
    "pi0": {"state": make.normal("b max_state_dim")},
    "pop2piano": {"input_features": make.normal("b 64 d_model"), "input_ids": None},
    "pp_formulanet_text": {"encoder_hidden_states": make.normal("b t d_model|hidden_size")},
    "pp_ocrv5_mobile_rec": {"pixel_values": make.normal("b 3 48 320")},
    "prompt_depth_anything": {"prompt_depth": make.normal("b 1 8 8")},
    "qwen2_5_omni_audio_encoder qwen3_omni_moe_audio_encoder": {
        "feature_lens": make.filled(32, "b"),
        "aftercnn_lens": make.filled(16, "b"),
        "input_features": make.normal("num_mel_bins 32*b"),
    },
    "qwen2_5_omni_bigvgan": {"mel_spectrogram": make.normal("b mel_dim t")},
    "roc_bert": {
        "input_shape_ids": make.ordinary_tokens("shape_vocab_size"),
        "input_pronunciation_ids": make.ordinary_tokens("pronunciation_vocab_size"),
    },
    "sam sam_hq": {
        "input_points": lambda request: request.integers(0, 32, request.batch, 1, 2, 2).to(request.model.dtype),
        "input_labels": make.rows([1, 0]),
    },
    "seggpt": {"prompt_pixel_values": make.pixel_values, "prompt_masks": make.pixel_values},
    "speech_to_text": {"input_features": make.normal("b 64 input_feat_per_channel")},
    "splinter": {"input_ids": make.with_question},
    "t5gemma2_decoder": {"encoder_hidden_states": make.normal("b t hidden_size")},
    "timesfm timesfm2_5": {"past_values": make.normal("b context_length")},
    "timesformer tvp vivit xclip": _VIDEO,
    "trocr": {"encoder_hidden_states": make.normal("b t cross_attention_hidden_size|d_model")},
    "vibevoice_acoustic_tokenizer_decoder": {"hidden_states": make.normal("b hidden_size t")},
    "vibevoice_acoustic_tokenizer_encoder": {"hidden_states": make.normal("b 1 4000")},
    "video_llama_3": {"image_merge_sizes": make.merge_sizes},
    "video_llama_3_vision": {"merge_sizes": make.merge_sizes},
    "videomae": {**_VIDEO, "bool_masked_pos": make.visible},
    "visual_bert": {
        "visual_embeds": make.normal("b 5 visual_embedding_dim"),
        "visual_attention_mask": make.filled(1, "b 5"),
        "visual_token_type_ids": make.filled(1, "b 5"),
    },
    "wav2vec2-bert": {"input_features": make.normal("b 64 feature_projection_input_dim")},
    "xclip_vision_model": {"pixel_values": make.normal("b*num_frames 3 hw")},
}

_OF_TYPE = {model_type: builders for model_types, builders in _ROWS.items() for model_type in model_types.split()}
