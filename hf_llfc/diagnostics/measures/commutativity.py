"""Commutativity of linear maps (Zhou et al., NeurIPS 2023, arXiv 2307.08286, section 5).

W_A H_A + W_B H_B = W_A H_B + W_B H_A for the weights of a map and its inputs over all samples, which are columns of H.
Measured by dist(x, y) = ‖x−y‖² / (‖x‖‖y‖) between the two sides, Dist_com, and set against the same distance between
the weights, Dist_W, and between the inputs, Dist_H: the paper finds Dist_com far below both in models that are linearly
connected, so it is neither equal weights nor equal features that makes their difference vanish.

Shape legend: l linear maps, n samples.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hf_llfc.diagnostics.features.blocks import behind_a_router, find_blocks
from hf_llfc.diagnostics.features.layers import divide, handing_over, without_padding
from hf_llfc.diagnostics.features.trial import Layer, Trial, two_copies
from hf_llfc.diagnostics.measures.linear_maps import (
    CONVOLUTIONS,
    LinearMap,
    apply_weight,
    linear_maps,
    matrix_of,
    weight_of,
)
from hf_llfc.diagnostics.rows import CommutativityRow
from hf_llfc.diagnostics.streaming import attention_mask, check_complete, check_finite
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.models import forward_logits

logger = logging.getLogger(__name__)

LISTED = 3
"""Names in a warning."""

ELEMENTS_AT_ONCE = 2**20
"""Inputs or outputs of a map in float64 at a time, whichever are more, in main memory."""

ELEMENTS_ON_DEVICE = 2**24
"""The same on an accelerator, where many small steps cost more than they save."""


@dataclass
class CommutativitySums:
    """Squared norms over the samples seen, float64.

    Args:
        sides: ‖x−y‖², ‖x‖² and ‖y‖² of the two sides, (l, 3).
        features: ‖H_A−H_B‖², ‖H_A‖² and ‖H_B‖², (l, 3).
    """

    sides: torch.Tensor
    features: torch.Tensor

    def merge(self, other: CommutativitySums) -> None:
        """Adds what another process has gathered."""
        self.sides = self.sides + other.sides
        self.features = self.features + other.features

    def cpu(self) -> CommutativitySums:
        """A copy in main memory, for other processes."""
        return CommutativitySums(self.sides.cpu(), self.features.cpu())


class Commutativity:
    """Commutativity at every linear map or convolution whose input comes from a layer before.

    Biases are no part of it. Padded tokens are zero in H. The difference of the two sides is computed as
    (W_A−W_B)(H_A−H_B), to which it is equal, so that nothing cancels; their sum is (W_A+W_B)(H_A+H_B). Maps that take
    what a router sent them (experts), whose inputs are not the same samples in both models, and weights that are no
    module of their own (fused experts) are not seen.

    Args:
        model_a: The first model, in evaluation mode.
        model_b: The second, aligned onto the first.
        batch: Any batch, for the trial run.

    Raises:
        EvaluationError: No linear map has an input from a layer before, or a weight is offloaded or not finite.
    """

    def __init__(self, model_a: PreTrainedModel, model_b: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
        self.models = model_a, model_b
        self.maps = linear_maps(model_a), linear_maps(model_b)
        self.layers = inner_maps(model_a, batch)
        if not self.layers:
            raise EvaluationError(
                f"commutativity: {type(model_a).__name__} has no linear map whose input comes from a layer before; "
                "leave commutativity out of the measures"
            )
        for layer in self.layers:
            self._weights(layer)  # those that cannot be used are named before anything runs
        zeros = torch.zeros((len(self.layers), 3), dtype=torch.float64, device=model_a.device)
        self.sums = CommutativitySums(zeros, zeros.clone())

    def add(self, batch: Mapping[str, torch.Tensor], sample_ids: torch.Tensor) -> None:
        """Runs both models on a batch."""
        model_a, model_b = self.models
        mask = attention_mask(batch, sample_ids, self.layers, model_a.device)
        inputs_a: dict[int, torch.Tensor] = {}
        measured: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(index: int, tensor: torch.Tensor) -> None:
            inputs_a[index] = tensor.clone() if self.layers[index].overwritten else tensor

        def measure(index: int, tensor: torch.Tensor) -> None:
            measured[index] = self._measure(index, inputs_a.pop(index), tensor, mask, sample_ids)

        with handing_over(model_a, self.layers, keep):
            forward_logits(model_a, batch)
        check_complete(self.layers, inputs_a)
        with handing_over(model_b, self.layers, measure):
            forward_logits(model_b, batch)
        check_complete(self.layers, measured)
        order = range(len(self.layers))
        self.sums.merge(
            CommutativitySums(
                torch.stack([measured[index][0] for index in order]),
                torch.stack([measured[index][1] for index in order]),
            )
        )

    def _measure(
        self,
        index: int,
        input_a: torch.Tensor,
        input_b: torch.Tensor,
        mask: torch.Tensor | None,
        sample_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layers[index]
        module, weight_a, weight_b = self._weights(layer)
        difference, total = weight_a - weight_b, weight_a + weight_b
        inputs = []
        for which, tensor in enumerate((input_a, input_b)):
            divided, axes = divide(tensor, layer, len(sample_ids), mask)
            divided = divided if mask is None else without_padding(divided, axes, mask)
            name = ("the first model", "the second model")[which]
            norms = torch.linalg.vector_norm(divided.flatten(1), dim=1, dtype=torch.float64)
            check_finite(norms, sample_ids, layer.label, name)
            inputs.append(divided)
        channels = inputs[0].shape[1 if isinstance(module, CONVOLUTIONS) else -1]
        widening = max(1, matrix_of(module, weight_a).shape[0] // channels)
        at_once = ELEMENTS_AT_ONCE if input_b.device.type == "cpu" else ELEMENTS_ON_DEVICE
        step = max(1, at_once // (widening * max(1, inputs[0][0].numel())))
        sides = torch.zeros(3, dtype=torch.float64, device=input_b.device)
        features = torch.zeros_like(sides)
        for start in range(0, len(sample_ids), step):
            a, b = (tensor[start : start + step].double() for tensor in inputs)
            features[1] += _squared(a)
            features[2] += _squared(b)
            a_less_b = a - b
            features[0] += _squared(a_less_b)
            apart = apply_weight(module, difference, a_less_b)
            # First twice one side, then the other, in place, as fresh memory costs more than the arithmetic.
            twice = apply_weight(module, total, a + b).add_(apart)
            sides[1] += _squared(twice) / 4
            sides[2] += _squared(twice.sub_(apart, alpha=2)) / 4
            sides[0] += _squared(apart)
        return sides, features

    def _weights(self, layer: Layer) -> tuple[LinearMap, torch.Tensor, torch.Tensor]:
        maps_a, maps_b = self.maps
        module = maps_a[layer.module]
        weights = (weight_of(maps[layer.module], layer.module, "commutativity") for maps in (maps_a, maps_b))
        weight_a, weight_b = weights
        return module, weight_a, weight_b

    def rows(self, sums: CommutativitySums) -> tuple[CommutativityRow, ...]:
        """One row per linear map, in the order in which they run."""
        rows = []
        for index, layer in enumerate(self.layers):
            _, weight_a, weight_b = self._weights(layer)
            squares = [_squared(weight_a - weight_b), _squared(weight_a), _squared(weight_b)]
            rows.append(
                CommutativityRow(
                    layer.label.removesuffix(":input"),
                    com=_distance(*sums.sides[index].tolist()),
                    weights=_distance(*(float(square) for square in squares)),
                    features=_distance(*sums.features[index].tolist()),
                )
            )
        return tuple(rows)


def inner_maps(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> tuple[Layer, ...]:
    """The inputs of all linear maps that come from a layer before and divide into samples.

    A map takes the data themselves if no module with weights has run before it, or if its input holds their values:
    then H_A = H_B, and there is nothing that could commute.

    Args:
        model: Any model that takes the batch.
        batch: A batch whose first sample is used for a trial run.
    """
    trial = Trial.run(model, batch)
    data = [value.flatten() for value in two_copies(batch).values() if value.is_floating_point()]
    maps = linear_maps(model)
    weighted = {
        name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
    }
    blocks = find_blocks(model, [call for call in trial.calls if call.side == "output"])
    layers = []
    unseen: dict[str, None] = {}
    ready = False
    for call in trial.calls:
        if call.side == "output":
            ready = ready or call.module in weighted
            continue
        if not ready or call.module not in maps:
            continue
        flat = call.tensor.flatten()
        layer = trial.layer(call)
        if any(torch.equal(flat, value.to(flat)) for value in data):
            continue
        shape = call.tensor.shape
        if layer is None or behind_a_router(call.module, shape, layer.token_axes, trial.length, blocks):
            unseen[call.module] = None
        else:
            layers.append(layer)
    if unseen:
        logger.warning(
            "%s: %d linear maps are not looked at, their inputs do not divide into samples: %s",
            type(model).__name__,
            len(unseen),
            ", ".join(list(unseen)[:LISTED]),
        )
    return tuple(layers)


def _squared(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor).square()


def _distance(between: float, one: float, other: float) -> float | None:
    """dist(x, y) = ‖x−y‖² / (‖x‖‖y‖) from squared norms; None where a side is zero, or the quotient is not finite."""
    if one == 0 or other == 0:
        return None
    distance = between / (math.sqrt(one) * math.sqrt(other))
    return distance if math.isfinite(distance) else None
