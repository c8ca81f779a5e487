"""The samples that carry the barrier, against losses of every sample run alone."""

import copy

import pytest
import torch

from hf_llfc.diagnostics import diagnose_models
from hf_llfc.diagnostics.points import arithmetic, judged_point, line, parents_shares, simplex
from hf_llfc.evaluation.models import forward_logits
from hf_llfc.evaluation.scoring import score_samples
from tests.diagnostics.pairs import data_of, pair, precise


def expected_of(models, shares, weights, data):
    """Excess of every sample with the losses and answers of all models and of the merge."""
    merge = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    merge.load_state_dict(
        {name: sum(w * state[name] for w, state in zip(weights, states, strict=True)) for name in states[0]}
    )
    found = {}
    for position, sample in enumerate(data.sample_ids.tolist()):
        batch = data.encode(torch.tensor([position]).numpy())
        with torch.no_grad(), precise(torch.float64):
            scores = [score_samples(data.task, forward_logits(m, batch), batch["labels"]) for m in (*models, merge)]
        losses = [float(each.loss_sums) for each in scores]
        excess = losses[-1] - sum(share * loss for share, loss in zip(shares, losses, strict=False))
        found[sample] = excess, [loss / int(scores[0].counts) for loss in losses], scores
    return found


@pytest.mark.parametrize(
    ("family", "region", "count"),
    [
        ("perceptron", line([0.5]), 2),
        ("perceptron", simplex([0.2, 0.3, 0.5]), 3),
        ("perceptron", arithmetic([0.7, -0.2]), 3),
        ("llama-tied", line([0.5]), 2),
    ],
)
def test_the_ten_worst_samples_are_listed(family, region, count):
    models = [*pair(family), pair(family)[1]][:count]
    if count == 3:
        with torch.no_grad():
            for parameter in models[2].parameters():
                parameter.mul_(-0.5)
    data = data_of(family, models[0].config, count=23, batch_size=4)
    with precise(torch.float64):
        report = diagnose_models(models, data, region=region)
    shares, weights = parents_shares(region), judged_point(region).weights
    expected = expected_of(models, shares, weights, data)
    worst = sorted((s for s in expected if expected[s][0] > 0), key=lambda s: -expected[s][0])[:10]
    assert worst and [row.sample for row in report.samples] == worst
    total = sum(excess for excess, *_ in expected.values())
    for row in report.samples:
        excess, losses, scores = expected[row.sample]
        assert [*row.losses, row.loss] == pytest.approx(losses, rel=1e-9)
        assert row.share == (pytest.approx(excess / total, rel=1e-9) if total > 0 else None)
        if scores[0].predictions is None:
            assert (row.label, row.answer, row.answers) == (None, None, ())
        else:
            names = [str(models[0].config.id2label[int(each.predictions)]) for each in scores]
            assert [*row.answers, row.answer] == names
            assert row.label == models[0].config.id2label[int(scores[0].references)]


def test_shares_are_those_of_what_is_added():
    assert parents_shares(line([0.25])) == (0.25, 0.75)
    assert parents_shares(simplex([1, 1, 2])) == (0.25, 0.25, 0.5)
    assert parents_shares(arithmetic([0.6, 0.2])) == pytest.approx((0.75, 0.25, 0.0))
    assert parents_shares(arithmetic([0.6, -0.2])) == (1.0, 0.0, 0.0)
    assert parents_shares(arithmetic([-0.6, -0.2])) == (0.5, 0.5, 0.0)


def test_nothing_is_listed_without_labels():
    models = pair("perceptron")
    assert diagnose_models(models, data_of("perceptron", models[0].config, labels=False)).samples == ()
