"""Many models in one space by their activations: planted transforms come back, F is what it says and never falls."""

import copy
from itertools import combinations

import pytest
import torch

from hf_llfc.adapters.canonical_forms import canonical_form
from hf_llfc.alignment import Search, match_activations
from hf_llfc.alignment.universe_of_activations import match_universe_of_activations
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.checkpoints.models import load_model
from hf_llfc.checkpoints.views.canonical import canonical_checkpoint
from hf_llfc.errors import AlignmentError
from hf_llfc.symmetry import Alignment
from tests.alignment.test_activation_matching import NET, Net, moved, tokens
from tests.alignment.test_full_groups import made

BATCHES = [{"input_ids": tokens(0)}, {"input_ids": tokens(1)}]


def together(models, spec=NET, batches=BATCHES, *, reference=0, **search) -> list[Alignment]:
    return match_universe_of_activations(models, batches, spec, search=Search(**search), reference=reference)


def of_pairs(models, spec=NET) -> float:
    """F by definition: the correlation of all pairs as `match_activations` counts it before it moves anything."""
    return sum(match_activations(a, b, BATCHES, spec).metadata["objective_before"] for a, b in combinations(models, 2))


def test_planted_transforms_come_back():
    generator = torch.Generator().manual_seed(0)
    models = [Net(0), *(moved(Net(0), NET.random_alignment(generator)) for _ in range(3))]
    for reference in (0, 2):
        found = together(models, reference=reference)
        assert found[reference].is_identity
        for model, alignment in zip(models, found, strict=True):
            state = alignment.apply(model.state_dict())
            assert all(torch.equal(value, state[name]) for name, value in models[reference].state_dict().items())


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_planted_transforms_of_all_groups_come_back(case):
    model = made(case)
    form = canonical_form(model.config)
    checkpoint = canonical_checkpoint(open_checkpoint(model), form)
    state = dict(checkpoint.state_dict())
    generator = torch.Generator().manual_seed(1)
    states = [state, *(form.spec.random_alignment(generator).apply(state) for _ in range(2))]
    models = [load_model(checkpoint, state_dict=each, dtype=torch.float64).eval() for each in states]
    batches = [{"input_ids": torch.randint(1, 40, (32, 12), generator=generator)} for _ in range(2)]
    found = together(models, form.spec, batches)
    for each, alignment in zip(states, found, strict=True):
        back = alignment.apply(each)
        assert max(float((back[name] - state[name]).abs().max()) for name in state) < 1e-6


def test_two_models_are_matched_as_ever():
    models = [Net(0), Net(1)]
    found = together(models)[1]
    pair = match_activations(*models, BATCHES, NET)
    assert found.transforms == pair.transforms
    for key in ("objective_before", "objective_after"):
        assert found.metadata[key] == pytest.approx(pair.metadata[key])
        assert found.metadata["universe"][key] == pytest.approx(pair.metadata[key])


def test_the_objective_is_what_it_says_and_no_start_is_worse():
    models = [Net(seed) for seed in range(4)]
    found = together(models, restarts=4)
    of_all = found[1].metadata["universe"]
    assert of_all["models"] == 4
    assert of_all["objective_before"] == pytest.approx(of_pairs(models))
    after = [moved(model, alignment) for model, alignment in zip(models, found, strict=True)]
    assert of_all["objective_after"] == pytest.approx(of_pairs(after))
    for place in (1, 2, 3):
        pair = match_activations(after[0], after[place], BATCHES, NET)
        assert found[place].metadata["objective_after"] == pytest.approx(pair.metadata["objective_before"])
    # Each onto the first is one of the ways to be together.
    onto_first = [models[0], *(moved(each, match_activations(models[0], each, BATCHES, NET)) for each in models[1:])]
    assert of_all["objective_after"] > of_pairs(onto_first) > of_all["objective_before"]
    fewer = together(models, restarts=1)[1].metadata["universe"]["objective_after"]
    assert of_all["objective_before"] < fewer <= of_all["objective_after"]
    # In whose coordinates they come out changes nothing else.
    other = together(models, restarts=4, reference=2)
    assert other[0].metadata["universe"] == of_all
    assert other[0].then(found[2]).transforms == found[0].transforms


def test_what_is_not_right_is_refused():
    models = [Net(seed) for seed in range(3)]
    with pytest.raises(AlignmentError, match="restarts \\(0\\) and max_sweeps"):
        together(models, restarts=0)
    with pytest.raises(AlignmentError, match="there was not a single batch"):
        together(models, batches=[])
    with pytest.raises(AlignmentError, match="needs all models in evaluation mode"):
        together([*models[:2], copy.deepcopy(models[2]).train()])
    broken = copy.deepcopy(models[2])
    with torch.no_grad():
        broken.up.weight[0, 0] = torch.nan
    with pytest.raises(AlignmentError, match=r"NaN or Inf in the input of \w+ of model 3"):
        together([*models[:2], broken])
