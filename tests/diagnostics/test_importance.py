"""Importance of weights: against gradients in float64, sample by sample, and merges that count by it."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, log_softmax
from transformers import LlamaForCausalLM

import hf_llfc
from hf_llfc.checkpoints import state_dict_on_disk
from hf_llfc.cli import main
from hf_llfc.diagnostics.importance import IMPORTANCES, measure_importance
from hf_llfc.errors import EvaluationError, RecipeError
from hf_llfc.evaluation import EvaluationConfig, load_evaluation_data
from hf_llfc.pipeline.planning import plan
from hf_llfc.recipe import load_recipe
from tests.evaluation.tiny_data import perceptron, pixel_rows, text_rows, vector_rows, word_tokenizer
from tests.runs import byte_llama, image_data, saved, small_resnet, text_data
from tests.tiny_models import tiny_model


def vectors(**settings):
    """Samples of the perceptron."""
    config = EvaluationConfig(task="image-classification", dataset=vector_rows(), **settings)
    return load_evaluation_data(config, None, perceptron().config)


def expected(model, data, kind, label_of=None):
    """The same from float64 gradients of samples that are encoded one at a time."""
    model = copy.deepcopy(model).double()
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for index in range(len(data)):
        sample = data.encode(torch.tensor([index]).numpy())
        inputs = {name: value.double() for name, value in sample.items() if name == "pixel_values"}
        logits = model(**inputs).logits
        label = sample["labels"] if label_of is None else label_of(int(data.sample_ids[index]), logits)
        gradients = torch.autograd.grad(cross_entropy(logits, label), list(model.parameters()))
        for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
            sums[name] += gradient**2 if kind == "fisher" else (gradient * parameter).abs().detach()
    return {name: total / len(data) for name, total in sums.items()}


@pytest.mark.parametrize("kind", IMPORTANCES)
@pytest.mark.parametrize("batch_size", [1, 7])
def test_importance_is_that_of_each_samples_gradient(kind, batch_size):
    model, data = perceptron(), vectors(batch_size=batch_size)
    oracle = expected(model, data, kind)
    found = measure_importance(perceptron(), data, kind)
    assert found.keys() == oracle.keys()
    for name, importance in found.items():
        assert importance.dtype == torch.float32
        torch.testing.assert_close(importance.double(), oracle[name], rtol=1e-4, atol=1e-9)


def test_fisher_without_labels_nears_the_expectation_over_what_the_model_predicts():
    data = [vectors(labels=False, seed=seed) for seed in range(200)]
    drawn = [measure_importance(perceptron(), each, "fisher")["head.weight"].double() for each in data[:200]]
    mean = torch.stack(drawn).mean(dim=0)
    model = perceptron(dtype=torch.float64)
    exact = torch.zeros_like(mean)
    for batch, _ in data[0].batches():
        for pixels in batch["pixel_values"].double():
            scores = log_softmax(model(pixel_values=pixels[None]).logits[0], dim=-1)
            for score in scores:
                (gradient,) = torch.autograd.grad(score, [model.head.weight], retain_graph=True)
                exact += score.exp().detach() * gradient**2
    exact /= len(data[0])
    assert (mean - exact).norm() / exact.norm() < 0.1  # 200 draws of 23 labels: one over the root of 4600 is 1.5 %
    again = measure_importance(perceptron(), vectors(labels=False, seed=3), "fisher")["head.weight"]
    assert torch.equal(drawn[3], again.double())


@pytest.mark.parametrize(
    ("family", "head", "task", "rows"),
    [
        ("bert", "sequence-classification", "text-classification", text_rows),
        ("llama-tied", "causal-lm", "text-generation", text_rows),
        ("mixtral", "causal-lm", "text-generation", text_rows),
        ("bert", "masked-lm", "fill-mask", text_rows),
        ("resnet-basic", "image-classification", "image-classification", pixel_rows),
    ],
)
def test_importances_have_the_names_and_shapes_of_the_files(family, head, task, rows):
    model = tiny_model(family, head)
    state = {name: tensor for name, tensor in state_dict_on_disk(model).items() if tensor.is_floating_point()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    settings = {"blocks": False} if task == "text-generation" else {}
    source = None if task == "image-classification" else word_tokenizer()
    config = EvaluationConfig(task=task, dataset=rows(count=5, classes=model.config.num_labels), **settings)
    found = measure_importance(model, load_evaluation_data(config, source, model.config), "fisher")
    assert {name: tuple(importance.shape) for name, importance in found.items()} == shapes
    assert all(bool((importance >= 0).all()) for importance in found.values())
    assert sum(bool((importance > 0).any()) for importance in found.values()) > len(found) / 2
    assert all(not bool(found[name].any()) for name in found if "running_" in name)


def test_what_cannot_be_measured_is_one_error():
    model = tiny_model("bert", "masked-lm")
    config = EvaluationConfig(task="fill-mask", dataset=text_rows(count=3), labels=False)
    with pytest.raises(EvaluationError, match="leave labels: false out"):
        measure_importance(model, load_evaluation_data(config, word_tokenizer(), model.config), "fisher")
    broken = perceptron()
    with torch.no_grad():
        broken.head.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="a gradient is not finite"):
        measure_importance(broken, vectors(), "feedback")


# -- merges


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Two language models, their data, and the working directory."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        saved(byte_llama(seed), tmp_path / name)
    text_data(tmp_path)
    return tmp_path


DATA = {"task": "text-generation", "dataset": "text.txt", "tokenizer": "bytes", "max_length": 32, "samples": 6}


def weighted(folders, importances, weights=(1.0, 1.0), floor=1e-6):
    """Σ wᵢFᵢθᵢ / Σ wᵢFᵢ in float64."""
    files = [load_file(f"{folder}/model.safetensors") for folder in folders]
    states = [{name: tensor.double() for name, tensor in file.items()} for file in files]
    merged = {}
    for name in states[0]:
        least = floor * torch.stack([importance[name].double() for importance in importances]).mean()
        counts = [
            weight * importance[name].double().clamp(min=float(least))
            for weight, importance in zip(weights, importances, strict=True)
        ]
        merged[name] = sum(count * state[name] for count, state in zip(counts, states, strict=True)) / sum(counts)
    return merged


def importance_of(folder, kind, **settings):
    model = LlamaForCausalLM.from_pretrained(folder)
    config = EvaluationConfig(**{**DATA, **settings})
    return measure_importance(model, load_evaluation_data(config, None, model.config), kind)


@pytest.mark.parametrize("kind", IMPORTANCES)
def test_a_merge_counts_every_element_by_its_importance(kind, shelf):
    recipe = {
        "models": [
            {"model": "a", "parameters": {"weight": 1.0}},
            {"model": "b", "parameters": {"weight": 2.0}, "importance": {**DATA, "samples": 3, "labels": False}},
        ],
        "merge_method": kind,
        "importance": DATA,
        "output_dir": "out",
    }
    hf_llfc.run(recipe)
    importances = [importance_of("a", kind), importance_of("b", kind, samples=3, labels=False)]
    oracle = weighted("ab", importances, (1.0, 2.0))
    merged = load_file("out/model.safetensors")
    assert merged.keys() == oracle.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), oracle[name], rtol=0, atol=2e-7)
    plain = [load_file(f"{folder}/model.safetensors")["lm_head.weight"] for folder in "ab"]
    assert (merged["lm_head.weight"] - (plain[0] + 2 * plain[1]) / 3).abs().max() > 0.01
    assert not (shelf / ".out.partial").exists()
    assert [path.name for path in shelf.glob("out/**/*importance*")] == []
    assert "importance:" in (shelf / "out" / "README.md").read_text()  # the recipe


def test_slices_count_by_the_importance_of_the_models_that_layers_come_from(shelf):
    """Layers of the result that are 1 of `a` with 0 of `b`, then 0 of `b` with 1 of `a`; the last is one of `b`."""
    recipe = {
        "slices": [
            {"sources": [{"model": "a", "layer_range": [1, 2]}, {"model": "b", "layer_range": [0, 1]}]},
            {"sources": [{"model": "b", "layer_range": [0, 1]}, {"model": "a", "layer_range": [1, 2]}]},
            {"sources": [{"model": "b", "layer_range": [1, 2]}], "merge_method": "passthrough"},
        ],
        "merge_method": "fisher",
        "importance": DATA,
        "output_dir": "out",
    }
    planned = plan(load_recipe(recipe))["steps"]
    assert {"step": "importance", "what": "fisher on text.txt"} in planned
    hf_llfc.run(recipe)
    merged = load_file("out/model.safetensors")
    a, b = ((load_file(f"{each}/model.safetensors"), importance_of(each, "fisher")) for each in "ab")
    for name, tensor in merged.items():
        places = {"layers.0.": ("layers.1.", "layers.0."), "layers.1.": ("layers.1.", "layers.0.")}
        layer = name[len("model.") : len("model.layers.0.")] if "layers." in name else ""
        if layer == "layers.2." or name in ("model.norm.weight", "lm_head.weight"):
            assert torch.equal(tensor, b[0][name.replace("layers.2.", "layers.1.")])
            continue
        of_a, of_b = (name.replace(layer, own) if layer else name for own in places.get(layer, ("", "")))
        values, counts = [a[0][of_a].double(), b[0][of_b].double()], [a[1][of_a].double(), b[1][of_b].double()]
        least = 1e-6 * torch.stack(counts).mean()
        counts = [count.clamp(min=float(least)) for count in counts]
        oracle = sum(count * value for count, value in zip(counts, values, strict=True)) / sum(counts)
        torch.testing.assert_close(tensor.double(), oracle, rtol=0, atol=2e-7)


def test_the_command_line_and_an_alignment(shelf):
    words = ["merge", "a", "b", "--merge-method", "fisher", "--align", "weight_matching", "--out", "out"]
    for key, value in DATA.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    assert main([*words, "--quiet"]) == 0
    recipe = load_recipe("out/llfc/recipe.yaml")
    assert recipe.merge_method == "fisher" and recipe.importance.samples == 6 and recipe.align.calibration is None
    model = byte_llama(1)
    spec = hf_llfc.PermutationSpec.from_config(model.config)
    moved = hf_llfc.Alignment.load(shelf / "out" / "llfc" / "alignment.safetensors", spec)
    model.load_state_dict(moved.apply(model.state_dict()))
    saved(model, shelf / "moved")
    oracle = weighted(["a", "moved"], [importance_of("a", "fisher"), importance_of("moved", "fisher")])
    merged = load_file("out/model.safetensors")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), oracle[name], rtol=0, atol=1e-5)


def test_statistics_are_averaged(tmp_path):
    for seed, name in enumerate("ab"):
        saved(small_resnet(seed), tmp_path / name)
    data = {"task": "image-classification", "dataset": str(image_data(tmp_path)), "samples": 4}
    hf_llfc.merge([tmp_path / "a", tmp_path / "b"], out=tmp_path / "out", merge_method="fisher", importance=data)
    merged, *parents = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "a", "b")]
    names = [name for name in merged if name.endswith(("running_mean", "running_var"))]
    assert names
    for name in names:
        torch.testing.assert_close(merged[name], (parents[0][name] + parents[1][name]) / 2)


def test_the_plan_says_what_is_measured(shelf, capsys):
    words = ["merge", "a", "b", "--merge-method", "feedback", "--out", "out", "--dry-run", "--format", "json"]
    words += ["--task", "text-generation", "--dataset", "text.txt", "--tokenizer", "bytes"]
    assert main(words) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert {"step": "importance", "what": "feedback on text.txt"} in steps
    assert not (shelf / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"importance": None}, "models.0.importance: missing, and fisher needs it; give task and dataset"),
        ({"merge_method": "linear"}, "importance: has no meaning for linear; fisher and feedback measure importance"),
        ({"importance": {"task": "text-generation", "datasett": "x"}}, "importance.datasett: unknown key"),
        ({"importance": {**DATA, "batch_size": 0}}, "importance.batch_size"),
    ],
)
def test_wrong_recipes_are_one_error(changes, message, shelf):
    recipe = {
        "models": [{"model": "a"}, {"model": "b"}],
        "merge_method": "fisher",
        "importance": DATA,
        "output_dir": "out",
        **changes,
    }
    with pytest.raises(RecipeError, match=message):
        load_recipe({key: value for key, value in recipe.items() if value is not None})
