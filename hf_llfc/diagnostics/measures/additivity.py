"""Weak additivity of activation functions (Zhou et al., NeurIPS 2023, arXiv 2307.08286, section 5).

σ(αh_A + (1−α)h_B) = ασ(h_A) + (1−α)σ(h_B) for the pre-activations h of two models: with commutativity it implies LLFC.

A gated unit (SwiGLU, GEGLU, gated attention) is not a function of one pre-activation but the map (g, u) ↦ σ(g)⊙u. The
step of the paper's proof that needs additivity is then σ(ḡ)⊙ū = ασ(g_A)⊙u_A + (1−α)σ(g_B)⊙u_B with ḡ and ū the blends.
Even for linear σ this is not an identity: the two sides differ by α(1−α)(σ(g_A) − σ(g_B))⊙(u_A − u_B), so it asks that
the models differ in the gate or in what it gates, but not in both at the same place.

Shape legend: k values of alpha, l activation functions, n samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hf_llfc.diagnostics.features.activations import Activation, Event, find_activations, watching
from hf_llfc.diagnostics.features.layers import sample_vectors
from hf_llfc.diagnostics.rows import AdditivityRow
from hf_llfc.diagnostics.statistics import Distribution, cosine_distance, gram, products
from hf_llfc.diagnostics.streaming import attention_mask, check_complete, check_finite
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.models import forward_logits


@dataclass
class AdditivitySums:
    """Sums over the samples seen.

    Args:
        distance: 1 − cos of the two sides, (k, l).
        baseline: 1 − cos of the outputs of A and B, (l,).
    """

    distance: Distribution
    baseline: Distribution

    def merge(self, other: AdditivitySums) -> None:
        """Adds what another process has gathered."""
        self.distance.merge(other.distance)
        self.baseline.merge(other.baseline)

    def cpu(self) -> AdditivitySums:
        """A copy in main memory, for other processes."""
        return AdditivitySums(self.distance.cpu(), self.baseline.cpu())


@dataclass(frozen=True)
class _Inputs:
    """Inputs of one activation function in one model; `factor` only where it gates."""

    input: torch.Tensor
    factor: torch.Tensor | None
    parameters: tuple[torch.Tensor, ...]

    def blended(self, other: _Inputs, alpha: float) -> _Inputs:
        """Weight `alpha` for this model, 1 − `alpha` for the other."""

        # A sum and not `lerp`, which makes NaN of the −∞ that some routers give what they have not chosen.
        def blend(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return alpha * a + (1 - alpha) * b

        factor = None
        if self.factor is not None and other.factor is not None:
            factor = blend(self.factor, other.factor)
        pairs = zip(self.parameters, other.parameters, strict=True)
        return _Inputs(blend(self.input, other.input), factor, tuple(blend(a, b) for a, b in pairs))


class Additivity:
    """Weak additivity at every activation function that `find_activations` sees.

    A runs once per batch and its pre-activations are kept until B's are there to be blended with them. An activation
    function with weights of its own (PReLU) is evaluated with the blend of these too.

    Args:
        model_a: The model with weight α, in evaluation mode.
        model_b: The model with weight 1 − α, aligned onto the first.
        batch: Any batch, for the trial run.
        alphas: Where to measure.

    Raises:
        EvaluationError: The model has no activation function that can be seen.
    """

    def __init__(
        self,
        model_a: PreTrainedModel,
        model_b: PreTrainedModel,
        batch: Mapping[str, torch.Tensor],
        alphas: Sequence[float],
    ) -> None:
        self.models = model_a, model_b
        self.alphas = tuple(alphas)
        self.activations = find_activations(model_a, batch)
        if not self.activations:
            raise EvaluationError(
                f"additivity: {type(model_a).__name__} has no activation function that can be seen from outside; leave "
                "additivity out of the measures"
            )
        self.layers = tuple(activation.layer for activation in self.activations)
        device, count = model_a.device, len(self.activations)
        self.sums = AdditivitySums(
            Distribution.empty(len(self.alphas), count, device=device), Distribution.empty(count, device=device)
        )
        self._indices = {activation.key: index for index, activation in enumerate(self.activations)}
        self._copied = {activation.key for activation in self.activations if activation.overwritten}

    def add(self, batch: Mapping[str, torch.Tensor], sample_ids: torch.Tensor) -> None:
        """Runs both models on a batch."""
        model_a, model_b = self.models
        mask = attention_mask(batch, sample_ids, self.layers, model_a.device)
        inputs_a: dict[int, _Inputs] = {}
        distances: dict[int, torch.Tensor] = {}
        baselines: dict[int, torch.Tensor] = {}

        def keep(index: int, event: Event) -> None:
            inputs_a[index] = _wide(event)

        def measure(index: int, event: Event) -> None:
            if index not in inputs_a:
                raise EvaluationError(f"layer {self.layers[index].label!r} ran in the second model alone")
            measured = self._measure(index, event, inputs_a.pop(index), mask, sample_ids)
            distances[index], baselines[index] = measured

        self._watch(model_a, batch, keep)
        check_complete(self.layers, inputs_a)
        self._watch(model_b, batch, measure)
        check_complete(self.layers, distances)
        order = range(len(self.layers))
        numbers = sample_ids.to(model_a.device)
        self.sums.distance.add(numbers, torch.stack([distances[index] for index in order], dim=1))
        self.sums.baseline.add(numbers, torch.stack([baselines[index] for index in order]))

    def _watch(
        self, model: PreTrainedModel, batch: Mapping[str, torch.Tensor], receive: Callable[[int, Event], None]
    ) -> None:
        def complete(event: Event) -> None:
            index = self._indices.get(event.key)
            if index is not None and self.activations[index].multiplied == (event.factor is not None):
                receive(index, event)

        with watching(model, complete, self._copied):
            forward_logits(model, batch)

    def _measure(
        self,
        index: int,
        event: Event,
        a: _Inputs,
        mask: torch.Tensor | None,
        sample_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """1 − cos of both sides for every α, (k, n), and of the models' outputs, (n,)."""
        activation: Activation = self.activations[index]
        b = _wide(event)

        def output(inputs: _Inputs) -> torch.Tensor:
            result = event.run(inputs.input, inputs.parameters)
            result = result if inputs.factor is None else result * inputs.factor
            return sample_vectors(result, activation.layer, len(sample_ids), mask)

        if a.input.shape != b.input.shape:
            raise EvaluationError(
                f"layer {activation.layer.label!r} takes a tensor of shape {tuple(a.input.shape)} in the first model "
                f"and {tuple(b.input.shape)} in the second"
            )
        outputs = [output(a), output(b)]
        between = gram(outputs)
        for which, name in enumerate(("the first model", "the second model")):
            check_finite(between[which, which], sample_ids, activation.layer.label, name)
        distances = []
        for alpha in self.alphas:
            blend = torch.lerp(outputs[1], outputs[0], alpha)
            merged = output(a.blended(b, alpha))
            xx, xy, yy = products(merged, blend)
            check_finite(xx, sample_ids, activation.layer.label, f"the blend at alpha {alpha:g}")
            distances.append(cosine_distance(xx, xy, yy))
        return torch.stack(distances), cosine_distance(between[0, 0], between[0, 1], between[1, 1])

    def rows(self, sums: AdditivitySums) -> tuple[AdditivityRow, ...]:
        """One row per activation function and α."""
        distance, baseline = sums.distance.statistics(), sums.baseline.statistics()
        return tuple(
            AdditivityRow(
                activation.layer.label,
                alpha,
                distance[k * len(self.layers) + index],
                baseline[index],
                activation.gated,
            )
            for index, activation in enumerate(self.activations)
            for k, alpha in enumerate(self.alphas)
        )


def _wide(event: Event) -> _Inputs:
    """Inputs in float32 or better: the rounding of half precision would pass for a lack of additivity."""

    def wide(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    factor = None if event.factor is None else wide(event.factor)
    return _Inputs(wide(event.input), factor, tuple(wide(parameter) for parameter in event.parameters))
