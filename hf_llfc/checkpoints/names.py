"""Tensor names in memory and on disk; every call to what is half internal in transformers is in this file.

transformers may name, stack and split the weights of a model in memory in another way than in its files. The names
on disk that the rest of this package works with are those that `save_pretrained` writes for a new model of that
class, whatever a given file looks like: older names, a head prefix too many or too few, weights that were saved in
the layout of the memory.

A file is brought to these names the way that transformers itself would take: into the memory layout of the model
class, as `from_pretrained` does (a *load* below), and out of it again, as `save_pretrained` does (a *group* below),
one group of tensors at a time. A tensor that already has its name on disk is taken as it is.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping
from transformers.utils.loading_report import LoadStateDictInfo

from hf_llfc.checkpoints.buffers import COUNTER
from hf_llfc.checkpoints.header import TensorInfo, natural_order
from hf_llfc.errors import CheckpointError, raise_all

logger = logging.getLogger(__name__)

Read = Callable[[str], torch.Tensor]

_IN_TRAINING = (".masked_spec_embed", f".{COUNTER}")
"""What only training reads, and published models may lack: a vector in place of masked frames, counts of batches."""


def find_class_in_transformers(architecture: str) -> type[PreTrainedModel] | None:
    """The model class of that name in transformers, or None.

    Raises:
        ImportError: If the class needs a package that is not installed.
    """
    model_class = getattr(transformers, architecture, None)  # transformers imports its classes on access
    return model_class if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel) else None


def find_model_class(
    architecture: str, config: PreTrainedConfig, *, folder: Path | None = None, trust_remote_code: bool = False
) -> type[PreTrainedModel] | None:
    """The model class that a config names, or None if it is neither in transformers nor registered with it.

    Args:
        architecture: The name of the class, as in `config.architectures`.
        config: The config of the model.
        folder: Where code that came with the checkpoint lies.
        trust_remote_code: Whether that code may be run.

    Raises:
        ImportError: If the class needs a package that is not installed.
    """
    if trust_remote_code and folder is not None:
        auto_map = config.to_dict().get("auto_map")
        for reference in auto_map.values() if isinstance(auto_map, dict) else ():
            if isinstance(reference, str) and reference.rpartition(".")[2] == architecture:
                return get_class_from_dynamic_module(reference, str(folder))
    # A user's own class, registered with AutoModel.register, goes before one of the same name in transformers.
    for mapping in vars(modeling_auto).values():
        if isinstance(mapping, _LazyAutoMapping):
            registered = mapping._extra_content.get(type(config))
            if registered is not None and registered.__name__ == architecture:
                return registered
    return find_class_in_transformers(architecture)


def classes_of(config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """Every class that an auto class of transformers makes of a config."""
    found: dict[str, type[PreTrainedModel]] = {}
    for mapping in vars(modeling_auto).values():
        if isinstance(mapping, _LazyAutoMapping) and type(config) in mapping:
            with suppress(ValueError):  # the table names a class that is not exported
                classes: Any = mapping[type(config)]
                found |= {each.__name__: each for each in (classes if isinstance(classes, tuple) else (classes,))}
    return list(found.values())


def disk_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state of a model under its names on disk, tied weights once, in the order in which it is saved.

    Raises:
        RuntimeError: If tensors share memory without being declared as tied.
    """
    return _to_disk(model, _saved_state(model), _saving_transforms(model))


