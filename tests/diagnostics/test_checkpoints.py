"""Diagnoses of checkpoints: parents moved, references and weights told, the region chosen, broken blocks found."""

import pytest
import torch

from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.diagnostics import diagnose_models
from hf_llfc.diagnostics.checkpoints import broken_tensors, diagnose_checkpoints, module_layers, region_of
from hf_llfc.diagnostics.diagnose import Features
from hf_llfc.diagnostics.points import line
from hf_llfc.diagnostics.streaming import Execution
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation import EvaluationConfig
from hf_llfc.parents.parent import Parent
from hf_llfc.recipe import DiagnoseSection
from hf_llfc.symmetry import PermutationSpec
from tests.diagnostics.oracle import measure
from tests.diagnostics.test_diagnose import data_for, samples_of
from tests.tiny_models import tiny_model

BLOCKS = ("model.layers.0", "model.layers.1")
ALPHAS = (0.0, 0.25, 0.5, 1.0)


def section_of(**changes) -> DiagnoseSection:
    return DiagnoseSection(EvaluationConfig("text-generation", "data"), ALPHAS, **changes)


@pytest.fixture
def models():
    return [tiny_model("llama", "causal-lm", seed) for seed in range(3)]


@pytest.fixture
def data(models):
    return data_for("text-generation", models[0].config, count=6, batch_size=3)


def parents_of(models) -> list[Parent]:
    return [Parent(open_checkpoint(model)) for model in models]


def merged_loss(models, weights, data) -> float:
    """The mean loss per predicted token of Σ wθ, by the loss of transformers itself."""
    states = [model.state_dict() for model in models]
    merged = tiny_model("llama", "causal-lm")
    merged.load_state_dict(
        {
            name: sum(weight * state[name].double() for weight, state in zip(weights, states, strict=True)).float()
            for name in states[0]
        }
    )
    losses, counts = [], []
    with torch.no_grad():
        for inputs, labels in samples_of(data, torch.float32):
            losses.append(float(merged(**inputs, labels=labels[None]).loss))
            counts.append(int((labels[1:] != -100).sum()))
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def test_a_moved_parent_is_measured_where_it_was_brought_back_to(models, data):
    """Planted: B in other coordinates, with the alignment that brings it back, is diagnosed as B itself."""
    a, b, _ = models
    spec = PermutationSpec.from_config(b.config)
    planted = spec.random_alignment(torch.Generator().manual_seed(4))
    moved = tiny_model("llama", "causal-lm", 1)
    moved.load_state_dict(planted.apply(b.state_dict()))
    back = planted.inverse().with_metadata(method="weight_matching")
    parents = [Parent(open_checkpoint(a)), Parent(open_checkpoint(moved), back)]
    report = diagnose_checkpoints(parents, data, section_of(), weights=[0.25, 0.75])
    oracle = measure(a, b, samples_of(data, torch.float32), BLOCKS, ALPHAS, "text-generation")
    assert report.layer_names == (*BLOCKS, "logits") and report.alphas == ALPHAS
    for row in report.layers:
        assert row.llfc.mean == pytest.approx(oracle.llfc[row.layer, row.alpha][0], abs=1e-6)
        assert row.baseline.mean == pytest.approx(oracle.baseline[row.layer][0], abs=1e-6)
    assert {point.alpha: point.loss for point in report.path} == pytest.approx(oracle.losses, abs=1e-5)
    assert [model.weight for model in report.models] == [0.25, 0.75]
    assert [model.id for model in report.models] == [parent.checkpoint.id for parent in parents]
    assert report.alignment["method"] == "weight_matching"


def test_three_models_are_measured_at_their_merge(models, data):
    weights = (0.2, 0.3, 0.5)
    report = diagnose_checkpoints(parents_of(models), data, section_of(), weights=weights)
    assert report.region == "simplex" and report.alignment == {}
    by_name = {point.name: point for point in report.path}
    assert by_name["merge"].weights == weights
    assert by_name["merge"].loss == pytest.approx(merged_loss(models, weights, data), abs=1e-5)
    assert by_name["models 1 and 3"].loss == pytest.approx(merged_loss(models, (0.5, 0, 0.5), data), abs=1e-5)


