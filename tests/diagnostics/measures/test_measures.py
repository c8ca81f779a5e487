import copy
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_llfc.diagnostics.measures.measures import run_measures, run_merge_measures
from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.streaming import Execution
from hf_llfc.errors import EvaluationError
from hf_llfc.foundation.choices import MEASURES, MERGE_MEASURES, PAIR_MEASURES
from tests.diagnostics.measures.over_processes import measure
from tests.diagnostics.pairs import data_of, pair, subject_of

SCRIPT = Path(__file__).with_name("over_processes.py")
ROOT = Path(__file__).parents[3]


def test_all_at_once_are_what_each_is_alone():
    models = pair("bert", torch.float32)
    data = data_of("bert", models[0].config, batch_size=4)
    together = run_measures(PAIR_MEASURES, *models, data, alphas=[0.5])
    assert tuple(together) == PAIR_MEASURES
    for name in PAIR_MEASURES:
        assert run_measures([name], *models, data, alphas=[0.5]) == {name: together[name]}
    assert run_measures([], *models, data) == {}


def test_measures_of_a_merge_together_are_what_each_is_alone():
    models = pair("gpt2", torch.float32)
    subject, data = subject_of(models, (0.5, 0.5)), data_of("gpt2", models[0].config, count=23, batch_size=4)
    together = run_merge_measures(MERGE_MEASURES, subject, data)
    assert set(together) == set(MERGE_MEASURES) and all(together.values())
    for name in MERGE_MEASURES:
        assert run_merge_measures([name], subject, data) == {name: together[name]}
    assert run_merge_measures([], subject, data) == {}


def test_measures_of_features_share_their_passes(monkeypatch):
    models = pair("gpt2", torch.float32)
    subject, data = subject_of(models, (0.5, 0.5)), data_of("gpt2", models[0].config, count=8, batch_size=4)
    ran = []
    for model in (*models, subject.merge):
        model.transformer.h[0].mlp.register_forward_hook(lambda *_: ran.append(1))
    run_merge_measures(["settling"], subject, data)
    trials = len(ran) - 2 * 3
    ran.clear()
    run_merge_measures(["classes", "settling"], subject, data)
    both = len(ran) - 2 * 3
    ran.clear()
    run_merge_measures(["classes"], subject, data)
    assert both == trials + len(ran) - 2 * 3


def test_rows_are_parts_of_a_report():
    assert set(MEASURES) <= set(ConnectivityReport.__dataclass_fields__)


def test_what_was_asked_for_is_checked():
    models = pair("bert", torch.float32)
    data = data_of("bert", models[0].config)
    with pytest.raises(EvaluationError, match="give an alpha between 0 and 1"):
        run_measures(["additivity"], *models, data, alphas=[0, 1])
    rows = run_measures(["additivity"], *models, data, alphas=[0, 0.25, 1])["additivity"]
    assert {row.alpha for row in rows} == {0.25}


def test_an_empty_sample_is_named():
    models = pair("bert", torch.float32)
    data = data_of("bert", models[0].config, batch_size=3)
    encode = data.encode

    def with_empty_sample(positions):
        batch = encode(positions)
        batch["attention_mask"][positions == 4] = 0
        return batch

    object.__setattr__(data, "encode", with_empty_sample)
    for name in PAIR_MEASURES:
        with pytest.raises(EvaluationError, match=f"sample {data.sample_ids[4]} is empty"):
            run_measures([name], *models, data)


def test_nothing_outlives_a_batch_and_models_stay_as_they_are():
    models = pair("llama-tied", torch.float32)
    for model in models:
        model.train()
    before = [copy.deepcopy(model.state_dict()) for model in models]
    data = data_of("llama-tied", models[0].config, batch_size=2)
    alive = []

    def count_tensors(doing, done, total):
        gc.collect()
        alive.append(sum(type(found) is torch.Tensor for found in gc.get_objects()))

    run_measures(PAIR_MEASURES, *models, data, alphas=[0.5], execution=Execution(progress=count_tensors))
    assert len(alive) == 7  # before every batch and after the last
    assert len(set(alive[2:])) == 1
    for model, state in zip(models, before, strict=True):
        assert model.training
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)


def leaves(value, path=""):
    """Every number and text of nested JSON values, by its place."""
    if isinstance(value, dict):
        return {where: leaf for key, item in value.items() for where, leaf in leaves(item, f"{path}.{key}").items()}
    if isinstance(value, list):
        return {where: leaf for key, item in enumerate(value) for where, leaf in leaves(item, f"{path}.{key}").items()}
    return {path: value}


@pytest.mark.timeout(300)
def test_two_processes_give_the_numbers_of_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(tmp_path)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["processes"] == 2
    assert "is empty: its attention mask is zero everywhere" in first["error"]
    alone, together = leaves(json.loads(json.dumps(measure(None)))), leaves(first["rows"])
    assert list(together) == list(alone)
    for place, value in alone.items():
        expected = pytest.approx(value, abs=1e-6) if isinstance(value, float) else value
        assert together[place] == expected, place
