"""What a run needs of disk and memory is compared with what there is before anything is done."""

import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch

from hf_llfc.checkpoints import OutputFolder, TensorInfo
from hf_llfc.errors import CheckpointError
from hf_llfc.parallel import memory
from hf_llfc.pipeline import resources

GIB = 2**30


@pytest.fixture
def machine(monkeypatch):
    """A machine with 8 GiB free and 1 GiB of swap, outside any container."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=GIB))
    monkeypatch.setattr(memory, "_CONTAINERS", ())


def test_memory_and_swap_count(machine):
    resources.refuse_without_memory(9 * GIB)
    with pytest.raises(CheckpointError, match=r"take 9\.66 GB of memory .* and 9\.66 GB are free"):
        resources.refuse_without_memory(9 * GIB + 1)


@pytest.mark.parametrize(
    ("limit", "expected"), [(str(4 * GIB), 4), ("max", 9), (str(2**63), 9)], ids=["limit", "none", "none as a number"]
)
def test_a_container_s_limit_counts_without_what_only_caches_files(machine, monkeypatch, tmp_path, limit, expected):
    (tmp_path / "max").write_text(limit + "\n")
    (tmp_path / "current").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\nfile {2 * GIB}\n")
    monkeypatch.setattr(memory, "_CONTAINERS", ((str(tmp_path), "max", "current", "file"),))
    assert memory.available_memory() == expected * GIB


def test_room_on_the_disk_counts_with_what_an_interrupted_run_left(monkeypatch, tmp_path):
    infos = {"x": TensorInfo(torch.float32, (250_000_000,))}
    output = OutputFolder(tmp_path / "new" / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_049_999_999))
    with pytest.raises(CheckpointError, match=r"the output takes 1\.05 GB, and 1\.05 GB are free there; make room"):
        resources.refuse_without_room(output, infos)
    left = tmp_path / "new" / ".out.partial" / "output"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"x")
    resources.refuse_without_room(output, infos)
