"""Models at chance are named and get no verdict; models that know something never are."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

import hf_llfc
from hf_llfc.cli import main
from hf_llfc.diagnostics import diagnose_models
from hf_llfc.diagnostics.chance import Predictions, at_chance, chance_loss
from hf_llfc.diagnostics.diagnose import Origin
from hf_llfc.diagnostics.points import arithmetic, simplex
from hf_llfc.diagnostics.rows import ModelReference
from hf_llfc.evaluation import EvaluationConfig, load_evaluation_data, predicted
from hf_llfc.evaluation.predicted import answers, labelled, unlabelled
from hf_llfc.evaluation.scoring import score_samples
from tests.evaluation.tiny_data import text_rows, word_tokenizer
from tests.pipeline.test_mergeability import image_rows, trained
from tests.runs import byte_llama, saved, small_resnet, text_data, text_recipe, trained_llama

NAMES = (ModelReference("ada/one"), ModelReference("ada/two"))


@pytest.fixture(scope="module")
def llamas() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two that know the text, by one start."""
    first = trained_llama(0)
    return first, trained_llama(1, start=first, steps=5)


def random_mlp(seed: int) -> PreTrainedModel:
    return trained(seed, steps=0)


def images(*, labels: bool = True, count: int = 200) -> EvaluationConfig:
    pixels, classes = image_rows(count, seed=1)
    rows = datasets.Dataset.from_dict({"image": list(pixels), "label": classes.tolist()})
    return EvaluationConfig("image-classification", rows, labels=labels)


def report_of(models: list[PreTrainedModel], config: EvaluationConfig, tokenizer: Any = None) -> Any:
    return diagnose_models(models, load_evaluation_data(config, tokenizer, models[0].config), origin=Origin(NAMES))


def predictions_of(logits: torch.Tensor, labels: torch.Tensor | None = None) -> Predictions:
    found = Predictions()
    place = unlabelled(logits, {}) if labels is None else labelled("image-classification", logits, labels)
    found.add(place, answers(logits, place))
    return found


def named(logits: torch.Tensor, labels: torch.Tensor | None = None, *, language: bool = False) -> bool:
    return bool(at_chance([predictions_of(logits, labels)], NAMES, language=language))


def test_the_loss_of_chance_is_that_of_all_other_labels() -> None:
    labels = [0] * 6 + [1] * 3 + [4]
    by_hand = []
    for index, label in enumerate(labels):
        others = Counter(labels[:index] + labels[index + 1 :])
        by_hand.append(-math.log((others[label] + 0.5) / (9 + 0.5 * 5)))
    assert chance_loss(Counter(labels), 5) == pytest.approx(sum(by_hand) / 10)
    assert chance_loss(Counter({2: 30}), 5) == math.log(5), "no other label: frequencies would know everything"
    assert chance_loss(Counter(range(50)), 50000) == pytest.approx(math.log(50000)), "few samples tell no frequencies"


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_logits_without_a_signal_are_at_chance(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (400,), generator=generator)
    noise = 0.1 * torch.randn(400, classes, generator=generator)
    assert named(noise) and named(noise, labels) and named(noise, language=True)
    one_answer = torch.zeros(400, classes).index_fill_(1, torch.tensor([1]), 9.0) + 0.01 * noise
    assert named(one_answer) and named(one_answer, labels)
    sure = 30 * noise
    assert named(sure, labels) and not named(sure), "what depends on the input is judged by labels alone"


def test_who_knows_something_is_not_named() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (400,), generator=generator)
    truth = torch.nn.functional.one_hot(labels, 10).float()
    noise = torch.randn(400, 10, generator=generator)
    for scale in (0.5, 1.0, 3.0, 100.0):  # hardly sure, and far too sure of a third of its answers
        logits = scale * (2 * truth + noise)
        assert not named(logits, labels) and not named(logits)
    wrong = 100 * (truth + noise)
    assert score_samples("image-classification", wrong, labels).loss_sums.mean() > 10 * math.log(10)
    assert not named(wrong, labels), "a loss above chance with hits is one of too much trust"


