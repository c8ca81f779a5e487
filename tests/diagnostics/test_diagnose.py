import copy
import gc
import json

import datasets
import numpy as np
import pytest
import torch

from hf_llfc.diagnostics import ConnectivityReport, diagnose_models, recompute_batch_norm
from hf_llfc.diagnostics.combination import CombinedModel
from hf_llfc.diagnostics.diagnose import Features, barrier_height
from hf_llfc.diagnostics.features.layers import select_layers
from hf_llfc.diagnostics.lockstep import Lockstep
from hf_llfc.diagnostics.points import DEFAULT_ALPHAS, Point, arithmetic, line, simplex
from hf_llfc.diagnostics.streaming import Execution
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation import EvaluationConfig, evaluate_model, load_evaluation_data
from hf_llfc.evaluation.models import evaluation_mode
from tests.diagnostics.oracle import between, measure, run
from tests.evaluation.tiny_data import perceptron, pixel_rows, text_rows, vector_rows, word_tokenizer
from tests.tiny_models import FullDouble, tiny_model

ALPHAS = (0.0, 0.3, 0.5, 1.0)

CASES = [
    ("text-classification", "bert", "sequence-classification", ("bert.encoder.layer.0", "bert.encoder.layer.1")),
    ("text-classification", "gpt2", "sequence-classification", ("transformer.h.0", "transformer.h.1")),
    ("fill-mask", "distilbert", "masked-lm", ("distilbert.transformer.layer.0", "distilbert.transformer.layer.1")),
    ("text-generation", "llama-tied", "causal-lm", ("model.layers.0", "model.layers.1")),
    ("text-generation", "mixtral", "causal-lm", ("model.layers.0", "model.layers.1")),
    ("image-classification", "vit", "image-classification", ("vit.layers.0", "vit.layers.1")),
    (
        "image-classification",
        "resnet-basic",
        "image-classification",
        (
            "resnet.encoder.stages.0.layers.0",
            "resnet.encoder.stages.1.layers.0",
            "resnet.encoder.stages.1.layers.1",
            "resnet.encoder.stages.2.layers.0",
        ),
    ),
]


def data_for(task, config, count=11, **settings):
    classes = config.num_labels
    if task == "image-classification":
        rows, tokenizer = pixel_rows(count, classes=classes), None
    else:
        rows, tokenizer = text_rows(count, classes=classes), word_tokenizer()
    if task == "text-generation":
        settings = {"blocks": False, **settings}
    return load_evaluation_data(EvaluationConfig(task=task, dataset=rows, **settings), tokenizer, config)


def samples_of(data, dtype):
    """Every sample alone, hence without padding, and its label."""
    found = []
    for start in range(len(data)):
        batch = data.encode(np.array([start]))
        labels = batch.pop("labels")[0]
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].to(dtype)
        found.append((batch, labels))
    return found


def numbers(report):
    """Everything in a report that was measured."""
    rows = [
        value
        for row in report.layers
        for statistic in (row.llfc, row.baseline, row.coefficient)
        for value in (statistic.mean, statistic.std)
    ]
    path = [value for point in report.path for value in (point.loss, *point.metrics.values())]
    return [*rows, *path, report.barrier.loss, report.barrier.error]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("task", "family", "head", "modules"), CASES)
def test_streaming_gives_the_numbers_of_an_oracle_that_keeps_everything(task, family, head, modules, dtype, tolerance):
    model_a, model_b = (tiny_model(family, head, seed, dtype) for seed in (0, 1))
    data = data_for(task, model_a.config, batch_size=4)
    with FullDouble():
        report = diagnose_models([model_a, model_b], data, region=line(ALPHAS))
    oracle = measure(model_a, model_b, samples_of(data, dtype), modules, ALPHAS, task)

    assert report.layer_names == (*modules, "logits")
    assert report.alphas == ALPHAS
    for row in report.layers:
        for found, expected in (
            (row.llfc, oracle.llfc[row.layer, row.alpha]),
            (row.baseline, oracle.baseline[row.layer]),
            (row.coefficient, oracle.coefficient[row.layer, row.alpha]),
        ):
            assert (found.mean, found.std) == pytest.approx(expected, abs=tolerance), row
    for point in report.path:
        assert point.loss == pytest.approx(oracle.losses[point.alpha], abs=10 * tolerance)
        accuracy = next(iter(point.metrics.values()))
        assert accuracy == pytest.approx(1 - oracle.errors[point.alpha], abs=1e-12)
    chord = {alpha: alpha * oracle.losses[1.0] + (1 - alpha) * oracle.losses[0.0] for alpha in ALPHAS}
    highest = max(oracle.losses[alpha] - chord[alpha] for alpha in ALPHAS)
    assert report.barrier.loss == pytest.approx(max(0, highest), abs=10 * tolerance)


