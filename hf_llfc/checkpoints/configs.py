"""What transformers makes of config.json, without what runs models: that takes seconds more to load."""

from __future__ import annotations

import logging
import re
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_llfc.checkpoints.files import CONFIG_FILE, GENERATION_FILE, Files
from hf_llfc.checkpoints.quantised import KEYS
from hf_llfc.errors import CheckpointError

logger = logging.getLogger(__name__)

_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")


class UnknownConfig(PreTrainedConfig):
    """The values of a config whose model type transformers does not know."""


def known_model_types() -> list[str]:
    """Lists the model types that transformers knows or that were registered with it."""
    return list(CONFIG_MAPPING.keys())


def find_config_class(model_type: str) -> type[PreTrainedConfig] | None:
    """The config class of a model type, or None if transformers does not know it."""
    # This mapping imports a class when it is indexed; its get() does not.
    if model_type not in CONFIG_MAPPING:
        return None
    return CONFIG_MAPPING[model_type]


def load_config(
    files: Files, raw: dict[str, Any], architecture: str | None, trust_remote_code: bool
) -> PreTrainedConfig:
    """Reads the config of a checkpoint; as an `UnknownConfig` where transformers does not know the model type.

    Args:
        files: The files of the checkpoint.
        raw: The values in its config.json.
        architecture: The model class that it names, if it names one.
        trust_remote_code: Whether code that comes with the checkpoint may be run.

    Raises:
        CheckpointError: transformers cannot read it.
    """
    where = f"{files.where}/{CONFIG_FILE}"
    model_type = raw.get("model_type") or _model_type(where, architecture)
    auto_map = raw.get("auto_map")
    try:
        if trust_remote_code and isinstance(auto_map, dict) and "AutoConfig" in auto_map:
            config: PreTrainedConfig = AutoConfig.from_pretrained(str(files.folder), trust_remote_code=True)
            for key in KEYS:
                if key not in raw and key in vars(config):
                    delattr(config, key)  # said of other weights than these
            return config
        known = find_config_class(str(model_type))
        if known is not None:
            return known.from_dict(_without_implementations(raw))
    except Exception as error:  # a config class may raise anything on values it does not expect
        raise CheckpointError(f"{where}: transformers cannot read this config: {error}") from error
    hint = ", or pass trust_remote_code to run the code that came with it" if auto_map else ""
    logger.warning(
        "%s: transformers does not know the model type %r; its tensors keep the names of the files, and the model can"
        " be merged but not run (register its classes with AutoConfig and AutoModel%s)",
        where,
        model_type,
        hint,
    )
    config_class: type[UnknownConfig] = type("UnknownConfig", (UnknownConfig,), {"model_type": str(model_type)})
    return config_class.from_dict(raw)


def _without_implementations(raw: dict[str, Any]) -> dict[str, Any]:
    """The values of a config without those that choose code to run: kernels of the Hub among them."""
    return {
        key: _without_implementations(value) if isinstance(value, dict) else value
        for key, value in raw.items()
        if not _IMPLEMENTATION.fullmatch(key)
    }


def load_generation_config(files: Files, raw: dict[str, Any], config: PreTrainedConfig) -> GenerationConfig | None:
    """Reads how the model of a checkpoint generates, also where an old config says so.

    Args:
        files: The files of the checkpoint.
        raw: The values in its config.json.
        config: The config that transformers makes of them.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        if (files.folder / GENERATION_FILE).is_file():
            return GenerationConfig.from_pretrained(files.folder)
        # Configs from before generation_config.json hold these values too, and config classes drop them.
        kept = config.to_dict()
        dropped = {
            key: raw[key] for key in GenerationConfig().to_dict() if key not in kept and raw.get(key) is not None
        }
        return GenerationConfig.from_dict(dropped) if dropped else None
    except Exception as error:  # as with configs, anything may be raised
        raise CheckpointError(f"{files.where}: the generation config cannot be read: {error}") from error


def _model_type(where: str, architecture: str | None) -> str:
    """Guesses the model type of a config from before configs named it."""
    if architecture is None:
        raise CheckpointError(
            f'{where}: names neither model_type nor architectures; add "model_type", for example "bert"'
        )
    from hf_llfc.checkpoints import names

    try:
        model_class = names.find_class_in_transformers(architecture)
    except ImportError:
        model_class = None
    if model_class is not None and model_class.config_class is not None:
        return model_class.config_class.model_type
    begins = architecture.casefold()
    fitting = [known for known in known_model_types() if begins.startswith(re.sub("[-_]", "", known))]
    guess = max(fitting, key=len, default="bert")
    raise CheckpointError(
        f"{where}: model_type is missing, and the architecture {architecture!r} is not one that transformers knows; add"
        f' "model_type", perhaps "{guess}"'
    )
