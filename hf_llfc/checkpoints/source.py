"""A model to read from, tensor by tensor, wherever its tensors come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from hf_llfc.checkpoints.positioned import TensorBytes

Places = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Moved:
    """A matrix in a file whose rows and columns are at other places there; a vector is one of a single column.

    Attributes:
        span: Where the bytes of the original lie.
        shape: Rows and columns.
        rows: Place of every row in the original; None where they stay.
        columns: The same of columns.
    """

    span: TensorBytes
    shape: tuple[int, int]
    rows: Places | None
    columns: Places | None


@dataclass(frozen=True)
class Source:
    """A model to read from.

    Attributes:
        label: What it is called, for messages.
        read: Gives a tensor by name.
        span: Says where a tensor's bytes lie in a file; None where it has to be read as a whole.
        moved: Says where those of the original lie of a matrix without a span, if its rows and columns are moved.
    """

    label: str
    read: Callable[[str], Tensor]
    span: Callable[[str], TensorBytes | None] = lambda name: None
    moved: Callable[[str], Moved | None] = lambda name: None
