"""Which elements of a tensor are the largest, and random draws that keep some of them.

Ranks are those of a stable sort: of equal elements, the one that comes first ranks first. Only values at the cuts are
looked for, which takes a tenth of the time of a sort. mergekit's sort is not stable, so that which of equal elements it
keeps depends on the processor.

Shape suffixes: `n` all elements of a tensor, `rc` rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_llfc.merging.methods.parts import row_blocks

ONE = 1 << 32
"""A probability of one, in the units of `Draws`."""


def order_statistics(values_n: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """The values that an ascending sort would put at some places.

    Args:
        values_n: At least one element.
        ranks: Places, from 0 on.

    Returns:
        One value a rank, each a tensor without dimensions.
    """
    if values_n.device.type != "cpu":
        return list(values_n.sort().values[list(ranks)])
    ordered = torch.from_numpy(np.partition(values_n.numpy(), sorted(set(ranks))))
    return [ordered[rank] for rank in ranks]


def largest(magnitudes_n: Tensor, count: int) -> Tensor:
    """Which elements are among the largest; of equal ones, those that come first.

    Args:
        magnitudes_n: All elements.
        count: How many to choose.

    Returns:
        True where an element is chosen.
    """
    size = magnitudes_n.numel()
    if count <= 0 or count >= size:
        return torch.full((size,), count > 0, dtype=torch.bool, device=magnitudes_n.device)
    (cut,) = order_statistics(magnitudes_n, [size - count])
    chosen_n = magnitudes_n >= cut
    excess = int(torch.count_nonzero(chosen_n)) - count
    if excess:
        chosen_n[(magnitudes_n == cut).nonzero().view(-1)[-excess:]] = False
    return chosen_n


def between(magnitudes_n: Tensor, low: int, high: int) -> Tensor:
    """Which elements an ascending stable sort would put at the places from `low` to before `high`.

    Args:
        magnitudes_n: All elements.
        low: The first place.
        high: One more than the last place.

    Returns:
        True where an element is chosen.
    """
    size = magnitudes_n.numel()
    high = min(high, size)
    if low >= high:
        return torch.zeros(size, dtype=torch.bool, device=magnitudes_n.device)
    smallest, biggest = order_statistics(magnitudes_n, [low, high - 1])
    below_n, above_n = magnitudes_n < smallest, magnitudes_n > biggest
    before = low - int(torch.count_nonzero(below_n))
    after = size - int(torch.count_nonzero(above_n)) - high
    chosen_n = below_n.logical_or_(above_n).logical_not_()
    if before:
        chosen_n[(magnitudes_n == smallest).nonzero().view(-1)[:before]] = False
    if after:
        chosen_n[(magnitudes_n == biggest).nonzero().view(-1)[-after:]] = False
    return chosen_n


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
