"""The config of a checkpoint: what its file says, and what transformers makes of that, which is loaded when needed.

To load a config class takes more than a second, since it brings the compilers of torch with it; to merge models of one
kind takes nothing that their files do not say.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_llfc.checkpoints.files import CONFIG_FILE, Files
from hf_llfc.checkpoints.header import TensorInfo
from hf_llfc.errors import CheckpointError

if TYPE_CHECKING:  # takes long to load
    from transformers import GenerationConfig, PreTrainedConfig


NOT_OF_THE_RESULT = ("_name_or_path", "quantization_config", "transformers_weights")
"""Keys of config.json that tell of a parent's files: where it was loaded from, how it was stored, and under which name.
They are not true of a result."""


class Unsaid(Exception):
    """A file does not say a value that is needed."""


@dataclass(frozen=True, eq=False)
class Settings:
    """The config of a checkpoint, and how its model generates.

    Attributes:
        raw: The values in config.json, with what a view of the checkpoint changes; None where the config is in memory.
        load: Loads the config; called once, when it is asked for.
        load_generation: Loads the generation config, given the config; None if there is none.
    """

    raw: Mapping[str, Any] | None
    load: Callable[[], PreTrainedConfig]
    load_generation: Callable[[PreTrainedConfig], GenerationConfig | None]

    @classmethod
    def in_memory(cls, config: PreTrainedConfig, generation_config: GenerationConfig | None = None) -> Settings:
        """Takes objects that are in memory."""
        return cls(None, lambda: config, lambda _: generation_config)

    @classmethod
    def of_file(cls, files: Files, raw: dict[str, Any], trust_remote_code: bool) -> Settings:
        """Takes the values of a file; transformers is loaded when the objects are asked for.

        Args:
            files: The files of the checkpoint.
            raw: The values in its config.json.
            trust_remote_code: Whether code that comes with the checkpoint may be run.
        """

        def load() -> PreTrainedConfig:
            from hf_llfc.checkpoints.configs import load_config

            where = f"{files.where}/{CONFIG_FILE}"
            # Config classes change what they are given, `rope_scaling` say.
            return load_config(files, copy.deepcopy(raw), architecture_of(where, raw), trust_remote_code)

        def load_generation(config: PreTrainedConfig) -> GenerationConfig | None:
            from hf_llfc.checkpoints.configs import load_generation_config

            return load_generation_config(files, raw, config)

        return cls(raw, load, load_generation)

    def with_config(self, config: PreTrainedConfig) -> Settings:
        """Settings with another config: of config.json, what differs between the two is changed and nothing else."""
        raw = None if self.raw is None else _overlaid(self.raw, self.config, config)
        return Settings(raw, lambda: config, lambda _: self.generation_config)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config.

        Raises:
            CheckpointError: transformers cannot read it.
        """
        return self.load()

    @cached_property
    def generation_config(self) -> GenerationConfig | None:
        """Generation config of the model, or None.

        Raises:
            CheckpointError: transformers cannot read it.
        """
        return self.load_generation(self.config)

    @property
    def model_type(self) -> str:
        """The model type."""
        named = self.raw.get("model_type") if self.raw is not None else None
        return named if isinstance(named, str) and named else self.config.model_type

    def said(self, silent: Collection[str] | None = None) -> Said | None:
        """The values in the file, to be read like a config; None where code of its own reads it.

        Args:
            silent: See `Said`.
        """
        return None if self.raw is None or "auto_map" in self.raw else Said(self.raw, silent)

    def digest(self) -> str:
        """SHA-256 of the config, as hexadecimal digits."""
        text = self.config.to_json_string(use_diff=False) if self.raw is None else json.dumps(self.raw, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def write(self, folder: Path, infos: Mapping[str, TensorInfo]) -> None:
        """Writes config.json: as it was read, but for what is not true of the weights that it describes.

        Args:
            folder: Where to.
            infos: The weights that it describes; most of them have the dtype that it names.
        """
        dtype = most_common_dtype(infos)
        if self.raw is None:
            config = copy.deepcopy(self.config)
            if dtype is not None:
                config.dtype = dtype
            config.save_pretrained(folder)
            return
        raw = {key: value for key, value in self.raw.items() if key not in NOT_OF_THE_RESULT}
        raw.setdefault("model_type", self.model_type)
        if dtype is not None:
            raw["torch_dtype" if "torch_dtype" in raw and "dtype" not in raw else "dtype"] = _name(dtype)
            stored = {_name(info.dtype) for info in infos.values()}
            raw = {key: _with_dtype(value, stored, dtype) for key, value in raw.items()}
        (folder / CONFIG_FILE).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def most_common_dtype(infos: Mapping[str, TensorInfo]) -> torch.dtype | None:
    """The floating-point dtype in which most weights are stored; None if there are none."""
    elements: Counter[torch.dtype] = Counter()
    for info in infos.values():
        if info.dtype.is_floating_point:
            elements[info.dtype] += info.elements
    return elements.most_common(1)[0][0] if elements else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _with_dtype(section: Any, stored: Collection[str], dtype: torch.dtype) -> Any:
    """A section of a config, of the text model say, that names no dtype which no weight has."""
    if not isinstance(section, Mapping):
        return section
    changed = {key: section[key] for key in ("dtype", "torch_dtype") if isinstance(section.get(key), str)}
    return {**section, **{key: value if value in stored else _name(dtype) for key, value in changed.items()}}


def _overlaid(raw: Mapping[str, Any], before: PreTrainedConfig, after: PreTrainedConfig) -> dict[str, Any]:
    """The values in config.json with those replaced in which two configs differ."""
    return _with_changes(raw, before.to_dict(), after.to_dict(), _aliases(after))


def _with_changes(
    raw: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], aliases: Mapping[str, str]
) -> dict[str, Any]:
    # Classes are numbers in a config, and text in its file.
    before, after = ({str(key): value for key, value in values.items()} for values in (before, after))
    changed = {key: value for key, value in raw.items() if key in after or key not in before}
    for key, value in after.items():
        if key in before and before[key] == value:
            continue
        if all(isinstance(each.get(key), Mapping) for each in (raw, before, after)):
            changed[key] = _with_changes(raw[key], before[key], value, aliases)
            continue
        for alias in [alias for alias, meant in aliases.items() if meant == key]:
            changed.pop(alias, None)
        changed[key] = value
    return changed


