"""Which weights a merge should have: found on one half of the samples, and judged on the other.

The loss of a merge is a function of its weights alone, Σ wₘθₘ, whose gradient one backward pass gives: for one weight a
model, or for one weight a model and layer (as in AdaMerging, Yang et al., ICLR 2024, with labels or the parents'
predictions in place of the entropy).

Shape legend: g groups of tensors, m models, n samples, c classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from hf_llfc.diagnostics.rows import Suggestion
from hf_llfc.diagnostics.streaming import IN_ONE_PROCESS, Execution
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.data import EvaluationData
from hf_llfc.evaluation.encoding import IGNORED_LABEL
from hf_llfc.evaluation.models import evaluation_mode, forward_logits
from hf_llfc.foundation.progress import Progress
from hf_llfc.recipe.data import CLASSIFICATION_TASKS

STEPS = 60
"""Steps of gradient descent, one batch each."""

STEP_SIZE = 0.1
"""Step size of Adam on the logarithms of the weights: a few steps lead from equal weights to a vertex, one does not."""

RESAMPLES = 1000
"""Resamples of the bootstrap over held-out samples."""

NEGLIGIBLE_GAIN = 1e-3
"""Gain in nats below which weights are kept as they are."""

OTHER = ""
"""The group of all tensors outside the layers: embeddings, heads."""


def suggest_weights(
    models: Sequence[PreTrainedModel],
    data: EvaluationData,
    *,
    reference: Sequence[float],
    layers: Sequence[str] = (),
    execution: Execution = IN_ONE_PROCESS,
) -> Suggestion:
    """Looks for weights that beat those asked for.

    Batches take turns: the even ones choose the weights, the odd ones judge them. With labels the loss is the
    cross-entropy; without them it is that to the mean of the models' own predictions, which a merge that is the
    blend of its parents would reproduce.

    Args:
        models: Two or more in the coordinates of one, on one device.
        data: The samples, of at least two batches.
        reference: The weights to beat, one a model.
        layers: Names of modules that may each have weights of their own; one set of weights for all where empty.
        execution: Processes that share the batches that judge, all taking the same steps; and progress.

    Returns:
        The weights with the lower loss on held-out samples: those found, or the reference where these do not lose.

    Raises:
        EvaluationError: There are fewer than two batches, or the models have no logits.
    """
    if data.batch_count() < 2:
        raise EvaluationError(
            "a suggestion needs two batches, one to choose weights on and one to judge them; give more samples or a "
            "smaller batch_size"
        )
    with evaluation_mode(*models), _batch_statistics(*models):
        blend = _Blend(models, layers)
        chosen_gm = _chosen(models, blend, data, reference, execution.progress)
        processes, (rank, count) = execution.processes, execution.share
        if processes is not None:
            # Devices may differ in rounding.
            chosen_gm = processes.gather(chosen_gm.cpu())[0].to(chosen_gm.device)
        asked_gm = torch.tensor(reference, dtype=torch.float32, device=chosen_gm.device).expand_as(chosen_gm)
        judged: dict[int, list[Tensor]] = {}
        for index, batch in enumerate(_every_other(data, 1)):
            if index % count == rank:
                targets = _targets(models, data, batch)
                losses = [_losses(blend.logits(shares_gm, batch), targets, data) for shares_gm in (chosen_gm, asked_gm)]
                judged[index] = [loss_n.double().cpu() for loss_n in losses]
    if processes is not None:
        judged = {index: pair for part in processes.gather(judged) for index, pair in part.items()}
    suggested, before = (torch.cat([judged[index][which] for index in sorted(judged)]) for which in range(2))
    low, high = _interval(before - suggested)
    loss, reference_loss = float(suggested.mean()), float(before.mean())
    kind = "cross-entropy" if data.labelled else "cross-entropy to the parents' mean prediction"
    compared = f"{kind} on {len(before)} held-out samples: {loss:.4f} against {reference_loss:.4f} nats"
    if low < NEGLIGIBLE_GAIN:
        return Suggestion(
            f"keep the weights: the best found are no surer ({compared}, gain {low:.4f} to {high:.4f})",
            reference_loss,
            reference_loss,
            (0.0, 0.0),
            tuple(float(weight) for weight in reference),
        )
    rounded = [[round(float(weight), 4) for weight in row] for row in chosen_gm]
    because = f"{compared}, a gain of {low:.4f} to {high:.4f}"
    if not layers:
        return Suggestion(because, loss, reference_loss, (low, high), tuple(rounded[0]))
    weights = {group: tuple(row) for group, row in zip(blend.groups, rounded, strict=True)}
    return Suggestion(because, loss, reference_loss, (low, high), layer_weights=weights)


def _chosen(
    models: Sequence[PreTrainedModel],
    blend: _Blend,
    data: EvaluationData,
    reference: Sequence[float],
    progress: Progress,
) -> Tensor:
    """The shares, (g, m), that descent on the loss of the choosing half finds from the reference."""
    start = torch.tensor([float(weight) for weight in reference], device=models[0].device).clamp(min=1e-3)
    scores = (start / start.sum()).log().repeat(len(blend.groups), 1).requires_grad_(True)
    optimizer = torch.optim.Adam([scores], lr=STEP_SIZE)
    step = 0
    while step < STEPS:
        for batch in _every_other(data, 0):
            targets = _targets(models, data, batch)
            with torch.enable_grad():
                optimizer.zero_grad()
                _losses(blend.logits(scores.softmax(dim=-1), batch), targets, data).mean().backward()
            optimizer.step()
            step += 1
            progress("looking for weights", step, STEPS)
            if step == STEPS:
                break
    return scores.detach().softmax(dim=-1)


class _Blend:
    """A model that is computed from the weights of others, so that gradients reach the shares.

    Args:
        models: With equal tensors.
        layers: Modules whose tensors are a group each.
    """

    def __init__(self, models: Sequence[PreTrainedModel], layers: Sequence[str]) -> None:
        self._run = _Logits(models[0])
        self.groups = (*layers, OTHER)
        states = [{**dict(model.named_parameters()), **dict(model.named_buffers())} for model in models]
        self._tensors = {
            name: [state[name].detach() for state in states]
            for name, tensor in states[0].items()
            if tensor.is_floating_point()
        }
        self._group = {name: self._group_of(name) for name in self._tensors}

    def _group_of(self, name: str) -> int:
        inside = [index for index, layer in enumerate(self.groups[:-1]) if name.startswith(f"{layer}.")]
        return inside[0] if inside else len(self.groups) - 1

    def logits(self, shares_gm: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits of the model with these shares."""
        tensors = {
            name: sum(
                (share.to(part.dtype) * part for share, part in zip(shares_gm[self._group[name]], parts, strict=True)),
                start=torch.zeros((), dtype=parts[0].dtype, device=parts[0].device),
            )
            for name, parts in self._tensors.items()
        }

        logits = functional_call(self._run, {f"model.{name}": tensor for name, tensor in tensors.items()}, (batch,))
        if logits is None:
            raise EvaluationError(f"{type(self._run.model).__name__} has no logits, so no weights can be suggested")
        assert isinstance(logits, Tensor)
        return logits


