"""Input with a small fault, given to the command line: one message that says what to do, nothing left behind."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hf_llfc
from hf_llfc.cli import main
from tests.runs import byte_llama, saved, text_data, text_recipe, written

TEXT_WORDS = ["--task", "text-generation", "--tokenizer", "bytes", "--max-length", "16"]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Two models in a folder of their own, that must stay as it is."""
    folder = tmp_path / "models"
    models = [str(saved(byte_llama(seed), folder / name)) for seed, name in enumerate("ab")]
    before = contents(folder)
    yield models[0], models[1]
    assert contents(folder) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> str:
    """What a command says that ends with 2 and leaves nothing."""
    before = {path.name for path in tmp_path.iterdir()}
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == "" and {path.name for path in tmp_path.iterdir()} == before
    assert said.err.count("hf-llfc: error: ") == 1 and "Traceback" not in said.err
    return said.err.partition("hf-llfc: error: ")[2]


def every_way(pair: tuple[str, str], data: Path, tmp_path: Path) -> list[list[str]]:
    """The commands that read data."""
    out, recipe = tmp_path / "out", text_recipe(*map(Path, pair), data, tmp_path / "out")
    return [
        ["diagnose", *pair, *TEXT_WORDS, "--dataset", str(data), "--out", str(out)],
        ["check", *pair, *TEXT_WORDS, "--dataset", str(data)],
        ["align", pair[1], "--to", pair[0], "--method", "activation_matching", *TEXT_WORDS, "--dataset", str(data),
         "--out", str(out)],
        ["run", str(written(recipe, tmp_path))],
    ]  # fmt: skip


NOT_UTF8 = {
    "data.jsonl": '{"text": "Müller geht über die Straße, und noch einmal und wieder"}\n'.encode("latin-1") * 4,
    "data.csv": "text\nMüller geht über die Straße und noch weiter\n".encode("latin-1"),
    "data.json": '[{"text": "Müller geht über die Straße, und noch einmal und wieder"}]'.encode("latin-1"),
    "data.txt": "Müller geht über die Straße, und noch einmal und wieder\n".encode("latin-1"),
    "utf-16.txt": "Müller geht über die Straße, und noch einmal und wieder\n".encode("utf-16"),
}


