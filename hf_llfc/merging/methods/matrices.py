"""Task vectors as matrices, for methods that decompose them.

Shape suffix: `oi` outputs and inputs, `ri` some rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hf_llfc.merging.methods.parts import Prepared, Stream, around_base, each_output
from hf_llfc.merging.methods.settings import Settings

ROWS = 1 << 19
"""Elements of the rows that are worked on at a time: enough for products of matrices, few beside a matrix."""


class Tasks:
    """The task vectors τᵢ = θᵢ − θ₀ as matrices in float64, each made when it is asked for.

    A matrix is outputs × the rest, which for the kernel of a convolution are its inputs and places.
    """

    def __init__(self, stream: Stream) -> None:
        """Makes none yet.

        Args:
            stream: The models and the base.
        """
        self._stream = stream
        self.shape = (stream.shape[0], each_output(stream.shape))

    def __len__(self) -> int:
        return self._stream.models

    def __iter__(self) -> Iterator[Tensor]:
        """Yields new tensors, one after the other."""
        for index in range(len(self)):
            yield self.matrix(index)

    def matrix(self, index: int) -> Tensor:
        """τᵢ, a new tensor."""
        return torch.cat(list(self.rows(index)))

    def rows(self, index: int) -> Iterator[Tensor]:
        """Some rows of τᵢ after the other, new tensors."""
        for (model_c,), base_c in self._stream.parts(self.shape[1], size=ROWS, only=index):
            assert base_c is not None
            yield model_c.to(torch.float64, copy=True).sub_(base_c).view(-1, self.shape[1])

    def rows_of_sum(self) -> Iterator[Tensor]:
        """Some rows of Σ τᵢ after the other, new tensors."""
        for models_c, base_c in self._stream.parts(self.shape[1], size=ROWS):
            assert base_c is not None
            summed_c = base_c.to(torch.float64, copy=True).mul_(-len(models_c))
            for model_c in models_c:
                summed_c.add_(model_c)
            yield summed_c.view(-1, self.shape[1])

    def sum(self) -> Tensor:
        """Σ τᵢ."""
        return torch.cat(list(self.rows_of_sum()))


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a tensor has two and more outputs, and two and more inputs."""
    return len(shape) > 1 and shape[0] > 1 and each_output(shape) > 1


def merged_change(stream: Stream, settings: Settings, change: Callable[[Tasks], Tensor]) -> Prepared:
    """θ₀ + λΔ, with Δ the mean of the task vectors for everything that is no matrix.

    Args:
        stream: The models and the base.
        settings: `lambda`.
        change: From the task vectors to Δ, in float64, outputs × the rest.
    """
    scale = settings.number("lambda")
    if not is_matrix(stream.shape):
        shares = [scale / stream.models] * stream.models
        return Prepared(lambda models_c, base_c: around_base(models_c, base_c, shares))
    tasks = Tasks(stream)
    change_n = change(tasks).reshape(-1)
    begin = 0

    def combine(models_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        nonlocal begin
        assert base_c is not None
        begin, end = begin + base_c.numel(), begin + base_c.numel()
        return change_n[end - base_c.numel() : end].mul(scale).add_(base_c)

    return Prepared(combine)
