"""A tiny config with the structure of a given one: same flags, same kinds of layers, small sizes.

What a number of a config means is read from the name of its field (`_KINDS`). Widths that are equal stay equal, also
across sub-configs, since one component's output is often another's input; widths that differ stay different, so that
a mixed-up axis changes a shape. Where this does not build, the next plan divides every width by one number instead,
which keeps every ratio.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any

import torch

from hf_llfc.adapters.model_classes import model_class_for
from hf_llfc.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["MAX_PARAMETERS", "build_on_meta", "model_class_for", "parameter_count", "shrunken"]
MAX_PARAMETERS = 5_000_000

# The kind of a field is that of the first pattern that its whole name matches; a field of no kind keeps its value.
_KINDS: tuple[tuple[str, str], ...] = (
    ("index_top_k", r"index_topk|index_topk_blocks"),
    ("keep", r".*(dropout|drop_rate|_eps|_std|_range|_loss|_coef|_cost|_weight|_act|_ratio|_ratios|_rate|rates)"),
    ("keep", r"chunk_size_feed_forward|pretraining_tp|.*(stride|strides|dilation|dilations|padding|kernel_sizes?)"),
    (
        "keep",
        r"pretrained_window_sizes|pos_emb_.*|feature_size|keypoint_decoder_dim|model_in_dim|acoustic_tokenizer_chunk_size|num_kv_shared_layers",
    ),
    ("keep", r"num_channels|in_chans|.*_per_second.*|.*ignore_index|num_labels|.*_period|.*_offset|.*factors?|hc_.*"),
    ("keep", r".*temperature.*|.*theta.*|.*_base|shortest_edge|problem_type|.*_sizes_ratio|mel_dim|.*_bins"),
    ("top_k", r"num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k|num_selected_experts|top_k_experts"),
    ("token", r".*(token_id|token_index|_token|token_ids)|(bos|eos|pad|unk|sep|cls|mask|lang)_(index|id)"),
    ("codebook", r".*codebook_size"),
    ("per_layer_input", r"hidden_size_per_layer_input"),
    ("filters", r"num_filters|n_filters"),
    ("vocoder", r"upsample_initial_channel"),
    ("n_window", r"n_window"),
    ("vocab", r".*(vocab_size|vocab_size_per_layer_input|_vocab|n_vocab|num_embeddings|num_embeds|vocab_sizes?)"),
    ("vocab", r"num_(character|bpe|wordpiece)_labels"),
    ("experts", r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_moe_experts|zero_expert_num"),
    ("groups", r"n_group|num_expert_group|n_groups|mamba_n_groups"),
    ("one", r"topk_group|first_k_dense_replace|num_dense_layers|moe_layer_start_index"),
    ("depths", r"depths|block_repeats|stage_num_blocks|blocks_per_stage|num_block_repeats|stage_numb_of_layers"),
    ("layers", r"depth|layers|n_layers?|num_blocks|.*(_layers|_num_layers|hidden_layers|_depth|layers_per_stack)"),
    ("kv_heads", r".*(num_key_value_heads|num_kv_heads|num_key_value_attention_heads|num_query_groups)"),
    ("heads", r".*(attention_heads|num_heads|n_heads?|num_key_heads|num_value_heads|_heads)"),
    ("qk_rope", r"qk_rope_head_dim"),
    ("qk_nope", r"qk_nope_head_dim"),
    ("qk_both", r"qk_head_dim"),
    ("v_head", r"v_head_dim"),
    ("mamba_head", r"mamba_d_head|mamba_headdim"),
    ("rotary", r"rotary_dim"),
    ("conv_base", r"base_channels"),
    ("head_dim", r".*(head_dim|d_kv|d_head|dim_head|kv_channels|attention_head_size|head_size)"),
    ("rank", r".*(_rank)"),
    ("state", r".*(d_state|state_size)"),
    ("ffn", r".*(intermediate_size|ffn_dim|mlp_dim|d_ff|dim_ff|ffn_hidden_size|d_inner|dff|n_inner|ffn_size)"),
    ("ffn", r".*(feedforward_dim|dim_feedforward|feed_forward_size|intermediate_size_mlp|intermediate_dim|_units)"),
    ("half", r"num_pos_feats"),
    ("image_grid", r"image_embedding_size"),
    ("image", r"(.*_)?(image_size|img_size)|spec_size"),
    ("frames", r"num_frames|frames_per_clip"),
    ("patch", r"(.*_)?patch_size"),
    ("window", r"sliding_window(_size)?|local_attention|attention_window|.*chunk_size|window_size|block_size"),
    ("positions", r".*(max_position_embeddings|_positions|max_pos_emb|n_ctx|max_seq_len|position_embedding_size)"),
    ("positions", r".*(max_2d_position_embeddings|context_length|max_length|num_position_embeddings|seq_len)"),
    ("queries", r"num_queries|num_query_tokens|num_latents|.*num_proposals|num_denoising|.*n_latents|.*query_num"),
    (
        "width",
        r".*(hidden_size|hidden_sizes|d_model|n_embd|_dim|_dims|channels|_width|_size|_sizes|features|_dimension)|hidden_size_global|dim|upsample_groups|d_latents",
    ),
    ("width", r".*(dim_per_stage|channel_list)"),
)

# The small value of kinds that need to know nothing else; `None` keeps what is already smaller.
_AT_MOST: dict[str, int] = {
    "top_k": 2,
    "experts": 4,
    "groups": 2,
    "one": 1,
    "depths": 2,
    "qk_rope": 8,
    "v_head": 12,
    "state": 8,
    "patch": 4,
    "window": 8,
    "positions": 64,
    "queries": 6,
    "codebook": 64,
    "mamba_head": 32,
    "rotary": 8,
    "conv_base": 32,
    "per_layer_input": 16,
    "filters": 8,
    "vocoder": 64,
    "n_window": 8,
    "index_top_k": 4,
    "image_grid": 8,
    "frames": 4,
}

_HIDDEN = (64, 32, 96, 48, 80, 112, 128)
_WIDTHS = (24, 40, 56, 72, 88, 104, 120, 136, 152, 168, 184, 200, 216, 232, 248, 264)
_INNER = (48, 40, 56, 72, 88, 104, 120, 136, 152, 168, 184, 200)
_VOCABULARIES = (96, 104, 112, 120, 128, 136, 144, 152, 160, 168, 176)

# The width of the residual stream of a component goes by one of these names.
_MAIN = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim", "emb_dim", "embedding_size")
_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads", "attention_heads")
_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "layers")

# Fields of encoders that repeat the width of the text model beside them.
_TO_TEXT = ("out_hidden_size", "text_hidden_size", "output_proj_dims")

# Indices of layers whose outputs are used further on.
_TAPS = (
    r".*(out_indices|visual_indexes|layers_indices|extract_layers|vision_feature_layer|target_layers|hook_ids"
    r"|state_indices|attn_indexes|attention_blocks|block_indexes|block_indices)"
)

# Lists that may have as many entries as there are layers, and are none of them layer by layer.
_NOT_BY_LAYER = (
    r"stage_names|(.*_)?(tubelet|patch|image|img|kernel|window|grid|crop)_sizes?|.*(mean|std|strides?|padding)"
)

# Sections of rotary embeddings that a modelling file has as its own default, for heads of the config's default size.
_SECTIONS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text"), (16, 24, 24)),
    "ernie4_5_vl_moe_text": (22, 22, 20),
    **dict.fromkeys(("glm4v_text", "glm4v_moe_text", "glm_image_text", "glm_ocr_text"), (8, 12, 12)),
}

# Fields that are a multiple of another one in a way that only the modelling file knows.
_MULTIPLES: dict[str, dict[str, tuple[str, int]]] = {
    "clap_audio_model": {"hidden_size": ("patch_embeds_hidden_size", 8)},
    "glmasr_encoder": {"intermediate_size": ("hidden_size", 4)},
    "llama4_vision_model": {
        "intermediate_size": ("hidden_size", 4),
        "vision_output_dim": ("projector_output_dim", 1),
    },
    "mllama_vision_model": {"vision_output_dim": ("hidden_size", 6)},
    "voxtral_encoder": {"intermediate_size": ("hidden_size", 4)},
}

# Fields of single model types that the names above would get wrong, as `field: value`.
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 320},
    "align_vision_model": {"width_coefficient": 0.25, "hidden_dim": 320},
    "aria": {"projector_patch_to_query_dict": {64: 6}},
    "bit": {"num_groups": 4},
    "clap_audio_model": {"spec_size": 128, "num_mel_bins": 32},
    "clvp": {"projection_dim": 128},
    "clvp_encoder": {"hidden_size": 128, "projection_dim": 128},
    "codegen": {"n_head": 8, "rotary_dim": 4},
    "depth_pro": {"patch_size": 32, "intermediate_hook_ids": (1, 0)},
    "efficientnet": {"width_coefficient": 0.25, "hidden_dim": 320},
    "falcon_h1": {"mamba_d_ssm": 32},
    "gemma3": {"mm_tokens_per_image": 16},
    "glm5_next_text": {"index_topk": 4, "index_kpool": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granite_speech": {"window_size": 15},
    "granite_speech_plus": {"window_size": 15},
    "hiera": {"patch_size": (7, 7), "image_size": (64, 64)},
    "layoutlmv3": {
        "hidden_size": 96,
        "coordinate_size": 16,
        "shape_size": 16,
        "input_size": 32,
    },
    "levit": {"patch_size": 16, "image_size": 128},
    "lilt": {"hidden_size": 96},
    "lw_detr_vit": {"num_windows": 4},
    "mobilevit": {"image_size": 128},
    "mobilevitv2": {"image_size": 128},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "perceiver": {"num_self_attends_per_block": 2, "d_latents": 32},
    "pp_lcnet_v3": {"scale": 0.25},
    "regnet": {"groups_width": 8},
    "sam2_hiera_det_model": {"global_attention_blocks": [4], "window_size_per_stage": [4, 2, 4, 2]},
    "sam2_prompt_encoder": {"patch_size": 16, "image_size": 64},
    "sam2_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "seggpt": {
        "num_hidden_layers": 6,
        "intermediate_hidden_state_indices": (2, 3, 4, 5),
        "merge_index": 1,
        "image_size": (64, 32),
    },
    "shieldgemma2": {"mm_tokens_per_image": 16},
    "t5gemma2_encoder": {"mm_tokens_per_image": 16},
    "vibevoice_acoustic_tokenizer": {"num_filters": 2},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 2},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "vipllava": {"vision_feature_layers": [-1, -2, -1, -2, 1]},
    "vitpose_backbone": {"patch_size": [8, 8], "image_size": [64, 64]},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}


def shrunken(config: PreTrainedConfig) -> PreTrainedConfig:
    """A tiny config of the same structure.

    Args:
        config: Any model config; it is left as it is.

    Returns:
        A config of the same type whose model has fewer than `MAX_PARAMETERS` parameters: sizes are small, while all
        flags, every kind of layer, and grouped queries where there were any are kept.

    Raises:
        SpecError: No model can be built from what the plans make of the config.
    """
    problems = []
    for plan, divisor in (("small sizes", None), ("widths / 16", 16), ("widths / 8", 8), ("widths as they are", 1)):
        try:
            small = _rebuilt(config, _Sizes(config, divisor))
            count = parameter_count(build_on_meta(small))
        except SpecError:
            raise
        except Exception as error:  # whatever a modelling file raises means that this plan does not fit
            problems.append(f"{plan}: {type(error).__name__}: {error}")
            continue
        if count < MAX_PARAMETERS:
            return small
        problems.append(f"{plan}: {count} parameters, more than {MAX_PARAMETERS}")
    raise SpecError(
        f"model type {config.model_type!r}: no tiny model of its structure can be built\n  " + "\n  ".join(problems)
    )


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device: structure and shapes without memory."""
    model_class = model_class_for(config)
    with torch.device("meta"):
        return model_class._from_config(copy.deepcopy(config))


