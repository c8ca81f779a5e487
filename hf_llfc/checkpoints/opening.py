"""Opening a checkpoint: everything that can be known before a tensor is read is checked.

That is the config, quantisation, the headers, and whether the tensors are those of the model class. Weights on the Hub
are downloaded at the first read.
"""

from __future__ import annotations

import json
import logging
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llfc.checkpoints.bounds import refuse_more_modules_than_tensors
from hf_llfc.checkpoints.checkpoint import Checkpoint
from hf_llfc.checkpoints.companions import (
    MODULES_FILE,
    code_names,
    companion_names,
    left_names,
    read_values,
    side_names,
)
from hf_llfc.checkpoints.files import (
    ADAPTER_CONFIG,
    CONFIG_FILE,
    Files,
    LocalFiles,
    TensorWeights,
    Weights,
    is_adapter,
    open_weights,
    read_json,
)
from hf_llfc.checkpoints.header import natural_order
from hf_llfc.checkpoints.planned import planned, state_dict_on_disk
from hf_llfc.checkpoints.quantised import KEYS, quantisation_said, quantised_in_memory, without_quantisation
from hf_llfc.checkpoints.settings import Settings, architecture_of
from hf_llfc.checkpoints.views import heads
from hf_llfc.checkpoints.views.dequantised import dequantised
from hf_llfc.checkpoints.wrapped import unwrapped
from hf_llfc.errors import CheckpointError
from hf_llfc.foundation.model_names import existing, split_adapter

if TYPE_CHECKING:  # what knows model classes takes seconds to load, and is loaded where a class is needed
    from peft import PeftConfig
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Instead = tuple[str | None, bool | None]
"""What stands in the place of words of a config: its class, and whether its output head is its embedding."""


