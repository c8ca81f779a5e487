"""The files of a checkpoint, wherever they lie, and the tensors in its weight files by the names written there.

The order in which weight files are looked for is that of transformers: `model.safetensors`, its index, and only if
there are no safetensors at all `pytorch_model.bin` and its index.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch

from hf_llfc.checkpoints.header import CODES, TORCH_DTYPES, Header, TensorInfo, read_header
from hf_llfc.checkpoints.positioned import FileSpan, TensorBytes
from hf_llfc.checkpoints.quantised import is_quantised, quantised_tensor
from hf_llfc.errors import CheckpointError, raise_all

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
_INDEX_ENDING = ".index.json"

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_PICKLE_FILE = "adapter_model.bin"

# What a folder may hold instead of weights that can be merged, and what to do then.
_NO_WEIGHTS = {
    ".gguf": "only GGUF files, which are quantised; use the checkpoint that they were made from",
    ADAPTER_FILE: f"an adapter without its {ADAPTER_CONFIG}, not a model; fetch or save it again",
    ADAPTER_PICKLE_FILE: f"an adapter without its {ADAPTER_CONFIG}, not a model; fetch or save it again",
    ".h5": "only TensorFlow weights; load and save them with an older transformers to get safetensors",
    ".msgpack": "only Flax weights; load and save them with an older transformers to get safetensors",
    ".pth": "only weights in their author's own format; convert them to a transformers checkpoint first",
    ".safetensors": f"safetensors files, but neither {SINGLE_FILE} nor {INDEX_FILE}; rename the one to merge",
}


class Files(Protocol):
    """The files of a checkpoint, wherever they come from."""

    @property
    def id(self) -> str:
        """The repository on the Hub, or the folder as the user named it."""
        ...

    @property
    def where(self) -> str:
        """Name of the checkpoint in messages; with the revision if the user named one."""
        ...

    @property
    def revision(self) -> str | None:
        """The commit on the Hub, or None."""
        ...

    @property
    def folder(self) -> Path:
        """Folder of the files once they are fetched."""
        ...

    def sizes(self) -> Mapping[str, int]:
        """Path below the folder → size in bytes, of every file there is, fetched or not."""
        ...

    def fetch(self, names: Iterable[str]) -> None:
        """Makes sure that these files lie in the folder."""
        ...

    def header(self, name: str) -> Header:
        """The checked header of a safetensors file, without fetching the file."""
        ...


@dataclass(frozen=True)
class LocalFiles:
    """A checkpoint in a local folder."""

    where: str
    folder: Path
    revision: str | None = None

    @property
    def id(self) -> str:
        """The folder as the user named it."""
        return self.where

    def sizes(self) -> Mapping[str, int]:
        """Path below the folder → size in bytes."""
        return local_sizes(self.folder)

    def fetch(self, names: Iterable[str]) -> None:
        """Everything is there already."""

    def header(self, name: str) -> Header:
        """The checked header of a safetensors file."""
        return read_header(self.folder / name, f"{self.where}/{name}")


@dataclass(frozen=True)
class Stamp:
    """Size, time and inode of a file, by which it shows that it was written to or replaced."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """The stamp that a file has now.

        Raises:
            OSError: The file cannot be found.
        """
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class Weights(Protocol):
    """Tensors by the names that they are stored under."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of every tensor."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """File → what tells its content from another without reading all of it, as JSON values; empty in memory."""
        ...

    def refuse_changed(self) -> None:
        """Refuses weights whose files were written to since they were opened.

        Raises:
            CheckpointError: One was.
        """
        ...

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor to the CPU in its stored dtype; it must not be changed in place."""
        ...

    def read_unrounded(self, name: str) -> torch.Tensor:
        """Reads one tensor as `read` does, but before it is rounded where it is made from others."""
        ...

    def span(self, name: str) -> TensorBytes | None:
        """Finds what reads parts of the tensor; None where it has to be read as a whole."""
        ...


class SafetensorsWeights:
    """The tensors of one or more safetensors files.

    They are read, not mapped into memory: a file that is cut off meanwhile ends a read with an error, and a process
    that looks at its mapped bytes with a signal.
    """

    def __init__(self, files: Files, headers: Mapping[str, Header], infos: Mapping[str, TensorInfo]) -> None:
        """Takes headers that are already checked.

        Args:
            files: Where the files come from.
            headers: File → its header.
            infos: Dtype and shape of every tensor in them.
        """
        self.infos = infos
        self._files = files
        self._headers = headers
        self._file_of = {name: file for file, header in headers.items() for name in header.spans}
        self._open: dict[str, FileIO] = {}
        self._lock = threading.Lock()
        self._stamps = {file: Stamp.of(path) for file in headers if (path := files.folder / file).exists()}

    def identity(self) -> Mapping[str, Any]:
        """File → hash of its header, and of a file that no commit stands for size and time of its last change."""
        identity = {}
        for file, header in self._headers.items():
            layout = [[name, span.code, span.shape, span.begin, span.end] for name, span in header.spans.items()]
            digest = hashlib.sha256(json.dumps([layout, dict(header.metadata)]).encode()).hexdigest()
            stamp = self._stamps.get(file) if self._files.revision is None else None
            changes = {} if stamp is None else {"size": stamp.size, "mtime_ns": stamp.mtime_ns}
            identity[file] = {"header": digest, **changes}
        return identity

    def refuse_changed(self) -> None:
        """Refuses weights whose files were written to since they were opened.

        Raises:
            CheckpointError: One was.
        """
        for file, stamp in self._stamps.items():
            refuse_changed(self._files.folder / file, stamp, f"{self._files.where}/{file}")

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor; the first call fetches the files if they are elsewhere.

        Raises:
            CheckpointError: If the file has changed since its header was checked, or cannot be read.
        """
        info = self.infos[name]
        data = torch.empty(info.nbytes, dtype=torch.uint8)
        self.span(name).read_into(data.numpy().data)
        return data.view(info.dtype).reshape(info.shape)

    read_unrounded = read

    def span(self, name: str) -> FileSpan:
        """Finds where a tensor's bytes lie; the first call fetches the files if they are elsewhere.

        Raises:
            CheckpointError: If the file has changed since its header was checked, or cannot be read.
        """
        file = self._file_of[name]
        header = self._headers[file]
        span = header.spans[name]
        where = f"{self._files.where}/{file}"
        begin, nbytes = header.nbytes + span.begin, span.end - span.begin
        return FileSpan(self._opened(file, where), where, name, TORCH_DTYPES[span.code], begin, nbytes)

    def _opened(self, file: str, where: str) -> FileIO:
        """A file that is there, and as it was when its header was checked."""
        with self._lock:
            if file not in self._open:
                self._files.fetch(self._headers)
                path = self._files.folder / file
                if read_header(path, where) != self._headers[file]:
                    raise _changed(where)
                try:
                    if file not in self._stamps:
                        self._stamps[file] = Stamp.of(path)
                    refuse_changed(path, self._stamps[file], where)
                    self._open[file] = path.open("rb", buffering=0)
                except OSError as error:
                    raise CheckpointError(f"{where}: the file cannot be read ({error.strerror})") from error
            return self._open[file]


