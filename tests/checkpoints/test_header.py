"""The header of a safetensors file: every fault is one error, and what is written is what the library writes."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save_file

from hf_llfc.checkpoints.header import (
    CODES,
    TORCH_DTYPES,
    Header,
    TensorInfo,
    build_header,
    header_length,
    parse_header,
    read_header,
)
from hf_llfc.errors import CheckpointError

WHERE = "model/model.safetensors"


def entry(dtype="F32", shape=(2,), begin=0, end=8, **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def parse(entries: dict | str | bytes, data_bytes: int) -> Header:
    content = entries if isinstance(entries, str | bytes) else json.dumps(entries)
    content = content.encode() if isinstance(content, str) else content
    return parse_header(content, 8 + len(content) + data_bytes, WHERE)


def refused(entries, data_bytes: int) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse(entries, data_bytes)
    assert str(caught.value).startswith(WHERE + ": ")
    return str(caught.value)


def test_a_valid_header_gives_the_spans_in_the_order_of_their_bytes():
    header = parse({"__metadata__": {"format": "pt"}, "b": entry(begin=8, end=16), "a": entry()}, 16)
    assert list(header.spans) == ["a", "b"]
    assert header.spans["b"].shape == (2,)
    assert header.metadata == {"format": "pt"}


def test_scalars_and_empty_tensors_are_valid():
    header = parse({"s": entry(shape=(), end=4), "e": entry(shape=(0, 3), begin=4, end=4)}, 4)
    assert header.spans["s"].shape == () and header.spans["e"].shape == (0, 3)


@pytest.mark.parametrize(
    ("entries", "data_bytes", "expected"),
    [
        ({"x": entry()}, 7, "cut off: tensor x needs the bytes up to 8, found 7"),
        ({"x": entry()}, 9, "1 bytes after its last tensor"),
        ({"x": entry(), "y": entry(begin=4, end=12)}, 12, "tensor y overlaps tensor x"),
        ({"x": entry(), "y": entry(begin=9, end=17)}, 17, "tensor y leaves a gap after tensor x"),
        ({"x": entry(begin=4, end=12)}, 12, "tensor x leaves a gap after the header"),
        ({"x": entry(end=12)}, 12, "shape [2] of F32 takes 8 bytes, but its span has 12"),
        ({"x": entry(dtype="F33")}, 8, "unknown dtype 'F33'"),
        ({"x": entry(dtype=3)}, 8, "unknown dtype 3"),
        ({"x": entry(dtype=["F32"])}, 8, "unknown dtype"),
        ({"x": entry(shape=(-2,))}, 8, "list of at most 64 sizes"),
        ({"x": entry(shape=(2.0,))}, 8, "list of at most 64 sizes"),
        ({"x": entry(shape=(True, 2))}, 8, "list of at most 64 sizes"),
        ({"x": entry(shape=(2**63, 0))}, 0, "list of at most 64 sizes"),
        ({"x": entry(shape=[1] * 65, end=4)}, 4, "list of at most 64 sizes"),
        ({"x": {**entry(), "shape": 2}}, 8, "list of at most 64 sizes"),
        ({"x": entry(shape=[2**62] * 64)}, 8, "takes"),
        ({"x": {**entry(), "data_offsets": [8, 0]}}, 8, "data_offsets must be [begin, end]"),
        ({"x": {**entry(), "data_offsets": [0, 4, 8]}}, 8, "data_offsets must be [begin, end]"),
        ({"x": {**entry(), "data_offsets": [0, "8"]}}, 8, "data_offsets must be [begin, end]"),
        ({"x": entry(more=1)}, 8, "expected dtype, shape and data_offsets"),
        ({"x": {"dtype": "F32", "shape": [2]}}, 8, "expected dtype, shape and data_offsets"),
        ({"x": 5}, 0, "expected dtype, shape and data_offsets"),
        ({"__metadata__": [], "x": entry()}, 8, "__metadata__"),
        ({"__metadata__": {"format": 1}, "x": entry()}, 8, "__metadata__"),
        ({"\x1b[31mx": entry()}, 8, "not printable"),
        ('{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', 8, "not printable"),
        ('{"x": 1, "x": 2}', 0, "names 'x' twice"),
        ('{"x": {"dtype": "F32", "dtype": "F32"}}', 0, "names 'dtype' twice"),
        ("[]", 0, "does not start with"),
        ("", 0, "does not start with"),
        (' {"x": 1}', 0, "does not start with"),
        ('{"x": ', 0, "not valid JSON"),
        ('{"x": NaN}', 0, "expected dtype"),
        (b'{"x\xff": 1}', 0, "not valid JSON"),
        ('{"x": ' * 200_000, 0, "not valid JSON"),
        ('{"x": ' + "9" * 10_000 + "}", 0, "not valid JSON"),
    ],
)
def test_every_fault_of_a_header_is_one_error(entries, data_bytes, expected):
    assert expected in refused(entries, data_bytes)


@pytest.mark.parametrize(
    ("prefix", "size", "expected"),
    [
        (b"", 0, "found 0 bytes"),
        (b"\x01\x00", 2, "found 2 bytes"),
        ((10).to_bytes(8, "little"), 17, "cut off inside its header: found 17 bytes, expected at least 18"),
        ((2**60).to_bytes(8, "little"), 2**61, "announce a header"),
        (b"\x80\x02ctorch", 1000, "announce a header"),
        (b"version https://git-lfs.github.com/spec/v1", 130, "Git LFS pointer"),
    ],
)
def test_a_wrong_length_is_found_before_anything_is_allocated(prefix, size, expected):
    with pytest.raises(CheckpointError, match=expected):
        header_length(prefix, size, WHERE)


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_what_is_written_is_byte_for_byte_what_the_library_writes(tmp_path, dtype):
    tensors = {
        "b.weight": torch.zeros(3, 5, dtype=dtype),
        "a.weight": torch.ones(2, dtype=torch.float32),
        "scalar": torch.zeros((), dtype=dtype),
        'ünïcode "quoted"': torch.ones(1, dtype=torch.int64),
        "empty": torch.zeros(0, 4, dtype=torch.float16),
        "flag": torch.ones(3, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / "library.safetensors", metadata={"format": "pt"})
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    content, spans = build_header(infos)
    for name in spans:
        content += tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
    assert content == (tmp_path / "library.safetensors").read_bytes()
    assert {name: (TORCH_DTYPES[s.code], s.shape) for name, s in spans.items()} == {
        name: (info.dtype, info.shape) for name, info in infos.items()
    }


def test_reading_a_file_gives_what_the_library_reads(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.int8)}, path)
    header = read_header(path, WHERE)
    with safe_open(path, framework="pt") as file:
        assert {name: list(span.shape) for name, span in header.spans.items()} == {
            name: file.get_slice(name).get_shape()
            for name in file.keys()  # noqa: SIM118
        }


def test_a_folder_in_the_place_of_a_file_is_one_error(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path, WHERE)


# -- fuzzing

NAMES = st.text(min_size=1, max_size=6)
CODES_OR_NONSENSE = st.one_of(st.sampled_from([*TORCH_DTYPES, "F4", "F8_E4M3", "nonsense"]), st.integers(), st.none())
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)
ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": CODES_OR_NONSENSE,
            "shape": st.lists(st.integers(-1, 4), max_size=3),
            "data_offsets": st.lists(st.integers(-1, 64), min_size=1, max_size=3),
        }
    ),
    JSON,
)
FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def library_accepts(content: bytes, data_bytes: int) -> bool:
    """The oracle: the safetensors library itself."""
    try:
        deserialize(len(content).to_bytes(8, "little") + content + bytes(data_bytes))
    except SafetensorError:
        return False
    return True


def we_accept(content: bytes, data_bytes: int) -> bool:
    size = 8 + len(content) + data_bytes
    try:
        length = header_length(len(content).to_bytes(8, "little"), size, WHERE)
        assert length == len(content)
        header = parse_header(content, size, WHERE)
    except CheckpointError as error:
        assert str(error).startswith(WHERE)
        str(error).encode()  # can be printed
        return False
    for span in header.spans.values():
        assert 0 <= span.begin <= span.end <= data_bytes
        assert all(size >= 0 for size in span.shape)
    return True


def test_a_header_that_would_fill_the_memory_is_refused_before_it_is_parsed(monkeypatch):
    monkeypatch.setattr(json, "loads", lambda *arguments, **options: pytest.fail("it was parsed"))
    with pytest.raises(CheckpointError, match="more than 5000000 values"):
        parse_header(b'{"a":[' + b"[]," * 5_000_001 + b"[]]}", 20_000_000, WHERE)


@FUZZ
@given(st.dictionaries(NAMES, ENTRIES, max_size=4), st.integers(0, 80))
def test_whatever_json_says_we_accept_nothing_that_the_library_refuses(entries, data_bytes):
    content = json.dumps(entries).encode()
    assert not we_accept(content, data_bytes) or library_accepts(content, data_bytes)


@FUZZ
@given(st.binary(max_size=200), st.integers(0, 80))
def test_whatever_the_bytes_are_we_accept_nothing_that_the_library_refuses(content, data_bytes):
    assert not we_accept(content, data_bytes) or library_accepts(content, data_bytes)


@st.composite
def valid_files(draw):
    names = draw(st.lists(st.text("abc.é0", min_size=1, max_size=8), unique=True, max_size=5))
    infos = {
        name: TensorInfo(draw(st.sampled_from(list(CODES))), tuple(draw(st.lists(st.integers(0, 4), max_size=3))))
        for name in names
    }
    return infos


@FUZZ
@given(valid_files())
def test_what_we_write_both_we_and_the_library_read(infos):
    prefix, spans = build_header(infos)
    content, data_bytes = prefix[8:], sum(info.nbytes for info in infos.values())
    assert len(prefix) % 8 == 0
    assert library_accepts(content, data_bytes)
    assert parse_header(content, len(prefix) + data_bytes, WHERE).spans == spans
    assert all(math.prod(s.shape) * TORCH_DTYPES[s.code].itemsize == s.end - s.begin for s in spans.values())


@FUZZ
@given(valid_files(), st.data())
def test_a_file_damaged_anywhere_is_read_or_refused_but_never_crashes(tmp_path: Path, infos, data):
    prefix, _ = build_header(infos)
    whole = bytearray(prefix + bytes(sum(info.nbytes for info in infos.values())))
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole)))]
    for _ in range(data.draw(st.integers(0, 3))):
        if whole:
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(bytes(whole))
    try:
        read_header(path, WHERE)
    except CheckpointError:
        return
    deserialize(bytes(whole))
