"""Calibration in the flow: what is written, that it goes on where it stopped, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_llfc
from hf_llfc import calibration
from hf_llfc.calibration import Source, calibrate_model
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.cli import main
from hf_llfc.errors import CheckpointError, LLFCError, RecipeError
from hf_llfc.parents.data import open_data
from hf_llfc.pipeline import calibrating, evidence, stages
from hf_llfc.pipeline.resources import bytes_beside
from hf_llfc.recipe import load_recipe
from tests.runs import byte_llama, command_line, image_data, moved, saved, small_resnet, text_data, written

SAMPLES = {"task": "text-generation", "tokenizer": "bytes", "max_length": 32, "batch_size": 4}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    saved(byte_llama(0), folder / "a")
    saved(moved(byte_llama(1), 2), folder / "b")
    saved(byte_llama(2), folder / "c")
    text_data(folder)
    return folder


def recipe_of(shelf, out, calibrate=None, names="ab", **changes):
    content = {
        "models": [{"model": str(shelf / name)} for name in names],
        "calibrate": {**SAMPLES, "dataset": str(shelf / "text.txt"), **(calibrate or {})},
        "output_dir": str(out),
    }
    return {**content, **changes}


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def test_the_result_is_what_the_engine_makes_of_merge_and_parents(shelf, tmp_path):
    recipe = load_recipe(
        recipe_of(
            shelf,
            tmp_path / "out",
            names="abc",
            merge_method="ties",
            base_model=str(shelf / "a"),
            parameters={"density": 0.5, "weight": 1.0},
        )
    )
    plain = load_recipe({**recipe.to_dict(), "calibrate": None, "output_dir": str(tmp_path / "plain")})
    for each in (recipe, plain):
        hf_llfc.run(each)
    merge = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    parents = [AutoModelForCausalLM.from_pretrained(shelf / name).eval() for name in "bc"]
    data = open_data(recipe.calibrate.data, open_checkpoint(shelf / "a"))
    result = calibrate_model(merge, parents, [Source(list(data.batches()), (0.5, 0.5))])
    made, before = weights_of(tmp_path / "out"), weights_of(tmp_path / "plain")
    changed = {f"{row.name}.weight" for row in result.changes}
    for name, value in merge.state_dict().items():
        torch.testing.assert_close(made[name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(made[name], before[name]) != (name in changed), name


def test_a_result_is_rounded_once_and_the_rest_is_the_merge_to_the_byte(shelf, tmp_path):
    calibrate = {"layers": ["*.mlp.*"]}
    for name, changes in (("wide", {}), ("narrow", {"out_dtype": "bfloat16"})):
        hf_llfc.run(recipe_of(shelf, tmp_path / name, calibrate, **changes))
    hf_llfc.run({**recipe_of(shelf, tmp_path / "plain", out_dtype="bfloat16"), "calibrate": None})
    wide, narrow, plain = (weights_of(tmp_path / name) for name in ("wide", "narrow", "plain"))
    for name, value in narrow.items():
        if ".mlp." in name:
            assert torch.equal(value, wide[name].to(torch.bfloat16)) and not torch.equal(value, plain[name])
        else:
            assert torch.equal(value, plain[name])


def stopped_after(monkeypatch, parts):
    """A run that is interrupted when so many parts of the calibration are kept."""
    keep = calibrating._keep

    def stop(journal, number, part):
        keep(journal, number, part)
        if number == parts:
            raise KeyboardInterrupt

    monkeypatch.setattr(calibrating, "_keep", stop)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_run_goes_on_after_the_last_part_with_the_same_bytes(shelf, tmp_path, monkeypatch, parts):
    whole = recipe_of(shelf, tmp_path / "whole", {"samples": 8})
    hf_llfc.run(whole)
    with monkeypatch.context() as patch:
        stopped_after(patch, parts)
        with pytest.raises(KeyboardInterrupt):
            hf_llfc.run(recipe_of(shelf, tmp_path / "out", {"samples": 8}))
    assert len(list((tmp_path / ".out.partial" / "output" / "llfc").glob("calibration-*"))) == parts
    with pytest.raises(CheckpointError, match=r"recipe\.calibrate\.ridge"):
        hf_llfc.run(recipe_of(shelf, tmp_path / "out", {"samples": 8, "ridge": 0.5}))
    fitted = []
    monkeypatch.setattr(calibrating, "_keep", lambda journal, number, part: fitted.append(number))
    hf_llfc.run(recipe_of(shelf, tmp_path / "out", {"samples": 8}))
    assert fitted[0] == parts + 1
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert not list((tmp_path / "out" / "llfc").glob("*.safetensors")) and not (tmp_path / ".out.partial").exists()


def test_data_tell_a_run_from_another(shelf, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_bytes((shelf / "text.txt").read_bytes())
    recipe = recipe_of(shelf, tmp_path / "out", {"dataset": str(text)})
    with monkeypatch.context() as patch:
        stopped_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            hf_llfc.run(recipe)
    text.write_bytes(text.read_bytes()[::-1])
    with pytest.raises(CheckpointError, match="an interrupted run of something else"):
        hf_llfc.run(recipe)


def test_what_was_calibrated_is_not_calibrated_again_where_writing_failed(shelf, tmp_path, monkeypatch):
    recipe = recipe_of(shelf, tmp_path / "out", {"samples": 8})

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "write_shared", stop)
        with pytest.raises(KeyboardInterrupt):
            hf_llfc.run(recipe)
    monkeypatch.setattr(calibrating, "fit", stop)
    hf_llfc.run(recipe)


@pytest.mark.parametrize("method", ["calibrate", "repair"])
def test_statistics_of_batch_norm_are_those_of_the_samples(method, tmp_path):
    for seed, name in enumerate("ab"):
        saved(small_resnet(seed), tmp_path / name)
    data = {"task": "image-classification", "dataset": str(image_data(tmp_path)), "batch_size": 8}
    models = [{"model": str(tmp_path / name)} for name in "ab"]
    hf_llfc.run({"models": models, "calibrate": {"method": method, **data}, "output_dir": str(tmp_path / "out")})
    hf_llfc.run({"models": models, "diagnose": {**data, "alphas": 3}, "output_dir": str(tmp_path / "plain")})
    made, plain = weights_of(tmp_path / "out"), weights_of(tmp_path / "plain")
    statistics = [name for name in made if "running" in name]
    for name in statistics:
        torch.testing.assert_close(made[name], plain[name], rtol=1e-5, atol=1e-6)
    changed = {name for name in made if name not in statistics and not torch.equal(made[name], plain[name])}
    norms = {name for name in made if ".normalization." in name and name.endswith(("weight", "bias"))}
    assert norms <= changed
    # Convolutions of the images themselves give the blend as they are.
    assert {name for name in made if ".convolution." in name and "encoder" in name} <= changed


def test_each_model_may_be_imitated_on_samples_of_its_own(shelf, tmp_path):
    """Where all samples are of one model, the merge is brought to that model alone."""
    other = tmp_path / "other.txt"
    other.write_text((shelf / "text.txt").read_text()[::-1])
    data = [{**SAMPLES, "dataset": str(path)} for path in (shelf / "text.txt", other)]
    models = [{"model": str(shelf / name), "calibrate_on": each} for name, each in zip("ab", data, strict=True)]
    recipe = {"models": models, "calibrate": {"targets": "own"}, "output_dir": str(tmp_path / "out")}
    hf_llfc.run(recipe)
    merge = AutoModelForCausalLM.from_pretrained(shelf / "a").eval()
    parents = [AutoModelForCausalLM.from_pretrained(shelf / name).eval() for name in "ab"]
    merge.load_state_dict(
        {name: (value + parents[1].state_dict()[name]) / 2 for name, value in parents[0].state_dict().items()}
    )
    opened = [
        open_data(entry.calibrate_on, open_checkpoint(entry.model)).batches() for entry in load_recipe(recipe).models
    ]
    sources = [Source(list(batches), blend) for batches, blend in zip(opened, ((1, 0), (0, 1)), strict=True)]
    calibrate_model(merge, parents, sources)
    made = weights_of(tmp_path / "out")
    for name, value in merge.state_dict().items():
        torch.testing.assert_close(made[name], value, rtol=1e-4, atol=1e-5)


def test_the_blend_has_the_weights_of_the_merge():
    def blend(*weights, **changes):
        models = [{"model": str(index), "parameters": {"weight": weight}} for index, weight in enumerate(weights)]
        return calibrating.blend_of(load_recipe({"models": models, "output_dir": "out", **changes}))

    assert blend(3, 1) == (0.75, 0.25)
    assert blend(3, 1, parameters={"normalize": False}) == (0.75, 0.25)
    assert blend(0.4, 0.4, merge_method="task_arithmetic", base_model="b") == (0.5, 0.5)
    assert blend([0.2, 0.8], [0.8, 0.2]) == (0.5, 0.5)
    assert blend(0, 0, parameters={"normalize": False}) == (0.5, 0.5)


def test_the_recipe_as_run_has_the_commit_of_the_data():
    commit = "me/texts@" + "a" * 40
    recipe = load_recipe(
        {
            "models": [{"model": "a"}, {"model": "b"}],
            "calibrate": {**SAMPLES, "dataset": "me/texts"},
            "output_dir": "out",
        }
    )
    data = replace(recipe.calibrate.data, dataset=commit, split="train")
    assert evidence._with_data(recipe, [data]).calibrate.data.dataset == commit
    models = [{"model": name, "calibrate_on": {**SAMPLES, "dataset": "me/texts"}} for name in "ab"]
    recipe = load_recipe({"models": models, "calibrate": {"targets": "own"}, "output_dir": "out"})
    assert [entry.calibrate_on for entry in evidence._with_data(recipe, [data, data]).models] == [data, data]


def test_room_is_asked_for_what_lies_beside_the_output(shelf):
    infos = open_checkpoint(shelf / "a").tensors
    size = sum(info.nbytes for info in infos.values())
    assert bytes_beside(load_recipe(recipe_of(shelf, "out")), infos) == 4 * size


@pytest.mark.timeout(300)
def test_two_processes_fit_what_one_fits(shelf, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    for name, words in (("one", ()), ("two", launcher)):
        recipe = written(recipe_of(shelf, tmp_path / name, {"samples": 13}), tmp_path, name)
        run = command_line(recipe, launcher=words, ACCELERATE_USE_CPU="true")
        assert run.returncode == 0, run.stderr
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name, value in one.items():
        assert (two[name] - value).norm() <= 1e-6 * value.norm(), name


WRONG = {
    "no data": (
        {"dataset": None, "task": None, **dict.fromkeys(("tokenizer", "max_length", "batch_size"))},
        {},
        "calibrate.dataset: missing",
    ),
    "no dataset": ({"dataset": None}, {}, "calibrate.dataset: missing"),
    "no samples": ({"samples": 0}, {}, "calibrate.samples: at least 1"),
    "labels": ({"labels": True}, {}, "calibrate.labels: a calibration looks at no labels"),
    "metric": ({"metric": "f1"}, {}, "calibrate.metric: has no meaning"),
    "unknown key": ({"rigde": 1}, {}, "calibrate.rigde: unknown key; did you mean 'ridge'"),
    "ridge": ({"ridge": 0}, {}, "calibrate.ridge: a number above 0, or auto is expected, found 0"),
    "ridge of repair": ({"method": "repair", "ridge": 0.5}, {}, "calibrate.ridge: has no meaning for repair"),
    "own input": ({"own_input": 2}, {}, "calibrate.own_input: at least 0 and at most 1 is expected"),
    "own": ({"targets": "own"}, {}, "calibrate.dataset: has no meaning with the targets own"),
    "one model": ({}, {"models": [{"model": "a"}]}, "calibrate: brings a merge to the blend of two models or more"),
    "offload": ({}, {"diagnose": {"task": "causal-lm", "dataset": "d", "offload": True}}, "leave one of them out"),
    "negative": (
        {},
        {"models": [{"model": "a", "parameters": {"weight": 2}}, {"model": "b", "parameters": {"weight": -1}}]},
        "one is below 0",
    ),
    "stack": (
        {},
        {
            "models": None,
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": "a", "layer_range": [0, 1]}]},
                {"sources": [{"model": "b", "layer_range": [1, 2]}]},
            ],
        },
        "calibrate: layers from several places",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_recipe_is_refused_in_one_sentence(shelf, what):
    calibrate, changes, expected = WRONG[what]
    content = recipe_of(shelf, "out", calibrate, **changes)
    content["calibrate"] = {key: value for key, value in content["calibrate"].items() if value is not None}
    content = {key: value for key, value in content.items() if value is not None}
    with pytest.raises(RecipeError) as error:
        load_recipe(content)
    assert expected in str(error.value) and len(error.value.problems) == 1


def test_a_ridge_is_chosen_once(shelf, tmp_path, monkeypatch):
    recipe = recipe_of(shelf, tmp_path / "out", {"ridge": "auto", "samples": 16})
    with monkeypatch.context() as patch:
        stopped_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            hf_llfc.run(recipe)
    monkeypatch.setattr(calibration, "choose_ridge", lambda *_, **__: pytest.fail("it is chosen again"))
    record = hf_llfc.run(recipe).calibration
    assert record.ridge == record.trials[0].ridge and len(record.trials) > 2
    hf_llfc.run(recipe_of(shelf, tmp_path / "given", {"ridge": record.ridge, "samples": 16}))
    for name, value in weights_of(tmp_path / "given").items():
        assert torch.equal(weights_of(tmp_path / "out")[name], value)
    assert f"(ridge {record.ridge:g}, chosen among " in (tmp_path / "out" / "README.md").read_text()


def test_samples_of_a_model_need_targets_of_their_own(shelf):
    data = {**SAMPLES, "dataset": "d"}
    models = [{"model": "a", "calibrate_on": data}, {"model": "b"}]
    with pytest.raises(RecipeError, match=r"models\.0\.calibrate_on: has no meaning without"):
        load_recipe(recipe_of(shelf, "out", models=models))
    with pytest.raises(RecipeError, match=r"models\.1\.calibrate_on: missing"):
        load_recipe({"models": models, "calibrate": {"targets": "own"}, "output_dir": "out"})


def test_a_recipe_is_read_back_as_it_was(shelf):
    for calibrate in ({}, {"method": "repair"}, {"ridge": 0.5, "layers": ["*.mlp.*"], "norms": True}):
        recipe = load_recipe(recipe_of(shelf, "out", calibrate))
        assert load_recipe(recipe.to_dict()) == recipe and not recipe.calibrate.data.labels
    data = {**SAMPLES, "dataset": "d"}
    models = [{"model": name, "calibrate_on": data} for name in "ab"]
    recipe = load_recipe({"models": models, "calibrate": {"targets": "own"}, "output_dir": "out"})
    assert load_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("calibrate", "expected"),
    [
        ({"layers": ["*.mlp.up_prj"]}, "no module with weights is called"),
        ({"layers": ["model.embed_tokens"]}, "no affine map"),
        ({"samples": 10**6}, "samples"),
        ({"dataset": "/nowhere/at/all.txt"}, "/nowhere/at/all.txt"),
    ],
)
def test_nothing_is_written_where_calibration_fails(shelf, tmp_path, calibrate, expected):
    with pytest.raises(LLFCError, match=expected):
        hf_llfc.run(recipe_of(shelf, tmp_path / "out", calibrate))
    assert not list(tmp_path.iterdir())


def test_fewer_samples_than_channels_are_few_and_enough(shelf, tmp_path, caplog):
    hf_llfc.run(recipe_of(shelf, tmp_path / "out", {"samples": 1, "max_length": 8}))
    assert "from fewer rows than they have inputs" in caplog.text
    assert "`ridge: auto`" in caplog.text
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "out").values())


def test_a_model_without_a_class_is_refused_before_it_is_aligned(shelf, tmp_path):
    for name in "ab":
        folder = tmp_path / name
        shutil.copytree(shelf / name, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": ["UnknownForCausalLM"]}))
    with pytest.raises(CheckpointError, match=r"UnknownForCausalLM is not known"):
        hf_llfc.run(recipe_of(tmp_path, tmp_path / "out", {"dataset": str(shelf / "text.txt")}))


def test_the_command_line_has_the_section(shelf, tmp_path, capsys):
    words = ["merge", str(shelf / "a"), str(shelf / "b"), "--seed", "3", "--quiet", "--calibrate"]
    for key, value in {**SAMPLES, "dataset": shelf / "text.txt", "samples": 8, "ridge": 0.1}.items():
        words += [f"--calibrate-{key.replace('_', '-')}", str(value)]
    assert main([*words, "--calibrate-norms", "--out", str(tmp_path / "out")]) == 0
    recipe = load_recipe(tmp_path / "out" / "llfc" / "recipe.yaml")
    assert recipe.calibrate.ridge == 0.1 and recipe.calibrate.data.seed == 3 and recipe.calibrate.norms
    hf_llfc.merge(
        [shelf / "a", shelf / "b"],
        out=tmp_path / "python",
        seed=3,
        calibrate={**SAMPLES, "dataset": str(shelf / "text.txt"), "samples": 8, "ridge": 0.1, "norms": True},
    )
    assert all(
        torch.equal(value, weights_of(tmp_path / "out")[name])
        for name, value in weights_of(tmp_path / "python").items()
    )
    capsys.readouterr()
    assert main(["merge", "A", "B", "--out", str(tmp_path / "none"), "--calibrate-samples", "8"]) == 2
    assert "--calibrate-samples: has no meaning without --calibrate" in capsys.readouterr().err
