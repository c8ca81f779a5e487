"""Four bits of bitsandbytes: blocks of a flat tensor, with their largest numbers quantised once more or not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import numpy as np
import torch

from hf_llfc.checkpoints.views.quantisation.codes import Array, Bytes, Codes, Numbers, of_nibbles
from hf_llfc.checkpoints.views.quantisation.matrices import Grid, Scaled
from hf_llfc.checkpoints.views.quantisation.scaled import Found
from hf_llfc.checkpoints.views.quantisation.stored import Stored

_STATE = ".quant_state.bitsandbytes__"
_MOST = 1 << 16
"""Bytes of a quantisation state; those of the library have some 200."""


def four_bits(stored: Stored) -> Found:
    """`weight` with `weight.absmax`, `weight.quant_map` and `weight.quant_state.bitsandbytes__nf4` or `…fp4`."""
    for state in stored.weights.infos:
        name, found, kind = state.partition(_STATE)
        if not found:
            continue
        names = {each: f"{name}.{each}" for each in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
        said = _State.read(stored, name, state)
        info = stored.info(name)
        elements = prod(said.shape)
        if info.nbytes != -(-elements // 2):
            raise stored.error(
                name,
                f"its {info.nbytes} bytes are not those of the shape {list(said.shape)} that {state} says; the file is"
                " damaged: fetch or save it again",
            )
        values = _table(stored, name, names["quant_map"], 16)
        count = -(-elements // said.block)
        largest: Codes = Numbers(names["absmax"], 1)
        if said.nested_block is not None:
            largest = _nested(stored, name, names, said)
        if stored.info(names["absmax"], torch.uint8 if said.nested_block else torch.float32, of=name).elements != count:
            raise stored.misfit(name, names["absmax"])
        kind = f"bitsandbytes, {kind.upper()}{', largest numbers quantised too' if said.nested_block else ''}"
        yield (
            name,
            Scaled(
                kind,
                said.shape,
                Bytes(name, said.block, of_nibbles(values, is_high_first=True)),
                Grid(largest, 1, said.block, count, count),
                may_be_zero=True,
            ),
            [state, *names.values()],
        )


@dataclass(frozen=True)
class _State:
    """What bitsandbytes says of a tensor: its shape, the elements of a block, and how their largest are quantised."""

    shape: tuple[int, ...]
    block: int
    nested_block: int | None
    offset: float

    @classmethod
    def read(cls, stored: Stored, name: str, state: str) -> _State:
        """Reads the JSON in a stored tensor."""
        info = stored.info(state, torch.uint8, of=name)
        try:
            said = json.loads(stored.elements(state, 0, min(info.elements, _MOST)).numpy().tobytes())
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, Mapping) or not _are_sizes(said.get("shape")) or not _is_even(said.get("blocksize")):
            raise _unreadable(stored, name, state)
        nested = said.get("nested_blocksize")
        offset = said.get("nested_offset", 0.0)
        is_number = isinstance(offset, int | float) and isfinite(offset)
        if (nested is not None and not (isinstance(nested, int) and nested > 0)) or not is_number:
            raise _unreadable(stored, name, state)
        return cls(tuple(said["shape"]), said["blocksize"], nested, float(offset))


def _unreadable(stored: Stored, name: str, state: str) -> Exception:
    return stored.error(
        name, f"{state} does not hold what bitsandbytes writes there (shape, blocksize, …); fetch or save it again"
    )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 8 and all(type(size) is int and size > 0 for size in value)


def _is_even(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MOST and value % 2 == 0


def _table(stored: Stored, name: str, table: str, count: int) -> tuple[float, ...]:
    """The numbers that codes stand for."""
    if stored.info(table, torch.float32, of=name).elements != count:
        raise stored.misfit(name, table)
    values = tuple(stored.elements(table, 0, count).tolist())
    if not all(map(isfinite, values)):
        raise stored.error(name, f"{table} holds NaN or infinities; the file is damaged: fetch or save it again")
    return values


def _nested(stored: Stored, name: str, names: Mapping[str, str], said: _State) -> _Nested:
    """The largest numbers of blocks that were quantised once more."""
    assert said.nested_block is not None
    count = stored.info(names["absmax"], torch.uint8, of=name).elements
    if stored.info(names["nested_absmax"], torch.float32, of=name).elements != -(-count // said.nested_block):
        raise stored.misfit(name, names["nested_absmax"])
    values = _table(stored, name, names["nested_quant_map"], 256)
    return _Nested(names["absmax"], names["nested_absmax"], values, said.nested_block, said.offset)


@dataclass(frozen=True)
class _Nested:
    """Largest numbers of blocks, quantised with one scale a block of blocks; they follow the protocol of `Codes`."""

    name: str
    scales: str
    values: tuple[float, ...]
    block: int
    offset: float

    columns = 1
    unit = 1.0

    def load(self, stored: Stored, begin: int, end: int) -> Array:
        """Reads the numbers of some blocks."""
        codes = stored.elements(self.name, begin, end).numpy()
        first = begin // self.block
        scales = stored.elements(self.scales, first, (end - 1) // self.block + 1).numpy()
        of_blocks = scales[np.arange(begin, end) // self.block - first]
        numbers = np.asarray(self.values, dtype=np.float32)[codes] * of_blocks + np.float32(self.offset)
        return numbers.reshape(-1, 1)

    def decode(self, loaded_rb: Array, out_rc: Array) -> None:
        """Copies them."""
        np.copyto(out_rc, loaded_rb)
