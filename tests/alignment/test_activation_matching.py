import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_llfc import PermutationSpec
from hf_llfc.alignment import match_activations
from hf_llfc.alignment.activation_matching import _Moments
from hf_llfc.errors import AlignmentError
from hf_llfc.symmetry import Alignment
from tests.alignment.oracle import every_transform
from tests.tiny_models import tiny_inputs, tiny_model


class Net(nn.Module):
    """An MLP on tokens: `into` and `out` of the hidden layer flattened to rows of tokens, as routers do."""

    def __init__(self, seed: int, flatten: bool = False, act: type[nn.Module] = nn.Tanh):
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.up = nn.Linear(12, 8)
        self.down = nn.Linear(8, 12)
        self.head = nn.Linear(12, 4)
        self.spare = nn.Linear(8, 4)
        self.act = act()
        self.flatten = flatten
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        features_nti = self.embed(input_ids)
        inside = features_nti.flatten(0, 1) if self.flatten else features_nti
        features_nti = features_nti + self.down(self.act(self.up(inside))).reshape(features_nti.shape)
        return self.head(features_nti)


LINES = [
    "embed.weight  vocab residual",
    "up.weight  neurons residual",
    "up.bias  neurons",
    "down.weight  residual neurons",
    "down.bias  residual",
    "head.weight  labels residual",
    "head.bias  labels",
    "spare.weight  labels neurons",
    "spare.bias  labels",
]
SIZES = {"vocab": 30, "residual": 12, "neurons": 8, "labels": 4}
NET = PermutationSpec.from_lines(LINES, sizes=SIZES, symmetric=["residual", "neurons"])


def tokens(seed: int, rows: int = 16, positions: int = 6) -> Tensor:
    return torch.randint(30, (rows, positions), generator=torch.Generator().manual_seed(seed))


def moved(model: nn.Module, alignment: Alignment) -> nn.Module:
    other = copy.deepcopy(model)
    other.load_state_dict(alignment.apply(model.state_dict()))
    return other


def correlation_by_numpy(a_nic: np.ndarray, b_njc: np.ndarray) -> np.ndarray:
    """Pearson's correlation of every pair of units, summed over the other channels."""
    total = np.zeros((a_nic.shape[1], b_njc.shape[1]))
    for channel in range(a_nic.shape[2]):
        both = np.corrcoef(a_nic[..., channel], b_njc[..., channel], rowvar=False)
        total += both[: a_nic.shape[1], a_nic.shape[1] :]
    return total


class TestMoments:
    @pytest.mark.parametrize(("batches", "entries", "channels"), [(1, 3, 1), (5, 4, 3), (40, 2, 2)])
    def test_correlation_against_numpy(self, batches, entries, channels, generator):
        a, b = (
            5 + torch.randn(40, entries, channels, generator=generator, dtype=torch.float64).cumsum(1) for _ in range(2)
        )
        moments = _Moments()
        for a_part, b_part in zip(a.chunk(batches), b.chunk(batches), strict=True):
            moments.update(a_part, b_part)
        assert moments.count == 40
        np.testing.assert_allclose(moments.correlation(), correlation_by_numpy(a.numpy(), b.numpy()), rtol=1e-10)

    @pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
    def test_correlation_knows_no_scale(self, scale, generator):
        a, b = (torch.randn(30, 3, 1, generator=generator, dtype=torch.float64) for _ in range(2))
        plain, scaled = _Moments(), _Moments()
        plain.update(a, b)
        scaled.update(a * scale, b)
        np.testing.assert_allclose(scaled.correlation(), plain.correlation(), rtol=1e-10)

    def test_dead_units_count_zero(self, generator):
        a, b = (torch.randn(30, 3, 1, generator=generator, dtype=torch.float64) for _ in range(2))
        a[:, 0] = 0
        b[:, 2] = 0.1  # the mean square of a constant rounds
        moments = _Moments()
        moments.update(a, b)
        correlation = moments.correlation()
        assert torch.isfinite(correlation).all()
        assert (correlation[0] == 0).all() and (correlation[:, 2] == 0).all()
        assert (correlation[1:, :2] != 0).all()