class TensorWeights:
    """Tensors that are in memory, or mapped into it."""

    def __init__(
        self,
        where: str,
        tensors: Mapping[str, torch.Tensor],
        paths: Sequence[Path] = (),
        *,
        may_be_quantised: bool = False,
    ) -> None:
        """Takes the tensors, which stay where they are.

        Args:
            where: What error messages call them.
            tensors: The tensors by name.
            paths: The files that are mapped.
            may_be_quantised: Whether some may be of quantised layers.

        Raises:
            CheckpointError: If they are quantised, or no plain numbers.
        """
        self._tensors = tensors
        self._stamps = {path: Stamp.of(path) for path in paths}
        if nested := [name for name, tensor in tensors.items() if tensor.is_nested]:
            raise CheckpointError(f"{where}: tensor {nested[0]} is a list of tensors; save them one by one")
        self.infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        for name, info in self.infos.items():
            if tensors[name].device.type == "meta" or tensors[name].layout != torch.strided:
                kind = "on the meta device" if tensors[name].device.type == "meta" else f"{tensors[name].layout}"
                raise CheckpointError(
                    f"{where}: tensor {name} holds no plain numbers ({kind.removeprefix('torch.')}); save the model"
                    " again with all weights in memory, as dense tensors"
                )
            if info.dtype not in CODES or (not may_be_quantised and is_quantised(name, info.dtype)):
                raise quantised_tensor(where, name, str(info.dtype))

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor."""
        return self._tensors[name].detach().to("cpu")

    read_unrounded = read

    def span(self, name: str) -> FileSpan | None:
        """Returns None, because the tensors are in memory."""
        return None

    def identity(self) -> Mapping[str, Any]:
        """File → size and time of its last change."""
        return {path.name: {"size": stamp.size, "mtime_ns": stamp.mtime_ns} for path, stamp in self._stamps.items()}

    def refuse_changed(self) -> None:
        """Refuses weights whose files were written to since they were opened.

        Raises:
            CheckpointError: One was.
        """
        for path, stamp in self._stamps.items():
            refuse_changed(path, stamp, str(path))


def refuse_changed(path: Path, stamp: Stamp, where: str) -> None:
    """Refuses a file that was written to, or replaced, since it had this stamp.

    Raises:
        CheckpointError: It was.
    """
    try:
        is_same = Stamp.of(path) == stamp
    except OSError:
        is_same = False
    if not is_same:
        raise _changed(where)


def _changed(where: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: the file has changed since it was opened, so what was read of it may be of two models; start again"
        " when nothing writes to it"
    )


def local_sizes(folder: Path) -> dict[str, int]:
    """Path below a folder → size in bytes, of every file in it and in its folders."""
    # Nothing that belongs to a checkpoint lies deeper, and below may be a whole tree of other runs.
    files = sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def read_json(path: Path, where: str) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        CheckpointError: If it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{where}: the file cannot be read ({error.strerror}); check that it is there and that you may read it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error}); fetch or save the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def open_weights(files: Files, explicit: Any = None, *, allow_pickle: bool = False) -> Weights:
    """Finds the weight files and checks their headers; of safetensors nothing else is fetched.

    Args:
        files: The files of the checkpoint.
        explicit: The file or index that the config names (`transformers_weights`), if any.
        allow_pickle: Whether pickled weights may be opened; of them only tensors are read.

    Raises:
        CheckpointError: If there are no weights, or they are cut off, corrupt or not safe to read.
    """
    names = files.sizes()
    if explicit is not None:
        if not isinstance(explicit, str) or is_outside(explicit) or explicit not in names:
            raise CheckpointError(
                f"{files.where}: transformers_weights in {CONFIG_FILE} is {explicit!r}, which is not a file of the"
                " checkpoint; remove the key or fetch the file"
            )
        return open_safetensors(files, explicit, may_be_quantised=True)
    if SINGLE_FILE in names or INDEX_FILE in names:
        file = SINGLE_FILE if SINGLE_FILE in names else INDEX_FILE
        return open_safetensors(files, file, may_be_quantised=True)
    if PICKLE_FILE in names or PICKLE_INDEX_FILE in names:
        file = PICKLE_FILE if PICKLE_FILE in names else PICKLE_INDEX_FILE
        return _open_pickles(files, file, allow_pickle, may_be_quantised=True)
    held = [name for name in names if "/" not in name]
    for ending, what in _NO_WEIGHTS.items():
        if any(name.endswith(ending) for name in held):
            raise CheckpointError(f"{files.where}: found {what}")
    raise CheckpointError(
        f"{files.where}: no weights found, expected {SINGLE_FILE}, {INDEX_FILE} or {PICKLE_FILE};"
        f" the folder holds {', '.join(held) or 'nothing'}"
    )


def is_adapter(files: Files) -> bool:
    """Whether the files are those of an adapter of peft, without a model of their own."""
    names = files.sizes()
    return ADAPTER_CONFIG in names and not any(
        name in names for name in (SINGLE_FILE, INDEX_FILE, PICKLE_FILE, PICKLE_INDEX_FILE)
    )


def open_adapter_weights(files: Files, *, allow_pickle: bool = False) -> Weights:
    """Finds the weights of an adapter and checks their header.

    Args:
        files: The files of the adapter.
        allow_pickle: Whether pickled weights may be opened; of them only tensors are read.

    Raises:
        CheckpointError: If there are none, or they are cut off, corrupt or not safe to read.
    """
    names = files.sizes()
    if ADAPTER_FILE in names:
        return open_safetensors(files, ADAPTER_FILE)
    if ADAPTER_PICKLE_FILE not in names:
        raise CheckpointError(
            f"{files.where}: no weights of an adapter found, expected {ADAPTER_FILE}; it holds"
            f" {', '.join(list(names)[:10]) or 'nothing'}"
        )
    return _open_pickles(files, ADAPTER_PICKLE_FILE, allow_pickle)


def open_safetensors(files: Files, file: str, *, may_be_quantised: bool = False) -> SafetensorsWeights:
    """Opens one file, or all that an index names.

    Args:
        files: The files of the checkpoint.
        file: The file or the index.
        may_be_quantised: Whether some tensors may be of quantised layers.

    Raises:
        CheckpointError: A file is missing, cut off or quantised, or does not fit the index.
    """
    index = file if file.endswith(_INDEX_ENDING) else None
    headers = {shard: files.header(shard) for shard in _shards(files, file)}
    problems: list[str] = []
    infos: dict[str, TensorInfo] = {}
    shard_of: dict[str, str] = {}
    for shard, header in headers.items():
        for name, span in header.spans.items():
            if name in infos:
                problems.append(f"tensor {name} is in {shard_of[name]} and again in {shard}")
            dtype = TORCH_DTYPES.get(span.code)
            if dtype is None or (not may_be_quantised and is_quantised(name, dtype)):
                raise quantised_tensor(f"{files.where}/{shard}", name, span.code)
            infos[name] = TensorInfo(dtype, span.shape)
            shard_of[name] = shard
    if index is not None:
        weight_map = read_json(files.folder / index, f"{files.where}/{index}")["weight_map"]
        problems += [
            f"tensor {name} should be in {shard}" + (f", but is in {shard_of[name]}" if name in shard_of else "")
            for name, shard in weight_map.items()
            if shard_of.get(name) != shard
        ]
        raise_all(problems, CheckpointError, f"{files.where}: {index} and the shards do not belong together")
    return SafetensorsWeights(files, headers, infos)


def _shards(files: Files, index: str) -> list[str]:
    """Lists the files that an index names, checked to lie in the folder; a weight file alone is the only one."""
    if not index.endswith(_INDEX_ENDING):
        return [index]
    files.fetch([index])
    where = f"{files.where}/{index}"
    weight_map = read_json(files.folder / index, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: expected a weight_map from tensors to files, found {repr(weight_map)[:80]}")
    names = files.sizes()
    problems: list[str] = []
    for shard in dict.fromkeys(str(shard) for shard in weight_map.values()):
        example = next(name for name, file in weight_map.items() if str(file) == shard)
        if is_outside(shard):
            problems.append(f"tensor {example} is said to be in {shard!r}, which is outside the checkpoint's folder")
        elif shard not in names:
            problems.append(f"the file {shard} with tensor {example} is missing; fetch it")
    raise_all(problems, CheckpointError, where)
    return sorted({str(shard) for shard in weight_map.values()})


def is_outside(name: str) -> bool:
    """Whether a path that a file names would lead out of that file's folder."""
    # Only what is written counts: in the Hub's cache every file is a link to another folder.
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or ":" in name


