from itertools import groupby, pairwise

import pytest
import torch
from scipy.optimize import linear_sum_assignment

import hf_llfc.alignment.assignment.assignment
import hf_llfc.alignment.gains
from hf_llfc import PermutationSpec
from hf_llfc.alignment import Parameters, Search, match_weights
from hf_llfc.alignment.gains import Gains
from hf_llfc.alignment.groups import groups_of
from hf_llfc.alignment.weight_matching import _divided, _waves
from hf_llfc.errors import AlignmentError
from hf_llfc.foundation.progress import silent
from hf_llfc.parallel.workers import ALONE, Workers
from hf_llfc.symmetry import Alignment
from tests.alignment.oracle import TOY, objective, parameters, toy_state
from tests.parallel.test_workers import on_all
from tests.tiny_models import tiny_model


def two_models(family: str, head: str, dtype: torch.dtype = torch.float32):
    a, b = (tiny_model(family, head, seed=seed, dtype=dtype) for seed in (1, 2))
    return PermutationSpec.from_config(a.config), a.state_dict(), b.state_dict()


def match(spec: PermutationSpec, a, b, *, start=None, workers=ALONE, progress=silent, **search) -> Alignment:
    pair = (parameters(spec, a), parameters(spec, b))
    return match_weights(*pair, search=Search(**search), start=start, workers=workers, progress=progress)


def moved_units(alignment: Alignment) -> int:
    return sum(moved for moved, _ in alignment.moved.values())


@pytest.mark.parametrize(
    ("family", "head"), [("llama", "causal-lm"), ("bert", "masked-lm"), ("resnet-basic", "image-classification")]
)
def test_the_objective_never_falls_and_ends_where_nothing_improves(family, head):
    spec, a, b = two_models(family, head)
    found = match(spec, a, b, restarts=3)
    metadata = found.metadata
    assert metadata["method"] == "weight_matching" and metadata["converged"]
    assert metadata["objective_before"] == pytest.approx(objective(a, b, spec.identity_alignment()), rel=1e-12)
    assert metadata["objective_after"] == pytest.approx(objective(a, b, found), rel=1e-12)
    norm = objective(a, a, spec.identity_alignment()) * objective(b, b, spec.identity_alignment())
    assert metadata["cosine_after"] == pytest.approx(metadata["objective_after"] / norm**0.5, rel=1e-12)
    assert metadata["cosine_before"] < metadata["cosine_after"] < 1
    ends = []
    for label, sweeps in groupby(metadata["sweeps"], key=lambda sweep: sweep["start"]):
        sweeps = list(sweeps)
        assert [sweep["sweep"] for sweep in sweeps] == list(range(1, len(sweeps) + 1))
        values = [sweep["objective"] for sweep in sweeps]
        assert all(later >= earlier for earlier, later in pairwise(values))
        assert len(sweeps) < 50 and values[-1] == pytest.approx(values[-2:][0], rel=1e-9)
        ends.append((label, values[-1]))
    assert [label for label, _ in ends] == ["identity", "uninformed", "random 2"]
    assert metadata["objective_after"] == pytest.approx(max(value for _, value in ends), rel=1e-9)
    assert metadata["sweeps"][-1]["moved"] > 0


def test_the_descent_alone_reaches_the_objective_it_reports():
    spec, a, b = two_models("gpt2", "causal-lm")
    (sweep,) = match(spec, a, b, restarts=1, max_sweeps=1).metadata["sweeps"]
    found = match(spec, a, b, restarts=1, max_sweeps=1)
    assert not found.metadata["converged"]
    assert sweep["objective"] == pytest.approx(objective(a, b, found), rel=1e-12)
    assert sweep["moved"] == moved_units(found)


def test_more_restarts_are_never_worse_and_a_seed_repeats_itself():
    spec, a, b = two_models("llama", "causal-lm")
    one, few, many = (match(spec, a, b, restarts=restarts, seed=3) for restarts in (1, 2, 5))
    values = [found.metadata["objective_after"] for found in (one, few, many)]
    assert values == sorted(values)
    again = match(spec, a, b, restarts=5, seed=3)
    assert again.transforms == many.transforms and again.metadata == many.metadata
    assert match(spec, a, b, restarts=5, seed=4).metadata["sweeps"] != many.metadata["sweeps"]


