"""Many models in one space: planted transforms come back, the objective never falls, cycles close."""

from itertools import combinations, groupby, pairwise

import pytest
import torch

import hf_llfc.alignment.universe
from hf_llfc import PermutationSpec
from hf_llfc.adapters.canonical_forms import canonical_form
from hf_llfc.alignment import Parameters, Search, match_universe, match_weights
from hf_llfc.alignment.universe import summed
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.checkpoints.models import load_model
from hf_llfc.checkpoints.views.canonical import canonical_checkpoint
from hf_llfc.errors import AlignmentError
from hf_llfc.parallel.workers import ALONE, Workers
from hf_llfc.symmetry import Alignment
from tests.alignment.oracle import TOY, objective, parameters, toy_state
from tests.alignment.test_full_groups import CASES, all_in_float64, canonical_state, logits, made, stored
from tests.parallel.test_workers import on_all
from tests.tiny_models import tiny_model

__all__ = ["all_in_float64"]


def several(family: str, head: str, count: int = 4):
    """Models of one family from different seeds."""
    models = [tiny_model(family, head, seed=seed, dtype=torch.float64) for seed in range(count)]
    return PermutationSpec.from_config(models[0].config), [model.state_dict() for model in models]


def match(spec: PermutationSpec, states, *, reference=0, starts=None, workers=ALONE, **search) -> list[Alignment]:
    models = [parameters(spec, state) for state in states]
    return match_universe(models, search=Search(**search), reference=reference, starts=starts, workers=workers)


def of_pairs(states, alignments) -> float:
    """F by definition."""
    moved = [alignment.apply(state) for state, alignment in zip(states, alignments, strict=True)]
    identity = alignments[0].spec.identity_alignment()
    return sum(objective(a, b, identity) for a, b in combinations(moved, 2))


def noisy(state, amount: float, generator):
    return {
        name: tensor + amount * tensor.std() * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        if tensor.numel() > 1 and tensor.is_floating_point()
        else tensor
        for name, tensor in state.items()
    }


@pytest.mark.parametrize(
    ("family", "head"), [("llama", "causal-lm"), ("bert", "masked-lm"), ("resnet-basic", "image-classification")]
)
def test_the_objective_never_falls_and_is_what_it_says(family, head):
    spec, states = several(family, head)
    found = match(spec, states, restarts=3)
    for place, alignment in enumerate(found):
        metadata = alignment.metadata
        assert metadata["method"] == "weight_matching" and metadata["converged"]
        assert metadata["objective_after"] == pytest.approx(objective(states[0], states[place], alignment), rel=1e-9)
    identity = spec.identity_alignment()
    of_all = found[1].metadata["universe"]
    assert of_all["models"] == 4
    assert of_all["objective_before"] == pytest.approx(of_pairs(states, [identity] * 4), rel=1e-9)
    assert of_all["objective_after"] == pytest.approx(of_pairs(states, found), rel=1e-9)
    cosines = [
        objective(a, b, identity) / (objective(a, a, identity) * objective(b, b, identity)) ** 0.5
        for a, b in combinations([each.apply(state) for each, state in zip(found, states, strict=True)], 2)
    ]
    assert of_all["cosine_after"] == pytest.approx(sum(cosines) / 6, rel=1e-9)
    ends = []
    for label, sweeps in groupby(found[1].metadata["sweeps"], key=lambda sweep: sweep["start"]):
        values = [sweep["objective"] for sweep in sweeps]
        assert all(later >= earlier for earlier, later in pairwise(values)) and len(values) < 50
        ends.append((label, values[-1]))
    assert [label for label, _ in ends] == ["identity", "grown 1", "grown 2"]
    # What the gains of all steps add up to is the objective itself.
    assert of_all["objective_after"] == pytest.approx(max(value for _, value in ends), rel=1e-9)


@pytest.mark.parametrize(("family", "head"), [("llama", "causal-lm"), ("vit", "image-classification")])
def test_together_is_closer_than_each_to_the_first(family, head):
    spec, states = several(family, head, count=5)
    first = parameters(spec, states[0])
    one_by_one = [spec.identity_alignment(), *(match_weights(first, parameters(spec, each)) for each in states[1:])]
    together = match(spec, states)
    assert of_pairs(states, together) > 1.05 * of_pairs(states, one_by_one)


@pytest.mark.parametrize(("family", "head"), [("llama", "causal-lm"), ("mixtral", "causal-lm"), ("gpt2", "causal-lm")])
def test_planted_permutations_come_back(family, head, generator):
    spec, (state, *_) = several(family, head, count=1)
    planted = [spec.random_alignment(generator) for _ in range(5)]
    found = match(spec, [each.apply(noisy(state, 0.1, generator)) for each in planted])
    for each, alignment in zip(planted, found, strict=True):
        assert each.then(alignment).transforms == planted[0].transforms
    assert found[0].is_identity and not found[1].is_identity


@pytest.mark.parametrize("case", CASES)
def test_planted_matrices_come_back_and_logits_stay(case, all_in_float64, generator):
    model = made(case)
    expected = logits(model)
    form = canonical_form(model.config)
    checkpoint = canonical_checkpoint(open_checkpoint(model), form)
    state = canonical_state(form, stored(model))
    planted = [form.spec.random_alignment(generator) for _ in range(4)]
    states = [each.apply(state) for each in planted]
    found = match(form.spec, states)
    assert found[1].metadata["universe"]["cosine_after"] > 1 - 1e-6
    for alignment, each in zip(found, states, strict=True):
        moved = alignment.apply(each)
        assert max(float((moved[name] - states[0][name]).abs().max()) for name in moved) < 1e-5
        answer = logits(load_model(checkpoint, state_dict=moved, dtype=torch.float64).eval())
        assert float((answer - expected).abs().max() / expected.abs().max()) < 1e-9


