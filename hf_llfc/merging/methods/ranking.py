"""Which elements of a tensor are the largest, and random draws that keep some of them.

Ranks are those of a stable sort: of equal elements, the one that comes first ranks first. Only values at the cuts are
looked for, which takes a tenth of the time of a sort. mergekit's sort is not stable, so that which of equal elements it
keeps depends on the processor.

Shape suffixes: `n` all elements, `c` some of them, `rc` rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_llfc.merging.methods.parts import row_blocks

Pieces = Callable[[], Iterator[Sequence[Tensor]]]
"""Gives the elements of some tensors from the beginning, in pieces, each of all of them: one-dimensional, float32 or
float64, on the CPU."""

BITS = 16
"""How many bits are told apart at a time."""

COLLECTED = 1 << 18
"""Elements that are collected before their bits are counted."""

ONE = 1 << 32
"""A probability of one, in the units of `Draws`."""


@dataclass(frozen=True)
class Cut:
    """Where a place in an ascending stable sort is.

    Attributes:
        value: The value at that place.
        below: How many elements are smaller.
        equal: How many elements are equal to it.
    """

    value: float
    below: int
    equal: int


def find_cuts(pieces: Pieces, places: Sequence[Sequence[int]]) -> list[list[Cut]]:
    """What an ascending sort would put at some places, without a sort, and without all elements in memory.

    The bits of numbers order as the numbers do, once those of negative ones are inverted. Each pass counts how many
    elements share the leading bits, among those that share the bits before with a place: two passes over float32, four
    over float64.

    Args:
        pieces: Gives all elements of some tensors, piece by piece; as often as asked.
        places: For every tensor its places, from 0 on, less than the number of elements.

    Returns:
        One a place, for every tensor.
    """
    searches = [[_Search(place) for place in of_tensor] for of_tensor in places]
    if not any(searches):
        return [[] for _ in searches]
    dtype = next(pieces())[0].dtype
    for shift in range(torch.finfo(dtype).bits - BITS, -1, -BITS):
        counters = [{search.prefix: _Counter() for search in of_tensor} for of_tensor in searches]
        for columns in pieces():
            for column_c, of_prefix in zip(columns, counters, strict=True):
                if of_prefix:
                    _count(column_c, of_prefix, shift)
        for of_tensor, of_prefix in zip(searches, counters, strict=True):
            for search in of_tensor:
                search.narrow(of_prefix[search.prefix].finished())
    return [[search.found(dtype) for search in of_tensor] for of_tensor in searches]


class _Counter:
    """How often each value of some bits occurs."""

    def __init__(self) -> None:
        self._counts = np.zeros(1 << BITS, dtype=np.int64)
        self._collected: list[np.ndarray[Any, Any]] = []
        self._size = 0

    def add(self, values: np.ndarray[Any, Any]) -> None:
        """Counts some more; a few are kept until there are many."""
        self._collected.append(values)
        self._size += values.size
        if self._size >= COLLECTED:
            self.finished()

    def finished(self) -> np.ndarray[Any, Any]:
        """The counts, with all that was added."""
        if self._size:
            found = np.bincount(np.concatenate(self._collected).astype(np.int64))
            self._counts[: found.size] += found
            self._collected, self._size = [], 0
        return self._counts


class _Search:
    """A place in a sort, and what is known of the value there: its leading bits, and how many elements are before."""

    def __init__(self, place: int) -> None:
        self._place = place
        self._below = 0
        self._equal = 0
        self.prefix = 0

    def narrow(self, counts: np.ndarray[Any, Any]) -> None:
        """Finds the next bits, from how many elements with the known bits have which next ones."""
        ends = counts.cumsum()
        number = int(np.searchsorted(ends, self._place - self._below, side="right"))
        self._below += int(ends[number] - counts[number])
        self._equal = int(counts[number])
        self.prefix = self.prefix << BITS | number

    def found(self, dtype: torch.dtype) -> Cut:
        """The value, when all bits are known."""
        width = torch.finfo(dtype).bits
        sign = 1 << width - 1
        bits = self.prefix ^ sign if self.prefix & sign else self.prefix ^ ((sign << 1) - 1)
        value = np.array([bits], dtype=f"u{width // 8}").view(f"f{width // 8}")[0]
        return Cut(float(value), self._below, self._equal)


def _count(column_c: Tensor, counters: Mapping[int, _Counter], shift: int) -> None:
    """Counts the bits above a shift of the elements whose bits before are those of a counter."""
    values = column_c.numpy()
    keys = values.view(f"i{values.itemsize}")
    signs = keys >> 8 * values.itemsize - 1
    # Bits as a whole number without a sign: those of negative numbers are inverted, of others only the first.
    keys = (keys ^ (signs | np.array(-1 << 8 * values.itemsize - 1, dtype=keys.dtype))).view(f"u{values.itemsize}")
    leading = keys >> shift
    if len(counters) == 1 and shift == 8 * values.itemsize - BITS:
        counters[0].add(leading)
        return
    before = leading >> BITS
    for prefix, counter in counters.items():
        counter.add(leading[before == prefix] & (1 << BITS) - 1)


@dataclass(frozen=True)
class Selection:
    """Which elements of a tensor an ascending stable sort would put at some places.

    Attributes:
        above: Elements that are larger are chosen,
        limit: if they are smaller than this;
        windows: and of those that are equal to a cut, the ones from a first to before a last, as they come.
    """

    above: float
    limit: float = math.inf
    windows: tuple[tuple[Cut, int, int], ...] = ()

    def begin(self) -> Callable[[Tensor], Tensor]:
        """Begins a pass.

        Returns:
            What says of each piece in order, in the dtype in which the cuts were found, which elements are chosen.
        """
        seen = [0] * len(self.windows)

        def chosen_of(piece_c: Tensor) -> Tensor:
            values = piece_c.numpy()
            chosen_c = values > self.above
            if self.limit != math.inf:
                chosen_c &= values < self.limit
            for index, (cut, first, last) in enumerate(self.windows):
                if first >= last:
                    continue
                is_equal = values == cut.value
                if (first, last) == (0, cut.equal):
                    chosen_c |= is_equal
                else:
                    equal = np.flatnonzero(is_equal)
                    chosen_c[equal[max(0, first - seen[index]) : max(0, last - seen[index])]] = True
                    seen[index] += equal.size
            return torch.from_numpy(chosen_c)

        return chosen_of


EVERYTHING = Selection(-math.inf)
NOTHING = Selection(math.inf)


def largest(pieces: Pieces, size: int, counts: Sequence[int]) -> list[Selection]:
    """Which elements are among the largest; of equal ones, those that come first.

    Args:
        pieces: Gives all elements of some tensors, none of them negative, piece by piece; as often as asked.
        size: How many elements there are in each.
        counts: How many to choose of each tensor.

    Returns:
        What chooses them, for every tensor.
    """
    places = [[size - count] if 0 < count < size else [] for count in counts]
    selections = []
    for count, cuts in zip(counts, find_cuts(pieces, places), strict=True):
        if not cuts:
            selections.append(EVERYTHING if count > 0 else NOTHING)
            continue
        (cut,) = cuts
        selections.append(Selection(cut.value, windows=((cut, 0, count - (size - cut.below - cut.equal)),)))
    return selections


def between(pieces: Pieces, size: int, bounds: Sequence[tuple[int, int]]) -> list[Selection]:
    """Which elements an ascending stable sort would put at the places from a first to before a last.

    Args:
        pieces: Gives all elements of some tensors, none of them negative, piece by piece; as often as asked.
        size: How many elements there are in each.
        bounds: For every tensor the first place, and one more than the last.

    Returns:
        What chooses them, for every tensor.
    """
    bounds = [(low, min(high, size)) for low, high in bounds]
    places = [[low, high - 1] if low < high else [] for low, high in bounds]
    selections = []
    for (low, high), cuts in zip(bounds, find_cuts(pieces, places), strict=True):
        if not cuts:
            selections.append(NOTHING)
            continue
        first, last = cuts
        if first.value == last.value:
            windows = [(first, low - first.below, high - first.below)]
        else:
            windows = [(first, low - first.below, first.equal), (last, 0, high - last.below)]
        selections.append(Selection(first.value, last.value, tuple(windows)))
    return selections


def order_in_rows(magnitudes_rc: Tensor) -> Tensor:
    """The columns of every row in an ascending stable sort of its elements, none of them negative; int64."""
    if magnitudes_rc.dtype != torch.float32:
        return magnitudes_rc.argsort(dim=1, stable=True)
    # The bits of numbers that are not negative order as the numbers do. With the column below them, all keys of a row
    # differ, and a sort of integers, which uses the processor's vectors, is stable.
    keys_rc = magnitudes_rc.contiguous().view(torch.int32).numpy().astype(np.int64)
    keys_rc <<= 32
    keys_rc |= np.arange(magnitudes_rc.shape[1])
    keys_rc.sort(axis=1)
    keys_rc &= 0xFFFFFFFF
    return torch.from_numpy(keys_rc)


class Draws:
    """Random whole numbers from 0 to 2³² − 1, as raw bits of PCG64.

    NumPy promises that the bits of a generator stay the same from version to version and on every machine, which
    PyTorch does not; and they take a twentieth of the time of `torch.bernoulli`. They are drawn on the CPU for tensors
    of every device.
    """

    def __init__(self, seed: int) -> None:
        """Starts at a seed.

        Args:
            seed: From `Settings.seed_of`.
        """
        self._source = np.random.PCG64(seed)
        self._left = np.empty(0, dtype="<u4")

    def bits(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        """The next numbers; the same ones, however many are asked for at a time."""
        missing = count - self._left.size
        if missing > 0:
            drawn = self._source.random_raw((missing + 1) // 2).astype("<u8", copy=False).view("<u4")
            self._left = np.concatenate([self._left, drawn]) if self._left.size else drawn
        bits, self._left = self._left[:count], self._left[count:]
        return bits

    def keep(self, probability: float, count: int) -> Tensor:
        """Elements kept with one probability: True where an element is kept, one-dimensional."""
        cut = round(probability * ONE)
        bits = self.bits(count)
        return torch.from_numpy(bits < np.uint32(cut)) if cut < ONE else torch.ones(count, dtype=torch.bool)


def keep_by_rank(magnitudes_rc: Tensor, lowest: float, highest: float, draws: Draws) -> Tensor:
    """Draws which elements of every row to keep, the larger ones with a higher probability.

    Args:
        magnitudes_rc: Rows and columns.
        lowest: Probability of the smallest element of a row.
        highest: Probability of the largest; in between it grows evenly with the rank.
        draws: Where the random numbers come from, row by row.

    Returns:
        True where an element is kept. An element that is alone in its row is kept with the mean of the two.
    """
    columns = magnitudes_rc.shape[1]
    middle = (lowest + highest) / 2
    probabilities = np.linspace(lowest, highest, columns) if columns > 1 else np.full(columns, middle)
    cuts = torch.from_numpy(np.rint(probabilities * ONE).astype(np.int64))
    kept_rc = torch.empty(magnitudes_rc.shape, dtype=torch.bool)
    for rows in row_blocks(*magnitudes_rc.shape):
        order_rc = order_in_rows(magnitudes_rc[rows])
        bits_rc = torch.from_numpy(draws.bits(order_rc.numel()).astype(np.int64)).view(order_rc.shape)
        kept_rc[rows].scatter_(1, order_rc, bits_rc.gather(1, order_rc) < cuts)
    return kept_rc