def parameter_count(model: PreTrainedModel) -> int:
    """The number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _kind_of(name: str) -> str | None:
    return next((kind for kind, pattern in _KINDS if re.fullmatch(pattern, name)), None)


def _is_config(value: object) -> bool:
    from transformers import PreTrainedConfig

    return isinstance(value, PreTrainedConfig)


def _components(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """A config and its sub-configs at any depth, the text model's first."""
    below = [value for value in vars(config).values() if _is_config(value)]
    below.sort(key=lambda part: "text" not in part.model_type)
    return [config, *(inner for part in below for inner in _components(part))]


def _first(values: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if isinstance(values.get(name), int) and values[name]), None)


class _Sizes:
    """The small size of every size in a tree of configs."""

    def __init__(self, config: PreTrainedConfig, divisor: int | None):
        self.divisor = divisor
        self.widths: dict[int, int] = {}
        self.stages: dict[int, int] = {}
        self.inner: dict[int, int] = {}
        self.ranks: dict[int, int] = {}
        self.vocabularies: dict[int, int] = {}
        self.tokens: dict[int, int] = {}
        hidden = iter(_HIDDEN)
        for part in _components(config):
            for main in [vars(part)[name] for name in _MAIN if type(vars(part).get(name)) is int]:
                if main <= 16 or main in self.widths:
                    continue
                staged = any(isinstance(vars(part).get(name), list | tuple) for name in ("depths", "num_heads"))
                self.widths[main] = 16 if staged else next(hidden, 64)
        self._pools = {name: iter(pool) for name, pool in (("w", _WIDTHS), ("i", _INNER), ("v", _VOCABULARIES))}

    def width(self, value: int) -> int:
        if value <= 16:
            return value
        if self.divisor:
            return value // self.divisor if value % self.divisor == 0 and value > self.divisor else value
        if value in self.stages:
            return self.stages[value]
        if value not in self.widths and value % 4 == 0 and value // 4 in self.widths:
            self.widths[value] = 4 * self.widths[value // 4]  # four merged patches
        if value not in self.widths:
            self.widths[value] = next(self._pools["w"], 272)
        return self.widths[value]

    def stage_widths(self, values: list[int]) -> list[int]:
        if self.divisor:
            return [value // self.divisor if min(values) > self.divisor else value for value in values]
        if all(value in self.stages for value in values):
            return [self.stages[value] for value in values]
        if all(value in self.widths for value in values):
            return [self.widths[value] for value in values]
        known = next((value for value in values if value in self.stages), None)
        common = math.gcd(*values)
        for value in values:
            if value not in self.stages:
                if known is not None and value * self.stages[known] % known == 0:
                    self.stages[value] = value * self.stages[known] // known
                else:
                    self.stages[value] = value // common * min(common, 8)
        return [self.stages[value] for value in values]

    def ffn(self, value: int) -> int:
        if value <= 16:
            return value
        if self.divisor:
            return self.width(value)
        if value not in self.inner:
            self.inner[value] = next(self._pools["i"], 208)
        return self.inner[value]

    def rank(self, value: int) -> int:
        return self.ranks.setdefault(value, min(value, 20 + 4 * len(self.ranks)))

    def vocabulary(self, value: int) -> int:
        if value <= 64:
            return value
        if value not in self.vocabularies:
            self.vocabularies[value] = next(self._pools["v"], 184)
        return self.vocabularies[value]

    def token(self, value: int) -> int:
        if value < 48:
            return value
        return self.tokens.setdefault(value, max(48, 95 - len(self.tokens)))


def _rebuilt(config: PreTrainedConfig, sizes: _Sizes, least: int = 2) -> PreTrainedConfig:
    """The config anew with small sizes, so that its own checks and derived values hold."""
    values = {name: value for name, value in vars(config).items() if not name.startswith("_") or name == "_out_indices"}
    small = {name: copy.deepcopy(value) for name, value in values.items()}
    # Each of the first layers of the text model takes features of one layer of the vision model.
    vision = vars(values["vision_config"]) if _is_config(values.get("vision_config")) else {}
    deepstack = max(2, len(vision.get("deepstack_visual_indexes") or ()))
    for name, value in values.items():
        if _is_config(value):
            small[name] = _rebuilt(value, sizes, deepstack if name == "text_config" else 2)
    heterogeneity = vars(config).get("_heterogeneity_spec")
    small.update(_layers(values, heterogeneity.per_layer_overrides if heterogeneity else {}, least))
    # Lists first: the widths of stages settle what single widths that equal one of them become.
    for name, value in sorted(values.items(), key=lambda item: not isinstance(item[1], list | tuple)):
        if name not in small or isinstance(value, bool) or name == "architectures":
            continue
        kind = _kind_of(name)
        if kind in (None, "keep", "layers"):
            continue
        if isinstance(value, int):
            small[name] = _small(kind, name, value, values, sizes)
        elif isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
            small[name] = type(value)(_small_list(kind, name, list(small[name]), values, sizes))
    if "per_layer_config" in small:
        small["per_layer_config"] = {
            index: {name: _overridden(name, value, values, small, sizes) for name, value in layer.items()}
            for index, layer in small["per_layer_config"].items()
        }
    _rope(values, small, config.model_type)
    _towards_text(small)
    _pinpoints(values, small)
    for name, (field, times) in _MULTIPLES.get(config.model_type, {}).items():
        small[name] = times * small[field]
    small.update(_EXCEPTIONS.get(config.model_type, {}))

    config_class = type(config)
    fields = {field.name for field in dataclasses.fields(config_class)}
    stored = {name: config_class.attribute_map.get(name, name) for name in fields}
    given = {name: small[stored[name]] for name in fields if stored[name] in small}
    if "per_layer_config" in small:
        given["per_layer_config"] = small.pop("per_layer_config")
    if "_out_indices" in vars(config) and "_out_features" in vars(config):
        given["out_indices"] = small.get("_out_indices") or list(vars(config)["_out_indices"])
    rebuilt = config_class(**given)
    for name, value in small.items():
        if name not in stored.values() and name not in vars(rebuilt) and not name.startswith("_"):
            setattr(rebuilt, name, value)
    for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
        vars(rebuilt)[name] = vars(config).get(name)
    rebuilt.architectures = config.architectures
    return rebuilt


def _overridden(name: str, value: Any, values: dict[str, Any], small: dict[str, Any], sizes: _Sizes) -> Any:
    """The small value of a field that differs in some layers, in the proportion it has to that of the others."""
    if type(value) is not int or not isinstance(values.get(name), int):
        return value
    if _kind_of(name) == "experts":
        return _small("experts", name, value, values, sizes)
    proportional = value * small[name] / values[name]
    return max(1, int(proportional)) if proportional <= 4 * small[name] else small[name] * 4


def _towards_text(small: dict[str, Any]) -> None:
    """What an encoder of images or audio hands to the text model is as wide as that."""
    if not _is_config(small.get("text_config")):
        return
    hidden = _first(vars(small["text_config"]), _MAIN)
    for part in small.values():
        if _is_config(part) and part is not small["text_config"]:
            for name in _TO_TEXT:
                if vars(part).get(name):
                    setattr(part, name, hidden)


def _pinpoints(values: dict[str, Any], small: dict[str, Any]) -> None:
    """Sizes of images that are cut into tiles, in multiples of a tile."""
    pinpoints = values.get("image_grid_pinpoints")
    if pinpoints and _is_config(small.get("vision_config")):
        old, new = (vars(tree["vision_config"]).get("image_size") for tree in (values, small))
        if isinstance(old, int) and isinstance(new, int):
            small["image_grid_pinpoints"] = [[side * new // old for side in sides] for sides in pinpoints]


def _small(kind: str | None, name: str, value: int, values: dict[str, Any], sizes: _Sizes) -> int:
    stages = next(
        (len(values[name]) for name in ("depths", "num_heads") if isinstance(values.get(name), list | tuple)), 0
    )
    if kind == "window" and name == "window_size" and stages:
        return min(value, 2)
    if kind in _AT_MOST:
        return min(value, _AT_MOST[kind])
    if kind == "token":
        return sizes.token(value)
    if kind == "vocab":
        return sizes.vocabulary(value)
    if kind == "ffn":
        return sizes.ffn(value)
    if kind == "rank":
        return sizes.rank(value)
    if kind == "width":
        return sizes.width(value)
    if kind == "half":
        return sizes.width(2 * value) // 2
    heads, hidden = _first(values, _HEADS), _first(values, _MAIN)
    if sizes.divisor and kind in ("heads", "kv_heads"):
        return value
    if sizes.divisor and kind == "head_dim":
        return max(2, value // sizes.divisor)
    if kind == "heads":
        return min(value, 4)
    if kind == "kv_heads":
        of = values.get(re.sub("key_value_heads|kv_heads", "attention_heads", name), heads)
        return value if value == 1 else min(value, 4 if value == of else 2)
    if kind in ("qk_nope", "qk_both"):
        rope, nope = values.get("qk_rope_head_dim") or 0, values.get("qk_nope_head_dim") or 0
        small_nope = min(nope, 8 if nope == rope else 16)
        return small_nope if kind == "qk_nope" else small_nope + min(rope, 8)
    if kind == "head_dim":
        if name == "head_dim" and value and value in (values.get("qk_rope_head_dim"), values.get("qk_head_dim")):
            rotary = value == values.get("qk_rope_head_dim")
            return _small("qk_rope" if rotary else "qk_both", name, value, values, sizes)
        if value == 0 or name != "head_dim":
            return min(value, 16)
        if heads and hidden and heads * value == hidden:
            return sizes.width(hidden) // min(heads, 4)
        return 32
    if kind == "image":
        patch = values.get("patch_size")
        if isinstance(patch, list | tuple):
            patch = patch[-1]
        if isinstance(patch, int) and isinstance(values.get("window_size"), int) and stages:
            return min(value, min(patch, 4) * min(values["window_size"], 2) * 2 ** (stages - 1))
        return min(value, 8 * min(patch, 4) if isinstance(patch, int) else 64)
    return value


def _small_list(kind: str | None, name: str, items: list[int], values: dict[str, Any], sizes: _Sizes) -> list[int]:
    if kind == "width":
        return sizes.stage_widths(items) if len(items) > 1 else [sizes.width(item) for item in items]
    if kind == "heads" and not sizes.divisor:
        common = math.gcd(*items)
        return [4 if len(set(items)) == 1 else item // common for item in items]
    return [_small(kind, name, item, values, sizes) for item in items]


def _layers(values: dict[str, Any], overrides: dict[int, dict[str, Any]], least: int) -> dict[str, Any]:
    """Fewer layers, at least one of each kind, and everything that is said layer by layer to match."""
    if any(_kind_of(name) == "depths" and isinstance(value, list | tuple) for name, value in values.items()):
        return {}  # the layers are the stages
    small: dict[str, Any] = {}
    for name, value in values.items():
        if _kind_of(name) == "layers" and type(value) is int:
            small[name] = min(value, 2)
    depth = _first(values, _DEPTH)
    if depth is None:
        return small
    # A config whose number of layers was set afterwards keeps its list of layer types, of which the first count.
    by_layer = {
        name: value[:depth]
        for name, value in values.items()
        if isinstance(value, list | tuple)
        and (len(value) == depth > 2 or (len(value) > depth and name.endswith("layer_types")))
        and not re.fullmatch(_NOT_BY_LAYER, name)
    }
    # Lists that say for every layer which layer it takes something from, most often itself.
    references = {
        name
        for name, value in by_layer.items()
        if name.endswith("_layers") and all(type(item) is int and 0 <= item < depth for item in value)
    }
    references = {name for name in references if max(by_layer[name]) > 1}
    shared = values.get("num_kv_shared_layers") or 0
    # The last layer of a kind before those that share keys and values is the one that they take them from.
    kinds = (values.get("layer_types") or ())[: depth - shared]
    sources = {kind: index for index, kind in enumerate(kinds)}.values() if shared else ()
    kept, seen = [], set()
    for index in range(depth):
        kind: tuple[Any, ...] = tuple(
            str(value[index] == index if name in references else value[index])
            for name, value in by_layer.items()
            if not isinstance(value[index], float)
        )
        kind += (str(index >= depth - shared), str(index in sources), str(overrides.get(index)))
        if kind not in seen:
            seen.add(kind)
            kept.append(index)
    taps = [
        value
        for name, value in values.items()
        if re.fullmatch(_TAPS, name) and isinstance(value, list | tuple) and all(type(item) is int for item in value)
    ]
    least = min(max(least, _pattern_length(values)), depth)
    least = max([least, *(len(set(indices)) for indices in taps)])
    kept = sorted({*kept, *[index for index in range(depth) if index not in kept][: max(0, least - len(kept))]})
    for name in _DEPTH:
        if values.get(name) == depth and name in small:
            small[name] = len(kept)
    if shared:
        small["num_kv_shared_layers"] = sum(index >= depth - shared for index in kept)
    if overrides:
        small["per_layer_config"] = {place: overrides[index] for place, index in enumerate(kept) if index in overrides}
    for name, value in by_layer.items():
        small[name] = type(value)(
            (kept.index(value[index]) if value[index] in kept else place) if name in references else value[index]
            for place, index in enumerate(kept)
        )
    for name, value in values.items():
        if any(value is indices for indices in taps):
            small[name] = _tapped(value, depth, len(kept))
    return small


def _pattern_length(values: dict[str, Any]) -> int:
    """How many of the first layers show every kind, where a config gives the kinds as a pattern that repeats."""
    offsets = (value + 1 for name, value in values.items() if name.endswith("_layer_offset"))
    return max([len(values.get("block_types") or ()), *offsets])


def _tapped(indices: Any, depth: int, kept: int) -> Any:
    """Indices of layers whose outputs are used further on, after some layers have gone."""
    if not indices or all(index < 0 for index in indices):
        return indices
    highest = kept if max(indices) >= depth else kept - 1
    distinct = sorted(set(indices))
    moved = {index: max(0, highest - len(distinct) + 1 + place) for place, index in enumerate(distinct)}
    return type(indices)(index if index < 0 else moved[index] for index in indices)


def _rope(values: dict[str, Any], small: dict[str, Any], model_type: str) -> None:
    """Sections and factors of rotary embeddings are as long as half a head."""
    rope = small.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    if model_type in _SECTIONS and "mrope_section" not in rope:
        rope["mrope_section"] = list(_SECTIONS[model_type])
    dim = values.get("head_dim") or (_first(values, _MAIN) or 0) // (_first(values, _HEADS) or 1)
    new = small.get("head_dim") or (_first(small, _MAIN) or 0) // (_first(small, _HEADS) or 1)
    for table in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        for name, value in table.items():
            if name == "mrope_section" and dim:
                half = int(new * (table.get("partial_rotary_factor") or 1)) // 2
                sections = [item * half // sum(value) for item in value]
                sections[-1] += half - sum(sections)
                table[name] = sections
            elif name in ("short_factor", "long_factor") and dim:
                table[name] = value[: max(1, len(value) * new // dim)]
            elif name == "original_max_position_embeddings":
                table[name] = min(value, 32)