class _Logits(nn.Module):
    """A model as a function from a batch to logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        return forward_logits(self.model, batch)


@dataclass(frozen=True)
class _Targets:
    """Answers that a merge should give.

    Args:
        values: Classes, (n, t) int64, or the models' mean probabilities, (n, t, c).
        present: Where something is predicted, (n, t); t is 1 for classification.
    """

    values: Tensor
    present: Tensor


def _targets(models: Sequence[PreTrainedModel], data: EvaluationData, batch: Mapping[str, Tensor]) -> _Targets:
    device = models[0].device
    single = data.task in CLASSIFICATION_TASKS
    if data.labelled:
        labels = batch["labels"].to(device)
        labels = labels[:, None] if single else _shifted(labels, data.task)
        return _Targets(labels.clamp(min=0), labels != IGNORED_LABEL)
    answers = [forward_logits(model, batch) for model in models]
    mean = torch.stack([answer.float().softmax(dim=-1) for answer in answers if answer is not None]).mean(dim=0)
    if single:
        return _Targets(mean[:, None], mean.new_ones(len(mean), 1, dtype=torch.bool))
    mask = batch["attention_mask"].to(device) if "attention_mask" in batch else torch.ones_like(mean[..., 0])
    if data.task == "text-generation":
        # What the last token predicts is not in the text, and would not be judged with labels either.
        return _Targets(mean[:, :-1], _shifted(mask, data.task) != 0)
    return _Targets(mean, mask != 0)


def _shifted(labels: Tensor, task: str) -> Tensor:
    return labels[:, 1:] if task == "text-generation" else labels


def _losses(logits: Tensor, targets: _Targets, data: EvaluationData) -> Tensor:
    """Mean cross-entropy of every sample that predicts something, in nats."""
    if data.task in CLASSIFICATION_TASKS:
        logits = logits[:, None]
    elif data.task == "text-generation":
        logits = logits[:, :-1]
    chances = logits.float().log_softmax(dim=-1)
    if targets.values.is_floating_point():
        losses = -(targets.values * chances).sum(dim=-1)
    else:
        losses = -chances.gather(-1, targets.values[..., None])[..., 0]
    count = targets.present.sum(dim=-1)
    return ((losses * targets.present).sum(dim=-1) / count.clamp(min=1))[count > 0]


def _every_other(data: EvaluationData, first: int) -> Iterator[Mapping[str, Tensor]]:
    for index, (batch, _) in enumerate(data.batches()):
        if index % 2 == first:
            yield batch


def _interval(gains: Tensor) -> tuple[float, float]:
    """The bootstrapped 95 % interval of the mean gain."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(gains), (RESAMPLES, len(gains)), generator=generator)
    means = gains.cpu()[drawn].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


@contextmanager
def _batch_statistics(*models: nn.Module) -> Iterator[None]:
    """Inside, batch normalization takes the statistics of each batch: combined ones do not belong to the weights."""
    layers = [module for model in models for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [(layer.running_mean, layer.running_var) for layer in layers]
    for layer in layers:
        layer.running_mean = layer.running_var = None
    try:
        yield
    finally:
        for layer, (mean, variance) in zip(layers, before, strict=True):
            layer.running_mean, layer.running_var = mean, variance
