"""The weight files of a checkpoint that is being written: laid out first, then filled in any order.

Where every byte goes is known from dtypes and shapes. So the files get their headers and their final size at once, and
threads and processes write the tensors to their places, whole or in parts.

Large files are written past the system's page cache where the system can (O_DIRECT). Nothing here reads them again,
taking pages for them costs more processor time than a merge does, and they would push the parents out of the cache.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import xxhash
from huggingface_hub import split_state_dict_into_shards_factory

from hf_llfc.checkpoints.files import SINGLE_FILE
from hf_llfc.checkpoints.header import TensorInfo, build_header, read_header
from hf_llfc.checkpoints.positioned import open_direct, read_at, write_at
from hf_llfc.errors import StorageError

MAX_SHARD_SIZE = 5 * 10**9
_FILENAME_PATTERN = SINGLE_FILE.replace(".safetensors", "{suffix}.safetensors")

PIECE = 1 << 20
"""Bytes of a tensor that are hashed at a time, counted from its first, while they are in the processor's cache."""

DIRECT = 1 << 26
"""Bytes of a file from which on it is written past the page cache; smaller ones may well be read again at once."""

# What is written past the page cache are whole blocks, of the file and of memory.
_BLOCK = 4096
_LEAST_DIRECT = 1 << 18
_DIRECT_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Written:
    """Bytes that lie in their place.

    Attributes:
        filename: The weight file.
        count: How many there are.
        checksums: Those of the pieces that lie within them, by where they begin.
    """

    filename: str
    count: int
    checksums: Mapping[int, bytes]


class Sink(Protocol):
    """Takes the bytes of tensors, in two steps: they are put in their place, and it is noted that they are there."""

    def put(self, name: str, start: int, data: memoryview) -> Written:
        """Takes bytes of a tensor, from a place in it on; from any thread, and from a fork of its process."""
        ...

    def note(self, written: Written) -> None:
        """Notes that bytes were put; from any thread of the process that made the sink."""
        ...


@dataclass(frozen=True)
class Shard:
    """One file of the layout.

    Attributes:
        header: Its first bytes.
        places: Tensor → where its bytes begin in the file, in the order of the file.
        size: Of the whole file, in bytes.
    """

    header: bytes
    places: Mapping[str, int]
    size: int

    @classmethod
    def of_file(cls, path: Path) -> Shard:
        """The shard that lies in a file.

        Raises:
            CheckpointError: It is no safetensors file.
        """
        found = read_header(path, str(path))
        in_order = sorted(found.spans, key=lambda name: (found.spans[name].begin, found.spans[name].end))
        with path.open("rb") as file:
            header = file.read(found.nbytes)
        places = {name: found.nbytes + found.spans[name].begin for name in in_order}
        return cls(header, places, path.stat().st_size)

    @cached_property
    def ends(self) -> Mapping[str, int]:
        """Tensor → where its bytes end in the file, in the order of the file."""
        in_order = list(self.places)
        return dict(zip(in_order, [*(self.places[name] for name in in_order[1:]), self.size], strict=True))

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yields where every piece that is hashed by itself begins and ends in the file, in the order of the file."""
        for name, end in self.ends.items():
            for begin in range(self.places[name], end, PIECE):
                yield begin, min(begin + PIECE, end)

    def checksum(self, path: Path, known: Mapping[int, bytes] | None = None) -> str:
        """A checksum of the file (XXH3, 128 bits), made of those of its pieces: against damage, not against intent.

        Args:
            path: Where it lies.
            known: The checksums of pieces that need not be read, by where they begin.

        Raises:
            OSError: The file cannot be read.
        """
        known = known or {}
        with path.open("rb", buffering=0) as file:
            digest = xxhash.xxh3_128(str(os.fstat(file.fileno()).st_size).encode())
            digest.update(file.read(len(self.header)))
            room = memoryview(bytearray(PIECE))
            for begin, end in self.pieces():
                if begin in known:
                    digest.update(known[begin])
                else:
                    count = read_at(file.fileno(), room[: end - begin], begin)
                    digest.update(xxhash.xxh3_128_digest(room[:count]))
        return digest.hexdigest()


@dataclass(frozen=True)
class ShardLayout:
    """The position of every tensor in the weight files, as `save_pretrained` would have it.

    Attributes:
        shards: File → what is in it.
        metadata: Of the index; None for a single file, which has none.
    """

    shards: Mapping[str, Shard]
    metadata: Mapping[str, object] | None

    @classmethod
    def of(cls, infos: Mapping[str, TensorInfo], max_shard_size: int = MAX_SHARD_SIZE) -> ShardLayout:
        """Lays out tensors.

        Args:
            infos: Name on disk → dtype and shape, in the order of the shards.
            max_shard_size: The size in bytes above which weights are split into several files.
        """
        split = split_state_dict_into_shards_factory(
            dict(infos),
            get_storage_size=lambda info: info.nbytes,
            filename_pattern=_FILENAME_PATTERN,
            max_shard_size=max_shard_size,
        )
        shards = {}
        for filename, names in split.filename_to_tensors.items():
            header, spans = build_header({name: infos[name] for name in names})
            in_order = sorted(spans, key=lambda name: (spans[name].begin, spans[name].end))
            places = {name: len(header) + spans[name].begin for name in in_order}
            shards[filename] = Shard(header, places, len(header) + sum(infos[name].nbytes for name in names))
        return cls(shards, split.metadata if split.is_sharded else None)

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor → file."""
        return {name: filename for filename, shard in self.shards.items() for name in shard.places}


