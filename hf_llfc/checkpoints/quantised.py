"""Whether weights are quantised: their headers tell, whatever a config still says of an earlier model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_llfc.errors import CheckpointError

# The ends of tensor names that only quantised layers have.
_ENDINGS = (
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".weight_packed",
    ".weight.absmax",
    ".weight.quant_map",
    ".weight_scale_inv",
    ".SCB",
    ".W_q",
    ".weight._data",
)

KEYS = ("quantization_config", "compression_config")
"""Keys of config.json, or of a section of it, that tell how weights are quantised."""


def is_quantised(name: str, dtype: torch.dtype | None) -> bool:
    """Whether a tensor belongs to a quantised layer.

    Args:
        name: Of the tensor.
        dtype: Its type; None where torch has none that can be summed.
    """
    is_whole_number = dtype is not None and not (dtype.is_floating_point or dtype.is_complex)
    return dtype is None or name.endswith(_ENDINGS) or (is_whole_number and name.endswith(".weight"))


def quantised_tensor(where: str, name: str, dtype: str) -> CheckpointError:
    """The error of a tensor that belongs to a quantised layer."""
    return CheckpointError(
        f"{where}: tensor {name} ({dtype}) belongs to a quantised layer, and quantised weights cannot be merged;"
        " use the checkpoint it was made from, or save a dequantised one"
    )


def quantised_config(where: str, raw: Mapping[str, Any]) -> CheckpointError | None:
    """The error of weights that are quantised as a config says; None where it says nothing of that."""
    said = next((section[key] for section in _sections(raw) for key in KEYS if section.get(key)), None)
    if said is None:
        return None
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    return CheckpointError(
        f"{where}: the weights are quantised ({method or 'see quantization_config'}), and quantised weights cannot"
        " be merged; use the checkpoint it was made from, or save a dequantised one"
    )


def without_quantisation(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The values in config.json without those that tell how weights are quantised."""
    return {
        key: without_quantisation(value) if isinstance(value, Mapping) else value
        for key, value in raw.items()
        if key not in KEYS
    }


def _sections(raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [raw, *(value for key, value in raw.items() if isinstance(value, Mapping) and key not in KEYS)]
