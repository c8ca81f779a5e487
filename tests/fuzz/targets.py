"""What reads a stranger's input: each takes content, and raises nothing but the errors of this package."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_llfc.checkpoints import OutputFolder
from hf_llfc.checkpoints.files import LocalFiles, open_weights
from hf_llfc.checkpoints.header import parse_header, read_header
from hf_llfc.checkpoints.writing.journal import WEIGHTS_STAGE, Journal
from hf_llfc.checkpoints.writing.listing import rewriting
from hf_llfc.diagnostics import ConnectivityReport
from hf_llfc.errors import LLFCError
from hf_llfc.publishing import render_card
from hf_llfc.publishing.card.card import Evidence
from hf_llfc.publishing.page import render_page
from hf_llfc.recipe import dump_recipe, load_recipe
from hf_llfc.symmetry import Alignment
from hf_llfc.symmetry.expressions import format_shape, parse
from tests.tiny_models import tiny_config


@contextmanager
def only_our_errors() -> Iterator[None]:
    """Lets the errors of this package pass, and no others."""
    try:
        yield
    except LLFCError as error:
        assert str(error), "an error says something"


@contextmanager
def file_with(content: bytes, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def header(content: bytes) -> None:
    """The header of a safetensors file, alone and in a file."""
    with only_our_errors():
        parse_header(content, 8 + len(content), "x")
    with file_with(content, "x.safetensors") as path, only_our_errors():
        read_header(path, "x")


@cache
def _weights() -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for name in ("a", "b"):
            save_file({name: torch.ones(2, 3)}, Path(folder) / name)
            parts.append((Path(folder) / name).read_bytes())
    return parts[0], parts[1]


INDEX = {
    "metadata": {"total_size": 48},
    "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
}


def index(content: bytes) -> None:
    """The index of weights in several files."""
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / "model"
        inside.mkdir()
        for place, part in enumerate(_weights(), start=1):
            (inside / f"model-0000{place}-of-00002.safetensors").write_bytes(part)
        (Path(folder) / "x").write_bytes(_weights()[0])
        (inside / "model.safetensors.index.json").write_bytes(content)
        with only_our_errors():
            weights = open_weights(LocalFiles("x", inside))
            for name in weights.infos:
                weights.read(name)
            assert set(weights.infos) <= {"a", "b"}, "nothing from elsewhere is read"


RECIPE = {
    "models": [
        {"model": "org/a", "parameters": {"weight": 0.5}},
        {"model": "org/b@main", "parameters": {"weight": [{"filter": "mlp", "value": [0.1, 0.5]}, {"value": 0.5}]}},
    ],
    "merge_method": "task_arithmetic",
    "base_model": "org/c",
    "parameters": {"lambda": 0.4, "normalize": False},
    "dtype": "bfloat16",
    "tokenizer_source": "base",
    "align": {"method": "weight_matching", "axes": ["neurons"], "exclude": ["residual"], "restarts": 2},
    "diagnose": {
        "task": "text-generation",
        "dataset": "x.txt",
        "alphas": 5,
        "layers": ["blocks"],
        "batch_norm": {"recompute": True, "dataset": "y.txt"},
    },
    "publish": {"repo_id": "me/x", "private": True},
    "output_dir": "out",
    "max_shard_size": "5GB",
}


def recipe(content: bytes) -> None:
    """A recipe file; one that is read can be written and read back."""
    with file_with(content, "recipe.yaml") as path, only_our_errors():
        found = load_recipe(path)
        (path.parent / "again.yaml").write_text(dump_recipe(found), encoding="utf-8")
        load_recipe(path.parent / "again.yaml")


def override(text: str) -> None:
    """An override of a recipe on the command line."""
    with only_our_errors():
        load_recipe(RECIPE, [text])


def expression(text: str) -> None:
    """An axis expression; one that is read is written as itself."""
    with only_our_errors():
        found = parse(text)
        assert parse(format_shape(found)) == found


def report(content: bytes) -> None:
    """A report; one that is read can be tabulated, written and shown in a card and on a page."""
    with file_with(content, "report.json") as path, only_our_errors():
        found = ConnectivityReport.load(path)
        found.save(path)
        assert ConnectivityReport.load(path).to_dict() == found.to_dict()
        found.rows()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
            render_card(folder, Evidence([], report=found))
            render_page(found)


@cache
def alignment_file() -> tuple[bytes, Any]:
    """A valid file, and what it says of itself."""
    from hf_llfc import PermutationSpec

    spec = PermutationSpec.from_config(tiny_config("bert")).keep("neurons.0", "heads.0")
    made = spec.random_alignment(torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder) / "x")
        content = (Path(folder) / "x").read_bytes()
    length = int.from_bytes(content[:8], "little")
    return content, json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["hf_llfc"])


def alignment_with(said: Any) -> bytes:
    """The valid file, saying something else of itself."""
    content, _ = alignment_file()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    entries["__metadata__"]["hf_llfc"] = said if isinstance(said, str) else json.dumps(said)
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def alignment(content: bytes) -> None:
    """An alignment file; one that is read can be inverted and written."""
    with file_with(content, "alignment.safetensors") as path, only_our_errors():
        found = Alignment.load(path)
        found.inverse()
        found.save(path.with_suffix(".again"))


def journal(content: bytes) -> None:
    """What an interrupted run left."""
    with file_with(content, "journal.json") as path, only_our_errors():
        found = Journal.load(path, path.parent)
        assert found is not None
        found.check_files()
        found.differences({"recipe": {}})
        if WEIGHTS_STAGE in found.stages:
            found.keep_weights({"recipe": {}})


LISTED = ("README.md", "config.json", "llfc/run.json", "model.safetensors")


def listing(content: bytes) -> None:
    """The list of a run's files; what is in the folder stays as it is, whatever the list says."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "out"
        (folder / "llfc").mkdir(parents=True)
        (Path(place) / "beside").write_text("another's")
        for name in LISTED:
            (folder / name).write_text("x")
        (folder / "llfc" / "files.json").write_bytes(content)
        with only_our_errors():
            OutputFolder(folder, overwrite=True).check()
        with only_our_errors(), rewriting(folder):
            (folder / "README.md").write_text("another card")
        assert all((folder / name).is_file() for name in LISTED) and (Path(place) / "beside").is_file()


BYTES: dict[str, Callable[[bytes], None]] = {
    "header": header,
    "index": index,
    "recipe": recipe,
    "report": report,
    "alignment": alignment,
    "journal": journal,
    "listing": listing,
}
TEXTS: dict[str, Callable[[str], None]] = {"expression": expression, "override": override}
