"""Whole models, tensor by tensor: what is averaged, what is kept, what is refused, and in which order."""

import pytest
import torch

from hf_llfc.checkpoints import TensorInfo
from hf_llfc.checkpoints.source import Source
from hf_llfc.errors import CheckpointError, RecipeError
from hf_llfc.merging import Merge, Rule, WeightSchedule, linear_combination, merged_infos

HALVES = (WeightSchedule.constant(0.5), WeightSchedule.constant(0.5))


def network(generator, dtype=torch.float32):
    """A state dict with every kind of tensor that checkpoints hold."""
    return {
        "stages.0.conv.weight": torch.randn(4, 3, 3, 3, generator=generator).to(dtype),
        "stages.0.bn.running_mean": torch.randn(4, generator=generator).to(dtype),
        "stages.0.bn.running_var": torch.rand(4, generator=generator).to(dtype),
        "stages.0.bn.num_batches_tracked": torch.tensor(100),
        "embeddings.position_ids": torch.arange(8)[None],
        "attention.mask": torch.ones(2, 2, dtype=torch.bool),
        "rotary.inv_freq": 10000.0 ** -(torch.arange(4) / 4),
        "head.weight": torch.randn(2, 4, generator=generator).to(dtype),
    }


def infos_of(state):
    return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}


def merge(*states, schedules=HALVES, out_dtype=None, base=None, **settings):
    sources = [Source(f"org/{letter}", state.__getitem__) for letter, state in zip("abcdef", states, strict=False)]
    if base is not None:
        settings["base"] = Source("org/base", base.__getitem__)
    return dict(Merge.plan(sources, merged_infos(infos_of(states[0]), out_dtype), schedules, **settings).tensors())


def test_every_kind_of_tensor_is_treated_on_purpose(generator):
    a, b = network(generator), network(generator)
    b["stages.0.bn.num_batches_tracked"] = torch.tensor(250)
    merged = merge(a, b)
    assert list(merged) == list(a)
    for name in ("stages.0.conv.weight", "stages.0.bn.running_mean", "stages.0.bn.running_var", "head.weight"):
        assert torch.equal(merged[name], linear_combination([a[name], b[name]], (0.5, 0.5), out_dtype=torch.float32))
    assert merged["stages.0.bn.num_batches_tracked"] == 250
    for name in ("embeddings.position_ids", "attention.mask", "rotary.inv_freq"):
        assert torch.equal(merged[name], a[name])


def test_the_order_and_the_dtypes_are_those_of_the_first_model(generator):
    a, b = network(generator, torch.bfloat16), network(generator)
    merged = merge(a, dict(reversed(list(b.items()))))
    assert [(name, tensor.dtype) for name, tensor in merged.items()] == [(name, t.dtype) for name, t in a.items()]


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_dtype_changes_weights_and_statistics_only(generator, out_dtype):
    a, b = network(generator), network(generator)
    merged = merge(a, b, out_dtype=out_dtype)
    kept = {"stages.0.bn.num_batches_tracked", "embeddings.position_ids", "attention.mask", "rotary.inv_freq"}
    for name, tensor in merged.items():
        assert tensor.dtype == (a[name].dtype if name in kept else out_dtype)
    assert infos_of(merged) == merged_infos(infos_of(a), out_dtype)


def test_constants_survive_weights_that_do_not_sum_to_one(generator):
    a = network(generator)
    merged = merge(a, a, schedules=[WeightSchedule.constant(1.0)] * 2, normalize=False)
    assert torch.equal(merged["rotary.inv_freq"], a["rotary.inv_freq"])
    assert torch.equal(merged["head.weight"], 2 * a["head.weight"])


def test_task_arithmetic_scales_what_was_learned(generator):
    base, a, b = (network(generator, torch.float64) for _ in range(3))
    merged = merge(
        a,
        b,
        base=base,
        scale=0.5,
        schedules=[WeightSchedule.constant(1.0), WeightSchedule.constant(-0.4)],
        normalize=False,
    )
    name = "head.weight"
    expected = base[name] + 0.5 * (a[name] - base[name]) - 0.2 * (b[name] - base[name])
    torch.testing.assert_close(merged[name], expected, rtol=1e-14, atol=1e-14)


def test_one_model_at_full_weight_is_itself(generator):
    a = network(generator)
    merged = merge(a, schedules=[WeightSchedule.constant(1.0)])
    assert all(torch.equal(merged[name], a[name]) for name in a)