def test_a_planted_transform_is_found_and_scored(generator):
    model = Net(0)
    planted = NET.random_alignment(generator)
    found = match_activations(model, moved(model, planted), [{"input_ids": tokens(0)}], NET)
    assert planted.then(found).is_identity
    assert found.metadata["method"] == "activation_matching"
    assert found.metadata["samples"] == 16 * 6 and found.metadata["unmatched"] == []
    # Every unit of a planted transform correlates fully: 12 of the residual at two inputs, 8 neurons at one.
    assert found.metadata["objective_after"] == pytest.approx(12 * 2 + 8, abs=1e-6)
    assert found.metadata["objective_before"] < found.metadata["objective_after"] - 5


def test_the_objective_is_the_correlation_at_the_inputs_of_the_linear_maps():
    a, b = Net(0), Net(1)
    found = match_activations(a, b, [{"input_ids": tokens(0)}], NET)

    def inputs(model: Net) -> list[np.ndarray]:
        with torch.no_grad():
            embedded = model.embed(tokens(0)).flatten(0, 1)
            inside = model.act(model.up(embedded))
            return [each.double().numpy()[..., None] for each in (embedded, embedded + model.down(inside), inside)]

    before = sum(correlation_by_numpy(x, y).trace() for x, y in zip(inputs(a), inputs(b), strict=True))
    after = sum(correlation_by_numpy(x, y).trace() for x, y in zip(inputs(a), inputs(moved(b, found)), strict=True))
    assert found.metadata["objective_before"] == pytest.approx(before, rel=1e-5)
    assert found.metadata["objective_after"] == pytest.approx(after, rel=1e-5)


def test_what_several_maps_read_counts_once():
    model = tiny_model("llama", "causal-lm", dtype=torch.float64)
    spec = PermutationSpec.from_config(model.config)
    found = match_activations(model, model, [tiny_inputs(model)], spec)
    # In each of two layers: the residual before attention and before the MLP, 6 heads of 8 and 40 neurons inside;
    # then the residual before the output head. A unit correlates fully with itself.
    assert found.metadata["objective_after"] == pytest.approx(2 * (24 + 24 + 6 * 8 + 40) + 24, rel=1e-9)


def test_channels_of_heads_are_seen_once_each():
    model = tiny_model("bert", "masked-lm", dtype=torch.float64)
    spec = PermutationSpec.from_config(model.config)
    found = match_activations(model, model, [tiny_inputs(model)], spec)
    # In each of two layers: the residual before attention and before the MLP, 3 heads of 8 values where the output
    # projection reads them, of 8 queries and 8 keys where they are written, 40 neurons; then the residual before either
    # map of the head.
    assert found.metadata["objective_after"] == pytest.approx(2 * (24 + 24 + 3 * (8 + 8 + 8) + 40) + 24 + 24, rel=1e-9)
    gpt2 = tiny_model("gpt2", "causal-lm", dtype=torch.float64)
    found = match_activations(gpt2, gpt2, [tiny_inputs(gpt2)], PermutationSpec.from_config(gpt2.config))
    # Queries, keys and values are written by one map; its values do not count beside those that are read.
    assert found.metadata["objective_after"] == pytest.approx(2 * (24 + 24 + 3 * (8 + 8 + 8) + 44) + 24, rel=1e-9)


@pytest.mark.parametrize("flatten", [False, True])
def test_masked_positions_never_count(flatten):
    a, b = Net(0, flatten), Net(1, flatten)
    mask = torch.ones(16, 6, dtype=torch.long)
    mask[:, 4:] = 0
    mask[3] = 0
    answers = []
    for seed in (1, 2):
        ids = torch.where(mask.bool(), tokens(0), tokens(seed))
        found = match_activations(a, b, [{"input_ids": ids, "attention_mask": mask}], NET)
        assert found.metadata["samples"] == 15 * 4
        answers.append((found.transforms, found.metadata["objective_after"]))
    assert answers[0] == answers[1]
    without = match_activations(a, b, [{"input_ids": tokens(0)[mask.any(1), :4]}], NET)
    assert without.transforms == answers[0][0]
    assert without.metadata["objective_after"] == pytest.approx(answers[0][1], rel=1e-6)


def test_a_pooled_output_as_wide_as_the_input_is_long_is_not_masked():
    model = tiny_model("bert", "sequence-classification")
    spec = PermutationSpec.from_config(model.config)
    planted = spec.random_alignment(torch.Generator().manual_seed(0))
    length = model.config.hidden_size
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (40, length), generator=generator)
    mask = (torch.rand(40, length, generator=generator) < 0.7).long()
    found = match_activations(model, moved(model, planted), [{"input_ids": ids, "attention_mask": mask}], spec)
    assert planted.then(found).is_identity


