"""What two models and their merge predict, compared without labels.

The blend of the parents' logits is an ensemble, whose loss is at most the line between theirs (log-sum-exp is convex).
LLFC at the output says that the merged model is this ensemble. So its predictions stand in for labels: the barrier of
the merged model measured with them is an estimate of the true one that needs no labels.

Shape legend: n predictions (samples, or tokens of language models), c classes or vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hf_llfc.diagnostics.batch_norm import recompute_batch_norm
from hf_llfc.diagnostics.combination import CombinedModel
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.data import EvaluationData
from hf_llfc.evaluation.models import evaluation_mode, forward_logits, predictions_in

ELEMENTS_AT_ONCE = 2**22
"""Logits converted to float64 at a time; bounds the memory that a large vocabulary takes."""


@dataclass(frozen=True)
class OutputAgreement:
    """Agreement of the predictions of A, B, their merge M and their ensemble E (the blend of logits).

    Args:
        alpha: Weight of the first model.
        predictions: Number of predictions compared: samples, or tokens where the attention mask is one.
        classes: Number of classes that a prediction chooses from.
        error_barrier: Share of predictions where M differs from E, less α times that of A and 1 − α times that of B:
            the barrier of error with the ensemble's choices for labels. Negative where M is closer to E than both.
        loss_barrier: KL(E‖M) − α KL(E‖A) − (1−α) KL(E‖B), in nats: the barrier of loss with labels drawn from E.
        merged_disagreement: Share where M does not choose what E does.
        merged_divergence: KL(E‖M), in nats.
        parents_disagreement: Share where A and B choose differently.
        orphans: Share where M chooses what neither parent does.
        entropy_a: Mean entropy of the predictions of A, in nats.
        entropy_b: Mean entropy of B.
        entropy_merged: Mean entropy of M.
        spread_a: Entropy of the mean prediction of A, in nats: near 0 in a model that gives one answer to everything.
        spread_b: Entropy of the mean prediction of B.
        spread_merged: Entropy of the mean prediction of M.
    """

    alpha: float
    predictions: int
    classes: int
    error_barrier: float
    loss_barrier: float
    merged_disagreement: float
    merged_divergence: float
    parents_disagreement: float
    orphans: float
    entropy_a: float
    entropy_b: float
    entropy_merged: float
    spread_a: float
    spread_b: float
    spread_merged: float

    @property
    def information(self) -> float:
        """Information in the parents' predictions in nats: log of the classes less entropy; 0 if they are flat."""
        return math.log(self.classes) - self.alpha * self.entropy_a - (1 - self.alpha) * self.entropy_b


SUMS = (
    "merged_disagreement",
    "a_disagreement",
    "b_disagreement",
    "merged_divergence",
    "a_divergence",
    "b_divergence",
    "parents_disagreement",
    "orphans",
    "entropy_a",
    "entropy_b",
    "entropy_merged",
)


def compare_outputs(
    model_a: PreTrainedModel,
    model_b: PreTrainedModel,
    data: EvaluationData,
    *,
    alpha: float = 0.5,
    batch_norm_data: EvaluationData | None = None,
) -> OutputAgreement:
    """Compares what the merged model predicts with what its parents do, on samples without labels.

    Args:
        model_a: The model with weight α.
        model_b: The other, aligned where it should be.
        data: The samples; labels are not looked at.
        alpha: Between 0 and 1.
        batch_norm_data: Samples from which the merged model's batch normalization is recomputed.

    Raises:
        EvaluationError: The models do not fit each other or have no logits, or a logit is not finite.
    """
    with evaluation_mode(model_a, model_b):
        merged = CombinedModel((model_a, model_b))
        merged.move_to((alpha, 1 - alpha))
        if batch_norm_data is not None:
            recompute_batch_norm(merged.model, batch_norm_data.batches())
        sums, count, spread = torch.zeros(len(SUMS), dtype=torch.float64), 0, None
        for batch, sample_ids in data.batches():
            triple = [_predictions(model, batch) for model in (model_a, model_b, merged.model)]
            for name, logits_nc in zip(("first", "second", "merged"), triple, strict=True):
                if not logits_nc.isfinite().all():
                    raise EvaluationError(
                        f"logits of the {name} model are not finite (NaN or Inf) for a sample from {int(sample_ids[0])}"
                    )
            n, c = triple[0].shape
            spread = torch.zeros((3, c), dtype=torch.float64) if spread is None else spread
            step = max(1, ELEMENTS_AT_ONCE // c)
            for start in range(0, n, step):
                a_nc, b_nc, merged_nc = (logits[start : start + step].double() for logits in triple)
                part_sums, part_spread = _compare(a_nc, b_nc, merged_nc, alpha)
                sums += part_sums.cpu()
                spread += part_spread.cpu()
            count += n
    assert spread is not None, "data hold at least one sample"
    mean = dict(zip(SUMS, (sums / count).tolist(), strict=True))
    spread_a, spread_b, spread_merged = torch.special.entr(spread / count).sum(dim=1).tolist()

    def barrier(quantity: str) -> float:
        return mean[f"merged_{quantity}"] - alpha * mean[f"a_{quantity}"] - (1 - alpha) * mean[f"b_{quantity}"]

    kept = ("merged_disagreement", "merged_divergence", "parents_disagreement", "orphans")
    return OutputAgreement(
        alpha=alpha,
        predictions=count,
        classes=spread.shape[1],
        error_barrier=barrier("disagreement"),
        loss_barrier=barrier("divergence"),
        **{name: mean[name] for name in (*kept, "entropy_a", "entropy_b", "entropy_merged")},
        spread_a=spread_a,
        spread_b=spread_b,
        spread_merged=spread_merged,
    )


def _predictions(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits of everything that a batch predicts, (n, c)."""
    logits = forward_logits(model, batch)
    if logits is None:
        raise EvaluationError(f"{type(model).__name__} has no logits; a model with a task head is needed")
    return predictions_in(logits, batch)


def _compare(
    a_nc: torch.Tensor, b_nc: torch.Tensor, merged_nc: torch.Tensor, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of `SUMS` over some predictions, and the summed probabilities of A, B and the merge, (3, c)."""
    ensemble_nc = torch.lerp(b_nc, a_nc, alpha).log_softmax(-1)
    logs = {"a": a_nc.log_softmax(-1), "b": b_nc.log_softmax(-1), "merged": merged_nc.log_softmax(-1)}
    choices = {name: values.argmax(-1) for name, values in logs.items()}
    best = ensemble_nc.argmax(-1)
    values = {f"{name}_disagreement": (choice != best).double() for name, choice in choices.items()}
    probabilities_nc = ensemble_nc.exp()
    for name, log_nc in logs.items():
        values[f"{name}_divergence"] = (probabilities_nc * (ensemble_nc - log_nc)).sum(-1)
        values[f"entropy_{name}"] = -(log_nc.exp() * log_nc).sum(-1)
    values["parents_disagreement"] = (choices["a"] != choices["b"]).double()
    values["orphans"] = ((choices["merged"] != choices["a"]) & (choices["merged"] != choices["b"])).double()
    return torch.stack([values[name].sum() for name in SUMS]), torch.stack([log.exp().sum(0) for log in logs.values()])