@pytest.mark.parametrize(
    ("value", "message"),
    [(1e6, r"weight: a merged value of 1e\+06 is beyond the range of float16"), (float("nan"), "weight of a: 1 of 2")],
)
def test_one_model_alone_is_rounded_once_within_the_range_of_its_dtype(value, message):
    tie = 1 + 2**-11 + 2**-30  # above the middle of two neighbours, which float32 puts it on
    info = {"weight": TensorInfo(torch.float16, (2,))}

    def copied(*values: float) -> torch.Tensor:
        tensor = torch.tensor(values, dtype=torch.float64)
        return Merge.copy(Source("a", lambda name: tensor), info).tensor("weight")

    assert copied(tie, 0).tolist() == [1 + 2**-10, 0]
    with pytest.raises(CheckpointError, match=message):
        copied(value, 0)


def test_weights_by_layer_reach_the_tensors():
    a, b = ({f"layers.{i}.w": torch.full((2,), value) for i in range(3)} for value in (0.0, 1.0))
    schedules = [WeightSchedule((Rule(None, (1.0, 0.0)),)), WeightSchedule((Rule(None, (0.0, 1.0)),))]
    merged = merge(a, b, schedules=schedules)
    assert [tensor[0].item() for tensor in merged.values()] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("name", ["embeddings.position_ids", "attention.mask", "rotary.inv_freq"])
def test_constants_that_differ_are_refused(name, generator):
    a, b = network(generator), network(generator)
    b[name] = b[name].clone()
    b[name].view(-1)[1] = 0
    with pytest.raises(CheckpointError, match=rf"{name}: org/b and org/a hold different .* values"):
        merge(a, b)


def test_a_variance_that_became_negative_is_refused(generator):
    a, b = network(generator), network(generator)
    schedules = [WeightSchedule.constant(5.0), WeightSchedule.constant(-4.0)]
    a["stages.0.bn.running_var"], b["stages.0.bn.running_var"] = torch.full((4,), 0.1), torch.full((4,), 0.5)
    with pytest.raises(CheckpointError, match=r"stages\.0\.bn\.running_var: the merged variance is -1\.5"):
        merge(a, b, schedules=schedules)


def test_damage_is_named_by_model_and_tensor(generator):
    a, b = network(generator), network(generator)
    b["head.weight"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"head\.weight of org/b: 1 of 8 elements are NaN or infinite"):
        merge(a, b)


def test_weights_are_refused_before_anything_is_read(generator):
    def refuse(name):
        raise AssertionError(name)

    infos = infos_of(network(generator))
    with pytest.raises(RecipeError, match="sum to 0"):
        Merge.plan([Source("org/a", refuse)] * 2, infos, [WeightSchedule.constant(0.5), WeightSchedule.constant(-0.5)])


def test_one_tensor_of_each_model_is_read_at_a_time(generator):
    read = []
    states = [network(generator), network(generator)]
    sources = [
        Source(label, lambda name, label=label, state=state: read.append((label, name)) or state[name])
        for label, state in zip("ab", states, strict=True)
    ]
    stream = Merge.plan(sources, infos_of(states[0]), HALVES).tensors()
    assert read == []
    next(stream)
    assert read == [("a", "stages.0.conv.weight"), ("b", "stages.0.conv.weight")]


# -- one model alone


def alone(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The only tensor of the only model, written in a dtype."""
    source = Source("org/a", {"layer.weight": tensor}.__getitem__)
    infos = merged_infos(infos_of({"layer.weight": tensor}), dtype)
    return Merge.copy(source, infos).tensor("layer.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_alone_is_rounded_once(dtype):
    # Rounded to float32 first, it lies on the tie, and goes down from there.
    above_a_tie = 1 + torch.finfo(dtype).eps / 2 + 2.0**-40
    written = alone(torch.tensor([above_a_tie, -above_a_tie], dtype=torch.float64), dtype)
    above = 1 + torch.finfo(dtype).eps
    assert written.dtype == dtype and written.tolist() == [above, -above]


def test_a_value_beyond_the_range_is_refused_of_a_model_alone():
    with pytest.raises(CheckpointError, match=r"layer\.weight: a merged value of 1e\+06 is beyond .* float16"):
        alone(torch.tensor([1.0, 1e6]), torch.float16)


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_what_is_not_finite_is_refused_of_a_model_alone(dtype):
    with pytest.raises(CheckpointError, match=r"layer\.weight of org/a: 1 of 3 elements are NaN .* index 1;"):
        alone(torch.tensor([1.0, float("nan"), 2.0]), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_alone_in_its_own_dtype_stays_bit_by_bit(dtype, generator):
    tensor = torch.cat([torch.randn(100, generator=generator).to(dtype), torch.tensor([0.0, -0.0, 1e-40], dtype=dtype)])
    same = alone(tensor)
    assert same.dtype == dtype and torch.equal(same.view(torch.uint8), tensor.view(torch.uint8))


def test_numbers_of_eight_bits_are_copied_as_they_are():
    tensor = torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn)
    assert torch.equal(alone(tensor).view(torch.uint8), tensor.view(torch.uint8))
