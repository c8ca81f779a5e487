"""The permutation spec of a checkpoint, and its tensors bound to it; errors name the checkpoint."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hf_llfc.adapters import known_model_types, spec_for
from hf_llfc.adapters.needs import is_whole, is_whole_of_some_class
from hf_llfc.checkpoints import Checkpoint, open_checkpoint
from hf_llfc.checkpoints.header import natural_order
from hf_llfc.checkpoints.settings import Settings
from hf_llfc.checkpoints.writing.shards import MAX_SHARD_SIZE
from hf_llfc.errors import AlignmentError, CheckpointError, SpecError
from hf_llfc.recipe import AlignSection
from hf_llfc.symmetry import Binding, PermutationSpec, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SAVED_IN_OTHER_ORDER = frozenset(
    [
        "aria_text",
        "deit",
        "dinov2",
        "dinov2_with_registers",
        "gpt_neox",
        "granitemoe",
        "granitemoeshared",
        "ijepa",
        "vit",
    ]
)
"""Model types with a hand-written spec whose tensors `save_pretrained` does not sort by the names that it writes."""

_OF_BERT = frozenset(
    {"add_cross_attention", "embedding_size", "max_2d_position_embeddings", "task_type_vocab_size", "use_bias"}
)
_OF_LLAMA = frozenset({"head_dim", "layer_types", "n_group", "rope_parameters"})

MAY_BE_MISSING: dict[str, frozenset[str]] = {
    "bert": _OF_BERT,
    "roberta": _OF_BERT,
    "xlm-roberta": _OF_BERT,
    "distilbert": frozenset(),
    "llama": _OF_LLAMA | {"num_key_value_heads"},
    "mistral": _OF_LLAMA,
    "qwen2": _OF_LLAMA,
    "qwen3": _OF_LLAMA - {"head_dim"},
}
"""Model types whose spec is read from config.json alone, without the config class, which takes seconds to load; and the
values that their adapter may miss there, because the class has none or the one that the adapter takes."""

_SEPARATE_EXPERT = re.compile(r"\bexperts\.\d+\.")


def spec_of(checkpoint: Checkpoint) -> PermutationSpec:
    """The permutation spec of a checkpoint; the error names the checkpoint.

    Raises:
        SpecError: The architecture has no adapter and no spec can be derived, or the adapter refuses the config.
    """
    if checkpoint.canonical is not None:
        return checkpoint.canonical
    said = _spec_as_said(checkpoint.settings)
    if said is not None:
        return said
    try:
        return spec_for(checkpoint.config)
    except SpecError as error:
        raise SpecError(f"{checkpoint.label}: {error}") from None


def _spec_as_said(settings: Settings) -> PermutationSpec | None:
    """The spec by config.json alone; None where the config class might read it otherwise."""
    may_be_missing = MAY_BE_MISSING.get(settings.model_type)
    said = settings.said(may_be_missing)
    # The class moves this value to where the adapter looks for it.
    if may_be_missing is None or said is None or "partial_rotary_factor" in json.dumps(settings.raw):
        return None
    with suppress(Exception):  # what does not bear a closer look raises what it likes, and gets one by the class
        return replace(spec_for(cast("PreTrainedConfig", said)), other_layouts=partial(_other_layouts, settings))
    return None


def _other_layouts(settings: Settings, spec: PermutationSpec) -> Sequence[TensorSpec]:
    """The names in memory, for which the config class is loaded after all."""
    layouts = spec_for(settings.config).other_layouts
    return layouts(spec) if layouts is not None else ()


def alignment_spec(checkpoint: Checkpoint, options: AlignSection) -> PermutationSpec:
    """The spec of a checkpoint with the axes that the options leave free.

    Raises:
        SpecError: The architecture has no adapter, or a pattern matches no axis.
        AlignmentError: The patterns leave no axis free.
    """
    spec = spec_of(checkpoint)
    spec = spec.keep(*options.axes) if options.axes else spec
    spec = spec.fix(*options.exclude) if options.exclude else spec
    if not spec.symmetric_axes and (options.axes or options.exclude):
        raise AlignmentError(
            f"{checkpoint.label}: `axes` and `exclude` leave no axis that may move; leave one free, or align with the "
            "method `none`"
        )
    return spec


def open_weights(
    model: str | Path | PreTrainedModel,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    architecture: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> Checkpoint:
    """Opens a checkpoint of which only the weights are needed: without its model class, where that is known to do.

    Loading the model class takes memory, and longer than merging a small model. It is loaded for models of several
    files where it alone knows in which order tensors are saved: that decides what lies in which file of the result.

    Args:
        model: See `open_checkpoint`.
        trust_remote_code: See `open_checkpoint`.
        allow_pickle: See `open_checkpoint`.
        architecture: See `open_checkpoint`.
        max_shard_size: The size in bytes above which the weights of the result are split into several files.

    Raises:
        CheckpointError: See `open_checkpoint`.
    """
    opening = partial(
        open_checkpoint,
        model,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        architecture=architecture,
    )
    if isinstance(model, str | Path):
        light = as_saved(opening(as_stored=True))
        if light is not None and is_sorted_as_saved(light):
            return replace(
                light, tensors={name: light.tensors[name] for name in sorted(light.tensors, key=natural_order)}
            )
        if light is not None and light.nbytes <= max_shard_size:
            return light
    return opening()


def refuse_without_class(checkpoint: Checkpoint) -> None:
    """Refuses a checkpoint whose config names no class, and that has the tensors of none: a head is missing, say.

    Raises:
        CheckpointError: It lacks tensors of every class of its model type.
    """
    if checkpoint.settings.model_type in known_model_types():
        said = checkpoint.settings.said()
        values = said.to_dict() if said is not None else checkpoint.config.to_dict()
        with suppress(CheckpointError, SpecError):  # of other names, which its class knows
            if is_whole_of_some_class(bind(spec_of(checkpoint), checkpoint), values):
                return
    from hf_llfc.checkpoints.planned import refuse_without_class as refuse_by_classes

    refuse_by_classes(checkpoint)


def is_sorted_as_saved(checkpoint: Checkpoint) -> bool:
    """Whether `save_pretrained` is known to sort a checkpoint's tensors by the names that it writes.

    It sorts them by their names in memory, where experts, say, are stacked.

    Args:
        checkpoint: As `as_saved` returns it.
    """
    model_type = checkpoint.settings.model_type
    if model_type not in known_model_types() or model_type in SAVED_IN_OTHER_ORDER:
        return False
    return not any(_SEPARATE_EXPERT.search(name) for name in checkpoint.tensors)


def bind(spec: PermutationSpec, checkpoint: Checkpoint) -> Binding:
    """Binds a checkpoint's tensors to a spec; the error names the checkpoint.

    Raises:
        CheckpointError: The tensors do not fit.
    """
    try:
        return spec.bind({name: info.shape for name, info in checkpoint.tensors.items()})
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.label}: {error}") from None


def as_saved(checkpoint: Checkpoint) -> Checkpoint | None:
    """A checkpoint that has, name by name, exactly the tensors that its class needs; None where the class is needed.

    The model class sorts out everything else: what is missing, older names, a head prefix too many or too few, tensors
    of no use, copies of tied weights.

    Args:
        checkpoint: As stored, see `open_checkpoint`.

    Returns:
        The same with its tensors in the order of the network; as it is where transformers does not know its type.
    """
    said = checkpoint.settings.said()
    if said is not None and checkpoint.settings.model_type in known_model_types():
        # What does not bear a closer look raises what it likes, and gets one below.
        with suppress(Exception):
            ordered = _in_order(checkpoint, spec_for(cast("PreTrainedConfig", said)), said.to_dict())
            if ordered is not None:
                return ordered
    from hf_llfc.checkpoints.configs import UnknownConfig

    if isinstance(checkpoint.config, UnknownConfig):
        return checkpoint  # there is no class, and it was said
    if checkpoint.config.model_type not in known_model_types():
        return None
    return _in_order(checkpoint, spec_of(checkpoint), checkpoint.config.to_dict())


def _in_order(checkpoint: Checkpoint, spec: PermutationSpec, values: Mapping[str, Any]) -> Checkpoint | None:
    """A checkpoint with its tensors in the order of a spec; None if they are not all of them, name by name."""
    try:
        binding = spec.bind({name: info.shape for name, info in checkpoint.tensors.items()})
    except SpecError:
        return None
    place = {each: number for number, each in enumerate(spec.declarations)}
    found = Counter(bound.spec for bound in binding.tensors.values())
    is_complete = all(
        each in place and count == prod(spec.axes[axis].size or 0 for axis in each.name_axes)
        for each, count in found.items()
    )
    by_name = all(name == bound.spec.name_at(bound.index) for name, bound in binding.tensors.items())
    if not (is_complete and by_name and is_whole(binding, checkpoint.architecture, values)):
        return None
    blocks: dict[str, int] = {}
    for each, number in place.items():
        blocks.setdefault(each.name.partition("<")[0], number)

    def of_network(name: str) -> tuple[int, tuple[int, ...], int]:
        bound = binding.tensors[name]
        return blocks[bound.spec.name.partition("<")[0]], bound.index, place[bound.spec]

    return replace(
        checkpoint, tensors={name: checkpoint.tensors[name] for name in sorted(binding.tensors, key=of_network)}
    )
