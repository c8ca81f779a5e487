"""Checkpoints of a real Trainer, merged and diagnosed at the end of its training."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer
from transformers.trainer_utils import get_last_checkpoint

import hf_llfc
from hf_llfc.errors import CheckpointError, LLFCError, RecipeError
from hf_llfc.trainer import COLLECTION
from tests.runs import byte_llama, text_data, trained_llama
from tests.trainer_script import keep_all, trainer

DATA = {"task": "text-generation", "tokenizer": "bytes", "max_length": 32, "batch_size": 4, "alphas": 3}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_is_average(folder: Path, parents: list[dict[str, torch.Tensor]], shares: list[float] | None = None) -> None:
    """Every weight is the correctly rounded combination, and the parents are not all the same."""
    shares = shares or [1 / len(parents)] * len(parents)
    merged = weights_of(folder)
    for name, tensor in merged.items():
        exact = sum(share * parent[name].double() for share, parent in zip(shares, parents, strict=True))
        torch.testing.assert_close(tensor, exact.to(tensor.dtype), rtol=1e-6, atol=1e-9)
    assert not all(torch.equal(parents[0][name], parents[-1][name]) for name in merged)


def test_what_the_trainer_deletes_is_merged_all_the_same(tmp_path: Path) -> None:
    callback = hf_llfc.MergeCallback(tmp_path / "soup")
    trained = trainer(tmp_path / "run", callback, save_steps=2, save_total_limit=1)
    with keep_all(trained, tmp_path / "kept"):
        trained.train()
    assert callback.problem is None and callback.result is not None
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    assert_is_average(tmp_path / "soup", [weights_of(tmp_path / "kept" / str(step)) for step in (2, 4, 6)])
    assert not (tmp_path / "run" / COLLECTION).exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "soup")
    assert all(torch.equal(tensor, weights_of(tmp_path / "soup")[name]) for name, tensor in loaded.state_dict().items())
    card = (tmp_path / "soup" / "README.md").read_text()
    assert all(f"step-{step}" in card for step in (2, 4, 6)) and str(tmp_path) not in card
    assert not {"optimizer.pt", "training_args.bin", "trainer_state.json"} & set(os.listdir(tmp_path / "soup"))


def test_every_so_many_steps_the_last_few_with_weights_of_ones_own(tmp_path: Path) -> None:
    shares = [0.2, 0.8]
    callback = hf_llfc.MergeCallback(tmp_path / "soup", every=2, last=2, weights=shares, keep=True, out_dtype="float64")
    trained = trainer(tmp_path / "run", callback, save_strategy="no", max_steps=7)
    trained.train()
    # The last step counts although it is no multiple.
    collected = tmp_path / "run" / COLLECTION
    assert sorted(os.listdir(collected)) == ["step-6", "step-7"]
    assert_is_average(tmp_path / "soup", [weights_of(collected / f"step-{step}") for step in (6, 7)], shares)
    assert all(
        torch.equal(tensor, weights_of(collected / "step-7")[name])
        for name, tensor in trained.model.state_dict().items()
    )


def test_the_best_model_is_loaded_and_the_merge_is_of_all(tmp_path: Path) -> None:
    callback = hf_llfc.MergeCallback(tmp_path / "soup", keep=True)
    trained = trainer(
        tmp_path / "run",
        callback,
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="loss",
        greater_is_better=True,  # the worst of a falling loss is the first
    )
    trained.train()
    assert trained.state.best_model_checkpoint.endswith("checkpoint-2")
    collected = tmp_path / "run" / COLLECTION
    best = weights_of(collected / "step-2")
    assert all(torch.equal(tensor, best[name]) for name, tensor in trained.model.state_dict().items())
    assert_is_average(tmp_path / "soup", [weights_of(collected / f"step-{step}") for step in (2, 4, 6)])


def test_a_training_that_is_resumed_goes_on_with_what_it_had(tmp_path: Path) -> None:
    def stopped_at(step: int) -> Trainer:
        return trainer(
            tmp_path / "run", hf_llfc.MergeCallback(tmp_path / f"until-{step}", keep=True), save_steps=2, max_steps=step
        )

    stopped_at(6).train()
    collected = tmp_path / "run" / COLLECTION
    before = {step: weights_of(collected / f"step-{step}") for step in (2, 4, 6)}
    # Step 6 is given up: training goes on from 4, to 8.
    for name in os.listdir(tmp_path / "run" / "checkpoint-6"):
        (tmp_path / "run" / "checkpoint-6" / name).unlink()
    (tmp_path / "run" / "checkpoint-6").rmdir()
    last = get_last_checkpoint(str(tmp_path / "run"))
    assert last is not None and last.endswith("checkpoint-4")
    resumed = stopped_at(8)
    resumed.train(resume_from_checkpoint=last)
    assert sorted(os.listdir(collected)) == ["step-2", "step-4", "step-6", "step-8"]
    after = [weights_of(collected / f"step-{step}") for step in (2, 4, 6, 8)]
    assert all(torch.equal(before[2][name], tensor) for name, tensor in after[0].items())
    assert_is_average(tmp_path / "until-8", after)
    # A training that begins anew takes nothing of the earlier one.
    stopped_at(4).train()
    assert sorted(os.listdir(collected)) == ["step-2", "step-4"]


def test_checkpoints_are_diagnosed_against_the_final_model(tmp_path: Path) -> None:
    data = {**DATA, "dataset": str(text_data(tmp_path))}
    callback = hf_llfc.MergeCallback(tmp_path / "evidence", every=4, diagnose=data, merge=False, keep=True)
    trained = trainer(
        tmp_path / "run",
        callback,
        EarlyStoppingCallback(early_stopping_patience=1),
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=5,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that it stops at the second evaluation, which no checkpoint holds
        max_steps=20,
    )
    trained.train()
    assert callback.problem is None
    assert trained.state.global_step == 10 and sorted(callback.reports) == [4, 8]
    final = weights_of(tmp_path / "run" / COLLECTION / "final")
    assert all(torch.equal(tensor, final[name]) for name, tensor in trained.model.state_dict().items())
    for step, report in callback.reports.items():
        assert [Path(model.id).name for model in report.models] == ["final", f"step-{step}"]
        assert [point.alpha for point in report.path] == [0, 0.5, 1]
        ours = tmp_path / "evidence" / f"step-{step}" / "llfc"
        assert json.loads((ours / "llfc_report.json").read_text())["barrier"]["loss"] == report.barrier.loss
        assert (ours / "layers.png").is_file()
    # The ends of the path are these models, and the nearer checkpoint lies nearer.
    ends = {step: report.path[-1].loss - report.path[0].loss for step, report in callback.reports.items()}
    assert ends[4] != ends[8]
    assert callback.reports[4].path[-1].loss == pytest.approx(callback.reports[8].path[-1].loss)


def test_the_best_model_is_what_checkpoints_are_diagnosed_against(tmp_path: Path) -> None:
    data = {**DATA, "dataset": str(text_data(tmp_path))}
    callback = hf_llfc.MergeCallback(tmp_path / "evidence", last=2, diagnose=data, merge=False)
    trained = trainer(
        tmp_path / "run",
        callback,
        save_steps=2,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    trained.train()
    assert callback.problem is None and sorted(callback.reports) == [4, 6]
    assert trained.state.best_model_checkpoint.endswith("checkpoint-2")
    assert all(Path(report.models[0].id).name == "final" for report in callback.reports.values())


def test_a_merge_is_diagnosed_where_data_are_given(tmp_path: Path) -> None:
    data = {**DATA, "dataset": str(text_data(tmp_path))}
    callback = hf_llfc.MergeCallback(tmp_path / "soup", last=2, diagnose=data)
    trainer(tmp_path / "run", callback, model=trained_llama(0), save_steps=2, learning_rate=1e-5).train()
    assert callback.result is not None and callback.result.report is not None
    assert callback.result.report.verdict.answer == "merge"
    assert (tmp_path / "soup" / "llfc" / "layers.png").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 0}, "every=0; at least 1"),
        ({"last": 1}, "last=1; at least 2"),
        ({"last": 3, "weights": [0.5, 0.5]}, "2 weights for the last 3 checkpoints"),
        ({"weights": [0.5, -0.5]}, r"the weights 0.5 \+ -0.5 sum to 0"),
        ({"merge": False}, "`diagnose` must say on what to measure"),
        ({"merge": False, "diagnose": DATA | {"dataset": "d"}, "dtype": "float16"}, "dtype: has no meaning without"),
        ({"diagnose": {"task": "text-generation", "dataset": "d", "sample": 3}}, "did you mean 'samples'"),
        ({"overwrit": True}, "did you mean 'overwrite'"),
    ],
)
def test_what_is_wrong_is_said_before_the_training(tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        hf_llfc.MergeCallback(tmp_path / "soup", **options)


def test_a_training_that_could_not_end_well_does_not_begin(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="saves no checkpoint"):
        trainer(tmp_path / "run", hf_llfc.MergeCallback(tmp_path / "soup"), save_strategy="no").train()
    (tmp_path / "soup").mkdir()
    (tmp_path / "soup" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        trainer(tmp_path / "run", hf_llfc.MergeCallback(tmp_path / "soup"), save_steps=2).train()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 6}, "1 checkpoints were saved; a merge needs two"),
        ({"weights": [0.25] * 4}, "4 weights for 3 checkpoints"),
    ],
)
def test_a_merge_that_fails_ends_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict, said: str
) -> None:
    callback = hf_llfc.MergeCallback(tmp_path / "soup", **options)
    trained = trainer(tmp_path / "run", callback, save_steps=2)
    assert trained.train().global_step == 6
    assert isinstance(callback.problem, LLFCError) and said in str(callback.problem)
    assert said in caplog.text and f"The checkpoints stay in {tmp_path / 'run' / COLLECTION}" in caplog.text
    assert (tmp_path / "run" / COLLECTION / "step-6" / "model.safetensors").is_file()
    assert not (tmp_path / "soup").exists()


def test_what_holds_no_whole_model_is_no_checkpoint_to_merge(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    for name in ("adapter_config.json", "optimizer.pt"):
        (checkpoint / name).write_text("{}")
    callback = hf_llfc.MergeCallback(tmp_path / "soup")
    trained = trainer(tmp_path / "run", callback, save_steps=2)
    trained.state.global_step = 2
    with pytest.raises(RecipeError, match=r"holds no whole model: adapter_config\.json"):
        callback.on_save(trained.args, trained.state, trained.control)
    assert os.listdir(tmp_path / "run") == ["checkpoint-2"]


def adapted(base: Path | None, folder: Path, **changes: Any) -> Any:
    """A model with a LoRA to be trained, over a base that lies in a folder or nowhere."""
    byte_llama(0).save_pretrained(folder / "base")
    model = byte_llama(0) if base is None else AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **changes)
    torch.manual_seed(0)
    return peft.get_peft_model(model, config)


def folded(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What peft makes of a base and an adapter."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return model.merge_and_unload(safe_merge=True).state_dict()


@pytest.mark.parametrize("named", [True, False])
def test_adapters_of_one_training_become_one_whole_model(named: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = adapted(base if named else None, tmp_path, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    callback = hf_llfc.MergeCallback(tmp_path / "soup", base=None if named else base)
    trained = trainer(tmp_path / "run", callback, model=model, save_steps=2, save_total_limit=1)
    with keep_all(trained, tmp_path / "kept"):
        trained.train()
    assert callback.problem is None
    assert not (tmp_path / "kept" / "2" / "model.safetensors").exists()
    assert_is_average(tmp_path / "soup", [folded(base, tmp_path / "kept" / str(step)) for step in (2, 4, 6)])
    AutoModelForCausalLM.from_pretrained(tmp_path / "soup")
    card = (tmp_path / "soup" / "README.md").read_text()
    assert all(f"step-{step}" in card for step in (2, 4, 6)) and str(tmp_path) not in card
    assert not (tmp_path / "run" / COLLECTION).exists()


def test_adapters_are_diagnosed_against_the_final_one(tmp_path: Path) -> None:
    data = {**DATA, "dataset": str(text_data(tmp_path))}
    callback = hf_llfc.MergeCallback(tmp_path / "evidence", diagnose=data, merge=False)
    model = adapted(tmp_path / "base", tmp_path)
    trainer(tmp_path / "run", callback, model=model, save_steps=2, max_steps=5).train()
    assert callback.problem is None and sorted(callback.reports) == [2, 4]
    for step, report in callback.reports.items():
        assert [Path(model.id).name for model in report.models] == ["step-5", f"step-{step}"]


def test_adapters_of_a_base_that_nobody_names_are_refused_before_the_training(tmp_path: Path) -> None:
    callback = hf_llfc.MergeCallback(tmp_path / "soup")
    with pytest.raises(RecipeError, match=r"name no base.*base=FOLDER"):
        trainer(tmp_path / "run", callback, model=adapted(None, tmp_path), save_steps=2).train()
    assert not (tmp_path / "run" / "checkpoint-2").exists()


@pytest.mark.timeout(240)
def test_two_processes_train_and_merge_as_one(tmp_path: Path) -> None:
    script = Path(__file__).with_name("trainer_script.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [each["main"] for each in told] == [True, False]
    assert all(each["problem"] is None and each["steps"] == [2, 4, 6] for each in told)
    assert_is_average(tmp_path / "soup", [weights_of(tmp_path / "kept" / str(step)) for step in (2, 4, 6)])
    assert not (tmp_path / "run" / COLLECTION).exists()
