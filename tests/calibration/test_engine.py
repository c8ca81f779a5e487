"""Calibration against plain least squares over whole forward passes, and what it must never do."""

import copy

import numpy as np
import pytest
import torch

from hf_llfc.calibration import Settings, Source, calibrate_model, engine
from hf_llfc.calibration.maps import plan_maps
from hf_llfc.calibration.replay import Replay, chains_that_hold
from hf_llfc.diagnostics.features.layers import LOGITS, Layer
from hf_llfc.diagnostics.streaming import Execution
from hf_llfc.errors import EvaluationError
from hf_llfc.parallel.ranks import OneProcess
from tests.tiny_models import tiny_inputs, tiny_model

# Family, and the name of its head in `tiny_model`.
MODELS = [
    ("bert", "base"),
    ("bert", "sequence-classification"),
    ("distilbert", "sequence-classification"),
    ("gpt2", "causal-lm"),
    ("llama", "causal-lm"),
    ("qwen3", "causal-lm"),
    ("mixtral", "causal-lm"),
    ("vit", "image-classification"),
    ("resnet-basic", "image-classification"),
    ("resnet-bottleneck", "image-classification"),
]


def batches(model, count=3, seed=0):
    inputs = [tiny_inputs(model, seed=seed + number, batch_size=4) for number in range(count)]
    return [(batch, torch.arange(4) + 4 * number) for number, batch in enumerate(inputs)]


def merged(models):
    merge = copy.deepcopy(models[0])
    others = [model.state_dict() for model in models]
    merge.load_state_dict(
        {
            name: sum(state[name] for state in others) / len(others) if value.is_floating_point() else value
            for name, value in merge.state_dict().items()
        }
    )
    return merge.eval()


def pair(family, head, dtype=torch.float64):
    return [tiny_model(family, head, seed=seed, dtype=dtype).eval() for seed in (1, 2)]


