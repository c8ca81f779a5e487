"""From the declarations of a family to its permutation spec."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from hf_llfc.symmetry.declarations import TensorSpec
from hf_llfc.symmetry.spec import PermutationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# `BertModel`, `ResNetBackbone` and `CLIPTextModelWithProjection`, but not `GPT2LMHeadModel`, `GPT2DoubleHeadsModel` or
# `MarianMTModel`: classes that return features, not predictions.
_RETURNS_FEATURES = re.compile(r".*((?<!LMHead)(?<!DoubleHeads)(?<!MT)Model|Backbone|Encoder|WithProjection)")


def returns_features(architecture: str) -> bool:
    """Whether a class of transformers returns features, not predictions, by its name."""
    return _RETURNS_FEATURES.fullmatch(architecture) is not None


def declare(
    config: PreTrainedConfig,
    *blocks: Sequence[str],
    sizes: Mapping[str, int | None],
    symmetric: Iterable[str],
    outputs: Iterable[str] = (),
    prefix: str = "",
    other_prefixes: Iterable[str] = (),
    old_endings: Mapping[str, str] | None = None,
) -> PermutationSpec:
    """Builds the permutation spec of a family from its blocks.

    Args:
        config: The config it describes.
        blocks: Declarations, in the order of the network; see `hf_llfc.adapters.blocks`.
        sizes: Size of each axis, by its full name or by the part before the first dot; None where only the
            checkpoint tells.
        symmetric: The symmetric axes, named likewise.
        outputs: Symmetric axes that a model without a task head returns as its features; they are fixed where
            `config.architectures` names such a model, since moving them would change what it computes.
        prefix: The head prefix, with its dot; names with and without it are the same tensor.
        other_prefixes: Head prefixes that some heads write instead of it.
        old_endings: How names ended in old checkpoints → how they end now.

    Raises:
        SpecError: The declarations contradict themselves.
    """
    spec = PermutationSpec.from_lines(
        [line for block in blocks for line in block],
        sizes=sizes,
        symmetric=symmetric,
        model_type=config.model_type,
        prefix=prefix,
        other_prefixes=other_prefixes,
        old_endings=old_endings,
    )
    spec = with_other_places(spec, config)
    architectures = config.architectures or []
    bare = bool(architectures) and all(returns_features(name) for name in architectures)
    present = [axis for axis in outputs if any(axis in (name, name.split(".")[0]) for name in spec.symmetric_axes)]
    return spec.fix(*present) if bare and present else spec


def with_other_places(
    spec: PermutationSpec, config: PreTrainedConfig, other_places: Mapping[str, str] | None = None
) -> PermutationSpec:
    """A spec that also knows the names in memory, and those of other checkpoints of the same model.

    Args:
        spec: The spec.
        config: The config it describes.
        other_places: How names begin → how they begin in other checkpoints.
    """
    return replace(spec, other_layouts=partial(_other_layouts, config, dict(other_places or {})))


def _other_layouts(
    config: PreTrainedConfig, other_places: Mapping[str, str], spec: PermutationSpec
) -> Sequence[TensorSpec]:
    """The names in memory, and those that begin differently in other checkpoints."""
    from hf_llfc.adapters.layouts import in_memory_layout

    def moved(name: str, place: str) -> str:
        return name.replace(place, other_places[place], 1)

    layout = in_memory_layout(config, spec)
    for tensor in spec.declarations:
        for place in other_places:
            if tensor.name.startswith(place) and not tensor.name_axes:
                condition = tensor.condition and (tensor.condition[0], moved(tensor.condition[1], place))
                name = moved(tensor.name, place)
                layout.append(replace(tensor, name=name, optional=True, condition=condition, covers=(tensor.name,)))
    return layout