def test_a_random_start_leaves_alone_what_the_checkpoint_lacks():
    spec, a, b = two_models("roberta", "token-classification")
    assert "classifier" in spec.symmetric_axes, "the axis of a head that this checkpoint lacks"
    for seed in range(4):
        found = match(spec, a, b, restarts=4, seed=seed)
        assert found.transforms["classifier"].is_identity and found.transforms["pooled"].is_identity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_fine_tunes_of_one_base_stay_where_they_are(dtype, generator):
    spec, a, _ = two_models("llama", "causal-lm")
    b = {
        name: tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in a.items()
    }
    a, b = ({name: tensor.to(dtype) for name, tensor in each.items()} for each in (a, b))
    found = match(spec, a, b, restarts=5)
    assert found.is_identity and found.metadata["converged"]
    assert {sweep["start"] for sweep in found.metadata["sweeps"]} == {"identity"}
    assert found.metadata["objective_before"] == found.metadata["objective_after"]


def test_units_that_are_alike_stay_where_they_are():
    spec, a, _ = two_models("llama", "causal-lm")
    for layer in range(2):
        for projection, dim in (("gate", 0), ("up", 0), ("down", 1)):
            weight = a[f"model.layers.{layer}.mlp.{projection}_proj.weight"]
            weight.copy_(weight.index_select(dim, torch.tensor([0] * 20 + [1] * 20)))
    assert match(spec, a, a).is_identity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "head"),
    [("qwen3", "causal-lm"), ("bert", "sequence-classification"), ("gpt2", "causal-lm"), ("llama", "causal-lm")],
)
def test_a_planted_transform_under_noise(family, head, dtype, generator):
    spec, a, _ = two_models(family, head)
    planted = spec.random_alignment(generator)
    noisy = {
        name: tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=generator) for name, tensor in a.items()
    }
    stored = [{name: tensor.to(dtype) for name, tensor in each.items()} for each in (a, planted.apply(noisy))]
    found = match(spec, *stored)
    assert planted.then(found).is_identity


def test_a_fixed_residual_stays_and_every_mlp_is_solved_in_one_visit():
    spec, a, b = two_models("vit", "image-classification")
    found = match(spec.keep("neurons"), a, b, restarts=1)
    assert set(found.transforms) == {"neurons.0", "neurons.1"}
    assert len(found.metadata["sweeps"]) == 1 and found.metadata["converged"]
    for layer in range(2):
        up, bias, down = (f"vit.layers.{layer}.mlp.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight"))
        gain = a[up].double() @ b[up].double().T + torch.outer(a[bias], b[bias]) + a[down].double().T @ b[down].double()
        _, columns = linear_sum_assignment(gain.numpy(), maximize=True)
        assert found.transforms[f"neurons.{layer}"].perm.tolist() == columns.tolist()


def test_axes_can_be_chosen():
    spec, a, b = two_models("llama", "causal-lm")
    assert set(match(spec.fix("residual"), a, b).transforms) == set(spec.symmetric_axes) - {"residual"}
    only = match(spec.keep("kv", "q"), a, b)
    assert set(only.transforms) == {"kv.0", "kv.1", "q.0", "q.1"} and not only.is_identity
    nothing = match(spec.fix("*"), a, b)
    assert nothing.transforms == {} and nothing.metadata["cosine_after"] == 1.0


@pytest.mark.parametrize(("family", "head"), [("llama", "causal-lm"), ("bert", "masked-lm"), ("mixtral", "causal-lm")])
def test_threads_and_processes_give_the_same_bit_for_bit(family, head, monkeypatch):
    monkeypatch.setattr(hf_llfc.alignment.gains, "SHARED_FROM", 0)  # every sum of gains in parts
    spec, a, b = two_models(family, head)
    alone = match(spec, a, b, restarts=3)
    threads = match(spec, a, b, restarts=3, workers=Workers(3))
    both = on_all(2, lambda workers: match(spec, a, b, restarts=3, workers=workers), threads=2)
    for found in (threads, *both):
        assert found.transforms == alone.transforms and found.metadata == alone.metadata


