"""Writes `hf_llfc/adapters/needs.json`: what the model classes of hand-written types need of the optional tensors.

Every class is built without memory from its shrunken default config, as it is and with each flag of the config turned.
Left out are composite configs, and classes with sizes that a config does not say. Where flags decide together, a mark
says that the class has to be asked. Run by `python -m tests.needs_table`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_llfc.adapters
from hf_llfc.adapters import spec_for
from hf_llfc.adapters.derived.shrink import shrunken
from hf_llfc.adapters.needs import ASK, LABELS, pattern_after_first, pattern_of
from hf_llfc.adapters.registry import FAMILIES
from hf_llfc.checkpoints.names import Layout
from hf_llfc.symmetry.declarations import concrete_names
from tests.properties.test_families import DEFAULTS
from tests.zoo import default_config

FILE = Path(hf_llfc.adapters.__file__).parent / "needs.json"

Sizes = Mapping[str, Mapping[str, Any]]

LONGER = 8
"""By how much a value of a config is raised, to see which axis it lengthens."""

OTHER_LABELS = 7
"""A number of labels that no default has."""

NOT_OF_WEIGHTS = frozenset({"use_cache", "return_dict", "output_hidden_states", "output_attentions", "is_decoder"})


def tiny_configs(model_type: str) -> PreTrainedConfig:
    """The shrunken default config of a model type."""
    try:
        return shrunken(default_config(model_type))
    except Exception:  # its default is no model; the table of families has one
        return shrunken(CONFIG_MAPPING[model_type](**copy.deepcopy(DEFAULTS.get(model_type, {}))))


def classes_of(config: PreTrainedConfig) -> dict[str, type[PreTrainedModel]]:
    """Every class that an auto class of transformers makes of a config, by name."""
    found: dict[str, type[PreTrainedModel]] = {}
    for mapping in vars(modeling_auto).values():
        if isinstance(mapping, _LazyAutoMapping) and type(config) in mapping:
            try:
                classes: Any = mapping[type(config)]
            except ValueError:  # the table names a class that is not exported
                continue
            found |= {each.__name__: each for each in (classes if isinstance(classes, tuple) else (classes,))}
    return found


def patterns_of(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, told: Sizes = MappingProxyType({})
) -> frozenset[str] | None:
    """The optional tensors that a class needs, a star for every index; None where a pattern does not tell them."""
    config = copy.deepcopy(config)
    config.architectures = [model_class.__name__]
    spec, shapes = spec_for(config), Layout(model_class, config).shapes
    binding = spec.bind(shapes)
    if any(name != bound.spec.name_at(bound.index) for name, bound in binding.tensors.items()):
        return None
    unknown = {axis for axis in binding.sizes if spec.axes[axis].size is None}
    if unknown - {LABELS} - told.keys() or (LABELS in unknown and binding.sizes[LABELS] != config.num_labels):
        return None
    held = {name for name, bound in binding.tensors.items() if bound.spec.optional}
    optional = [dataclasses.replace(each, condition=None) for each in spec.declarations if each.optional]
    names = list(concrete_names(optional, spec.axes, lambda _: True))
    patterns = frozenset(pattern_of(name) for name in held)
    patterns = frozenset(_after_first(pattern, names, held) for pattern in patterns)
    return (
        patterns
        if held == {name for name in names if patterns & {pattern_of(name), pattern_after_first(name)}}
        else None
    )


def _after_first(pattern: str, names: Sequence[str], held: Collection[str]) -> str:
    """A pattern of all indices, or of all but those of the first layer, if those are not held."""
    others = {name for name in names if pattern_of(name) == pattern and pattern_after_first(name) is not None}
    is_whole = all(name in held for name in names if pattern_of(name) == pattern)
    return pattern if is_whole or not others or not others <= set(held) else pattern.replace(".*", ".+")


def sizes_of(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Sizes:
    """The axes of unknown size that are one value of the config, or that many more."""
    found: dict[str, list[tuple[str, int] | None]] = {}

    def sizes(config: PreTrainedConfig) -> dict[str, int]:
        config = copy.deepcopy(config)
        config.architectures = [model_class.__name__]
        spec = spec_for(config)
        bound = spec.bind(Layout(model_class, config).shapes).sizes
        return {axis: size for axis, size in bound.items() if spec.axes[axis].size is None and axis != LABELS}

    before = sizes(config)
    default = type(config)().to_dict()
    for key, value in config.to_dict().items() if before else ():
        if type(value) is not int or type(default.get(key)) is not int:
            continue
        try:
            after = sizes(type(config).from_dict({**copy.deepcopy(config.to_dict()), key: value + LONGER}))
        except Exception:  # no such model
            continue
        for axis, size in before.items():
            if after.get(axis) != size:
                exact = after.get(axis) == size + LONGER
                found.setdefault(axis, []).append((key, size - value) if exact else None)
    rules = {axis: keys[0] for axis, keys in found.items() if len(keys) == 1 and keys[0] is not None}
    return {axis: {"key": key, "more": more, "default": default[key]} for axis, (key, more) in rules.items()}


def needs_of(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, told: Sizes
) -> tuple[list[str], dict[str, bool]] | None:
    """What a class needs, with the flags that change it and their values where a config leaves them out."""
    config = copy.deepcopy(config)
    config.num_labels = OTHER_LABELS
    usual = patterns_of(model_class, config, told)
    if usual is None:
        return None
    default = type(config)().to_dict()
    lines, flags = dict.fromkeys(usual, ""), {}
    for key, value in config.to_dict().items():
        if not isinstance(value, bool) or key.startswith("_") or key in NOT_OF_WEIGHTS:
            continue
        try:
            # As from a file: some classes know better than what it says.
            turned = type(config).from_dict({**copy.deepcopy(config.to_dict()), key: not value})
            other = patterns_of(model_class, turned, told)
        except Exception:  # no such model, which its class says when it is asked
            other = None
        if other == usual:
            continue
        if not isinstance(default.get(key), bool):
            return None
        flags[key] = default[key]
        changed = usual ^ other if other is not None else frozenset()
        if other is None or any(lines.get(name) for name in changed):  # another flag decides, too
            lines[f"{ASK}{len(lines)}"] = f" {'unless' if value else 'if'} {key}"
        else:
            lines |= {name: f" {'if' if (name in usual) == value else 'unless'} {key}" for name in changed}
    return sorted((ASK if name.startswith(ASK) else name) + condition for name, condition in lines.items()), flags


def needs_of_type(model_type: str) -> dict[str, Any] | None:
    """The row of a model type; None where its classes have to be asked."""
    try:
        config = tiny_configs(model_type)
        if config.sub_configs:
            return None
    except Exception:
        return None
    classes: dict[str, list[str]] = {}
    defaults: dict[str, bool] = {}
    sizes: dict[str, Any] = {}
    for name, model_class in sorted(classes_of(config).items()):
        try:
            told = sizes_of(model_class, config)
            if any(sizes.get(axis, rule) != rule for axis, rule in told.items()):
                continue
            found = needs_of(model_class, config, told)
        except Exception:
            continue
        if found is not None:
            classes[name] = found[0]
            defaults |= found[1]
            sizes |= told
    if not classes:
        return None
    of_all = sorted(set.intersection(*(set(lines) for lines in classes.values())))
    own = {name: [line for line in lines if line not in of_all] for name, lines in classes.items()}
    return {"all": of_all, "classes": own, "defaults": defaults, **({"sizes": sizes} if sizes else {})}


def main() -> None:
    """Writes the table."""
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    rows = {model_type: row for model_type in sorted(FAMILIES) if (row := needs_of_type(model_type)) is not None}
    FILE.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
