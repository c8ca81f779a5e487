"""Values as processes send them: the same on the other side, and nothing but JSON, tensors and our own classes."""

import json
import os
from collections import Counter
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_llfc.adapters import spec_for
from hf_llfc.diagnostics.rows import Statistic
from hf_llfc.diagnostics.statistics import Distribution
from hf_llfc.errors import AlignmentError, LLFCError, ProcessError
from hf_llfc.evaluation.scoring import ScoreSums
from hf_llfc.parallel.messages import SECRET_FILE, SECRET_VARIABLE, is_signed, pack, shared_secret, sign, unpack
from tests import tiny_models

NUMBERS = st.booleans() | st.integers() | st.floats(allow_nan=False)
LEAVES = st.none() | NUMBERS | st.text() | st.builds(Path, st.just("a"))
KEYS = st.integers() | st.text() | st.tuples(st.integers(), st.text())
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)

MESSAGES = "hf_llfc.parallel.messages"


def header(message):
    """The JSON of a message, and where it ends."""
    end = 8 + int.from_bytes(message[:8].numpy().tobytes(), "little")
    return json.loads(message[8:end].numpy().tobytes()), end


def with_header(value):
    """A message that says what it likes."""
    text = json.dumps(value).encode()
    return torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)


@given(VALUES)
def test_values_arrive_as_they_were(value):
    assert unpack(pack(value)) == value
    assert repr(unpack(pack(value))) == repr(value)


DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "int64", "int8", "bool")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_tensors_arrive_bit_by_bit(dtype, shape, generator):
    tensor = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
    turned = tensor.permute(tuple(reversed(range(tensor.ndim))))  # not contiguous
    one, (other, number) = unpack(pack([tensor, (turned, 0.1)]))
    assert number == 0.1
    for found, expected in ((one, tensor), (other, turned)):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        found, expected = (each.contiguous().reshape(-1).view(torch.uint8) for each in (found, expected))
        assert torch.equal(found, expected)


def test_what_diagnoses_and_alignments_send_arrives(generator):
    sums = Distribution.empty(2, 3)
    sums.add(torch.arange(5), torch.randn(2, 3, 5, generator=generator))
    found = unpack(pack(sums))
    assert torch.equal(found.moments.mean, sums.moments.mean) and torch.equal(found.kept.keys, sums.kept.keys)
    scores = ScoreSums(3, 0.5, 3, 2, Counter({(0, 1): 2, (1, 1): 1}))
    assert unpack(pack(scores)) == scores and isinstance(unpack(pack(scores)).confusion, Counter)
    row = Statistic(float("inf"), None, {"0.5": 1.0}, (0.1, 0.2))
    assert unpack(pack(row)) == row
    spec = spec_for(tiny_models.llama())
    alignment = spec.random_alignment(generator).with_metadata(method="random")
    moved = unpack(pack(alignment))
    assert moved.metadata == alignment.metadata and moved.spec.to_dict() == spec.to_dict()
    assert {axis: each.perm.tolist() for axis, each in moved.transforms.items()} == {
        axis: each.perm.tolist() for axis, each in alignment.transforms.items()
    }


def test_errors_arrive_as_the_nearest_class_that_all_know():
    class Special(AlignmentError):
        pass

    for error, kind, text in (
        (AlignmentError("why"), AlignmentError, "why"),
        (Special("why"), AlignmentError, "why"),
        (ZeroDivisionError("by zero"), RuntimeError, "ZeroDivisionError: by zero"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
        (OSError(28, "No space"), RuntimeError, "OSError: [Errno 28] No space"),
    ):
        found = unpack(pack(error))
        assert type(found) is kind and str(found) == text
    gone = unpack(pack(ProcessError("gone", 3)))
    assert type(gone) is ProcessError and gone.rank == 3


@pytest.mark.parametrize("value", [{1, 2}, object(), print, partial(print), b"bytes", torch.float32, LLFCError, 1j])
def test_nothing_else_is_sent(value):
    with pytest.raises(TypeError, match="cannot be sent"):
        pack(["before", {"key": value}])


@pytest.mark.parametrize(
    "named",
    [
        {"": "instance", "module": "os", "class": "system", "fields": {"": "dict", "pairs": [["command", "touch it"]]}},
        {"": "instance", "module": "subprocess", "class": "Popen", "fields": {"": "dict", "pairs": [["args", "true"]]}},
        {
            "": "instance",
            "module": "hf_llfc.parallel.messages",
            "class": "os.system",
            "fields": {"": "dict", "pairs": []},
        },
        {
            "": "instance",
            "module": "hf_llfc.parallel.messages",
            "class": "import_module",
            "fields": {"": "dict", "pairs": []},
        },
        {"": "instance", "module": MESSAGES, "class": "Path", "fields": {"": "dict", "pairs": []}},
        {"": "instance", "module": "hf_llfc.no_such", "class": "Class", "fields": {"": "dict", "pairs": []}},
        {"": "instance", "module": "hf_llfc../os", "class": "system", "fields": {"": "dict", "pairs": []}},
        {"": "error", "class": "SystemExit", "text": "", "rank": None},
        {"": "tensor", "dtype": "load", "shape": [1]},
        {"": "tensor", "dtype": "float32", "shape": [10**9]},
        {"": "pickle", "value": "gASV"},
        {"no": "kind"},
    ],
)
def test_a_message_names_nothing_but_our_own_dataclasses(named):
    with pytest.raises(ValueError, match="not a message"):
        unpack(with_header([named]))


def test_a_message_is_json_and_the_bytes_of_tensors():
    value = ("text", torch.arange(3, dtype=torch.float64))
    message = pack(value)
    found, end = header(message)
    assert found == {"": "tuple", "values": ["text", {"": "tensor", "dtype": "float64", "shape": [3]}]}
    assert value[1].numpy().tobytes() in message[end:].numpy().tobytes()


def test_a_signature_holds_for_one_message_of_one_process():
    message = pack("value")
    signature = sign(b"key", "1 of 0", message)
    assert is_signed(b"key", "1 of 0", message, signature)
    other = pack("valuE")
    for key, about, what in ((b"kez", "1 of 0", message), (b"key", "2 of 0", message), (b"key", "1 of 0", other)):
        assert not is_signed(key, about, what, signature)
    assert not is_signed(b"key", "1 of 0", message, b"")


@pytest.mark.skipif(os.name == "nt", reason="files there have other rights")
def test_the_secret_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    secret = shared_secret()
    assert len(secret) == 32 and shared_secret() == secret
    (file,) = (tmp_path / "home").iterdir()
    assert file.name.startswith(SECRET_FILE) and file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o640)
    with pytest.raises(ProcessError, match=f"others may read.*{SECRET_VARIABLE}"):
        shared_secret()
    file.chmod(0o600)
    file.write_bytes(b"short")
    with pytest.raises(ProcessError, match="32 bytes expected, 5 found"):
        shared_secret()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(file))
    with pytest.raises(ProcessError, match="cannot be kept here"):
        shared_secret()
    monkeypatch.setenv(SECRET_VARIABLE, "given")
    assert shared_secret() == b"given"