@pytest.mark.parametrize(("task", "family", "head", "modules"), CASES)
def test_neither_batches_nor_padding_change_a_number(task, family, head, modules):
    model_a, model_b = (tiny_model(family, head, seed, torch.float64) for seed in (0, 1))
    with FullDouble():
        reports = [
            diagnose_models([model_a, model_b], data_for(task, model_a.config, batch_size=size), region=line(ALPHAS))
            for size in (1, 3, 32)
        ]
    for report in reports[1:]:
        assert numbers(report) == pytest.approx(numbers(reports[0]), abs=1e-11)


@pytest.mark.parametrize("world", [2, 3, 13])
def test_sums_of_simulated_processes_are_those_of_one(world):
    model_a, model_b = (tiny_model("bert", "sequence-classification", seed, torch.float64) for seed in (0, 1))
    data = data_for("text-classification", model_a.config, batch_size=2)

    def sums_of(rank, world):
        with evaluation_mode(model_a, model_b):
            layers = select_layers(model_a, next(data.batches())[0])
            models = [model_a, model_b]
            lockstep = Lockstep.start(models, CombinedModel(models), line(ALPHAS), layers, {}, data)
            for batch, sample_ids in data.batches(rank, world):
                lockstep.add(batch, sample_ids)
        return lockstep.sums

    whole, merged = sums_of(0, 1), sums_of(0, world)
    for rank in range(1, world):
        merged.merge(sums_of(rank, world))
    for name in ("llfc", "coefficient", "baseline"):
        for field in ("count", "mean", "std"):
            found, expected = (getattr(getattr(sums, name).moments, field) for sums in (merged, whole))
            assert torch.allclose(found, expected, rtol=1e-12, atol=1e-13)
        kept = [getattr(sums, name).kept for sums in (merged, whole)]
        assert torch.equal(kept[0].keys, kept[1].keys)
        assert torch.allclose(kept[0].values, kept[1].values, rtol=1e-12, atol=1e-13)
    for found, expected in zip(merged.scores, whole.scores, strict=True):
        assert found.loss == pytest.approx(expected.loss, rel=1e-13)
        assert found.confusion == expected.confusion
    assert merged.choices == whole.choices
    for place, agreement in whole.agreements.items():
        found, expected = (each.row(line(ALPHAS).points[place]) for each in (merged.agreements[place], agreement))
        assert (found.half_share, found.orphans) == (expected.half_share, expected.orphans)
        for name in ("gain", "divergence", "bound", "barrier"):
            assert getattr(found, name).interval == pytest.approx(getattr(expected, name).interval, rel=1e-9)


def test_the_ends_are_the_parents():
    model_a, model_b = (tiny_model("bert", "sequence-classification", seed) for seed in (0, 1))
    data = data_for("text-classification", model_a.config)
    report = diagnose_models([model_a, model_b], data, region=line([0.5]))
    assert [point.alpha for point in report.path] == [0.0, 0.5, 1.0]
    assert report.alphas == (0.5,)
    for alpha, model in ((1.0, model_a), (0.0, model_b)):
        (point,) = (point for point in report.path if point.alpha == alpha)
        result = evaluate_model(model, data)
        assert (point.loss, point.metrics) == (result.loss, result.metrics)
    ends = diagnose_models([model_a, model_b], data)
    assert ends.alphas == DEFAULT_ALPHAS
    for row in ends.layers:
        if row.alpha in (0, 1):
            assert row.llfc.mean < 1e-15
            assert row.coefficient.mean == pytest.approx(1, abs=1e-15)


def test_a_model_with_itself_is_connected():
    model = tiny_model("bert", "sequence-classification")
    report = diagnose_models([model, copy.deepcopy(model)], data_for("text-classification", model.config))
    for row in report.layers:
        assert row.llfc.mean < 1e-12
        assert row.baseline.mean < 1e-15
        assert row.ratio is None or row.baseline.mean > 0
        assert row.coefficient.mean == pytest.approx(1, abs=1e-6)
    assert report.barrier.loss == pytest.approx(0, abs=1e-9)
    assert report.barrier.error == 0


