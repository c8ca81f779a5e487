"""The registry of adapters: `config.model_type` → function from a config to its permutation spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

from hf_llfc.errors import SpecError, suggest
from hf_llfc.symmetry.spec import PermutationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hf_llfc.symmetry.canonical import CanonicalForm

    Adapter = Callable[[PreTrainedConfig], PermutationSpec]
    Form = Callable[[PreTrainedConfig], CanonicalForm]

# One row a model type: the module of this package, and the function in it.
FAMILIES: dict[str, tuple[str, str]] = {
    "albert": ("albert", "albert"),
    "bart": ("bart", "bart"),
    "blenderbot": ("bart", "bart"),
    "blenderbot-small": ("bart", "bart"),
    "led": ("bart", "bart"),
    "m2m_100": ("bart", "bart"),
    "marian": ("bart", "bart"),
    "mbart": ("bart", "bart"),
    "pegasus": ("bart", "bart"),
    "plbart": ("bart", "bart"),
    "speech_to_text": ("bart", "bart"),
    "whisper": ("bart", "bart"),
    "bert": ("bert", "bert"),
    "bert-generation": ("bert", "bert"),
    "big_bird": ("bert", "bert"),
    "blip_text_model": ("bert", "bert"),
    "camembert": ("bert", "bert"),
    "chinese_clip_text_model": ("bert", "bert"),
    "data2vec-text": ("bert", "bert"),
    "distilbert": ("bert", "distilbert"),
    "electra": ("bert", "bert"),
    "ernie": ("bert", "bert"),
    "layoutlm": ("bert", "bert"),
    "longformer": ("bert", "bert"),
    "megatron-bert": ("bert", "bert"),
    "roberta": ("bert", "bert"),
    "roberta-prelayernorm": ("bert", "bert"),
    "xlm-roberta": ("bert", "bert"),
    "xlm-roberta-xl": ("bert", "bert"),
    "blip": ("blip", "blip"),
    "blip_vision_model": ("blip", "vision"),
    "chinese_clip": ("clip", "two_towers"),
    "chinese_clip_vision_model": ("clip", "vision"),
    "clip": ("clip", "two_towers"),
    "clip_text_model": ("clip", "text"),
    "clip_vision_model": ("clip", "vision"),
    "metaclip_2": ("clip", "two_towers"),
    "metaclip_2_text_model": ("clip", "text"),
    "metaclip_2_vision_model": ("clip", "vision"),
    "siglip": ("clip", "two_towers"),
    "siglip2": ("clip", "two_towers"),
    "siglip2_text_model": ("clip", "text"),
    "siglip2_vision_model": ("clip", "vision"),
    "siglip_text_model": ("clip", "text"),
    "siglip_vision_model": ("clip", "vision"),
    "convnext": ("convnext", "convnext"),
    "convnextv2": ("convnext", "convnext"),
    "deberta": ("deberta", "deberta"),
    "deberta-v2": ("deberta", "deberta_v2"),
    "efficientnet": ("efficientnet", "efficientnet"),
    "encoder-decoder": ("encoder_decoder", "encoder_decoder"),
    "speech-encoder-decoder": ("encoder_decoder", "encoder_decoder"),
    "vision-encoder-decoder": ("encoder_decoder", "encoder_decoder"),
    "esm": ("esm", "esm"),
    "gemma3n_text": ("gemma", "gemma3n"),
    "gemma4_text": ("gemma", "gemma4"),
    "biogpt": ("gpt", "biogpt"),
    "bloom": ("gpt", "bloom"),
    "codegen": ("gpt", "codegen"),
    "ctrl": ("gpt", "ctrl"),
    "dbrx": ("gpt", "dbrx"),
    "falcon": ("gpt", "falcon"),
    "gpt_bigcode": ("gpt", "gpt_bigcode"),
    "gpt_neo": ("gpt", "gpt_neo"),
    "gpt_neox": ("gpt", "gpt_neox"),
    "gpt_neox_japanese": ("gpt", "gpt_neox_japanese"),
    "gptj": ("gpt", "gptj"),
    "mpt": ("gpt", "mpt"),
    "openai-gpt": ("gpt", "openai_gpt"),
    "opt": ("gpt", "opt"),
    "xglm": ("gpt", "xglm"),
    "gpt-sw3": ("gpt2", "gpt2"),
    "gpt2": ("gpt2", "gpt2"),
    "afmoe": ("llama", "llama"),
    "apertus": ("llama", "llama"),
    "arcee": ("llama", "llama"),
    "aria_text": ("llama", "llama"),
    "axk1": ("llama", "llama"),
    "bitnet": ("llama", "llama"),
    "cohere": ("llama", "llama"),
    "cohere2": ("llama", "llama"),
    "cohere2_moe": ("llama", "llama"),
    "cwm": ("llama", "llama"),
    "deepseek_v2": ("llama", "llama"),
    "deepseek_v3": ("llama", "llama"),
    "deepseek_v32": ("llama", "llama"),
    "diffllama": ("llama", "llama"),
    "dots1": ("llama", "llama"),
    "emu3_text_model": ("llama", "llama"),
    "ernie4_5": ("llama", "llama"),
    "ernie4_5_moe": ("llama", "llama"),
    "exaone4": ("llama", "llama"),
    "exaone_moe": ("llama", "llama"),
    "flex_olmo": ("llama", "llama"),
    "gemma": ("llama", "llama"),
    "gemma2": ("llama", "llama"),
    "gemma3_text": ("llama", "llama"),
    "glm": ("llama", "llama"),
    "glm4": ("llama", "llama"),
    "glm4_moe": ("llama", "llama"),
    "glm4_moe_lite": ("llama", "llama"),
    "glm4v_moe_text": ("llama", "llama"),
    "glm4v_text": ("llama", "llama"),
    "glm_image_text": ("llama", "llama"),
    "glm_moe_dsa": ("llama", "llama"),
    "glm_ocr_text": ("llama", "llama"),
    "gpt_oss": ("llama", "llama"),
    "granite": ("llama", "llama"),
    "granite4_vision_text": ("llama", "llama"),
    "granite_docling_text": ("llama", "llama"),
    "granite_swa": ("llama", "llama"),
    "granitemoe": ("llama", "llama"),
    "granitemoe_swa": ("llama", "llama"),
    "granitemoeshared": ("llama", "llama"),
    "helium": ("llama", "llama"),
    "hunyuan_v1_dense": ("llama", "llama"),
    "hunyuan_v1_moe": ("llama", "llama"),
    "hy_v3": ("llama", "llama"),
    "hyperclovax": ("llama", "llama"),
    "internlm3": ("llama", "llama"),
    "iquestcoder": ("llama", "llama"),
    "jais2": ("llama", "llama"),
    "jetmoe": ("llama", "llama"),
    "llama": ("llama", "llama"),
    "llama4_text": ("llama", "llama"),
    "mellum": ("llama", "llama"),
    "mimo_v2_flash": ("llama", "llama"),
    "minicpm3": ("llama", "llama"),
    "minimax_m2": ("llama", "llama"),
    "ministral": ("llama", "llama"),
    "ministral3": ("llama", "llama"),
    "mistral": ("llama", "llama"),
    "mixtral": ("llama", "llama"),
    "nanochat": ("llama", "llama"),
    "nemotron": ("llama", "llama"),
    "olmo": ("llama", "llama"),
    "olmo2": ("llama", "llama"),
    "olmo3": ("llama", "llama"),
    "olmoe": ("llama", "llama"),
    "paddleocr_vl_text": ("llama", "llama"),
    "persimmon": ("llama", "llama"),
    "phi": ("llama", "llama"),
    "phi3": ("llama", "llama"),
    "phimoe": ("llama", "llama"),
    "qwen2": ("llama", "llama"),
    "qwen2_5_omni_text": ("llama", "llama"),
    "qwen2_5_vl_text": ("llama", "llama"),
    "qwen2_moe": ("llama", "llama"),
    "qwen2_vl_text": ("llama", "llama"),
    "qwen3": ("llama", "llama"),
    "qwen3_moe": ("llama", "llama"),
    "qwen3_omni_moe_text": ("llama", "llama"),
    "qwen3_vl_moe_text": ("llama", "llama"),
    "qwen3_vl_text": ("llama", "llama"),
    "seed_oss": ("llama", "llama"),
    "smollm3": ("llama", "llama"),
    "solar_open": ("llama", "llama"),
    "stablelm": ("llama", "llama"),
    "starcoder2": ("llama", "llama"),
    "unlimited_ocr_text": ("llama", "llama"),
    "vaultgemma": ("llama", "llama"),
    "youtu": ("llama", "llama"),
    "gemma3": ("llava", "llava"),
    "llava": ("llava", "llava"),
    "llava_next": ("llava", "llava"),
    "llava_next_video": ("llava", "llava"),
    "llava_onevision": ("llava", "llava"),
    "paligemma": ("llava", "llava"),
    "mobilenet_v2": ("mobilenet", "mobilenet_v2"),
    "modernbert": ("modernbert", "modernbert"),
    "mpnet": ("mpnet", "mpnet"),
    "qwen2_5_vl": ("qwen2_vl", "qwen2_vl"),
    "qwen2_vl": ("qwen2_vl", "qwen2_vl"),
    "qwen3_vl": ("qwen2_vl", "qwen2_vl"),
    "bamba": ("recurrent", "bamba"),
    "falcon_h1": ("recurrent", "falcon_h1"),
    "falcon_mamba": ("recurrent", "mamba"),
    "granitemoehybrid": ("recurrent", "granitemoehybrid"),
    "jamba": ("recurrent", "jamba"),
    "lfm2": ("recurrent", "lfm2"),
    "lfm2_moe": ("recurrent", "lfm2"),
    "mamba": ("recurrent", "mamba"),
    "mamba2": ("recurrent", "mamba2"),
    "minimax": ("recurrent", "minimax"),
    "nemotron_h": ("recurrent", "nemotron_h"),
    "qwen3_5_moe_text": ("recurrent", "qwen3_next"),
    "qwen3_5_text": ("recurrent", "qwen3_next"),
    "qwen3_next": ("recurrent", "qwen3_next"),
    "recurrent_gemma": ("recurrent", "recurrent_gemma"),
    "rwkv": ("recurrent", "rwkv"),
    "xlstm": ("recurrent", "xlstm"),
    "regnet": ("regnet", "regnet"),
    "resnet": ("resnet", "resnet"),
    "segformer": ("segformer", "segformer"),
    "swin": ("swin", "swin"),
    "swinv2": ("swin", "swin"),
    "longt5": ("t5", "t5"),
    "mt5": ("t5", "t5"),
    "t5": ("t5", "t5"),
    "umt5": ("t5", "t5"),
    "audio-spectrogram-transformer": ("vit", "vit"),
    "beit": ("vit", "vit"),
    "data2vec-vision": ("vit", "vit"),
    "deit": ("vit", "vit"),
    "dinov2": ("vit", "vit"),
    "dinov2_with_registers": ("vit", "vit"),
    "dinov3_vit": ("vit", "vit"),
    "ijepa": ("vit", "vit"),
    "vit": ("vit", "vit"),
    "vit_mae": ("vit", "vit"),
    "vit_msn": ("vit", "vit"),
    "yolos": ("vit", "vit"),
    "data2vec-audio": ("wav2vec2", "wav2vec2"),
    "hubert": ("wav2vec2", "wav2vec2"),
    "wav2vec2": ("wav2vec2", "wav2vec2"),
    "wavlm": ("wav2vec2", "wav2vec2"),
}

_HOW_TESTED = "verified on tiny models of every head with random weights, in float64 (docs/model_types.md)"

_registered: dict[str, tuple[Adapter, Form | None]] = {}


def register_adapter(model_type: str, adapter: Adapter, *, form: Form | None = None) -> None:
    """Registers the adapter of a user's own architecture.

    Args:
        model_type: As in the config.
        adapter: From a config to its permutation spec, see `hf_llfc.adapters.declare`.
        form: From a config to its canonical form, for `groups: full`; without it there are permutations only. See
            `hf_llfc.adapters.canonical_forms.scaled`.

    Raises:
        SpecError: The model type already has an adapter.
    """
    if model_type in FAMILIES or _registered.get(model_type, (adapter, form)) != (adapter, form):
        raise SpecError(f"model type {model_type!r} already has an adapter")
    _registered[model_type] = (adapter, form)


def registered_form(model_type: str) -> Form | None:
    """The canonical form of a user's own architecture, if there is one."""
    return _registered[model_type][1] if model_type in _registered else None


def known_model_types() -> list[str]:
    """Every model type with an adapter, sorted; the specs of all others are derived."""
    return sorted({*FAMILIES, *_registered})


def spec_for(config: PreTrainedConfig) -> PermutationSpec:
    """Builds the permutation spec of a config: by its adapter, or derived from the model where there is none.

    Args:
        config: A Hugging Face model config.

    Raises:
        SpecError: The model type has no adapter, and its spec cannot be derived.
    """
    model_type = config.model_type
    if model_type in _registered:
        return _registered[model_type][0](config)
    if model_type in FAMILIES:
        module, function = FAMILIES[model_type]
        spec: PermutationSpec = getattr(import_module(f"hf_llfc.adapters.families.{module}"), function)(config)
        return replace(spec, notes=(_HOW_TESTED,))
    from hf_llfc.adapters.derived import derived_spec

    try:
        return derived_spec(config)
    except SpecError as error:
        raise SpecError(
            f"no adapter for model type {model_type!r}{suggest(model_type, known_model_types())}, and none can be "
            f"derived: {error}. Models of this type can still be merged by equal tensor names with `--align none`; "
            "hf_llfc.register_adapter adds a spec of your own"
        ) from error
