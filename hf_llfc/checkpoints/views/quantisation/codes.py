"""How rows of numbers are encoded: one number a byte, several in a byte, several in a word, or plain.

Shape suffixes: `r` rows, `c` columns, `b` bytes of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Protocol

import numpy as np
import torch

from hf_llfc.checkpoints.views.quantisation.stored import Stored

Array = np.ndarray[Any, np.dtype[Any]]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of four bits of FP4."""

EXPONENT_BIAS = 127
"""Of scales that are a power of two in a byte (E8M0)."""

WHOLE_BYTES = (1, 2, 4, 8)
"""Numbers of bits of which none lie across two bytes."""


class Codes(Protocol):
    """Rows of numbers in a stored tensor."""

    @property
    def name(self) -> str:
        """The stored tensor."""
        ...

    @property
    def columns(self) -> int:
        """Numbers in a row."""
        ...

    @property
    def unit(self) -> float:
        """What the decoded numbers are multiples of."""
        ...

    def load(self, stored: Stored, begin: int, end: int) -> Array:
        """Reads rows as they are stored, one row of the array for each."""
        ...

    def decode(self, loaded_rb: Array, out_rc: Array) -> None:
        """Writes the numbers of loaded rows, as float32."""
        ...


def decoded(codes: Codes, stored: Stored, begin: int, end: int) -> Array:
    """The numbers of some rows, as float32."""
    out_rc = np.empty((end - begin, codes.columns), dtype=np.float32)
    codes.decode(codes.load(stored, begin, end), out_rc)
    return out_rc


@dataclass(frozen=True)
class Numbers:
    """Plain numbers of any type; a byte is the exponent of a power of two.

    Attributes:
        name: The stored tensor.
        columns: Numbers in a row.
    """

    name: str
    columns: int

    unit = 1.0

    def load(self, stored: Stored, begin: int, end: int) -> Array:
        """Reads rows as float32."""
        read = stored.elements(self.name, begin * self.columns, end * self.columns)
        if read.dtype == torch.uint8:
            read = read.view(torch.float8_e8m0fnu)
        return read.to(torch.float32).numpy().reshape(end - begin, self.columns)

    def decode(self, loaded_rb: Array, out_rc: Array) -> None:
        """Copies them."""
        np.copyto(out_rc, loaded_rb)