def tensors_of(model: PreTrainedModel, modules: Sequence[str]) -> dict[str, str | None]:
    """Finds the module that every tensor on disk comes from.

    Names in memory and on disk may differ, and one tensor on disk may be a part or a stack of tensors in memory; so the
    model's own conversion is run on tensors that hold nothing but the number of their module.

    Args:
        model: Its weights are not read.
        modules: Names in memory, none inside another.

    Returns:
        Name on disk → module; None for tensors of no module, or of several.
    """

    def number(name: str) -> int:
        return next((index for index, module in enumerate(modules, start=1) if name.startswith(f"{module}.")), 0)

    # One number, spread over the shape, takes no memory.
    marked = {
        name: torch.full((), float(number(name))).expand(tensor.shape) for name, tensor in _saved_state(model).items()
    }
    owners: dict[str, str | None] = {}
    for name, tensor in _to_disk(model, marked, _saving_transforms(model)).items():
        values = tensor.unique().tolist() if tensor.numel() else []
        owners[name] = modules[int(values[0]) - 1] if len(values) == 1 and values[0] else None
    return owners


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Name in memory of a weight that is tied to another → the name of that other."""
    return dict(model.all_tied_weights_keys)


@dataclass
class _Load:
    """Tensors of a file that make one or more tensors in memory, as `from_pretrained` would load them.

    Attributes:
        target: The name in memory, or the first of them.
        converter: What makes them, or None if one tensor is taken as it is.
        sources: Name in the file → the pattern of the converter that it matches.
    """

    target: str
    converter: WeightConverter | None
    sources: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Tensors in memory that together make tensors on disk, as `save_pretrained` would write them.

    Attributes:
        memory: Names in memory.
        disk: Names on disk.
    """

    memory: tuple[str, ...]
    disk: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The way from the tensors of a file to the tensors on disk.

    Attributes:
        tensors: Name on disk → dtype and shape, in the order in which they are saved.
        converted: Names on disk under which the file has no tensor; `make` makes them.
        ties: Name on disk → names in the file of the other copies of a tied weight, which must be equal.
        unused: Names in the file that the model class has no use for.
        spare: The same with those that the class knows to be of no use to it.
        lacking: Names on disk that the file lacks and may lack → shape.
        make: Makes a converted tensor, and with it all that come from the same tensors in memory. Takes the name
            on disk and a function that gives a tensor by its name in the file.
    """

    tensors: Mapping[str, TensorInfo]
    converted: frozenset[str]
    ties: Mapping[str, tuple[str, ...]]
    unused: tuple[str, ...]
    spare: tuple[str, ...]
    lacking: Mapping[str, tuple[int, ...]]
    make: Callable[[str, Read], dict[str, torch.Tensor]]


class Layout:
    """The names that a model class with a given config gives its tensors, in memory and on disk."""

    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
        """Builds the model without memory for its weights and takes the names from it.

        Args:
            model_class: A class of transformers, or one's own.
            config: The config of the model.
        """
        with torch.device("meta"):
            self._model = model_class(deepcopy(config))
        self._loading = get_model_conversion_mapping(self._model)
        self._saving = _saving_transforms(self._model)
        self._all_memory = self._model.state_dict()
        self._memory = _saved_state(self._model)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.to_disk(self._memory).items()}

    @property
    def parameters(self) -> int:
        """The number of parameters of the model, tied weights once, without buffers."""
        return self._model.num_parameters()

    @property
    def names_in_memory(self) -> tuple[str, ...]:
        """The names of the state dict, tied weights under every name."""
        return tuple(self._all_memory)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Tensors in groups that are written together."""
        return tuple(self._groups_to_make({}))

    @property
    def ties(self) -> Mapping[str, str]:
        """Name in memory of a weight that is tied to another → the name of that other."""
        return tied_weights(self._model)

    def in_memory(self, name: str) -> str | None:
        """The name in memory of a tensor with an older name, perhaps; None where no single tensor has it."""
        if name in self._all_memory:
            return name
        renamings = [transform for transform in self._loading if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in self._loading if isinstance(transform, WeightConverter)]
        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(name, renamings, converters, prefix, self._all_memory)
        return target if pattern is None and target in self._all_memory else None

    def empty_model(self) -> PreTrainedModel:
        """A new model, without memory for its weights."""
        return deepcopy(self._model)

    def to_disk(self, memory: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors in memory, whole groups of them, as they are written."""
        return _to_disk(self._model, memory, self._saving)

    @property
    def names_in_body(self) -> frozenset[str]:
        """The names on disk of what belongs to the base model, without its pooler; of all tensors where it is one."""
        prefix = self._model.base_model_prefix
        is_base = not prefix or self._model.base_model is self._model
        return frozenset(
            name
            for group in self.groups
            if all((is_base or each.startswith(f"{prefix}.")) and not _is_of_pooler(each) for each in group.memory)
            for name in group.disk
        )

    @property
    def is_bare(self) -> bool:
        """Whether the class has no head around a base model."""
        return self._model.base_model is self._model

    def plan(
        self, infos: Mapping[str, TensorInfo], heading: str, *, may_lack: Callable[[str], bool] = lambda _: False
    ) -> Plan:
        """Finds out how the tensors of a file make the tensors on disk.

        Args:
            infos: The tensors of the file.
            heading: The first line of the error, if there is one.
            may_lack: Whether the file may lack a tensor, by its name on disk, besides those that the class lacks.

        Raises:
            CheckpointError: With all tensors that are missing or whose shapes contradict the config.
        """
        groups = self._groups_to_make(infos)
        loads, strangers = self._loads(infos)
        ties = self._tie(loads)

        tensors = {name: infos[name] for name in self.shapes if name in infos}
        used = set(tensors) | {copy for copies in ties.values() for copy in copies}
        maker_of: dict[str, Group] = {}
        missing: dict[str, tuple[str, ...]] = {}  # in memory → on disk
        problems: list[str] = []
        for group in groups:
            if any(name in infos for name in group.disk) or not all(name in loads for name in group.memory):
                absent = tuple(name for name in group.disk if name not in infos)
                missing.update(dict.fromkeys(group.memory, absent))
                continue
            made = self._make_memory(group, loads, lambda name: _stand_in(infos[name]))
            sources = {name: list(loads[name].sources) for name in group.memory}
            wrong = [name for name in group.memory if made[name].shape != self._memory[name].shape]
            for name in wrong:
                actual, expected = _shape(made[name].shape), _shape(self._memory[name].shape)
                stored = " + ".join(sources[name])
                which = stored if stored == name else f"{stored} makes {name}, which"
                problems.append(f"tensor {which} has shape {actual}, but the config makes it {expected}")
            used.update(name for names in sources.values() for name in names)
            if not wrong:
                made_on_disk = self.to_disk(made)
                tensors |= {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in made_on_disk.items()}
                maker_of |= dict.fromkeys(made_on_disk, group)

        still_missing, still_strange = self._without_exceptions(missing, strangers.values())
        excused = set(strangers.values()) - still_strange
        absent_on_disk = {
            name
            for memory_name in still_missing
            for name in missing[memory_name]
            if not (may_lack(name) or name.endswith(_IN_TRAINING) or (self.may_lack_pooler and _is_of_pooler(name)))
        }
        spare = tuple(name for name in infos if name not in used)
        if absent_on_disk and (prefix := self._prefix_of(spare, absent_on_disk)):
            raise CheckpointError(
                f"{heading}: its tensors have {prefix!r} before the names that the class gives them ({prefix}"
                f"{min(absent_on_disk, key=natural_order)}); save the model inside of what wraps it, or rename them"
            )
        for name, shape in self.shapes.items():
            if name in absent_on_disk:
                problems.append(f"tensor {name} of shape {_shape(shape)} is missing")
            elif name in tensors and tensors[name].shape != shape:
                actual = _shape(tensors[name].shape)
                problems.append(f"tensor {name} has shape {actual}, but the config makes it {_shape(shape)}")
        raise_all(problems, CheckpointError, heading)

        def make(name: str, read: Read) -> dict[str, torch.Tensor]:
            return self.to_disk(self._make_memory(maker_of[name], loads, read))

        return Plan(
            {name: tensors[name] for name in self.shapes if name in tensors},
            frozenset(maker_of),
            {kept: tuple(copies) for kept, copies in ties.items() if kept in tensors},
            tuple(name for name in spare if strangers.get(name, name) not in excused),
            spare,
            {name: shape for name, shape in self.shapes.items() if name not in tensors},
            make,
        )

    @property
    def may_lack_pooler(self) -> bool:
        """Whether the class can be built without its pooler, as encoders of sentences are."""
        return "add_pooling_layer" in signature(type(self._model).__init__).parameters

    def lacks_pooler(self, plan: Plan) -> bool:
        """Whether a file, by its plan, is of the class without its pooler."""
        return self.may_lack_pooler and any(_is_of_pooler(name) for name in plan.lacking)

    @staticmethod
    def _prefix_of(spare: Sequence[str], absent: Collection[str]) -> str:
        """What stands before the names of most absent tensors in the names of the file; nothing where nothing does."""
        found = Counter(
            name.removesuffix(tail)
            for name in spare
            for tail in (".".join(name.split(".")[start:]) for start in range(1, min(name.count(".") + 1, 4)))
            if tail in absent
        )
        prefix, count = found.most_common(1)[0] if found else ("", 0)
        return prefix if 2 * count > len(absent) else ""

    def memory_reader(self, infos: Mapping[str, TensorInfo]) -> Callable[[str, Read], torch.Tensor]:
        """Prepares making single tensors in memory without the rest of the model.

        Args:
            infos: The tensors of the file, complete as `plan` has found them.

        Returns:
            A function of a name in memory and of what reads a tensor of the file by its name.
        """
        loads, _ = self._loads(infos)
        self._tie(loads)
        for name, source in tied_weights(self._model).items():
            loads.setdefault(name, loads[source])

        def read_memory(name: str, read: Read) -> torch.Tensor:
            tensors = self._run(loads[name], read)
            # A tied weight may be made from its other copy, under that name.
            return tensors[name] if name in tensors else tensors[loads[name].target]

        return read_memory

    def _loads(self, infos: Mapping[str, TensorInfo]) -> tuple[dict[str, _Load], dict[str, str]]:
        """Groups the tensors of a file by the tensors in memory that they make.

        Returns:
            Name in memory → what makes it; and name in the file → name in memory for those that make nothing.
        """
        renamings = [transform for transform in self._loading if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in self._loading if isinstance(transform, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = self._model.base_model_prefix
        by_target: dict[str, _Load] = {}
        strangers: dict[str, str] = {}
        for name in sorted(infos, key=natural_order):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self._all_memory)
            if target not in self._all_memory and name in self._all_memory:
                target, pattern = rename_source_key(name, [], [], prefix, self._all_memory)
            if target not in self._all_memory:
                strangers[name] = target
                continue
            converter = by_pattern[pattern] if pattern is not None else None
            load = by_target.setdefault(target, _Load(target, converter))
            if load.converter is None:
                # Two names for one tensor: the last one counts, as in transformers.
                strangers.update(dict.fromkeys(load.sources, target))
                load.sources.clear()
            load.sources[name] = pattern or name

        loads: dict[str, _Load] = {}
        for load in by_target.values():
            try:
                made = self._run(load, lambda name: _stand_in(infos[name]))
            except (RuntimeError, ValueError, IndexError) as error:
                logger.debug("%s cannot be made from %s: %s", load.target, list(load.sources), error)
                strangers.update(dict.fromkeys(load.sources, load.target))
            else:
                loads.update(dict.fromkeys(made, load))
        return loads, strangers

    def _tie(self, loads: dict[str, _Load]) -> dict[str, list[str]]:
        """Lets a tied weight that is not in the file be made from its other copy.

        Returns:
            Name in the file of a weight that is kept → names in the file of the other copies of it.
        """
        families: dict[str, list[str]] = {}
        for target, source in tied_weights(self._model).items():
            families.setdefault(source, [source]).append(target)
        ties: dict[str, list[str]] = {}
        for family in families.values():
            present = sorted((name for name in family if name in loads), key=lambda name: name not in self._memory)
            kept = [name for name in family if name in self._memory]
            for name in kept:
                if present and name not in loads:
                    loads[name] = loads[present[0]]
            if kept and len(present) > 1 and all(loads[name].converter is None for name in present):
                first, *copies = (next(iter(loads[name].sources)) for name in present)
                ties[first] = copies
        return ties

    def _groups_to_make(self, infos: Mapping[str, TensorInfo]) -> list[Group]:
        """The groups of which a tensor on disk is not in the file under its name."""
        if all(name in infos for name in self.shapes):
            return []
        reversed_transforms = [transform.reverse_transform() for transform in self._saving[::-1]]
        renamings = [transform for transform in reversed_transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in reversed_transforms if isinstance(transform, WeightConverter)]
        members: dict[str, list[str]] = {}
        for name in self._memory:
            target, _ = rename_source_key(name, renamings, converters, reverse=True)
            members.setdefault(target, []).append(name)
        groups = []
        for memory in members.values():
            disk = self.to_disk({name: self._memory[name] for name in memory})
            if not all(name in infos for name in disk):
                groups.append(Group(tuple(memory), tuple(disk)))
        return groups

    def _make_memory(self, group: Group, loads: Mapping[str, _Load], read: Read) -> dict[str, torch.Tensor]:
        """Makes the tensors in memory of a group."""
        made: dict[str, torch.Tensor] = {}
        for name in group.memory:
            if name not in made:
                tensors = self._run(loads[name], read)
                # A tied weight may be made from its other copy, under that name.
                made |= tensors if name in tensors else {name: tensors[loads[name].target]}
        return {name: made[name] for name in group.memory}

    def _run(self, load: _Load, read: Read) -> dict[str, torch.Tensor]:
        """Makes the tensors in memory of a load."""
        if load.converter is None:
            return {load.target: read(next(iter(load.sources)))}
        converter: Any = deepcopy(load.converter)  # takes tensors as well as the futures that it declares
        for name, pattern in load.sources.items():
            converter.add_tensor(load.target, name, pattern, read(name))
        made = converter.convert(load.target, model=self._model, config=self._model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def _without_exceptions(self, missing: Iterable[str], unexpected: Iterable[str]) -> tuple[set[str], set[str]]:
        """Names in memory that are missing or unexpected and that the model class does not make an exception for."""
        info = LoadStateDictInfo(
            missing_keys=set(missing),
            unexpected_keys=set(unexpected),
            mismatched_keys=set(),
            error_msgs=[],
            conversion_errors={},
            skipped_pp_keys=set(),
        )
        self._model._adjust_missing_and_unexpected_keys(info)
        return info.missing_keys, info.unexpected_keys


def _saved_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state in memory without what `save_pretrained` leaves out."""
    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    return remove_tied_weights_from_state_dict(state, model)


def _saving_transforms(model: PreTrainedModel) -> list[WeightTransform]:
    """Lists the transforms that `save_pretrained` reverses for a new model.

    Not what it reverses for this model: that depends on the file that the model was loaded from, so that two equal
    models would have different names.
    """
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    return [transform for transform in transforms if not isinstance(transform, PrefixChange)]


def _to_disk(
    model: PreTrainedModel, memory: Mapping[str, torch.Tensor], transforms: list[WeightTransform]
) -> dict[str, torch.Tensor]:
    # revert_weight_conversion reads the transforms from this attribute, which from_pretrained sets.
    before = vars(model).get("_weight_conversions")
    vars(model)["_weight_conversions"] = transforms
    try:
        return revert_weight_conversion(model, dict(memory))
    finally:
        vars(model)["_weight_conversions"] = before


def _stand_in(info: TensorInfo) -> torch.Tensor:
    return torch.empty(info.shape, dtype=info.dtype, device="meta")


def _is_of_pooler(name: str) -> bool:
    return "pooler" in name.split(".")


def _shape(shape: Iterable[int]) -> str:
    return str(list(shape))
