"""Task vectors as matrices, for methods that decompose them.

Shape suffixes: `oi` outputs and inputs, `rs` some rows of the longer side and the shorter side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hf_llfc.merging.methods.decompositions import Blocks, rows_at_a_time
from hf_llfc.merging.methods.parts import Prepared, Stream, each_output, weighted
from hf_llfc.merging.methods.settings import Settings

SLICES = 8
"""In how many slices of columns a wide matrix is read, each in a pass of its own."""


class Tasks:
    """The task vectors τᵢ = θᵢ − θ₀ as matrices in float64, read in blocks with the shorter side in the rows.

    A matrix is outputs × the rest, which for the kernel of a convolution are its inputs and places. A matrix with fewer
    outputs than inputs is given out transposed, so that what is said of rows and right vectors holds for its columns.
    """

    def __init__(self, stream: Stream) -> None:
        """Reads nothing yet.

        Args:
            stream: The models and the base.
        """
        self._stream = stream
        self.shape = (stream.shape[0], each_output(stream.shape))
        self.is_tall = self.shape[0] >= self.shape[1]
        self.side = min(self.shape)
        self.dtype = stream.dtype

    def __len__(self) -> int:
        return self._stream.models

    def moments(self) -> tuple[list[float], list[Tensor]]:
        """Of every task ‖τᵢ‖²_F, and the mean of the rows of τᵢ, with the shape of one row."""
        energies = [0.0] * len(self)
        means = [torch.zeros(1, self.shape[1], dtype=torch.float64) for _ in range(len(self))]
        for of_tasks in self.rows():
            for index, rows_ri in enumerate(of_tasks):
                means[index].add_(rows_ri.sum(dim=0, keepdim=True), alpha=1 / self.shape[0])
                energies[index] += float(rows_ri.square_().sum())
        return energies, means

    def blocks(self) -> Iterator[list[Tensor]]:
        """Gives out a block of every τᵢ at a time, new tensors."""
        return self.rows() if self.is_tall else self._columns(self.rows)

    def blocks_of(self, index: int) -> Blocks:
        """τᵢ alone in blocks."""
        if self.is_tall:
            return lambda: self.rows_of(index)
        return lambda: (block_rs for (block_rs,) in self._columns(lambda: ([row] for row in self.rows_of(index))))

    def blocks_of_sum(self) -> Iterator[Tensor]:
        """Σ τᵢ in blocks."""
        if self.is_tall:
            return map(total_of, self.rows())
        return (block_rs for (block_rs,) in self._columns(lambda: ([total_of(each)] for each in self.rows())))

    def rows(self) -> Iterator[list[Tensor]]:
        """Gives out some outputs of every τᵢ at a time, whether that side is the longer one or not; new tensors."""
        for models_c, base_c in self._stream.parts(self.shape[1], size=rows_at_a_time(self.shape)):
            assert base_c is not None
            wide_c = base_c.double()
            yield [(model_c.double() - wide_c).view(-1, self.shape[1]) for model_c in models_c]

    def rows_of(self, index: int) -> Iterator[Tensor]:
        """Gives out some outputs of τᵢ after the other, whether that side is the longer one or not; new tensors."""
        for (model_c,), base_c in self._stream.parts(self.shape[1], size=rows_at_a_time(self.shape), only=index):
            assert base_c is not None
            yield (model_c.double() - base_c.double()).view(-1, self.shape[1])

    def _columns(self, rows: Callable[[], Iterator[list[Tensor]]]) -> Iterator[list[Tensor]]:
        """Slices of columns, transposed, of matrices that can only be read by rows: each takes a pass."""
        outputs, inputs = self.shape
        width = -(-inputs // max(1, min(SLICES, inputs * outputs // rows_at_a_time(self.shape))))
        for first in range(0, inputs, width):
            slices: list[Tensor] = []
            begin = 0
            for of_tasks in rows():
                if not slices:
                    slices = [of_tasks[0].new_empty(min(width, inputs - first), outputs) for _ in of_tasks]
                for slice_rs, rows_ri in zip(slices, of_tasks, strict=True):
                    slice_rs[:, begin : begin + len(rows_ri)] = rows_ri[:, first : first + width].T
                begin += len(of_tasks[0])
            yield slices


def total_of(blocks: Sequence[Tensor]) -> Tensor:
    """Σ of the blocks, in the memory of the first one."""
    summed = blocks[0]
    for block in blocks[1:]:
        summed.add_(block)
    return summed


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a tensor has two and more outputs, and two and more inputs."""
    return len(shape) > 1 and shape[0] > 1 and each_output(shape) > 1


def merged_change(
    stream: Stream, settings: Settings, prepare: Callable[[Tasks], Callable[[list[Tensor]], Tensor]]
) -> Prepared:
    """θ₀ + λΔ, with Δ the mean of the task vectors for everything that is no matrix.

    Args:
        stream: The models and the base.
        settings: `lambda`.
        prepare: From the task vectors to what makes a block of Δ of a block of every task vector, see `Tasks.blocks`.
    """
    if not is_matrix(stream.shape):
        return mean_change(stream, settings)
    tasks = Tasks(stream)
    return change_by_blocks(tasks, settings, prepare(tasks))


def change_by_blocks(tasks: Tasks, settings: Settings, change_of: Callable[[list[Tensor]], Tensor]) -> Prepared:
    """θ₀ + λΔ.

    Args:
        tasks: The task vectors.
        settings: `lambda`.
        change_of: Makes a block of Δ of a block of every task vector, see `Tasks.blocks`.
    """
    scale = settings.number("lambda")
    if not tasks.is_tall:
        change_oi = torch.empty(tasks.shape, dtype=torch.float64)
        begin = 0
        for blocks in tasks.blocks():
            change_oi[:, begin : begin + len(blocks[0])] = change_of(blocks).T
            begin += len(blocks[0])
        return whole_change(change_oi, settings)

    def combine(models_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        assert base_c is not None
        wide_c = base_c.double()
        blocks = [(model_c.double() - wide_c).view(-1, tasks.side) for model_c in models_c]
        return change_of(blocks).mul_(scale).view(-1).add_(base_c)

    return Prepared(combine, tasks.side, rows_at_a_time(tasks.shape))


def mean_change(stream: Stream, settings: Settings) -> Prepared:
    """θ₀ + λ times the mean of the task vectors."""
    shares = [settings.number("lambda") / stream.models] * stream.models
    return weighted(stream, shares)


def whole_change(change_oi: Tensor, settings: Settings) -> Prepared:
    """θ₀ + λΔ with Δ in memory.

    Args:
        change_oi: Δ, outputs × inputs.
        settings: `lambda`.
    """
    scale = settings.number("lambda")
    change_n = change_oi.reshape(-1)
    begin = 0

    def combine(models_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        nonlocal begin
        assert base_c is not None
        first, begin = begin, begin + base_c.numel()
        return change_n[first:begin].to(torch.float64, copy=True).mul_(scale).add_(base_c)

    return Prepared(combine)
