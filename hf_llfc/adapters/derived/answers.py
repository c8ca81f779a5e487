"""What a forward pass is for, among all that it returns."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from hf_llfc.adapters.derived.precision import full_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Features and states that come beside an answer; a symmetry of the weights may move them.
_FEATURES = re.compile(
    r"(?!last_hidden_state$).*(hidden_states?|attentions|past_key_values|_cache|_model_output)|states?|mems|.*_params"
)

# Features that are the answer of a model without a head, and come beside the predictions of one with a head.
_BESIDE_PREDICTIONS = {"last_hidden_state", "image_embeds", "question_embeds"}
_PREDICTIONS = {"logits", "loss", "itm_score"}


def run(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Any:
    """One forward pass in evaluation mode and in the model's own precision, without a cache.

    Models that draw random numbers draw the same ones every time.
    """
    arguments = inspect.signature(model.forward).parameters
    options = {name: value for name, value in (("use_cache", False), ("return_dict", True)) if name in arguments}
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]), full_precision(model.dtype):
        torch.manual_seed(0)
        return model(**inputs, **options)


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
