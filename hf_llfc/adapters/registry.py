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

# Module of this package and function in it → the model types whose permutation spec it gives.
_TABLE: dict[tuple[str, str], str] = {
    ("bart", "bart"): "bart blenderbot blenderbot-small led m2m_100 marian mbart pegasus plbart whisper",
    ("bert", "bert"): (
        "bert blip_text_model camembert chinese_clip_text_model data2vec-text electra longformer roberta xlm-roberta"
    ),
    ("bert", "distilbert"): "distilbert",
    ("blip", "blip"): "blip",
    ("blip", "vision"): "blip_vision_model",
    ("clip", "two_towers"): "chinese_clip clip metaclip_2 siglip siglip2",
    ("clip", "vision"): (
        "chinese_clip_vision_model clip_vision_model metaclip_2_vision_model siglip2_vision_model siglip_vision_model"
    ),
    ("clip", "text"): "clip_text_model metaclip_2_text_model siglip2_text_model siglip_text_model",
    ("deberta", "deberta"): "deberta",
    ("deberta", "deberta_v2"): "deberta-v2",
    ("encoder_decoder", "encoder_decoder"): "encoder-decoder speech-encoder-decoder vision-encoder-decoder",
    ("esm", "esm"): "esm",
    ("gpt", "gpt"): "bloom dbrx falcon gpt_neox",
    ("gpt2", "gpt2"): "gpt-sw3 gpt2",
    ("llama", "llama"): (
        "arcee cohere cohere2 cwm deepseek_v2 deepseek_v3 deepseek_v32 diffllama dots1 emu3_text_model ernie4_5 "
        "exaone4 gemma gemma2 gemma3_text glm glm4 glm4_moe glm4_moe_lite glm4v_moe_text glm4v_text glm_image_text "
        "glm_moe_dsa glm_ocr_text gpt_oss granite granite4_vision_text granite_docling_text helium hunyuan_v1_dense "
        "hyperclovax internlm3 iquestcoder jais2 jetmoe llama mellum mimo_v2_flash minicpm3 ministral ministral3 "
        "mistral mixtral nanochat nemotron olmo olmo2 olmo3 olmoe paddleocr_vl_text persimmon phi phi3 phimoe qwen2 "
        "qwen2_5_omni_text qwen2_5_vl_text qwen2_moe qwen2_vl_text qwen3 qwen3_moe qwen3_omni_moe_text "
        "qwen3_vl_moe_text qwen3_vl_text seed_oss smollm3 solar_open stablelm starcoder2 unlimited_ocr_text "
        "vaultgemma youtu"
    ),
    ("llava", "llava"): "gemma3 llava llava_next llava_next_video llava_onevision paligemma",
    ("modernbert", "modernbert"): "modernbert",
    ("qwen2_vl", "qwen2_vl"): "qwen2_5_vl qwen2_vl qwen3_vl",
    ("recurrent", "falcon_h1"): "falcon_h1",
    ("recurrent", "minimax"): "minimax",
    ("recurrent", "qwen3_next"): "qwen3_5_moe_text qwen3_5_text qwen3_next",
    ("resnet", "resnet"): "resnet",
    ("t5", "t5"): "longt5 mt5 t5 umt5",
    ("vit", "vit"): "deit dinov2 dinov2_with_registers ijepa vit vit_msn",
    ("wav2vec2", "wav2vec2"): "data2vec-audio hubert wav2vec2 wavlm",
}

FAMILIES: dict[str, tuple[str, str]] = {
    model_type: function for function, model_types in _TABLE.items() for model_type in model_types.split()
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
