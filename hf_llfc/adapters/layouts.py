"""The same tensors as transformers names them in memory, derived from its own conversion of checkpoints.

Transformers 5 renames and fuses tensors when it loads many families (`experts.*.w1` and `w3` become one
`gate_up_proj`). The conversion is executed here on axis expressions instead of tensors, so that a spec written
for the names on disk also binds a model's `state_dict`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hf_llfc.adapters.model_classes import model_class_for
from hf_llfc.symmetry.declarations import TensorSpec
from hf_llfc.symmetry.expressions import AxisUse, Concatenation, Expression
from hf_llfc.symmetry.spec import PermutationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def in_memory_layout(config: PreTrainedConfig, spec: PermutationSpec) -> list[TensorSpec]:
    """Declares a family's tensors by the names that a loaded model gives them.

    Args:
        config: The model config.
        spec: Its spec, by names on disk.

    Returns:
        Declarations of the tensors whose name or shape differs in memory; empty if transformers converts nothing.
    """
    import torch
    from transformers import AutoModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        PrefixChange,
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    if not config.architectures and type(config) not in AutoModel._model_mapping:
        return []
    with torch.device("meta"):
        # A head may have conversions of its own.
        model = model_class_for(config)._from_config(config) if config.architectures else AutoModel.from_config(config)
    conversions = [
        conversion
        for conversion in get_model_conversion_mapping(model, add_legacy=False)
        if not isinstance(conversion, PrefixChange)
    ]
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    layout: list[TensorSpec] = []
    gathered: dict[str, dict[str, TensorSpec]] = {}
    for tensor in spec.declarations:
        first = tensor.name_at([0] * len(tensor.name_axes))
        name, pattern = rename_source_key(first, renamings, converters)
        if pattern is None:
            if name != first and not tensor.name_axes:
                condition = tensor.condition and (
                    tensor.condition[0],
                    _renamed(tensor.condition[1], renamings),
                )
                layout.append(replace(tensor, name=name, optional=True, condition=condition, covers=(first,)))
        else:
            gathered.setdefault(name, {})[pattern] = tensor
    for name, sources in gathered.items():
        converter = converter_of[next(iter(sources))]
        ordered = [sources[pattern] for pattern in converter.source_patterns if pattern in sources]
        # Of several targets the name of a source tells the first.
        targets = [name.replace(converter.target_patterns[0], target) for target in converter.target_patterns]
        shapes = _convert(
            [tensor.dimensions for tensor in ordered], ordered[0].name_axes, converter.operations, len(targets)
        )
        covered = _covered(ordered, spec)
        if len(shapes) == len(targets):
            layout += [TensorSpec(*pair, True, None, covered) for pair in zip(targets, shapes, strict=True)]
    return layout


def _renamed(name: str, renamings: list[Any]) -> str:
    from transformers.core_model_loading import apply_renamings

    return str(apply_renamings(name, renamings))


def _covered(tensors: Sequence[TensorSpec], spec: PermutationSpec) -> tuple[str, ...]:
    names = []
    for tensor in tensors:
        indices: list[tuple[int, ...]] = [()]
        for axis in tensor.name_axes:
            indices = [(*index, position) for index in indices for position in range(spec.axes[axis].size or 0)]
        names += [tensor.name_at(index) for index in indices]
    return tuple(names)


def _convert(
    sources: list[tuple[Expression, ...]], name_axes: tuple[str, ...], operations: Sequence[Any], targets: int
) -> list[tuple[Expression, ...]]:
    """Executes conversion operations on axis expressions; gives none for one that is not understood."""
    from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose

    for operation in operations:
        match operation:
            case MergeModulelist(dim=dim) if len(name_axes) == 1:
                sources = [(*shape[:dim], AxisUse(name_axes[0]), *shape[dim:]) for shape in sources]
                name_axes = ()
            case Concatenate(dim=dim):
                joined = Concatenation(tuple(shape[dim] for shape in sources))
                sources = [(*sources[0][:dim], joined, *sources[0][dim + 1 :])]
            case Chunk(dim=dim) if len(sources) == 1:
                sources = [
                    (*sources[0][:dim], chunk, *sources[0][dim + 1 :]) for chunk in _chunks(sources[0][dim], targets)
                ]
            case Transpose(dim0=dim0, dim1=dim1):
                sources = [_swapped(shape, dim0, dim1) for shape in sources]
            case _:
                return []
    return [] if name_axes else sources


def _chunks(dimension: Expression, count: int) -> list[Expression]:
    """The parts of a concatenation, dealt to as many tensors; none where that does not come out even."""
    parts = dimension.parts if isinstance(dimension, Concatenation) else ()
    each, rest = divmod(len(parts), count)
    if rest or not each:
        return []
    dealt = [parts[start : start + each] for start in range(0, len(parts), each)]
    return [Concatenation(chunk) if each > 1 else chunk[0] for chunk in dealt]


def _swapped(shape: tuple[Expression, ...], dim0: int, dim1: int) -> tuple[Expression, ...]:
    swapped = list(shape)
    swapped[dim0], swapped[dim1] = swapped[dim1], swapped[dim0]
    return tuple(swapped)
