"""What a forward pass is for, among all that it returns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

# Features and states that come beside an answer; a symmetry of the weights may move them.
_FEATURES = re.compile(
    r"(?!last_hidden_state$).*(hidden_states?|attentions|past_key_values|_cache|_model_output)|states?|mems|.*_params"
)

# Features that are the answer of a model without a head, and come beside the predictions of one with a head.
_BESIDE_PREDICTIONS = {"last_hidden_state", "image_embeds", "question_embeds"}
_PREDICTIONS = {"logits", "loss", "itm_score"}


def answers(output: Any) -> dict[str, Tensor]:
    """The floating-point tensors that a model gives as its answer.

    Args:
        output: What its forward pass returned.

    Returns:
        Name and place → tensor: predictions of a model with a head, features of one without.
    """
    named: dict[str, Any] = dict(output.items()) if isinstance(output, Mapping) else {"output": output}
    beside = {name for name in named if _FEATURES.fullmatch(name)}
    if _PREDICTIONS & named.keys():
        beside |= _BESIDE_PREDICTIONS & named.keys()
    return _tensors({name: value for name, value in named.items() if name not in beside}) or _tensors(named)


def _tensors(named: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        f"{name}.{place}": tensor
        for name, value in named.items()
        for place, tensor in enumerate(tree_flatten(value)[0])
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    }
