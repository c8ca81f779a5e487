"""From a traced model to its permutation spec."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_llfc.adapters.derived.answers import answers, run
from hf_llfc.adapters.derived.inputs import sample_inputs
from hf_llfc.adapters.derived.naming import names_of
from hf_llfc.adapters.derived.nesting import chosen_from, parents_of
from hf_llfc.adapters.derived.rules import rule_for
from hf_llfc.adapters.derived.terms import Term, find, fix, fix_as_one, is_leaf
from hf_llfc.adapters.derived.trace import META, Label, Trace, stand_in
from hf_llfc.adapters.derived.writing import Writer
from hf_llfc.symmetry.declarations import TensorSpec
from hf_llfc.symmetry.spec import PermutationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

# Buffers that training changes, by gradients or not; the others are constants.
_STATISTIC = re.compile(
    r".*(running_mean|running_var|num_batches_tracked|e_score_correction_bias|expert_bias|balancing_biases)$"
)
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class TracedModel:
    """What tracing a model found.

    Attributes:
        trace: The trace.
        model: The model on the meta device.
        tensors: Name in memory → the traced parameter or buffer.
        unused: Names of the weights that no operation took.
    """

    trace: Trace
    model: PreTrainedModel
    tensors: Mapping[str, Tensor]
    unused: tuple[str, ...]


def traced(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> TracedModel:
    """Builds a model without its weights, runs it and follows its dimensions.

    Args:
        model_class: The class that the config builds.
        config: Its config, of any size.

    Raises:
        SpecError: There are no valid inputs for it.
    """
    config = deepcopy(config)
    config._attn_implementation = "eager"
    config._experts_implementation = "batched_mm"  # experts are looked up by index; a loop over them hides the axis
    with torch.device(META):
        model = model_class._from_config(config).eval()
    _replace_meta(model)
    trace = Trace(rule_for)
    state = model.state_dict(keep_vars=True)
    never_saved = set(model._keys_to_ignore_on_save or ())
    buffers = {name for name, _ in model.named_buffers()}
    weights = {
        id(tensor): tensor
        for name, tensor in state.items()
        if name not in never_saved and (name not in buffers or _STATISTIC.fullmatch(name))
    }
    for tensor in weights.values():
        if tensor.is_floating_point():
            trace.put_leaf(tensor, hollow=True)
    inputs = sample_inputs(model, batch_size=2)
    with trace:
        output = run(model, inputs)
    for tensor in answers(output).values():
        trace.fix(tensor, "it is part of the answer")
    unused = tuple(name for name, tensor in state.items() if id(tensor) not in trace.met and tensor.is_floating_point())
    _fix_unused(trace, state, unused)
    return TracedModel(trace, model, state, unused)


def _fix_unused(trace: Trace, state: Mapping[str, Tensor], unused: Iterable[str]) -> None:
    """Fixes the tensors that no operation took, and what those of the same module may share with them.

    They serve inputs that were not tried (segments, masks): a bias of the heads must not stay behind when they move.
    """
    for name in unused:
        tensor = state[name]
        trace.fix(tensor, "no operation uses it")
        module = name.rpartition(".")[0]
        for other, beside in state.items():
            if other.rpartition(".")[0] == module and other != name:
                for term in trace.label(beside).dims:
                    if term.size > 1 and term.size in tensor.shape:
                        fix(term, f"it may belong to {name}, which no operation uses")


def _replace_meta(model: PreTrainedModel) -> None:
    """Puts stand-ins in place of weights, and gives constants (tables of indices, rotary frequencies) their values."""
    before = list(model.parameters())  # held, so that no identity is given to another while they are replaced
    replaced = {
        id(parameter): torch.nn.Parameter(stand_in(parameter.shape, parameter.dtype), requires_grad=False)
        for parameter in before
    }
    for prefix, module in model.named_modules():
        vars(module).pop("_is_hf_initialized", None)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = _initialised(replaced[id(parameter)])
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device == META:
                full = f"{prefix}.{name}" if prefix else name
                if _STATISTIC.fullmatch(full):
                    module._buffers[name] = _initialised(stand_in(buffer.shape, buffer.dtype))
                else:
                    module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    # transformers gives constants their values where it initialises weights, which are all marked as initialised.
    with torch.random.fork_rng(devices=[]):
        try:
            model.initialize_weights()
        except Exception:
            logger.debug("constants of %s stay zero", type(model).__name__, exc_info=True)


def _initialised(tensor: Tensor) -> Tensor:
    vars(tensor)["_is_hf_initialized"] = True
    return tensor


def on_disk(traced_model: TracedModel) -> dict[str, tuple[list[Term], dict[Term, int], frozenset[str]]]:
    """The tensors as `save_pretrained` writes them.

    Returns:
        Name on disk → its dimensions, the dimensions that it is one entry of, the names in memory it is made from.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, revert_weight_conversion

    trace, model = traced_model.trace, traced_model.model
    state: dict[str, Tensor] = {}
    for name, tensor in traced_model.tensors.items():
        alias = tensor.detach()
        label = trace.put(alias, Label(trace.label(tensor).dims))
        label.hollow = tensor.is_floating_point()
        label.origins = frozenset({name})
        state[name] = alias
    conversions = [
        conversion
        for conversion in get_model_conversion_mapping(model, add_legacy=False)
        if not isinstance(conversion, PrefixChange)
    ]
    if not conversions:
        return {name: (trace.label(tensor).dims, {}, frozenset({name})) for name, tensor in state.items()}
    vars(model)["_weight_conversions"] = conversions
    trace.converting = True
    with torch.no_grad(), trace:
        converted = revert_weight_conversion(model, state)
    trace.converting = False
    labels = {name: trace.label(tensor) for name, tensor in converted.items()}
    return {name: (label.dims, label.entries, label.origins) for name, label in labels.items()}


