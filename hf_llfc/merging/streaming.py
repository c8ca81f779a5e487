"""Merging in bounded memory: parts of tensors are read, combined and written by several workers, and processes.

A tensor whose bytes can be read where they lie, in all models, is cut into parts; a worker reads a part of each model,
combines it chunk by chunk, and writes it to its place. One worker computes while another waits for the disk. A method
that must know of all parts before it merges one has a worker to itself for the tensor, which reads the parts again in
each of its passes: they come from the page cache. A tensor that has to be moved or made first is read as a whole, and
no more of them at a time than the budget allows.

Workers of a large merge are forked copies of the process where there can be any, else its threads: a chunk is a dozen
calls of some microseconds, each of which gives up Python's lock and takes it again, so that two threads merge no faster
than one.

Shape suffixes: `p` the elements of one part, `c` those of one chunk.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from hf_llfc.checkpoints import Sink, TensorBytes, TensorInfo, Written, tensor_bytes
from hf_llfc.checkpoints.buffers import is_constant
from hf_llfc.checkpoints.source import Moved
from hf_llfc.merging.combination import CHUNK, DTYPES, Combination, Scratch, is_finite
from hf_llfc.merging.methods.declarations import Need
from hf_llfc.merging.methods.parts import PART as METHOD_PART
from hf_llfc.merging.methods.parts import Parts, merged_parts
from hf_llfc.merging.on_device import DeviceScratch
from hf_llfc.merging.tensors import Merge, beyond_range
from hf_llfc.parallel.workers import ALONE, Workers

PART = 1 << 20
"""Elements that are read and written at a time: a system call for less costs the kernel more a byte."""

MEMORY = 1 << 28
"""Bytes of whole tensors that are in memory together, unless a single one needs more."""

KEPT = 1 << 26
"""Bytes that a worker keeps for whole tensors from one to the next."""

DECOMPOSED = 24
"""Bytes that a decomposition takes an element of the tensor: three matrices in float64."""

_ROUNDED = Combination((1.0,))

FORKED = 1 << 26
"""Bytes to be read and written from which on copies of the process merge: to start and end them takes some 50 ms."""


@dataclass(frozen=True)
class Part:
    """What one worker does at a time: some elements of a tensor.

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
    """Merges models into a sink, the same bytes whatever the number of workers and processes.

    Args:
        merge: What becomes of every tensor.
        sink: Takes the merged bytes, in any order.
        names: The tensors to be made; all where None.
        workers: Workers and processes that share the tensors, and the device that sums them; the sinks of the processes
            must write to the same place.
        memory: Bytes of whole tensors that may be in memory together in one process. One tensor is always read, so
            that a single one may need more.
        on_bytes: Told how many bytes this process has done and how many it will do, about.

    Raises:
        CheckpointError: A tensor cannot be combined, is not finite, differs where it must not, leaves the range of its
            dtype, or cannot be read.
    """
    parts = [part for name in (merge.infos if names is None else names) for part in _parts(merge, name)]
    parts.sort(key=lambda part: -part.cost)  # what takes long begins early, so that no worker waits for it at the end
    total = sum(part.cost for part in parts) // workers.ranks
    forked = total >= FORKED and workers.device is None
    done = 0
    lock = threading.Lock()

    def note(part: Part, put: list[Written]) -> None:
        nonlocal done
        for written in put:
            sink.note(written)
        if on_bytes is not None:
            with lock:
                done = min(total, done + part.cost)
                on_bytes(done, total)

    # One tensor may be larger than the budget. What it takes alone, smaller ones may take together.
    limit = max([memory, *(part.whole for part in parts)])
    make = _Merging(merge, sink, _Budget(limit, forked=forked), workers.device)
    workers.each(make, parts, costs=[float(part.cost) for part in parts], on_result=note, forked=forked)


