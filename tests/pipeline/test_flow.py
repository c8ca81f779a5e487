"""The main flow on small models: what is written, what it says, and that it says the truth."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedTokenizerFast

import hf_llfc
from hf_llfc.diagnostics import suggest
from hf_llfc.evaluation import EvaluationConfig, load_evaluation_data
from hf_llfc.pipeline.mergeability import compare_features
from hf_llfc.recipe import load_recipe
from tests.evaluation.tiny_data import text_rows, word_tokenizer
from tests.runs import (
    TEXT,
    byte_llama,
    image_data,
    moved,
    saved,
    small_resnet,
    text_data,
    text_recipe,
    trained_llama,
    written,
)
from tests.tiny_models import tiny_model


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and the same function in other coordinates."""
    return saved(trained_llama(0), tmp_path / "a"), saved(moved(trained_llama(0), 1), tmp_path / "b")


@pytest.fixture
def independent(tmp_path: Path) -> tuple[Path, Path]:
    """Two models that have nothing in common."""
    return saved(byte_llama(0), tmp_path / "a"), saved(byte_llama(1), tmp_path / "b")


def test_a_moved_model_is_brought_back_and_merged_with_itself(planted, tmp_path):
    result = hf_llfc.run(text_recipe(*planted, text_data(tmp_path), tmp_path / "out"))
    original = load_file(planted[0] / "model.safetensors")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == original.keys()
    for name, tensor in original.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7)
    assert result.report.barrier.loss < 1e-5
    assert all(row.llfc.mean < 1e-9 for row in result.report.layers)
    assert result.report.verdict.answer == "merge"
    losses = [row["loss"] for row in result.table]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_the_output_is_an_ordinary_checkpoint_with_its_evidence_beside_it(planted, tmp_path):
    out = tmp_path / "out"
    hf_llfc.run(text_recipe(*planted, text_data(tmp_path), out))
    _, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "llfc/alignment.safetensors",
        "llfc/files.json",
        "llfc/layers.png",
        "llfc/llfc_report.json",
        "llfc/path.png",
        "llfc/report.html",
        "llfc/recipe.yaml",
        "llfc/run.json",
    }
    report = json.loads((out / "llfc" / "llfc_report.json").read_text())
    assert report["schema"] == "hf_llfc.report/1"
    assert [point["alpha"] for point in report["path"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert report["layers"][-1]["layer"] == "logits"
    assert [model["weight"] for model in report["models"]] == [0.5, 0.5]


def test_the_recipe_as_run_gives_the_same_bytes(independent, tmp_path):
    first = hf_llfc.run(text_recipe(*independent, text_data(tmp_path), tmp_path / "out"))
    again = load_recipe(first.folder / "llfc" / "recipe.yaml", [f"output_dir={tmp_path / 'again'}"])
    second = hf_llfc.run(again)
    for name in ("model.safetensors", "llfc/alignment.safetensors"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    assert first.report.to_dict()["path"] == second.report.to_dict()["path"]


def test_weight_one_is_the_parent_bit_for_bit(independent, tmp_path):
    hf_llfc.merge(independent, [1.0, 0.0], out=tmp_path / "out", align="weight_matching")
    original = load_file(independent[0] / "model.safetensors")
    assert all(
        torch.equal(tensor, original[name])
        for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()
    )


def test_three_models_are_aligned_onto_one_reference(tmp_path):
    models = [saved(moved(byte_llama(0), seed), tmp_path / str(seed)) for seed in (1, 2, 3)]
    data = text_data(tmp_path)
    recipe = text_recipe(models[0], models[1], data, tmp_path / "out")
    recipe["models"] = [{"model": str(model)} for model in models]
    recipe["align"]["reference"] = 1
    result = hf_llfc.run(recipe)
    reference = load_file(models[1] / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, reference[name], rtol=1e-6, atol=1e-7)
    assert {path.name for path in (result.folder / "llfc").glob("*.safetensors")} == {
        "alignment-0.safetensors",
        "alignment-2.safetensors",
    }
    assert len(result.table) == 4


def test_task_arithmetic_adds_what_training_added(tmp_path):
    base = byte_llama(0)
    tasks = [byte_llama(0), byte_llama(0)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for task in tasks:
            for parameter in task.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    folders = [saved(task, tmp_path / f"task{place}") for place, task in enumerate(tasks)]
    hf_llfc.merge(
        folders,
        [1.0, -0.5],
        out=tmp_path / "out",
        merge_method="task_arithmetic",
        base_model=saved(base, tmp_path / "base"),
        parameters={"lambda": 0.4},
    )
    theta = [{name: tensor.double() for name, tensor in model.state_dict().items()} for model in (base, *tasks)]
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        expected = theta[0][name] + 0.4 * (theta[1][name] - theta[0][name]) - 0.2 * (theta[2][name] - theta[0][name])
        assert torch.equal(tensor, expected.float()), name


def test_task_arithmetic_aligns_onto_the_base(tmp_path):
    base = saved(byte_llama(0), tmp_path / "base")
    tasks = [saved(moved(byte_llama(0), seed), tmp_path / f"task{seed}") for seed in (1, 2)]
    hf_llfc.merge(
        tasks,
        [1.0, 1.0],
        out=tmp_path / "out",
        merge_method="task_arithmetic",
        base_model=base,
        align="weight_matching",
        parameters={"lambda": 0.5},
    )
    original = load_file(base / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, original[name], rtol=1e-6, atol=1e-7)


def test_batch_norm_is_measured_anew(tmp_path):
    models = saved(small_resnet(0), tmp_path / "a"), saved(small_resnet(1), tmp_path / "b")
    data = image_data(tmp_path)
    recipe = {
        "models": [{"model": str(model)} for model in models],
        "diagnose": {"task": "image-classification", "dataset": str(data), "alphas": 3, "batch_size": 24},
    }
    hf_llfc.run({**recipe, "output_dir": str(tmp_path / "anew")})
    averaged = {**recipe, "diagnose": {**recipe["diagnose"], "batch_norm": {"recompute": False}}}
    hf_llfc.run({**averaged, "output_dir": str(tmp_path / "averaged")})
    states = {name: load_file(tmp_path / name / "model.safetensors") for name in ("anew", "averaged")}
    for name, tensor in states["anew"].items():
        is_statistic = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(tensor, states["averaged"][name]) is not is_statistic or name.endswith("tracked")
    # The statistics of the first layer are those of its own input, which one can compute by hand.
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "anew").double()
    import datasets

    images = torch.tensor(datasets.load_dataset("parquet", data_files=str(data), split="train")["image"][:])
    out = model.resnet.embedder.embedder.convolution(images.double())
    statistics = model.resnet.embedder.embedder.normalization
    torch.testing.assert_close(statistics.running_mean, out.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics.running_var, out.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_dtype_is_that_of_the_recipe(independent, tmp_path):
    hf_llfc.merge(independent, out=tmp_path / "out", out_dtype="bfloat16")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_activation_matching_needs_no_labels(planted, tmp_path):
    data = {"task": "text-generation", "dataset": str(text_data(tmp_path)), "tokenizer": "bytes", "max_length": 32}
    align = {"method": "activation_matching", "calibration": {**data, "labels": False}}
    result = hf_llfc.merge(planted, out=tmp_path / "out", align=align)
    assert result.alignments[0]["method"] == "activation_matching"
    original = load_file(planted[0] / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, original[name], rtol=1e-6, atol=1e-7)


def test_loaded_models_are_merged_as_their_folders_are(independent, tmp_path):
    loaded = [AutoModelForCausalLM.from_pretrained(independent[0]), byte_llama(1)]
    hf_llfc.merge(loaded, out=tmp_path / "loaded", align="weight_matching")
    hf_llfc.merge(independent, out=tmp_path / "folders", align="weight_matching")
    of_loaded, of_folders = (load_file(tmp_path / name / "model.safetensors") for name in ("loaded", "folders"))
    assert of_loaded.keys() == of_folders.keys()
    assert all(torch.equal(tensor, of_folders[name]) for name, tensor in of_loaded.items())
    with pytest.raises(hf_llfc.LLFCError, match="found int"):
        hf_llfc.merge([independent[0], 3], out=tmp_path / "out")
    with pytest.raises(hf_llfc.LLFCError, match="at least one"):
        hf_llfc.merge([], out=tmp_path / "out")


def test_an_alignment_serves_the_models_it_was_found_for(planted, tmp_path):
    data = EvaluationConfig("text-generation", str(text_data(tmp_path)), tokenizer="bytes", max_length=32)
    found = hf_llfc.align(planted[1], to=planted[0])
    report = hf_llfc.diagnose(*planted, data, align=found, alphas=[0, 0.5, 1])
    assert report.barrier.loss < 1e-5
    with pytest.raises(hf_llfc.LLFCError, match="made for other checkpoints"):
        hf_llfc.diagnose(*reversed(planted), data, align=found, alphas=[0, 0.5, 1])


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of words."""
    vocabulary = {word: place for place, word in enumerate(["[UNK]", *TEXT.split()])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)


def test_a_loaded_model_is_measured_with_the_tokenizer_it_came_with(independent, tmp_path):
    save_tokenizer(independent[0])
    data = EvaluationConfig("text-generation", str(text_data(tmp_path)))
    loaded = [AutoModelForCausalLM.from_pretrained(path) for path in independent]
    reports = [hf_llfc.diagnose(*pair, data, alphas=[0, 0.5, 1]) for pair in (loaded, independent)]
    assert reports[0].to_dict()["path"] == reports[1].to_dict()["path"]


def test_the_tokenizer_of_the_result_measures_it(independent, tmp_path):
    source = saved(byte_llama(5), tmp_path / "source")
    save_tokenizer(source)
    recipe = text_recipe(*independent, text_data(tmp_path), tmp_path / "out", tokenizer_source=str(source))
    del recipe["diagnose"]["tokenizer"]
    hf_llfc.run(recipe)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_failed_run_leaves_nothing(independent, tmp_path):
    broken = load_file(independent[1] / "model.safetensors")
    broken["model.norm.weight"][3] = float("nan")
    from safetensors.torch import save_file

    save_file(broken, independent[1] / "model.safetensors", metadata={"format": "pt"})
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(hf_llfc.LLFCError, match=r"model\.norm\.weight"):
        hf_llfc.merge(independent, out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_recipe_file_may_stand_beside_its_parents(planted, tmp_path, monkeypatch):
    text_data(tmp_path)
    recipe = text_recipe(Path("a"), Path("b"), Path("text.txt"), Path("out"))
    path = written(recipe, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert hf_llfc.run(path).folder == elsewhere / "out"


def test_where_features_break_one_model_stays_as_it_is(tmp_path):
    first, other = byte_llama(0), byte_llama(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 1e-3)
    other.model.layers[1].load_state_dict(byte_llama(1).model.layers[1].state_dict())
    pair = saved(other, tmp_path / "a"), saved(first, tmp_path / "b")
    keep = {"model": 1, "ratio": 0.01}
    recipe = text_recipe(*pair, text_data(tmp_path), tmp_path / "out", align={"method": "none"}, keep_where_broken=keep)
    result = hf_llfc.run(recipe)
    assert result.report.data["kept"] == {"model": "./b", "layers": ["model.layers.1"], "ratio": 0.01}
    a, b, merged = (load_file(path / "model.safetensors") for path in (*pair, tmp_path / "out"))
    for name, tensor in merged.items():
        expected = b[name] if name.startswith("model.layers.1.") else (a[name].double() + b[name].double()) / 2
        assert torch.equal(tensor, expected.float()), name
    assert not torch.equal(a["model.layers.1.mlp.up_proj.weight"], b["model.layers.1.mlp.up_proj.weight"])
    again = load_recipe(tmp_path / "out" / "llfc" / "recipe.yaml")
    assert again.keep_where_broken == load_recipe(recipe).keep_where_broken


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"keep_where_broken": {"model": 2}}, r"keep_where_broken\.model: there is no model 2"),
        ({"keep_where_broken": {"ratio": 0}}, r"keep_where_broken\.ratio: a number above 0"),
        ({"keep_where_broken": {"rato": 1}}, r"keep_where_broken\.rato: unknown key; did you mean 'ratio'"),
        ({"keep_where_broken": {}, "diagnose": None}, "keep_where_broken: needs `diagnose`"),
    ],
)
def test_layers_to_keep_are_checked_with_the_recipe(changes, problem, independent, tmp_path):
    with pytest.raises(hf_llfc.LLFCError, match=problem):
        load_recipe(text_recipe(*independent, text_data(tmp_path), tmp_path / "out", **changes))


def test_three_models_are_measured_over_their_simplex(independent, tmp_path):
    data = EvaluationConfig(task="text-generation", dataset=str(text_data(tmp_path)), tokenizer="bytes", max_length=32)
    third = saved(byte_llama(2), tmp_path / "c")
    report = hf_llfc.diagnose(*independent, data, more=[third], weights=[0.2, 0.2, 0.6])
    names = ["model 1", "model 2", "model 3", "models 1 and 2", "models 1 and 3", "models 2 and 3", "centre", "merge"]
    assert [point.name for point in report.path] == names
    assert report.path[-1].weights == pytest.approx((0.2, 0.2, 0.6))
    merged = hf_llfc.merge(
        [*independent, third],
        [0.2, 0.2, 0.6],
        out=tmp_path / "out",
        diagnose={"task": "text-generation", "dataset": data.dataset, "tokenizer": "bytes", "max_length": 32},
    )
    assert merged.report.path == report.path
    # The last point is the merge itself, as written and read again.
    assert merged.table[-1]["loss"] == pytest.approx(report.path[-1].loss, rel=1e-6)
    with pytest.raises(hf_llfc.LLFCError, match="2 weights for 3 models"):
        hf_llfc.diagnose(*independent, data, more=[third], weights=[0.5, 0.5])


def test_task_vectors_are_added_and_taken_away(tmp_path):
    independent = [saved(trained_llama(seed), tmp_path / name) for seed, name in enumerate("ab")]
    data = {"task": "text-generation", "dataset": str(text_data(tmp_path)), "tokenizer": "bytes", "max_length": 32}
    base = saved(byte_llama(2), tmp_path / "base")
    result = hf_llfc.merge(
        independent,
        [0.3, 0.4],
        out=tmp_path / "out",
        merge_method="task_arithmetic",
        base_model=base,
        diagnose=data,
    )
    report = result.report
    assert report.region == "arithmetic"
    assert [model.id for model in report.models] == ["./a", "./b", "./base"]
    assert [point.name for point in report.path[2:4]] == ["base", "-1 × task vectors"]
    assert report.path[3].weights == pytest.approx((-0.3, -0.4, 1.7))
    assert report.path[-1].weights == pytest.approx((0.3, 0.4, 0.3))
    assert result.table[-1]["loss"] == pytest.approx(report.path[-1].loss, rel=1e-6)
    assert "the merged features of logits are" in report.verdict.because
    outside = hf_llfc.merge(
        independent[:1],
        [1.0],
        out=tmp_path / "outside",
        merge_method="task_arithmetic",
        base_model=base,
        parameters={"lambda": 1.5},
        diagnose=data,
    )
    assert outside.report.path[-1].weights == (1.5, -0.5)
    assert outside.report.verdict.because.startswith("the merge lies outside the models")


def test_suggested_weights_of_layers_fit_a_recipe(independent, tmp_path, monkeypatch):
    monkeypatch.setattr(suggest, "NEGLIGIBLE_GAIN", -10)  # random models give no gain that is sure
    monkeypatch.setattr(suggest, "STEPS", 5)
    data = EvaluationConfig(
        task="text-generation", dataset=str(text_data(tmp_path)), tokenizer="bytes", max_length=32, batch_size=2
    )
    suggestion = hf_llfc.diagnose(*independent, data, suggest="layers").suggestion
    assert set(suggestion.layer_weights) == {"model.layers.0.", "model.layers.1.", ""}
    models = [
        {
            "model": str(model),
            "parameters": {
                "weight": [
                    {"filter": name, "value": shares[place]} if name else {"value": shares[place]}
                    for name, shares in suggestion.layer_weights.items()
                ]
            },
        }
        for place, model in enumerate(independent)
    ]
    recipe = {"models": models, "parameters": {"normalize": True}, "output_dir": str(tmp_path / "out")}
    hf_llfc.run(recipe)
    merged, a, b = (load_file(path / "model.safetensors") for path in (tmp_path / "out", *independent))
    shares = suggestion.layer_weights["model.layers.1."]
    name = "model.layers.1.mlp.up_proj.weight"
    expected = (shares[0] * a[name].double() + shares[1] * b[name].double()) / sum(shares)
    torch.testing.assert_close(merged[name].double(), expected, rtol=1e-6, atol=1e-7)


def test_models_of_different_tasks_are_compared_under_the_first_head(tmp_path):
    masked = saved(tiny_model("bert", "masked-lm", 0), tmp_path / "masked")
    labelled = tiny_model("bert", "sequence-classification", 1)
    classifier = saved(labelled, tmp_path / "classifier")
    for folder in (masked, classifier):
        word_tokenizer().save_pretrained(folder)
    rows = tmp_path / "rows.jsonl"
    text_rows(9, classes=labelled.config.num_labels).to_json(rows)
    data = EvaluationConfig(task="text-classification", dataset=str(rows), batch_size=4)
    with pytest.raises(hf_llfc.LLFCError, match="architecture"):
        hf_llfc.diagnose(classifier, masked, data)
    report = hf_llfc.diagnose(classifier, masked, data, heads="first", alphas=[0.0, 0.5, 1.0])
    # The far end is the other model's body under this head.
    grafted = copy.deepcopy(labelled)
    body = {
        name: value for name, value in tiny_model("bert", "masked-lm", 0).state_dict().items() if name[:5] == "bert."
    }
    missing, unexpected = grafted.load_state_dict(body, strict=False)
    assert not unexpected and missing
    expected = hf_llfc.diagnose(
        classifier, saved_with_tokenizer(grafted, tmp_path / "grafted"), data, alphas=[0.0, 0.5, 1.0]
    )
    assert report.path == expected.path
    assert report.layers == expected.layers
    with pytest.raises(hf_llfc.LLFCError, match="under one head are not aligned"):
        hf_llfc.diagnose(classifier, masked, data, heads="first", align="weight_matching")
    with pytest.raises(hf_llfc.LLFCError, match="the model type is"):
        hf_llfc.diagnose(classifier, saved(byte_llama(0), tmp_path / "llama"), data, heads="first")


def saved_with_tokenizer(model, path: Path) -> Path:
    """Saves a model of the tests with the tokenizer of the tests."""
    word_tokenizer().save_pretrained(path)
    return saved(model, path)


def test_without_labels_a_diagnosis_judges_as_check_does(tmp_path):
    models = [small_resnet(seed) for seed in (0, 1)]
    with torch.no_grad():
        for model in models:
            model.classifier[1].weight.mul_(30)  # so that they answer each input otherwise
    pair = [saved(model, tmp_path / f"resnet-{seed}") for seed, model in enumerate(models)]
    config = EvaluationConfig(task="image-classification", dataset=str(image_data(tmp_path)), labels=False)
    report = hf_llfc.diagnose(*pair, config, alphas=[0.5])
    found = compare_features(*models, load_evaluation_data(config, None, models[0].config)).outputs
    assert f"{found.merged_divergence:.2g} nats from it" in report.verdict.because
    assert f"{found.parents_disagreement:.1%}" in report.verdict.because
