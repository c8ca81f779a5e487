"""Kinds of quantisation that are not read: which they are, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_llfc.checkpoints.quantised import is_quantised
from hf_llfc.checkpoints.views.quantisation.stored import Stored
from hf_llfc.errors import CheckpointError

_BY_TENSOR = {
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    ".Qidxs": "QuIP#",
    ".trellis": "QTIP",
    ".weight._data": "quanto",
    ".weight_scales": "EETQ",
    ".B": "Marlin",
    ".quant_weight": "HIGGS",
    ".res_centroids": "VPTQ",
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_scale_inv": "FP8",
}


def may_be_quantised(name: str, dtype: torch.dtype, config: Mapping[str, Any]) -> bool:
    """Whether a tensor belongs to a quantised layer, of kinds too that only a config tells from what models have.

    Args:
        name: Of the tensor.
        dtype: Its type.
        config: What the config says of quantisation; empty where it says nothing.
    """
    return is_quantised(name, dtype) or (bool(config) and name.endswith(tuple(_BY_TENSOR)))


def refuse_unread(stored: Stored, made_from: set[str]) -> None:
    """Refuses quantised tensors that no kind reads.

    Args:
        stored: All tensors.
        made_from: Those that are read.

    Raises:
        CheckpointError: There is one.
    """
    for name, info in stored.weights.infos.items():
        if name not in made_from and may_be_quantised(name, info.dtype, stored.config):
            raise unread(stored.where, name, info.dtype, stored.config)


def unread(where: str, name: str, dtype: torch.dtype | str, config: Mapping[str, Any]) -> CheckpointError:
    """The error of a tensor that belongs to a quantised layer and cannot be read.

    Args:
        where: What messages call the checkpoint.
        name: Of the tensor.
        dtype: Its type.
        config: What the config says of quantisation.
    """
    said = config.get("quant_method")
    by_name = next((kind for ending, kind in _BY_TENSOR.items() if name.endswith(ending)), None)
    kind = str(said) if said else by_name or "of a kind that is not known"
    return CheckpointError(
        f"{where}: tensor {name} ({str(dtype).removeprefix('torch.')}) belongs to a quantised layer ({kind}), and as it"
        " is it cannot be read; use the checkpoint it was made from, or dequantise it with the library that wrote it"
        " (`model.dequantize()` in transformers, where it has that) and save it"
    )
