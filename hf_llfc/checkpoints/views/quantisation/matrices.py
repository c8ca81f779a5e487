"""Quantised tensors as numbers: codes minus zeros, times scales, in float32 as the libraries compute them.

A tensor is read in units: its rows, or blocks of it where it has been quantised without regard to rows. Shape suffixes:
`r` rows, `c` columns, `g` blocks in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hf_llfc.checkpoints.views.quantisation.codes import E2M1, Array, Bytes, Codes, Numbers, decoded, of_nibbles
from hf_llfc.checkpoints.views.quantisation.stored import Stored

KEPT = 1 << 16
"""Scales of a tensor that are kept in memory, once they were read; of more, those of the rows are read each time."""

InPlace = Callable[[Tensor, Tensor], Tensor]

CHUNK = 1 << 19
"""Elements that are decoded at a time: enough that calls do not count, few enough for a processor's cache."""


class QuantisedTensor(Protocol):
    """A tensor that is made from stored ones, in float32."""

    @property
    def kind(self) -> str:
        """How it is quantised, in words."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        ...

    @property
    def unit(self) -> int:
        """Elements that are made together."""
        ...

    @property
    def is_in_parts(self) -> bool:
        """Whether some units are made without reading all of it."""
        ...

    def fill(self, stored: Stored, first: int, out: Array) -> None:
        """Makes elements.

        Args:
            stored: What it is made from.
            first: The first unit.
            out: Room for whole units, or up to the end of the tensor; float32, contiguous.
        """
        ...


@dataclass(frozen=True)
class Grid:
    """One number for every block of a matrix.

    Attributes:
        codes: The numbers, a row of the grid in each row.
        row_block: Rows of a block.
        column_block: Columns of a block; the last may be smaller.
        matrix_rows: Rows after which the blocks begin anew, where several matrices stand below each other.
        rows: Of the grid.
        row_of: Name of a stored tensor that says which row of the grid a row takes.
        column_of: The same of columns.
    """

    codes: Codes
    row_block: int
    column_block: int
    matrix_rows: int
    rows: int
    row_of: str | None = None
    column_of: str | None = None

    def places(self, stored: Stored, begin: int, end: int) -> Array:
        """Which rows of the grid some rows of the matrix take; one where all take the same."""
        if self.row_of is not None:
            return _places(stored, self.row_of, begin, end, self.rows)
        if begin // self.row_block == (end - 1) // self.row_block and self.matrix_rows % self.row_block == 0:
            return np.array([begin // self.row_block])
        rows = np.arange(begin, end)
        if self.matrix_rows % self.row_block == 0:
            return rows // self.row_block
        per_matrix = -(-self.matrix_rows // self.row_block)
        return rows // self.matrix_rows * per_matrix + rows % self.matrix_rows // self.row_block

    def of_rows(self, stored: Stored, begin: int, end: int) -> Array:
        """The numbers for some rows of the matrix, a row each; one row where all have the same."""
        places = self.places(stored, begin, end)
        first = int(places.min())
        return decoded(self.codes, stored, first, int(places.max()) + 1)[places - first]

    def over(self, numbers_rg: Array, columns: int) -> Array:
        """Numbers of blocks, repeated for every column."""
        if numbers_rg.shape[1] == 1:
            return numbers_rg
        return np.repeat(numbers_rg, self.column_block, axis=1)[:, :columns]


def _places(stored: Stored, name: str, begin: int, end: int, limit: int) -> Array:
    """Which of the groups some rows or columns belong to."""
    places = stored.elements(name, begin, end).numpy().astype(np.int64)
    if len(places) and (places.min() < 0 or places.max() >= limit):
        raise stored.error(name, f"it names groups beyond the {limit} that have scales; fetch or save the file again")
    return places


@dataclass(frozen=True)
class Scaled:
    """A tensor that is (codes − zeros) · scales.

    Attributes:
        kind: How it is quantised, in words.
        shape: The shape of the tensor.
        codes: The codes, a unit in each row.
        scales: Of every block.
        zeros: Of every block; zero where None.
        divisor: A stored number by which scales are divided.
        multiplier: A stored number that scales are multiplied with.
        factor: A number that the result is multiplied with.
        may_be_zero: Whether a scale may be zero though the codes are not.
    """

    kind: str
    shape: tuple[int, ...]
    codes: Codes
    scales: Grid
    zeros: Grid | None = None
    divisor: str | None = None
    multiplier: str | None = None
    factor: float | None = None
    may_be_zero: bool = False

    is_in_parts = True

    @property
    def unit(self) -> int:
        """Elements in a row of codes."""
        return self.codes.columns

    def fill(self, stored: Stored, first: int, out: Array) -> None:
        """Makes rows; the last may be cut off by the end of the tensor."""
        whole = out.size // self.unit
        if whole:
            self.rows(stored, first, out[: whole * self.unit].reshape(whole, self.unit))
        if rest := out.size % self.unit:
            last_rc = np.empty((1, self.unit), dtype=np.float32)
            self.rows(stored, first + whole, last_rc)
            out[-rest:] = last_rc[0, :rest]

    def rows(self, stored: Stored, first: int, out_rc: Array) -> None:
        """Makes whole rows, some at a time."""
        (scales_rg, are_zero), zeros_rg = self._scales(stored, first, first + len(out_rc)), None
        if self.zeros is not None:
            zeros_rg = self.zeros.of_rows(stored, first, first + len(out_rc))
        loaded_rb = self.codes.load(stored, first, first + len(out_rc))
        step = max(1, CHUNK // self.unit)
        for begin in range(0, len(out_rc), step):
            chunk = slice(begin, begin + step)
            numbers_rc, of_rows_rg = out_rc[chunk], _of_rows(scales_rg, chunk)
            self.codes.decode(loaded_rb[chunk], numbers_rc)
            if self.zeros is not None and zeros_rg is not None:
                _apply(Tensor.sub_, self.zeros, stored, _of_rows(zeros_rg, chunk), numbers_rc)
            if are_zero and not self.may_be_zero:
                self._refuse_zeros(stored, of_rows_rg, numbers_rc)
            _apply(Tensor.mul_, self.scales, stored, of_rows_rg, numbers_rc)
            if self.factor is not None:
                np.multiply(numbers_rc, np.float32(self.factor), out=numbers_rc)

    def _scales(self, stored: Stored, begin: int, end: int) -> tuple[Array, bool]:
        """The scales for some rows, a row each or one for all, and whether some may be zero."""
        places, rows = self.scales.places(stored, begin, end), self.scales.rows
        if rows * self.scales.codes.columns > KEPT:
            first = int(places.min())
            scales_rg, are_zero = self._checked(stored, first, int(places.max()) + 1)
            return scales_rg[places - first], are_zero
        if self.codes.name not in stored.kept:
            stored.kept[self.codes.name] = self._checked(stored, 0, rows)
        scales_rg, are_zero = stored.kept[self.codes.name]
        return scales_rg[places], are_zero

    def _checked(self, stored: Stored, begin: int, end: int) -> tuple[Array, bool]:
        """Rows of scales as codes are multiplied with them, and whether some are zero."""
        scales_rg = decoded(self.scales.codes, stored, begin, end)
        if self.divisor is not None:
            scales_rg = scales_rg / self._number(stored, self.divisor)
        if self.multiplier is not None:
            scales_rg = scales_rg * self._number(stored, self.multiplier)
        if self.codes.unit != 1:
            with np.errstate(over="ignore", invalid="ignore"):
                scales_rg = scales_rg * np.float32(self.codes.unit)
        if not np.isfinite(scales_rg).all():
            raise stored.error(
                self.codes.name,
                f"scales in {self.scales.codes.name} are NaN or infinite; the file is damaged: fetch or save it again",
            )
        return scales_rg, not scales_rg.all()

    def _number(self, stored: Stored, name: str) -> Array:
        number = stored.elements(name, 0, 1).to(torch.float32).numpy()
        if not np.isfinite(number).all() or not number.all():
            raise stored.error(
                self.codes.name, f"{name} is {number.item()}; the file is damaged: fetch or save it again"
            )
        return number

    def _refuse_zeros(self, stored: Stored, scales_rg: Array, out_rc: Array) -> None:
        """Refuses scales that are zero where the codes are not."""
        are_zero = np.broadcast_to(self.scales.over(scales_rg == 0, out_rc.shape[1]), out_rc.shape)
        if self.scales.column_of is None and bool((are_zero & (out_rc != 0)).any()):
            raise stored.error(
                self.codes.name,
                f"scales in {self.scales.codes.name} are zero, of weights that are not; the file is damaged: fetch or"
                " save it again",
            )


def _of_rows(numbers_rg: Array, rows: slice) -> Array:
    """The numbers of some rows; one row is that of all."""
    return numbers_rg if len(numbers_rg) == 1 else numbers_rg[rows]


def _apply(operation: InPlace, grid: Grid, stored: Stored, numbers_rg: Array, out_rc: Array) -> None:
    """Combines every element with the number of its block, in place; by torch, which is quicker at it than NumPy."""
    columns, block = out_rc.shape[1], grid.column_block
    if grid.column_of is not None:
        numbers_rg, block = numbers_rg[:, _places(stored, grid.column_of, 0, columns, numbers_rg.shape[1])], 1
    if block == 1 or numbers_rg.shape[1] == 1:
        operation(torch.from_numpy(out_rc), torch.from_numpy(numbers_rg))
        return
    even = columns // block * block
    of_blocks = torch.from_numpy(out_rc[:, :even].reshape(len(out_rc), -1, block))
    operation(of_blocks, torch.from_numpy(numbers_rg[:, : even // block, None]))
    if even < columns:
        operation(torch.from_numpy(out_rc[:, even:]), torch.from_numpy(numbers_rg[:, -1:]))


@dataclass(frozen=True)
class Transposed:
    """A matrix that is stored with its inputs in the rows; read as a whole.

    Attributes:
        stored_matrix: The matrix as it is stored.
    """

    stored_matrix: Scaled

    is_in_parts = False

    @property
    def kind(self) -> str:
        """How it is quantised, in words."""
        return self.stored_matrix.kind

    @property
    def shape(self) -> tuple[int, ...]:
        """Outputs and inputs."""
        rows, columns = self.stored_matrix.shape
        return columns, rows

    @property
    def unit(self) -> int:
        """All of it."""
        rows, columns = self.stored_matrix.shape
        return rows * columns

    def fill(self, stored: Stored, first: int, out: Array) -> None:
        """Makes the matrix, some of the stored rows at a time."""
        assert first == 0, "there is one unit"
        rows, columns = self.stored_matrix.shape
        out_cr = out.reshape(columns, rows)
        step = max(32, CHUNK * 32 // columns // 32 * 32)
        for begin in range(0, rows, step):
            part_rc = np.empty((min(step, rows - begin), columns), dtype=np.float32)
            self.stored_matrix.rows(stored, begin, part_rc)
            out_cr[:, begin : begin + step] = part_rc.T


@dataclass(frozen=True)
class Experts:
    """Matrices of experts in MXFP4 as gpt-oss has them: stored with their outputs in the rows, used the other way.

    Attributes:
        kind: How they are quantised, in words.
        blocks: The stored tensor of codes: experts, outputs, groups of inputs, bytes.
        scales: The stored tensor of exponents: experts, outputs, groups.
        sizes: Experts, outputs and groups.
        group: Inputs of a group.
    """

    kind: str
    blocks: str
    scales: str
    sizes: tuple[int, int, int]
    group: int

    is_in_parts = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Experts, inputs, outputs."""
        experts, outputs, groups = self.sizes
        return experts, groups * self.group, outputs

    @property
    def unit(self) -> int:
        """Elements that belong to one group of inputs of one expert."""
        return self.group * self.sizes[1]

    @cached_property
    def _bytes(self) -> Bytes:
        return Bytes(self.blocks, self.group * self.sizes[2], of_nibbles(E2M1))

    def fill(self, stored: Stored, first: int, out: Array) -> None:
        """Makes groups of inputs, those of one expert at a time."""
        _, outputs, groups = self.sizes
        out_gic = out.reshape(-1, self.group, outputs)
        done = 0
        while done < len(out_gic):
            expert, begin = divmod(first + done, groups)
            count = min(groups - begin, len(out_gic) - done)
            rows = expert * outputs, (expert + 1) * outputs
            width = self.group // 2
            codes_rb = self._bytes.load(stored, *rows)[:, begin * width : (begin + count) * width]
            scales_rg = Numbers(self.scales, groups).load(stored, *rows)[:, begin : begin + count]
            if not np.isfinite(scales_rg).all():
                raise stored.error(self.blocks, f"scales in {self.scales} are NaN; fetch or save the file again")
            part = Bytes(self.blocks, count * self.group, self._bytes.table)
            numbers_rc = np.empty((outputs, count * self.group), dtype=np.float32)
            part.decode(np.ascontiguousarray(codes_rb), numbers_rc)
            numbers_rgi = numbers_rc.reshape(outputs, count, self.group)
            numbers_rgi *= scales_rg[:, :, None]
            np.copyto(out_gic[done : done + count].reshape(-1, outputs), numbers_rc.T)
            done += count
