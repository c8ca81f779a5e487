"""A checkpoint as the rest of the package sees it: config, and tensors by their names on disk, read one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_llfc.checkpoints.companions import by_name
from hf_llfc.checkpoints.files import Weights
from hf_llfc.checkpoints.header import CODES, TensorInfo
from hf_llfc.checkpoints.positioned import TensorBytes, checksum
from hf_llfc.checkpoints.settings import Settings
from hf_llfc.errors import CheckpointError, suggest

if TYPE_CHECKING:  # what knows model classes takes seconds to load
    from peft import PeftConfig
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

    from hf_llfc.checkpoints.views.folding import Folding
    from hf_llfc.checkpoints.views.vocabulary import Vocabulary
    from hf_llfc.symmetry import PermutationSpec


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter of peft that is folded into a checkpoint.

    Attributes:
        id: The repository on the Hub, or the folder as the user named it.
        revision: The commit on the Hub, or None.
        folder: The local folder of its files.
        kind: The type of the adapter in peft: `LORA`, `IA3`, …
        base: The checkpoint that it is folded into.
        config: Its config.
        onto: The base with the head and the rows that the adapter brings.
        state: Its tensors, by the names that peft gives them.
        targets: Names on disk of what it means to change.
        read: Gives a tensor of `onto`, folded and not rounded, by its name on disk.
        folding: What it changes, by module; None where it can be folded as a whole only.
    """

    id: str
    revision: str | None
    folder: Path
    kind: str
    base: Checkpoint
    config: PeftConfig
    onto: Checkpoint
    state: Mapping[str, torch.Tensor] = field(repr=False)
    targets: tuple[str, ...]
    read: Callable[[str], torch.Tensor] = field(repr=False)
    folding: Folding | None = None


@dataclass(frozen=True, eq=False)
class Reindexing:
    """The position of a checkpoint's rows in the vocabulary of several models.

    Attributes:
        union: The vocabulary: the union of all, or that of one.
        index: The position of the checkpoint among the models of the vocabulary, or behind them of a donor.
        dimensions: Name on disk of every tensor with one row per token → the dimension of the rows.
    """

    union: Vocabulary
    index: int
    dimensions: Mapping[str, int]


