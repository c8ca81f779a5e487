"""A checkpoint written as its tensors come, in any order, with one of them in memory.

The files are those that `save_pretrained` would write: the same shards, the same index, byte for byte.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers import GenerationConfig, PreTrainedConfig

from hf_llfc.checkpoints.companions import TEMPLATES_FOLDER
from hf_llfc.checkpoints.files import GENERATION_FILE, INDEX_FILE, SINGLE_FILE
from hf_llfc.checkpoints.header import TensorInfo, build_header
from hf_llfc.checkpoints.names import Layout, find_model_class
from hf_llfc.checkpoints.reader import tensor_bytes
from hf_llfc.errors import CheckpointError

logger = logging.getLogger(__name__)

MAX_SHARD_SIZE = 5 * 10**9
_FILENAME_PATTERN = SINGLE_FILE.replace(".safetensors", "{suffix}.safetensors")


def write_checkpoint(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    config: PreTrainedConfig,
    companions: Iterable[Path] = (),
    generation_config: GenerationConfig | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Writes a checkpoint that `from_pretrained` loads.

    Args:
        folder: Where to write; it exists and is empty.
        infos: Name on disk → dtype and shape of what will be written, in the order of the shards.
        tensors: Every one of these tensors, once, in any order. Each is written before the next is asked for.
        config: The config of the model; its `dtype` is set to that of the first weight.
        companions: Files to copy beside the weights, as `Checkpoint.companion_files` lists them.
        generation_config: Written unless it is among the companions.
        max_shard_size: The size in bytes above which weights are split into several files.

    Raises:
        CheckpointError: If the disk is full or cannot be written.
    """
    try:
        _write_weights(folder, infos, tensors, config, max_shard_size)
        _write_config(folder, infos, config)
        for companion in companions:
            _copy_companion(companion, folder)
        if generation_config is not None and not (folder / GENERATION_FILE).exists():
            generation_config.save_pretrained(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: the checkpoint cannot be written: {error}") from error


def _write_weights(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: PreTrainedConfig,
    max_shard_size: int,
) -> None:
    split = split_state_dict_into_shards_factory(
        dict(infos),
        get_storage_size=lambda info: info.nbytes,
        filename_pattern=_FILENAME_PATTERN,
        max_shard_size=max_shard_size,
    )
    needed = sum(info.nbytes for info in infos.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder}: the weights take {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there; make room or"
            " choose another output folder"
        )
    with ExitStack() as stack:
        places: dict[str, tuple[BinaryIO, int]] = {}
        for filename, names in split.filename_to_tensors.items():
            header, spans = build_header({name: infos[name] for name in names})
            file: BinaryIO = stack.enter_context((folder / filename).open("wb"))
            file.write(header)
            file.flush()
            _reserve(file, len(header) + sum(infos[name].nbytes for name in names))
            places |= {name: (file, len(header) + span.begin) for name, span in spans.items()}
        for name, tensor in tensors:
            assert name in places, f"{name} is not announced, or comes twice"
            info = infos[name]
            assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape), (
                f"{name}: announced {info}, came {tensor.dtype} {tuple(tensor.shape)}"
            )
            file, position = places.pop(name)
            file.seek(position)
            file.write(tensor_bytes(tensor.to("cpu")))
        assert not places, f"never came: {list(places)[:5]}"

    if split.is_sharded:
        metadata = {"total_parameters": _parameters(infos, config), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX_FILE).write_text(text, encoding="utf-8")


def _reserve(file: BinaryIO, size: int) -> None:
    """Gives a file its final size, taking the blocks now where the system can, so that a full disk shows at once."""
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


def _parameters(infos: Mapping[str, TensorInfo], config: PreTrainedConfig) -> int:
    """The number of parameters; where the model class is not known, of all elements."""
    for architecture in config.architectures or ():
        try:
            model_class = find_model_class(architecture, config)
        except ImportError:
            continue
        if model_class is not None:
            return Layout(model_class, config).parameters
    return sum(info.elements for info in infos.values())


def _write_config(folder: Path, infos: Mapping[str, TensorInfo], config: PreTrainedConfig) -> None:
    config = deepcopy(config)
    floating = (info.dtype for info in infos.values() if info.dtype.is_floating_point)
    dtype = next(floating, None)
    if dtype is not None:
        config.dtype = dtype
    config.save_pretrained(folder)


def _copy_companion(companion: Path, folder: Path) -> None:
    # Templates lie in a folder of their own; everything else beside the weights.
    below = companion.parent.name if companion.parent.name == TEMPLATES_FOLDER else ""
    (folder / below).mkdir(exist_ok=True)
    shutil.copyfile(companion, folder / below / companion.name)