def test_a_sample_of_one_class_is_no_fault_of_the_model() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(100, dtype=torch.long)
    logits = torch.randn(100, 2, generator=generator)
    logits[:, 0] += 4
    assert not named(logits, labels) and not named(logits)
    assert named(0.05 * torch.randn(100, 2, generator=generator), labels)


def test_rare_classes_make_no_merit_of_the_frequent_one() -> None:
    """Nine of ten samples are of one class: to answer nothing else is to know nothing of the input."""
    labels = torch.tensor(([0] * 9 + [1]) * 40)
    always = torch.tensor([[math.log(0.9), math.log(0.1)]]).repeat(400, 1)
    assert named(always, labels) and named(always)
    better = always.clone()
    better[labels == 1, 1] += 1.5
    assert not named(better, labels)


def test_one_prediction_tells_nothing_and_one_output_chooses_nothing() -> None:
    assert not named(torch.tensor([[0.1, 0.0]])) and not named(torch.randn(40, 1))


def test_sums_do_not_depend_on_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 5, generator=generator), torch.randint(5, (40,), generator=generator)
    whole = predictions_of(logits, labels)
    monkeypatch.setattr(predicted, "ELEMENTS_AT_ONCE", 20)
    first, second = predictions_of(logits[:7], labels[:7]), predictions_of(logits[7:], labels[7:])
    empty = Predictions()
    for part in (first, second):
        empty.merge(part.cpu())
    assert empty.mean is not None and whole.mean is not None
    torch.testing.assert_close(empty.mean, whole.mean)
    assert (empty.count, empty.labels, empty.correct) == (whole.count, whole.labels, whole.correct)
    assert float(empty.loss.errors) == pytest.approx(float(whole.loss.errors))
    assert float(empty.loss.mean) == pytest.approx(float(whole.loss.mean)) and empty.entropy == pytest.approx(
        whole.entropy
    )
    probabilities = logits.double().softmax(-1)
    mean = probabilities.mean(0)
    information = -(mean * mean.log()).sum() + (probabilities * probabilities.log()).sum(-1).mean()
    assert whole.from_input == pytest.approx(float(information / -(mean * mean.log()).sum()))


