"""Whether weights are quantised: their tensors tell, whatever a config still says of an earlier model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_llfc.checkpoints.header import TensorInfo
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

_SCALES = ("weight_scale", "weight_scale_inv", "weight_zero_point", "weight_global_scale", "SCB", "weight_format")

KEYS = ("quantization_config", "compression_config")
"""Keys of config.json, or of a section of it, that tell how weights are quantised."""


def is_quantised(name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor belongs to a quantised layer.

    Args:
        name: Of the tensor.
        dtype: Its type.
    """
    if dtype.is_floating_point:
        return dtype.itemsize == 1 or name.endswith(_ENDINGS)
    return name.endswith(_ENDINGS) or (name.endswith((".weight", "_blocks")) and not dtype.is_complex)


def is_leftover(name: str, infos: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor is a scale of a quantised layer whose weights are no longer quantised.

    Args:
        name: Of the tensor.
        infos: Dtype and shape of all.
    """
    layer, _, last = name.rpartition(".")
    weight = infos.get(f"{layer}.weight")
    return last in _SCALES and weight is not None and weight.dtype.is_floating_point and weight.dtype.itemsize > 1


def quantised_tensor(where: str, name: str, dtype: str) -> CheckpointError:
    """The error of a tensor that belongs to a quantised layer where there can be none."""
    return CheckpointError(
        f"{where}: tensor {name} ({dtype.removeprefix('torch.')}) belongs to a quantised layer of a kind that cannot be"
        " read here; use the checkpoint it was made from, or dequantise it with the library that wrote it"
    )


def quantisation_said(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config says of how weights are quantised; None where it says nothing."""
    said = next((section[key] for section in _sections(raw) for key in KEYS if section.get(key)), None)
    return said if said is None or isinstance(said, Mapping) else {}


def quantised_in_memory(where: str, raw: Mapping[str, Any]) -> CheckpointError | None:
    """The error of a model in memory that is quantised as its config says; None where it is not."""
    said = quantisation_said(raw)
    if said is None:
        return None
    return CheckpointError(
        f"{where}: the model in memory is quantised ({said.get('quant_method', 'see quantization_config')}); give the"
        " folder or the id that it was loaded from, which is dequantised as it is read"
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
