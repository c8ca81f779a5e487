"""A base and an adapter of peft as one checkpoint: the base's tensors under its names, the adapter folded in.

Nothing is written. What the adapter does not change is read from the base's files where it lies; a tensor that it
changes is folded in float32 when it is read, one module at a time, so that memory stays that of the adapter and of a
few tensors. `read` rounds it to the dtype that the base has, for whoever runs or compares the model;
`read_unrounded` does not, so that a merge rounds once.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_llfc.checkpoints.checkpoint import Adapter, Checkpoint
from hf_llfc.checkpoints.companions import companion_names, has_vocabulary, is_of_tokenizer
from hf_llfc.checkpoints.files import ADAPTER_CONFIG, Files, open_adapter_weights
from hf_llfc.checkpoints.models import load_model
from hf_llfc.checkpoints.names import Group, Layout
from hf_llfc.checkpoints.planned import state_dict_on_disk
from hf_llfc.checkpoints.settings import most_common_dtype
from hf_llfc.checkpoints.views.adapted_base import as_adapted
from hf_llfc.checkpoints.views.folding import Folding, fold_whole, is_independent, kind_of
from hf_llfc.checkpoints.views.view import View
from hf_llfc.checkpoints.wrapped import unwrapped_adapter
from hf_llfc.errors import CheckpointError

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)

_SMALL = 1 << 16  # elements of a tensor that is kept when the module it belongs to was folded for another one


def fold(base: Checkpoint, files: Files, config: PeftConfig, *, allow_pickle: bool = False) -> Checkpoint:
    """Opens an adapter over its base as one checkpoint.

    Args:
        base: The base, opened with its model class.
        files: The files of the adapter.
        config: The config of the adapter.
        allow_pickle: Whether an adapter that is pickled, not safetensors, may be opened.

    Raises:
        CheckpointError: The adapter cannot be read, does not fit the base, or changes one of two tied weights only.
    """
    if base.model_class is None:
        raise CheckpointError(
            f"{base.label}: the model class {base.architecture or '(the config names none)'} is not known, so the "
            f"adapter {files.where} cannot be added to it; register the class, or allow trust_remote_code"
        )
    stored = unwrapped_adapter(open_adapter_weights(files, allow_pickle=allow_pickle), files.where)
    # peft takes what the file holds of the base itself, trained embeddings say, in the type that it has there.
    state = {
        name: tensor.to(_wide(base)) if tensor.is_floating_point() else tensor
        for name, tensor in ((name, stored.read(name)) for name in stored.infos)
    }
    named = base
    base, state = as_adapted(files.where, base, config, state)
    folded = _folded(files.where, base, config, state)
    own = companion_names(files.sizes())
    files.fetch(own)
    # The version of peft is part of the identity because another one may round otherwise.
    config_digest = hashlib.sha256((files.folder / ADAPTER_CONFIG).read_bytes()).hexdigest()
    tag = {ADAPTER_CONFIG: {"sha256": config_digest, "peft": version("peft")}}
    weights = View(base.weights, base.tensors, frozenset(folded.names), folded.make, tag, beside=(stored,))
    adapter = Adapter(
        id=files.id,
        revision=files.revision,
        folder=files.folder,
        kind=kind_of(config),
        base=named,
        config=config,
        onto=base,
        state=state,
        targets=tuple(folded.targets),
        read=weights.read_unrounded,
        folding=folded.folding if isinstance(folded, _ByModule) else None,
    )
    commits = [commit for commit in (base.revision, files.revision) if commit is not None]
    return replace(
        base,
        id=f"{base.id}+{files.id}",
        label=f"{base.label}+{files.where}",
        revision="+".join(commits) if len(commits) == 2 else None,
        folder=files.folder if has_vocabulary(own) else base.folder,
        companion_files=(*(files.folder / name for name in own), *_kept(base, own)),
        adapter=adapter,
        weights=weights,
    )


def _folded(where: str, base: Checkpoint, config: PeftConfig, state: Mapping[str, torch.Tensor]) -> _ByModule | _Whole:
    """Prepares the folding of an adapter: by module where that is possible."""
    if is_independent(config):
        by_module = _ByModule(where, base, config, state)
        if by_module.is_of_base:
            return by_module
    logger.warning(
        "%s: this adapter can only be folded with all of its base at hand: the base is loaded in float32, and stays in "
        "memory",
        where,
    )
    return _Whole(where, base, config, state)


def _kept(base: Checkpoint, own: list[str]) -> list[Path]:
    """The base's companions beside those of the adapter: none of its tokenizer if the adapter has one."""
    replaced = {name.rpartition("/")[2] for name in own}
    return [
        path
        for path in base.companion_files
        if path.name not in replaced and not (has_vocabulary(own) and is_of_tokenizer(path.name))
    ]


