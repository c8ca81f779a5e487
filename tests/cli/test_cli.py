"""The command line: what it prints, how it ends, and one clear message for everything that is wrong."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_llfc
from hf_llfc.cli import main, run_main
from hf_llfc.symmetry.orthogonal import Orthogonal
from tests.runs import answer, byte_llama, command_line, moved, saved, small_resnet, text_data, text_recipe, written
from tests.tiny_models import tiny_model
from tests.zoo import zoo_model

BYTES = ["--task", "text-generation", "--tokenizer", "bytes", "--max-length", "32"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and data that no test changes."""
    folder = tmp_path_factory.mktemp("shelf")
    saved(byte_llama(0), folder / "a")
    saved(moved(byte_llama(0), 1), folder / "b")
    saved(byte_llama(2), folder / "c")
    saved(byte_llama(3, num_hidden_layers=3), folder / "deeper")
    saved(byte_llama(4, vocab_size=260), folder / "larger-vocabulary")
    saved(small_resnet(0), folder / "resnet")
    text_data(folder)
    return folder


def test_inspect_prints_the_spec_and_verifies_it(shelf, capsys):
    assert main(["inspect", str(shelf / "a"), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "(kv.{i} q.{i}[kv] head_dim)" in out
    assert "the symmetries hold" in out


def test_inspect_as_json(shelf, capsys):
    assert main(["inspect", str(shelf / "a"), "--verify", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model_type"] == "llama" and found["verification"]["verified"] is True
    inside = ["q.0", "value_dim.0", "q.1", "value_dim.1"]
    assert found["symmetric_axes"] == ["residual", "kv.0", "neurons.0", "kv.1", "neurons.1", *inside]
    assert found["spec"] == "hand-written" and "verified" in found["notes"][0]
    assert len(found["tensors"]) == 21


def test_experts_are_verified_too(tmp_path, capsys):
    assert main(["inspect", str(saved(tiny_model("mixtral", "causal-lm"), tmp_path / "experts")), "--verify"]) == 0
    assert "the symmetries hold" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "answer", "code"), [("a", "merge", 0), ("b", "align", 1), ("deeper", "do not merge", 1)]
)
def test_check_answers_with_its_exit_code(shelf, capsys, other, answer, code):
    assert main(["check", str(shelf / "a"), str(shelf / other), "--format", "json"]) == code
    assert json.loads(capsys.readouterr().out)["answer"] == answer


def test_align_writes_the_model_in_other_coordinates(shelf, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["align", str(shelf / "b"), "--to", str(shelf / "a"), "--out", str(out)]) == 0
    original = load_file(shelf / "a" / "model.safetensors")
    assert all(torch.equal(original[name], tensor) for name, tensor in load_file(out / "model.safetensors").items())
    again = ["align", str(shelf / "b"), "--to", str(shelf / "a"), "--use", str(out / "llfc" / "alignment.safetensors")]
    assert main([*again, "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_an_alignment_file_fits_its_own_inputs_only(shelf, tmp_path, capsys):
    assert main(["align", str(shelf / "b"), "--to", str(shelf / "a"), "--out", str(tmp_path / "out")]) == 0
    file = str(tmp_path / "out" / "llfc" / "alignment.safetensors")
    words = ["align", str(shelf / "c"), "--to", str(shelf / "a"), "--use", file, "--out", str(tmp_path / "other")]
    assert main(words) == 2
    assert "made for other checkpoints" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_diagnose_prints_path_layers_and_verdict(shelf, tmp_path, capsys):
    data = [*BYTES, "--dataset", str(shelf / "text.txt")]
    words = ["diagnose", str(shelf / "a"), str(shelf / "b"), *data, "--alphas", "3", "--out", str(tmp_path / "report")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "model.layers.0" in out and "logits" in out and "verdict" in out
    assert {path.name for path in (tmp_path / "report" / "llfc").iterdir()} >= {
        "llfc_report.json",
        "path.png",
        "report.html",
        "layers.png",
    }


def test_run_takes_overrides_and_prints_json(shelf, tmp_path, capsys):
    recipe = written(text_recipe(shelf / "a", shelf / "b", shelf / "text.txt", tmp_path / "out"), tmp_path)
    words = [str(recipe), "models.0.parameters.weight=0.25", "models.1.parameters.weight=0.75", "--format", "json"]
    assert run_main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert [model["weight"] for model in result["report"]["models"]] == [0.25, 0.75]
    assert result["models"][-1]["is_merge"] is True


def test_dry_run_plans_and_writes_nothing(shelf, tmp_path, capsys):
    recipe = written(text_recipe(shelf / "a", shelf / "b", shelf / "text.txt", tmp_path / "out"), tmp_path)
    assert main(["run", str(recipe), "--dry-run", "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    size = sum(tensor.nbytes for tensor in load_file(shelf / "a" / "model.safetensors").values())
    assert plan["cost"]["bytes_written"] == size and plan["cost"]["bytes_read"] >= 2 * size
    assert [step["step"] for step in plan["steps"]] == [
        "read",
        "align",
        "probe",
        "merge",
        "tensors",
        "diagnose",
        "carry over",
        "write",
    ]
    matching = plan["cost"]["matching"]
    assert matching["operations"] > 0 and matching["bytes"] >= size and 0 < matching["seconds"] < 60
    assert not (tmp_path / "out").exists()


def test_several_models_are_merged_in_one_universe(shelf, tmp_path, capsys):
    words = ["merge", *(str(shelf / name) for name in "abc"), "--align", "weight_matching", "--together", "universe"]
    assert main([*words, "--out", str(tmp_path / "out"), "--dry-run", "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    what = next(step["what"] for step in plan["steps"] if step["step"] == "align")
    assert what.endswith(f"; onto {shelf / 'a'}, in a universe of 3 models")
    assert main([*words[:4], *words[4:6], "--out", str(tmp_path / "out"), "--dry-run", "--format", "json"]) == 0
    by_pairs = json.loads(capsys.readouterr().out)["cost"]["matching"]
    assert plan["cost"]["matching"]["bytes"] == 1.5 * by_pairs["bytes"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("in a universe of 3 models") == 2


def test_dry_run_plans_every_method_of_alignment(shelf, tmp_path, capsys):
    peaks = {}
    for method in ("weight_matching", "activation_matching", "commutativity_matching", "learned_matching"):
        recipe = text_recipe(shelf / "a", shelf / "b", shelf / "text.txt", tmp_path / "out")
        calibration = {"task": "text-generation", "dataset": str(shelf / "text.txt"), "tokenizer": "bytes"}
        recipe["align"] = {"method": method, "calibration": calibration}
        del recipe["diagnose"]
        if method == "weight_matching":
            del recipe["align"]["calibration"]
        assert main(["run", str(written(recipe, tmp_path)), "--dry-run", "--format", "json"]) == 0
        cost = json.loads(capsys.readouterr().out)["cost"]
        assert ("matching" in cost) == (method != "activation_matching"), "others start from matched weights"
        peaks[method] = cost["peak_memory_bytes"]
    size = sum(tensor.nbytes for tensor in load_file(shelf / "a" / "model.safetensors").values())
    assert peaks["activation_matching"] >= 2 * size
    assert peaks["commutativity_matching"] >= 6 * size, "both models, and their weights in float64"
    assert peaks["learned_matching"] >= 5 * size, "both models, the moved one, the merge and its gradient"


def test_dry_run_finds_what_the_models_tell(shelf, tmp_path, capsys):
    recipe = text_recipe(shelf / "a", shelf / "b", shelf / "text.txt", tmp_path / "out")
    recipe["models"][0]["parameters"] = {"weight": [{"filter": "mlp", "value": -0.5}, {"value": 0.5}]}
    assert main(["run", str(written(recipe, tmp_path)), "--dry-run"]) == 2
    assert "mlp.down_proj.weight" in capsys.readouterr().err
    recipe = text_recipe(shelf / "a", shelf / "b", shelf / "text.txt", tmp_path / "out", tokenizer_source="./nowhere")
    assert main(["run", str(written(recipe, tmp_path)), "--dry-run"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_overrides_stand_anywhere(shelf, tmp_path, capsys):
    recipe = written(text_recipe(shelf / "a", shelf / "b", shelf / "text.txt", tmp_path / "out"), tmp_path)
    override = f"output_dir={tmp_path / 'elsewhere'}"
    for words in ([recipe, override, "--dry-run"], [override, "--dry-run", recipe], ["--dry-run", override, recipe]):
        assert run_main([*map(str, words), "--format", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["steps"][-1]["what"] == str(tmp_path / "elsewhere")


def damaged(model: Path, target: Path, change) -> Path:
    """A copy of a checkpoint with its tensors changed."""
    shutil.copytree(model, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def truncated(model: Path, target: Path) -> Path:
    """A copy of a checkpoint whose file ends early."""
    shutil.copytree(model, target)
    file = target / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return target


def with_config(model: Path, target: Path, **changes) -> Path:
    """A copy of a checkpoint with another config."""
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text())
    config.update(changes)
    (target / "config.json").write_text(json.dumps(config))
    return target


PARENTS_AT_FAULT = {
    "a missing folder": (lambda shelf, tmp: tmp / "missing", ["missing"]),
    "an unknown architecture": (
        lambda shelf, tmp: with_config(shelf / "a", tmp / "bad", model_type="lama", architectures=["LamaForCausalLM"]),
        ["lama", "llama"],
    ),
    "another architecture": (lambda shelf, tmp: shelf / "resnet", ["llama", "resnet"]),
    "another size": (lambda shelf, tmp: shelf / "deeper", ["num_hidden_layers", "3"]),
    "another vocabulary": (lambda shelf, tmp: shelf / "larger-vocabulary", ["256", "260"]),
    "a missing tensor": (
        lambda shelf, tmp: damaged(shelf / "b", tmp / "bad", lambda tensors: tensors.pop("model.norm.weight")),
        ["bad", "model.norm.weight"],
    ),
    "a shape that contradicts the config": (
        lambda shelf, tmp: damaged(
            shelf / "b", tmp / "bad", lambda tensors: tensors.update({"model.norm.weight": torch.ones(25)})
        ),
        ["bad", "model.norm.weight", "25", "24"],
    ),
    "a truncated file": (lambda shelf, tmp: truncated(shelf / "b", tmp / "bad"), ["bad", "model.safetensors"]),
    "NaN": (
        lambda shelf, tmp: damaged(
            shelf / "b", tmp / "bad", lambda tensors: tensors["model.norm.weight"].__setitem__(0, float("nan"))
        ),
        ["bad", "model.norm.weight"],
    ),
    "quantised weights": (
        lambda shelf, tmp: damaged(
            shelf / "b", tmp / "bad", lambda tensors: tensors.update({"lm_head.qweight": torch.ones(2)})
        ),
        ["bad", "lm_head.qweight", "quantised"],
    ),
}


@pytest.mark.parametrize("fault", PARENTS_AT_FAULT)
@pytest.mark.parametrize("method", ["none", "weight_matching"])
def test_a_parent_at_fault_ends_in_one_message(shelf, tmp_path, capsys, fault, method):
    make, expected = PARENTS_AT_FAULT[fault]
    bad = make(shelf, tmp_path)
    before = sorted(tmp_path.iterdir())
    code = main(["merge", str(shelf / "a"), str(bad), "--align", method, "--out", str(tmp_path / "out")])
    error = without_stages(capsys.readouterr().err)
    assert code == 2 and error.startswith("hf-llfc: error: ")
    assert "Traceback" not in error and "unexpected" not in error
    for words in expected:
        assert words in error
    assert sorted(tmp_path.iterdir()) == before


def test_a_parent_that_is_not_finite_is_named_by_every_command(shelf, tmp_path, capsys):
    name = "model.layers.1.mlp.up_proj.weight"
    bad = damaged(shelf / "b", tmp_path / "bad", lambda tensors: tensors[name].__setitem__((0, 0), float("inf")))
    a, out = str(shelf / "a"), ["--out", str(tmp_path / "out")]
    for words in (
        ["inspect", str(bad), "--verify", "--format", "json"],
        ["check", a, str(bad)],
        ["align", str(bad), "--to", a, *out],
        ["align", a, "--to", str(bad), *out],
        ["diagnose", a, str(bad), *BYTES, "--dataset", str(shelf / "text.txt"), *out],
        ["diagnose", a, str(bad), *BYTES, "--dataset", str(shelf / "text.txt"), "--align", "activation_matching", *out],
    ):
        assert main(words) == 2, words
        error = capsys.readouterr().err
        assert str(bad) in error and name in error, words
    assert not (tmp_path / "out").exists()


def without_stages(error: str) -> str:
    """What stands on stderr, from the error on: the stages that came before it are told in lines of their own."""
    return error[error.index("hf-llfc: error: ") :]


RECIPES_AT_FAULT = {
    "an unknown key": ({"algin": {}}, ["algin", "did you mean 'align'"]),
    "an unknown key below": ({"align": {"metod": "none"}}, ["align.metod", "did you mean 'method'"]),
    "weights that cancel": (
        {"models": [{"model": "A", "parameters": {"weight": 1.0}}, {"model": "B", "parameters": {"weight": -1.0}}]},
        ["sum to 0", "normalize"],
    ),
    "a column that does not exist": ({"diagnose": {"text_column": "sentense"}}, ["sentense", "text"]),
    "an unknown axis": ({"align": {"exclude": ["residul"]}}, ["residul", "residual"]),
    "too many samples": ({"diagnose": {"samples": 10000}}, ["10000"]),
}


@pytest.mark.parametrize("fault", RECIPES_AT_FAULT)
def test_a_recipe_at_fault_ends_in_one_message(shelf, tmp_path, capsys, fault):
    changes, expected = RECIPES_AT_FAULT[fault]
    recipe = text_recipe(shelf / "a", shelf / "b", shelf / "text.txt", tmp_path / "out")
    for key, value in changes.items():
        recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
    before = {written(recipe, tmp_path)}
    code = main(["run", str(*before)])
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error and "unexpected" not in error
    for words in expected:
        assert words in error
    assert set(tmp_path.iterdir()) == before


def test_a_full_output_folder_is_refused_before_work(shelf, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert main(["merge", str(shelf / "a"), str(shelf / "b"), "--out", str(tmp_path / "out"), "--overwrite"]) == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("words", [["merge", "A", "B"], ["align", "B", "--to", "A"]], ids=["merge", "align"])
def test_an_output_without_a_name_is_refused(shelf, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    words = [str(shelf / word.lower()) if word in ("A", "B") else word for word in words]
    assert main([*words, "--out", ""]) == 2
    assert re.match(
        "hf-llfc: error: .*(missing; name the folder|name a new one)", without_stages(capsys.readouterr().err)
    )
    assert list(tmp_path.iterdir()) == []


DATA_IN_PART = {
    "merge": ["merge", "A", "B", "--align", "activation_matching"],
    "align": ["align", "B", "--to", "A", "--method", "learned_matching"],
    "diagnose": ["diagnose", "A", "B"],
    "check": ["check", "A", "B"],
}


@pytest.mark.parametrize("command", DATA_IN_PART)
def test_a_task_without_data_is_an_error(tmp_path, capsys, command):
    words = DATA_IN_PART[command]
    out = ["--out", str(tmp_path / "out")] if command != "check" else []
    assert main([*words, "--task", "text-generation", *out]) == 2
    assert "--dataset must be given" in capsys.readouterr().err
    assert main([*words, "--dataset", "data.txt", *out]) == 2
    assert "--task must be given" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_input_is_never_overwritten(shelf, tmp_path, capsys):
    for name in ("a", "b"):  # outputs of runs, which may be overwritten where they are no input
        hf_llfc.merge([shelf / name], out=tmp_path / "models" / name)
    a, b = (str(tmp_path / "models" / name) for name in ("a", "b"))
    data = [*BYTES, "--dataset", str(shelf / "text.txt")]
    for out, reason in ((a, "its own input"), (b, "its own input"), (str(tmp_path / "models"), "was not written by")):
        for words in (["merge", a, b], ["align", b, "--to", a], ["diagnose", a, b, *data]):
            assert main([*words, "--out", out, "--overwrite"]) == 2
            assert reason in capsys.readouterr().err
    for name in ("a", "b"):
        assert load_file(tmp_path / "models" / name / "model.safetensors").keys()


USELESS_OPTIONS = {
    "matching without alignment": (["merge", "A", "B", "--exclude", "residual", "--restarts", "5"], "--exclude"),
    "matching without alignment in a diagnosis": (["diagnose", "A", "B", "--axes", "heads"], "--axes"),
    "several models without alignment": (["merge", "A", "B", "C", "--together", "star"], "--together"),
    "data that nothing looks at": (["merge", "A", "B", "--align", "weight_matching", "--dataset", "x"], "--dataset"),
    "matching with a file": (["align", "B", "--to", "A", "--use", "file", "--exclude", "residual"], "--exclude"),
}


@pytest.mark.parametrize("case", USELESS_OPTIONS)
def test_an_option_without_meaning_is_an_error(capsys, case):
    words, named = USELESS_OPTIONS[case]
    assert main([*words, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert named in error and "has no meaning" in error


def test_weights_are_divided_by_their_sum(shelf, tmp_path):
    words = ["merge", str(shelf / "a"), str(shelf / "c"), "--weights", "1", "3", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    a, c, merged = (load_file(path / "model.safetensors") for path in (shelf / "a", shelf / "c", tmp_path / "out"))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (a[name] + 3 * c[name]) / 4)


def test_no_axis_left_to_move_is_an_error(shelf, tmp_path, capsys):
    words = ["align", str(shelf / "b"), "--to", str(shelf / "a"), "--exclude", "*", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "no axis that may move" in capsys.readouterr().err


def test_the_processes_of_a_launcher_speak_with_one_voice(shelf, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["check", str(shelf / "a"), str(shelf / "b")]) == 0  # the process that speaks answers
    assert main(["merge", str(shelf / "a"), str(shelf / "nowhere"), "--out", "out"]) == 2
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_warning_comes_once_and_says_whose_it_is(shelf, tmp_path):
    for name in ("a", "c"):
        with_config(shelf / name, tmp_path / name, model_type="mine", architectures=["Mine"])
    run = command_line("merge", tmp_path / "a", tmp_path / "c", "--out", tmp_path / "out")
    assert run.returncode == 0
    lines = run.stderr.splitlines()
    assert [line for line in lines if not line.startswith("hf-llfc: warning: ")] == [
        f"hf-llfc: reading {tmp_path / 'a'}, {tmp_path / 'c'}",
        "hf-llfc: merging",
    ]
    warnings = [line for line in lines if line.startswith("hf-llfc: warning: ")]
    assert len(warnings) == len(set(warnings)) == 3 and "far apart" in warnings[-1]


def test_a_full_disk_ends_in_one_message(shelf, tmp_path, monkeypatch, capsys):
    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "alignment.safetensors")

    monkeypatch.setattr("hf_llfc.symmetry.Alignment.save", full)
    words = ["align", str(shelf / "b"), "--to", str(shelf / "a"), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "the output cannot be written (No space left on device); make room there" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_architecture_without_an_adapter_is_derived_and_aligned(tmp_path, capsys):
    a = saved(zoo_model("xlnet")[0], tmp_path / "a")
    assert main(["inspect", str(a), "--verify", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["spec"] == "derived" and found["verification"]["verified"]
    assert any("verified on a copy of" in note for note in found["notes"])
    planted = hf_llfc.inspect(str(a)).spec.random_alignment(torch.Generator().manual_seed(0))
    shutil.copytree(a, tmp_path / "b")
    original = load_file(a / "model.safetensors")
    save_file(planted.apply(original), tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    words = ["merge", str(a), str(tmp_path / "b"), "--out", str(tmp_path / "out"), "--align", "weight_matching"]
    assert main(words) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert [name for name, tensor in original.items() if not torch.equal(merged[name], tensor)] == []


def test_an_architecture_without_a_spec_merges_by_name(tmp_path, capsys):
    for seed, name in enumerate("ab"):
        saved(zoo_model("vits", seed=seed)[0], tmp_path / name)
    words = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]
    assert main([*words, "--align", "weight_matching"]) == 2
    error = capsys.readouterr().err
    assert "'vits'" in error and "--align none" in error and str(tmp_path / "a") in error
    assert main(words) == 0
    a, b, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b", "out"))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (a[name] + b[name]) / 2)


def test_errors_as_json(shelf, tmp_path, capsys):
    assert main(["check", str(shelf / "a"), str(tmp_path / "nowhere"), "--format", "json"]) == 2
    assert "nowhere" in json.loads(capsys.readouterr().out)["error"]


WRONG_WORDS = {
    "a command": (["mrege", "a", "b"], "did you mean 'merge'"),
    "an option": (["run", "x.yaml", "--dryrun"], "did you mean '--dry-run'"),
    "an option of others": (
        ["align", "b", "--to", "a", "--out", "o", "--weights", "1"],
        "it is an option of merge, diagnose",
    ),
    "a choice": (["merge", "a", "--out", "o", "--align", "weight_machting"], "did you mean 'weight_matching'"),
    "a number": (["merge", "a", "--out", "o", "--weights", "half"], "invalid float value: 'half' ("),
    "nothing": (["run"], "required: RECIPE ("),
}


@pytest.mark.parametrize("wrong", WRONG_WORDS)
def test_a_wrong_word_ends_in_one_line(capsys, wrong):
    words, expected = WRONG_WORDS[wrong]
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("hf-llfc: error: ") and expected in error


@pytest.mark.timeout(300)
def test_two_processes_give_the_numbers_of_one(shelf, tmp_path):
    outcomes = []
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29561")
    for name, words in (("one", ()), ("two", launcher)):
        recipe = written(text_recipe(shelf / "a", shelf / "c", shelf / "text.txt", tmp_path / name), tmp_path, name)
        run = command_line(recipe, "--format", "json", launcher=words, ACCELERATE_USE_CPU="true")
        assert run.returncode == 0, run.stderr
        outcomes.append(json.loads(run.stdout))
    one, two = outcomes
    assert [row["loss"] for row in one["models"]] == pytest.approx([row["loss"] for row in two["models"]], rel=1e-6)
    for key in ("path", "layers"):
        for first, second in zip(one["report"][key], two["report"][key], strict=True):
            assert flat(first) == pytest.approx(flat(second), rel=1e-6, abs=1e-9)
    for file in ("model.safetensors", "llfc/alignment.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("together", ["star", "universe"])
def test_two_processes_align_several_models_as_one(together, shelf, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    for name, words in (("one", ()), ("two", launcher)):
        recipe = {
            "models": [{"model": str(shelf / each)} for each in "abc"],
            "align": {"method": "weight_matching", "together": together},
            "output_dir": str(tmp_path / name),
        }
        run = command_line(written(recipe, tmp_path, name), launcher=words, ACCELERATE_USE_CPU="true")
        assert run.returncode == 0, run.stderr
    for file in ("model.safetensors", "llfc/alignment-1.safetensors", "llfc/alignment-2.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.timeout(300)
def test_two_processes_learn_what_one_learns(shelf, tmp_path):
    """Each sees half of every batch, and the gradient of both halves is that of the whole."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    for name, words, batch_size in (("one", (), 8), ("two", launcher, 4)):
        calibration = {
            "task": "text-generation",
            "dataset": str(shelf / "text.txt"),
            "tokenizer": "bytes",
            "max_length": 16,
            "samples": 24,
            "batch_size": batch_size,
        }
        recipe = {
            "models": [{"model": str(shelf / each)} for each in "ac"],
            "align": {"method": "learned_matching", "groups": "full", "steps": 12, "calibration": calibration},
            "output_dir": str(tmp_path / name),
        }
        run = command_line(written(recipe, tmp_path, name), launcher=words, ACCELERATE_USE_CPU="true")
        assert run.returncode == 0, run.stderr
    one, two = (hf_llfc.Alignment.load(tmp_path / name / "llfc" / "alignment.safetensors") for name in ("one", "two"))
    assert one.transforms.keys() == two.transforms.keys()
    start = hf_llfc.align(shelf / "c", to=shelf / "a", groups="full")
    learned = [0.0]
    for axis, transform in one.transforms.items():
        other = two.transforms[axis]
        if isinstance(transform, Orthogonal):
            torch.testing.assert_close(other.matrix, transform.matrix, atol=1e-4, rtol=0)
            learned.append(float((transform.matrix - start.transforms[axis].matrix).abs().max()))
        else:
            assert other == transform
    assert max(learned) > 0.01
    assert two.metadata["learning_steps"] == 12
    assert two.metadata["losses"] == pytest.approx(one.metadata["losses"], rel=1e-4)


@pytest.mark.timeout(300)
def test_two_processes_align_as_one(shelf, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    for name, words in (("one", ()), ("two", launcher)):
        command = [
            "align",
            str(shelf / "c"),
            "--to",
            str(shelf / "a"),
            "--out",
            str(tmp_path / name),
            "--format",
            "json",
        ]
        run = command_line(*command, launcher=words, ACCELERATE_USE_CPU="true")
        assert answer(run)["out"] == str(tmp_path / name)  # printed once, or it would be no JSON
    for file in ("model.safetensors", "llfc/alignment.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    run = command_line("align", shelf / "c", "--to", shelf / "a", "--out", tmp_path / "two", launcher=launcher)
    assert run.returncode != 0
    assert len([line for line in run.stderr.splitlines() if line.startswith("hf-llfc: error: ")]) == 1


def flat(row: dict) -> list[float]:
    """All numbers of a row of the report."""
    numbers = []
    for value in row.values():
        numbers += flat(value) if isinstance(value, dict) else [value] if isinstance(value, float) else []
    return numbers
