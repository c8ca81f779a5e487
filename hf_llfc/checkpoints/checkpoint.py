"""A checkpoint as the rest of the package sees it: config, tensors under their names on disk, read one at a time.

`open_checkpoint` checks everything that can be known before a tensor is read: config, quantisation, headers, and
that the tensors are those of the model class. Weights on the Hub are downloaded at the first `read`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_llfc.checkpoints.companions import code_names, companion_names
from hf_llfc.checkpoints.files import (
    ADAPTER_CONFIG,
    CONFIG_FILE,
    Files,
    FileSpan,
    LocalFiles,
    Stamp,
    TensorWeights,
    Weights,
    is_adapter,
    open_weights,
    read_json,
    refuse_quantised,
)
from hf_llfc.checkpoints.header import CODES, TensorInfo, natural_order
from hf_llfc.checkpoints.settings import Settings, architecture_of
from hf_llfc.errors import CheckpointError, suggest

if TYPE_CHECKING:  # what knows model classes takes seconds to load, and is loaded where a class is needed
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

    from hf_llfc.checkpoints import names
    from hf_llfc.checkpoints.views.vocabulary import Union
    from hf_llfc.symmetry import PermutationSpec

logger = logging.getLogger(__name__)

_NAMES_IN_A_MESSAGE = 5
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[^\s+]+)?")


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter of peft that is folded into a checkpoint.

    Attributes:
        id: Its repository on the Hub, or the folder as the user named it.
        revision: The commit on the Hub, or None.
        folder: Where its files lie on this machine.
        kind: Of peft: `LORA`, `IA3`, …
        base: What it is folded into.
    """

    id: str
    revision: str | None
    folder: Path
    kind: str
    base: Checkpoint