def _parts(merge: Merge, name: str) -> Iterator[Part]:
    info = merge.infos[name]
    everyone = merge.for_method if merge.is_by_method(name) else merge.everyone
    spans = [source.span(name) for source in everyone]
    per_element = (1 + len(everyone)) * info.dtype.itemsize
    in_any_order = merge.is_sum(name) or _is_taken_over(merge, name) or _is_elementwise(merge, name)
    if all(span is not None for span in spans) and in_any_order:
        for start in range(0, info.elements, PART):
            stop = min(start + PART, info.elements)
            yield Part(name, start, stop, per_element * (stop - start), 0)
        return
    # What is read as a whole is made, which takes the tensor twice, or moved a few rows at a time.
    whole = 0
    streams = merge.is_sum(name) or merge.is_by_method(name)
    for source, span in zip(everyone, spans, strict=True):
        if span is None or not streams:
            whole += info.nbytes * (1 if merge.is_sum(name) and source.moved(name) is not None else 2)
    if merge.is_by_method(name) and merge.method is not None and merge.method.need is Need.DECOMPOSITION:
        whole += DECOMPOSED * info.elements
    yield Part(name, 0, info.elements, per_element * info.elements, whole)


def _is_elementwise(merge: Merge, name: str) -> bool:
    """Whether a method merges any part of a tensor without looking at the others."""
    return merge.is_by_method(name) and merge.method is not None and merge.method.need is Need.ELEMENTWISE


def _is_taken_over(merge: Merge, name: str) -> bool:
    """Whether a tensor's bytes are those that lie in the file of the only model."""
    info, span = merge.infos[name], merge.sources[0].span(name)
    return merge.is_copy(name) and span is not None and (span.dtype, span.nbytes) == (info.dtype, info.nbytes)


