import copy

import datasets
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation import EvaluationConfig, evaluate_model, forward_logits, load_evaluation_data, model_inputs
from hf_llfc.evaluation.models import evaluation_mode
from tests.evaluation.tiny_data import PerceptronConfig, perceptron, pixel_rows, text_rows, vector_rows, word_tokenizer
from tests.tiny_models import FullDouble, tiny_model

PAIRS = [
    ("text-classification", "bert", "sequence-classification"),
    ("text-classification", "roberta", "sequence-classification"),
    ("text-classification", "distilbert", "sequence-classification"),
    ("text-classification", "gpt2", "sequence-classification"),
    ("text-classification", "llama", "sequence-classification"),
    ("fill-mask", "bert", "masked-lm"),
    ("fill-mask", "distilbert", "masked-lm"),
    ("text-generation", "gpt2", "causal-lm"),
    ("text-generation", "mixtral", "causal-lm"),
    ("image-classification", "vit", "image-classification"),
    ("image-classification", "resnet-basic", "image-classification"),
]


def data_for(task, model, **settings):
    rows = pixel_rows(classes=model.config.num_labels) if task == "image-classification" else text_rows(classes=3)
    if task == "text-generation":
        settings = {"blocks": False, **settings}
    if task != "image-classification":
        # A position table of a RoBERTa starts after the padding index.
        settings = {"max_length": 20, **settings}
    tokenizer = None if task == "image-classification" else word_tokenizer()
    return load_evaluation_data(EvaluationConfig(task=task, dataset=rows, **settings), tokenizer, model.config)


@pytest.mark.parametrize(("task", "family", "head"), PAIRS)
def test_batches_change_nothing_and_one_sample_at_a_time_is_the_reference(task, family, head):
    model = tiny_model(family, head, dtype=torch.float64)
    loss = count = 0
    with torch.no_grad(), FullDouble():
        for batch, _ in data_for(task, model, batch_size=1).batches():
            # Without padding the attention mask says nothing.
            inputs = {name: value for name, value in model_inputs(batch, model).items() if name != "attention_mask"}
            logits, labels = model(**inputs).logits, batch["labels"]
            if task == "text-generation":
                logits, labels = logits[:, :-1], labels[:, 1:]
            loss += nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum").item()
            count += (labels != -100).sum().item()
        results = [evaluate_model(model, data_for(task, model, batch_size=size)) for size in (1, 4, 32)]
    for result in results:
        assert result.loss == pytest.approx(loss / count, rel=1e-10)
        assert result.error == results[0].error
        assert result.metrics == pytest.approx(results[0].metrics, rel=1e-10)
        assert result.samples == 23
    first = "accuracy" if task.endswith("classification") else "token_accuracy"
    assert results[0].metrics[first] == pytest.approx(1 - results[0].error)


def test_a_users_own_model(tmp_path):
    AutoConfig.register("llfc-test-perceptron", PerceptronConfig, exist_ok=True)
    AutoModelForImageClassification.register(PerceptronConfig, type(perceptron()), exist_ok=True)
    perceptron().save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    config = EvaluationConfig(task="image-classification", dataset=vector_rows(), metric="macro_f1")
    result = evaluate_model(model, load_evaluation_data(config, tmp_path, model.config))
    pixels = torch.tensor(vector_rows()["pixel_values"][:])
    labels = torch.tensor(vector_rows()["label"][:])
    with torch.no_grad():
        logits = perceptron()(pixels).logits
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert result.metrics["accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert set(result.metrics) == {"accuracy", "macro_f1"}


def test_logits_are_found_in_whatever_a_model_gives_out():
    model, batch = perceptron(), {"pixel_values": torch.randn(2, 12), "labels": torch.tensor([0, 1])}
    expected = model(batch["pixel_values"]).logits
    for wrap in (lambda output: output, lambda output: output.logits, lambda output: (output.logits, None)):
        wrapped = copy.deepcopy(model)
        forward = wrapped.forward
        wrapped.forward = lambda pixel_values, forward=forward, wrap=wrap: wrap(forward(pixel_values))
        assert torch.equal(forward_logits(wrapped, batch), expected)
    bare = tiny_model("bert", "base")
    assert forward_logits(bare, {"input_ids": torch.tensor([[3, 4]])}) is None


def test_inputs_are_those_the_forward_pass_names_in_the_models_precision():
    batch = {"pixel_values": torch.randn(2, 12), "input_ids": torch.ones(2, 3).long(), "labels": torch.tensor([0, 1])}
    inputs = model_inputs(batch, perceptron(dtype=torch.bfloat16))
    assert list(inputs) == ["pixel_values"]
    assert inputs["pixel_values"].dtype == torch.bfloat16
    everything = perceptron()
    everything.forward = lambda **inputs: None
    assert list(model_inputs(batch, everything)) == ["pixel_values", "input_ids"]


def test_every_module_gets_its_mode_back():
    model = perceptron().train()
    model.head.eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert model.training and model.layers.training and not model.head.training


def test_a_loss_that_is_not_finite_names_the_sample():
    rows = vector_rows().select(range(4))
    rows = datasets.Dataset.from_dict(
        {**rows.to_dict(), "pixel_values": [*rows["pixel_values"][:3], [float("inf")] * 12]}
    )
    model = perceptron()
    config = EvaluationConfig(task="image-classification", dataset=rows, batch_size=2)
    with pytest.raises(EvaluationError, match="loss of Perceptron is not finite for sample 3"):
        evaluate_model(model, load_evaluation_data(config, None, model.config))


def test_what_a_model_refuses_is_an_error_of_ours():
    model = tiny_model("resnet-basic", "image-classification")
    config = EvaluationConfig(task="image-classification", dataset=pixel_rows(channels=1))
    data = load_evaluation_data(config, None, model.config)
    with pytest.raises(EvaluationError, match=r"ResNetForImageClassification refuses a batch \(pixel_values"):
        evaluate_model(model, data)
    unlabelled = EvaluationConfig(task="image-classification", dataset=pixel_rows(), labels=False)
    with pytest.raises(EvaluationError, match="loss and metrics need labels"):
        evaluate_model(model, load_evaluation_data(unlabelled, None, model.config))
    bare = tiny_model("bert", "base")
    with pytest.raises(EvaluationError, match="BertModel has no logits"):
        evaluate_model(bare, data_for("text-classification", bare))


def test_progress_is_told():
    model, told = perceptron(), []
    config = EvaluationConfig(task="image-classification", dataset=vector_rows(), batch_size=10)
    data = load_evaluation_data(config, None, model.config)
    evaluate_model(model, data, on_batch=lambda done, total: told.append((done, total)))
    assert told == [(0, 23), (10, 23), (20, 23), (23, 23)]  # samples
