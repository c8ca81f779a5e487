"""The base of an adapter as it was when the adapter was trained: under the head of its task, and with all its rows.

A classification head that the base was saved without, and embeddings with rows for new tokens, lie in the adapter's own
file. The base gets room for them here, which the adapter fills when it is folded: a number that neither file holds is
never made up.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_llfc.checkpoints.checkpoint import Checkpoint
from hf_llfc.checkpoints.header import TensorInfo
from hf_llfc.checkpoints.names import Layout, find_class_in_transformers
from hf_llfc.checkpoints.planned import planned
from hf_llfc.checkpoints.settings import most_common_dtype
from hf_llfc.checkpoints.views.reindexed import resized_shape, vocabulary_dimensions, with_rows
from hf_llfc.checkpoints.views.view import View
from hf_llfc.checkpoints.views.vocabulary import rows_of
from hf_llfc.errors import CheckpointError

if TYPE_CHECKING:
    from peft import PeftConfig

_PREFIX = "base_model.model."
_COPIES = (".modules_to_save.", ".original_module.")
_TRAINED_TOKENS = ".trainable_tokens_delta"

_CLASSES = {
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
}
"""Task of peft → type of config → model class."""


def as_adapted(
    where: str, base: Checkpoint, config: PeftConfig, state: Mapping[str, torch.Tensor]
) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    """The base with the head and the rows that an adapter brings; as it is where the adapter brings none.

    Args:
        where: What messages call the adapter.
        base: The base, opened with its model class.
        config: Of the adapter.
        state: The adapter's tensors by their names in its file.

    Returns:
        The base, and the adapter's tensors without those that peft saved twice.

    Raises:
        CheckpointError: The adapter brings a part of what its model needs and the base lacks.
    """
    base = _with_head_of(where, base, config, _in_base(state))
    state = _without_copies(base, _under_names_of(base, config, state))
    return _with_rows_of(where, base, config, _in_base(state)), state


def _under_names_of(base: Checkpoint, config: PeftConfig, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter by the modules of its base, where it was trained when these had older names.

    Modules that the config names in full get their names of today, too.
    """
    assert base.model_class is not None
    layout = Layout(base.model_class, base.config)

    def module_of(path: str) -> str | None:
        found = layout.in_memory(f"{path}.weight")
        return None if found is None else found.removesuffix(".weight")

    def renamed(name: str) -> str:
        path = name.removeprefix(_PREFIX).split(".")
        for end in range(len(path) - 1, 0, -1):
            found = module_of(".".join(path[:end]))
            if found is not None:
                return ".".join([_PREFIX + found, *path[end:]])
        return name

    named: Any = config
    if isinstance(named.to_dict().get("target_modules"), list | set):
        named.target_modules = {module_of(path) or path for path in named.target_modules}
    return {renamed(name) if name.startswith(_PREFIX) else name: tensor for name, tensor in state.items()}


