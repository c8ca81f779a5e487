"""Which elements of a tensor are the largest, and random draws that keep some of them.

Ranks are those of a stable sort: of equal elements, the one that comes first ranks first. Only values at the cuts are
looked for, which takes a tenth of the time of a sort. mergekit's sort is not stable, so that which of equal elements it
keeps depends on the processor.

Shape suffixes: `n` all elements, `c` some of them, `rc` rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_llfc.merging.methods.parts import row_blocks

Pieces = Callable[[], Iterator[Tensor]]
"""Gives the elements of a tensor from the beginning, in pieces: one-dimensional, float32 or float64, on the CPU."""

BINS = 1 << 16
"""More than the leading bits of any number that is not negative can tell apart."""

ONE = 1 << 32
"""A probability of one, in the units of `Draws`."""


def quantiles(values_n: Tensor, places: Sequence[int]) -> list[Tensor]:
    """The values that an ascending sort would put at some places.

    Args:
        values_n: At least one element, of any sign.
        places: From 0 on.

    Returns:
        One value a place, each a tensor without dimensions.
    """
    if values_n.device.type != "cpu":
        return list(values_n.sort().values[list(places)])
    ordered = torch.from_numpy(np.partition(values_n.numpy(), sorted(set(places))))
    return [ordered[place] for place in places]


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


def find_cuts(pieces: Pieces, places: Sequence[int]) -> list[Cut]:
    """What an ascending sort would put at some places, without a sort, and without all elements in memory.

    The bits of numbers that are not negative order as the numbers do. A first pass counts how many elements share their
    leading bits; a second one collects those with the leading bits that belong to the places, a hundredth or so.

    Args:
        pieces: Gives all elements, none of them negative, piece by piece; twice.
        places: From 0 on, less than the number of elements.

    Returns:
        One a place.
    """
    counts = np.zeros(BINS, dtype=np.int64)
    for piece_c in pieces():
        found = np.bincount(_leading_bits(piece_c))
        counts[: found.size] += found
    ends = counts.cumsum()
    bins = np.searchsorted(ends, places, side="right")
    collected: dict[int, list[np.ndarray[Any, Any]]] = {int(number): [] for number in bins}
    for piece_c in pieces():
        leading = _leading_bits(piece_c)
        for number, of_place in collected.items():
            of_place.append(piece_c.numpy()[leading == number])
    cuts = []
    for place, number in zip(places, bins, strict=True):
        before = int(ends[number] - counts[number])
        values = np.concatenate(collected[int(number)])
        value = np.partition(values, place - before)[place - before]
        cuts.append(Cut(float(value), before + int((values < value).sum()), int((values == value).sum())))
    return cuts


def largest(pieces: Pieces, size: int, count: int) -> Tensor:
    """Which elements are among the largest; of equal ones, those that come first.

    Args:
        pieces: Gives all elements, none of them negative, piece by piece; as often as asked.
        size: How many elements there are.
        count: How many to choose.

    Returns:
        True where an element is chosen.
    """
    if count <= 0 or count >= size:
        return torch.full((size,), count > 0, dtype=torch.bool)
    (cut,) = find_cuts(pieces, [size - count])
    return _choose(pieces, size, [(cut, 0, count - (size - cut.below - cut.equal))], math.inf)


def between(pieces: Pieces, size: int, low: int, high: int) -> Tensor:
    """Which elements an ascending stable sort would put at the places from `low` to before `high`.

    Args:
        pieces: Gives all elements, none of them negative, piece by piece; as often as asked.
        size: How many elements there are.
        low: The first place.
        high: One more than the last place.

    Returns:
        True where an element is chosen.
    """
    high = min(high, size)
    if low >= high:
        return torch.zeros(size, dtype=torch.bool)
    first, last = find_cuts(pieces, [low, high - 1])
    if first.value == last.value:
        return _choose(pieces, size, [(first, low - first.below, high - first.below)], first.value)
    windows = [(first, low - first.below, first.equal), (last, 0, high - last.below)]
    return _choose(pieces, size, windows, last.value)


def _choose(pieces: Pieces, size: int, windows: Sequence[tuple[Cut, int, int]], limit: float) -> Tensor:
    """Elements above the first cut and below a limit, and of those equal to a cut the ones in its window, by order."""
    chosen = np.empty(size, dtype=np.bool_)
    seen = [0] * len(windows)
    begin = 0
    for piece_c in pieces():
        values = piece_c.numpy()
        chosen_c = chosen[begin : begin + values.size]
        np.greater(values, windows[0][0].value, out=chosen_c)
        if limit != math.inf:
            chosen_c &= values < limit
        for index, (cut, first, last) in enumerate(windows):
            if (first, last) == (0, cut.equal):
                chosen_c |= values == cut.value
            else:
                equal = np.flatnonzero(values == cut.value)
                chosen_c[equal[max(0, first - seen[index]) : max(0, last - seen[index])]] = True
                seen[index] += equal.size
        begin += values.size
    return torch.from_numpy(chosen)


def _leading_bits(piece_c: Tensor) -> np.ndarray[Any, Any]:
    """The exponent and five bits of the fraction of every element."""
    if piece_c.dtype == torch.float32:
        return piece_c.view(torch.int32).numpy() >> 18
    return piece_c.view(torch.int64).numpy() >> 47


def ranks_in_rows(magnitudes_rc: Tensor) -> Tensor:
    """The place of every element in an ascending stable sort of its row, from 0 on; int64."""
    rows, columns = magnitudes_rc.shape
    if magnitudes_rc.device.type != "cpu" or magnitudes_rc.dtype != torch.float32:
        order_rc = magnitudes_rc.argsort(dim=1, stable=True)
    else:
        # The bits of numbers that are not negative order as the numbers do. With the column below them, all keys of a
        # row differ, and a sort of integers, which uses the processor's vectors, is stable.
        keys_rc = magnitudes_rc.contiguous().view(torch.int32).numpy().astype(np.int64)
        keys_rc <<= 32
        keys_rc |= np.arange(columns)
        keys_rc.sort(axis=1)
        keys_rc &= 0xFFFFFFFF
        order_rc = torch.from_numpy(keys_rc)
    places = torch.arange(columns, device=order_rc.device).expand(rows, columns)
    return torch.empty_like(order_rc).scatter_(1, order_rc, places)


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
        ranks_rc = ranks_in_rows(magnitudes_rc[rows]).cpu()
        bits_rc = torch.from_numpy(draws.bits(ranks_rc.numel()).astype(np.int64)).view(ranks_rc.shape)
        kept_rc[rows] = bits_rc < cuts[ranks_rc]
    return kept_rc.to(magnitudes_rc.device)
