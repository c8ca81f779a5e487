"""Weights of a quantised checkpoint as numbers: dequantised as they are read, in parts where their layout has parts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from hf_llfc.checkpoints.files import Weights
from hf_llfc.checkpoints.header import TensorInfo
from hf_llfc.checkpoints.quantised import is_leftover
from hf_llfc.checkpoints.views.quantisation import quantised_tensors
from hf_llfc.checkpoints.views.quantisation.matrices import QuantisedTensor
from hf_llfc.checkpoints.views.quantisation.stored import Stored
from hf_llfc.checkpoints.views.quantisation.unread import may_be_quantised
from hf_llfc.checkpoints.views.view import View

logger = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def dequantised(
    weights: Weights, where: str, raw: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[Weights, str | None]:
    """Weights whose quantised layers are read as numbers, of the dtype that the config names.

    Args:
        weights: As they are stored.
        where: What messages call the checkpoint.
        raw: The values in config.json.
        config: Those of them that tell of quantisation; empty where nothing does.

    Returns:
        The weights, and in words how they are quantised; as they are, and None, where they are not.

    Raises:
        CheckpointError: They are quantised in a way that is not read, or their tensors do not belong together.
    """
    leftovers = frozenset(name for name in weights.infos if is_leftover(name, weights.infos))
    if leftovers:
        logger.warning(
            "%s: %d scales belong to weights that are not quantised, %s among them; they are left out",
            where,
            len(leftovers),
            min(leftovers),
        )
        weights = View(weights, {k: v for k, v in weights.infos.items() if k not in leftovers}, (), weights.read)
    if not any(may_be_quantised(name, info.dtype, config) for name, info in weights.infos.items()):
        return weights, None
    stored = Stored(weights, where, config)
    made, used = quantised_tensors(stored)
    layers = {name.rpartition(".")[0] for name in made}
    dtype = _dtype(raw)
    infos = {
        name: info for name, info in weights.infos.items() if name not in used and not _is_of_activations(name, layers)
    }
    infos |= {name: TensorInfo(dtype, tensor.shape) for name, tensor in made.items()}
    kinds = Counter(tensor.kind for tensor in made.values())
    words = "; ".join(f"{kind} ({count} of {len(infos)} tensors)" for kind, count in kinds.most_common())
    logger.info("%s: the weights are quantised (%s); they are dequantised as they are read", where, words)
    reading = _Reading(stored, made)
    tag = {"dequantised": {"to": str(dtype), "config": dict(config), "kinds": dict(kinds)}}
    return View(weights, infos, made.keys(), reading.make, tag, spans=reading.span), words


def _dtype(raw: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a config names for its model; bfloat16 where it names none that weights could have."""
    sections = [raw, *(value for value in raw.values() if isinstance(value, Mapping))]
    said = (section.get(key) for section in sections for key in ("dtype", "torch_dtype"))
    names = (str(name).removeprefix("torch.") for name in said if name is not None)
    return next((_DTYPES[name] for name in names if name in _DTYPES), torch.bfloat16)


_OF_ACTIVATIONS = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "input_scale_ub",
    "activation_scale",
    "output_scale",
    "output_zero_point",
    "weight_format",
)
"""Tensors of a quantised layer that tell how its inputs and outputs are quantised."""


def _is_of_activations(name: str, layers: set[str]) -> bool:
    layer, _, last = name.rpartition(".")
    return layer in layers and last.endswith(_OF_ACTIVATIONS)


@dataclass(frozen=True)
class _Reading:
    """Makes tensors from stored ones."""

    stored: Stored
    made: Mapping[str, QuantisedTensor]

    def make(self, name: str) -> torch.Tensor:
        """Makes a whole tensor, as float32."""
        tensor = self.made[name]
        numbers = np.empty(prod(tensor.shape), dtype=np.float32)
        if numbers.size:
            tensor.fill(self.stored, 0, numbers)
        return torch.from_numpy(numbers).reshape(tensor.shape)

    def span(self, name: str) -> DequantisedSpan | None:
        """What reads parts of a tensor."""
        tensor = self.made[name]
        return DequantisedSpan(self.stored, tensor) if tensor.is_in_parts else None


_FEW = 1 << 14
"""Elements below which to make them once and copy them takes less time than to make them in pieces."""


@dataclass(frozen=True)
class DequantisedSpan:
    """The bytes that a tensor has as float32, made as they are read; it follows the protocol of `TensorBytes`.

    Attributes:
        stored: What it is made from.
        tensor: How it is made.
    """

    stored: Stored
    tensor: QuantisedTensor

    dtype = torch.float32

    @property
    def nbytes(self) -> int:
        """How many there are."""
        return prod(self.tensor.shape) * self.dtype.itemsize

    def read_into(self, room: memoryview, start: int = 0) -> None:
        """Makes elements until the room is full; from any thread.

        Args:
            room: Where to put them, of format `B`.
            start: The first byte, counted from the beginning of the tensor.

        Raises:
            CheckpointError: They cannot be read, or their scales are no numbers to scale by.
        """
        out = np.frombuffer(room, dtype=np.float32)
        size, unit = prod(self.tensor.shape), self.tensor.unit
        begin = start // self.dtype.itemsize
        end = begin + len(out)
        # Whole units are made where they are wanted; at both ends there may be parts of one.
        first, last = -(-begin // unit) * unit, end if end == size else end // unit * unit
        if last - first < _FEW:
            first = last = begin
        self._fill(out[: first - begin], begin)
        if last > first:
            self.tensor.fill(self.stored, first // unit, out[first - begin : last - begin])
        self._fill(out[last - begin :], last)

    def _fill(self, out: np.ndarray[Any, np.dtype[np.float32]], begin: int) -> None:
        """Makes elements that begin and end within units."""
        if not len(out):
            return
        unit = self.tensor.unit
        first = begin // unit
        last = min(-(-(begin + len(out)) // unit) * unit, prod(self.tensor.shape))
        room = np.empty(last - first * unit, dtype=np.float32)
        self.tensor.fill(self.stored, first, room)
        out[:] = room[begin - first * unit :][: len(out)]
