"""Configs of transformers, and the order of tensor names, without what runs models: that takes seconds to load."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_TRAILING_DIGITS = re.compile(r"(.*?)([0-9]*)", re.DOTALL)


def known_model_types() -> list[str]:
    """Every model type that transformers knows, or that was registered with it."""
    return list(CONFIG_MAPPING.keys())


def find_config_class(model_type: str) -> type[PreTrainedConfig] | None:
    """The config class of a model type, or None if transformers does not know it."""
    # This mapping imports a class when it is indexed; its get() does not.
    if model_type not in CONFIG_MAPPING:
        return None
    return CONFIG_MAPPING[model_type]


def natural_order(name: str) -> Any:
    """A key that sorts tensor names with layer 2 before layer 10, as transformers does."""
    parts: list[tuple[Any, ...]] = []
    for part in name.split("."):
        if part.isdigit():
            parts.append((0, int(part)))
            continue
        match = _TRAILING_DIGITS.fullmatch(part)
        assert match is not None
        parts.append((1, match[1], int(match[2])) if match[2] else (1, part))
    return parts
