"""What a plan says of a calibration, against counts of a real one."""

from collections import Counter

import pytest
import torch

from hf_llfc.calibration import Settings, Source, calibrate_model
from hf_llfc.calibration.costs import PASSES, calibration_cost, forward_of
from hf_llfc.calibration.ridge import FEW, PARTS
from hf_llfc.checkpoints import open_checkpoint
from tests.calibration.test_engine import batches, merged, pair


def counted(model):
    """How often each module with weights runs."""
    runs = Counter()
    for name, module in model.named_modules():
        if module._parameters:
            module.register_forward_hook(lambda module, args, output, name=name: runs.update([name]))
    return runs


def passes_of(model, runs, count):
    """Runs of whole models, each module as far as it has weights."""
    sizes = {
        name: sum(each.numel() for each in module._parameters.values() if each is not None)
        for name, module in model.named_modules()
        if module._parameters
    }
    return sum(runs[name] * size for name, size in sizes.items()) / sum(sizes.values()) / count


@pytest.mark.parametrize("method", ["calibrate", "repair"])
@pytest.mark.parametrize(("family", "head"), [("llama", "causal-lm"), ("vit", "image-classification")])
def test_models_run_about_as_often_as_is_planned(family, head, method):
    models = pair(family, head, torch.float32)
    merge, inputs = merged(models), batches(models[0], 12)
    of_parent, of_merge = counted(models[0]), counted(merge)
    calibrate_model(merge, models, [Source(inputs, (0.5, 0.5))], Settings(method))
    assert passes_of(models[0], of_parent, len(inputs)) == pytest.approx(PASSES[0], rel=0.3)
    assert passes_of(merge, of_merge, len(inputs)) == pytest.approx(PASSES[1], rel=0.3)


def test_work_grows_with_samples_and_models():
    model = pair("llama", "causal-lm", torch.float32)[0]
    checkpoint, (batch, _) = open_checkpoint(model), batches(model)[0]
    one = forward_of(checkpoint, batch)
    cost = calibration_cost(checkpoint, batch, 100, 2, method="calibrate", chooses=False)
    assert cost.operations == pytest.approx(100 * cost.passes * one.operations)
    assert cost.solving == pytest.approx(100 * one.products + one.solves)
    assert cost.passes == pytest.approx(2 * PASSES[0] + PASSES[1])
    assert calibration_cost(checkpoint, batch, 100, 3, method="calibrate", chooses=False).passes > cost.passes
    assert calibration_cost(checkpoint, batch, 100, 2, method="repair", chooses=False).solving == 0


def test_few_samples_are_all_held_out_in_turn():
    model = pair("llama", "causal-lm", torch.float32)[0]
    checkpoint, (batch, _) = open_checkpoint(model), batches(model)[0]
    once, few, many = (
        calibration_cost(checkpoint, batch, samples, 2, method="calibrate", chooses=chooses).passes
        for samples, chooses in ((FEW, False), (FEW - 1, True), (FEW, True))
    )
    assert few - once == pytest.approx(PARTS * (many - once))
