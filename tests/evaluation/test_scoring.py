import math

import pytest
import torch

from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.scoring import ScoreSums, score_samples
from tests.tiny_models import FullDouble, tiny_inputs, tiny_model

TASKS = [
    ("text-classification", "bert", "sequence-classification"),
    ("fill-mask", "bert", "masked-lm"),
    ("text-generation", "llama", "causal-lm"),
]


def logits_and_labels(task, family, head):
    """Logits of a tiny model in float64 and labels for them, some of which are not predicted."""
    model = tiny_model(family, head, dtype=torch.float64)
    inputs = tiny_inputs(model)
    generator = torch.Generator().manual_seed(1)
    if task == "text-classification":
        labels = torch.randint(model.config.num_labels, (3,), generator=generator)
    else:
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        if task == "fill-mask":
            labels[torch.rand(labels.shape, generator=generator) < 0.7] = -100
    with torch.no_grad(), FullDouble():
        output = model(**inputs, labels=labels)
    return output.logits, labels, float(output.loss)


@pytest.mark.parametrize(("task", "family", "head"), TASKS)
def test_the_loss_is_that_of_transformers(task, family, head):
    logits, labels, loss = logits_and_labels(task, family, head)
    sums = ScoreSums()
    sums.add(score_samples(task, logits, labels))
    # transformers computes its loss in float32 at best.
    assert sums.loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(("task", "family", "head"), TASKS)
@pytest.mark.parametrize("chunk", [1, 100, 2**24])
def test_every_sample_counts_what_it_predicts(task, family, head, chunk, monkeypatch):
    monkeypatch.setattr("hf_llfc.evaluation.predicted.ELEMENTS_AT_ONCE", chunk)
    logits, labels, _ = logits_and_labels(task, family, head)
    scores = score_samples(task, logits, labels)
    for sample in range(3):
        rows, truth = logits[sample], labels[sample]
        if task == "text-classification":
            rows, truth = rows[None], truth[None]
        elif task == "text-generation":
            rows, truth = rows[:-1], truth[1:]
        loss = count = correct = 0
        for row, label in zip(rows.tolist(), truth.tolist(), strict=True):
            if label == -100:
                continue
            loss += math.log(sum(map(math.exp, row))) - row[label]
            count += 1
            correct += row.index(max(row)) == label
        assert scores.counts[sample] == count
        assert scores.correct[sample] == correct
        assert scores.loss_sums[sample].item() == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize(
    ("task", "logits", "labels"),
    [
        ("fill-mask", (3, 5), (3, 11)),  # a model for sequence classification
        ("text-classification", (3, 11, 5), (3,)),  # one for token classification
        ("text-classification", (3, 2), (3,)),  # one with fewer classes
        ("text-generation", (3, 11, 5), (3, 11)),  # a token classifier again: classes are no tokens
    ],
)
def test_a_model_for_another_task_is_refused(task, logits, labels):
    with pytest.raises(EvaluationError, match=f"no head for {task}"):
        score_samples(task, torch.zeros(logits), torch.full(labels, 7))


def test_padding_never_counts():
    logits, labels, _ = logits_and_labels("text-generation", "llama", "causal-lm")
    scores = score_samples("text-generation", logits, labels)
    longer = torch.cat([logits, torch.full_like(logits, math.nan)], dim=1)
    padded = torch.cat([labels, torch.full_like(labels, -100)], dim=1)
    again = score_samples("text-generation", longer, padded)
    assert torch.equal(scores.loss_sums, again.loss_sums)
    assert torch.equal(scores.counts, again.counts)


def test_sums_of_parts_are_the_sums_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(31, 4, generator=generator)
    labels = torch.randint(4, (31,), generator=generator)
    whole, first, second = ScoreSums(), ScoreSums(), ScoreSums()
    whole.add(score_samples("image-classification", logits, labels))
    first.add(score_samples("image-classification", logits[:7], labels[:7]))
    second.add(score_samples("image-classification", logits[7:20], labels[7:20]))
    second.add(score_samples("image-classification", logits[20:], labels[20:]))
    first.merge(second)
    assert first.loss == pytest.approx(whole.loss, rel=1e-14)
    assert first.confusion == whole.confusion
    assert (first.samples, first.count, first.correct) == (whole.samples, whole.count, whole.correct)
    predicted = logits.argmax(dim=-1)
    assert whole.error == pytest.approx((predicted != labels).double().mean().item())
    assert whole.confusion[2, 3] == ((labels == 2) & (predicted == 3)).sum()
