"""What processes of a run send each other: JSON and the bytes of tensors, signed with a secret that only they know.

Nothing that comes over the network is unpickled. A message names the classes of this package that its values belong to,
and the receiver makes them anew by their constructors; it can name nothing else.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import secrets
import stat
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

import hf_llfc.errors
from hf_llfc.errors import LLFCError, ProcessError

SECRET_VARIABLE = "HF_LLFC_SECRET"
"""Environment variable: the secret, instead of the one in the user's own file."""

SECRET_FILE = "hf_llfc_secret"

DIGEST_SIZE = 32
"""In bytes, of a signature."""

_STEP = 16
"""Where in a message a tensor may begin, in bytes: at a multiple of the largest element."""

_MODULE = re.compile(r"hf_llfc(\.\w+)+")
_KIND = ""  # the key of the JSON objects that stand for what JSON has not


@runtime_checkable
class _Described(Protocol):
    """A class that describes its instances in JSON values."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Any:
        """Reads back what `to_dict` returned."""


def pack(value: Any) -> Tensor:
    """A value as bytes.

    Args:
        value: None, numbers, texts, paths, tensors, errors and dataclasses of this package, and lists, tuples, dicts
            and counters of these.

    Returns:
        (bytes,), uint8: the length of the header, the header as JSON, and the tensors.

    Raises:
        TypeError: Something else is in it.
    """
    tensors: list[Tensor] = []
    header = json.dumps(_to_json(value, tensors)).encode()
    starts = [_rounded(8 + len(header))]
    for tensor in tensors:
        starts.append(_rounded(starts[-1] + tensor.nbytes))
    message = torch.zeros(starts[-1], dtype=torch.uint8)
    start = len(header).to_bytes(8, "little") + header
    message[: len(start)] = torch.frombuffer(bytearray(start), dtype=torch.uint8)
    for tensor, place in zip(tensors, starts, strict=False):
        message[place : place + tensor.nbytes].view(tensor.dtype).copy_(tensor.reshape(-1))
    return message


def unpack(message: Tensor) -> Any:
    """The value that `pack` was given; its tensors are on the CPU and share the memory of the message.

    Raises:
        ValueError: It is no such message.
    """
    end = 8 + int.from_bytes(message[:8].numpy().tobytes(), "little")
    try:
        return _Reader(message, _rounded(end)).value(json.loads(message[8:end].numpy().tobytes()))
    except (AttributeError, ImportError, IndexError, KeyError, RecursionError, RuntimeError, TypeError) as error:
        raise ValueError(f"not a message of this version: {error}") from error


def sign(key: bytes, about: str, message: Tensor) -> bytes:
    """The signature of a message.

    Args:
        key: Known to the processes of one run.
        about: Who sends it and which one it is, so that none can take the place of another.
        message: (bytes,), uint8.
    """
    return hmac.digest(hmac.digest(key, about.encode(), "sha256"), message.numpy().data, "sha256")


def is_signed(key: bytes, about: str, message: Tensor, signature: bytes) -> bool:
    """Whether a message is from one who has the key, see `sign`."""
    return hmac.compare_digest(sign(key, about, message), signature)


def shared_secret() -> bytes:
    """What all processes of a user know and nobody else: the environment variable, or a file that only the user reads.

    No launcher hands on a secret: the id of its run stands in command lines, and its store answers everyone.

    Raises:
        ProcessError: The file cannot be made, or others may read or write it.
    """
    given = os.environ.get(SECRET_VARIABLE)
    if given:
        return given.encode()
    from huggingface_hub.constants import HF_HOME

    file = Path(HF_HOME, SECRET_FILE)
    advice = f"set {SECRET_VARIABLE} to the same long random text for all processes"
    if sys.platform != "win32":
        file = file.with_name(f"{SECRET_FILE}_{os.getuid()}")
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=file.parent) as new, suppress(FileExistsError):  # none but the user reads it
                new.write(secrets.token_bytes(DIGEST_SIZE))
                new.flush()
                os.link(new.name, file)  # whole or not at all, and the first of several processes
        with file.open("rb") as opened:
            status = os.fstat(opened.fileno())
            secret = opened.read()
    except OSError as error:
        raise ProcessError(
            f"{file}: the secret of this user's processes cannot be kept here ({error}); {advice}"
        ) from None
    if sys.platform != "win32" and (status.st_uid != os.getuid() or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)):
        raise ProcessError(f"{file}: others may read or write this secret; delete the file, or {advice}")
    if len(secret) < DIGEST_SIZE:
        raise ProcessError(f"{file}: {DIGEST_SIZE} bytes expected, {len(secret)} found; delete the file, or {advice}")
    return secret


def _rounded(size: int) -> int:
    return -(-size // _STEP) * _STEP


def _to_json(value: Any, tensors: list[Tensor]) -> Any:
    """As JSON values; tensors are put aside, in the order of their numbers."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_to_json(each, tensors) for each in value]
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu())
        return {_KIND: "tensor", "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if isinstance(value, Path):
        return {_KIND: "path", "path": str(value)}
    if isinstance(value, tuple):
        return {_KIND: "tuple", "values": [_to_json(each, tensors) for each in value]}
    if isinstance(value, dict):
        pairs = [[_to_json(key, tensors), _to_json(item, tensors)] for key, item in value.items()]
        return {_KIND: "counter" if isinstance(value, Counter) else "dict", "pairs": pairs}
    if isinstance(value, BaseException):
        return {_KIND: "error", **_error_to_json(value)}
    kind = type(value)
    if is_dataclass(kind) and _MODULE.fullmatch(kind.__module__):
        named = {_KIND: "instance", "module": kind.__module__, "class": kind.__qualname__}
        parts = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        if isinstance(value, _Described) and any(callable(part) for part in parts.values()):
            return {**named, "described": _to_json(value.to_dict(), tensors)}
        return {**named, "fields": _to_json(parts, tensors)}
    raise TypeError(f"{kind.__module__}.{kind.__qualname__} cannot be sent to another process")


def _error_to_json(error: BaseException) -> dict[str, Any]:
    """The nearest class that every process knows, and the text."""
    rank = error.rank if isinstance(error, ProcessError) else None
    for kind in type(error).__mro__:
        if _ERRORS.get(kind.__name__) is kind:
            return {"class": kind.__name__, "text": str(error), "rank": rank}
    return {"class": "RuntimeError", "text": f"{type(error).__name__}: {error}", "rank": rank}


# Those of this package, an interrupt, and one for all others.
_ERRORS: dict[str, type[BaseException]] = {
    **{
        name: kind
        for name, kind in vars(hf_llfc.errors).items()
        if isinstance(kind, type) and issubclass(kind, LLFCError)
    },
    "KeyboardInterrupt": KeyboardInterrupt,
    "RuntimeError": RuntimeError,
}


class _Reader:
    """Makes values of a header; tensors come in the order in which it names them.

    Args:
        message: The whole of it.
        start: Where its tensors begin.
    """

    def __init__(self, message: Tensor, start: int) -> None:
        self._message = message
        self._start = start

    def value(self, found: Any) -> Any:
        """The value of which `_to_json` made this."""
        if isinstance(found, list):
            return [self.value(each) for each in found]
        if not isinstance(found, dict):
            return found
        match found[_KIND]:
            case "tensor":
                return self._tensor(found["dtype"], found["shape"])
            case "path":
                return Path(found["path"])
            case "tuple":
                return tuple(self.value(found["values"]))
            case "dict":
                return {self.value(key): self.value(item) for key, item in found["pairs"]}
            case "counter":
                return Counter({self.value(key): self.value(item) for key, item in found["pairs"]})
            case "error":
                kind, text, rank = _ERRORS[found["class"]], str(found["text"]), found["rank"]
                return kind(text, rank) if issubclass(kind, ProcessError) else kind(text)
            case "instance":
                kind = _own_class(found["module"], found["class"])
                if "described" in found:
                    return kind.from_dict(self.value(found["described"]))
                return kind(**self.value(found["fields"]))
        raise KeyError(found[_KIND])

    def _tensor(self, dtype: str, shape: list[int]) -> Tensor:
        kind = vars(torch)[dtype]
        if not isinstance(kind, torch.dtype):
            raise TypeError(f"{dtype} is no dtype")
        size = kind.itemsize
        for length in shape:
            size *= length
        stored = self._message[self._start : self._start + size]
        self._start = _rounded(self._start + size)
        return stored.view(kind).reshape(shape)


def _own_class(module: str, name: str) -> Any:
    """A dataclass of this package."""
    if not _MODULE.fullmatch(module):
        raise TypeError(f"{module} is not of this package")
    kind = vars(import_module(module))[name]
    if not (isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == module):
        raise TypeError(f"{module}.{name} is no dataclass of this package")
    return kind
