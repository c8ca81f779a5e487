"""Where two configs differ, and which of the values change what a model computes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_llfc.checkpoints.checkpoint import Checkpoint

if TYPE_CHECKING:  # takes long to load
    from transformers import PreTrainedConfig

Differences = dict[str, tuple[Any, Any]]
"""Key, with dots into sections → its two values."""

# Values that do not change what a model computes from its weights: bookkeeping, training and generation.
# max_position_embeddings is among them because where it matters a shape or the RoPE parameters differ too.
_WITHOUT_EFFECT = re.compile(
    r"_.*|.*token_ids?|.*drop.*|.*initializer.*|init_std|.*loss.*|.*jitter.*|architectures|auto_map"
    r"|chunk_size_feed_forward|dtype|torch_dtype|encoder_stride|finetuning_task|gradient_checkpointing|id2label"
    r"|label2id|max_position_embeddings|model_type|output_.*|pretraining_tp|problem_type|return_dict"
    r"|task_specific_params|transformers_version|transformers_weights|use_cache"
)

# What only says which layers have a window: where a config lists the kind of every layer, that list counts.
_OF_LAYER_TYPES = frozenset({"max_window_layers", "sliding_window_pattern", "use_sliding_window"})
_WINDOWS = frozenset({"sliding_window", "attention_chunk_size"})
_WITH_WINDOW = ("sliding", "chunked", "local", "window")


def config_differences(first: Checkpoint, other: Checkpoint) -> tuple[Differences, Differences]:
    """Compares two configs.

    Args:
        first: One model.
        other: Another of the same model type.

    Returns:
        The values that change what the model computes; and those of keys that its config class does not read, which
        are what a tool noted down.
    """
    raw_1, raw_2 = first.settings.raw, other.settings.raw
    if raw_1 is not None and raw_2 is not None and _flat(raw_1) == _flat(raw_2):
        return {}, {}
    return _differences(first.config, other.config)


def _differences(config_1: PreTrainedConfig, config_2: PreTrainedConfig) -> tuple[Differences, Differences]:
    from transformers import PreTrainedConfig

    known = _keys_of(config_1)
    values_1, values_2 = _with_effect(config_1.to_dict()), _with_effect(config_2.to_dict())
    differing: Differences = {}
    unread: Differences = {}
    for key in values_1:
        if key not in values_2 or values_1[key] == values_2[key]:
            continue
        section_1, section_2 = (vars(config).get(key) for config in (config_1, config_2))
        if isinstance(section_1, PreTrainedConfig) and isinstance(section_2, PreTrainedConfig):
            below = _differences(section_1, section_2)
            differing |= {f"{key}.{name}": pair for name, pair in below[0].items()}
            unread |= {f"{key}.{name}": pair for name, pair in below[1].items()}
            continue
        flat_1, flat_2 = (_flat({key: values[key]}) for values in (values_1, values_2))
        pairs = {name: (flat_1[name], flat_2[name]) for name in flat_1 if name in flat_2}
        into = differing if known is None or key in known else unread
        into |= {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return differing, unread


def _with_effect(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without those that nothing is computed from, given the others."""
    types = values.get("layer_types")
    left_out = set(_OF_LAYER_TYPES) if isinstance(types, list) else set()
    has_windows = (
        any(word in str(kind) for kind in types for word in _WITH_WINDOW)
        if isinstance(types, list)
        else values.get("use_sliding_window", True)
    )
    left_out |= set() if has_windows else {*_OF_LAYER_TYPES, *_WINDOWS}
    return {key: value for key, value in values.items() if key not in left_out}


def _keys_of(config: PreTrainedConfig) -> set[str] | None:
    """The keys that the class of a config reads; None where it is not known here."""
    from hf_llfc.checkpoints.configs import UnknownConfig

    if isinstance(config, UnknownConfig) or not type(config).__module__.startswith("transformers."):
        return None
    read = set(type(config).__dataclass_fields__) | set(config.attribute_map)
    try:
        return read | set(type(config)().to_dict())
    except Exception:  # no config without values that the class wants to be given
        return read


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if _WITHOUT_EFFECT.fullmatch(str(key)):
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