@pytest.mark.parametrize(("family", "head"), [("llama", "causal-lm"), ("bert", "masked-lm"), ("gpt2", "causal-lm")])
def test_the_size_of_a_batch_does_not_matter(family, head):
    a, b = (tiny_model(family, head, seed=seed, dtype=torch.float64) for seed in (1, 2))
    spec = PermutationSpec.from_config(a.config)
    whole = tiny_inputs(a, batch_size=12)
    found = [
        match_activations(
            a, b, [{name: value[i : i + size] for name, value in whole.items()} for i in range(0, 12, size)], spec
        )
        for size in (12, 5, 1)
    ]
    for other in found[1:]:
        assert other.transforms == found[0].transforms
        assert other.metadata["samples"] == found[0].metadata["samples"] == int(whole["attention_mask"].sum())
        for name in ("objective_before", "objective_after"):
            assert other.metadata[name] == pytest.approx(found[0].metadata[name], rel=1e-9)


def test_two_models_with_dead_units(generator):
    a, b = Net(0, act=nn.ReLU), Net(1, act=nn.ReLU)
    with torch.no_grad():
        a.up.bias[[0, 3]] = -100.0
        b.up.bias[[2, 5, 6]] = -100.0
    found = match_activations(a, b, [{"input_ids": tokens(0)}], NET)
    assert found.metadata["objective_before"] < found.metadata["objective_after"] < 12 * 2 + 5
    planted = NET.random_alignment(generator)
    found = match_activations(a, moved(a, planted), [{"input_ids": tokens(0)}], NET)
    both = planted.then(found).transforms
    assert both["residual"].is_identity
    assert [unit for unit in range(8) if both["neurons"].source(unit) != unit] in ([], [0, 3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_precision(dtype, generator):
    model = Net(0).to(dtype)
    planted = NET.random_alignment(generator)
    found = match_activations(model, moved(model, planted), [{"input_ids": tokens(0)}], NET)
    assert planted.then(found).is_identity


def test_what_no_batch_reaches_stays():
    lines = [line.replace("labels neurons", "labels unreached") for line in LINES]
    spec = PermutationSpec.from_lines(
        lines, sizes={**SIZES, "unreached": 8}, symmetric=["residual", "neurons", "unreached"]
    )
    found = match_activations(Net(0), Net(1), [{"input_ids": tokens(0)}], spec)
    assert found.metadata["unmatched"] == ["unreached"]
    assert found.transforms["unreached"].is_identity and not found.transforms["neurons"].is_identity


def test_an_axis_that_no_input_shows_is_seen_where_it_is_written():
    lines = [line.replace("labels", "classes") if line.startswith("head") else line for line in LINES]
    spec = PermutationSpec.from_lines(lines, sizes={**SIZES, "classes": 4}, symmetric=["classes"])
    model = Net(0)
    planted = spec.random_alignment(torch.Generator().manual_seed(5))
    assert not planted.is_identity
    found = match_activations(model, moved(model, planted), [{"input_ids": tokens(0)}], spec)
    assert planted.then(found).is_identity


def test_a_child_written_before_its_parent(generator):
    class Heads(nn.Module):
        """Two maps through `(q[kv] kv)` channels."""

        def __init__(self):
            super().__init__()
            self.into, self.out = nn.Linear(5, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.into(x).tanh())

    spec = PermutationSpec.from_lines(
        ["into.weight  (q[kv] kv) 5", "into.bias  (q[kv] kv)", "out.weight  5 (q[kv] kv)", "out.bias  5"],
        sizes={"kv": 3, "q": 2},
        symmetric=["kv", "q"],
    )
    torch.manual_seed(0)
    model = Heads().eval()
    planted = spec.random_alignment(generator)
    assert not planted.is_identity
    found = match_activations(model, moved(model, planted), [{"x": torch.randn(50, 5, generator=generator)}], spec)
    assert planted.then(found).is_identity


class Grouped(nn.Module):
    """Two maps through `(kv q[kv] v[kv])` channels."""

    def __init__(self, seed: int):
        super().__init__()
        self.into, self.out = nn.Linear(5, 12), nn.Linear(12, 5)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(x).tanh())


@pytest.mark.parametrize("fixed", [(), ("kv",), ("q",), ("v",)])
def test_children_that_share_a_site_against_every_transform(fixed, generator):
    channels = "(kv q[kv] v[kv])"
    spec = PermutationSpec.from_lines(
        [f"into.weight  {channels} 5", f"into.bias  {channels}", f"out.weight  5 {channels}", "out.bias  5"],
        sizes={"kv": 2, "q": 2, "v": 3},
        symmetric=["kv", "q", "v"],
    )
    spec = spec.fix(*fixed) if fixed else spec
    x = torch.randn(50, 5, generator=generator, dtype=torch.float64)
    for seed in range(3):
        a, b = Grouped(seed), Grouped(seed + 100)
        found = match_activations(a, b, [{"x": x}], spec)
        with torch.no_grad():
            of_a, of_b = (each.into(x).tanh().numpy()[..., None] for each in (a, b))
            correlation = torch.from_numpy(correlation_by_numpy(of_a, of_b))
        index = torch.arange(12, dtype=torch.float64)[:, None].expand(12, 5).contiguous()
        values = []
        for transforms in every_transform(spec, *spec.symmetric_axes):
            source = (
                Alignment(spec, transforms).apply({**b.state_dict(), "into.weight": index})["into.weight"][:, 0].long()
            )
            values.append(float(correlation[torch.arange(12), source].sum()))
        assert found.metadata["objective_after"] == pytest.approx(max(values), rel=1e-9)


@pytest.mark.parametrize("fixed", ["kv", "q", "value_dim"])
def test_a_family_with_a_fixed_member(fixed, generator):
    model = tiny_model("llama", "causal-lm")
    spec = PermutationSpec.from_config(model.config).fix(fixed)
    planted = spec.random_alignment(generator)
    found = match_activations(model, moved(model, planted), [tiny_inputs(model, batch_size=8)], spec)
    assert planted.then(found).is_identity and not any(axis.startswith(fixed) for axis in found.transforms)


def test_the_models_are_left_as_they_were():
    a, b = Net(0), Net(1)
    before = [copy.deepcopy(each.state_dict()) for each in (a, b)]
    match_activations(a, b, [{"input_ids": tokens(0)}], NET)
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())


