"""Adapters merged into one, beside what peft's own add_weighted_adapter makes of them."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import hf_llfc
from hf_llfc.checkpoints import load_model, open_checkpoint
from tests.checkpoints.views.test_adapted import folded_by_peft, lora
from tests.runs import byte_llama

pytestmark = pytest.mark.filterwarnings("ignore")

WEIGHTS = [0.7, -0.4]
SIDE = 24
"""The shorter side of the smallest weight, the highest rank that peft takes."""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A Llama in float32."""
    byte_llama(0, attention_bias=True).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def two(base, tmp_path) -> list[Path]:
    """Two adapters of one rank and of different scales."""
    return [lora(base, tmp_path / f"adapter-{seed}", seed, lora_alpha=2 * seed) for seed in (1, 2)]


def by_peft(base: Path, adapters: list[Path], kind: str, **settings) -> dict[str, Tensor]:
    """The changes that peft's combination makes, by the name of the weight."""
    model = PeftModel.from_pretrained(load_model(open_checkpoint(base)), adapters[0], adapter_name="a0")
    for index, adapter in enumerate(adapters[1:], start=1):
        model.load_adapter(adapter, f"a{index}")
    names = [f"a{index}" for index in range(len(adapters))]
    model.add_weighted_adapter(names, settings.pop("weights", WEIGHTS), "merged", combination_type=kind, **settings)
    return {
        f"{path.removeprefix('base_model.model.')}.weight": module.get_delta_weight("merged").detach()
        for path, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def by_us(base: Path, adapters: list[Path], folder: Path, method: str, **settings) -> dict[str, Tensor]:
    hf_llfc.merge(
        adapters, settings.pop("weights", WEIGHTS), out=folder, save_as="adapter", merge_method=method, **settings
    )
    plain = dict(open_checkpoint(base).state_dict())
    folded = folded_by_peft(base, folder)
    return {name: tensor - plain[name] for name, tensor in folded.items() if not torch.equal(tensor, plain[name])}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two changes, relative to one of them."""
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)


def test_sums_are_those_of_cat(base, two, tmp_path):
    assert apart(by_peft(base, two, "cat"), by_us(base, two, tmp_path / "out", "task_arithmetic")) < 1e-5


def test_a_given_rank_is_that_of_svd(base, two, tmp_path):
    expected = by_peft(base, two, "svd", svd_rank=3)
    assert apart(expected, by_us(base, two, tmp_path / "out", "task_arithmetic", rank=3)) < 1e-4


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_ties_of_equal_weights_is_that_of_peft_multiplied_out(density, base, two, tmp_path):
    """Of others it is not: peft elects signs without the weights, and divides by how many models agree."""
    expected = by_peft(base, two, "ties_svd", weights=[1.0, 1.0], density=density, svd_rank=SIDE)
    parameters = {"density": density, "normalize": True}
    assert apart(expected, by_us(base, two, tmp_path / "out", "ties", weights=[1.0, 1.0], parameters=parameters)) < 1e-4


def test_dare_that_keeps_all_is_that_of_peft_multiplied_out(base, two, tmp_path):
    """What is drawn differs: each has its own generator."""
    expected = by_peft(base, two, "dare_linear_svd", density=1.0, svd_rank=SIDE)
    assert apart(expected, by_us(base, two, tmp_path / "out", "dare_linear", parameters={"density": 1.0})) < 1e-4


def test_linear_of_peft_sums_the_factors_which_is_no_sum_of_changes(base, two, tmp_path):
    weights = [0.5, 0.5]
    expected = by_us(base, two, tmp_path / "out", "linear", weights=weights)
    changes = [by_us(base, [each], tmp_path / each.name / "alone", "linear", weights=[1.0]) for each in two]
    mean = {name: sum(w * change[name] for w, change in zip(weights, changes, strict=True)) for name in expected}
    assert apart(mean, expected) < 1e-5
    assert apart(mean, by_peft(base, two, "linear", weights=weights)) > 0.3
