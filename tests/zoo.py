"""Tiny seeded models of every model type of transformers: shrunken default configs with random weights."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from hf_llfc.adapters.derived.classes import model_class_for
from hf_llfc.adapters.derived.inputs import sample_inputs
from hf_llfc.adapters.derived.shrink import shrunken
from tests.tiny_models import FullDouble, randomise

__all__ = ["FullDouble", "zoo_config", "zoo_model", "zoo_reason", "zoo_types"]


def zoo_types() -> list[str]:
    """Every registered model type, parts of other models included."""
    return list(CONFIG_MAPPING_NAMES)


def zoo_config(model_type: str) -> PreTrainedConfig:
    """The shrunken default config of a model type."""
    return shrunken(CONFIG_MAPPING[model_type]())


def zoo_model(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A tiny model in eval mode whose every parameter and running statistic is drawn from `seed`, and inputs for it."""
    config = zoo_config(model_type)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    # Modelling files draw their first weights from the global generator.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class_for(config)._from_config(config)
    randomise(model, torch.Generator().manual_seed(seed))
    model = model.to(dtype).eval()
    return model, sample_inputs(model, seed=seed)


def zoo_reason(model_type: str) -> str | None:
    """Why a model type cannot be built, or None if it can."""
    try:
        zoo_model(model_type)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
