"""What every spec of the zoo must hold, and the facts about it that the page of model types shows."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_llfc.adapters import spec_for
from hf_llfc.adapters.derived import answer_of, relative_change
from hf_llfc.adapters.derived.inputs import forward
from hf_llfc.alignment import Parameters, match_weights
from hf_llfc.checkpoints.names import disk_state
from hf_llfc.symmetry import PermutationSpec
from hf_llfc.symmetry.expressions import AxisUse, Product, axis_uses
from tests.properties.invariance import RELATIVE_CHANGE

_FEATURES = re.compile(r"last_hidden_state|feature_maps|.*embeds|.*features")


def examine(model_type: str, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Any] | str:
    """The properties of a model type's spec, on one tiny model of it.

    Every tensor in memory and on disk is declared, with its shape; a random transform of every symmetric axis keeps
    what the model computes; its inverse restores every bit; and weight matching finds a planted transform.

    Returns:
        Facts for the table, or what does not hold.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    spec = spec_for(config)
    state, on_disk = model.state_dict(), disk_state(model)
    for tensors in (state, on_disk):
        binding = spec.bind({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        assert binding.tensors.keys() == tensors.keys()
    facts: dict[str, Any] = {
        "spec": spec.origin,
        "kinds": kinds(spec),
        "attention": has_attention(model),
        "features": gives_features(model, inputs),
        "fixed": [note for note in spec.notes if note.startswith("fixed")],
        "tensors": len(on_disk),
        "symmetric_tensors": sum(
            any(spec.axes[use.axis].symmetric for use in bound.spec.axes) for bound in binding.tensors.values()
        ),
    }
    if not binding.symmetric_axes:
        return facts | {"change": 0.0}
    alignment = spec.random_alignment(torch.Generator().manual_seed(1))
    moved_state = alignment.apply(state)
    moved = copy.deepcopy(model)
    moved.load_state_dict(moved_state)
    change = relative_change(answer_of(model, inputs), answer_of(moved, inputs))
    if change > RELATIVE_CHANGE:
        return f"a random transform changes the answer by {change:.1e}"
    moved_disk = alignment.apply(on_disk)
    back = alignment.inverse().apply(moved_disk)
    wrong = [name for name, tensor in on_disk.items() if not torch.equal(back[name], tensor)]
    if wrong:
        return f"the inverse does not restore {', '.join(wrong)}"
    converted = disk_state(moved)
    wrong = [name for name, tensor in converted.items() if not torch.equal(moved_disk[name], tensor)]
    if wrong:
        return f"names in memory and on disk do not move alike: {', '.join(wrong)}"
    found = match_weights(Parameters.from_state_dict(spec, on_disk), Parameters.from_state_dict(spec, moved_disk))
    restored = found.apply(moved_disk)
    wrong = [name for name, tensor in on_disk.items() if not torch.equal(restored[name], tensor)]
    if wrong:
        return (
            f"a planted transform is not recovered: cosine {found.metadata['cosine_after']:.6f}, {len(wrong)} of "
            f"{len(on_disk)} tensors differ"
        )
    return facts | {"change": change}


def reason_not_to_run(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> str | None:
    """Why a model gives no finite answer to its inputs; None if it does."""
    try:
        outputs = forward(model, inputs)
    except Exception as error:  # whatever stands in the way is the result
        return f"{type(error).__name__}: {error}"
    broken = [name for name, value in outputs.items() if not value.isfinite().any()]
    return f"no finite value in {', '.join(broken) or 'the outputs'}" if broken or not outputs else None


def kinds(spec: PermutationSpec) -> list[str]:
    """The kinds of symmetric axes, by where they stand.

    `residual` spans several layers; `heads` are the first factor of a product (heads, groups of heads or of channels);
    `within heads` the other factors; `neurons` fill a dimension of their own inside one layer, or are called so.
    """
    spans: dict[str, set[tuple[str, ...]]] = {}
    roles: dict[str, set[str]] = {}
    experts = {axis for tensor in spec.declarations for axis in tensor.name_axes}
    for tensor in spec.declarations:
        for dimension in tensor.dimensions:
            for use in axis_uses(dimension):
                spans.setdefault(use.axis, set()).add(_layer(tensor.name))
                roles.setdefault(use.axis, set()).add(_role(dimension, use))
    found = set()
    for axis in spec.symmetric_axes:
        if axis in experts or axis.split(".")[0] == "experts":
            found.add("experts")
        elif spec.origin == "hand-written" and axis.split(".")[0].endswith("neurons"):
            found.add("neurons")
        elif "first" in roles[axis]:
            found.add("heads")
        elif "inner" in roles[axis]:
            found.add("within heads")
        elif len(spans[axis]) > 1:
            found.add("residual")
        else:
            found.add("neurons")
    order = ("residual", "neurons", "heads", "within heads", "experts")
    return [kind for kind in order if kind in found]


def _role(dimension: Any, use: AxisUse) -> str:
    """Whether an axis stands first in a product, later in one, or alone."""
    match dimension:
        case Product(factors=factors):
            for place, factor in enumerate(factors):
                if any(each.axis == use.axis for each in axis_uses(factor)):
                    named_before = any(True for other in factors[:place] for _ in axis_uses(other))
                    return "inner" if named_before else "first"
        case _ if dimension != use:
            for part in getattr(dimension, "parts", ()):
                if any(each.axis == use.axis for each in axis_uses(part)):
                    return _role(part, use)
    return "alone"


def _layer(name: str) -> tuple[str, ...]:
    words = name.split(".")
    for place, word in enumerate(words):
        if word.isdigit():
            return tuple(words[: place + 1])
    return ()


def gives_features(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the answers of a model hold hidden states, going by their names."""
    return any(
        re.match(r"last_hidden_state|feature_maps|.*embeds|.*features", name) for name in answer_of(model, inputs)
    )


def has_attention(model: PreTrainedModel) -> bool:
    """Whether some part of a model is an attention module, by its name."""
    return any("attention" in type(module).__name__.lower() for module in model.modules())