def open_checkpoint(
    model: str | Path | PreTrainedModel,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    as_stored: bool = False,
    architecture: str | None = None,
    token: str | bool | None = None,
    is_tied: bool | None = None,
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
        architecture: The model class to take in place of the one that the config names.
        token: A token for the Hub; None takes the one of the login.
        is_tied: Whether its output head is to be its embedding; None: as its config says.

    Raises:
        CheckpointError: If the checkpoint cannot be found or reached, is truncated, corrupt or quantised in a way that
            is not read, or its tensors are not those of its model class.
    """
    if isinstance(model, str | Path):
        base, adapter = split_adapter(str(model))
        files = _find(model if adapter is None else adapter, token)
        if adapter is None and not is_adapter(files):
            return _open_files(files, trust_remote_code, allow_pickle, as_stored, (architecture, is_tied))
        named = base if adapter is not None else None
        return _open_adapted(named, files, trust_remote_code, allow_pickle, token, (architecture, is_tied))
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        if is_tied not in (None, vars(model.config).get(heads.KEY)):
            raise CheckpointError(
                f"{heads.KEY}: {type(model).__name__} is in memory with its head as it is; save it first"
            )
        return _open_model(model)
    raise CheckpointError(
        f"expected a Hub id, a folder or a transformers PreTrainedModel, found {type(model).__name__}; of a wrapped"
        " model give the model inside (an adapter first needs merge_and_unload())"
    )


def adapter_config(model: str | Path, token: str | bool | None = None) -> PeftConfig | None:
    """The config of an adapter; None of a whole model.

    Raises:
        CheckpointError: It cannot be found or read.
    """
    from hf_llfc.checkpoints.views.folding import read_config

    files = _find(model, token)
    if not is_adapter(files):
        return None
    files.fetch([ADAPTER_CONFIG])
    return read_config(files)


def _open_adapted(
    base: str | None,
    files: Files,
    trust_remote_code: bool,
    allow_pickle: bool,
    token: str | bool | None,
    instead: Instead,
) -> Checkpoint:
    from hf_llfc.checkpoints.views.adapted import fold
    from hf_llfc.checkpoints.views.folding import base_of, read_config

    if ADAPTER_CONFIG not in files.sizes():
        raise CheckpointError(
            f"{files.where}: there is no {ADAPTER_CONFIG}, so it is no adapter of peft; what stands behind the plus of"
            " `base+adapter` must be one"
        )
    files.fetch([ADAPTER_CONFIG])
    config = read_config(files)
    named = base if base is not None else base_of(config)
    if named is None:
        raise CheckpointError(f"{files.where}: {ADAPTER_CONFIG} names no base; write BASE+{files.where}")
    hint = "" if base is not None else f"; {files.where} names it as its base, another is named by BASE+ADAPTER"
    try:
        # Looked at before it is opened, because an adapter may name itself as its base.
        files_of_base = _find(named, token) if split_adapter(named)[1] is None else None
        if files_of_base is None or is_adapter(files_of_base):
            raise CheckpointError(
                f"{named}: an adapter can be folded into a model, not into another adapter; save it first"
            )
        opened = _open_files(files_of_base, trust_remote_code, allow_pickle, False, instead)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{hint}") from error
    return fold(opened, files, config, allow_pickle=allow_pickle)


def _find(model: str | Path, token: str | bool | None) -> Files:
    path = existing(model)
    if path is not None and path.is_dir():
        if not any((path / name).is_file() for name in (CONFIG_FILE, ADAPTER_CONFIG)):
            _refuse_without_config(str(model), path)
        return LocalFiles(str(model), path)
    if path is not None:
        quantised = ", and GGUF is quantised: use the checkpoint it was made from" if path.suffix == ".gguf" else ""
        raise CheckpointError(f"{model}: this is a file; give the folder of the checkpoint{quantised}")
    text = str(model)
    is_path = text.startswith(("/", ".", "~")) or text.partition("@")[0].count("/") > 1 or "\\" in text
    if isinstance(model, Path) or is_path:
        raise CheckpointError(f"{model}: there is no such folder; give one that exists, or a Hub id (`owner/name`)")
    from hf_llfc.checkpoints.hub import open_hub

    return open_hub(text, token)


def _refuse_without_config(where: str, folder: Path) -> None:
    held = sorted(path.name for path in folder.iterdir())
    if any(name.endswith(".gguf") for name in held):
        raise CheckpointError(
            f"{where}: found only GGUF files, which are quantised; use the checkpoint that they were made from"
        )
    checkpoints = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
    hint = f"; did you mean {folder / checkpoints[-1]}?" if checkpoints else ""
    raise CheckpointError(
        f"{where}: the folder has no {CONFIG_FILE}, so it is no transformers checkpoint; it holds"
        f" {', '.join(held[:10]) or 'nothing'}{hint}"
    )


def _open_files(
    files: Files, trust_remote_code: bool, allow_pickle: bool, as_stored: bool, instead: Instead
) -> Checkpoint:
    raw = read_json(files.folder / CONFIG_FILE, f"{files.where}/{CONFIG_FILE}")
    architecture, is_tied = instead
    raw = raw if architecture is None else {**raw, "architectures": [architecture]}
    said = raw.get(heads.KEY)
    raw = raw if is_tied is None else heads.saying(raw, is_tied)
    weights, raw, quantised = _open_stored(files, raw, allow_pickle)
    companions = _fetch_companions(files)
    sides = _fetch_sides(files)
    architecture = architecture_of(f"{files.where}/{CONFIG_FILE}", raw)
    settings = Settings.of_file(files, raw, trust_remote_code)
    refuse_more_modules_than_tensors(f"{files.where}/{CONFIG_FILE}", raw, len(weights.infos))
    model_class = None if as_stored else _model_class(files, architecture, settings, trust_remote_code)
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
        weights=weights,
        quantised=quantised,
        trust_remote_code=trust_remote_code,
        side_files={name: files.folder / name for name in sides},
        left_files=tuple(left_names(files.sizes(), {*sides, *(_below(path, files.folder) for path in companions)})),
    )
    return planned(opened, weights) if is_tied is None else heads.with_heads(opened, weights, said)


def _open_stored(files: Files, raw: dict[str, Any], allow_pickle: bool) -> tuple[Weights, dict[str, Any], str | None]:
    """The weights by the names of the model, the config without what it says of their quantisation, and that in words.

    Raises:
        CheckpointError: There are none, or they are cut off, corrupt, not safe to read, or quantised in a way that is
            not read.
    """
    stored = unwrapped(open_weights(files, raw.get("transformers_weights"), allow_pickle=allow_pickle), files.where)
    said = quantisation_said(raw)
    weights, quantised = dequantised(stored, files.where, raw, said or {})
    if said is None:
        return weights, raw, quantised
    if quantised is None:
        logger.warning(
            "%s: config.json says that the weights are quantised, but no tensor in the files is; %s is left out",
            files.where,
            next(key for key in KEYS if f'"{key}"' in json.dumps(raw)),
        )
    return weights, without_quantisation(raw), quantised


def _below(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _open_model(model: PreTrainedModel) -> Checkpoint:
    label = model.name_or_path or type(model).__name__
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    # Layers that are quantised in memory need not show it in the types of their tensors.
    if error := quantised_in_memory(label, config.to_dict()):
        raise error
    weights = TensorWeights(label, state_dict_on_disk(model))
    opened = Checkpoint(
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
        weights=weights,
    )
    # The class can be built without its pooler, and then lacks it.
    return planned(opened, weights) if "add_pooling_layer" in signature(type(model).__init__).parameters else opened


def _companions_of(model: PreTrainedModel) -> list[Path]:
    """Lists the companions of a model in memory, if the folder or repository it was loaded from is still there."""
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


def _fetch_sides(files: Files) -> list[str]:
    present = files.sizes()
    modules = None
    if MODULES_FILE in present:
        files.fetch([MODULES_FILE])
        modules = read_values(files.folder / MODULES_FILE)
    names = side_names(present, modules)
    files.fetch(names)
    return names


def _model_class(
    files: Files, architecture: str | None, settings: Settings, trust_remote_code: bool
) -> type[PreTrainedModel] | None:
    from hf_llfc.checkpoints import names
    from hf_llfc.checkpoints.configs import UnknownConfig

    # Both are read here, so that errors in them come before any work.
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
