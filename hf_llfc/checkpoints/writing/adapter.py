"""An adapter of peft, written so that `PeftModel.from_pretrained` loads it.

peft itself adds the adapter to a model of no memory, which then says what the layers are called in the file.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_llfc.checkpoints.files import ADAPTER_FILE
from hf_llfc.checkpoints.low_rank import LowRank
from hf_llfc.checkpoints.views.factors import clear, fill, low_rank_layers
from hf_llfc.checkpoints.views.folding import explained, outermost, spread
from hf_llfc.errors import CheckpointError
from hf_llfc.foundation.tensor_files import save_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterContent:
    """What an adapter holds.

    Attributes:
        changes: Name in memory of a weight → what is added to it.
        saved: Module → its tensors by their names in it, in place of the base's.
        biases: Name in memory of a bias → what stands in its place.
        rows: Name in memory of an embedding → which rows stand in place of the base's, and they.
    """

    changes: Mapping[str, LowRank]
    saved: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, tuple[Sequence[int], Tensor]] = field(default_factory=dict)


def is_module_of_lora(module: nn.Module, name: str) -> bool:
    """Whether LoRA adds factors to a parameter by way of its module."""
    from transformers.pytorch_utils import Conv1D

    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1
    return name == "weight" and (convolution or isinstance(module, nn.Linear | nn.Embedding | Conv1D))


def is_parameter_of_lora(module: nn.Module, name: str) -> bool:
    """Whether LoRA adds factors to a parameter by itself: a matrix, or one matrix an expert."""
    parameter = module._parameters.get(name)
    if parameter is None or isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    return parameter.dim() == 2 or (parameter.dim() == 3 and parameter.shape[0] > 1)


def write_adapter(
    folder: Path, model: PreTrainedModel, content: AdapterContent, settings: Mapping[str, Any], dtype: torch.dtype
) -> list[Path]:
    """Writes config and weights of an adapter.

    Args:
        folder: Where to.
        model: The base without memory for its weights; it is changed.
        content: What the adapter holds.
        settings: Of its config: base, task, and the like.
        dtype: Of what is written.

    Returns:
        The files.

    Raises:
        CheckpointError: peft cannot make an adapter of it.
    """
    from peft import get_peft_model
    from peft.utils import get_peft_model_state_dict

    zero = torch.zeros(())
    modules = dict(model.named_modules())
    spread(zero, model)
    where = str(folder)
    with explained(where, f"cannot add such an adapter to {type(model).__name__}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are for who trains
        adapted = get_peft_model(model, _config(content, settings, modules), low_cpu_mem_usage=True)
    _fill(adapted.get_base_model(), content, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    # With biases, peft names what it holds whole a second time.
    state = {
        name: tensor
        for name, tensor in found.items()
        if not _is_of(zero, tensor) and ".modules_to_save." not in name and ".original_module." not in name
    }
    for name, tensor in content.biases.items():
        path, _, leaf = name.rpartition(".")
        key = next((key for key in (f"{path}.base_layer.{leaf}", name) if f"{PREFIX}{key}" in found), name)
        state[f"{PREFIX}{key}"] = tensor.to(dtype)
    absent = [name for name, tensor in state.items() if tensor.is_meta]
    assert not absent, f"never filled: {absent[:3]}"
    save_tensors({name: tensor.contiguous() for name, tensor in state.items()}, folder / ADAPTER_FILE, {"format": "pt"})
    config = adapted.peft_config["default"]
    config.base_model_name_or_path, config.revision = settings["base_model_name_or_path"], settings["revision"]
    config.save_pretrained(str(folder))
    return [folder / ADAPTER_FILE, folder / "adapter_config.json"]


def _config(content: AdapterContent, settings: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> Any:
    """The config of an adapter of these parts."""
    from peft import LoraConfig

    def is_of_module(name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        return is_module_of_lora(modules[path], leaf)

    ranks = {
        name.removesuffix(".weight") if is_of_module(name) else name: change.rank
        for name, change in content.changes.items()
    }
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    parameters = [name for name in content.changes if not is_of_module(name)]
    return LoraConfig(
        r=usual,
        lora_alpha=usual,
        lora_dropout=0.0,
        target_modules=[name.removesuffix(".weight") for name in content.changes if is_of_module(name)],
        target_parameters=parameters or None,
        rank_pattern=others,
        alpha_pattern=dict(others),
        modules_to_save=list(content.saved) or None,
        bias="all" if content.biases else "none",
        trainable_token_indices={
            name.removesuffix(".weight"): list(indices) for name, (indices, _) in content.rows.items()
        }
        or None,
        inference_mode=True,
        **settings,
    )


def _fill(model: nn.Module, content: AdapterContent, dtype: torch.dtype) -> None:
    """Gives the layers of an adapter what they hold."""
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    filled = set()
    for path, module in outermost(model):
        if isinstance(module, ModulesToSaveWrapper):
            if path not in content.saved:
                raise CheckpointError(f"peft takes {path} for one of {', '.join(content.saved)}, whose name it ends in")
            state = {name: tensor.to(dtype) for name, tensor in content.saved[path].items()}
            module.modules_to_save["default"].load_state_dict(state, assign=True)
        elif isinstance(module, TrainableTokensWrapper):
            own = module.token_adapter
            if f"{path}.weight" in content.rows:  # else its weight is tied to one that is
                own.trainable_tokens_delta["default"] = nn.Parameter(content.rows[f"{path}.weight"][1].to(dtype))
        for name, layer in low_rank_layers(module):
            change = content.changes.get(f"{path}.{name}")
            if change is None:  # its name ends in one that is meant
                clear(layer, dtype)
            else:
                fill(layer, change, dtype)
            filled.add(f"{path}.{name}")
    if missing := content.changes.keys() - filled:
        raise CheckpointError(f"peft has no layer of LoRA for {sorted(missing)[0]}; leave it out")


def _is_of(zero: Tensor, tensor: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == zero.untyped_storage().data_ptr()
