"""The ways over a merge, against networks that are put together by hand."""

import copy
from itertools import combinations

import pytest
import torch

from hf_llfc.diagnostics.fold import SHARES
from hf_llfc.diagnostics.measures.measures import run_merge_measures
from hf_llfc.diagnostics.measures.subject import Subject
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation import evaluate_model
from tests.diagnostics.pairs import data_of, pair, precise


def between(model, merge, share):
    """The network that has a share of a model, the rest of the merge."""
    found = copy.deepcopy(model)
    own, other = model.state_dict(), merge.state_dict()
    found.load_state_dict({name: share * own[name] + (1 - share) * other[name] for name in own})
    return found.eval()


def star_of(family, count):
    models = pair(family)
    while len(models) < count:
        other = copy.deepcopy(models[0])
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.3 * torch.sin(17.0 * (len(models) + parameter)))
        models.append(other)
    merge = copy.deepcopy(models[0])
    with torch.no_grad():
        for parameter, *others in zip(merge.parameters(), *(model.parameters() for model in models), strict=True):
            parameter.copy_(sum(others) / count + 0.05 * torch.cos(29.0 * others[0]))
    shares = (0.5, 0.5) if count == 2 else (0.5, 0.3, 0.2)
    return Subject(tuple(models), merge.eval(), shares, shares)


@pytest.mark.parametrize(("family", "count"), [("perceptron", 2), ("perceptron", 3), ("bert", 2), ("llama-tied", 2)])
def test_barriers_are_those_of_the_networks_on_the_ways(family, count):
    subject = star_of(family, count)
    data = data_of(family, subject.models[0].config, count=7, batch_size=3)
    state = {name: tensor.clone() for name, tensor in subject.merge.state_dict().items()}
    with precise(torch.float64):
        rows = {row.models: row for row in run_merge_measures(["fold"], subject, data)["fold"]}

        def scores(model):
            result = evaluate_model(model, data)
            return result.loss, result.error

        own, merge = [scores(model) for model in subject.models], scores(subject.merge)
        ways = [{s: scores(between(model, subject.merge, s)) for s in SHARES} for model in subject.models]
    assert all(torch.equal(tensor, state[name]) for name, tensor in subject.merge.state_dict().items())
    assert list(rows) == [*((i,) for i in range(count)), *combinations(range(count), 2)]
    flat = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (*subject.models, subject.merge)]
    apart = {(a, b): float((flat[a] - flat[b]).norm()) for a, b in combinations(range(count + 1), 2)}
    mean = sum(apart[each] for each in combinations(range(count), 2)) / (count * (count - 1) / 2)
    for ends, row in rows.items():
        weights = [subject.shares[end] for end in ends]
        for kind, found in ((0, row.loss), (1, row.error)):
            ahead = sum(w * own[end][kind] for w, end in zip(weights, ends, strict=True)) / sum(weights)
            middle = merge[kind] if len(ends) == 1 else ahead
            above = [way[kind] - s * own[e][kind] - (1 - s) * middle for e in ends for s, way in ways[e].items()]
            assert found == pytest.approx(max(0, merge[kind] - middle, *above), abs=1e-9)
        length = sum(apart[end, count] for end in ends)
        assert row.length == pytest.approx(length / (mean if len(ends) == 1 else apart[ends]), rel=1e-9)


def test_a_merge_on_the_line_makes_the_way_no_longer():
    models = pair("perceptron")
    merge = between(models[0], models[1], 0.5)
    subject = Subject(tuple(models), merge, (0.5, 0.5), (0.5, 0.5))
    rows = run_merge_measures(["fold"], subject, data_of("perceptron", models[0].config))["fold"]
    assert rows[-1].length == pytest.approx(1)


def test_a_single_task_vector_has_its_base_at_the_other_end():
    models = pair("perceptron")
    subject = Subject(tuple(models), between(*models, 0.7), (1.0, 0.0), (0.7, 0.3), has_base=True)
    rows = run_merge_measures(["fold"], subject, data_of("perceptron", models[0].config))["fold"]
    assert [row.models for row in rows] == [(0,), (1,), (0, 1)]


def test_one_model_alone_is_an_error():
    model, _ = pair("perceptron")
    with pytest.raises(EvaluationError, match="fold: a way over a merge needs two models"):
        run_merge_measures(["fold"], Subject((model,), model, (1.0,), (1.0,)), data_of("perceptron", model.config))