class _Budget:
    """Bytes that the workers of a process may hold together.

    Args:
        limit: How many.
        forked: Whether the workers are copies of the process, not threads.
    """

    def __init__(self, limit: int, *, forked: bool) -> None:
        self._limit = limit
        self._taken = multiprocessing.RawValue("q", 0)
        self._freed = multiprocessing.Condition() if forked else threading.Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Waits until there is room, or nothing else is held."""
        with self._freed:
            self._freed.wait_for(lambda: not self._taken.value or self._taken.value + count <= self._limit)
            self._taken.value += count
        try:
            yield
        finally:
            with self._freed:
                self._taken.value -= count
                self._freed.notify_all()


class _Merging(threading.local):
    """What merges parts; every worker that uses it gets room of its own for a part of each model and of the result."""

    def __init__(self, merge: Merge, sink: Sink, budget: _Budget, device: torch.device | None) -> None:
        self._merge = merge
        self._sink = sink
        self._budget = budget
        self._scratch = Scratch(CHUNK) if device is None else DeviceScratch(device)
        self._rounding = Scratch(CHUNK)
        self._rooms = [_Room() for _ in (*merge.for_method, sink)]
        self._matrices = [_Matrix() for _ in merge.everyone]

    def __call__(self, part: Part) -> list[Written]:
        """Makes a part and puts it in its place."""
        with self._budget.taken(part.whole):
            if self._merge.is_sum(part.name):
                return list(self._sum(part))
            if _is_taken_over(self._merge, part.name):
                return list(self._copy(part))
            if self._merge.is_by_method(part.name):
                return list(self._by_method(part))
            return [self._sink.put(part.name, 0, tensor_bytes(self._merge.tensor(part.name)))]

    def _copy(self, part: Part) -> Iterator[Written]:
        span = self._merge.sources[0].span(part.name)
        assert span is not None, "what is taken over lies in a file"
        for start in range(part.start, part.stop, PART):
            data = self._rooms[0].filled(span, start, min(start + PART, part.stop))
            if data.dtype in DTYPES and not is_constant(part.name) and not bool(data.isfinite().all()):
                self._merge.tensor(part.name)
                raise AssertionError(f"{part.name}: a part of it is not finite, all of it is")
            yield self._sink.put(part.name, start * data.itemsize, tensor_bytes(data))

    def _sum(self, part: Part) -> Iterator[Written]:
        everyone = self._merge.everyone
        info = self._merge.infos[part.name]
        read: list[TensorBytes | Moved | Tensor] = [
            source.span(part.name) or source.moved(part.name) or source.read(part.name) for source in everyone
        ]
        lying = [each.span if isinstance(each, Moved) else each for each in read]
        can_be_summed = all(
            each.dtype in DTYPES and each.nbytes == info.elements * each.dtype.itemsize for each in lying
        )
        combination = self._merge.combination(part.name)
        step = PART
        for each, matrix in zip(read, self._matrices, strict=True) if can_be_summed else ():
            if isinstance(each, Moved):
                matrix.read(each)
                step = max(1, PART // each.shape[1]) * each.shape[1]
        whole = [
            each.reshape(-1) if isinstance(each, Tensor) else matrix if isinstance(each, Moved) else each
            for each, matrix in zip(read, self._matrices, strict=True)
        ]
        for start in range(part.start, part.stop, step) if can_be_summed else ():
            stop = min(start + step, part.stop)
            columns = [
                each[start:stop] if isinstance(each, Tensor) else room.filled(each, start, stop)
                for each, room in zip(whole, self._rooms, strict=False)
            ]
            result_p = self._rooms[-1].of(info.dtype, stop - start)
            can_be_summed = self._scratch.combine(combination, columns, result_p)
            if not can_be_summed:
                break
            yield self._sink.put(part.name, start * info.dtype.itemsize, tensor_bytes(result_p))
        for matrix in self._matrices:
            matrix.leave()
        if not can_be_summed:
            self._merge.tensor(part.name)
            raise AssertionError(f"{part.name}: whole tensors can be summed, chunks of them cannot")

    def _by_method(self, part: Part) -> Iterator[Written]:
        merge, info = self._merge, self._merge.infos[part.name]
        method, settings = merge.method, merge.settings[part.name]
        assert method is not None
        read = [source.span(part.name) or source.read(part.name).reshape(-1) for source in merge.for_method]
        if any(each.dtype not in DTYPES or each.nbytes != info.elements * each.dtype.itemsize for each in read):
            merge.tensor(part.name)
            raise AssertionError(f"{part.name}: whole tensors can be merged, parts of them cannot")
        stream = _Columns(read, self._rooms, part, info, has_base=merge.base is not None)
        try:
            prepared = method.prepared(stream, settings)
            if prepared.weights is not None:
                yield from self._weighted(part, stream, prepared.weights)
                return
            start, filled = part.start, 0
            for merged_c in merged_parts(prepared, stream):
                merged_c = merged_c.reshape(-1)
                result_p = self._rooms[-1].of(info.dtype, max(PART, merged_c.numel()), keep=filled)
                if not self._rounding.combine(_ROUNDED, [merged_c], result_p[filled : filled + merged_c.numel()]):
                    raise beyond_range(method, settings, info.dtype)
                filled += merged_c.numel()
                if filled + merged_c.numel() > PART or start + filled == part.stop:
                    put = tensor_bytes(result_p[:filled])
                    yield self._sink.put(part.name, start * info.dtype.itemsize, put)
                    start, filled = start + filled, 0
        except _NotFiniteError:
            merge.tensor(part.name)
            raise AssertionError(f"{part.name}: the whole tensor is finite, a part of it is not") from None

    def _weighted(self, part: Part, stream: _Columns, weights: tuple[float, ...]) -> Iterator[Written]:
        """Sums and rounds in one step what a method found to be a weighted sum."""
        info, start = self._merge.infos[part.name], part.start
        for models_p, base_p in stream.parts(size=PART):
            result_p = self._rooms[-1].of(info.dtype, models_p[0].numel())
            columns = models_p if base_p is None else [base_p, *models_p]
            if not self._rounding.combine(Combination(weights), columns, result_p):
                method = self._merge.method
                assert method is not None
                raise beyond_range(method, self._merge.settings[part.name], info.dtype)
            yield self._sink.put(part.name, start * info.dtype.itemsize, tensor_bytes(result_p))
            start += result_p.numel()


class _NotFiniteError(Exception):
    """A model has an element that is infinite or NaN."""


class _Columns:
    """Some elements of a tensor of every model, from files or memory; what is read is looked at once.

    Args:
        read: The base first, if there is one; then the models.
        rooms: One a tensor, at least.
        part: The elements.
        info: Of the result.
        has_base: Whether the first is the base.
    """

    def __init__(
        self,
        read: Sequence[TensorBytes | Tensor],
        rooms: Sequence[_Room],
        part: Part,
        info: TensorInfo,
        *,
        has_base: bool,
    ) -> None:
        self.shape = info.shape
        self.models = len(read) - has_base
        self.dtype = reduce(torch.promote_types, (each.dtype for each in read), info.dtype)
        self._read = read
        self._rooms = rooms
        self._part = part
        self.has_base = has_base
        self._is_checked = False

    def parts(self, width: int = 1, *, size: int = METHOD_PART, only: int | None = None) -> Parts:
        """See `hf_llfc.merging.methods.parts.Stream`."""
        chosen = list(range(len(self._read)))
        if only is not None:
            chosen = [0, 1 + only] if self.has_base else [only]
        step = max(1, size // width) * width
        at_once = max(1, PART // step) * step
        for begin in range(self._part.start, self._part.stop, at_once):
            end = min(begin + at_once, self._part.stop)
            columns = [self._filled(index, begin, end) for index in chosen]
            for first in range(0, end - begin, step):
                columns_c = [column[first : first + step] for column in columns]
                if not self._is_checked and not all(map(is_finite, columns_c)):
                    raise _NotFiniteError
                columns_c = [column_c.to(self.dtype) for column_c in columns_c]
                yield (columns_c[1:], columns_c[0]) if self.has_base else (columns_c, None)
        self._is_checked |= only is None

    def _filled(self, index: int, begin: int, end: int) -> Tensor:
        read = self._read[index]
        return read[begin:end] if isinstance(read, Tensor) else self._rooms[index].filled(read, begin, end)


class _Room:
    """Bytes for one part of elements of any type."""

    def __init__(self) -> None:
        self._bytes = torch.empty(PART * torch.float64.itemsize, dtype=torch.uint8)

    def of(self, dtype: torch.dtype, count: int, *, keep: int = 0) -> Tensor:
        """Room for elements of a type; more of it, if they are a row that is longer than a part."""
        if count * dtype.itemsize > len(self._bytes):
            kept = self._bytes[: keep * dtype.itemsize]
            self._bytes = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
            self._bytes[: len(kept)] = kept
        return self._bytes[: count * dtype.itemsize].view(dtype)

    def filled(self, span: TensorBytes | _Matrix, start: int, stop: int) -> Tensor:
        """Elements of a tensor in a file."""
        tensor = self.of(span.dtype, stop - start)
        span.read_into(tensor_bytes(tensor), start * span.dtype.itemsize)
        return tensor


class _Matrix:
    """A matrix of a file in memory, that is given out by rows with its rows and columns moved."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, dtype=np.uint8)
        self._rows = np.empty(0, dtype=np.uint8)
        self._moved: Moved | None = None

    @property
    def moved(self) -> Moved:
        """What is in memory."""
        assert self._moved is not None, "a matrix is read first"
        return self._moved

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        return self.moved.span.dtype

    def read(self, moved: Moved) -> None:
        """Reads a matrix in the place of an earlier one."""
        self._moved = moved
        if len(self._bytes) < moved.span.nbytes:
            self._bytes = np.empty(moved.span.nbytes, dtype=np.uint8)
        moved.span.read_into(self._bytes[: moved.span.nbytes].data)

    def leave(self) -> None:
        """Keeps no more memory than a matrix of ordinary size takes: to ask for it anew takes as long as to fill it."""
        if len(self._bytes) > KEPT:
            self._bytes = np.empty(0, dtype=np.uint8)

    def read_into(self, room: memoryview, start: int) -> None:
        """Moves rows into a room that is as large as they are.

        Args:
            room: Where to put them, of format `B`.
            start: The first byte.
        """
        (count, width), size = self.moved.shape, self.dtype.itemsize
        numbers = np.dtype(f"i{size}")
        original = self._bytes[: count * width * size].view(numbers).reshape(count, width)
        result = np.frombuffer(room, dtype=numbers).reshape(-1, width)
        first, few = start // (width * size), max(1, CHUNK // width)
        rows, columns = self.moved.rows, self.moved.columns
        if len(self._rows) < few * width * size:
            self._rows = np.empty(few * width * size, dtype=np.uint8)
        for begin in range(0, len(result), few):
            result_r = result[begin : begin + few]
            part = slice(first + begin, first + begin + len(result_r))
            # All places are there; to be told so spares NumPy looking.
            if rows is None:
                moved_r = original[part]
            else:
                room_r = self._rows[: result_r.nbytes].view(numbers).reshape(result_r.shape)
                moved_r = result_r if columns is None else room_r
                np.take(original, rows[part], axis=0, out=moved_r, mode="clip")
            if columns is not None:
                np.take(moved_r, columns, axis=1, out=result_r, mode="clip")
            elif rows is None:
                result_r[:] = moved_r