@dataclass(frozen=True, eq=False)
class Reindexing:
    """How the rows of a checkpoint lie in the union of several vocabularies.

    Attributes:
        union: Of its vocabulary with those of others.
        place: Of the checkpoint among the models of the union.
        dimensions: Name on disk of every tensor with a row a token → which of its dimensions that is.
    """

    union: Union
    place: int
    dimensions: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model's config and weights, wherever they lie, with the weights read one tensor at a time.

    Attributes:
        id: The repository on the Hub, the folder as the user named it, or for a model in memory where it came from; of
            a base with an adapter both, as `base+adapter`.
        label: What messages call it: the id, with the revision if the user named one.
        revision: The commit on the Hub, or None; of a base with an adapter both commits, as `commit+commit`, or None.
        folder: Where its files lie on this machine, its tokenizer among them, or None for a model in memory.
        settings: The config of the model, and how it generates.
        architecture: The name of the model class, or None if the config does not say.
        model_class: The model class, or None if it is not known here; then tensors have the names in the files.
        tensors: Name on disk → dtype and shape, in the order in which `save_pretrained` writes them.
        companion_files: Tokenizer, processor, generation config, chat templates and custom code.
        unused: Names of tensors in the files that the model class has no use for.
        adapter: What is folded into its tensors; None of an ordinary checkpoint.
        canonical: The permutation spec of its canonical form, if its tensors are in that; see
            `hf_llfc.checkpoints.views.canonical`.
        reindexing: If its rows are those of a union of vocabularies; see `hf_llfc.checkpoints.views.reindexed`.
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
    _weights: Weights = field(repr=False)
    adapter: Adapter | None = None
    canonical: PermutationSpec | None = None
    reindexing: Reindexing | None = None

    @property
    def config(self) -> PreTrainedConfig:
        """The config of the model.

        Raises:
            CheckpointError: If transformers cannot read it, of a checkpoint that was opened as stored.
        """
        return self.settings.config

    @property
    def generation_config(self) -> GenerationConfig | None:
        """How the model generates, also where an old config or a model in memory says so."""
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
        if name not in self.tensors:
            raise CheckpointError(f"{self.label}: there is no tensor {name}{suggest(name, self.tensors)}")
        return self._weights.read(name)

    def read_unrounded(self, name: str) -> torch.Tensor:
        """Reads one tensor as `read` does, but one that is made from others before it is rounded."""
        if self.adapter is None and self.canonical is None and self.reindexing is None:
            return self.read(name)
        from hf_llfc.checkpoints.views.adapted import AdaptedWeights
        from hf_llfc.checkpoints.views.canonical import CanonicalWeights
        from hf_llfc.checkpoints.views.reindexed import ReindexedWeights

        assert isinstance(self._weights, AdaptedWeights | CanonicalWeights | ReindexedWeights)
        return self._weights.read_unrounded(name)

    def span(self, name: str) -> FileSpan | None:
        """Where the bytes of one tensor lie in a file, to be read in parts.

        Args:
            name: One of `tensors`.

        Returns:
            The place; None where the tensor is made as it is read, or in memory, and comes as a whole.

        Raises:
            CheckpointError: If the file cannot be fetched, or has changed.
        """
        return self._weights.span(name)

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
        """How to name this checkpoint, for what was read to be found again: with its commits where it has any."""
        if self.adapter is not None:
            own = self.adapter
            return f"{own.base.pinned}+{own.id}@{own.revision}" if own.revision else f"{own.base.pinned}+{own.id}"
        return f"{self.id}@{self.revision}" if self.revision else self.id

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders that it is read from."""
        beside = (self.adapter.folder, *self.adapter.base.folders) if self.adapter is not None else ()
        return (*([self.folder] if self.folder is not None else []), *beside)

    def identity(self) -> dict[str, Any]:
        """What tells this checkpoint from another without reading all its weights, as JSON values.

        Returns:
            Hashes of the config and of the headers, the commit, or of local files sizes and times of the last change;
            for a model in memory the fingerprint, which reads everything.
        """
        found: dict[str, Any] = {"id": self.id, "revision": self.revision}
        found["config"] = self.settings.digest()
        found |= {"model": self.pinned} if self.adapter is not None else {}
        files = self._weights.identity()
        if not files:
            return {**found, "sha256": self.fingerprint()}
        if self.revision is None:
            stamps = [(path.name, Stamp.of(path)) for path in self.companion_files if path.exists()]
            found["companions"] = {name: [stamp.size, stamp.mtime_ns] for name, stamp in stamps}
        return {**found, "files": dict(files)}

    def refuse_changed(self) -> None:
        """Refuses a checkpoint whose weight files were written to since it was opened.

        Raises:
            CheckpointError: One was.
        """
        self._weights.refuse_changed()

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


def open_checkpoint(
    model: str | Path | PreTrainedModel,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    as_stored: bool = False,
    token: str | bool | None = None,
) -> Checkpoint:
    """Opens a checkpoint and checks it as far as that is possible without reading tensors.

    Args:
        model: A Hub id, `id@revision`, a local folder, or a loaded model; `base+adapter` for a base with an adapter of
            peft folded in, each an id or a folder; or the adapter alone, whose config names its base.
        trust_remote_code: Whether code that comes with the checkpoint may be run.
        allow_pickle: Whether weights that are pickled, not safetensors, may be opened; only tensors are read of them.
        as_stored: Whether to leave the classes of the model and of its config alone, which take seconds to load:
            tensors have the names in the files, it is not checked that they are those of the class, and the config is
            read when it is asked for.
        token: A token for the Hub; None takes the one of the login.

    Raises:
        CheckpointError: If the checkpoint cannot be found or reached, is quantised, truncated or corrupt, or its
            tensors are not those of its model class.
    """
    if isinstance(model, str | Path):
        base, adapter = split_adapter(str(model))
        files = _find(model if adapter is None else adapter, token)
        if adapter is None and not is_adapter(files):
            return _open_files(files, trust_remote_code, allow_pickle, as_stored)
        return _open_adapted(base if adapter is not None else None, files, trust_remote_code, allow_pickle, token)
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return _open_model(model)
    raise CheckpointError(
        f"expected a Hub id, a folder or a transformers PreTrainedModel, found {type(model).__name__}; of a wrapped"
        " model give the model inside (an adapter first needs merge_and_unload())"
    )


def split_adapter(model: str) -> tuple[str, str | None]:
    """The two parts of `base+adapter`; a folder whose name holds a plus stays whole.

    Args:
        model: As a user names it.

    Returns:
        The base and the adapter; the whole and None where it is not two names.
    """
    if "+" not in model or Path(model).expanduser().exists():
        return model, None

    def may_be_a_model(name: str) -> bool:
        return Path(name).expanduser().exists() or _HUB_NAME.fullmatch(name) is not None

    pluses = [place for place, letter in enumerate(model) if letter == "+"]
    pairs = [(model[:place], model[place + 1 :]) for place in pluses]
    fitting = [pair for pair in pairs if all(may_be_a_model(name) for name in pair)]
    if not fitting and len(pairs) == 1:
        return pairs[0]  # one of the two is not there, which is said of it
    return fitting[0] if fitting else (model, None)


def _open_adapted(
    base: str | None, files: Files, trust_remote_code: bool, allow_pickle: bool, token: str | bool | None
) -> Checkpoint:
    from hf_llfc.checkpoints.views.adapted import fold
    from hf_llfc.checkpoints.views.folding import base_of, read_config

    if not is_adapter(files) and ADAPTER_CONFIG not in files.sizes():
        raise CheckpointError(
            f"{files.where}: there is no {ADAPTER_CONFIG}, so it is no adapter of peft; what stands behind the plus of"
            " `base+adapter` must be one"
        )
    files.fetch([ADAPTER_CONFIG])
    config = read_config(files)
    named = base if base is not None else base_of(config)
    if named is None:
        raise CheckpointError(f"{files.where}: {ADAPTER_CONFIG} names no base; write BASE+{files.where}")
    opening = "" if base is not None else f"; {files.where} names it as its base, another is named by BASE+ADAPTER"
    try:
        opened = open_checkpoint(named, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, token=token)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{opening}") from error
    if opened.adapter is not None:
        raise CheckpointError(
            f"{named}: an adapter can be folded into a model, not into another adapter; save it first"
        )
    return fold(opened, files, config, allow_pickle=allow_pickle)


def _find(model: str | Path, token: str | bool | None) -> Files:
    path = Path(model).expanduser()
    if path.is_dir():
        if not any((path / name).is_file() for name in (CONFIG_FILE, ADAPTER_CONFIG)):
            _refuse_without_config(str(model), path)
        return LocalFiles(str(model), path)
    if path.is_file():
        quantised = ", and GGUF is quantised: use the checkpoint it was made from" if path.suffix == ".gguf" else ""
        raise CheckpointError(f"{model}: this is a file; give the folder of the checkpoint{quantised}")
    text = str(model)
    is_path = text.startswith(("/", ".", "~")) or text.partition("@")[0].count("/") > 1 or "\\" in text
    if isinstance(model, Path) or is_path:
        raise CheckpointError(f"{model}: there is no such folder; give one that exists, or a Hub id (`owner/name`)")
    from hf_llfc.checkpoints.hub import open_hub

    return open_hub(text, token)


def _refuse_without_config(where: str, folder: Path) -> None:
    found = sorted(path.name for path in folder.iterdir())
    if any(name.endswith(".gguf") for name in found):
        raise CheckpointError(
            f"{where}: found only GGUF files, which are quantised; use the checkpoint that they were made from"
        )
    checkpoints = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
    hint = f"; did you mean {folder / checkpoints[-1]}?" if checkpoints else ""
    raise CheckpointError(
        f"{where}: the folder has no {CONFIG_FILE}, so it is no transformers checkpoint; it holds"
        f" {', '.join(found[:10]) or 'nothing'}{hint}"
    )


def _open_files(files: Files, trust_remote_code: bool, allow_pickle: bool, as_stored: bool) -> Checkpoint:
    raw = read_json(files.folder / CONFIG_FILE, f"{files.where}/{CONFIG_FILE}")
    refuse_quantised(files.where, raw.get("quantization_config"))
    companions = _fetch_companions(files)
    architecture = architecture_of(f"{files.where}/{CONFIG_FILE}", raw)
    settings = Settings.of_file(files, raw, trust_remote_code)
    model_class = None if as_stored else _model_class(files, architecture, settings, trust_remote_code)

    weights = open_weights(files, raw.get("transformers_weights"), allow_pickle=allow_pickle)
    opened = Checkpoint(
        id=files.id,
        label=files.where,
        revision=files.revision,
        folder=files.folder,
        settings=settings,
        architecture=architecture,
        model_class=model_class,
        tensors={name: weights.infos[name] for name in sorted(weights.infos, key=natural_order)},
        companion_files=tuple(companions),
        unused=(),
        _weights=weights,
    )
    return planned(opened, weights)


def planned(checkpoint: Checkpoint, weights: Weights, heading: str | None = None) -> Checkpoint:
    """A checkpoint whose tensors have the names on disk of its model class, where that is known.

    Args:
        checkpoint: With the names of the files.
        weights: By those names.
        heading: The first line of the error, if there is one.

    Raises:
        CheckpointError: The tensors are not those of the model class.
    """
    plan = _plan(checkpoint, weights, heading)
    if plan is None:
        return checkpoint
    made = _PlannedWeights(checkpoint.label, plan, weights)
    return replace(checkpoint, tensors=plan.tensors, unused=plan.unused, _weights=made)


def _open_model(model: PreTrainedModel) -> Checkpoint:
    label = model.name_or_path or type(model).__name__
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    refuse_quantised(label, config.to_dict().get("quantization_config"))
    weights = TensorWeights(label, state_dict_on_disk(model))
    return Checkpoint(
        id=label,
        label=label,
        revision=None,
        folder=None,
        settings=Settings.in_memory(config, model.generation_config if model.can_generate() else None),
        architecture=type(model).__name__,
        model_class=type(model),
        tensors=weights.infos,
        companion_files=tuple(_companions_of(model)),
        unused=(),
        _weights=weights,
    )


def _companions_of(model: PreTrainedModel) -> list[Path]:
    """The companions of a model in memory, if the place it was loaded from is still there."""
    if not model.name_or_path:
        return []
    try:
        return _fetch_companions(_find(model.name_or_path, None))
    except CheckpointError as error:
        logger.warning("no tokenizer or processor goes with the model in memory: %s", error)
        return []


def _fetch_companions(files: Files) -> list[Path]:
    present = files.sizes()
    companions = companion_names(present)
    files.fetch(companions)
    code = code_names(present)
    described = [name for name in (CONFIG_FILE, *companions) if name.endswith(".json")]
    if code and any(b'"auto_map"' in (files.folder / name).read_bytes() for name in described):
        files.fetch(code)
        companions += code
    return [files.folder / name for name in companions]


def _model_class(
    files: Files, architecture: str | None, settings: Settings, trust_remote_code: bool
) -> type[PreTrainedModel] | None:
    from hf_llfc.checkpoints import names
    from hf_llfc.checkpoints.configs import UnknownConfig

    # Both are read here, for what is wrong with them to be said before anything is done.
    config, _ = settings.config, settings.generation_config
    if architecture is None or isinstance(config, UnknownConfig):
        return None
    try:
        return names.find_model_class(architecture, config, folder=files.folder, trust_remote_code=trust_remote_code)
    except ImportError as error:
        logger.warning("%s: %s cannot be imported (%s); its tensors keep their names", files.where, architecture, error)
        return None
    except Exception as error:  # code that comes with a checkpoint may raise anything
        raise CheckpointError(f"{files.where}: the code of {architecture} cannot be loaded: {error}") from error


def _plan(checkpoint: Checkpoint, weights: Weights, heading: str | None) -> names.Plan | None:
    """How the tensors on disk come from those in the files, or None if the model class is not known here."""
    model_class, where = checkpoint.model_class, checkpoint.label
    if model_class is None:
        return None
    from hf_llfc.checkpoints import names

    try:
        layout = names.Layout(model_class, checkpoint.config)
    except ImportError as error:
        logger.warning("%s: %s cannot be built (%s); its tensors keep their names", where, model_class.__name__, error)
        return None
    except Exception as error:  # a model class may raise anything on values it does not expect
        raise CheckpointError(
            f"{where}/{CONFIG_FILE}: {model_class.__name__} cannot be built from this config: {error}"
        ) from error
    heading = heading or (
        f"{where}: the tensors are not those of {model_class.__name__} as {CONFIG_FILE} describes it; fetch or save "
        "the checkpoint again"
    )
    plan = layout.plan(weights.infos, heading)
    if plan.converted:
        logger.info(
            "%s: %d tensors are stored under other names, or in the layout of the memory; they are converted as they"
            " are read, which takes the memory of one group of tensors",
            where,
            len(plan.converted),
        )
    if plan.unused:
        more = f" and {len(plan.unused) - _NAMES_IN_A_MESSAGE} more" if len(plan.unused) > _NAMES_IN_A_MESSAGE else ""
        logger.warning(
            "%s: %s does not use the tensors %s%s; they are left out",
            where,
            model_class.__name__,
            ", ".join(plan.unused[:_NAMES_IN_A_MESSAGE]),
            more,
        )
    return plan


class _PlannedWeights:
    """Tensors under their names on disk, made from tensors under the names of a file."""

    def __init__(self, where: str, plan: names.Plan, stored: Weights) -> None:
        self.infos = plan.tensors
        self._where = where
        self._plan = plan
        self._stored = stored
        self._untested_ties = dict(plan.ties)
        self._made: dict[str, torch.Tensor] = {}
        self._making = threading.Lock()

    def identity(self) -> Mapping[str, Any]:
        """Of the files."""
        return self._stored.identity()

    def refuse_changed(self) -> None:
        """Refuses files that were written to since they were opened."""
        self._stored.refuse_changed()

    def read(self, name: str) -> torch.Tensor:
        """One tensor; the rest of its group is kept until the next group is made."""
        if name in self._plan.converted:
            with self._making:
                if name not in self._made:
                    self._made.clear()
                    self._made = self._plan.make(name, self._stored.read)
                return self._made.pop(name)
        tensor = self._stored.read(name)
        for copy in self._untested_ties.pop(name, ()):
            other = self._stored.read(copy)
            if other.dtype != tensor.dtype or not torch.equal(other, tensor):
                raise CheckpointError(
                    f"{self._where}: the config ties {copy} to {name}, but the file holds two different tensors; set"
                    f" tie_word_embeddings to false in {CONFIG_FILE} if both are meant"
                )
        return tensor

    def span(self, name: str) -> FileSpan | None:
        """Where a tensor's bytes lie that is neither made nor still to be compared with its other copies."""
        made = name in self._plan.converted or name in self._untested_ties
        return None if made else self._stored.span(name)


def state_dict_on_disk(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state of a loaded model under the names that `save_pretrained` writes, tied weights once.

    Args:
        model: A loaded model.

    Returns:
        Name on disk → tensor; most share their memory with the model.

    Raises:
        CheckpointError: If the model has adapters, is not in memory, or ties weights that its class does not declare.
    """
    from hf_llfc.checkpoints import names

    label = model.name_or_path or type(model).__name__
    if model._hf_peft_config_loaded:
        raise CheckpointError(f"{label}: the model carries adapters; merge them with merge_and_unload() first")
    try:
        state = names.disk_state(model)
    except RuntimeError as error:
        raise CheckpointError(f"{label}: the weights cannot be named as on disk: {error}") from error
    absent = [name for name, tensor in state.items() if tensor.device.type == "meta"]
    if absent:
        raise CheckpointError(
            f"{label}: tensor {absent[0]} is not in memory (offloaded, or on the meta device; {len(absent)} tensors);"
            " load the model without a device map, or give the folder it came from"
        )
    return state