class TestBadInput:
    def test_no_data(self):
        with pytest.raises(AlignmentError, match="needs calibration data"):
            match_activations(Net(0), Net(1), [], NET)

    def test_nothing_to_see(self):
        with pytest.raises(AlignmentError, match="no symmetric axis can be seen"):
            match_activations(Net(0), Net(1), [{"input_ids": tokens(0)}], NET.fix("*"))

    @pytest.mark.parametrize("damaged", [0, 1])
    def test_what_is_not_finite_is_named(self, damaged):
        models = [Net(0), Net(1)]
        with torch.no_grad():
            models[damaged].up.bias[2] = float("nan")
        role = ("the reference", "the model that moves")[damaged]
        with pytest.raises(AlignmentError, match=f"NaN or Inf in the input of (down|head) of {role}"):
            match_activations(*models, [{"input_ids": tokens(0)}], NET)
        assert not any(module._forward_hooks for model in models for module in model.modules())

    def test_two_architectures(self):
        a, b = (tiny_model(*row) for row in (("bert", "masked-lm"), ("bert", "token-classification")))
        with pytest.raises(AlignmentError, match="two models of one architecture"):
            match_activations(a, b, [tiny_inputs(a)], PermutationSpec.from_config(a.config))

    @pytest.mark.parametrize("training", [0, 1])
    def test_a_model_in_training(self, training):
        models = [Net(0), Net(1)]
        models[training].train()
        with pytest.raises(AlignmentError, match="evaluation mode"):
            match_activations(*models, [{"input_ids": tokens(0)}], NET)

    def test_a_mask_of_another_kind(self):
        batch = {"input_ids": tokens(0), "attention_mask": torch.ones(16, 1, 6, 6)}
        with pytest.raises(AlignmentError, match=r"attention_mask: shape \[rows, positions\] expected"):
            match_activations(Net(0), Net(1), [batch], NET)


@pytest.mark.gpu
def test_an_accelerator_finds_the_same():
    a, b = (tiny_model("llama", "causal-lm", seed=seed) for seed in (1, 2))
    spec = PermutationSpec.from_config(a.config)
    batch = tiny_inputs(a, batch_size=8)
    expected = match_activations(a, b, [batch], spec)
    found = match_activations(a.cuda(), b.cuda(), [{name: value.cuda() for name, value in batch.items()}], spec)
    assert found.transforms == expected.transforms