@dataclass(frozen=True)
class Bytes:
    """Rows of bytes that hold one number or several.

    Attributes:
        name: The stored tensor.
        columns: Numbers in a row.
        table: The numbers in every byte, in their order.
        order: In which order numbers stand among their neighbours, if not in that of the columns; as many as in one
            word of 32 bits.
    """

    name: str
    columns: int
    table: Table
    order: tuple[int, ...] = ()

    def load(self, stored: Stored, begin: int, end: int) -> Array:
        """Reads the bytes of rows; beyond the end of the tensor, zeros."""
        info = stored.weights.infos[self.name]
        size, width = info.dtype.itemsize, self.row_bytes
        last = min(end * width, info.nbytes)
        read = stored.elements(self.name, begin * width // size, -(-last // size)).view(torch.uint8).numpy()
        if len(read) < (end - begin) * width:
            read = np.concatenate([read, np.zeros((end - begin) * width - len(read), dtype=np.uint8)])
        return read.reshape(end - begin, width)

    @property
    def unit(self) -> float:
        """What the numbers are multiples of."""
        return self.table.unit

    @cached_property
    def row_bytes(self) -> int:
        """The bytes of a row: whole words, where numbers stand in those."""
        count = -(-self.columns // self.table.per_byte)
        return -(-count // self.table.aligned) * self.table.aligned

    def decode(self, loaded_rb: Array, out_rc: Array) -> None:
        """Looks the numbers up."""
        rows, width = loaded_rb.shape
        per_byte = self.table.per_byte
        if width * per_byte == self.columns and not self.order and out_rc.flags.c_contiguous:
            self.table.look_up(loaded_rb.reshape(-1), out_rc.reshape(-1))
            return
        numbers = np.empty(rows * width * per_byte, dtype=np.float32)
        self.table.look_up(loaded_rb.reshape(-1), numbers)
        if self.order:
            words = numbers.reshape(rows, -1, len(self.order))
            numbers = words[..., np.argsort(self.order)]
        np.copyto(out_rc, numbers.reshape(rows, -1)[:, : self.columns])


@dataclass(frozen=True, eq=False)
class Table:
    """The numbers that a byte stands for.

    Attributes:
        values: One row for each of the 256 bytes, float32.
        aligned: Rows of codes take a multiple of so many bytes.
        unit: What the values are multiples of.
    """

    values: Array
    aligned: int = 1
    unit: float = 1.0

    @cached_property
    def per_byte(self) -> int:
        """Numbers in a byte."""
        return int(self.values.shape[1])

    @cached_property
    def _of_two(self) -> Array:
        """The numbers of two bytes at a time, which takes half as long to look up, as one element each."""
        both = np.empty((1 << 16, 2, self.per_byte), dtype=np.float32)
        both[:, 0] = np.tile(self.values, (256, 1))
        both[:, 1] = np.repeat(self.values, 256, axis=0)
        return both.reshape(-1).view(_element(2 * self.per_byte))

    @cached_property
    def _of_one(self) -> Array:
        return np.ascontiguousarray(self.values).reshape(-1).view(_element(self.per_byte))

    def look_up(self, data: Array, out: Array) -> None:
        """Writes the numbers of bytes, float32; as many as they hold."""
        # All places are there; to be told so spares NumPy looking.
        pairs = self.per_byte == 1 and len(data) % 2 == 0
        table = self._of_two if pairs else self._of_one
        places = data.view(np.uint16) if pairs else data
        np.take(table, places, out=out.view(table.dtype), mode="clip")


def _element(numbers: int) -> np.dtype[Any]:
    return np.dtype({1: np.float32, 2: np.uint64}.get(numbers, f"V{4 * numbers}"))


@dataclass(frozen=True)
class Bits:
    """Rows of words in which numbers of so many bits follow each other, across words too.

    Attributes:
        name: The stored tensor.
        columns: Numbers in a row.
        bits: Of a number.
        offset: What is taken from it.
    """

    name: str
    columns: int
    bits: int
    offset: int

    unit = 1.0

    @property
    def words(self) -> int:
        """Words in a row."""
        return -(-self.columns * self.bits // 32)

    def load(self, stored: Stored, begin: int, end: int) -> Array:
        """Reads the bytes of rows."""
        read = stored.elements(self.name, begin * self.words, end * self.words)
        return read.view(torch.uint8).numpy().reshape(end - begin, 4 * self.words)

    def decode(self, loaded_rb: Array, out_rc: Array) -> None:
        """Takes the bits apart."""
        np.copyto(out_rc, _numbers_in(loaded_rb, self.bits, self.columns))
        out_rc -= self.offset


@dataclass(frozen=True)
class Down:
    """Columns of words in which numbers of so many bits follow each other: packed along the rows.

    Attributes:
        name: The stored tensor.
        columns: Columns of the tensor.
        bits: Of a number.
        offset: What is taken from it.
    """

    name: str
    columns: int
    bits: int
    offset: int

    unit = 1.0

    def load(self, stored: Stored, begin: int, end: int) -> Array:
        """Reads the numbers of rows, one a byte."""
        first = begin // 32 * self.bits
        last = min(-(-end * self.bits // 32), stored.weights.infos[self.name].shape[0])
        words_wc = stored.elements(self.name, first * self.columns, last * self.columns).reshape(-1, self.columns)
        data_cb = np.ascontiguousarray(words_wc.numpy().T).view(np.uint8)
        skipped = begin % 32
        return np.ascontiguousarray(_numbers_in(data_cb, self.bits, skipped + end - begin)[:, skipped:].T)

    def decode(self, loaded_rb: Array, out_rc: Array) -> None:
        """Takes the offset off."""
        np.subtract(loaded_rb, np.float32(self.offset), out=out_rc)


def _numbers_in(data_rb: Array, bits: int, columns: int) -> Array:
    """The numbers whose bits follow each other in rows of bytes, one a byte."""
    if bits in WHOLE_BYTES:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        mask = np.uint8((1 << bits) - 1)
        numbers = (data_rb[..., None] >> shifts) & mask
        return numbers.reshape(len(data_rb), -1)[:, :columns]
    single = np.unpackbits(data_rb, axis=1, bitorder="little")[:, : columns * bits].reshape(-1, columns, bits)
    numbers = np.zeros((len(data_rb), columns), dtype=np.uint8)
    for bit in range(bits):
        numbers |= single[..., bit] << np.uint8(bit)
    return numbers


_SMALLER = 2.0**8


class _E4M3(Table):
    """FP8 of four bits of exponent, whose bits are moved to where float16 has them: quicker than to look them up.

    The numbers are smaller by what the biases of the two exponents differ.
    """

    def look_up(self, data: Array, out: Array) -> None:
        """Writes the numbers of bytes, float32."""
        signed = data.view(np.int8)
        if signed.max(initial=0) == 0x7F or data.max(initial=0) == 0xFF:  # NaN, which would become a number
            super().look_up(data, out)
            return
        of_bits = torch.from_numpy(signed).to(torch.int16)
        bits = of_bits.numpy()
        np.multiply(bits, 1 << 7, out=bits)
        np.bitwise_and(bits, ~0x4000, out=bits)  # the copy of the sign in the highest bit of the exponent
        torch.from_numpy(out).copy_(of_bits.view(torch.float16))


@cache
def of_floats(dtype: torch.dtype) -> Table:
    """A number of eight bits in each byte."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32).numpy().reshape(256, 1)
    return _E4M3(numbers / _SMALLER, unit=_SMALLER) if dtype == torch.float8_e4m3fn else Table(numbers)


@cache
def of_bits(bits: int, offset: int, aligned: int = 4) -> Table:
    """Whole numbers of one, two, four or eight bits, the lowest bits first."""
    return _of_parts(tuple(float(number - offset) for number in range(1 << bits)), bits, aligned=aligned)


@cache
def of_nibbles(values: tuple[float, ...], *, is_high_first: bool = False) -> Table:
    """Two numbers in each byte, by their four bits."""
    return _of_parts(values, 4, is_high_first=is_high_first)


def _of_parts(values: Sequence[float], bits: int, *, aligned: int = 1, is_high_first: bool = False) -> Table:
    shifts = np.arange(0, 8, bits)
    if is_high_first:
        shifts = shifts[::-1]
    places = np.arange(256)[:, None] >> shifts & (1 << bits) - 1
    return Table(np.asarray(values, dtype=np.float32)[places], aligned)
