"""The three levels of `check`: what each finds, when it stops, and what it refuses."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

import hf_llfc
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.cli import main
from hf_llfc.errors import CheckpointError, EvaluationError
from hf_llfc.evaluation import EvaluationConfig
from hf_llfc.foundation.progress import silent
from hf_llfc.pipeline.mergeability import (
    CALIBRATION_SAMPLES,
    CALIBRATION_TEXTS,
    compare_tensors,
    compare_weights,
    open_calibration,
)
from tests.mlp_model import MLPConfig, MLPForImageClassification
from tests.runs import byte_llama, moved, saved, text_data, trained_llama

SIDE, CLASSES = 6, 4


def image_rows(count=600, seed=0):
    """Noise with one bright quadrant, which is the label: learnt in a few steps."""
    generator = np.random.default_rng(seed)
    images = generator.standard_normal((count, 1, SIDE, SIDE)).astype(np.float32)
    labels = generator.integers(0, CLASSES, count)
    half = SIDE // 2
    for image, label in zip(images, labels, strict=True):
        row, column = half * (label // 2), half * (label % 2)
        image[0, row : row + half, column : column + half] += 1.0
    return images, labels


def trained(seed, start=None, steps=150):
    """A perceptron that knows its quadrants; from its own start, or onward from another one's weights."""
    torch.manual_seed(seed)
    model = MLPForImageClassification(MLPConfig(image_size=SIDE, hidden_sizes=(48, 48), num_labels=CLASSES))
    if start is not None:
        model.load_state_dict(start.state_dict())
    images, labels = map(torch.from_numpy, image_rows())
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (64,))
        model(pixel_values=images[chosen], labels=labels[chosen]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def trunk():
    return trained(0)


@pytest.fixture(scope="module")
def data():
    """Samples without a label column."""
    return EvaluationConfig("image-classification", Dataset.from_dict({"image": list(image_rows(200, seed=1)[0])}))


def test_distances_of_tensors_are_those_of_float64(tmp_path):
    paths = [saved(byte_llama(seed), tmp_path / str(seed)) for seed in (0, 1)]
    a, b = (load_file(path / "model.safetensors") for path in paths)
    a["lm_head.weight"].zero_()
    b["lm_head.weight"].zero_()
    b["model.norm.weight"].zero_()
    b["model.embed_tokens.weight"] *= 3
    for path, tensors in zip(paths, (a, b), strict=True):
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    rows = {row.tensor: row for row in compare_tensors(*map(open_checkpoint, paths))}
    assert list(rows) == list(open_checkpoint(paths[0]).tensors)
    for name, row in rows.items():
        x, y = a[name].double().flatten(), b[name].double().flatten()
        norms = [float(value.norm()) for value in (x, y)]
        if min(norms):
            assert row.cosine == pytest.approx(float(x @ y) / norms[0] / norms[1], abs=1e-12)
            assert row.scale == pytest.approx(norms[1] / norms[0])
            assert row.distance == pytest.approx(float((x - y).norm()) / max(norms))
    assert (rows["lm_head.weight"].cosine, rows["lm_head.weight"].distance) == (1, 0)
    assert rows["lm_head.weight"].scale is None
    assert (rows["model.norm.weight"].cosine, rows["model.norm.weight"].distance) == (0, 1)
    assert rows["model.norm.weight"].scale == 0 and not rows["model.norm.weight"].matrix


def test_children_of_one_ancestor_are_swept_once(trunk):
    child, stranger = trained(1, start=trunk, steps=20), trained(2)
    related = compare_weights(open_checkpoint(trunk), open_checkpoint(child))
    assert related.cosine > 0.9 and related.swept == "once" and len(related.alignment.metadata["sweeps"]) == 1
    unrelated = compare_weights(open_checkpoint(trunk), open_checkpoint(stranger))
    assert abs(unrelated.cosine) < 0.5 and unrelated.swept == "fully"
    assert unrelated.gain > related.gain >= 0


def test_each_level_answers_what_it_can(trunk, data):
    child = trained(1, start=trunk, steps=20)
    headers = hf_llfc.check(trunk, child, level=0)
    assert (headers.answer, headers.level, headers.cosine) == ("undecided", 0, None)
    weights = hf_llfc.check(trunk, child)
    assert (weights.answer, weights.level, weights.layers) == ("merge", 1, ())
    assert weights.matching == "once" and "one pass was made" in weights.because
    assert [row.distance for row in weights.tensors] == sorted((row.distance for row in weights.tensors), reverse=True)
    features = hf_llfc.check(trunk, child, data=data)
    assert (features.answer, features.level, features.aligned) == ("merge", 2, False)
    assert [row.layer for row in features.layers] == ["layers.0", "layers.1", "logits"]
    assert features.outputs.predictions == CALIBRATION_SAMPLES
    assert all(criterion.holds for criterion in features.criteria)
    assert features.gain == weights.gain and features.tensors == weights.tensors


def test_a_moved_child_is_to_be_aligned_and_found_by_its_features(trunk, data):
    child = moved(trained(1, start=trunk, steps=20), 5)
    found = hf_llfc.check(trunk, child, data=data)
    assert (found.answer, found.level, found.aligned) == ("align", 2, True)
    assert found.because.startswith("not as they are (divergence") and "after weight matching" in found.because
    assert found.cosine < 0.5 < 0.9 < found.cosine_aligned


def test_a_model_whose_hidden_layer_has_been_turned_round_is_not_merged(trunk, data):
    """Nothing that is moved undoes it: a permutation has no sign."""
    turned = trained(1, start=trunk, steps=20)
    with torch.no_grad():
        turned.layers[1].dense.weight.neg_()
    found = hf_llfc.check(trunk, turned, data=data)
    assert (found.answer, found.level) == ("undecided", 2) and not found
    assert found.outputs.merged_divergence > 0.1 and "the parents disagree" in found.because
    assert found.tensors[0].tensor == "layers.1.dense.weight"
    assert found.tensors[0].cosine < -0.9 < 0.9 < found.median_cosine


def test_weights_that_share_nothing_and_that_matching_does_not_bring_closer_give_no_yes():
    """Two perceptrons of one unit a layer: there is nothing to move, and no common ancestor either."""
    config = MLPConfig(image_size=SIDE, hidden_sizes=(1, 1), num_labels=CLASSES)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(MLPForImageClassification(config).eval())
    found = hf_llfc.check(*models)
    assert (found.answer, found.level) == ("undecided", 1) and not found and found.median_cosine < 0.5
    assert "far apart" in found.because


def test_equal_weights_and_planted_moves_are_settled_without_running_a_model(trunk, data, monkeypatch):
    monkeypatch.setattr("hf_llfc.pipeline.mergeability.compare_features", lambda *arguments: pytest.fail("a model ran"))
    same = hf_llfc.check(trunk, trunk, data=data)
    assert (same.answer, same.level, same.moved) == ("merge", 1, 0)
    planted = trained(0, steps=0)
    planted.load_state_dict(trunk.state_dict())
    found = hf_llfc.check(trunk, moved(planted, 3), data=data)
    assert (found.answer, found.level) == ("align", 1) and found.cosine_aligned == pytest.approx(1)


def test_what_does_not_fit_is_settled_by_the_headers(data):
    small = MLPForImageClassification(MLPConfig(image_size=SIDE, hidden_sizes=(8, 8), num_labels=CLASSES))
    wide = MLPForImageClassification(MLPConfig(image_size=SIDE, hidden_sizes=(9, 8), num_labels=CLASSES))
    found = hf_llfc.check(small, wide, data=data)
    assert (found.answer, found.level) == ("do not merge", 0) and found.problems


def test_level_and_data_must_go_together(trunk, data):
    with pytest.raises(EvaluationError, match="level 2 runs the models: give task and dataset"):
        hf_llfc.check(trunk, trunk, level=2)
    with pytest.raises(EvaluationError, match="data have no meaning at level 1"):
        hf_llfc.check(trunk, trunk, level=1, data=data)
    with pytest.raises(EvaluationError, match="there is no level 3"):
        hf_llfc.check(trunk, trunk, level=3)


def test_a_weight_that_is_not_finite_is_named(trunk):
    bad = trained(0, steps=0)
    with torch.no_grad():
        bad.layers[1].dense.weight[0, 0] = float("nan")
    for pair in ((trunk, bad), (bad, trunk)):
        with pytest.raises(CheckpointError, match=r"layers\.1\.dense\.weight .* NaN or infinite"):
            hf_llfc.check(*pair)


def test_a_bare_encoder_is_judged_by_its_features():
    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(BertModel(config).eval())
    near = copy.deepcopy(models[0])
    with torch.no_grad():
        for weight in near.encoder.layer[1].parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    texts = Dataset.from_dict({"text": ["one line", "another line", "a third, longer line of text"]})
    data = EvaluationConfig("text-classification", texts, tokenizer="bytes")
    found = hf_llfc.check(models[0], near, data=data)
    assert (found.answer, found.level, found.outputs) == ("merge", 2, None)
    assert found.layers[-1].layer == "encoder.layer.1"
    assert [criterion.quantity.split(",")[0] for criterion in found.criteria] == [
        "LLFC over baseline",
        "coefficient in the worst layer",
    ]


def test_small_and_large_data_are_taken_as_they_come(tmp_path):
    model = saved(byte_llama(0), tmp_path / "a")
    checkpoint = open_checkpoint(model)
    file = text_data(tmp_path)
    settings = {"tokenizer": "bytes", "max_length": 8}
    blocks = open_calibration(EvaluationConfig("text-generation", file, **settings), checkpoint)
    assert len(blocks) == CALIBRATION_TEXTS and not blocks.labelled
    assert sum(len(ids) for _, ids in blocks.batches()) == CALIBRATION_TEXTS
    rows = open_calibration(EvaluationConfig("text-generation", file, blocks=False, **settings), checkpoint)
    assert len(rows) == 1  # a text file is one row
    three = open_calibration(EvaluationConfig("text-generation", file, samples=3, **settings), checkpoint)
    assert len(three) == 3


def test_the_command_prints_evidence_and_ends_as_it_answers(tmp_path, capsys):
    a = str(saved(trained_llama(0), tmp_path / "a"))
    b = str(saved(moved(trained_llama(0), 1), tmp_path / "b"))
    c = str(saved(trained_llama(2), tmp_path / "c"))
    data = ["--task", "text-generation", "--dataset", str(text_data(tmp_path)), "--tokenizer", "bytes"]
    data += ["--max-length", "16"]
    assert main(["check", a, c, "--level", "0", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == "undecided"
    assert main(["check", a, a, *data]) == 0
    assert "merge: " in capsys.readouterr().out
    assert main(["check", a, b, *data]) == 1
    assert "align: " in capsys.readouterr().out
    assert main(["check", a, c, *data, "--format", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["answer"] == "do not merge" and found["level"] == 2
    assert [set(row) for row in found["criteria"]] == [{"quantity", "value", "limit", "holds"}] * len(found["criteria"])
    assert found["layers"][-1]["layer"] == "logits" and found["outputs"]["predictions"] > 0
    assert main(["check", a, c, *data]) == 1
    out = capsys.readouterr().out
    assert "what decides" in out and "tensors farthest apart" in out and "layers at the midpoint" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--level", "2"], "--task and --dataset"),
        (["--level", "1", "--task", "text-generation", "--dataset", "x.txt"], "data have no meaning at level 1"),
        (["--metric", "accuracy"], "--metric: has no meaning for check"),
        (["--level", "3"], "invalid choice"),
    ],
)
def test_nothing_that_was_asked_for_is_ignored(tmp_path, capsys, words, expected):
    a = str(saved(byte_llama(0), tmp_path / "a"))
    with pytest.raises(SystemExit) if "3" in words else pytest.MonkeyPatch.context():
        assert main(["check", a, a, *words]) == 2
    assert expected in capsys.readouterr().err


def test_progress_is_told(trunk, data):
    told = []
    hf_llfc.check(trunk, trained(2), data=data, progress=lambda what, done, total: told.append((what, done, total)))
    assert ("running both models and their midpoint", 2, 2) in told and told[0][0] == "comparing weights"
    silent("", 0, 1)


def with_rows(model, order):
    """A copy whose head lists its classes in another order."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.classifier.weight.copy_(model.classifier.weight[order])
        copied.classifier.bias.copy_(model.classifier.bias[order])
    return copied


def negated(model):
    """A copy that answers the opposite."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.classifier.weight.neg_()
        copied.classifier.bias.neg_()
    return copied


def test_parents_that_contradict_each_other_have_an_answer_of_their_own(trunk, data, tmp_path, capsys):
    child = trained(1, start=trunk, steps=20)
    assert hf_llfc.check(trunk, child, data=data).contradiction is None
    found = hf_llfc.check(trunk, with_rows(child, [1, 2, 3, 0]), data=data)
    assert (found.answer, found.level, found.criteria) == ("contradict", 2, ())
    assert not found
    assert found.contradiction.order == (3, 0, 1, 2)
    assert (
        found.contradiction.agreement < 0.1 < 0.2 < found.contradiction.chance < 0.3 < 0.9 < found.contradiction.matched
    )
    opposed = hf_llfc.check(trunk, negated(child), data=data)
    assert opposed.answer == "contradict"
    assert opposed.contradiction.order == ()
    assert "answers the opposite" in opposed.because


def test_the_command_says_that_parents_contradict_each_other(trunk, tmp_path, capsys):
    a, b = saved(trunk, tmp_path / "a"), saved(with_rows(trunk, [1, 0, 2, 3]), tmp_path / "b")
    rows = Dataset.from_dict({"image": list(image_rows(200, seed=1)[0])})
    rows.to_parquet(tmp_path / "rows.parquet")
    words = ["--task", "image-classification", "--dataset", str(tmp_path / "rows.parquet")]
    # Two of four classes are exchanged: half of the answers agree, and matching finds the order all the same.
    assert main(["check", str(a), str(b), *words]) == 1
    assert "contradict: model 1 and model 2 contradict each other" in capsys.readouterr().out


def test_weights_alone_do_not_merge_heads_that_differ_more_than_bodies(tmp_path):
    torch.manual_seed(0)
    model = trained(0, steps=10)
    folders = [tmp_path / name for name in ("a", "same", "reordered")]
    model.save_pretrained(folders[0])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folders[1])
        model.classifier.weight.copy_(model.classifier.weight.roll(1, 0))
        model.classifier.bias.copy_(model.classifier.bias.roll(1, 0))
        model.save_pretrained(folders[2])
    assert hf_llfc.check(folders[0], folders[1]).answer == "merge"
    found = hf_llfc.check(folders[0], folders[2])
    assert found.answer == "undecided" and "the heads lie" in found.because