@pytest.mark.parametrize("case", ["gpt2", "llama", "vit"])
def test_cycles_close_and_the_reference_changes_coordinates_alone(case):
    models = [made(case, seed) for seed in range(4)]
    form = canonical_form(models[0].config)
    states = [canonical_state(form, stored(model)) for model in models]
    by_first, by_third = (match(form.spec, states, reference=place, max_sweeps=2) for place in (0, 2))
    assert by_first[0].is_identity and by_third[2].is_identity
    for ours, theirs in zip(by_first, by_third, strict=True):
        for axis, transform in ours.then(by_first[2].inverse()).transforms.items():
            stay = transform.then(theirs.inverse().transforms[axis], theirs.inverse()._parent_of(axis))
            assert stay.moved == 0, axis
    # From 1 to 2, from 2 to 3 and back to 1.
    legs = [by_first[i].then(by_first[j].inverse()) for i, j in ((1, 2), (2, 3), (3, 1))]
    assert legs[0].then(legs[1]).then(legs[2]).is_identity


@pytest.mark.parametrize(("family", "head"), [("llama", "causal-lm"), ("gpt2", "causal-lm")])
def test_of_two_models_it_finds_what_weight_matching_does(family, head):
    spec, states = several(family, head, count=2)
    alone = match_weights(*(parameters(spec, state) for state in states))
    found = match(spec, states)[1]
    for key in ("objective_after", "cosine_after", "distance_after"):
        assert found.metadata[key] == pytest.approx(alone.metadata[key], rel=0.01)
    assert found.metadata["objective_after"] == pytest.approx(found.metadata["universe"]["objective_after"], rel=1e-12)


def test_fine_tunes_of_one_base_stay_where_they_are(generator):
    spec, (state, *_) = several("llama", "causal-lm", count=1)
    found = match(spec, [noisy(state, 0.05, generator) for _ in range(4)], restarts=5)
    assert all(alignment.is_identity for alignment in found)
    assert {sweep["start"] for sweep in found[1].metadata["sweeps"]} == {"identity"}


def test_given_starts_are_improved_upon():
    spec, states = several("llama", "causal-lm")
    first = parameters(spec, states[0])
    starts = [spec.identity_alignment(), *(match_weights(first, parameters(spec, each)) for each in states[1:])]
    found = match(spec, states, starts=starts, restarts=1)
    assert found[1].metadata["sweeps"][0]["start"] == "given"
    assert of_pairs(states, found) > of_pairs(states, starts)
    with pytest.raises(AlignmentError, match="the start moves"):
        match(spec.fix("neurons"), states, starts=starts)


@pytest.mark.parametrize(("family", "head"), [("llama", "causal-lm"), ("mixtral", "causal-lm")])
def test_threads_processes_and_memory_change_nothing(family, head, monkeypatch):
    spec, states = several(family, head, count=3)
    alone = match(spec, states)
    threads = match(spec, states, workers=Workers(3))
    both = on_all(2, lambda workers: match(spec, states, workers=workers), threads=2)
    monkeypatch.setattr(hf_llfc.alignment.universe, "KEPT", 0)
    for found in (threads, *both, match(spec, states)):
        assert [each.transforms for each in found] == [each.transforms for each in alone]
        assert [each.metadata for each in found] == [each.metadata for each in alone]


def test_the_solver_with_a_gap_says_how_large_it_is():
    spec, states = several("llama", "causal-lm", count=3)
    assert match(spec, states, solver="auction")[1].metadata["assignment_gap"] == 0.0


def test_sums_are_read_by_tensor_and_leave_the_models_alone():
    states = [toy_state(seed) for seed in range(3)]
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
    moves = [TOY.random_alignment(torch.Generator().manual_seed(seed)) for seed in range(3)]
    total = summed([parameters(TOY, state) for state in states], moves)
    moved = [each.apply(state) for each, state in zip(moves, states, strict=True)]
    for name in states[0]:
        torch.testing.assert_close(total.read(name), sum(each[name] for each in moved), rtol=1e-15, atol=1e-15)
        assert total.read(name) is total.read(name), "kept"
    assert all(
        torch.equal(state[name], copy[name]) for state, copy in zip(states, before, strict=True) for name in copy
    )


def test_names_may_differ_by_their_prefix():
    spec, states = several("bert", "base", count=3)
    named = [states[0], {f"bert.{name}": tensor for name, tensor in states[1].items()}, states[2]]
    ours, theirs = match(spec, named), match(spec, states)
    assert [each.transforms for each in ours] == [each.transforms for each in theirs]


def test_bad_input():
    spec, states = several("gpt2", "causal-lm", count=3)
    labelled = [
        Parameters(parameters(spec, each).binding, each.__getitem__, f"model-{i}") for i, each in enumerate(states)
    ]
    states[2]["transformer.h.1.mlp.c_fc.weight"][0, 0] = torch.nan
    with pytest.raises(AlignmentError, match=r"NaN or Inf found: transformer\.h\.1\.mlp\.c_fc\.weight of model-2"):
        match_universe(labelled)
    short = {name: tensor for name, tensor in states[1].items() if name != "lm_head.weight"}
    with pytest.raises(AlignmentError, match=r"lm_head\.weight: not in model-1"):
        match_universe([labelled[0], Parameters(parameters(spec, short).binding, short.__getitem__, "model-1")])
    with pytest.raises(AlignmentError, match="unknown solver 'auctoin'"):
        match(spec, states, solver="auctoin")
    with pytest.raises(AlignmentError, match=r"restarts \(0\)"):
        match(spec, states, restarts=0)
