"""What learned matching minimises: the loss of the task at the merge, or, without labels, the LLFC gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from hf_llfc.diagnostics.features.layers import handing_over, sample_vectors
from hf_llfc.diagnostics.features.trial import LOGITS, Layer
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.models import forward_logits
from hf_llfc.evaluation.scoring import task_loss

Weights = Mapping[str, Tensor]


class TaskLoss:
    """The loss of the merge, from labels."""

    def __init__(self, model: PreTrainedModel, task: str) -> None:
        """Runs weights in a model.

        Args:
            model: A model of the class of all; its own weights are not used. Without dropout, and with the statistics
                of each batch in place of running ones, since those of the merge are neither parent's (REPAIR).
            task: A value of `TASKS`.
        """
        self._run = _Run(model)
        self._task = task

    def __call__(
        self, of_a: Weights, of_b: Weights, merged: Weights, share: float, batch: Mapping[str, Tensor]
    ) -> Tensor:
        """Mean cross-entropy of the merge, in nats."""
        logits = self._run(merged, batch)
        if logits is None:
            raise EvaluationError(f"{self._run.name} has no logits; learned matching with labels needs a task head")
        return task_loss(self._task, logits, batch["labels"].to(logits.device))


class LLFCGap:
    """Distance of the features of the merge from the blend of its parents' features.

    Mean over layers of ‖h_merge − (1 − λ)·h_A − λ·h_B‖² / (½‖h_A‖² + ½‖h_B‖²): zero where the features of all layers
    connect linearly (Zhou et al. 2023, LLFC).
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[Layer]) -> None:
        """Compares layers of weights that run in a model.

        Args:
            model: A model of the class of all; see `TaskLoss`.
            layers: Layers as `select_layers` gives them.
        """
        self._run = _Run(model)
        self._layers = layers

    def __call__(
        self, of_a: Weights, of_b: Weights, merged: Weights, share: float, batch: Mapping[str, Tensor]
    ) -> Tensor:
        """The gap on a batch."""
        with torch.no_grad():
            features_a = self._features(of_a, batch)
        features_b, features = self._features(of_b, batch), self._features(merged, batch)
        gaps = []
        for a, b, merge in zip(features_a, features_b, features, strict=True):
            size = (a.square().sum() + b.square().sum()) / 2
            gaps.append((merge - torch.lerp(a, b, share)).square().sum() / size.clamp_min(torch.finfo(size.dtype).tiny))
        return torch.stack(gaps).mean()

    def _features(self, weights: Weights, batch: Mapping[str, Tensor]) -> list[Tensor]:
        seen: dict[int, Tensor] = {}
        with handing_over(self._run.model, self._layers, seen.__setitem__):
            logits = self._run(weights, batch)
        indices = [index for index, layer in enumerate(self._layers) if layer.side == LOGITS]
        if logits is not None:
            seen |= dict.fromkeys(indices, logits)
        mask = batch.get("attention_mask")
        n = len(next(iter(batch.values())))
        mask = mask.to(next(iter(seen.values())).device) if mask is not None else None
        return [sample_vectors(seen[index], layer, n, mask) for index, layer in enumerate(self._layers)]


class _Run:
    """Runs any weights in one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        self.name = type(model).__name__
        self._forward = _Forward(model)

    def __call__(self, weights: Weights, batch: Mapping[str, Tensor]) -> Tensor | None:
        # Copies, because running statistics are written to.
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        inside = {f"model.{name}": value for name, value in {**buffers, **weights}.items()}
        logits: Tensor | None = functional_call(self._forward, inside, (batch,))
        return logits


class _Forward(nn.Module):
    """A model whose forward pass takes a batch as it comes."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        return forward_logits(self.model, batch)