def test_a_coefficient_keeps_its_sign():
    """Two maps whose mean is the negative of a third of either's blend."""
    model_a, model_b = perceptron(0, torch.float64), perceptron(0, torch.float64)
    with torch.no_grad():
        for model, scale in ((model_a, 1.0), (model_b, -3.0)):
            model.head.weight.mul_(scale)
            model.head.bias.zero_()
            for layer in model.layers:
                layer.bias.zero_()
        # Blend and merged features differ in sign: f = h·W with h and W of opposite shares.
        for layer in model_b.layers[:1]:
            layer.weight.mul_(0.1)
    rows = vector_rows()
    data = load_evaluation_data(EvaluationConfig(task="image-classification", dataset=rows), None, model_a.config)
    report = diagnose_models([model_a, model_b], data, region=line([0.6]))
    # h: 1 and 0.1, so 0.64 between; W: 1 and -3, so -0.6 between; the blend has 0.6 - 0.4 * 0.3 = 0.48.
    assert report.at(0.6)[-1].coefficient.mean == pytest.approx(0.64 * -0.6 / 0.48)
    assert report.at(0.6)[-1].llfc.mean == pytest.approx(2)


def test_batch_normalization_is_recomputed_per_alpha():
    model_a, model_b = (tiny_model("resnet-basic", "image-classification", seed, torch.float64) for seed in (0, 1))
    data = data_for("image-classification", model_a.config, batch_size=4)
    calibration = data_for("image-classification", model_a.config, count=24, batch_size=12, labels=False, seed=5)
    plain = diagnose_models([model_a, model_b], data, region=line(ALPHAS))
    report = diagnose_models([model_a, model_b], data, region=line(ALPHAS), batch_norm_data=calibration)
    assert report.data["batch_norm"] == "recomputed"
    for point, uncorrected in zip(report.path, plain.path, strict=True):
        if point.alpha in (0, 1):
            assert point == uncorrected
            continue
        combined = CombinedModel([model_a, model_b])
        combined.move_to(point.weights)
        recompute_batch_norm(combined.model, calibration.batches())
        assert point.loss == pytest.approx(evaluate_model(combined.model, data).loss, rel=1e-12)
        assert point.loss != pytest.approx(uncorrected.loss, rel=1e-3)
    vit = [tiny_model("vit", "image-classification", seed) for seed in (0, 1)]
    data = data_for("image-classification", vit[0].config)
    assert "batch_norm" not in diagnose_models(vit, data, region=line([0.5]), batch_norm_data=data).data


def test_without_labels_features_are_compared_alone():
    models = [tiny_model("bert", "sequence-classification", seed) for seed in (0, 1)]
    with torch.no_grad():
        for model in models:
            model.classifier.weight.mul_(30)  # so that they answer each input otherwise
    labelled = diagnose_models(models, data_for("text-classification", models[0].config))
    report = diagnose_models(models, data_for("text-classification", models[0].config, labels=False))
    assert report.layers == labelled.layers
    assert all(point.loss is None and point.metrics == {} for point in report.path)
    assert (report.barrier.loss, report.barrier.error) == (None, None)
    assert "without labels" in report.verdict.because


def test_bare_encoders_are_compared_without_logits():
    models = [tiny_model("bert", "base", seed) for seed in (0, 1)]
    report = diagnose_models(models, data_for("text-classification", models[0].config, labels=False))
    assert report.layer_names == ("encoder.layer.0", "encoder.layer.1")
    with pytest.raises(EvaluationError, match="BertModel has no logits"):
        diagnose_models(models, data_for("text-classification", models[0].config))


def test_layers_on_request():
    models = [tiny_model("resnet-basic", "image-classification", seed, torch.float64) for seed in (0, 1)]
    data = data_for("image-classification", models[0].config)
    inner = "resnet.encoder.stages.0.layers.0.layer.1"
    report = diagnose_models(models, data, region=line(ALPHAS), features=Features([inner]))
    # The block adds its shortcut to this tensor in place after it was handed over.
    oracle = measure(*models, samples_of(data, torch.float64), (inner,), ALPHAS, "image-classification")
    assert report.layer_names == (inner, "logits")
    for row in report.layers:
        assert row.llfc.mean == pytest.approx(oracle.llfc[row.layer, row.alpha][0], abs=1e-10)
        assert row.baseline.mean == pytest.approx(oracle.baseline[row.layer][0], abs=1e-10)


def with_nan(model, name):
    with torch.no_grad():
        model.get_parameter(name)[0] = float("nan")
    return model


