"""What a config says layer by layer, and the config of a model whose layers come from others."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_llfc.checkpoints.settings import Settings
from hf_llfc.errors import CheckpointError

Path = tuple[str, ...]
"""Keys of a config, one below the other."""

PER_LAYER = frozenset(
    {
        *("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types"),
        *("attention_layers", "attn_layers", "no_rope_layers", "layer_rope_theta", "sliding_windows"),
        *("num_attention_heads_per_layer", "num_key_value_heads_per_layer", "activation_sparsity_pattern"),
        *("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    }
)
"""Keys whose value, where it is a list, has an entry a layer."""

INDICES = frozenset(
    {
        *("full_attn_idxs", "mlp_only_layers", "moe_layers", "cross_attention_layers", "attn_layer_indices"),
        *("fullatt_block_indexes", "global_attn_indexes", "hybrid_layer_ids", "rope_scaling_layers"),
        *("window_block_indexes", "window_block_indices"),
    }
)
"""Keys whose value lists the layers that something holds for."""

FROM_START = frozenset({"first_k_dense_replace", "num_dense_layers", "max_window_layers"})
"""Keys that say how many layers, from the first, are of another kind."""

FROM_END = frozenset({"num_kv_shared_layers"})
"""Keys that say how many layers, up to the last, are of another kind."""

FURTHER = frozenset({"num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers"})
"""Keys that count layers behind the others, which predict further tokens from what the last one gives."""

_DEPTH_WORDS = ("layer", "depth", "block")


@dataclass(frozen=True)
class LayerOrigin:
    """Where one layer comes from.

    Attributes:
        values: The config of its model, as plain data.
        depth: How many layers that model has in this stack.
        index: Which of them it is.
    """

    values: Mapping[str, Any]
    depth: int
    index: int


def values_of(settings: Settings) -> dict[str, Any]:
    """All values of a config, those that its file leaves to the config class included."""
    return settings.config.to_dict()


def depth_keys(values: Mapping[str, Any], depth: int, path: Path = ()) -> Iterator[Path]:
    """Where a config may say how many layers a stack has: whole numbers of that size under a name for layers.

    Args:
        values: The config.
        depth: The number of layers.
        path: Where the values stand.
    """
    for key, value in values.items():
        if type(value) is int and value == depth and any(word in str(key) for word in _DEPTH_WORDS):
            yield (*path, str(key))
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from depth_keys(value, depth, (*path, str(key)))


def changes_for(key: Path, layers: Sequence[LayerOrigin]) -> dict[Path, Any]:
    """What a config has to say of other layers.

    Args:
        key: Where it says how many there are.
        layers: Where every layer comes from.

    Returns:
        Place in the config → value.

    Raises:
        CheckpointError: It has no way to say so.
    """
    section, name = key[:-1], key[-1]
    changes: dict[Path, Any] = {key: len(layers)}
    sections = [_at(layer.values, section) for layer in layers]
    own = sections[0]
    if name != "num_hidden_layers" and own.get("num_hidden_layers") == own.get(name):
        changes[(*section, "num_hidden_layers")] = len(layers)
    changes |= {(*section, other): values for other, values in kinds_of(key, layers).items()}
    for other, value in own.items():
        place = (*section, str(other))
        of_models: list[Any] = [each.get(other) for each in sections]
        if other in INDICES and all(isinstance(each, list | tuple) for each in of_models):
            changes[place] = [
                index for index, (each, layer) in enumerate(zip(of_models, layers, strict=True)) if layer.index in each
            ]
        elif other in FROM_START | FROM_END and type(value) is int:
            changes[place] = _threshold(other, of_models, layers)
        elif other == "attention_types" and isinstance(own.get("attention_layers"), list):
            changes[place] = [[[_at(layer.values, section)["attention_layers"][layer.index]], 1] for layer in layers]
    return changes


def without_further(key: Path, layers: Sequence[LayerOrigin]) -> dict[Path, Any]:
    """What the config has to say where layers that predict further tokens are left out."""
    own = _at(layers[0].values, key[:-1])
    return {(*key[:-1], other): 0 for other in sorted(FURTHER & own.keys()) if own[other]}


def kinds_of(key: Path, layers: Sequence[LayerOrigin]) -> dict[str, list[Any]]:
    """What the config says of every layer that may differ from layer to layer, by its key."""
    sections = [_at(layer.values, key[:-1]) for layer in layers]
    return {
        other: [each[other][layer.index] for each, layer in zip(sections, layers, strict=True)]
        for other in PER_LAYER
        if all(_is_listed(each.get(other), layer) for each, layer in zip(sections, layers, strict=True))
    }


def _is_listed(value: Any, layer: LayerOrigin) -> bool:
    """Whether a value of a config has an entry for every layer."""
    return isinstance(value, list | tuple) and len(value) == layer.depth


def _threshold(key: str, of_models: Sequence[Any], layers: Sequence[LayerOrigin]) -> int:
    """How many layers from one end are of another kind, where the others follow in one piece."""
    if key in FROM_START:
        kinds = [layer.index < each for each, layer in zip(of_models, layers, strict=True)]
    else:
        kinds = [layer.index >= layer.depth - each for each, layer in zip(of_models, layers, strict=True)][::-1]
    count = kinds.index(False) if False in kinds else len(kinds)
    if any(kinds[count:]) and key != "max_window_layers":  # layer_types say more
        end = "first" if key in FROM_START else "last"
        raise CheckpointError(
            f"{key} in the config says how many of the {end} layers are of another kind, and in this order of layers "
            "these do not stand together; take the layers of one kind first"
        )
    if all(each >= layer.depth for each, layer in zip(of_models, layers, strict=True)):
        return int(max(count, *of_models))  # what holds for all layers may be said by any number that is large enough
    return count


def changed(settings: Settings, changes: Mapping[Path, Any], label: str) -> Settings:
    """Settings with other values in their config.

    Args:
        settings: Of a checkpoint.
        changes: Place in the config → value.
        label: What the checkpoint is called, for messages.

    Raises:
        CheckpointError: The config class does not take them.
    """
    before = settings.config
    values = copy.deepcopy(dict(settings.raw if settings.raw is not None else before.to_dict()))
    for place, value in changes.items():
        target = values
        for key in place[:-1]:
            target = target.setdefault(key, {})
        for alias in [alias for alias, meant in before.attribute_map.items() if meant == place[-1]]:
            target.pop(alias, None)
        target[place[-1]] = value
    try:
        config = type(before).from_dict(values)
    except Exception as error:  # a config class may raise anything on values it does not expect
        raise CheckpointError(f"{label}: the config cannot describe these layers: {_last_line(error)}") from error
    found = config.to_dict()
    for place, value in changes.items():
        told = _at(found, place[:-1]).get(place[-1])
        if (list(told) if isinstance(told, tuple) else told) != value:
            raise CheckpointError(
                f"{label}: the config cannot say {'.'.join(place)} {json.dumps(value)} of these layers; its class "
                f"makes it {json.dumps(told, default=str)}"
            )
    return settings.with_config(config)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _at(values: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    for key in path:
        values = values.get(key) or {}
    return values
