"""The device that a user names: what is there is taken, all else is one clear error before anything is written."""

import pytest
import torch

import hf_llfc
from hf_llfc.errors import LLFCError
from hf_llfc.evaluation import EvaluationConfig
from hf_llfc.parallel.devices import chosen_device, device_alone
from hf_llfc.parallel.processes import Processes
from tests.runs import byte_llama, saved, text_data

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 1)


@pytest.fixture
def two_gpus(monkeypatch):
    """As if the machine had two."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


def two_models(folder):
    """Two small models, saved in folders `1` and `2`."""
    return [saved(byte_llama(seed), folder / str(seed)) for seed in (1, 2)]


def test_what_is_there_is_taken(two_gpus):
    assert chosen_device("auto", CPU) == CPU
    assert chosen_device("auto", CUDA, 2) == CUDA
    assert chosen_device("cuda", CUDA, 2) == CUDA
    assert chosen_device("cuda", CPU) == torch.device("cuda", 0)
    assert chosen_device("cuda:0", CUDA) == torch.device("cuda", 0)
    assert chosen_device("cpu", CUDA) == CPU


def test_what_is_not_there_is_refused(two_gpus):
    with pytest.raises(LLFCError, match=r"no cuda:2 here .*2 of cuda"):
        chosen_device("cuda:2", CUDA)
    with pytest.raises(LLFCError, match=r"no xpu here .*only cuda"):
        chosen_device("xpu", CUDA)
    with pytest.raises(LLFCError, match="cuda:0 cannot be that of 2 processes"):
        chosen_device("cuda:0", CUDA, 2)
    with pytest.raises(LLFCError, match="ACCELERATE_USE_CPU"):
        chosen_device("cpu", CUDA, 2)
    with pytest.raises(LLFCError, match="'gpu' is no device of torch"):
        chosen_device("gpu", CPU)


def test_a_device_without_float64_is_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(LLFCError, match="mps has no float64"):
        chosen_device("mps", CPU)
    with pytest.raises(LLFCError, match="mps has no float64"):
        device_alone("auto")


def test_only_an_accelerator_takes_work_from_the_processor():
    assert Processes().workers().device is None
    assert Processes("cpu").workers().device is None
    assert device_alone(None) is None


@pytest.mark.parametrize("device", ["cuda:77", "gpu"])
def test_a_run_on_what_is_not_there_writes_nothing(tmp_path, device):
    models = two_models(tmp_path)
    with pytest.raises(LLFCError, match="device: "):
        hf_llfc.merge(models, out=tmp_path / "out", device=device)
    with pytest.raises(LLFCError, match="device: "):
        hf_llfc.align(models[1], to=models[0], device=device)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["1", "2"]


def test_the_processor_named_is_the_processor_unnamed(tmp_path):
    a, b = two_models(tmp_path)
    data = EvaluationConfig("text-generation", str(text_data(tmp_path)), tokenizer="bytes", max_length=32)
    methods = ("weight_matching", "activation_matching")
    by_name, unnamed = (
        [hf_llfc.align(b, to=a, method=each, calibration=data, device=device).transforms for each in methods]
        for device in ("cpu", None)
    )
    assert by_name == unnamed
    found = [hf_llfc.diagnose(a, b, data, alphas=[0.0, 0.5, 1.0], device=device) for device in ("cpu", None)]
    assert found[0].to_dict() == found[1].to_dict()


@pytest.mark.gpu
def test_an_accelerator_merges_and_aligns_as_the_processor_does(tmp_path):
    models = two_models(tmp_path)
    found = [hf_llfc.align(models[1], to=models[0], device=device) for device in ("cpu", "auto")]
    assert found[0].transforms == found[1].transforms
    for device in ("cpu", "auto"):
        hf_llfc.merge(models, out=tmp_path / device, align="weight_matching", device=device)
    merged = [(tmp_path / device / "model.safetensors").read_bytes() for device in ("cpu", "auto")]
    assert merged[0] == merged[1]
