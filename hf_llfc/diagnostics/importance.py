"""How much the predictions of a model depend on each of its parameters: what importance-weighted merging counts by.

Two importances, both from the gradient g of a sample's loss with respect to a parameter θ, averaged over samples:

    fisher     g²       diagonal of the Fisher information; Matena and Raffel, NeurIPS 2022, arXiv:2111.09832
    feedback   |θ g|    the parameter's share in the reward o ⊙ (onehot − softmax(o)) that the ε-rule sends back, layer
                        by layer; in piecewise linear networks that is gradient times weight; Weber et al.,
                        arXiv:2308.12053
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from numpy.random import SeedSequence
from torch import Tensor
from transformers import PreTrainedModel

from hf_llfc.checkpoints import state_dict_on_disk
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation import EvaluationData, forward_logits
from hf_llfc.evaluation.encoding import IGNORED_LABEL
from hf_llfc.evaluation.scoring import score_samples, task_loss
from hf_llfc.recipe.data import CLASSIFICATION_TASKS

IMPORTANCES = ("fisher", "feedback")


def measure_importance(
    model: PreTrainedModel,
    data: EvaluationData,
    kind: str,
    *,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """The importance of every parameter of a model.

    Gradients and importances take twice the memory of the model in float32; a sample at a time is run.

    Args:
        model: With a head for the task; it is converted to float32, and its weights are replaced: give a model that is
            not used afterwards.
        data: Samples. Where they have no labels, each sample has labels drawn from what the model predicts, by the
            data's seed and the sample's id, as Fisher's information is defined.
        kind: One of `IMPORTANCES`.
        on_batch: Called with the samples done and all; see `EvaluationData.batches`.

    Returns:
        Name on disk → importance, not negative, float32, in the shape of the tensor; zero for statistics that are no
        parameters.

    Raises:
        EvaluationError: The model has no head for the task, or a gradient is not finite.
    """
    assert kind in IMPORTANCES
    model.eval().float().requires_grad_(True)
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    sums = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
    count = 0
    for batch, sample_ids in data.batches(on_batch=on_batch):
        for gradients in sample_gradients(model, data, parameters, batch, sample_ids.tolist()):
            for total, parameter, gradient in zip(sums, parameters, gradients, strict=True):
                if gradient is None:
                    continue
                if kind == "fisher":
                    total.addcmul_(gradient, gradient)
                else:
                    total.add_((gradient * parameter.detach()).abs_())
            count += 1
    # The conversion between names in memory and on disk is that of the model's weights, whose place the sums take.
    with torch.no_grad():
        for parameter, total in zip(parameters, sums, strict=True):
            if not total.isfinite().all():
                raise EvaluationError(f"{model.name_or_path or type(model).__name__}: a gradient is not finite")
            parameter.copy_(total.div_(count))
        for buffer in model.buffers():
            buffer.zero_()
    state = state_dict_on_disk(model)
    return {name: tensor.detach() for name, tensor in state.items() if tensor.is_floating_point()}


def sample_gradients(
    model: PreTrainedModel,
    data: EvaluationData,
    parameters: Sequence[Tensor],
    batch: Mapping[str, Tensor],
    sample_ids: Sequence[int],
) -> Iterator[tuple[Tensor | None, ...]]:
    """The gradients of every sample's loss with respect to some parameters, None where one plays no part.

    Args:
        model: With a head for the task.
        data: Says how outputs are scored; without labels these are drawn.
        parameters: Of the model; they require gradients.
        batch: The samples.
        sample_ids: Their numbers.
    """
    for sample_id, sample in zip(sample_ids, _samples(batch), strict=True):
        loss = _loss_sum(model, data, sample, sample_id)
        yield torch.autograd.grad(loss, parameters, allow_unused=True)


def _samples(batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The samples of a batch, each a batch of its own."""
    for index in range(len(next(iter(batch.values())))):
        yield {name: tensor[index : index + 1] for name, tensor in batch.items()}


def _loss_sum(model: PreTrainedModel, data: EvaluationData, sample: dict[str, Tensor], sample_id: int) -> Tensor:
    """The cross-entropy of one sample, summed over what it predicts."""
    logits = forward_logits(model, sample)
    if logits is None:
        raise EvaluationError(f"{type(model).__name__} has no logits; a model with a task head is needed")
    labels = sample["labels"].to(logits.device) if data.labelled else _drawn(data, sample, logits, sample_id)
    count = score_samples(data.task, logits.detach(), labels).counts.sum()
    return task_loss(data.task, logits, labels) * count


def _drawn(data: EvaluationData, sample: Mapping[str, Tensor], logits: Tensor, sample_id: int) -> Tensor:
    """Labels drawn from what the model predicts, by seed and sample."""
    if data.task == "fill-mask":
        raise EvaluationError("importance: fill-mask predicts the tokens that it masks; leave labels: false out")
    generator = torch.Generator().manual_seed(int(SeedSequence([data.config.seed, sample_id]).generate_state(1)[0]))
    probabilities = logits.detach().double().cpu().softmax(dim=-1).flatten(0, -2)
    drawn = torch.multinomial(probabilities, 1, generator=generator).view(logits.shape[:-1]).to(logits.device)
    if data.task in CLASSIFICATION_TASKS:
        return drawn
    if data.task == "text-generation":  # the label of a position is predicted at the one before
        drawn = drawn.roll(1, dims=-1)
    mask = sample.get("attention_mask")
    return drawn if mask is None else drawn.masked_fill(mask.to(drawn.device) == 0, IGNORED_LABEL)