class _ByModule:
    """Tensors folded when they are asked for."""

    def __init__(self, where: str, base: Checkpoint, config: PeftConfig, state: Mapping[str, torch.Tensor]) -> None:
        assert base.model_class is not None
        self._layout = Layout(base.model_class, base.config)
        self._make_memory = self._layout.memory_reader(base.tensors)
        self._read = base.read_unrounded
        self._dtype = _wide(base)
        self.folding = Folding(where, self._layout.empty_model(), config, state, self._dtype)
        self._groups = {
            name: group
            for group in self._layout.groups
            if any(memory in self.folding.changes for memory in group.memory)
            for name in group.disk
        }
        self._made: dict[str, torch.Tensor] = {}
        self._making = threading.Lock()
        self._refuse_torn_ties(where)

    @property
    def is_of_base(self) -> bool:
        """Whether everything that changes has a name of the base, which the parts of some modules have not."""
        return set(self.folding.changes) <= set(self._layout.names_in_memory)

    @property
    def names(self) -> Collection[str]:
        """Names on disk of what the adapter may change."""
        return self._groups.keys()

    @property
    def targets(self) -> Collection[str]:
        """Names on disk of what the adapter means to change."""
        meant = self.folding.layers.keys() | self.folding.others
        return [name for name, group in self._groups.items() if any(memory in meant for memory in group.memory)]

    def _read_memory(self, name: str) -> torch.Tensor:
        return self._make_memory(name, self._read)

    def make(self, name: str) -> torch.Tensor:
        """Makes one tensor, unrounded; small ones of the same module or group are kept until they are asked for.

        A tensor on disk that is a part of a larger one in memory is kept with the other parts, one group at a time.
        """
        with self._making:
            if name in self._made:
                return self._made.pop(name)
        group = self._groups[name]
        made = self._make_group(group)
        tensor = made.pop(name)
        with self._making:
            if len(group.disk) > 1:
                self._made = {other: kept for other, kept in self._made.items() if kept.numel() <= _SMALL}
            self._made |= {other: kept for other, kept in made.items() if kept.numel() <= _SMALL or other in group.disk}
        return tensor

    def _make_group(self, group: Group) -> dict[str, torch.Tensor]:
        """Tensors of a group on disk, and small ones of the same modules."""
        memory: dict[str, torch.Tensor] = {}
        beside: dict[str, torch.Tensor] = {}
        for name in group.memory:
            if name in memory:
                continue
            path = self.folding.changes.get(name)
            if path is None:
                memory[name] = self._read_memory(name).to(self._dtype)
                continue
            folded = self.folding.fold(path, self._read_memory)
            memory |= {other: tensor for other, tensor in folded.items() if other in group.memory}
            beside |= {
                other: tensor
                for other, tensor in folded.items()
                # Under the same name on disk, and not as a part of anything.
                if tensor.numel() <= _SMALL and self._groups.get(other) == Group((other,), (other,)) != group
            }
        return {**beside, **self._layout.to_disk(memory)}

    def _refuse_torn_ties(self, where: str) -> None:
        changes = self.folding.changes
        for name, other in self._layout.ties.items():
            if name not in changes and other not in changes:
                continue
            if name in changes and other in changes:
                both = [self.folding.fold(changes[tied], self._read_memory)[tied] for tied in (name, other)]
                if torch.equal(*both):
                    continue
            raise CheckpointError(
                f"{where}: the base ties {name} to {other}, and after the adapter the two differ, so that the folded "
                "model is of another architecture; fold it with merge_and_unload() of peft, save it with "
                "tie_word_embeddings set to false, and name the saved folder"
            )


class _Whole:
    """Tensors of the whole base, folded together at the first question."""

    def __init__(self, where: str, base: Checkpoint, config: PeftConfig, state: Mapping[str, torch.Tensor]) -> None:
        self._where = where
        self._base = base
        self._config = config
        self._state = state
        self._folding = threading.Lock()
        self._folded: dict[str, torch.Tensor] | None = None

    @property
    def names(self) -> Collection[str]:
        """Names on disk of what the adapter may change."""
        return [name for name, info in self._base.tensors.items() if info.dtype.is_floating_point]

    @property
    def targets(self) -> Collection[str]:
        """Names on disk of what the adapter means to change, as far as its file tells."""
        meant = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in self._state}
        return [name for name in self.names if any(path and path in name for path in meant)] or self.names

    def make(self, name: str) -> torch.Tensor:
        """Makes one tensor, unrounded."""
        with self._folding:
            if self._folded is None:
                model = load_model(self._base, dtype=_wide(self._base))
                self._folded = state_dict_on_disk(fold_whole(self._where, model, self._config, self._state))
                if self._folded.keys() != self._base.tensors.keys():
                    raise CheckpointError(f"{self._where}: with this adapter the model has other tensors than its base")
            return self._folded[name].detach()


def _wide(base: Checkpoint) -> torch.dtype:
    """The type in which weights are folded: float32, or float64 where the base has that."""
    return torch.promote_types(most_common_dtype(base.tensors) or torch.float32, torch.float32)
