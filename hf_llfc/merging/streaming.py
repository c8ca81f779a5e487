"""Merging in bounded memory: parts of tensors are read, combined and written by threads, and by processes.

A tensor whose bytes can be read where they lie, in all models, is cut into parts; a thread reads a part of each model,
combines it chunk by chunk, and writes it to its place. One thread computes while another waits for the disk. A tensor
that has to be moved or made first is read as a whole, and no more of them at a time than the budget allows.

Shape suffixes: `p` the elements of one part, `c` those of one chunk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_llfc.checkpoints import FileSpan, Sink, tensor_bytes
from hf_llfc.merging.combination import CHUNK, DTYPES, Combination, Scratch
from hf_llfc.merging.tensors import Merge
from hf_llfc.workers import ALONE, Workers

PART = 1 << 20
"""Elements that are read and written at a time: a system call for less costs the kernel more a byte."""

MEMORY = 1 << 28
"""Bytes of whole tensors that are in memory together, unless a single one needs more."""


@dataclass(frozen=True)
class Part:
    """What one thread does at a time: some elements of a tensor.

    Attributes:
        name: The tensor.
        start: The first element.
        stop: The one after the last.
        cost: Bytes to be read and written.
        whole: Bytes of models' tensors that have to be read as a whole for it.
    """

    name: str
    start: int
    stop: int
    cost: int
    whole: int


def merge_streamed(
    merge: Merge,
    sink: Sink,
    *,
    names: Sequence[str] | None = None,
    workers: Workers = ALONE,
    memory: int = MEMORY,
    on_bytes: Callable[[int, int], None] | None = None,
) -> None:
    """Merges models into a sink, the same bytes whatever the number of threads and processes.

    Args:
        merge: What becomes of every tensor.
        sink: Takes the merged bytes, in any order.
        names: The tensors to be made; all where None.
        workers: Threads and processes that share the tensors; the sinks of the processes must write to the same place.
        memory: Bytes of whole tensors that may be in memory together in one process. One tensor is always read, so
            that a single one may need more.
        on_bytes: Told how many bytes this process has done and how many it will do, about.

    Raises:
        CheckpointError: A tensor cannot be combined, is not finite, differs where it must not, leaves the range of its
            dtype, or cannot be read.
    """
    parts = [part for name in (merge.infos if names is None else names) for part in _parts(merge, name)]
    total = sum(part.cost for part in parts) // workers.ranks
    done = 0
    lock = threading.Lock()
    make = _Merging(merge, sink, _Budget(memory))

    def work(part: Part) -> None:
        nonlocal done
        make(part)
        if on_bytes is not None:
            with lock:
                done = min(total, done + part.cost)
                on_bytes(done, total)

    workers.map(work, parts, costs=[float(part.cost) for part in parts])


def _parts(merge: Merge, name: str) -> Iterator[Part]:
    info = merge.infos[name]
    everyone = merge.everyone
    spans = [source.span(name) for source in everyone]
    per_element = (1 + len(everyone)) * info.dtype.itemsize
    if all(span is not None for span in spans) and (merge.is_sum(name) or _is_taken_over(merge, name)):
        for start in range(0, info.elements, PART):
            stop = min(start + PART, info.elements)
            yield Part(name, start, stop, per_element * (stop - start), 0)
        return
    # What is read as a whole is moved or made, which takes the tensor twice.
    whole = sum(2 * info.nbytes for span in spans if span is None or not merge.is_sum(name))
    yield Part(name, 0, info.elements, per_element * info.elements, whole)


def _is_taken_over(merge: Merge, name: str) -> bool:
    """Whether a tensor's bytes are those that lie in the file of the only model."""
    info, span = merge.infos[name], merge.sources[0].span(name)
    return merge.is_copy(name) and span is not None and (span.dtype, span.nbytes) == (info.dtype, info.nbytes)


class _Budget:
    """Bytes that threads may hold together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._freed = threading.Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Waits until there is room, or nothing else is held."""
        with self._freed:
            self._freed.wait_for(lambda: not self._taken or self._taken + count <= self._limit)
            self._taken += count
        try:
            yield
        finally:
            with self._freed:
                self._taken -= count
                self._freed.notify_all()


class _Merging(threading.local):
    """What merges parts; every thread that uses it gets room of its own for a part of each model and of the result."""

    def __init__(self, merge: Merge, sink: Sink, budget: _Budget) -> None:
        self._merge = merge
        self._sink = sink
        self._budget = budget
        self._scratch = Scratch()
        self._rooms = [_Room() for _ in (*merge.everyone, sink)]

    def __call__(self, part: Part) -> None:
        with self._budget.taken(part.whole):
            if self._merge.is_sum(part.name):
                self._sum(part)
            elif _is_taken_over(self._merge, part.name):
                self._copy(part)
            else:
                self._sink.write(part.name, 0, tensor_bytes(self._merge.tensor(part.name)))

    def _copy(self, part: Part) -> None:
        span = self._merge.sources[0].span(part.name)
        assert span is not None, "what is taken over lies in a file"
        for start in range(part.start, part.stop, PART):
            data = self._rooms[0].filled(span, start, min(start + PART, part.stop))
            self._sink.write(part.name, start * data.itemsize, tensor_bytes(data))

    def _sum(self, part: Part) -> None:
        everyone = self._merge.everyone
        info = self._merge.infos[part.name]
        read: list[FileSpan | Tensor] = [source.span(part.name) or source.read(part.name) for source in everyone]
        whole = [each.reshape(-1) if isinstance(each, Tensor) else each for each in read]
        can_be_summed = all(
            each.dtype in DTYPES and each.nbytes == info.elements * each.dtype.itemsize for each in read
        )
        combination = self._merge.combination(part.name)
        for start in range(part.start, part.stop, PART) if can_be_summed else ():
            stop = min(start + PART, part.stop)
            columns = [
                each[start:stop] if isinstance(each, Tensor) else room.filled(each, start, stop)
                for each, room in zip(whole, self._rooms, strict=False)
            ]
            result_p = self._rooms[-1].of(info.dtype, stop - start)
            can_be_summed = self._combine(combination, columns, result_p)
            if not can_be_summed:
                break
            self._sink.write(part.name, start * info.dtype.itemsize, tensor_bytes(result_p))
        if not can_be_summed:
            self._merge.tensor(part.name)
            raise AssertionError(f"{part.name}: whole tensors can be summed, chunks of them cannot")

    def _combine(self, combination: Combination, columns: Sequence[Tensor], result_p: Tensor) -> bool:
        """Combines a part chunk by chunk; whether all of it is finite."""
        chunks = zip(*(column.split(CHUNK) for column in (result_p, *columns)), strict=True)
        return all(self._scratch.combine(combination, of_columns, result_c) for result_c, *of_columns in chunks)


class _Room:
    """Bytes for one part of elements of any type."""

    def __init__(self) -> None:
        self._bytes = torch.empty(PART * torch.float64.itemsize, dtype=torch.uint8)

    def of(self, dtype: torch.dtype, count: int) -> Tensor:
        """Room for elements of a type."""
        return self._bytes[: count * dtype.itemsize].view(dtype)

    def filled(self, span: FileSpan, start: int, stop: int) -> Tensor:
        """Elements of a tensor in a file."""
        tensor = self.of(span.dtype, stop - start)
        span.read_into(tensor_bytes(tensor), start * span.dtype.itemsize)
        return tensor
