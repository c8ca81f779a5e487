"""Running a model on batches: which inputs it takes, where its logits are, what it scores."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_llfc.errors import EvaluationError, LLFCError
from hf_llfc.evaluation.data import EvaluationData, problems_over_processes
from hf_llfc.evaluation.scoring import ScoreSums, score_samples

if TYPE_CHECKING:
    from hf_llfc.parallel.ranks import Ranks


@dataclass(frozen=True)
class EvaluationResult:
    """What a model scores on all samples.

    Args:
        loss: Mean cross-entropy per prediction, in nats.
        error: Share of predictions that are wrong.
        metrics: Values by name.
        samples: How many samples were evaluated.
    """

    loss: float
    error: float
    metrics: Mapping[str, float]
    samples: int


def model_inputs(batch: Mapping[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The part of a batch that a model's forward pass takes, on the model's device and in its precision.

    Args:
        batch: As `EvaluationData.batches` yields it; `labels` are never passed on.
        model: Any model, a user's own included.

    Returns:
        Keyword arguments of the forward pass.
    """
    parameters = inspect.signature(model.forward).parameters
    named = [name for name in batch if name in parameters]
    takes_anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    names = named or ([name for name in batch if takes_anything])
    weight = next((weight for weight in model.parameters() if weight.is_floating_point()), None)
    inputs = {}
    for name in names:
        if name == "labels":
            continue
        value = batch[name].to(model.device)
        inputs[name] = value.to(weight.dtype) if value.is_floating_point() and weight is not None else value
    return inputs


def forward_logits(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Runs a model on a batch.

    Args:
        model: In evaluation mode.
        batch: As `EvaluationData.batches` yields it.

    Returns:
        Its logits, or None if it is a bare encoder that has none.

    Raises:
        EvaluationError: The model refuses the batch.
    """
    return logits_in(forward(model, batch))


def forward(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> Any:
    """Runs a model on a batch; see `forward_logits`.

    Returns:
        All that it gives out.
    """
    inputs: dict[str, Any] = dict(model_inputs(batch, model))
    # The cache of keys and values is for generation; here it would only take memory.
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    try:
        return model(**inputs)
    except LLFCError:
        # What a hook found wrong with the features, and no fault of the batch.
        raise
    except (IndexError, ValueError) as error:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items())
        raise EvaluationError(f"{type(model).__name__} refuses a batch ({shapes}): {error}") from error


def logits_in(output: Any) -> torch.Tensor | None:
    """The logits of what a model gives out; None if there are none."""
    if isinstance(output, ModelOutput):
        return output.get("logits")
    if isinstance(output, tuple | list):
        output = output[0]
    return output if isinstance(output, torch.Tensor) else None


def predictions_in(logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits of everything that a batch predicts, in rows: of samples, or of tokens that are no padding.

    Args:
        logits: Of the batch, classes last.
        batch: As `EvaluationData.batches` yields it.
    """
    mask = batch.get("attention_mask")
    if mask is not None and logits.shape[:-1] == mask.shape:
        return logits[mask.to(logits.device).bool()]
    return logits.reshape(-1, logits.shape[-1])


@contextmanager
def evaluation_mode(*models: PreTrainedModel) -> Iterator[None]:
    """Dropout off and no gradients inside; every module as it was afterwards."""
    training = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in training:
            module.training = was_training


def evaluate_model(
    model: PreTrainedModel,
    data: EvaluationData,
    *,
    processes: Ranks | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Loss and metrics of one model.

    Args:
        model: With a head for the task.
        data: Labelled samples.
        processes: Share the samples; every process gets the result of all.
        on_batch: Called with the samples done and all of this process; see `EvaluationData.batches`.

    Returns:
        Loss, error rate and metrics.

    Raises:
        EvaluationError: The data have no labels, the model has no logits, or a loss is not finite.
    """
    if not data.labelled:
        raise EvaluationError("loss and metrics need labels, and labels is false")
    rank, world = (0, 1) if processes is None else (processes.rank, processes.count)
    if processes is not None:
        model.to(processes.device)  # type: ignore[arg-type]  # the signature is hidden
    sums = ScoreSums()
    problem: str | None = None
    try:
        with evaluation_mode(model):
            for batch, sample_ids in data.batches(rank, world, on_batch):
                logits = forward_logits(model, batch)
                if logits is None:
                    raise EvaluationError(f"{type(model).__name__} has no logits; a model with a task head is needed")
                scores = score_samples(data.task, logits, batch["labels"].to(logits.device))
                finite = scores.loss_sums.isfinite()
                if not finite.all():
                    sample = int(sample_ids[int((~finite).nonzero()[0])])
                    raise EvaluationError(f"the loss of {type(model).__name__} is not finite for sample {sample}")
                sums.add(scores)
    except EvaluationError as error:
        problem = str(error)
    if processes is None:
        problems_over_processes([problem])
        return _result(sums, data)
    gathered = processes.gather((sums, problem))
    problems_over_processes([problem for _, problem in gathered])
    merged = ScoreSums()
    for part, _ in gathered:
        merged.merge(part)
    return _result(merged, data)


def _result(sums: ScoreSums, data: EvaluationData) -> EvaluationResult:
    return EvaluationResult(sums.loss, sums.error, sums.metrics(data.metrics, data.byte_count), sums.samples)
