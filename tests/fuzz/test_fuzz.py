"""Whatever a stranger's file holds, what comes out is a result or one of this package's own errors."""

import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import targets
from tests.fuzz.strategies import ANYTHING, changed, damaged
from tests.publishing.samples import make_measured_report, make_report, make_simplex_report

A_FEW = 60
MANY = 5000

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
}
JOURNAL = {
    "format": "hf_llfc.journal/1",
    "identity": {"recipe": {"models": ["a"]}},
    "stages": {
        "align": {"value": [None, "x"], "files": {"llfc/x": "0" * 64}},
        "weights": {"value": None, "files": {}},
        "diagnose": {"value": None, "files": {}},
    },
    "of_weights": "0" * 64,
    "shards": {"model.safetensors": "0" * 32},
    "complete": False,
}
LISTING = {
    "format": "hf_llfc.files/1",
    "files": [*targets.LISTED, "llfc/files.json"],
    "states": {
        "README.md": {"size": 1, "checksum": "0" * 32},
        "model.safetensors": {"size": 1, "pieces": "0" * 32},
        "config.json": {"size": 1, "link": "x"},
    },
}
AT_CHANCE = {**make_report(), "at_chance": [{"model": 0, "because": "model 1 does no better than chance"}]}
REPORTS = (AT_CHANCE, make_measured_report(blocks=1), make_simplex_report(3))


def as_yaml(value) -> bytes:
    try:
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError):
        return b""


JSON_BYTES = ANYTHING.map(targets.as_json)
STRUCTURED = {
    "header": changed(HEADER).map(targets.as_json),
    "index": changed(targets.INDEX).map(targets.as_json),
    "recipe": changed(targets.RECIPE).map(as_yaml),
    "report": st.sampled_from(REPORTS).flatmap(changed).map(targets.as_json),
    "alignment": st.deferred(lambda: changed(targets.alignment_file()[1])).map(targets.alignment_with),
    "journal": changed(JOURNAL).map(targets.as_json),
    "listing": changed(LISTING).map(targets.as_json),
}
VALID = {
    "header": lambda: targets.as_json(HEADER),
    "index": lambda: targets.as_json(targets.INDEX),
    "recipe": lambda: as_yaml(targets.RECIPE),
    "report": lambda: targets.as_json(REPORTS[0]),
    "alignment": lambda: targets.alignment_file()[0],
    "journal": lambda: targets.as_json(JOURNAL),
    "listing": lambda: targets.as_json({**LISTING, "states": {}}),
}
TEXTS = st.text(max_size=40) | st.text(alphabet="ab.0123456789()[]+ \t=-{}*&!:,'\"", max_size=40)


def content_of(name: str) -> st.SearchStrategy[bytes]:
    """Valid content with places changed or bytes damaged, any JSON, or any bytes."""
    whole = st.deferred(lambda: damaged(VALID[name]()))
    return st.one_of(STRUCTURED[name], STRUCTURED[name], whole, JSON_BYTES, st.binary(max_size=200))


def check_bytes(name: str, examples: int) -> None:
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(content_of(name))
    def check(content: bytes) -> None:
        targets.BYTES[name](content)

    check()


def check_texts(name: str, examples: int) -> None:
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(TEXTS)
    def check(text: str) -> None:
        targets.TEXTS[name](text)

    check()


@pytest.mark.parametrize("name", targets.BYTES)
def test_a_file_of_a_stranger(name):
    check_bytes(name, A_FEW)


@pytest.mark.parametrize("name", targets.TEXTS)
def test_a_text_of_a_stranger(name):
    check_texts(name, 10 * A_FEW)


@pytest.mark.parametrize("name", targets.BYTES)
def test_what_the_fuzz_starts_from_is_valid(name, monkeypatch):
    from hf_llfc import errors

    if name == "header":
        pytest.skip("a header without its tensors is never valid")

    def refuse(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(errors.LLFCError, "__init__", refuse)
    targets.BYTES[name](VALID[name]())


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", targets.BYTES)
def test_many_files_of_strangers(name):
    check_bytes(name, MANY)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", targets.TEXTS)
def test_many_texts_of_strangers(name):
    check_texts(name, 10 * MANY)


# -- bombs: small content that would grow, or nest, without limits


BOMBS = {
    "header": [b'{"a":' * 100_000, b'{"a":' + b"9" * 100_000 + b"}"],
    "index": [b"[" * 100_000, b'{"weight_map": {"a": "../x"}}', b'{"weight_map": {"a": "/etc/passwd"}}'],
    "recipe": [
        b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmodels: *c\n",
        b"[" * 10_000,
        b"models: " + b"- " * 5_000,
        b"output_dir: !!python/object/apply:os.system [exit 1]\n",
        b"x: " + b"9" * 100_000,
    ],
    "report": [b"[" * 100_000, b'{"schema": "hf_llfc.report/1"}', b'{"schema":' * 50_000],
    "journal": [b"[" * 100_000, b'{"format":' * 50_000],
    "alignment": [b"\xff" * 8, b"\0" * 8, (2**40).to_bytes(8, "little") + b"{}"],
}


@pytest.mark.parametrize(("name", "place"), [(name, place) for name in BOMBS for place in range(len(BOMBS[name]))])
def test_a_bomb_is_refused(name, place):
    targets.BYTES[name](BOMBS[name][place])


@pytest.mark.parametrize("name", ["\0", "\ud800", "/dev/zero", "../x", "x" * 5000, ""])
def test_a_journal_reads_files_of_its_folder_only(name):
    said = {**JOURNAL, "stages": {"align": {"value": None, "files": {name: "0"}}}}
    targets.journal(targets.as_json(said))


@pytest.mark.parametrize("said", ["[" * 100_000, "null", json.dumps({"format": "hf_llfc.alignment/1", "kinds": []})])
def test_an_alignment_file_that_says_nonsense_of_itself_is_refused(said):
    targets.alignment(targets.alignment_with(said))
