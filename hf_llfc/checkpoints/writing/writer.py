"""A checkpoint written as its tensors come, in any order, with one of them in memory.

The files are those that `save_pretrained` would write: the same shards, the same index, byte for byte.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from hf_llfc.checkpoints.buffers import is_parameter
from hf_llfc.checkpoints.checkpoint import tensor_bytes
from hf_llfc.checkpoints.files import GENERATION_FILE, INDEX_FILE
from hf_llfc.checkpoints.header import TensorInfo
from hf_llfc.checkpoints.settings import Settings
from hf_llfc.checkpoints.writing.journal import Journal
from hf_llfc.checkpoints.writing.shards import MAX_SHARD_SIZE, ShardFiles, ShardLayout
from hf_llfc.errors import StorageError

if TYPE_CHECKING:  # takes long to load
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

Fill = Callable[[ShardFiles], None]
"""Writes every tensor that is still to be written."""


def write_checkpoint(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[tuple[str, torch.Tensor]] | Fill,
    *,
    config: PreTrainedConfig | Settings,
    companions: Mapping[str, Path] = MappingProxyType({}),
    max_shard_size: int = MAX_SHARD_SIZE,
    journal: Journal | None = None,
) -> None:
    """Writes a checkpoint that `from_pretrained` loads.

    Args:
        folder: Where to write; it exists and is empty, but for the files that are finished.
        infos: Name on disk → dtype and shape of what will be written, in the order of the shards.
        tensors: Every one of these tensors, once, in any order, each written before the next is asked for; or a
            function that writes them all.
        config: The config of the model, or all settings of a checkpoint; its `dtype` is set to that of most weights. A
            generation config in memory is written unless it is among the companions.
        companions: Path below the folder → file to copy there, as `Checkpoint.carried` tells them.
        max_shard_size: The size in bytes above which weights are split into several files.
        journal: Names the weight files that an earlier try has completed, and notes those that this one completes. A
            file whose checksum has changed is written again.

    Raises:
        StorageError: If the disk is full or cannot be written.
    """
    settings = config if isinstance(config, Settings) else Settings.in_memory(config)
    layout = ShardLayout.of(infos, max_shard_size)
    try:
        kept = whole_shards(folder, layout, journal.shards) if journal is not None else []
        on_shard = journal.finish_shard if journal is not None else None
        with ShardFiles(folder, layout, finished=kept, on_shard=on_shard).create() as files:
            # Weights come last: what could still fail after them would throw away the work of hours.
            _write_index(folder, layout, infos)
            settings.write(folder, infos)
            for name, path in companions.items():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, folder / name)
            # A config in memory does not hold what config.json says of generation.
            if settings.raw is None and GENERATION_FILE not in companions and settings.generation_config is not None:
                # As it is: `save_pretrained` refuses values that it reads without a word.
                settings.generation_config.to_json_file(folder / GENERATION_FILE, keys_to_pop=["compile_config"])
            if callable(tensors):
                tensors(files)
            else:
                _write_each(files, infos, tensors)
    except OSError as error:
        raise StorageError(f"{folder}: the checkpoint cannot be written: {error}") from error


def write_share(
    folder: Path, infos: Mapping[str, TensorInfo], fill: Fill, *, max_shard_size: int = MAX_SHARD_SIZE
) -> None:
    """Writes this process's share into weight files that another process has made with `write_checkpoint`.

    Args:
        folder: Where the files lie.
        infos: As there.
        fill: Writes the tensors of the share.
        max_shard_size: As there.

    Raises:
        StorageError: If the disk is full or cannot be written.
    """
    try:
        with ShardFiles(folder, ShardLayout.of(infos, max_shard_size)) as files:
            fill(files)
    except OSError as error:
        raise StorageError(f"{folder}: the checkpoint cannot be written: {error}") from error


def whole_shards(folder: Path, layout: ShardLayout, finished: Mapping[str, str]) -> list[str]:
    """The finished files that are there as they were."""
    return [
        filename
        for filename, known in finished.items()
        if (shard := layout.shards.get(filename)) is not None
        and (folder / filename).is_file()
        and shard.checksum(folder / filename) == known
    ]


def _write_each(
    files: ShardFiles, infos: Mapping[str, TensorInfo], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    to_come = set(infos)
    to_write = set(files.names)
    for name, tensor in tensors:
        assert name in to_come, f"{name} is not announced, or comes twice"
        to_come.remove(name)
        info = infos[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape), (
            f"{name}: announced {info}, came {tensor.dtype} {tuple(tensor.shape)}"
        )
        if name in to_write:
            files.write(name, 0, tensor_bytes(tensor.to("cpu")))
    assert not to_come, f"never came: {sorted(to_come)[:5]}"


def _write_index(folder: Path, layout: ShardLayout, infos: Mapping[str, TensorInfo]) -> None:
    if layout.metadata is None:
        return
    parameters = sum(info.elements for name, info in infos.items() if is_parameter(name, info))
    metadata = {"total_parameters": parameters, **layout.metadata}
    text = json.dumps({"metadata": metadata, "weight_map": layout.weight_map}, indent=2, sort_keys=True) + "\n"
    (folder / INDEX_FILE).write_text(text, encoding="utf-8")