def _open_pickles(files: Files, file: str, allow_pickle: bool, *, may_be_quantised: bool = False) -> TensorWeights:
    if not allow_pickle:
        raise CheckpointError(
            f"{files.where}: the weights are pickled ({file}), a format that can carry code; save them again with"
            " save_pretrained to get safetensors, or where you trust their author ask for it with --allow-pickle"
            " (`allow_pickle: true` in a recipe, allow_pickle=True in Python)"
        )
    names = _shards(files, file)
    files.fetch(names)
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        where = f"{files.where}/{name}"
        for key, tensor in _load_pickle(files.folder / name, where).items():
            if not isinstance(tensor, torch.Tensor):
                raise CheckpointError(
                    f"{where}: {key!r} is a {type(tensor).__name__}, expected a tensor; this is not a model's state"
                    " (a training checkpoint?), save the model with save_pretrained"
                )
            tensors[str(key)] = tensor
    paths = [files.folder / name for name in names]
    return TensorWeights(files.where, tensors, paths, may_be_quantised=may_be_quantised)


def _load_pickle(path: Path, where: str) -> Mapping[Any, Any]:
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # Files from before torch 1.6 cannot be mapped.
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{where}: the file holds more than tensors, and reading it could run code in it; it was left unread."
            " Convert it to safetensors where you trust it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{where}: the file is cut off or corrupt ({first_line(error)}); fetch or save it again"
        ) from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{where}: expected tensors by name, found a {type(state).__name__}")
    return state
