"""The zoo itself: every type is accounted for."""

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from benchmarks.zoo import rows
from tests import zoo


def test_every_registered_type_is_in_it() -> None:
    assert set(zoo.zoo_types()) == set(CONFIG_MAPPING_NAMES)


def test_a_type_that_cannot_be_built_says_why() -> None:
    result = zoo.zoo_result("layoutxlm")
    assert result.stage == "class"
    assert "layoutxlm" in zoo.zoo_reason("layoutxlm")


def test_two_draws_differ_and_one_repeats() -> None:
    first, second, again = (zoo.zoo_model("bert", seed=seed)[0].state_dict() for seed in (0, 1, 0))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert not tensor.is_floating_point() or not torch.equal(tensor, second[name]), name


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_most_types_run() -> None:
    table = list(rows(zoo.zoo_types()))
    assert len(table) == len(zoo.zoo_types())
    assert sum(row["stage"] == "done" for row in table) >= 650