@pytest.mark.parametrize("name", NOT_UTF8)
def test_data_in_another_encoding(
    name: str, pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / name
    data.write_bytes(NOT_UTF8[name])
    for words in every_way(pair, data, tmp_path):
        said = refused(words, capsys, tmp_path)
        assert "UTF-8" in said and name in said, said


EMPTY = {
    "empty.txt": "",
    "lines.txt": "\n\n\n",
    "texts.jsonl": '{"text": ""}\n{"text": ""}\n',
    "texts.csv": 'text\n""\n""\n',
    "none.jsonl": "",
}


@pytest.mark.parametrize("name", EMPTY)
def test_data_without_a_text(
    name: str, pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / name
    data.write_text(EMPTY[name])
    for words in every_way(pair, data, tmp_path):
        said = refused(words, capsys, tmp_path)
        assert len(said.strip().splitlines()) <= 3, said
        assert name in said or "column 'text'" in said, said


def pickles(folder: Path) -> dict[str, object]:
    state = byte_llama(0).state_dict()
    name = "model.norm.weight"
    return {
        "meta": {**state, name: torch.empty_like(state[name], device="meta")},
        "a number": {**state, name: 3.0},
        "a list": [state],
        "sparse": {**state, name: state[name].to_sparse()},
        "quantised": {**state, name: torch.quantize_per_tensor(state[name], 0.1, 0, torch.qint8)},
        "a nested state": {"model": state, "optimizer": {"step": 1}},
    }


@pytest.mark.parametrize("kind", ["meta", "a number", "a list", "sparse", "quantised", "a nested state"])
def test_pickles_that_hold_something_else(
    kind: str, pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "pickled"
    saved(byte_llama(0), model)
    (model / "model.safetensors").unlink()
    torch.save(pickles(tmp_path)[kind], model / "pytorch_model.bin")
    for words in (
        ["merge", str(model), pair[0], "--allow-pickle", "--out", str(tmp_path / "out")],
        ["check", pair[0], str(model), "--allow-pickle"],
        ["inspect", str(model), "--verify", "--allow-pickle"],
    ):
        said = refused(words, capsys, tmp_path)
        assert "pytorch_model.bin" in said or "model.norm.weight" in said, said


@pytest.mark.parametrize("kind", ["merge", "align", "diagnose", "run"])
def test_a_name_that_is_too_long(
    kind: str, pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / ("n" * 256)
    data = text_data(tmp_path)
    words = {
        "merge": ["merge", *pair, "--out", str(out)],
        "align": ["align", pair[1], "--to", pair[0], "--out", str(out)],
        "diagnose": ["diagnose", *pair, *TEXT_WORDS, "--dataset", str(data), "--out", str(out)],
        "run": ["run", str(written(text_recipe(*map(Path, pair), data, out), tmp_path))],
    }
    assert "too long" in refused(words[kind], capsys, tmp_path)
    for long in (["inspect", str(out)], ["merge", str(out), pair[0], "--out", str(tmp_path / "out")]):
        assert "n" * 40 in refused(long, capsys, tmp_path)
    assert main(["merge", *pair, "--out", str(tmp_path / ("m" * 250))]) == 0


LIMITED = """
import os, resource, sys
from hf_llfc.cli import main, console

def limited(*arguments, **options):
    # As little as there is once the work has begun: what it was estimated to take was there before.
    used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]), used + int(sys.argv[1])))

from hf_llfc.parents import opening
from hf_llfc.alignment import together, checkpoints
import hf_llfc.api, hf_llfc.pipeline.flow, hf_llfc.pipeline.single_stages, hf_llfc.pipeline.mergeability
import scipy.optimize, transformers.models.llama.modeling_llama

kept = checkpoints.align_checkpoints

def begin(*arguments, **options):
    limited()
    return kept(*arguments, **options)

checkpoints.align_checkpoints = together.align_checkpoints = begin
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
@pytest.mark.parametrize(
    "command", ["align", *(pytest.param(name, marks=pytest.mark.slow) for name in ("merge", "check", "diagnose"))]
)
def test_too_little_address_space_while_aligning(command: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "vocab_size": 4096}
    a, b = (str(saved(byte_llama(seed, **sizes), tmp_path / name)) for seed, name in enumerate("ab"))
    data, out = text_data(tmp_path), str(tmp_path / "out")
    words = {
        "align": ["align", b, "--to", a, "--out", out],
        "merge": ["merge", a, b, "--align", "weight_matching", "--out", out],
        "check": ["check", a, b],
        "diagnose": ["diagnose", a, b, "--align", "weight_matching", *TEXT_WORDS, "--dataset", str(data), "--out", out],
    }[command]
    before = contents(tmp_path)
    ended = subprocess.run([sys.executable, "-c", LIMITED, "1000000", *words], capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("hf-llfc: error: ") == 1 and "Traceback" not in ended.stderr
    assert "does not suffice" in ended.stderr and "free or allow more" in ended.stderr
    assert contents(tmp_path) == before


@pytest.mark.parametrize("utf8", [True, False], ids=["as Python begins", "without UTF-8 mode"])
def test_names_with_letters_that_the_locale_has_not(utf8: bool, tmp_path: Path) -> None:
    folder = tmp_path / "Modelle für Zoë"
    a, b = (str(saved(byte_llama(seed), folder / name)) for seed, name in enumerate(("ä", "ñ")))
    data = folder / "Töxte.txt"
    data.write_text("der Text über die Straße, und noch einmal und wieder und wieder\n" * 4, encoding="utf-8")
    recipe = folder / "Rezept-ñ.yaml"
    as_written = text_recipe(Path(a), Path(b), data, folder / "Ausgabe-ß")
    recipe.write_text(json.dumps(as_written, ensure_ascii=False), encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "LANG": "C"}
    environment |= {} if utf8 else {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    def ran(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "hf_llfc", *words]
        ended = subprocess.run(command, capture_output=True, env=environment, cwd=folder)
        said = ended.stderr.decode(errors="replace")
        assert "Traceback" not in said, said
        return ended.returncode, said

    code, said = ran("merge", a, b, "--out", str(folder / "Ergebnis-é"))
    assert code == 0, said
    assert "Ergebnis-é" in (folder / "Ergebnis-é" / "README.md").read_text(encoding="utf-8")
    code, said = ran("run", str(recipe))
    if utf8:
        assert code == 0, said
        assert "Ausgabe-ß" in (folder / "Ausgabe-ß" / "README.md").read_text(encoding="utf-8")
    else:
        assert code == 2 and "set PYTHONUTF8=1" in said and said.count("hf-llfc: error: ") == 1
    assert {path.name for path in folder.iterdir()} == {
        "ä", "ñ", data.name, recipe.name, "Ergebnis-é", *(["Ausgabe-ß"] if utf8 else []),
    }  # fmt: skip


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_of_any_new_file(mask: int, pair: tuple[str, str], tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        hf_llfc.run(text_recipe(*map(Path, pair), text_data(tmp_path), tmp_path / "out"))
    finally:
        os.umask(before)
    written_files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"README.md", "config.json", "model.safetensors", "recipe.yaml"} <= {path.name for path in written_files}
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in written_files}
    assert set(modes.values()) == {oct(0o666 & ~mask)}, modes
