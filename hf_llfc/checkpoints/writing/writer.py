"""A checkpoint written as its tensors come, in any order, with one of them in memory.

The files are those that `save_pretrained` would write: the same shards, the same index, byte for byte.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_llfc.checkpoints.buffers import is_parameter
from hf_llfc.checkpoints.checkpoint import tensor_bytes
from hf_llfc.checkpoints.companions import copy_companion
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
    companions: Iterable[Path] = (),
    max_shard_size: int = MAX_SHARD_SIZE,
    journal: Journal | None = None,
) -> None:
    """Writes a checkpoint that `from_pretrained` loads.

    Args:
        folder: Where to write; it exists and is empty, but for the files that are finished.
        infos: Name on disk → dtype and shape of what will be written, in the order of the shards.
        tensors: Every one of these tensors, once, in any order, each written before the next is asked for; or a
            function that writes them all.
        config: The config of the model, or all settings of a checkpoint; its `dtype` is set to that of the first
            weight. A generation config among the settings is written unless it is among the companions.
        companions: Files to copy beside the weights, as `Checkpoint.companion_files` lists them.
        max_shard_size: The size in bytes above which weights are split into several files.
        journal: Names the weight files that an earlier try has completed, and notes those that this one completes. A
            file whose checksum has changed is written again.

    Raises:
        StorageError: If the disk is full or cannot be written.
    """
    settings = config if isinstance(config, Settings) else Settings.in_memory(config)
    layout = ShardLayout.of(infos, max_shard_size)
    try:
        kept = _still_whole(folder, layout, journal.shards) if journal is not None else []
        on_shard = journal.finish_shard if journal is not None else None
        with ShardFiles(folder, layout, finished=kept, on_shard=on_shard).create() as files:
            if callable(tensors):
                tensors(files)
            else:
                _write_each(files, infos, tensors)
        _write_index(folder, layout, infos, settings)
        floating = (info.dtype for info in infos.values() if info.dtype.is_floating_point)
        settings.write(folder, next(floating, None))
        copied = list(companions)
        for companion in copied:
            copy_companion(companion, folder)
        is_missing = not settings.is_kept and all(path.name != GENERATION_FILE for path in copied)
        if is_missing and settings.generation_config is not None:
            settings.generation_config.save_pretrained(folder)
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


def _still_whole(folder: Path, layout: ShardLayout, finished: Mapping[str, str]) -> list[str]:
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


def _write_index(folder: Path, layout: ShardLayout, infos: Mapping[str, TensorInfo], settings: Settings) -> None:
    if layout.metadata is None:
        return
    metadata = {"total_parameters": _parameters(infos, settings), **layout.metadata}
    text = json.dumps({"metadata": metadata, "weight_map": layout.weight_map}, indent=2, sort_keys=True) + "\n"
    (folder / INDEX_FILE).write_text(text, encoding="utf-8")


def _parameters(infos: Mapping[str, TensorInfo], settings: Settings) -> int:
    """The number of parameters; where the model class is not known, of all elements.

    Where config.json is kept, all tensors are known, and what is no parameter by its name: no class has to be loaded.
    """
    if settings.is_kept:
        return sum(info.elements for name, info in infos.items() if is_parameter(name, info))
    from hf_llfc.checkpoints.names import Layout, find_model_class

    config = settings.config
    for architecture in config.architectures or ():
        try:
            model_class = find_model_class(architecture, config)
        except ImportError:
            continue
        if model_class is not None:
            return Layout(model_class, config).parameters
    return sum(info.elements for info in infos.values())
