"""What tells one run from another: every byte that it reads."""

import json
import os
import shutil
from pathlib import Path

import pytest

import hf_llfc
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.errors import CheckpointError
from hf_llfc.evaluation import EvaluationConfig
from hf_llfc.pipeline.identity import identity_of
from tests.checkpoints.conftest import save_tokenizer
from tests.runs import byte_llama, saved, text_data


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A model with a tokenizer and a processor, a tokenizer elsewhere, and a folder of data in two folders."""
    for name in ("model", "tokenizer"):
        (tmp_path / name).mkdir()
        save_tokenizer(tmp_path / name)
    saved(byte_llama(0), tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    (tmp_path / "tokenizer" / "weights.bin").write_text("not read")
    for folder in ("train", "test"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        (tmp_path / "data" / folder / "0.png").write_text(folder)
    return tmp_path


def identity(folder: Path) -> str:
    data = EvaluationConfig("text-classification", str(folder / "data"), tokenizer=str(folder / "tokenizer"))
    return json.dumps(identity_of({}, [open_checkpoint(folder / "model")], [data]), sort_keys=True)


def rewritten(path: Path, text: str) -> None:
    """Changes a file, but neither its size nor its times."""
    before = path.stat()
    content = path.read_text()
    assert len(text) <= len(content)
    path.write_text(text + content[len(text) :])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "name",
    ["data/test/0.png", "data/train/0.png", "tokenizer/tokenizer.json", "model/preprocessor_config.json",
     "model/tokenizer.json", "model/config.json"],
)  # fmt: skip
def test_every_byte_that_is_read_counts_whatever_its_size_and_time(name, inputs):
    before = identity(inputs)
    assert identity(inputs) == before
    content = (inputs / name).read_text()
    if name == "model/config.json":
        (inputs / name).write_text(content.replace('"initializer_range": 0.02', '"initializer_range": 0.03'))
    else:
        other = content.replace("0.5", "0.6").replace("bad", "dab")
        rewritten(inputs / name, "TEST" if name.startswith("data") else other)
    assert identity(inputs) != before


def test_files_of_one_name_in_two_folders_are_two(inputs):
    before = identity(inputs)
    train, test = (inputs / "data" / folder / "0.png" for folder in ("train", "test"))
    train.write_text("test"), test.write_text("train")
    assert identity(inputs) != before


def test_what_is_not_read_does_not_count(inputs):
    before = identity(inputs)
    (inputs / "tokenizer" / "weights.bin").write_text("other")
    (inputs / "model" / "notes.txt").write_text("other")
    assert identity(inputs) == before


def test_data_in_memory_are_told_by_their_fingerprint():
    import datasets

    rows = [datasets.Dataset.from_dict({"text": [text]}) for text in ("a", "b")]
    found = [identity_of({}, [], [EvaluationConfig("text-generation", each)])["data"] for each in rows]
    assert found[0] != found[1] and list(found[0]) == ["in memory"]


def stopped(patch, pair, out, **sections):
    """A merge that is stopped after its weights, and its diagnosis, are finished."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    with patch.context() as patched:
        patched.setattr("hf_llfc.pipeline.stages.evaluate_parents", stop)
        with pytest.raises(KeyboardInterrupt):
            hf_llfc.merge(pair, out=out, **sections)


def test_a_run_measures_anew_on_other_data(tmp_path, monkeypatch):
    pair = saved(byte_llama(0), tmp_path / "a"), saved(byte_llama(1), tmp_path / "b")
    data = text_data(tmp_path)
    section = {"task": "text-generation", "dataset": str(data), "tokenizer": "bytes", "max_length": 16, "alphas": 3}
    stopped(monkeypatch, pair, tmp_path / "out", diagnose=section)
    rewritten(data, "THE MERGED")
    result = hf_llfc.merge(pair, out=tmp_path / "out", diagnose=section)
    fresh = hf_llfc.merge(pair, out=tmp_path / "fresh", diagnose=section)
    assert result.report.to_dict() == fresh.report.to_dict()
    assert [row["loss"] for row in result.table] == [row["loss"] for row in fresh.table]


def test_a_run_does_not_go_on_with_other_data_of_its_weights(tmp_path, monkeypatch):
    pair = saved(byte_llama(0), tmp_path / "a"), saved(byte_llama(1), tmp_path / "b")
    measured, data = text_data(tmp_path), tmp_path / "fitted.txt"
    shutil.copy(measured, data)
    section = {"task": "text-generation", "tokenizer": "bytes", "max_length": 16}
    sections = {
        "diagnose": {**section, "dataset": str(measured), "alphas": 3},
        "calibrate": {**section, "dataset": str(data), "samples": 4},
    }
    stopped(monkeypatch, pair, tmp_path / "out", **sections)
    rewritten(data, "THE MERGED")
    with pytest.raises(CheckpointError, match=r"interrupted run of something else \(data\..*fitted\.txt was"):
        hf_llfc.merge(pair, out=tmp_path / "out", **sections)