def _aliases(config: PreTrainedConfig) -> dict[str, str]:
    """Other names that a file may have for values of a config and of its sections."""
    from transformers import PreTrainedConfig

    sections = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    of_classes = {alias: meant for each in (*sections, config) for alias, meant in each.attribute_map.items()}
    return {"num_labels": "id2label", "_num_labels": "id2label", **of_classes}


class Said:
    """The values in config.json as adapters read them: enough to name the tensors of a model and to tell their shapes.

    For a value that is missing the adapter has its own default, which need not be that of the config class; the tensors
    have to fit it, or `silent` says which may be missing. A null, in whose place a class may put anything, raises
    `Unsaid`.
    """

    def __init__(self, values: Mapping[str, Any], silent: Collection[str] | None = None) -> None:
        """Takes the values.

        Args:
            values: Of the file.
            silent: Names that the file may leave out, any other raises `Unsaid`; None where every name may be missing.
        """
        self._values = _Values(values, silent)

    def __getattr__(self, name: str) -> Any:
        """A value that has to be there."""
        if name not in self._values:
            raise Unsaid(name)
        return self._values[name]

    def to_dict(self) -> Mapping[str, Any]:
        """The values."""
        return self._values


class _Values(Mapping[str, Any]):
    """Values of a config, none of them null."""

    def __init__(self, values: Mapping[str, Any], silent: Collection[str] | None) -> None:
        self._values = values
        self._silent = silent

    def __getitem__(self, name: str) -> Any:
        if name not in self._values and self._silent is not None and name not in self._silent:
            raise Unsaid(name)
        value = self._values[name]
        if value is None:
            raise Unsaid(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def architecture_of(where: str, raw: Mapping[str, Any]) -> str | None:
    """The model class that a config names first, or None if it names none.

    Raises:
        CheckpointError: It names something else.
    """
    architectures = raw.get("architectures")
    if architectures is None or architectures == []:
        return None
    if not isinstance(architectures, list) or not all(isinstance(entry, str) for entry in architectures):
        raise CheckpointError(f"{where}: architectures must be a list of class names, found {architectures!r}")
    return architectures[0]
