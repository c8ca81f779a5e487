import pytest
import torch

import hf_llfc.alignment.gains
from hf_llfc import PermutationSpec
from hf_llfc.alignment import match_weights
from hf_llfc.alignment.gains import Gains
from hf_llfc.alignment.groups import groups_of
from hf_llfc.symmetry import Alignment, Permutation
from tests.alignment.oracle import (
    SQUARE,
    TOY,
    every_transform,
    objective,
    parameters,
    toy_state,
    with_transforms,
)
from tests.tiny_models import tiny_model

MODELS = [
    ("llama", "causal-lm"),
    ("mixtral", "causal-lm"),
    ("gpt2", "causal-lm"),
    ("resnet-basic", "image-classification"),
    ("bert", "masked-lm"),
]


def two_models(family: str, head: str):
    """Two models that have nothing to do with each other, in float32, and their spec."""
    a, b = (tiny_model(family, head, seed=seed) for seed in (1, 2))
    return PermutationSpec.from_config(a.config), a.state_dict(), b.state_dict()


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The gain matrices as the assignment gets them."""
    matrices: list[torch.Tensor] = []
    assign = hf_llfc.alignment.gains.assign_with_gap

    def spy(gain: torch.Tensor, *, solver: str) -> tuple[torch.Tensor, float]:
        matrices.append(gain)
        return assign(gain, solver=solver)

    monkeypatch.setattr(hf_llfc.alignment.gains, "assign_with_gap", spy)
    return matrices


@pytest.mark.parametrize(("family", "head"), MODELS)
def test_the_gain_of_every_group_is_the_rise_of_the_objective(family, head, generator):
    spec, a, b = two_models(family, head)
    gains = Gains(parameters(spec, a), parameters(spec, b))
    present = spec.random_alignment(generator)
    before = objective(a, b, present)
    assert gains.objective(present) == pytest.approx(before, rel=1e-12)
    for group in groups_of(gains.a.binding):
        solution = gains.solve(group, present)
        after = objective(a, b, with_transforms(present, solution.transforms))
        if solution.gain:
            assert solution.gain == pytest.approx(after - before, rel=1e-9)
            again = gains.solve(group, with_transforms(present, solution.transforms))
            repeated = family == "bert" and group.axis == "residual"
            assert repeated or again.gain == 0, "one visit finds the optimum of a group"
        else:
            assert after - before <= 1e-9 * abs(before)


@pytest.mark.parametrize(("family", "head"), MODELS)
def test_gain_matrices_against_swaps(family, head, solved, generator):
    """Swapping two units changes the objective by gain[i, p_j] + gain[j, p_i] − gain[i, p_i] − gain[j, p_j]."""
    spec, a, b = two_models(family, head)
    gains = Gains(parameters(spec, a), parameters(spec, b))
    present = spec.random_alignment(generator)
    before = objective(a, b, present)
    singles = [group for group in groups_of(gains.a.binding) if not group.children]
    assert singles
    for group in singles:
        if family == "bert" and group.axis == "residual":
            continue  # held twice by the transform of the head: not linear, see below
        solved.clear()
        gains.solve(group, present)
        (gain,) = solved
        perm = present.transforms[group.axis].perm
        assert gain.dtype == torch.float64 and gain.shape == (group.size, group.size)
        for _ in range(4):
            i, j = torch.randperm(group.size, generator=generator)[:2].tolist()
            swapped = perm.clone()
            swapped[[i, j]] = perm[[j, i]]
            change = objective(a, b, with_transforms(present, {group.axis: Permutation(swapped)})) - before
            expected = gain[i, perm[j]] + gain[j, perm[i]] - gain[i, perm[i]] - gain[j, perm[j]]
            assert change == pytest.approx(float(expected), rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("axes", [("residual",), ("kv", "q"), ("experts", "neurons"), ("wide",)])
@pytest.mark.parametrize("seed", range(3))
def test_the_optimum_of_a_group_among_all_transforms(axes, seed):
    a, b = toy_state(seed), toy_state(seed + 100)
    gains = Gains(parameters(TOY, a), parameters(TOY, b))
    present = TOY.random_alignment(torch.Generator().manual_seed(seed))
    (group,) = (group for group in groups_of(gains.a.binding) if group.axis == axes[0])
    assert group.matched == axes
    solution = gains.solve(group, present)
    before = objective(a, b, present)
    best = max(objective(a, b, with_transforms(present, each)) for each in every_transform(TOY, *axes))
    assert objective(a, b, with_transforms(present, solution.transforms)) == pytest.approx(best, rel=1e-12)
    assert solution.gain == pytest.approx(best - before, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("fixed", ["kv", "q", "experts", "neurons"])
@pytest.mark.parametrize("seed", range(4))
def test_a_family_with_a_fixed_member(fixed, seed):
    spec = TOY.fix(fixed)
    a, b = toy_state(seed), toy_state(seed + 100)
    gains = Gains(parameters(spec, a), parameters(spec, b))
    present = spec.random_alignment(torch.Generator().manual_seed(seed))
    root = "kv" if fixed in ("kv", "q") else "experts"
    (group,) = (group for group in groups_of(gains.a.binding) if group.axis == root)
    assert group.matched == tuple(axis for axis in (root, "q" if root == "kv" else "neurons") if axis != fixed)
    solution = gains.solve(group, present)
    before = objective(a, b, present)
    best = max(objective(a, b, with_transforms(present, each)) for each in every_transform(spec, *group.matched))
    assert solution.gain == pytest.approx(best - before, rel=1e-9, abs=1e-12)
    assert objective(a, b, with_transforms(present, solution.transforms)) == pytest.approx(best, rel=1e-12)


def mean_objective(a, b, alignment: Alignment, *undetermined: str) -> float:
    """The objective averaged over every transform of some axes."""
    values = [objective(a, b, with_transforms(alignment, each)) for each in every_transform(TOY, *undetermined)]
    return sum(values) / len(values)


def test_axes_that_are_not_determined_are_averaged_over(solved):
    a, b = toy_state(7), toy_state(8)
    gains = Gains(parameters(TOY, a), parameters(TOY, b))
    present = TOY.random_alignment(torch.Generator().manual_seed(0))
    (group,) = (group for group in groups_of(gains.a.binding) if group.axis == "residual")
    unknown = ("experts", "neurons", "wide")
    gains.solve(group, present, frozenset(("residual", *unknown)))
    (gain,) = solved
    few = ("experts", "neurons")  # `wide` is averaged by hand: 24 times as many transforms show nothing more
    wide_mean = {name: tensor.clone() for name, tensor in b.items()}
    wide_mean["fused"] = b["fused"].reshape(2, 2, 4, 3).mean(2, keepdim=True).expand(2, 2, 4, 3).reshape(2, 8, 3)
    straight = with_transforms(present, {"residual": Permutation.identity(3)})
    before = mean_objective(a, wide_mean, straight, *few)
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        swapped = torch.arange(3)
        swapped[[i, j]] = torch.tensor([j, i])
        after = mean_objective(a, wide_mean, with_transforms(present, {"residual": Permutation(swapped)}), *few)
        expected = gain[i, j] + gain[j, i] - gain[i, i] - gain[j, j]
        assert after - before == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_an_axis_that_a_tensor_holds_twice(seed):
    a, b = toy_state(seed, SQUARE), toy_state(seed + 50, SQUARE)
    gains = Gains(parameters(SQUARE, a), parameters(SQUARE, b))
    (group,) = groups_of(gains.a.binding)
    present = SQUARE.random_alignment(torch.Generator().manual_seed(seed))
    for _ in range(20):
        solution = gains.solve(group, present)
        following = with_transforms(present, solution.transforms)
        rise = objective(a, b, following) - objective(a, b, present)
        assert solution.gain == pytest.approx(max(rise, 0), rel=1e-9, abs=1e-12)
        if solution.gain == 0:
            break
        present = following
    else:
        pytest.fail("the descent does not end")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_precision_is_cast_before_it_is_multiplied(dtype):
    a, b = ({name: tensor.to(dtype) for name, tensor in toy_state(seed).items()} for seed in (0, 1))
    exact_a, exact_b = ({name: tensor.double() for name, tensor in each.items()} for each in (a, b))
    stored, exact = (Gains(parameters(TOY, x), parameters(TOY, y)) for x, y in ((a, b), (exact_a, exact_b)))
    identity = TOY.identity_alignment()
    assert stored.objective(identity) == exact.objective(identity)
    assert stored.norms() == exact.norms()
    for group in groups_of(stored.a.binding):
        found, expected = stored.solve(group, identity), exact.solve(group, identity)
        assert found.transforms == expected.transforms
        assert found.gain == pytest.approx(expected.gain, rel=1e-12)


@pytest.mark.parametrize(("family", "head"), [("llama", "causal-lm"), ("mixtral", "causal-lm")])
def test_chunks_and_single_precision_change_nothing_but_rounding(family, head, monkeypatch, generator):
    spec, a, b = two_models(family, head)
    gains = Gains(parameters(spec, a), parameters(spec, b))
    present = spec.random_alignment(generator)
    groups = groups_of(gains.a.binding)
    whole = [gains.solve(group, present) for group in groups]
    value, norms = gains.objective(present), gains.norms()
    monkeypatch.setattr(hf_llfc.alignment.gains, "CHUNK", 100)
    monkeypatch.setattr(hf_llfc.alignment.gains, "DOUBLE_UP_TO", 1)
    assert gains.objective(present) == pytest.approx(value, rel=1e-12)
    assert gains.norms() == pytest.approx(norms, rel=1e-12)
    for group, expected in zip(groups, whole, strict=True):
        found = gains.solve(group, present)
        assert found.transforms == expected.transforms
        assert found.gain == pytest.approx(expected.gain, rel=1e-4)


def test_statistics_say_nothing():
    a, b = toy_state(0), toy_state(1)
    gains = Gains(parameters(TOY, a), parameters(TOY, b))
    changed = Gains(parameters(TOY, a), parameters(TOY, {**b, "mean": 1e6 * b["mean"]}))
    identity = TOY.identity_alignment()
    assert gains.objective(identity) == changed.objective(identity)
    for group in groups_of(gains.a.binding):
        assert gains.solve(group, identity).transforms == changed.solve(group, identity).transforms


def test_an_axis_of_statistics_alone_stays():
    spec = PermutationSpec.from_lines(
        ["w  residual", "mean~  lonely", "m~  kv q[kv]", "k  kv"],
        sizes={"residual": 3, "lonely": 4, "kv": 2, "q": 3},
        symmetric=["residual", "lonely", "kv", "q"],
    )
    gains = Gains(parameters(spec, toy_state(0, spec)), parameters(spec, toy_state(1, spec)))
    for group in groups_of(gains.a.binding):
        solution = gains.solve(group, spec.identity_alignment())
        for axis in ("lonely", "q"):
            if axis in solution.transforms:
                assert solution.transforms[axis].is_identity


# A tensor that two children share, beside tensors of each alone; the same with the root in names; two children apart;
# heads that are mixed, with a recurrence inside each.
SHARED = PermutationSpec.from_lines(
    ["q  (kv q[kv] 2) 5", "k  (kv 2) 5", "v  (kv v[kv]) 5", "o  5 (kv q[kv] v[kv])"],
    sizes={"kv": 2, "q": 2, "v": 3},
    symmetric=["kv", "q", "v"],
)
NAMED = PermutationSpec.from_lines(
    ["q.<kv>  (q[kv] 2) 5", "k.<kv>  2 5", "v.<kv>  v[kv] 5", "o.<kv>  5 (q[kv] v[kv])"],
    sizes={"kv": 2, "q": 2, "v": 3},
    symmetric=["kv", "q", "v"],
)
APART = PermutationSpec.from_lines(
    ["q  (heads a[heads]) 5", "k  (heads a[heads]) + (heads v[heads]) 5", "o  5 (heads v[heads])", "scale  heads"],
    sizes={"heads": 2, "a": 3, "v": 2},
    symmetric=["heads", "a", "v"],
)
QUADRATIC = PermutationSpec.from_lines(
    ["q  (heads a[heads]) 5", "mixed  heads heads", "recurrent  heads a[heads] a[heads]", "bias  heads"],
    sizes={"heads": 2, "a": 3},
    symmetric=["heads", "a"],
)


def solve_only_group(spec: PermutationSpec, seed: int):
    """The solution found for the only group of a spec, by how much it raises the objective, and the most of any."""
    a, b = toy_state(seed, spec), toy_state(seed + 1000, spec)
    gains = Gains(parameters(spec, a), parameters(spec, b))
    (group,) = groups_of(gains.a.binding)
    present = spec.random_alignment(torch.Generator().manual_seed(seed))
    solution = gains.solve(group, present)
    before = objective(a, b, present)
    rise = objective(a, b, with_transforms(present, solution.transforms)) - before
    best = max(objective(a, b, with_transforms(present, each)) for each in every_transform(spec, *group.matched))
    return solution, rise, best - before


@pytest.mark.parametrize("fixed", [(), ("heads",), ("a",), ("heads", "v")])
@pytest.mark.parametrize("seed", range(3))
def test_children_that_share_no_tensor_are_exact(fixed, seed):
    solution, rise, best = solve_only_group(APART.fix(*fixed) if fixed else APART, seed)
    assert rise == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert solution.gain == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("spec", [SHARED, NAMED], ids=["in shapes", "in names"])
@pytest.mark.parametrize("fixed", [(), ("q",), ("v",), ("kv",)])
def test_few_children_that_share_a_tensor_are_exact(spec, fixed):
    for seed in range(2):
        solution, rise, best = solve_only_group(spec.fix(*fixed) if fixed else spec, seed)
        assert rise == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert solution.gain == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("spec", [SHARED, NAMED], ids=["in shapes", "in names"])
def test_many_children_that_share_a_tensor_never_fall(spec, monkeypatch):
    monkeypatch.setattr(hf_llfc.alignment.groups, "TRIED", 1)
    for seed in range(5):
        solution, rise, best = solve_only_group(spec, seed)
        assert solution.gain == pytest.approx(max(rise, 0), rel=1e-9, abs=1e-12)
        assert -1e-12 < rise <= best + 1e-9


@pytest.mark.parametrize("seed", range(2))
def test_small_blocks_change_nothing(seed, monkeypatch):
    whole = [solve_only_group(spec, seed)[0] for spec in (SHARED, NAMED)]
    monkeypatch.setattr(hf_llfc.alignment.gains, "BLOCK", 40)
    for spec, expected in zip((SHARED, NAMED), whole, strict=True):
        found = solve_only_group(spec, seed)[0]
        assert found.transforms == expected.transforms
        assert found.gain == pytest.approx(expected.gain, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_a_family_of_which_a_tensor_holds_a_member_twice_never_loses(seed):
    solution, rise, _ = solve_only_group(QUADRATIC, seed)
    assert solution.gain == pytest.approx(rise, rel=1e-9) if solution.gain else rise <= 1e-9


def test_a_planted_transform_of_such_a_family_is_found():
    a = toy_state(0, QUADRATIC)
    planted = QUADRATIC.random_alignment(torch.Generator().manual_seed(0))
    found = match_weights(parameters(QUADRATIC, a), parameters(QUADRATIC, planted.apply(a)))
    assert planted.then(found).is_identity


def test_operations_are_those_of_the_matrix_products():
    spec, a, b = two_models("llama", "causal-lm")
    gains = Gains(parameters(spec, a), parameters(spec, b))
    neurons, residual = (
        next(group for group in groups_of(gains.a.binding) if group.axis == axis) for axis in ("neurons.0", "residual")
    )
    width, hidden = neurons.size, residual.size
    assert gains.operations(neurons) == 3 * 2 * width * width * hidden
    held = [tensor for key, name in gains.a.keys.items() if key in gains.keys({"residual"}) for tensor in [a[name]]]
    assert gains.operations(residual) == sum(2 * hidden * tensor.numel() for tensor in held)
    assert gains.elements(residual) == sum(tensor.numel() for tensor in held)