def test_gains_summed_in_parts_are_the_same_up_to_rounding(monkeypatch):
    spec, a, b = two_models("llama", "causal-lm")
    whole = match(spec, a, b)
    monkeypatch.setattr(hf_llfc.alignment.gains, "SHARED_FROM", 0)
    parts = match(spec, a, b)
    assert parts.transforms == whole.transforms
    assert parts.metadata["objective_after"] == pytest.approx(whole.metadata["objective_after"], rel=1e-12)


def test_groups_are_matched_in_waves_after_those_they_share_tensors_with():
    spec, a, b = two_models("llama", "causal-lm")
    gains = Gains(parameters(spec, a), parameters(spec, b))
    groups = {group.axis: group for group in groups_of(gains.a.binding)}
    order = ["neurons.0", "kv.1", "residual", "neurons.1", "kv.0"]
    assert _waves(gains, [groups[axis] for axis in order]) == [[0, 1], [2], [3, 4]]


@pytest.mark.parametrize(
    ("axes", "workers", "together"),
    [
        (["residual"], 2, ["residual"]),  # the other would wait
        (["neurons.0", "neurons.1"], 2, []),  # one a worker
        (["neurons.0", "neurons.1", "kv.0"], 2, []),
        (["neurons.0", "neurons.1"], 4, ["neurons.0", "neurons.1"]),
        (["kv.0"], 2, []),  # its children are not shared
    ],
)
def test_groups_that_others_would_wait_for_are_solved_by_all(axes, workers, together, monkeypatch):
    monkeypatch.setattr(hf_llfc.alignment.gains, "SHARED_FROM", 0)
    monkeypatch.setattr(hf_llfc.alignment.gains, "ONE_ASSIGNMENT", 1)
    monkeypatch.setattr(hf_llfc.alignment.gains, "SENT", 0)
    spec, a, b = two_models("llama", "causal-lm")
    gains = Gains(parameters(spec, a), parameters(spec, b), workers=Workers(workers // 2, 0, 2))
    groups = {group.axis: group for group in groups_of(gains.a.binding)}
    found, apart = _divided(gains, {place: groups[axis] for place, axis in enumerate(axes)})
    assert [axes[place] for place in found] == together
    assert sorted([*found, *apart]) == list(range(len(axes)))


def test_what_takes_longer_to_send_than_to_compute_is_solved_by_one(monkeypatch):
    monkeypatch.setattr(hf_llfc.alignment.gains, "SHARED_FROM", 0)
    spec, a, b = two_models("llama", "causal-lm")
    for ranks, together in ((1, [0]), (2, [])):
        gains = Gains(parameters(spec, a), parameters(spec, b), workers=Workers(2 // ranks, 0, ranks))
        (group,) = (group for group in groups_of(gains.a.binding) if group.axis == "residual")
        assert _divided(gains, {0: group})[0] == together


def test_the_solver_with_a_gap_says_how_large_it_is(monkeypatch):
    spec, a, b = two_models("llama", "causal-lm")
    exact = match(spec, a, b)
    assert "assignment_gap" not in exact.metadata
    assert match(spec, a, b, solver="auction").metadata["assignment_gap"] == 0.0, "small axes are exact"
    monkeypatch.setattr(hf_llfc.alignment.assignment.assignment, "WIDE", 8)
    monkeypatch.setattr(hf_llfc.alignment.assignment.assignment, "GAP", 0.5)
    found = match(spec, a, b, solver="auction")
    assert found.metadata["solver"] == "auction" and 0 < found.metadata["assignment_gap"] < 1
    with pytest.raises(AlignmentError, match="unknown solver 'auctoin'; did you mean 'auction'"):
        match(spec, a, b, solver="auctoin")


def test_a_given_start_is_improved_upon():
    spec, a, b = two_models("llama", "causal-lm")
    start = match(spec.keep("neurons"), a, b)
    found = match(spec, a, b, start=start, restarts=1)
    assert found.metadata["sweeps"][0]["start"] == "given"
    assert found.metadata["objective_after"] >= objective(a, b, start)
    alone = match(spec, a, b, start=found, restarts=1)
    assert alone.transforms == found.transforms
    with pytest.raises(AlignmentError, match=r"the start moves neurons\.0, neurons\.1, which .* holds fixed"):
        match(spec.fix("neurons"), a, b, start=start)


def test_a_planted_optimum_is_found_from_every_start():
    for seed in range(5):
        a = toy_state(seed)
        planted = TOY.random_alignment(torch.Generator().manual_seed(seed))
        found = match(TOY, a, planted.apply(a), seed=seed)
        assert objective(a, planted.apply(a), found) == pytest.approx(objective(a, a, TOY.identity_alignment()))


def test_progress_is_told_and_inputs_are_left_alone():
    spec, a, b = two_models("gpt2", "causal-lm")
    before = [{name: tensor.clone() for name, tensor in each.items()} for each in (a, b)]
    told: list[tuple[str, int, int]] = []
    match(spec, a, b, progress=lambda *step: told.append(step))
    assert {total for _, _, total in told} == {5} and {done for _, done, _ in told} == set(range(5))
    assert {description.split(",")[1] for description, _, _ in told} >= {" identity start"}
    for each, copy in zip((a, b), before, strict=True):
        assert all(torch.equal(each[name], copy[name]) for name in each)


def test_tensors_are_read_one_at_a_time_by_name():
    spec, a, b = two_models("llama", "causal-lm")
    read: set[str] = set()

    def reader(state):
        def read_one(name: str) -> torch.Tensor:
            read.add(name)
            return state[name].clone()

        return read_one

    lazily = [Parameters(parameters(spec, state).binding, reader(state)) for state in (a, b)]
    assert match_weights(*lazily).transforms == match(spec, a, b).transforms
    assert read == {name for name in a if name != "score.weight"}


class TestBadInput:
    def test_different_tensors(self):
        spec, a, b = two_models("gpt2", "causal-lm")
        head = {name: tensor for name, tensor in b.items() if name != "lm_head.weight"}
        with pytest.raises(AlignmentError, match=r"different tensors: lm_head\.weight: not in the model that moves"):
            match(spec, a, head)
        with pytest.raises(AlignmentError, match=r"lm_head\.weight: not in base-b"):
            match_weights(parameters(spec, a), Parameters(spec.bind(shapes(head)), head.__getitem__, "base-b"))

    def test_different_labels(self):
        spec, a, b = two_models("bert", "sequence-classification")
        b = {name: tensor[:3] if name.startswith("classifier") else tensor for name, tensor in b.items()}
        with pytest.raises(AlignmentError) as error:
            match(spec, a, b)
        assert "classifier.weight: [5, 24] in the reference, [3, 24] in the model that moves" in str(error.value)
        assert "classifier.bias: [5] in the reference" in str(error.value)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_named(self, bad):
        spec, a, b = two_models("llama", "causal-lm")
        a["model.norm.weight"][3] = bad
        b["model.layers.1.mlp.up_proj.weight"][0, 0] = bad
        with pytest.raises(AlignmentError, match="NaN or Inf found: 2 problems") as error:
            match(spec, a, b)
        assert "model.norm.weight of the reference" in str(error.value)
        assert "model.layers.1.mlp.up_proj.weight of the model that moves" in str(error.value)

    @pytest.mark.parametrize("options", [{"restarts": 0}, {"max_sweeps": 0}])
    def test_options_out_of_range(self, options):
        spec, a, b = two_models("llama", "causal-lm")
        with pytest.raises(AlignmentError, match="must be at least 1"):
            match(spec, a, b, **options)


def shapes(state):
    return {name: tensor.shape for name, tensor in state.items()}


@pytest.mark.gpu
def test_an_accelerator_finds_the_same():
    spec, a, b = two_models("mixtral", "causal-lm")
    on_device = [{name: tensor.cuda() for name, tensor in each.items()} for each in (a, b)]
    expected = match(spec, a, b)
    for reference, model in ((on_device[0], on_device[1]), (on_device[0], b)):
        assert match(spec, reference, model).transforms == expected.transforms
    assert expected.apply(on_device[1])["lm_head.weight"].is_cuda
