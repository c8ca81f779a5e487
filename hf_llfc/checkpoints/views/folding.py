"""Adapters of peft folded into their base, a module at a time; every call to what is half internal in peft is here.

peft adds an adapter's layers to a model of no memory: all its weights are one zero, spread over their shapes. Which
tensors an adapter changes then shows without reading any of the base. To fold one of them, its module is copied, given
the base's weights in float32, and merged by peft's own `merge`, as `merge_and_unload` does with all of them together.

Some adapters cannot be folded so, because they are made from the weights of the base as they are added (PiSSA, OLoRA
and their like). For these the whole base is loaded in float32 and goes through the same functions of peft.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_llfc.checkpoints.files import ADAPTER_CONFIG, Files
from hf_llfc.checkpoints.views.factors import has_bias, is_saved, low_rank_layers, rows_of
from hf_llfc.errors import CheckpointError, raise_all

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from peft.tuners.lora.layer import LoraLayer
    from transformers import PreTrainedModel

# Whose layers can be added and filled before the weights of the base are known; tests fold each both ways.
_INDEPENDENT_KINDS = frozenset(
    [
        "LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "HRA", "VERA", "FOURIERFT", "RANDLORA", "LN_TUNING",
        "MISS", "SHIRA", "VBLORA", "C3A", "TRAINABLE_TOKENS",
    ]
)  # fmt: skip

# Starts of LoRA that look at no weight of the base; every other one replaces the base's weights by a residual.
_INDEPENDENT_STARTS = (True, False, "gaussian", "orthogonal")

# Kinds that add something to the activations of a model, not to its weights.
_NOT_WEIGHTS = ("ADAPTION_PROMPT", "CARTRIDGE", "POLY", "XLORA")

# Whose layers share tensors that the file holds once.
_SHARED_KINDS = ("TINYLORA", "UNILORA", "VBLORA")

# Keys of an adapter's config whose strings, list entries or own keys peft reads as regular expressions.
_PATTERN_KEYS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)

_MATCHING_SECONDS = 10.0
"""Time limit for matching the patterns of a config with the modules of the base; milliseconds are usual."""

_MATCH_ALL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        try:
            re.fullmatch(pattern, name)
            re.match(rf"(?:^|.*\\.)(?:{pattern})($|\\..*)", name)
        except re.error:
            break
"""
"""Run by a process of its own, because nothing else ends a match that backtracks without end."""

_LISTED = 5
_LONGEST_MESSAGE = 300

ReadMemory = Callable[[str], torch.Tensor]
"""Gives a tensor of the base by its name in memory."""


def read_config(files: Files) -> PeftConfig:
    """Reads an adapter's config, and refuses adapters that are not weights.

    Args:
        files: Those of the adapter, its config fetched.

    Raises:
        CheckpointError: peft is not installed or does not know the adapter, or what it does is not a change of weights.
    """
    try:
        import peft
    except ImportError as error:
        raise CheckpointError(
            f"{files.where}: this is an adapter, and peft, which folds it into its base, is not installed; install it "
            "with pip install 'hf-llfc[peft]'"
        ) from error
    with explained(files.where, "cannot read this adapter's config"):
        config = peft.PeftConfig.from_pretrained(str(files.folder))
    settings = config.to_dict()
    kind = kind_of(config)
    if config.is_prompt_learning or kind in _NOT_WEIGHTS:
        raise CheckpointError(
            f"{files.where}: an adapter of the kind {kind} does not change weights but what goes through the model, so "
            "it cannot be folded into its base or merged; use one that does (LoRA, DoRA, IA3, LoHa, LoKr, …)"
        )
    refused = {
        "layer_replication": "repeats layers of its base, which then has other tensors",
        "alora_invocation_tokens": "acts on what follows certain tokens only",
        "megatron_config": "belongs to a model of Megatron",
    }
    for key, what in refused.items():
        if settings.get(key):
            raise CheckpointError(
                f"{files.where}: the adapter {what} ({key} in {ADAPTER_CONFIG}), so it cannot be folded into it; use "
                "one that does not, or a model that was saved with it"
            )
    config.inference_mode = True
    return config


def kind_of(config: PeftConfig) -> str:
    """The kind of an adapter in capitals: `LORA`, say."""
    return str(config.peft_type).rpartition(".")[2]


