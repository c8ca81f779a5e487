"""The tensors of quantised layers as they are stored, read in parts; and the errors of those that do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_llfc.checkpoints.files import Weights
from hf_llfc.checkpoints.header import TensorInfo
from hf_llfc.checkpoints.positioned import TensorBytes
from hf_llfc.errors import CheckpointError


@dataclass(frozen=True)
class Stored:
    """Stored tensors, and what the config says of them.

    Attributes:
        weights: The tensors by the names in the files.
        where: What messages call the checkpoint.
        config: The values that the config has on quantisation; empty where it says nothing.
        kept: What was made of small tensors, by the tensor that it is for.
    """

    weights: Weights
    where: str
    config: Mapping[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict, repr=False)
    _spans: dict[str, TensorBytes | None] = field(default_factory=dict, repr=False)

    def __contains__(self, name: object) -> bool:
        return name in self.weights.infos

    @property
    def schemes(self) -> list[Mapping[str, Any]]:
        """How weights are quantised by a config of compressed-tensors, which may do so in several ways."""
        groups = self.config.get("config_groups")
        schemes = list(groups.values()) if isinstance(groups, Mapping) else []
        weights = [each.get("weights") for each in schemes if isinstance(each, Mapping)]
        return [each for each in weights if isinstance(each, Mapping)]

    def info(self, name: str, *dtypes: torch.dtype, of: str = "") -> TensorInfo:
        """Dtype and shape of a tensor that has to be there.

        Args:
            name: Of the tensor.
            dtypes: What its dtype may be; anything where none is named.
            of: The tensor that it belongs to, for the message.

        Raises:
            CheckpointError: It is missing, or of another dtype.
        """
        info = self.weights.infos.get(name)
        if info is None:
            raise self.error(of or name, f"{name} is missing; fetch or save the checkpoint again")
        if dtypes and info.dtype not in dtypes:
            expected = " or ".join(_name(dtype) for dtype in dtypes)
            raise self.error(of or name, f"{name} is {_name(info.dtype)}, expected {expected}; save it again")
        return info

    def elements(self, name: str, begin: int, end: int) -> Tensor:
        """Reads elements of a tensor, in the order in which they are stored."""
        if name not in self._spans:
            self._spans[name] = self.weights.span(name)
        span = self._spans[name]
        if span is None:
            return self.weights.read(name).reshape(-1)[begin:end]
        data = torch.empty((end - begin) * span.dtype.itemsize, dtype=torch.uint8)
        span.read_into(data.numpy().data, begin * span.dtype.itemsize)
        return data.view(span.dtype)

    def error(self, name: str, problem: str) -> CheckpointError:
        """The error of a quantised tensor that cannot be read."""
        return CheckpointError(f"{self.where}: quantised tensor {name}: {problem}")

    def misfit(self, name: str, other: str) -> CheckpointError:
        """The error of two tensors whose shapes do not belong together."""
        shapes = [list(self.weights.infos[each].shape) for each in (name, other)]
        return self.error(
            name,
            f"{other} of shape {shapes[1]} does not fit the shape {shapes[0]}; the file is damaged or was put together"
            " from two: fetch or save it again",
        )


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor as one matrix, its last dimension the columns."""
    columns = shape[-1] if shape else 1
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows, columns


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