def test_task_vectors_are_measured_over_their_base(models, data):
    *parents, base = parents_of(models)
    report = diagnose_checkpoints(parents, data, section_of(), base=base, weights=[0.4, 0.1])
    assert report.region == "arithmetic"
    assert [model.weight for model in report.models] == [0.4, 0.1, None]
    merge = report.path[-1]
    assert merge.name == "merge" and merge.weights == pytest.approx((0.4, 0.1, 0.5))
    assert merge.loss == pytest.approx(merged_loss(models, merge.weights, data), abs=1e-5)


def test_weights_are_equal_where_none_are_given(models, data):
    report = diagnose_checkpoints(parents_of(models), data, section_of())
    assert [model.weight for model in report.models] == [None] * 3
    assert report.path[-1].name == "centre"
    assert report.path[-1].loss == pytest.approx(merged_loss(models, (1 / 3,) * 3, data), abs=1e-5)


@pytest.mark.parametrize(
    ("count", "with_base", "weights", "changes", "message"),
    [
        (2, False, [1.0], {}, "1 weights for 2 models"),
        (1, False, None, {}, "compares two models or more"),
        (3, False, None, {"measures": ("additivity",)}, "additivity: for two models only, and these are 3"),
        (2, True, None, {"measures": ("geometry",)}, "geometry: for two models only, and these are 3"),
        (2, False, None, {"offload": True, "suggest": "weights"}, "with offload only loss, metric and LLFC"),
        (2, True, None, {"suggest": "weights"}, "not for sums of task vectors"),
    ],
)
def test_what_cannot_be_measured_is_an_error(models, data, count, with_base, weights, changes, message):
    parents = parents_of(models)
    base = parents[2] if with_base else None
    with pytest.raises(EvaluationError, match=message):
        diagnose_checkpoints(parents[:count], data, section_of(**changes), base=base, weights=weights)


def test_the_region_follows_the_number_of_models():
    between = region_of([0.3, 0.7], section_of(), arithmetic_over_base=False)
    assert (between.kind, [point.weights for point in between.points]) == ("line", [(a, 1 - a) for a in ALPHAS])
    over_three = region_of([1.0, 1.0, 2.0], section_of(), arithmetic_over_base=False)
    assert (over_three.kind, len(over_three.points)) == ("simplex", 3 + 3 + 1 + 1)
    assert over_three.points[-1].weights == (0.25, 0.25, 0.5)
    over_base = region_of([0.5], section_of(), arithmetic_over_base=True)
    assert (over_base.kind, over_base.points[-1].weights) == ("arithmetic", (0.5, 0.5))
    with pytest.raises(EvaluationError, match="give another model, or a base model"):
        region_of([1.0], section_of(), arithmetic_over_base=False)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["model.layers.*", "model.layers.*.mlp"], BLOCKS),
        (["model.layers.0.mlp", "model.layers.1"], ("model.layers.0.mlp", "model.layers.1")),
        (["model.layers.0.mlp.act_fn", "model.layers.1.mlp"], ("model.layers.1.mlp",)),
    ],
)
def test_layers_that_are_modules_are_outermost_and_have_weights(models, data, layers, expected):
    a, b, _ = models
    report = diagnose_models([a, b], data, region=line([0.5]), features=Features(layers))
    assert len(report.layer_names) > len(expected)
    assert module_layers(a, report) == expected


@pytest.mark.parametrize("block", [0, 1])
def test_the_block_that_was_moved_alone_is_broken(models, data, block):
    """Neurons of one block in another order: only there are features of the merge not the blend of its parents'."""
    a = models[0]
    spec = PermutationSpec.from_config(a.config)
    other = tiny_model("llama", "causal-lm", 0)
    neurons = spec.keep(f"neurons.{block}").random_alignment(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    near = {
        name: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator) for name, tensor in a.state_dict().items()
    }
    other.load_state_dict(neurons.apply(near))
    told = []
    execution = Execution(progress=lambda *step: told.append(step))
    blocks, tensors = broken_tensors(
        parents_of([a, other]), data, section_of(), ratio=1, weights=[1, 1], execution=execution
    )
    # The parents compute nearly the same: their features are closer to each other than the merge is to the blend.
    assert blocks == BLOCKS[block:]
    assert set(tensors) == {name for name in a.state_dict() if name.startswith(tuple(f"{name}." for name in blocks))}
    assert told == [("looking for broken layers", done, 6) for done in (0, 3, 6)]


def test_nothing_is_broken_between_a_model_and_itself(models, data):
    parents = parents_of([models[0], tiny_model("llama", "causal-lm", 0)])
    assert broken_tensors(parents, data, section_of(), ratio=0.1, weights=[3, 1]) == ((), ())
