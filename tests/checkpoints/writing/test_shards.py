"""Weight files written in parts: the same bytes through the page cache and past it, and checksums of what is there."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_llfc.checkpoints import TensorInfo, tensor_bytes
from hf_llfc.checkpoints.writing import shards
from hf_llfc.checkpoints.writing.shards import ShardFiles, ShardLayout

INFOS = {
    "embedding": TensorInfo(torch.bfloat16, (301, 4099)),
    "mask": TensorInfo(torch.bool, (7,)),
    "empty": TensorInfo(torch.float32, (0,)),
    "norm": TensorInfo(torch.float32, (5,)),
    "weight": TensorInfo(torch.float16, (3, 333_333)),
}


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(info.shape, generator=generator).mul(100).to(info.dtype) for name, info in INFOS.items()}


@pytest.fixture
def direct(monkeypatch):
    """Every run of blocks is written past the page cache."""
    monkeypatch.setattr(shards, "DIRECT", 0)
    monkeypatch.setattr(shards, "_LEAST_DIRECT", 4096)
    monkeypatch.setattr(shards, "_DIRECT_AT_ONCE", 1 << 16)


def written(folder, tensors, *, step, threads=1):
    """Writes tensors in steps of so many bytes; gives the bytes of the files and the checksums that were told."""
    folder.mkdir()
    told = {}
    layout = ShardLayout.of(INFOS, 3_000_000)
    with ShardFiles(folder, layout, on_shard=told.__setitem__).create() as files:

        def write(work):
            name, start = work
            files.write(name, start, tensor_bytes(tensors[name])[start : start + step])

        works = [(name, start) for name in tensors for start in range(0, INFOS[name].nbytes, step)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(write, works))
    assert len(layout.shards) == 2
    return {name: (folder / name).read_bytes() for name in layout.shards}, told, layout


@pytest.mark.parametrize("step", [1 << 20, 3 << 19, 12_344, 10_000_000])
@pytest.mark.parametrize("threads", [1, 3])
def test_past_the_page_cache_lies_the_same(tensors, tmp_path, monkeypatch, step, threads):
    through, told, layout = written(tmp_path / "through", tensors, step=1 << 20)
    for name, value in {"DIRECT": 0, "_LEAST_DIRECT": 4096, "_DIRECT_AT_ONCE": 1 << 16}.items():
        monkeypatch.setattr(shards, name, value)
    past, told_past, _ = written(tmp_path / "past", tensors, step=step, threads=threads)
    assert past == through
    assert told_past == told
    assert told == {name: layout.shards[name].checksum(tmp_path / "past" / name) for name in layout.shards}


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system has no way past the page cache")
def test_whole_blocks_are_written_past_the_page_cache(direct, tensors, tmp_path, monkeypatch):
    opened, written_directly = set(), []
    real_open, real_write = os.open, os.pwrite

    def watch_open(path, flags, *more):
        descriptor = real_open(path, flags, *more)
        (opened.add if flags & os.O_DIRECT else opened.discard)(descriptor)
        return descriptor

    def watch_write(descriptor, data, place):
        if descriptor in opened:
            written_directly.append((place, len(data)))
        return real_write(descriptor, data, place)

    monkeypatch.setattr(os, "open", watch_open)
    monkeypatch.setattr(os, "pwrite", watch_write)
    files, _, _ = written(tmp_path / "out", tensors, step=1 << 20)
    if not opened:
        pytest.skip("the disk's format has no way past the page cache")
    assert all(place % 4096 == 0 and count % 4096 == 0 for place, count in written_directly)
    total = sum(len(content) for content in files.values())
    assert sum(count for _, count in written_directly) > 0.9 * total


def test_where_the_system_refuses_after_all_the_cache_takes_it(direct, tensors, tmp_path, monkeypatch):
    through, told, _ = written(tmp_path / "through", tensors, step=1 << 20)
    real_open, real_write = os.open, os.pwrite
    refusing = set()

    def open_and_note(path, flags, *more):
        descriptor = real_open(path, flags, *more)
        (refusing.add if flags & os.O_DIRECT else refusing.discard)(descriptor)
        return descriptor

    def refuse(descriptor, data, place):
        if descriptor in refusing:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_write(descriptor, data, place)

    monkeypatch.setattr(os, "open", open_and_note)
    monkeypatch.setattr(os, "pwrite", refuse)
    assert written(tmp_path / "refused", tensors, step=1 << 20)[:2] == (through, told)


@pytest.mark.parametrize("damage", ["first byte", "last byte", "cut", "longer"])
def test_a_checksum_sees_every_change(tensors, tmp_path, damage):
    _, told, layout = written(tmp_path / "out", tensors, step=1 << 20)
    name, shard = max(layout.shards.items(), key=lambda item: item[1].size)
    path = tmp_path / "out" / name
    content = bytearray(path.read_bytes())
    if damage == "first byte":
        content[0] ^= 1
    elif damage == "last byte":
        content[-1] ^= 1
    path.write_bytes({"cut": content[:-1], "longer": content + b"\0"}.get(damage, content))
    assert shard.checksum(path) != told[name]