def _without_copies(base: Checkpoint, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter without the copies that peft saves beside embeddings of another size."""
    assert base.model_class is not None
    kept = {
        name: tensor
        for name, tensor in state.items()
        if not any(copy in name and name.replace(copy, ".") in state for copy in _COPIES)
    }
    trained = [name for name in kept if name.endswith(_TRAINED_TOKENS)]
    for tied, source in Layout(base.model_class, base.config).ties.items() if len(trained) > 1 else ():
        modules = [_PREFIX + weight.rpartition(".")[0] + "." for weight in (tied, source)]
        for name in trained:
            twin = name.replace(modules[0], modules[1], 1)
            if name.startswith(modules[0]) and twin in kept and torch.equal(kept[name], kept[twin]):
                del kept[name]
    return kept


def _in_base(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter by the names that they would have in the base."""
    return {name.removeprefix(_PREFIX).replace(".base_layer.", "."): tensor for name, tensor in state.items()}


def _with_head_of(where: str, base: Checkpoint, config: PeftConfig, own: Mapping[str, torch.Tensor]) -> Checkpoint:
    """The base in the model class of the adapter's task, if only that has a place for what the adapter brings."""
    assert base.model_class is not None
    model_class = _class_of(base.config, config)
    if model_class is None or model_class is base.model_class or model_class.config_class is not type(base.config):
        return base
    of_base = Layout(base.model_class, base.config).names_in_memory
    layout = Layout(model_class, base.config)
    head = [name for name in own if name in layout.names_in_memory and name not in of_base]
    if not head:
        return base
    changed = deepcopy(base.config)
    changed.architectures = [model_class.__name__]
    labels = _labels(model_class, changed, own)
    if labels is not None and labels != changed.num_labels:
        changed.num_labels = labels
    dtype = most_common_dtype(base.tensors) or torch.float32
    shapes = Layout(model_class, changed).shapes
    brought = {
        name: TensorInfo(dtype, shape) for name, shape in shapes.items() if name in own and name not in base.tensors
    }
    opened = replace(
        base, settings=base.settings.with_config(changed), architecture=model_class.__name__, model_class=model_class
    )
    heading = f"{base.label}: with the head that {where} brings, it is no {model_class.__name__}"
    return planned(opened, _room(base, {**base.tensors, **brought}), heading)


def _class_of(base: PreTrainedConfig, config: PeftConfig) -> type[PreTrainedModel] | None:
    """The model class that an adapter was trained in, as far as its config says it."""
    named: Any = config.auto_mapping
    if named and named.get("base_model_class"):
        return find_class_in_transformers(named["base_model_class"])
    mapping: Any = _CLASSES.get(str(config.task_type).rpartition(".")[2])
    if mapping is None or type(base) not in mapping:
        return None
    model_class = mapping[type(base)]
    return model_class[0] if isinstance(model_class, tuple) else model_class


def _labels(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, own: Mapping[str, torch.Tensor]
) -> int | None:
    """The number of labels that the adapter's head has; None where none of its tensors has one row a label."""
    shapes = []
    for count in (1, 2):
        config = deepcopy(config)
        config.num_labels = count
        shapes.append(Layout(model_class, config).shapes)
    for name, shape in shapes[0].items():
        grown = [new - old for new, old in zip(shapes[1][name], shape, strict=True)]
        if name in own and sum(grown) == 1:
            return own[name].shape[grown.index(1)]
    return None


def _with_rows_of(where: str, base: Checkpoint, config: PeftConfig, own: Mapping[str, torch.Tensor]) -> Checkpoint:
    """The base with as many rows of embeddings as the adapter brings."""
    tokens = {name: rows for name, rows in _trained_tokens(config, own).items() if name in base.tensors}
    resized = {
        name: own[name].shape
        for name, info in base.tensors.items()
        if name in own and own[name].dim() == len(info.shape) and own[name].shape != info.shape
    }
    if not resized and all(max(rows, default=-1) < base.tensors[name].shape[0] for name, rows in tokens.items()):
        return base
    dimensions = vocabulary_dimensions(base)
    if not dimensions.keys() & {*resized, *tokens}:
        return base  # of another base altogether, which is said where it is folded
    brought = {name: own[name].shape[dimension] for name, dimension in dimensions.items() if name in own}
    count = max([*brought.values(), *(1 + max(rows) for rows in tokens.values())])
    unknown = [
        name
        for name, dimension in dimensions.items()
        if brought.get(name) != count
        and not set(range(base.tensors[name].shape[dimension], count)) <= set(tokens.get(name, ()))
    ]
    if unknown:
        raise CheckpointError(
            f"{where}: its model has {count} rows of embeddings, {base.label} has {rows_of(base)}, and the file does "
            f"not hold the others of {', '.join(unknown)}; save the adapter with save_embedding_layers=True"
        )
    infos = {
        name: replace(info, shape=resized_shape(info.shape, dimensions[name], count)) if name in dimensions else info
        for name, info in base.tensors.items()
    }
    settings = base.settings.with_config(with_rows(base, count))
    return replace(base, settings=settings, tensors=infos, weights=_room(base, infos, dimensions))


def _trained_tokens(config: PeftConfig, own: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    """Name in memory of an embedding of which single rows were trained → which."""
    settings = config.to_dict()
    indices = settings.get("trainable_token_indices") or settings.get("token_indices") or []
    trained = {}
    for name in own:
        if name.endswith(_TRAINED_TOKENS):
            module = name.removesuffix(_TRAINED_TOKENS).removesuffix(".token_adapter")
            by_module = indices if isinstance(indices, dict) else {module: indices}
            trained[f"{module}.weight"] = [
                index for key, rows in by_module.items() if f".{module}".endswith(f".{key}") for index in rows
            ]
    return trained


def _room(base: Checkpoint, infos: Mapping[str, TensorInfo], resized: Mapping[str, int] | None = None) -> View:
    """The tensors of a base with room for what an adapter brings: zeros, which it replaces.

    Args:
        base: The base.
        infos: Dtype and shape of every tensor with its room.
        resized: Name → dimension that grows or shrinks, of the tensors whose shape differs from that in the base.
    """

    def make(name: str) -> torch.Tensor:
        room = torch.zeros(infos[name].shape, dtype=infos[name].dtype)
        if name in base.tensors:
            assert resized is not None
            rows, dimension = base.read(name), resized[name]
            kept = min(rows.shape[dimension], room.shape[dimension])
            room.narrow(dimension, 0, kept).copy_(rows.narrow(dimension, 0, kept))
        return room

    made = [name for name, info in infos.items() if name not in base.tensors or base.tensors[name].shape != info.shape]
    return View(base.weights, infos, frozenset(made), make)
