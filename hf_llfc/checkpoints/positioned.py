"""Reading and writing at places of a file, from several threads at once."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch
import xxhash

from hf_llfc.errors import CheckpointError, StorageError

_READ_AT_ONCE = 1 << 20

_SEEKING = threading.Lock()
"""Held where the system can only read and write where a file stands."""


def read_at(descriptor: int, room: memoryview, offset: int) -> int:
    """Reads bytes of a file from an offset on until the room is full or the file ends.

    Args:
        descriptor: Of the file.
        room: Where to put the bytes, of format `B`.
        offset: In bytes from the beginning of the file.

    Returns:
        How many bytes there were.

    Raises:
        OSError: The file cannot be read.
    """
    filled = 0
    while filled < len(room):
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [room[filled:]], offset + filled)
        else:
            with _SEEKING:
                os.lseek(descriptor, offset + filled, os.SEEK_SET)
                data = os.read(descriptor, len(room) - filled)
            count = len(data)
            room[filled : filled + count] = data
        if count == 0:
            break
        filled += count
    return filled


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes all bytes to a file, from an offset on.

    Args:
        descriptor: Of the file.
        data: The bytes, of format `B`.
        offset: In bytes from the beginning of the file.

    Raises:
        OSError: The disk is full, or the file cannot be written.
    """
    while data:
        if hasattr(os, "pwrite"):
            count = os.pwrite(descriptor, data, offset)
        else:
            with _SEEKING:
                os.lseek(descriptor, offset, os.SEEK_SET)
                count = os.write(descriptor, data)
        data, offset = data[count:], offset + count


def open_direct(path: Path) -> int | None:
    """Opens a file to be written in whole blocks, past the system's page cache.

    Args:
        path: Of a file that is there.

    Returns:
        The descriptor; None where the system or the disk's format has no such way.
    """
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        return None


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


class TensorBytes(Protocol):
    """The bytes of a tensor in the order that they have in memory, to be read in parts."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor as it is read."""
        ...

    @property
    def nbytes(self) -> int:
        """How many there are."""
        ...

    def read_into(self, room: memoryview, start: int = 0) -> None:
        """Reads bytes of the tensor until the room is full; from any thread.

        Args:
            room: Where to put them, of format `B`.
            start: The first byte, counted from the beginning of the tensor.

        Raises:
            LLFCError: They cannot be read.
        """
        ...


@dataclass(frozen=True)
class FileSpan:
    """A tensor's bytes in a file; it follows the protocol of `TensorBytes`.

    Attributes:
        file: Open for reading, without a buffer.
        where: What error messages call it.
        name: Of the tensor.
        dtype: Of the tensor.
        begin: Place of the first byte in the file.
        nbytes: How many there are.
    """

    file: FileIO
    where: str
    name: str
    dtype: torch.dtype
    begin: int
    nbytes: int

    def read_into(self, room: memoryview, start: int = 0) -> None:
        """Reads bytes of the tensor until the room is full; from any thread.

        Args:
            room: Where to put them, of format `B`.
            start: The first byte, counted from the beginning of the tensor.

        Raises:
            StorageError: The file cannot be read.
            CheckpointError: It ends before.
        """
        try:
            count = read_at(self.file.fileno(), room, self.begin + start)
        except OSError as error:
            raise StorageError(
                f"{self.where}: tensor {self.name} cannot be read ({error.strerror}); check the disk, and fetch the "
                "file again"
            ) from error
        if count < len(room):
            raise CheckpointError(
                f"{self.where}: the file was cut off while it was read: of tensor {self.name} {len(room) - count} bytes"
                " are missing; fetch the file again, and start again"
            )