class ShardFiles:
    """The files of a layout, open for writing; a context manager.

    Args:
        folder: Where they lie.
        layout: What is in them.
        finished: Files that are complete already and not opened.
        on_shard: Told name and checksum of a file that is complete, by the thread that wrote its last bytes.
    """

    def __init__(
        self,
        folder: Path,
        layout: ShardLayout,
        *,
        finished: Collection[str] = (),
        on_shard: Callable[[str, str], None] | None = None,
    ) -> None:
        self._folder = folder
        self._layout = layout
        self._finished = finished
        self._on_shard = on_shard
        self._files: dict[str, int] = {}
        self._direct: dict[str, int] = {}
        self._rooms = _Rooms()
        self._checksums: dict[str, dict[int, bytes]] = {filename: {} for filename in layout.shards}
        self._places: dict[str, tuple[str, int]] = {}
        self._missing = {
            filename: shard.size - len(shard.header)
            for filename, shard in layout.shards.items()
            if filename not in finished
        }
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """The tensors that are still to be written."""
        return [name for name, filename in self._layout.weight_map.items() if filename not in self._finished]

    def create(self) -> ShardFiles:
        """Makes the files with their headers, at their final size; a process that shares them opens them instead.

        Raises:
            StorageError: There is not enough room for them.
        """
        needed = sum(shard.size for filename, shard in self._layout.shards.items() if filename not in self._finished)
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise StorageError(
                f"{self._folder}: the weights take {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there; make"
                " room or choose another output folder"
            )
        for filename, shard in self._layout.shards.items():
            if filename in self._finished:
                continue
            descriptor = os.open(self._folder / filename, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                write_at(descriptor, memoryview(shard.header), 0)
                _reserve(descriptor, shard.size)
            finally:
                os.close(descriptor)
        return self

    def __enter__(self) -> ShardFiles:
        for filename, shard in self._layout.shards.items():
            if filename not in self._finished:
                self._files[filename] = os.open(self._folder / filename, os.O_RDWR)
                direct = open_direct(self._folder / filename) if shard.size >= DIRECT else None
                if direct is not None:
                    self._direct[filename] = direct
                self._places |= {name: (filename, offset) for name, offset in shard.places.items()}
        for filename, missing in list(self._missing.items()):
            if missing == 0:
                self._complete(filename)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for descriptor in (*self._files.values(), *self._direct.values()):
            os.close(descriptor)
        self._files.clear()
        self._direct.clear()

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Puts bytes of a tensor in their place and notes that they are there.

        Raises:
            OSError: The disk is full or cannot be written.
        """
        self.note(self.put(name, start, data))

    def put(self, name: str, start: int, data: memoryview) -> Written:
        """Writes bytes of a tensor, from a place in it on; from any thread, and from a fork of this process.

        Raises:
            OSError: The disk is full or cannot be written.
        """
        filename, offset = self._places[name]
        begin, end = offset + start, offset + start + len(data)
        # Part of what is written, if any, are whole blocks.
        first, last = -(-begin // _BLOCK) * _BLOCK, end // _BLOCK * _BLOCK
        if filename in self._direct and last - first >= _LEAST_DIRECT:
            self._write_cached(filename, data[: first - begin], begin)
            self._write_blocks(filename, data[first - begin : last - begin], first)
            self._write_cached(filename, data[last - begin :], last)
        else:
            self._write_cached(filename, data, begin)
        return Written(filename, len(data), self._known(filename, name, begin, data))

    def note(self, written: Written) -> None:
        """Counts what was written, from any thread of this process; the last of a file completes it.

        Raises:
            OSError: A file that is complete cannot be read.
        """
        with self._lock:
            self._checksums[written.filename] |= written.checksums
            self._missing[written.filename] -= written.count
            is_complete = self._missing[written.filename] == 0
        if is_complete:
            self._complete(written.filename)

    def _write_cached(self, filename: str, data: memoryview, offset: int) -> None:
        write_at(self._files[filename], data, offset)

    def _write_blocks(self, filename: str, data: memoryview, offset: int) -> None:
        """Writes whole blocks past the page cache, or through it where the system refuses that after all."""
        room = self._rooms.blocks
        for start in range(0, len(data), len(room)):
            part = data[start : start + len(room)]
            np.copyto(room[: len(part)], np.frombuffer(part, dtype=np.uint8))  # other threads go on meanwhile
            try:
                write_at(self._direct[filename], room[: len(part)].data, offset + start)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._write_cached(filename, part, offset + start)

    def _known(self, filename: str, name: str, begin: int, data: memoryview) -> dict[int, bytes]:
        """The checksums of the pieces that lie within what is written, by where they begin."""
        shard = self._layout.shards[filename]
        skipped = -(begin - shard.places[name]) % PIECE
        return {
            begin + start: xxhash.xxh3_128_digest(data[start : start + PIECE])
            for start in range(skipped, len(data), PIECE)
            if start + PIECE <= len(data) or begin + len(data) == shard.ends[name]
        }

    def _complete(self, filename: str) -> None:
        if self._on_shard is not None:
            known = self._checksums.pop(filename)
            self._on_shard(filename, self._layout.shards[filename].checksum(self._folder / filename, known))


class _Rooms(threading.local):
    """Memory that every thread has of its own."""

    @cached_property
    def blocks(self) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """Memory that begins with a block, to be written from past the page cache."""
        room = np.empty(_DIRECT_AT_ONCE + _BLOCK, dtype=np.uint8)
        begin = -room.ctypes.data % _BLOCK
        return room[begin : begin + _DIRECT_AT_ONCE]


def _reserve(descriptor: int, size: int) -> None:
    """Gives a file its final size, taking the blocks now where the system can, so that a full disk shows at once."""
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