RANDOM_IMAGES = {
    "mlp": random_mlp,
    "resnet": small_resnet,
    "vit": lambda seed: ViTForImageClassification(
        ViTConfig(image_size=32, patch_size=8, num_channels=1, hidden_size=48, num_hidden_layers=2,
                  num_attention_heads=3, intermediate_size=64, num_labels=3)
    ),
    "convnext": lambda seed: ConvNextForImageClassification(
        ConvNextConfig(num_channels=1, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, num_labels=3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RANDOM_IMAGES)
@pytest.mark.parametrize("labels", [True, False])
def test_random_image_classifiers_get_no_verdict(kind: str, labels: bool) -> None:
    torch.manual_seed(0)
    models = [RANDOM_IMAGES[kind](seed).eval() for seed in (0, 1)]
    config = images(labels=labels)
    if kind != "mlp":
        generator = np.random.default_rng(0)
        pixels = list(generator.standard_normal((60, 1, 32, 32)).astype(np.float32))
        rows = datasets.Dataset.from_dict({"image": pixels, "label": [place % 3 for place in range(60)]})
        config = EvaluationConfig("image-classification", rows, labels=labels)
    report = report_of(models, config)
    assert report.verdict.answer == "undecided"
    assert [each.model for each in report.at_chance] == [0, 1]


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(
    ("head", "task"), [(BertForSequenceClassification, "text-classification"), (BertForMaskedLM, "fill-mask")]
)
def test_random_text_models_get_no_verdict(head: Any, task: str, labels: bool) -> None:
    config = BertConfig(vocab_size=45, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=48, num_labels=5, pad_token_id=0)  # fmt: skip
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(head(config).eval())
    report = report_of(models, EvaluationConfig(task, text_rows(60), labels=labels), word_tokenizer())
    assert report.verdict.answer == "undecided" and len(report.at_chance) == 2


@pytest.mark.parametrize("labels", [True, False])
def test_trained_models_get_their_verdict(labels: bool, llamas: Any, tmp_path: Path) -> None:
    trunk = trained(0)
    report = report_of([trunk, trained(1, start=trunk, steps=20)], images(labels=labels))
    assert (report.verdict.answer, report.at_chance) == ("merge", ())
    texts = EvaluationConfig("text-generation", text_data(tmp_path), tokenizer="bytes", max_length=32, labels=labels)
    report = report_of(list(llamas), texts)
    assert (report.verdict.answer, report.at_chance) == ("merge", ())
    # They know little, and more than the frequencies of the letters.
    report = report_of([trained_llama(0, steps=28), trained_llama(1, steps=28)], texts)
    assert not report.at_chance and report.verdict.answer != "undecided"


@pytest.mark.parametrize("labels", [True, False])
def test_one_parent_at_chance_is_named_alone(labels: bool) -> None:
    report = report_of([trained(0), random_mlp(1)], images(labels=labels))
    assert [each.model for each in report.at_chance] == [1] and report.verdict.answer == "undecided"
    assert "model 2 (ada/two)" in report.verdict.because and "ada/one" not in report.verdict.because
    assert hf_llfc.ConnectivityReport.from_dict(report.to_dict()).at_chance == report.at_chance


def test_three_models_and_a_base_that_need_not_know_the_task() -> None:
    trunk = trained(0)
    models = [trunk, trained(1, start=trunk, steps=20), random_mlp(2)]
    data = load_evaluation_data(images(), None, trunk.config)
    report = diagnose_models(models, data, region=arithmetic([0.5, 0.5]))
    assert not report.at_chance and report.verdict.answer != "undecided"
    report = diagnose_models(models, data, region=simplex([1, 1, 1]))
    assert [each.model for each in report.at_chance] == [2] and report.verdict.answer == "undecided"
    report = diagnose_models([models[2], *models[:2]], data, region=arithmetic([0.5, 0.5]))
    assert [each.model for each in report.at_chance] == [0] and report.verdict.answer == "undecided"


def words_of(data: Path) -> list[str]:
    return ["--task", "text-generation", "--dataset", str(data), "--tokenizer", "bytes", "--max-length", "16"]


def test_every_command_says_it_of_two_random_llamas(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], llamas: Any
) -> None:
    a, b = (str(saved(byte_llama(seed), tmp_path / f"random-{seed}")) for seed in (0, 1))
    good = str(saved(llamas[0], tmp_path / "good"))
    data = text_data(tmp_path)
    assert main(["diagnose", a, b, *words_of(data)]) == 0
    said = capsys.readouterr().out
    assert "verdict: undecided: model 1" in said and "random-0" in said and "random-1" in said
    assert "does no better than chance" in said
    assert main(["check", a, b, *words_of(data), "--format", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["answer"] == "undecided" and found["level"] == 2 and found["criteria"] == []
    assert [each["model"] for each in found["at_chance"]] == [0, 1]
    assert main(["check", good, b, *words_of(data)]) == 1
    said = capsys.readouterr().out
    assert "undecided: model 2" in said and "random-1" in said and "what decides" not in said
    assert not hf_llfc.check(a, b, data=EvaluationConfig("text-generation", data, tokenizer="bytes", max_length=16))


def test_card_and_page_of_a_run_say_it(tmp_path: Path, llamas: Any) -> None:
    good, random = saved(llamas[0], tmp_path / "good"), saved(byte_llama(1), tmp_path / "random")
    recipe = text_recipe(good, random, text_data(tmp_path), tmp_path / "out")
    result = hf_llfc.run(recipe)
    assert result.report is not None and result.report.verdict.answer == "undecided"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "> **Warning. No verdict.** Model 2 (./random) does no better than chance" in card
    assert str(tmp_path) not in card
    page = (tmp_path / "out" / "llfc" / "report.html").read_text()
    assert "No verdict" in page and "nothing follows for the merge" in page