def base_of(config: PeftConfig) -> str | None:
    """The base that an adapter's config names, as a model is named; None if it names none."""
    name, revision = config.base_model_name_or_path, config.revision
    if not name:
        return None
    # A folder has no revisions: peft and transformers pass over the one that the config names.
    return f"{name}@{revision}" if revision and not Path(name).expanduser().is_dir() else str(name)


def is_independent(config: PeftConfig) -> bool:
    """Whether an adapter can be added and filled before the weights of its base are known."""
    start = config.to_dict().get("init_lora_weights", True)
    return kind_of(config) in _INDEPENDENT_KINDS and any(start == known for known in _INDEPENDENT_STARTS)


class Folding:
    """An adapter added to a model of no memory."""

    def __init__(
        self,
        where: str,
        model: PreTrainedModel,
        config: PeftConfig,
        state: Mapping[str, torch.Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Adds the adapter; nothing of the base is read.

        Args:
            where: What messages call the adapter.
            model: The base without memory for its weights; it is changed.
            config: Of the adapter.
            state: The adapter's tensors by their names in its file.
            dtype: In which weights are folded.

        Raises:
            CheckpointError: The adapter does not fit the base.
        """
        self._where = where
        self._zero = torch.zeros((), dtype=dtype)
        spread(self._zero, model)
        adapted = added(where, model, config, state)
        wrapped = adapted.get_base_model()
        self._modules = dict(outermost(wrapped))
        self.changes: dict[str, str] = {}
        """Name in memory of every tensor that may change → the module that makes it."""
        for path, module in self._modules.items():
            self.changes |= {f"{path}.{name}": path for name in _base_of(module).state_dict()}
        self._given = {
            name: tensor
            for name, tensor in wrapped.state_dict().items()
            if not self._is_unread(tensor) and not any(name.startswith(f"{path}.") for path in self._modules)
        }
        self.changes |= dict.fromkeys(self._given, "")

    @cached_property
    def layers(self) -> Mapping[str, LoraLayer]:
        """Name in memory of every tensor whose change is a product of thin factors → the layer that holds them."""
        return {
            f"{path}.{name}": layer for path, module in self._modules.items() for name, layer in low_rank_layers(module)
        }

    @cached_property
    def rows(self) -> Mapping[str, Sequence[int]]:
        """Name in memory of an embedding of which single rows were trained → these rows."""
        return {f"{path}.weight": rows for path, module in self._modules.items() if (rows := rows_of(module))}

    @cached_property
    def saved(self) -> Sequence[str]:
        """The modules that the adapter holds whole."""
        return [path for path, module in self._modules.items() if is_saved(module)]

    @cached_property
    def others(self) -> frozenset[str]:
        """Names in memory of what else changes, or may change: no product of thin factors."""
        found = set(self._given)
        for path, module in self._modules.items():
            of_module = _base_of(module).state_dict()
            is_plain = any(name.startswith(f"{path}.") for name in self.layers) and not has_bias(module)
            found |= {
                f"{path}.{name}" for name, tensor in of_module.items() if not (is_plain and self._is_unread(tensor))
            }
        return frozenset(found - self.layers.keys())

    def fold(self, path: str, read: ReadMemory) -> dict[str, torch.Tensor]:
        """The tensors of one module, folded.

        Args:
            path: One of the modules that `changes` names.
            read: Gives the base's tensors, which are converted to the type of the folding.

        Returns:
            Name in memory → tensor.

        Raises:
            CheckpointError: peft cannot merge them.
        """
        if not path:
            return self._given
        names = [name for name, tensor in _base_of(self._modules[path]).state_dict().items() if self._is_unread(tensor)]
        module = deepcopy(self._modules[path])
        weights = {name: read(f"{path}.{name}").to(self._zero.dtype, copy=True) for name in names}
        _base_of(module).load_state_dict(weights, assign=True, strict=False)
        with explained(self._where, f"cannot fold {path}"):
            folded = _merged(module)
        return {f"{path}.{name}": tensor for name, tensor in folded.state_dict().items()}

    def _is_unread(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() == self._zero.untyped_storage().data_ptr()


def fold_whole(
    where: str, model: PreTrainedModel, config: PeftConfig, state: Mapping[str, torch.Tensor]
) -> PreTrainedModel:
    """Folds an adapter into a model in memory.

    Args:
        where: What messages call the adapter.
        model: The base with its weights; it is changed.
        config: Of the adapter.
        state: The adapter's tensors by their names in its file.

    Raises:
        CheckpointError: The adapter does not fit the base, or cannot be folded.
    """
    adapted: Any = added(where, model, config, state)
    with explained(where, "cannot fold this adapter"):
        folded: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return folded


def spread(zero: torch.Tensor, model: nn.Module) -> None:
    """Gives parameters and buffers the shapes that they have and, all of them, the memory of one number."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                spread = nn.Parameter(zero.expand(parameter.shape), requires_grad=False)
                module._parameters[name] = made.setdefault(id(parameter), spread)  # what is tied stays tied
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = zero.expand(buffer.shape)


def added(where: str, model: PreTrainedModel, config: PeftConfig, state: Mapping[str, torch.Tensor]) -> PeftModel:
    """A model with an adapter and its tensors.

    Raises:
        CheckpointError: Some of them are missing, left over or of other shapes.
    """
    from peft import PeftType, get_peft_model
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.utils import set_peft_model_state_dict

    _refuse_endless_patterns(where, config, [name for name, _ in model.named_modules()])
    heading = f"{where}: the adapter does not fit {type(model).__name__} as the base's config describes it"
    # Weights of its own are added without memory: those that the file lacks then show.
    what = f"cannot add this adapter to {type(model).__name__}; is it of another base?"
    with explained(where, what), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are for who trains
        adapted = get_peft_model(model, deepcopy(config), low_cpu_mem_usage=is_independent(config))
        tuner: Any = adapted.base_model
        tuner._check_merge_allowed()
        loaded: Any = set_peft_model_state_dict(adapted, dict(state), low_cpu_mem_usage=is_independent(config))
    absent = [name for name, parameter in adapted.named_parameters() if parameter.is_meta]
    if not is_independent(config) and kind_of(config) not in _SHARED_KINDS:
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(config.peft_type)]
        absent = [name for name in loaded.missing_keys if prefix in name and ".default" in name]
    problems = [f"the file lacks {name}" for name in absent[:_LISTED]]
    problems += [f"the base has no place for {name}" for name in loaded.unexpected_keys[:_LISTED]]
    raise_all(problems, CheckpointError, heading)
    return adapted


def _refuse_endless_patterns(where: str, config: PeftConfig, names: list[str]) -> None:
    """Refuses a config with a regular expression that takes too long to match.

    Args:
        where: What messages call the adapter.
        config: The config of the adapter.
        names: The names that peft matches with its patterns.

    Raises:
        CheckpointError: Matching does not end in time.
    """
    settings = config.to_dict()
    values = [settings.get(key) or () for key in _PATTERN_KEYS]
    patterns = [str(entry) for value in values for entry in ([value] if isinstance(value, str) else value)]
    doubtful = [
        pattern for pattern in patterns if not re.fullmatch(r"[\w.-]*", pattern)
    ]  # a plain name cannot backtrack
    if not doubtful:
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-c", _MATCH_ALL],
            input=json.dumps([doubtful, names]),
            text=True,
            check=True,
            timeout=_MATCHING_SECONDS,
            capture_output=True,
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"{where}: matching the patterns in {ADAPTER_CONFIG} with the modules of the base does not end "
            f"in {_MATCHING_SECONDS:.0f} s (of {', '.join(doubtful)[:_LONGEST_MESSAGE]}); list module names"
        ) from None


def outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that peft has put in place of the base's, by the names of those."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside = "\0"
    modules: list[tuple[str, nn.Module]] = list(model.named_modules())
    for path, module in modules:
        if not path.startswith(inside) and isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside = f"{path}."
            yield path, module


def _base_of(module: nn.Module) -> nn.Module:
    """The base's module inside one of peft."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, AuxiliaryTrainingWrapper):
        return module.original_module
    assert isinstance(module, BaseTunerLayer)
    return module.get_base_layer()


def _merged(module: nn.Module) -> nn.Module:
    """Merges one module, as `merge_and_unload` does."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.other import AuxiliaryTrainingWrapper

    layer: Any = module
    if isinstance(module, AuxiliaryTrainingWrapper | ParamWrapper):
        merged: nn.Module = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        return merged
    layer.merge(safe_merge=True)
    return _base_of(module)


@contextmanager
def explained(where: str, what: str) -> Iterator[None]:
    """Turns what peft raises, which may be anything, into one error."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:_LONGEST_MESSAGE]
        raise CheckpointError(f"{where}: peft {what} ({type(error).__name__}: {said})") from error