def outputs(model, inputs, name):
    """What a module takes and gives, as rows."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, args, output: seen.append((args[0].detach(), output.detach()))
    )
    with torch.no_grad():
        for batch, _ in inputs:
            model(**batch)
    handle.remove()
    return (torch.cat([pair[side].flatten(0, -2) for pair in seen]) for side in (0, 1))


def fc1_of(model):
    """A map in the second block."""
    return next(name for name, _ in model.named_modules() if name.endswith((".1.intermediate.dense", ".1.mlp.fc1")))


def test_a_map_gets_the_least_squares_solution():
    models = pair("vit", "image-classification")
    inputs = batches(models[0])
    merge = merged(models)
    name = fc1_of(merge)
    ridge = 0.05
    x, y = outputs(merge, inputs, name)
    target = sum(list(outputs(model, inputs, name))[1] for model in models) / 2
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    penalty = torch.cat([(x - x.mean(0)).square().sum(0).mean().expand(x.shape[1]), torch.tensor([len(x)])]) * ridge
    rows = torch.cat([torch.cat([x, ones], 1), penalty.sqrt().diag()])
    wanted = torch.cat([target - y, torch.zeros(x.shape[1] + 1, y.shape[1], dtype=x.dtype)])
    expected = torch.linalg.lstsq(rows, wanted).solution
    before = copy.deepcopy(merge)
    result = calibrate_model(
        merge, models, [Source(inputs, (0.5, 0.5))], Settings(ridge=ridge, layers=(name,), stream=False)
    )
    change, shift = (
        getattr(merge.get_submodule(name), key) - getattr(before.get_submodule(name), key) for key in ("weight", "bias")
    )
    torch.testing.assert_close(change, expected[:-1].T, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(shift, expected[-1], rtol=1e-6, atol=1e-9)
    fitted = list(outputs(merge, inputs, name))[1]
    (row,) = result.changes
    spread = (target - target.mean(0)).square().sum()
    assert row.before == pytest.approx(float((target - y).square().sum() / spread))
    assert row.after == pytest.approx(float((target - fitted).square().sum() / spread))
    # Nothing else moved.
    changed = [key for key, value in merge.state_dict().items() if not torch.equal(value, before.state_dict()[key])]
    assert sorted(changed) == [f"{name}.bias", f"{name}.weight"]


@pytest.mark.parametrize(("family", "head"), MODELS)
def test_blocks_that_are_not_run_again_change_nothing(family, head, monkeypatch):
    models = pair(family, head)
    inputs = batches(models[0])
    plan = plan_maps(models[0], inputs[0][0])
    assert chains_that_hold(models[0], plan.chains, inputs[0][0]) == plan.chains != ()
    made = []
    for chains_hold in (chains_that_hold, lambda *_: ()):
        monkeypatch.setattr(engine, "chains_that_hold", chains_hold)
        for memory in (1 << 30, 0):
            merge = merged(models)
            calibrate_model(merge, models, [Source(inputs, (0.5, 0.5))], Settings(memory=memory))
            made.append(merge.state_dict())
    for other in made[1:]:
        for name, value in made[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["calibrate", "repair"])
@pytest.mark.parametrize(("family", "head"), MODELS)
def test_equal_parents_stay_as_they_are(family, head, method):
    model = pair(family, head)[0]
    merge = copy.deepcopy(model)
    calibrate_model(merge, [model, model], [Source(batches(model), (0.5, 0.5))], Settings(method))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(merge.state_dict()[name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("family", "head"), MODELS)
def test_features_come_nearer_to_the_blend(family, head):
    models = pair(family, head)
    inputs = batches(models[0], count=16)
    merge = merged(models)
    result = calibrate_model(merge, models, [Source(inputs, (0.5, 0.5))])
    assert all(row.after <= row.before + 1e-12 for row in result.changes)
    assert sum(row.after for row in result.changes) < 0.9 * sum(row.before for row in result.changes)


def test_a_map_of_a_residual_stream_is_fitted_to_the_stream():
    models = pair("llama", "causal-lm")
    plan = plan_maps(models[0], batches(models[0])[0][0])
    compared = {each.name: each.sites[0].answers.label for each in plan.maps}
    assert compared["model.layers.0.self_attn.o_proj"] == "model.layers.0.post_attention_layernorm:input"
    assert compared["model.layers.0.mlp.down_proj"] == "model.layers.0"
    assert compared["model.layers.0.mlp.up_proj"] == "model.layers.0.mlp.up_proj"
    stages = {each.name: each.stage for each in plan.maps}
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert len({stages[name] for name in names}) == 1
    assert stages["model.layers.0.mlp.gate_proj"] == stages["model.layers.0.mlp.up_proj"]


def test_sums_in_place_are_found():
    model = pair("resnet-basic", "image-classification")[0]
    plan = plan_maps(model, batches(model)[0][0])
    assert any(each.sites[0].answers.label.endswith("activation:input") for each in plan.maps)


def test_what_stays_is_named():
    models = pair("mixtral", "causal-lm")
    left = plan_maps(models[0], batches(models[0])[0][0]).left
    gpt2 = pair("gpt2", "causal-lm")[0]
    assert "shared" in plan_maps(gpt2, batches(gpt2)[0][0]).left["lm_head"]
    assert all("router" in reason or "divide" in reason for reason in left.values())


def test_padded_tokens_do_not_count():
    models = pair("llama", "causal-lm")
    batch = tiny_inputs(models[0], batch_size=4)
    length = batch["input_ids"].shape[1]
    mask = torch.ones(4, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    made = []
    for filler in (1, 3):
        ids = torch.where(mask == 1, batch["input_ids"], filler)
        merge = merged(models)
        data = [({"input_ids": ids, "attention_mask": mask}, torch.arange(4))]
        calibrate_model(merge, models, [Source(data, (0.5, 0.5))])
        made.append(merge.state_dict())
    for name, value in made[0].items():
        torch.testing.assert_close(made[1][name], value, rtol=1e-8, atol=1e-10)


def test_more_ridge_moves_less():
    models = pair("vit", "image-classification")
    moved = []
    for ridge in (1e-3, 1e-1, 1e9):
        result = calibrate_model(
            merged(models), models, [Source(batches(models[0]), (0.5, 0.5))], Settings(ridge=ridge)
        )
        moved.append(np.mean([row.moved for row in result.changes if row.moved]))
    assert moved[0] > moved[1] > moved[2]


def test_features_that_are_not_finite_are_named():
    models = pair("llama", "causal-lm")
    with torch.no_grad():
        models[1].model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(EvaluationError, match="of parent 2 are not finite"):
        calibrate_model(merged([models[0]]), models, [Source(batches(models[0]), (0.5, 0.5))])


def test_what_went_wrong_on_another_process_is_said_here():
    class Two(OneProcess):
        def gather(self, value):
            if isinstance(value, int):
                return [value, value]
            return [value, (value[0], "features of layer 'x' of parent 1 are not finite")]

    models = pair("llama", "causal-lm")
    execution = Execution(Two(torch.device("cpu")))
    with pytest.raises(EvaluationError, match="cannot be calibrated: features of layer 'x' of parent 1"):
        calibrate_model(merged(models), models, [Source(batches(models[0]), (0.5, 0.5))], execution=execution)


def test_nothing_to_calibrate():
    models = pair("llama", "causal-lm")
    with pytest.raises(EvaluationError, match="no affine map"):
        embedding = Settings(layers=("model.embed_tokens",))
        calibrate_model(merged(models), models, [Source(batches(models[0]), (0.5, 0.5))], embedding)
    with pytest.raises(EvaluationError, match="needs samples"):
        calibrate_model(merged(models), models, [])


def test_a_pattern_without_a_module_is_refused():
    models = pair("llama", "causal-lm")
    with pytest.raises(EvaluationError, match=r"did you mean 'model\.layers\.0\.mlp\.up_proj'"):
        wrong = Settings(layers=("*.down_proj", "model.layers.0.mlp.up_prj"))
        calibrate_model(merged(models), models, [Source(batches(models[0]), (0.5, 0.5))], wrong)


@pytest.mark.parametrize("method", ["calibrate", "repair"])
@pytest.mark.parametrize(("family", "head"), [MODELS[0], MODELS[3], MODELS[7]])
def test_a_calibration_goes_on_where_it_stopped(family, head, method):
    models = pair(family, head, torch.float32)
    sources, parts = [Source(batches(models[0]), (0.5, 0.5))], []
    whole = merged(models)
    expected = calibrate_model(whole, models, sources, Settings(method), on_finished=parts.append)
    assert len(parts) > 1 and [row for part in parts for row in part.changes] == list(expected.changes)
    for done in range(1, len(parts) + 1):
        merge, later = merged(models), []
        result = calibrate_model(
            merge, models, sources, Settings(method), finished=parts[:done], on_finished=later.append
        )
        assert result == expected and [part.changes for part in later] == [part.changes for part in parts[done:]]
        for name, value in whole.state_dict().items():
            assert torch.equal(merge.state_dict()[name], value), name


def test_a_calibration_goes_on_with_another_memory():
    """As after a stop on other processes, whose shares of the samples are of another size."""
    models = pair("vit", "image-classification", torch.float32)
    sources, parts = [Source(batches(models[0]), (0.5, 0.5))], []
    whole = merged(models)
    expected = calibrate_model(whole, models, sources, on_finished=parts.append)
    for done in range(1, len(parts)):
        merge = merged(models)
        assert calibrate_model(merge, models, sources, Settings(memory=0), finished=parts[:done]) == expected
        for name, value in whole.state_dict().items():
            assert torch.equal(merge.state_dict()[name], value), name


def test_processes_hold_targets_of_the_same_maps():
    """That of most samples limits all."""

    class Two(OneProcess):
        def gather(self, value):
            return [value, 1 << 40] if isinstance(value, int) else [value]

    models = pair("llama", "causal-lm")
    sources = [Source(batches(models[0]), (0.5, 0.5))]
    parts = {}
    for name, processes in {"one": None, "two": Two(torch.device("cpu"))}.items():
        parts[name] = []
        calibrate_model(merged(models), models, sources, execution=Execution(processes), on_finished=parts[name].append)
    assert len(parts["two"]) == len(plan_maps(models[0], sources[0].batches[0][0]).stages) > len(parts["one"])


@pytest.mark.parametrize(("family", "head"), [MODELS[4], MODELS[7], MODELS[8]])
def test_targets_take_what_is_counted(family, head):
    models = pair(family, head)
    (batch, ids), *_ = batches(models[0])
    if "attention_mask" in batch:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    seen = []
    sums = engine.Moments.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Moments, "add", lambda self, x, r, t: (seen.append(t.numel()), sums(self, x, r, t)))
        calibrate_model(merged(models), models, [Source([(batch, ids)], (0.5, 0.5))])
    units = batch.get("attention_mask", ids).numel()
    counted = [units * site.size for each in plan_maps(models[0], batch).maps for site in each.sites]
    assert sum(seen) == sum(counted)


def test_an_end_that_is_changed_in_place_is_kept_as_it_was():
    model = pair("llama", "causal-lm")[0]
    (batch, _), *_ = batches(model)
    first = model.model.layers[0]
    seen = []
    first.register_forward_hook(lambda *args: seen.append(args[2].clone()))
    handle = model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0].add_(1.0),))
    replay = Replay(model, [["model.layers.0", "model.layers.1"]])
    answers = [replay.answer(0, batch, {"model.layers.0"}) for _ in range(2)]
    handle.remove()
    assert torch.equal(*answers) and torch.equal(*seen)


def test_a_run_ends_where_all_was_seen():
    model = pair("llama", "causal-lm")[0]
    (batch, _), *_ = batches(model)
    seen = []
    late = model.model.layers[1].register_forward_hook(lambda *_: seen.append("late"))
    layer = Layer("", "model.layers.0", 0, "output", (), False)
    Replay(model, ()).run(0, batch, [layer], lambda *_: seen.append("layer"), set())
    late.remove()
    assert seen == ["layer"]
    Replay(model, ()).run(0, batch, [Layer(LOGITS, "", 0, LOGITS, (), False)], lambda *_: seen.append("logits"), set())
    assert seen == ["layer", "logits"]