def derive(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PermutationSpec:
    """Derives the permutation spec of a model from the operations that it runs.

    Args:
        model_class: The class that the config builds.
        config: Its config.

    Returns:
        The spec, not verified.

    Raises:
        SpecError: There are no valid inputs for it.
    """
    return spec_of(traced(model_class, config))


def spec_of(traced_model: TracedModel) -> PermutationSpec:
    """The permutation spec of a traced model."""
    trace, model = traced_model.trace, traced_model.model
    disk = on_disk(traced_model)
    memory = {name: trace.label(tensor).dims for name, tensor in traced_model.tensors.items()}
    templates = _templates(disk)
    parents = parents_of(trace)
    experts = chosen_from(trace).union(find(term) for _, entries, _ in disk.values() for term in entries)
    names = names_of(memory, parents, experts)
    writer = Writer(names, parents)

    unused = traced_model.unused
    buffers = {name for name, _ in model.named_buffers()}
    saved = _saved_names(model, traced_model.tensors)
    declarations: dict[str, TensorSpec] = {}
    for name, (dims, _, origins) in disk.items():
        template = templates.get(name)
        written = name
        if template is not None:
            text, term = template
            if find(term) in names:
                written = text.replace("\0", f"<{names[find(term)]}>")
        optional = not (origins & saved) or any(_STATISTIC.fullmatch(origin) for origin in origins)
        declarations.setdefault(
            written,
            TensorSpec(
                written,
                writer.shape(dims),
                optional=optional,
                statistic=not origins.isdisjoint(buffers),
            ),
        )
    layouts = []
    made_from: dict[str, list[str]] = {}
    for name, (_, _, origins) in disk.items():
        for origin in origins:
            made_from.setdefault(origin, []).append(name)
    for name, dims in memory.items():
        if made_from.get(name) != [name]:
            layouts.append(TensorSpec(name, writer.shape(dims), True, None, tuple(made_from.get(name, ()))))
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    if not any(name.startswith(prefix) for name in memory):
        prefix = ""
    return PermutationSpec(
        model.config.model_type,
        writer.axes(),
        tuple(declarations.values()),
        prefix,
        other_layouts=partial(_given, tuple(layouts)) if layouts else None,
        origin="derived",
        notes=(f"left as they are, since no operation uses them: {folded(unused)}",) if unused else (),
    )


def generalised(text: str) -> str:
    """A name with every number in it left open."""
    return re.sub(r"\d+", "*", text)


def folded(names: Iterable[str]) -> str:
    """Names as a list, those that differ in numbers only as one with how many they are."""
    counted: dict[str, list[str]] = {}
    for name in names:
        counted.setdefault(generalised(name), []).append(name)
    return ", ".join(
        several[0] if len(several) == 1 else f"{pattern} ({len(several)})" for pattern, several in counted.items()
    )


def _given(layouts: tuple[TensorSpec, ...], spec: PermutationSpec) -> tuple[TensorSpec, ...]:
    return layouts


def _saved_names(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> set[str]:
    """Names in memory that `save_pretrained` always writes."""
    ignored = set(model._keys_to_ignore_on_save or ())
    tied = vars(model).get("all_tied_weights_keys", {})  # some classes never finish their initialisation
    return set(tensors) - ignored - set(tied)


def _templates(
    disk: Mapping[str, tuple[list[Term], dict[Term, int], frozenset[str]]],
) -> dict[str, tuple[str, Term]]:
    """For names that carry the index along an axis: the name with a mark in its place, and the axis.

    An axis whose index cannot be found in the names is fixed.
    """
    found: dict[str, tuple[str, Term]] = {}
    for name, (_, entries, _) in disk.items():
        if not entries:
            continue
        # A name carries one index, along one axis: experts that are chosen group by group stay put.
        for term in entries:
            if len(entries) > 1 or not is_leaf(find(term)):
                fix_as_one(term)
        if len(entries) > 1:
            continue
        term = next(iter(entries))
        for match in _INDEX.finditer(name):
            before, after = name[: match.start()], name[match.end() :]
            family = [f"{before}{other}{after}" for other in range(find(term).size)]
            if all(each in disk and disk[each][1] == {term: other} for other, each in enumerate(family)):
                found[name] = f"{before}\0{after}", term
                break
        else:
            fix(term)
    return found
