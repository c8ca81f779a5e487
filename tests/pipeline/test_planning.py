"""A plan's steps and costs, against figures worked out by hand from the shapes of tiny Llamas."""

import pytest
import torch

from hf_llfc.calibration.costs import forward_of
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.diagnostics.points import TASK_SCALES
from hf_llfc.errors import RecipeError
from hf_llfc.pipeline.planning import plan
from hf_llfc.recipe import load_recipe
from tests.runs import byte_llama, saved, text_data
from tests.tiny_models import tiny_model

HIDDEN, NEURONS, LAYERS, VOCABULARY = 24, 40, 2, 256
QUERIES, KEYS = 6 * 8, 2 * 8
ELEMENTS = (
    2 * VOCABULARY * HIDDEN  # embedding and head
    + LAYERS * (3 * HIDDEN * NEURONS + 2 * HIDDEN * QUERIES + 2 * HIDDEN * KEYS + 2 * HIDDEN)
    + HIDDEN
)
BYTES = 4 * ELEMENTS
LARGEST = 4 * VOCABULARY * HIDDEN
"""Bytes of the largest tensor."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    for seed, name in enumerate(("base", "a", "b")):
        saved(byte_llama(seed), folder / name)
    text_data(folder)
    return folder


def planned(shelf, **changes):
    models = [{"model": str(shelf / name), "parameters": {"weight": 0.5}} for name in "ab"]
    return plan(load_recipe({"models": models, "output_dir": str(shelf / "out"), **changes}))


def diagnosis(shelf):
    return {"task": "text-generation", "dataset": str(shelf / "text.txt"), "tokenizer": "bytes", "alphas": 5}


def steps_of(answer):
    return {row["step"]: row["what"] for row in answer["steps"]}


def test_a_plain_merge_reads_every_parent_once(shelf):
    answer = planned(shelf)
    assert list(steps_of(answer)) == ["read", "merge", "tensors", "carry over", "write"]
    assert steps_of(answer)["merge"] == "linear of 2 models, 21 tensors"
    assert steps_of(answer)["tensors"] == "21 of 21 tensors merged, 0 copied, 0 dropped"
    assert answer["cost"] == {
        "bytes_read": 2 * BYTES,
        "bytes_written": BYTES,
        "peak_memory_bytes": (2 + 2) * LARGEST,
    }
    assert not (shelf / "out").exists()


def test_a_narrower_result_is_smaller(shelf):
    assert planned(shelf, out_dtype="bfloat16")["cost"]["bytes_written"] == BYTES // 2


def test_alignment_reads_twice_and_names_what_may_move(shelf):
    answer = planned(shelf, align={"method": "weight_matching", "exclude": ["residual"]})
    said = steps_of(answer)["align"]
    assert said.startswith("weight_matching over ") and "residual" not in said and said.endswith(f"onto {shelf / 'a'}")
    assert answer["cost"]["bytes_read"] == 4 * BYTES + 2 * BYTES  # the last of them by the probe of B
    assert steps_of(answer)["probe"] == f"{shelf / 'b'} on random inputs before and after, each in memory"
    assert 0 < answer["cost"]["probe"]["seconds"] < 10
    without = planned(shelf, align={"method": "weight_matching", "probe": False})
    assert "probe" not in steps_of(without) and "probe" not in without["cost"]
    assert without["cost"]["bytes_read"] == 4 * BYTES
    assert 0 < answer["cost"]["matching"]["bytes"] < BYTES and answer["cost"]["matching"]["operations"] > 0


def test_a_calibration_is_planned_from_config_and_data(shelf):
    data = {"task": "text-generation", "dataset": str(shelf / "text.txt"), "tokenizer": "bytes", "max_length": 32}
    answer = planned(shelf, calibrate={**data, "samples": 16})
    said, cost = steps_of(answer)["calibrate"], answer["cost"]["calibration"]
    assert said.startswith("calibrate towards the blend of 2 models, ridge 0.01, on 16 samples of ")
    assert said.endswith("about 9 forward passes over them")
    # 16 samples of 32 tokens: two operations a weight but the embedding, and as much again for attention at most.
    forward = 2 * 16 * 32 * (ELEMENTS - VOCABULARY * HIDDEN)
    assert cost["samples"] == 16 and cost["bytes"] == 3 * BYTES and cost["seconds"] > 0
    repaired = planned(shelf, calibrate={**data, "samples": 16, "method": "repair"})["cost"]["calibration"]
    runs = repaired["operations"] / repaired["forward_passes"]
    assert forward < runs < 1.5 * forward and repaired["operations"] < cost["operations"]
    chosen = planned(shelf, calibrate={**data, "samples": 16, "ridge": "auto"})["cost"]
    assert chosen["calibration"]["operations"] > 3 * cost["operations"]
    # The merge and both models in float32, and the merge once more to begin anew.
    assert answer["cost"]["peak_memory_bytes"] == 3 * BYTES and chosen["peak_memory_bytes"] == 4 * BYTES
    assert answer["cost"]["bytes_read"] == 4 * BYTES


def test_models_that_cannot_run_without_values_are_planned_by_their_weights(shelf):
    batch = {"input_ids": torch.zeros(2, 7, dtype=torch.long), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    for name in ("mixtral", "gpt2", "bert"):
        model = tiny_model(name, "sequence-classification")
        one = forward_of(open_checkpoint(model), batch)
        inside = [each for each in model.parameters() if each.dim() == 2 and len(each) < 90]
        assert one.operations > 2 * 7 * min(each.numel() for each in inside) and one.products > 0 and one.solves > 0


def test_task_vectors_are_aligned_onto_their_base(shelf):
    answer = planned(
        shelf,
        merge_method="task_arithmetic",
        base_model=str(shelf / "base"),
        align={"method": "weight_matching", "together": "universe"},
    )
    assert steps_of(answer)["align"].endswith(f"onto {shelf / 'base'}, in a universe of 3 models")
    assert answer["cost"]["bytes_read"] == 2 * 3 * BYTES + 2 * 2 * BYTES


@pytest.mark.parametrize(
    ("changes", "points"),
    [
        ({}, 5),
        ({"merge_method": "ties", "parameters": {"density": 0.5}, "base_model": "base"}, 5),
        (
            {"merge_method": "task_arithmetic", "base_model": "base"},
            3 + len({*TASK_SCALES, 1.0} - {0.0}),
        ),  # the models, and every scale of the sum
    ],
)
def test_a_diagnosis_says_how_many_points_it_measures(shelf, changes, points):
    if "base_model" in changes:
        changes = {**changes, "base_model": str(shelf / "base")}
    answer = planned(shelf, diagnose=diagnosis(shelf), **changes)
    assert steps_of(answer)["diagnose"] == f"text-generation on {shelf / 'text.txt'}, {points} points"
    assert answer["cost"]["peak_memory_bytes"] == (3 + ("base_model" in changes)) * BYTES


def test_blocks_cannot_be_kept_where_weights_differ_among_tensors(shelf):
    weights = {"a": [0, 1], "b": 1}
    models = [{"model": str(shelf / name), "parameters": {"weight": weight}} for name, weight in weights.items()]
    with pytest.raises(RecipeError, match="keep_where_broken: needs one weight a model"):
        planned(shelf, models=models, keep_where_broken={}, diagnose=diagnosis(shelf))


def test_a_plan_says_what_blocks_take(shelf):
    what = steps_of(planned(shelf, diagnose={**diagnosis(shelf), "measures": ["blocks"]}))["diagnose"]
    # Two models and four parts: 2 · (3 · (4 + 3 + 2 + 1) / 4 − 1) passes.
    assert what.endswith("5 points; blocks take about 13 forward passes more")
