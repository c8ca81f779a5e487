import math
from collections import Counter

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.metrics import (
    CLASSIFICATION_METRICS,
    OFFLINE_METRICS,
    classification_metric,
    default_metrics,
    language_model_metric,
    load_metric,
    refuse_other_than_two_classes,
)

GENERATOR = np.random.default_rng(0)
REFERENCES = GENERATOR.integers(4, size=60)
PREDICTIONS = np.where(GENERATOR.random(60) < 0.6, REFERENCES, GENERATOR.integers(5, size=60))
EXPECTED = {
    "accuracy": np.mean(REFERENCES == PREDICTIONS),
    "balanced_accuracy": sklearn_metrics.recall_score(REFERENCES, PREDICTIONS, labels=range(4), average="macro"),
    "macro_f1": sklearn_metrics.f1_score(REFERENCES, PREDICTIONS, average="macro"),
    "weighted_f1": sklearn_metrics.f1_score(REFERENCES, PREDICTIONS, average="weighted"),
    "matthews_correlation": sklearn_metrics.matthews_corrcoef(REFERENCES, PREDICTIONS),
}


@pytest.mark.parametrize("name", [name for name in CLASSIFICATION_METRICS if name != "f1"])
def test_a_module_gives_its_value_alone_in_batches_and_from_counts(name):
    expected = pytest.approx(EXPECTED[name], rel=1e-12)
    assert load_metric(name).compute(predictions=PREDICTIONS, references=REFERENCES) == {name: expected}
    metric = load_metric(name)
    for part in np.array_split(np.arange(60), 7):
        metric.add_batch(predictions=PREDICTIONS[part], references=REFERENCES[part])
    assert metric.compute() == {name: expected}
    confusion = Counter(zip(REFERENCES.tolist(), PREDICTIONS.tolist(), strict=True))
    metric = load_metric(name)
    for _ in range(2):
        assert classification_metric(metric, name, confusion) == {name: expected}


def test_modules_of_language_models():
    sums = {"loss_sum": 12.0, "correct": 3, "tokens": 8, "byte_count": 20}
    for name, expected in (
        ("perplexity", math.exp(12 / 8)),
        ("bits_per_byte", 12 / math.log(2) / 20),
        ("token_accuracy", 3 / 8),
    ):
        metric = load_metric(name, language_model=True)
        assert language_model_metric(metric, name, **sums) == {name: pytest.approx(expected, rel=1e-14)}
    perplexity = load_metric("perplexity", language_model=True)
    assert perplexity.compute(loss_sums=[5.0, 7.0], counts=[2, 6])["perplexity"] == pytest.approx(math.exp(1.5))
    assert perplexity.compute(loss_sums=[8000.0], counts=[8]) == {"perplexity": math.inf}


def test_f1_is_that_of_class_1_of_two():
    references, predictions = [0, 0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 1, 1, 0]
    assert load_metric("f1").compute(predictions=predictions, references=references) == {"f1": 0.75}
    macro = load_metric("macro_f1").compute(predictions=predictions, references=references)["macro_f1"]
    assert macro == pytest.approx((0.75 + 2 / 3) / 2)
    with pytest.raises(EvaluationError, match="class 1 of two, and the model has 3 classes; use macro_f1"):
        refuse_other_than_two_classes(["f1"], 3)
    refuse_other_than_two_classes(["f1"], 2)
    refuse_other_than_two_classes(["macro_f1"], 3)


def test_modules_describe_themselves():
    for name, kind in OFFLINE_METRICS.items():
        metric = kind(keep_in_memory=True)
        assert metric.description == kind.__doc__
        assert metric.inputs_description, name


def test_bits_per_byte_are_reported_where_bytes_are_known():
    assert default_metrics(language_model=False, byte_count=None) == ("accuracy",)
    assert "bits_per_byte" not in default_metrics(language_model=True, byte_count=None)
    assert "bits_per_byte" in default_metrics(language_model=True, byte_count=7)


def write_metric(folder, features):
    """A metric as a user's own script."""
    lines = (
        "import datasets",
        "import evaluate",
        "class Own(evaluate.Metric):",
        "    def _info(self):",
        f"        features = datasets.Features({{name: datasets.Value('int64') for name in {features!r}}})",
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='', features=features)",
        "    def _compute(self, predictions, references, **others):",
        "        hits = [float(one == other) for one, other in zip(predictions, references)]",
        "        return {'own': sum(hits), 'each': hits}",
    )
    folder.mkdir()
    (folder / "own.py").write_text("\n".join(lines))
    return str(folder / "own.py")


def test_what_evaluate_loads_can_be_used(tmp_path):
    name = write_metric(tmp_path / "pair", ["predictions", "references"])
    confusion = Counter({(0, 0): 3, (0, 1): 2})
    assert classification_metric(load_metric(name, trust_remote_code=True), name, confusion) == {"own": 3.0}
    name = write_metric(tmp_path / "scores", ["predictions", "references", "scores"])
    with pytest.raises(EvaluationError, match="needs predictions, references, scores; only"):
        load_metric(name, trust_remote_code=True)


def test_unknown_metrics_name_their_neighbours():
    with pytest.raises(EvaluationError, match="did you mean 'f1'"):
        load_metric("F1 ")
    with pytest.raises(EvaluationError, match="not one for language models; did you mean 'perplexity'"):
        load_metric("perplexety", language_model=True)
    with pytest.raises(EvaluationError, match="not one for classification"):
        load_metric("bits_per_byte")
