"""The weight files of a checkpoint that is being written: laid out first, then filled in any order.

Where every byte goes is known from dtypes and shapes. So the files get their headers and their final size at once, and
threads and processes write the tensors to their places, whole or in parts.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import xxhash
from huggingface_hub import split_state_dict_into_shards_factory

from hf_llfc.checkpoints.files import SINGLE_FILE
from hf_llfc.checkpoints.header import TensorInfo, build_header
from hf_llfc.checkpoints.positioned import write_at
from hf_llfc.errors import StorageError

MAX_SHARD_SIZE = 5 * 10**9
_FILENAME_PATTERN = SINGLE_FILE.replace(".safetensors", "{suffix}.safetensors")
_READ_AT_ONCE = 1 << 20


class Sink(Protocol):
    """Takes the bytes of tensors."""

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Takes bytes of a tensor, from a place in it on; from any thread."""
        ...


@dataclass(frozen=True)
class Shard:
    """One file of the layout.

    Attributes:
        header: Its first bytes.
        places: Tensor → where its bytes begin in the file.
        size: Of the whole file, in bytes.
    """

    header: bytes
    places: Mapping[str, int]
    size: int


@dataclass(frozen=True)
class ShardLayout:
    """Which tensors lie where in which files, as `save_pretrained` would have it.

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
            places = {name: len(header) + span.begin for name, span in spans.items()}
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
        on_shard: Told the name of a file that is complete, by the thread that wrote its last bytes.
    """

    def __init__(
        self,
        folder: Path,
        layout: ShardLayout,
        *,
        finished: Collection[str] = (),
        on_shard: Callable[[str], None] | None = None,
    ) -> None:
        self._folder = folder
        self._layout = layout
        self._finished = finished
        self._on_shard = on_shard
        self._files: dict[str, int] = {}
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
                self._places |= {name: (filename, place) for name, place in shard.places.items()}
        for filename, missing in list(self._missing.items()):
            if missing == 0:
                self._complete(filename)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Writes bytes of a tensor, from a place in it on; from any thread.

        Raises:
            OSError: The disk is full or cannot be written.
        """
        filename, place = self._places[name]
        write_at(self._files[filename], data, place + start)
        with self._lock:
            self._missing[filename] -= len(data)
            is_complete = self._missing[filename] == 0
        if is_complete:
            self._complete(filename)

    def _complete(self, filename: str) -> None:
        if self._on_shard is not None:
            self._on_shard(filename)


def checksum(path: Path) -> str:
    """A checksum of a whole file (XXH3, 128 bits): against damage, not against intent.

    Raises:
        OSError: The file cannot be read.
    """
    digest = xxhash.xxh3_128()
    room = memoryview(bytearray(_READ_AT_ONCE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(room):
            digest.update(room[:count])
    return digest.hexdigest()


def _reserve(descriptor: int, size: int) -> None:
    """Gives a file its final size, taking the blocks now where the system can, so that a full disk shows at once."""
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
