"""The header of a safetensors file: read and checked before anything is allocated, and written.

The format: eight bytes with the length n of the header as a little-endian unsigned integer, n bytes of JSON that
map every tensor to its dtype, shape and the span of its bytes, then the bytes of the tensors. The spans must cover
the rest of the file without gap or overlap. https://huggingface.co/docs/safetensors
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_llfc.errors import CheckpointError, suggest

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_VALUES = 5_000_000  # in the JSON of a header; half a million tensors, several times what any model has
MAX_DIMENSIONS = 64  # the limit of torch
ALIGNMENT = 8  # the bytes of the tensors start at a multiple of this

# Bits per element and torch's type if it has one, in the order in which the safetensors library lays tensors out in a
# file (last first).
_DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "BOOL": (8, torch.bool),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "U8": (8, torch.uint8),
    "I8": (8, torch.int8),
    "F8_E5M2": (8, torch.float8_e5m2),
    "F8_E4M3": (8, torch.float8_e4m3fn),
    "F8_E8M0": (8, torch.float8_e8m0fnu),
    "F8_E4M3FNUZ": (8, torch.float8_e4m3fnuz),
    "F8_E5M2FNUZ": (8, torch.float8_e5m2fnuz),
    "I16": (16, torch.int16),
    "U16": (16, torch.uint16),
    "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16),
    "I32": (32, torch.int32),
    "U32": (32, torch.uint32),
    "F32": (32, torch.float32),
    "C64": (64, torch.complex64),
    "F64": (64, torch.float64),
    "I64": (64, torch.int64),
    "U64": (64, torch.uint64),
}
_FILE_ORDER = {code: position for position, code in enumerate(_DTYPES)}
_TRAILING_DIGITS = re.compile(r"(.*?)([0-9]*)", re.DOTALL)

TORCH_DTYPES = {code: dtype for code, (_, dtype) in _DTYPES.items() if dtype is not None}
CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """The dtype and shape of one tensor, known before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Span:
    """One tensor in a safetensors file: its dtype as the file writes it, and its bytes, counted from the header."""

    code: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked safetensors header, with the number of bytes before the first tensor."""

    spans: Mapping[str, Span]
    nbytes: int
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_header(path: Path, where: str) -> Header:
    """Reads and checks the header of a safetensors file.

    Args:
        path: The file.
        where: What error messages call the file.

    Raises:
        CheckpointError: If the file cannot be read, or its header is not valid, or contradicts the file's size.
    """
    try:
        file_size = path.stat().st_size
        with path.open("rb") as file:
            length = header_length(file.read(LENGTH_BYTES), file_size, where)
            content = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{where}: the file cannot be read ({error.strerror}); check that it is there and that you may read it"
        ) from error
    return parse_header(content, file_size, where)


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """The length of the header in bytes, from the first eight bytes of a file.

    Args:
        prefix: The first eight bytes of the file.
        file_size: The size of the whole file in bytes.
        where: What error messages call the file.

    Raises:
        CheckpointError: If there are fewer than eight bytes, or the length is not possible.
    """
    if len(prefix) < LENGTH_BYTES or file_size < LENGTH_BYTES:
        raise CheckpointError(
            f"{where}: not a safetensors file, or cut off: found {file_size} bytes, expected at least"
            f" {LENGTH_BYTES}; fetch or save the file again"
        )
    if prefix.startswith(b"version "):
        raise CheckpointError(
            f"{where}: this is a Git LFS pointer, not the weights; fetch them with 'git lfs pull' or with 'hf download'"
        )
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{where}: not a safetensors file: its first eight bytes announce a header of {length} bytes, expected"
            f" at most {MAX_HEADER_BYTES}"
        )
    if LENGTH_BYTES + length > file_size:
        raise CheckpointError(
            f"{where}: the file is cut off inside its header: found {file_size} bytes, expected at least"
            f" {LENGTH_BYTES + length}; fetch or save the file again"
        )
    return length


def parse_header(content: bytes, file_size: int, where: str) -> Header:
    """Parses and checks the JSON of a safetensors header.

    Args:
        content: The bytes of the header, without the eight bytes of its length.
        file_size: The size of the whole file in bytes.
        where: What error messages call the file.

    Returns:
        The spans in the order of their bytes.

    Raises:
        CheckpointError: If the header is not what the format demands, or the spans do not fill the file exactly.
    """
    entries = _parse_json(content, where)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(
            f"{where}: __metadata__ in the header must map strings to strings, found {repr(metadata)[:80]}"
        )

    spans = {name: _parse_span(name, entry, where) for name, entry in entries.items()}
    spans = dict(sorted(spans.items(), key=lambda item: (item[1].begin, item[1].end)))
    available = file_size - LENGTH_BYTES - len(content)
    position = 0
    previous = "the header"
    for name, span in spans.items():
        if span.begin != position:
            fault = "overlaps" if span.begin < position else "leaves a gap after"
            raise CheckpointError(
                f"{where}: tensor {name} {fault} {previous}: its bytes start at {span.begin}, expected {position};"
                " the file is corrupt, fetch or save it again"
            )
        if span.end > available:
            raise CheckpointError(
                f"{where}: the file is cut off: tensor {name} needs the bytes up to {span.end}, found {available};"
                " fetch or save the file again"
            )
        position, previous = span.end, f"tensor {name}"
    if position != available:
        raise CheckpointError(
            f"{where}: the file holds {available - position} bytes after its last tensor that no tensor claims;"
            " the file is corrupt, fetch or save it again"
        )
    return Header(spans, LENGTH_BYTES + len(content), metadata)


def build_header(infos: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, Span]]:
    """The beginning of a safetensors file that holds these tensors, as `save_pretrained` would write it.

    Args:
        infos: The tensors of the file.

    Returns:
        The first bytes of the file, length included, and the span of every tensor, counted from their end.
    """
    codes = {name: CODES[info.dtype] for name, info in infos.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    spans: dict[str, Span] = {}
    position = 0
    for name in sorted(infos, key=lambda name: (-_FILE_ORDER[codes[name]], name)):
        info = infos[name]
        span = Span(codes[name], info.shape, position, position + info.nbytes)
        entries[name] = {"dtype": span.code, "shape": list(span.shape), "data_offsets": [span.begin, span.end]}
        spans[name] = span
        position = span.end
    content = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % ALIGNMENT)
    return len(content).to_bytes(LENGTH_BYTES, "little") + content, spans


def _parse_json(content: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CheckpointError(
                    f"{where}: the header names {repr(key)[:200]} twice; the file is corrupt, save it again"
                )
            result[key] = value
        return result

    # The format does not allow white space before the object, which json would skip.
    if not content.startswith(b"{"):
        raise CheckpointError(f"{where}: not a safetensors file: its header does not start with '{{'")
    if content.count(b",") > MAX_VALUES:
        raise CheckpointError(
            f"{where}: the header holds more than {MAX_VALUES} values, which would take gigabytes to read; no model has"
            " as many tensors in one file"
        )
    try:
        entries = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: the header is not valid JSON ({error}); the file is corrupt, fetch or save it again"
        ) from error
    assert isinstance(entries, dict)  # it starts with a brace
    return entries


def _parse_span(name: str, entry: object, where: str) -> Span:
    if not name.isprintable():
        raise CheckpointError(f"{where}: the header holds a tensor name that is not printable text, {ascii(name)[:80]}")
    what = f"{where}: tensor {name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{what}: expected dtype, shape and data_offsets in the header, found {repr(entry)[:120]}"
        )
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        nearest = suggest(str(code)[:40], _DTYPES)
        raise CheckpointError(f"{what}: unknown dtype {repr(code)[:40]}, expected one of {', '.join(_DTYPES)}{nearest}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(
            f"{what}: shape must be a list of at most {MAX_DIMENSIONS} sizes, found {repr(shape)[:80]}"
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{what}: data_offsets must be [begin, end], found {repr(offsets)[:80]}")
    bits = math.prod(shape) * _DTYPES[code][0]
    begin, end = offsets
    if bits != 8 * (end - begin):
        raise CheckpointError(
            f"{what}: shape {repr(shape)[:80]} of {code} takes {-(-bits // 8)} bytes, but its span has {end - begin};"
            " the file is corrupt, fetch or save it again"
        )
    return Span(code, tuple(shape), begin, end)


def _are_sizes(value: object) -> bool:
    # bool is a subclass of int; sizes beyond 64 bits are nonsense that would only cost time.
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def natural_order(name: str) -> Any:
    """A key that sorts tensor names with layer 2 before layer 10, as transformers does."""
    parts: list[tuple[Any, ...]] = []
    for part in name.split("."):
        if part.isdigit():
            parts.append((0, int(part)))
            continue
        match = _TRAILING_DIGITS.fullmatch(part)
        assert match is not None
        parts.append((1, match[1], int(match[2])) if match[2] else (1, part))
    return parts
