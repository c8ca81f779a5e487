"""The straight line between the weights of two models, walked by a third."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from hf_llfc.errors import EvaluationError, raise_all


class WeightPath:
    """A model whose weights are αA + (1−α)B, moved along in place.

    Floating-point buffers, running statistics of batch normalization among them, are interpolated like weights.
    Integer buffers that are equal stay; a counter of batches takes the larger value; others are an error.

    Args:
        model_a: Where α = 1.
        model_b: Where α = 0; of the same architecture, on the same device.

    Raises:
        EvaluationError: The models do not have the same tensors.
    """

    def __init__(self, model_a: PreTrainedModel, model_b: PreTrainedModel) -> None:
        tensors_a, tensors_b = _tensors(model_a), _tensors(model_b)
        raise_all(_differences(tensors_a, tensors_b), EvaluationError, "no path between the two models")
        self.model = copy.deepcopy(model_a).eval().requires_grad_(False)
        merged = _tensors(self.model)
        self._triples = []
        with torch.no_grad():
            for name, target in merged.items():
                if target.is_floating_point():
                    self._triples.append((target, tensors_a[name], tensors_b[name]))
                elif name.endswith("num_batches_tracked"):
                    target.copy_(torch.maximum(tensors_a[name], tensors_b[name]))
        self._buffers = dict(self.model.named_buffers())

    @torch.no_grad()
    def move_to(self, alpha: float, buffers: Mapping[str, torch.Tensor] | None = None) -> None:
        """Sets the weights.

        Args:
            alpha: Weight of the first model.
            buffers: Values that belong to this α and replace the interpolated ones, by name.
        """
        for target, a, b in self._triples:
            torch.lerp(b.detach(), a.detach(), alpha, out=target)
        for name, value in (buffers or {}).items():
            self._buffers[name].copy_(value)


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All parameters and buffers by name, each once however many names it has."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _differences(tensors_a: Mapping[str, torch.Tensor], tensors_b: Mapping[str, torch.Tensor]) -> list[str]:
    problems = [f"tensor {name} is missing in the second model" for name in tensors_a if name not in tensors_b]
    problems += [f"tensor {name} is missing in the first model" for name in tensors_b if name not in tensors_a]
    for name, a in tensors_a.items():
        b = tensors_b.get(name)
        if b is None:
            continue
        if a.shape != b.shape:
            problems.append(
                f"tensor {name} has shape {tuple(a.shape)} in the first model and {tuple(b.shape)} in the second"
            )
        elif a.dtype != b.dtype:
            problems.append(f"tensor {name} is {a.dtype} in the first model and {b.dtype} in the second")
        elif not a.is_floating_point() and not name.endswith("num_batches_tracked") and not torch.equal(a, b):
            problems.append(f"integer tensor {name} differs between the models and cannot be interpolated")
    return problems