def test_features_that_are_not_finite_are_named():
    models = [tiny_model("bert", "sequence-classification", seed) for seed in (0, 1)]
    data = data_for("text-classification", models[0].config)
    first = int(data.sample_ids[0])
    name = "bert.encoder.layer.1.output.dense.bias"
    for index, which in enumerate(("first", "second")):
        broken = list(models)
        broken[index] = with_nan(copy.deepcopy(models[index]), name)
        expected = rf"layer 'bert.encoder.layer.1' of the {which} model are not finite .* for sample {first};"
        with pytest.raises(EvaluationError, match=expected):
            diagnose_models(broken, data)


def test_merged_features_that_are_not_finite_are_named():
    models = [perceptron(seed, torch.float16) for seed in (0, 1)]
    with torch.no_grad():
        for model, rows in zip(models, (slice(0, 8), slice(8, 16)), strict=True):
            # Each parent is finite, but where its large weights meet those of the other float16 overflows.
            model.layers[0].weight.zero_()
            model.layers[0].weight[rows] = 60.0
            model.layers[1].weight.zero_()
            model.layers[1].weight[:, 8 - rows.start : 16 - rows.start] = 6e4
    rows = datasets.Dataset.from_dict({"pixel_values": [[1.0] * 12], "label": [0]})
    data = load_evaluation_data(EvaluationConfig(task="image-classification", dataset=rows), None, models[0].config)
    with pytest.raises(EvaluationError, match=r"'activation\[1\]' of the merged model at alpha 0.5 are not finite"):
        diagnose_models(models, data, region=line([0.5]))


def test_an_empty_sample_is_named():
    models = [tiny_model("bert", "sequence-classification", seed) for seed in (0, 1)]
    data = data_for("text-classification", models[0].config, batch_size=3)
    encode = data.encode

    def with_empty_sample(positions):
        batch = encode(positions)
        batch["attention_mask"][positions == 4] = 0
        return batch

    object.__setattr__(data, "encode", with_empty_sample)
    with pytest.raises(EvaluationError, match=f"sample {data.sample_ids[4]} is empty"):
        diagnose_models(models, data)


def test_alphas_are_checked():
    models = [perceptron(seed) for seed in (0, 1)]
    data = load_evaluation_data(
        EvaluationConfig(task="image-classification", dataset=vector_rows()), None, models[0].config
    )
    for alphas, message in (
        ([], "at least one"),
        ([0.5, 1.1], "from 0 to 1"),
        ([float("nan")], "from 0 to 1"),
        ([0, 1], "a value between 0 and 1"),
    ):
        with pytest.raises(EvaluationError, match=message):
            diagnose_models(models, data, region=line(alphas))


