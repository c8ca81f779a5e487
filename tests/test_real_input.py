"""Real models and real data through the recipes; the numbers are in benchmarks/RESULTS.md.

The parents are trained once, by benchmarks/train_parents.py, into $HF_LLFC_PARENTS (an hour on one core) or, without
it, into the cache beside the real data.
"""

import os
from pathlib import Path

import pytest

from benchmarks import real_input, train_parents
from tests import real_data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 3600)]


@pytest.fixture(scope="module")
def parents() -> Path:
    """The folder of the trained parents."""
    return Path(os.environ.get("HF_LLFC_PARENTS") or real_data.data_folder() / "parents")


@pytest.fixture(autouse=True)
def home() -> None:
    """Recipes are run in the folder of their parents; come back from it."""
    before = Path.cwd()
    yield
    os.chdir(before)


def trained(parents: Path, group: str) -> Path:
    """The parents of one group, trained if they are not there yet."""
    train_parents.main(["--out", str(parents), "--only", group])
    return parents


def run(name: str, method: str, parents: Path, out: Path, data: str | None = None):
    return real_input.run_recipe(name, method, parents, out, data)[0]


def test_minilm_of_two_domains_is_linearly_connected(parents, tmp_path):
    result = run("minilm_sentiment_two", "weight_matching", trained(parents, "minilm"), tmp_path)
    accuracy = [row["metrics"]["accuracy"] for row in result.table]
    assert accuracy[2] > sum(accuracy[:2]) / 2
    assert result.report.barrier.error < 0.01
    *blocks, logits = result.report.at(0.5)
    assert all(row.ratio <= 0.15 for row in blocks) and logits.ratio <= 0.3
    assert result.report.verdict.answer == "merge"


def test_the_average_of_four_domains_beats_the_best_single_model(parents, tmp_path):
    result = run("minilm_sentiment_four", "weight_matching", trained(parents, "minilm"), tmp_path)
    *single, merged = (row["metrics"]["accuracy"] for row in result.table)
    assert merged > max(single)


def test_a_moved_minilm_is_brought_back_bit_for_bit(parents, tmp_path):
    table = real_input.minilm_planted(trained(parents, "minilm"), tmp_path)
    assert "| 105 of 105 | 0.0e+00 |" in table


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_branches_of_one_trunk_need_no_alignment(parents, tmp_path, family):
    result = run(f"fashion_{family}_spawned", "weight_matching", trained(parents, "fashion"), tmp_path)
    assert result.report.verdict.answer == "merge"
    assert all(row.ratio < 0.5 for row in result.report.at(0.5))


def test_matching_narrows_the_barrier_of_independent_resnets(parents, tmp_path):
    data = "fashion/data/train.parquet"
    before, by_weights, by_activations = (
        run("fashion_resnet_independent", method, trained(parents, "fashion"), tmp_path, data).report
        for method in real_input.ALL
    )
    assert by_weights.barrier.error < before.barrier.error
    assert by_activations.barrier.error < before.barrier.error
    assert before.verdict.answer == "align"


def test_independent_vits_are_not_called_mergeable(parents, tmp_path):
    for method in ("none", "weight_matching"):
        report = run("fashion_vit_independent", method, trained(parents, "fashion"), tmp_path).report
        assert report.verdict.answer != "merge"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_branches_of_a_language_model_merge_over_both_domains(parents, tmp_path, family):
    result = run(f"{family}_bytes_branches", "weight_matching", trained(parents, "lm"), tmp_path)
    *single, merged = (row["metrics"]["bits_per_byte"] for row in result.table)
    assert merged < sum(single) / len(single)
    assert result.report.barrier.loss < 0.1
    assert all(row.ratio <= 0.15 for row in result.report.at(0.5))


def test_independent_mlps_are_matched(parents, tmp_path):
    data = "mlp/data/train.parquet"
    before = run("fashion_mlp_independent", "none", trained(parents, "mlp"), tmp_path).report
    after = run("fashion_mlp_independent", "weight_matching", parents, tmp_path, data).report
    assert before.barrier.loss > 1 and before.barrier.error > 0.1
    assert after.barrier.loss < 0.03 and after.barrier.error < 0.01


def test_two_processes_give_the_numbers_of_one(parents, tmp_path):
    table = real_input.two_processes(trained(parents, "mlp"), tmp_path)
    row = table.splitlines()[-1].strip("| ").split(" | ")
    assert row[0] == "equal byte for byte"
    assert all(float(gap) < 1e-6 for gap in row[1:4])
