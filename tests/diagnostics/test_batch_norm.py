import pytest
import torch

from hf_llfc.diagnostics import has_batch_norm, recompute_batch_norm
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation import EvaluationConfig, load_evaluation_data
from tests.evaluation.tiny_data import pixel_rows
from tests.tiny_models import tiny_model


def calibration(model, **settings):
    config = EvaluationConfig(task="image-classification", dataset=pixel_rows(24), labels=False, **settings)
    return load_evaluation_data(config, None, model.config)


def test_the_first_layer_gets_the_statistics_of_its_input():
    model = tiny_model("resnet-basic", "image-classification", dtype=torch.float64)
    weights = {name: value.clone() for name, value in model.named_parameters()}
    data = calibration(model, batch_size=8)
    inputs = []
    norm = model.resnet.embedder.embedder.normalization
    handle = norm.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    layers = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    momentum = [layer.momentum for layer in layers]
    assert recompute_batch_norm(model, data.batches()) == len(layers)
    handle.remove()
    assert len(inputs) == 3
    means = torch.stack([batch.mean(dim=(0, 2, 3)) for batch in inputs])
    variances = torch.stack([batch.transpose(0, 1).flatten(1).var(dim=1) for batch in inputs])
    assert torch.allclose(norm.running_mean, means.mean(dim=0), rtol=1e-12)
    assert torch.allclose(norm.running_var, variances.mean(dim=0), rtol=1e-12)
    assert norm.num_batches_tracked == 3
    assert [layer.momentum for layer in layers] == momentum
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


def test_a_dead_network_is_brought_back_to_life():
    model = tiny_model("resnet-basic", "image-classification", dtype=torch.float64)
    data = calibration(model, batch_size=24)
    recompute_batch_norm(model, data.batches())
    ((batch, _),) = data.batches()
    expected = model(batch["pixel_values"].double()).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("convolution.weight"):
                parameter.mul_(0.1)
    assert not torch.allclose(model(batch["pixel_values"].double()).logits, expected, rtol=0.5)
    recompute_batch_norm(model, data.batches())
    # Batch normalization divides the shrinking out, up to the epsilon it adds to the variance.
    shrunk = model(batch["pixel_values"].double()).logits
    assert (shrunk - expected).norm() < 0.2 * expected.norm()


def test_models_without_it_are_left_alone():
    model = tiny_model("vit", "image-classification")
    assert not has_batch_norm(model)
    assert recompute_batch_norm(model, iter([])) == 0
    assert has_batch_norm(tiny_model("resnet-basic", "image-classification"))


def test_no_batches_are_an_error():
    model = tiny_model("resnet-basic", "image-classification")
    with pytest.raises(EvaluationError, match="no calibration batches"):
        recompute_batch_norm(model, iter([]))