def test_models_keep_weights_and_mode_and_nothing_outlives_a_batch():
    models = [tiny_model("bert", "sequence-classification", seed).train() for seed in (0, 1)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    data = data_for("text-classification", models[0].config, batch_size=2)
    alive = []

    def count_tensors(doing, done, total):
        gc.collect()
        alive.append(sum(type(found) is torch.Tensor for found in gc.get_objects()))

    diagnose_models(models, data, execution=Execution(progress=count_tensors))
    assert len(alive) == 7  # before every batch and after the last
    assert len(set(alive[2:])) == 1
    for model, state in zip(models, before, strict=True):
        assert model.training
        assert not model._forward_hooks
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_barriers():
    def height(values):
        return barrier_height([Point((alpha, 1 - alpha), "") for alpha in values], list(values.values()))

    assert height({0.0: 1.0, 0.5: 2.5, 1.0: 3.0}) == pytest.approx(0.5)
    assert height({0.0: 1.0, 0.25: 1.0, 1.0: 3.0}) == 0
    assert height({0.0: 0.3, 0.1: 0.3, 0.9: 0.3, 1.0: 0.3}) == pytest.approx(0, abs=1e-16)
    triangle = simplex([1, 1, 2]).points
    values = {"model 1": 1.0, "model 2": 2.0, "model 3": 6.0, "models 1 and 3": 4.0, "centre": 3.2}
    assert barrier_height(triangle, [values.get(point.name, 0.0) for point in triangle]) == pytest.approx(0.5)
    negated = arithmetic([0.5, 0.5]).points
    assert negated[3].weights == (-0.5, -0.5, 2.0)
    assert barrier_height(negated, [100.0 if place == 3 else 1.0 for place in range(len(negated))]) == 0


@pytest.mark.parametrize("region", [simplex([1, 1, 2]), arithmetic([0.7, 0.6])], ids=lambda region: region.kind)
def test_many_models_give_the_numbers_of_an_oracle(region):
    models = [tiny_model("bert", "sequence-classification", seed, torch.float64) for seed in (0, 1, 2)]
    data = data_for("text-classification", models[0].config, count=5, batch_size=2)
    with FullDouble():
        report = diagnose_models(models, data, region=region)
    modules = ("bert.encoder.layer.0", "bert.encoder.layer.1")
    samples = samples_of(data, torch.float64)
    features = {point.name: [] for point in region.points}
    losses = {point.name: [] for point in region.points}
    for point in region.points:
        states = [model.state_dict() for model in models]
        model = copy.deepcopy(models[0])
        model.load_state_dict(
            {
                name: sum(weight * state[name] for weight, state in zip(point.weights, states, strict=True))
                if value.is_floating_point()
                else value
                for name, value in states[0].items()
            }
        )
        for inputs, label in samples:
            kept, logits = run(model.eval(), inputs, modules)
            features[point.name].append(kept)
            losses[point.name].append(np.log(np.exp(logits).sum()) - logits[int(label)])
    own = [point.name for point in region.points if point.vertex is not None]

    def distance(x, y):
        return 1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y)

    assert len(report.layers) == 3 * len(region.points)
    for row in report.layers:
        point = next(point for point in region.points if point.weights == row.weights)
        distances, coefficients, baselines = [], [], []
        for place in range(len(samples)):
            ends = [features[name][place][row.layer] for name in own]
            blend = sum(weight * end for weight, end in zip(point.weights, ends, strict=True))
            merged = features[point.name][place][row.layer]
            distances.append(distance(merged, blend))
            coefficients.append(merged @ blend / (blend @ blend))
            baselines.append(
                np.mean([distance(ends[0], ends[1]), distance(ends[0], ends[2]), distance(ends[1], ends[2])])
            )
        assert row.llfc.mean == pytest.approx(np.mean(distances), abs=1e-12), row
        assert row.coefficient.std == pytest.approx(np.std(coefficients), abs=1e-11)
        assert row.baseline.mean == pytest.approx(np.mean(baselines), abs=1e-12)
        levels = [float(level) for level in row.llfc.quantiles]
        assert list(row.llfc.quantiles.values()) == pytest.approx(np.quantile(distances, levels), abs=1e-12)
        assert row.llfc.interval[0] <= row.llfc.mean <= row.llfc.interval[1]
    for point, found in zip(region.points, report.path, strict=True):
        assert (found.name, found.weights) == (point.name, point.weights)
        assert found.loss == pytest.approx(np.mean(losses[point.name]), abs=1e-10)
    assert {row.weights for row in report.at()} == {region.points[-1].weights}
    assert ConnectivityReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_statistics_by_token_are_those_of_every_token():
    model_a, model_b = (tiny_model("bert", "sequence-classification", seed, torch.float64) for seed in (0, 1))
    data = data_for("text-classification", model_a.config, count=7, batch_size=3)
    with FullDouble():
        report = diagnose_models([model_a, model_b], data, region=line([0.3]), features=Features(unit="token"))
    assert report.data["unit"] == "token"
    layer = "bert.encoder.layer.1"
    merged = between(model_a, model_b, 0.3)
    distances = []
    for inputs, _ in samples_of(data, torch.float64):
        x, a, b = (run(model, inputs, [layer])[0][layer].reshape(-1, 24) for model in (merged, model_a, model_b))
        blend = 0.3 * a + 0.7 * b
        distances += list(1 - (x * blend).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(blend, axis=1))
    row = next(row for row in report.layers if row.layer == layer)
    assert (row.llfc.mean, row.llfc.std) == pytest.approx((np.mean(distances), np.std(distances)), abs=1e-12)
    assert row.llfc.quantiles["0.95"] == pytest.approx(np.quantile(distances, 0.95), abs=1e-12)
    assert row.llfc.interval is None  # tokens of one sample are not independent
    whole = diagnose_models([model_a, model_b], data, region=line([0.3]))
    assert report.layers[-1].llfc.mean == pytest.approx(whole.layers[-1].llfc.mean)


def test_tokens_need_a_mask():
    models = [tiny_model("vit", "image-classification", seed) for seed in (0, 1)]
    data = data_for("image-classification", models[0].config)
    with pytest.raises(EvaluationError, match="by token need an attention mask"):
        diagnose_models(models, data, features=Features(unit="token"))
    with pytest.raises(EvaluationError, match="unknown unit 'tokens'; did you mean 'token'"):
        diagnose_models(models, data, features=Features(unit="tokens"))
    with pytest.raises(EvaluationError, match="2 models for points with 3 weights"):
        diagnose_models(models, data, region=simplex([1, 1, 1]))