@dataclass(frozen=True)
class Relabelling:
    """The order that the classes of a checkpoint were brought into.

    Attributes:
        order: Class of the checkpoint as it lies on disk, for every class that it has here.
        because: What was done and why, as a sentence.
    """

    order: tuple[int, ...]
    because: str


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model's config and weights, wherever they lie, with the weights read one tensor at a time.

    Attributes:
        id: The repository on the Hub, the folder as the user named it, or for a model in memory where it came from; of
            a base with an adapter both, as `base+adapter`.
        label: What messages call it: the id, with the revision if the user named one.
        revision: The commit on the Hub, or None; of a base with an adapter both commits, as `commit+commit`, or None.
        folder: The local folder of its files, its tokenizer among them, or None for a model in memory.
        settings: The config of the model, and how it generates.
        architecture: The name of the model class, or None if the config does not say.
        model_class: The model class, or None if it is not known here; then tensors have the names in the files.
        tensors: Name on disk → dtype and shape, in the order in which `save_pretrained` writes them.
        companion_files: Tokenizer, processor, generation config, chat templates and custom code.
        unused: Names of tensors in the files that the model class has no use for.
        spare: The same with those that the class knows to be of no use to it → dtype and shape; they can be read.
        ties: Name of a tensor → names in its files of the other copies of it, which its config ties to it.
        head: Where its output head comes from, in words, if that was asked for; see `hf_llfc.checkpoints.views.heads`.
        buffers: How many buffers of older versions its files hold, which its class makes itself.
        lacking: Names on disk that the files lack, and that the model class does without → shape.
        quantised: How its weights are quantised, in words; None where they are not.
        borrowed: Name of a tensor that another model of the run lends → index of that model; see
            `hf_llfc.parents.fitting.sharing`.
        weights: The tensors, or what makes them.
        adapter: The adapter that is folded into its tensors, if there is one.
        canonical: The permutation spec of its canonical form, if its tensors are in that; see
            `hf_llfc.checkpoints.views.canonical`.
        original: The checkpoint whose canonical form it is.
        reindexing: How its rows lie in a union of vocabularies, if they do; see `hf_llfc.checkpoints.views.reindexed`.
        relabelling: How its classes were brought into another order, if they were; see
            `hf_llfc.checkpoints.views.relabelled`.
        trust_remote_code: Whether code that comes with it may be run.
        side_files: Path below its folder → what else goes with a result: what makes it a SentenceTransformer, licences.
        left_files: Files in its folder that do not go with a result, or folders with several of them.
    """

    id: str
    label: str
    revision: str | None
    folder: Path | None
    settings: Settings
    architecture: str | None
    model_class: type[PreTrainedModel] | None
    tensors: Mapping[str, TensorInfo]
    companion_files: tuple[Path, ...]
    unused: tuple[str, ...]
    weights: Weights = field(repr=False)
    adapter: Adapter | None = None
    canonical: PermutationSpec | None = None
    original: Checkpoint | None = None
    reindexing: Reindexing | None = None
    relabelling: Relabelling | None = None
    trust_remote_code: bool = False
    side_files: Mapping[str, Path] = field(default_factory=dict)
    left_files: tuple[str, ...] = ()
    spare: Mapping[str, TensorInfo] = field(default_factory=dict)
    lacking: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    buffers: int = 0
    ties: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head: str | None = None
    borrowed: Mapping[str, int] = field(default_factory=dict)
    quantised: str | None = None

    @property
    def config(self) -> PreTrainedConfig:
        """The config of the model.

        Raises:
            CheckpointError: If transformers cannot read it, of a checkpoint that was opened as stored.
        """
        return self.settings.config

    @property
    def generation_config(self) -> GenerationConfig | None:
        """Generation config of the model, also where an old config or a model in memory holds it."""
        return self.settings.generation_config

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor.

        Args:
            name: One of `tensors`.

        Returns:
            The tensor on the CPU in its stored dtype. It may lie in the mapped file or in the loaded model: do not
            change it in place.

        Raises:
            CheckpointError: If there is no such tensor, or its file cannot be read.
        """
        return self.weights.read(self._known(name))

    def read_unrounded(self, name: str) -> torch.Tensor:
        """Reads one tensor as `read` does, but before it is rounded where it is made from others."""
        return self.weights.read_unrounded(self._known(name))

    def _known(self, name: str) -> str:
        if name not in self.tensors:
            raise CheckpointError(f"{self.label}: there is no tensor {name}{suggest(name, self.tensors)}")
        return name

    def span(self, name: str) -> TensorBytes | None:
        """Finds where the bytes of one tensor lie in a file, to read them in parts.

        Args:
            name: One of `tensors`.

        Returns:
            The place; None where the tensor is made as it is read, or in memory, and comes as a whole.

        Raises:
            CheckpointError: If the file cannot be fetched, or has changed.
        """
        return self.weights.span(name)

    def state_dict(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Reads all tensors, one after the other."""
        for name in self.tensors:
            yield name, self.read(name)

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def pinned(self) -> str:
        """The name under which exactly these weights are found again, with commits where there are any."""
        own = self.adapter or self
        name = f"{own.id}@{own.revision}" if own.revision else own.id
        return name if self.adapter is None else f"{self.adapter.base.pinned}+{name}"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders that the checkpoint is read from."""
        beside = (self.adapter.folder, *self.adapter.base.folders) if self.adapter is not None else ()
        return (*([self.folder] if self.folder is not None else []), *beside)

    @property
    def is_here(self) -> bool:
        """Whether all weights lie on this machine, so that to read them downloads nothing."""
        if self.revision is None:
            return self.adapter is None or self.adapter.base.is_here
        files = [file for file in self.weights.identity() if file.endswith((".safetensors", ".bin"))]
        return all(any((folder / file).is_file() for folder in self.folders) for file in files)

    def identity(self) -> dict[str, Any]:
        """Tells this checkpoint from another without reading all its weights.

        Returns:
            As JSON values: hashes of the config and of the headers, the commit, or of local files sizes and times of
            the last change; for a model in memory the fingerprint, which reads everything.
        """
        identity: dict[str, Any] = {"id": self.id, "revision": self.revision, "config": self.settings.digest()}
        identity |= {"model": self.pinned} if self.adapter is not None else {}
        files = self.weights.identity()
        if not files:
            return {**identity, "sha256": self.fingerprint()}
        if self.revision is None:
            identity["companions"] = self.companion_checksums()
        return {**identity, "files": dict(files)}

    def companion_checksums(self) -> dict[str, str]:
        """The checksum of every companion and side file, by its path below the folder."""
        files = {**by_name(self.companion_files), **self.side_files}
        return {name: checksum(path) for name, path in files.items() if path.exists()}

    def refuse_changed(self) -> None:
        """Refuses a checkpoint whose weight files were written to since it was opened.

        Raises:
            CheckpointError: One was.
        """
        self.weights.refuse_changed()

    def fingerprint(self) -> str:
        """A hash of all weights that does not depend on how they are spread over files.

        Returns:
            SHA-256, as hexadecimal digits, over name, dtype, shape and bytes of every tensor in the order of names.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(json.dumps([name, CODES[info.dtype], info.shape]).encode() + b"\n")
            digest.update(tensor_bytes(self.read(name)))
        return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, copied only if they lie otherwise in memory."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
