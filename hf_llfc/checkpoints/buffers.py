"""Stored tensors that are no parameters, by their names, as torch and transformers call them."""

from __future__ import annotations

from hf_llfc.checkpoints.header import TensorInfo

COUNTER = "num_batches_tracked"
VARIANCE = "running_var"
STATISTICS = ("running_mean", VARIANCE, COUNTER)
"""Last parts of the names of batch normalization's buffers."""

CONSTANTS = ("inv_freq", "original_inv_freq", "masked_bias", "position_ids", "token_type_ids")
"""Last parts of the names of buffers that follow from the config and are not trained."""


def is_constant(name: str) -> bool:
    """Whether a stored tensor is a buffer that follows from the config."""
    return name.rpartition(".")[2] in CONSTANTS


def is_buffer(name: str, info: TensorInfo) -> bool:
    """Whether a stored tensor that no class uses is a buffer of an older version: a constant, a counter or a mask."""
    is_mask = name.endswith(".bias") and len(info.shape) == 4 and info.shape[:2] == (1, 1)
    return is_constant(name) or is_mask or not info.dtype.is_floating_point


def is_parameter(name: str, info: TensorInfo) -> bool:
    """Whether a stored tensor is one that is trained; a guess where a class has buffers of its own."""
    return info.dtype.is_floating_point and not is_constant(name) and name.rpartition(".")[2] not in STATISTICS
