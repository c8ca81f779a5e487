import pytest
import torch

from hf_llfc.diagnostics.batch_norm import batch_norm_state
from hf_llfc.diagnostics.combination import CombinedModel
from hf_llfc.errors import EvaluationError
from tests.diagnostics.oracle import between
from tests.tiny_models import TINY, tiny_model


@pytest.mark.parametrize(("family", "head"), [row for row in TINY if row[1] != "token-classification"])
def test_weights_lie_on_the_line_and_the_parents_stay(family, head):
    model_a, model_b = (tiny_model(family, head, seed, torch.float64) for seed in (0, 1))
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in (model_a, model_b)]
    combined = CombinedModel([model_a, model_b])
    for alpha in (0.3, 0.0, 1.0, 0.75):
        combined.move_to((alpha, 1 - alpha))
        expected = between(model_a, model_b, alpha).state_dict()
        for name, value in combined.model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                assert value == max(before[0][name], before[1][name])
            elif alpha in (0.0, 1.0):
                assert torch.equal(value, before[0 if alpha else 1][name]), name
            else:
                assert torch.allclose(value, expected[name], rtol=1e-14, atol=1e-15), name
    for model, state in zip((model_a, model_b), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_tied_weight_stays_tied():
    combined = CombinedModel([tiny_model("gpt2", "causal-lm", seed) for seed in (0, 1)])
    combined.move_to((0.5, 0.5))
    assert combined.model.lm_head.weight is combined.model.transformer.wte.weight


def test_half_precision_is_computed_in_more():
    models = [tiny_model("bert", "base", seed, torch.bfloat16) for seed in (0, 1)]
    combined = CombinedModel(models)
    combined.move_to((0.3, 0.7))
    a, b = (model.encoder.layer[0].output.dense.weight.double() for model in models)
    found = combined.model.encoder.layer[0].output.dense.weight
    exact = (0.3 * a + 0.7 * b).to(torch.bfloat16)
    assert (found == exact).double().mean() > 0.99


def test_statistics_of_an_alpha_replace_the_interpolated_ones():
    models = [tiny_model("resnet-basic", "image-classification", seed) for seed in (0, 1)]
    combined = CombinedModel(models)
    combined.move_to((0.5, 0.5))
    own = {name: value + 1 for name, value in batch_norm_state(combined.model).items()}
    assert len(own) > 20
    combined.move_to((0.25, 0.75), own)
    state = combined.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in own.items())
    combined.move_to((0.25, 0.75))
    state = combined.model.state_dict()
    statistics = [name for name in own if not name.endswith("num_batches_tracked")]
    assert not any(torch.equal(state[name], own[name]) for name in statistics)


def test_models_that_differ_are_refused_with_all_differences():
    small, large = tiny_model("bert", "base"), tiny_model("bert", "masked-lm")
    with pytest.raises(EvaluationError, match="is missing in the second model"):
        CombinedModel([small, large])
    other = tiny_model("bert", "base")
    other.pooler.dense.bias = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(
        EvaluationError, match=r"tensor pooler.dense.bias has shape \(24,\) in the first model and \(3,\)"
    ):
        CombinedModel([small, other])
    with pytest.raises(EvaluationError, match=r"torch\.float32 in the first model and torch\.float64"):
        CombinedModel([small, tiny_model("bert", "base", dtype=torch.float64)])
    shifted = tiny_model("bert", "base")
    shifted.embeddings.position_ids += 1
    with pytest.raises(EvaluationError, match=r"integer tensor embeddings\.position_ids differs"):
        CombinedModel([small, shifted])
