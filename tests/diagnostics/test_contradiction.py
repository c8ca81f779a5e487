"""Classifiers that contradict each other are told from those that differ, are damaged, or know other classes."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

import hf_llfc
from hf_llfc.diagnostics import diagnose_models
from hf_llfc.diagnostics.contradiction import contradiction_of
from hf_llfc.diagnostics.points import arithmetic, line, simplex
from hf_llfc.diagnostics.rows import OutputAgreement
from hf_llfc.evaluation import load_evaluation_data
from hf_llfc.evaluation.class_order import ChoicePairs
from tests.diagnostics.test_chance import images
from tests.diagnostics.test_outputs import bert, bert_data
from tests.pipeline.test_mergeability import negated, trained, with_rows


def pairs_of(first: np.ndarray, second: np.ndarray) -> ChoicePairs:
    pairs, other = ChoicePairs(), ChoicePairs()
    for part, of_part in ((slice(0, 50), pairs), (slice(50, None), other)):
        of_part.add(*(torch.from_numpy(each[part]) for each in (first, second)), torch.arange(len(first))[part])
    pairs.merge(other)
    return pairs


def agreement(gain: float, divergence: float = 0.01) -> OutputAgreement:
    """Of a merge whose ensemble gains so much."""
    numbers = dict.fromkeys((entry.name for entry in fields(OutputAgreement)), 0.0)
    return OutputAgreement(**{**numbers, "merged_divergence": divergence, "loss_barrier": divergence - gain})


def answers(classes: int, right: float, seed: int = 0, count: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Choices of two models, the second of which answers as the first in a share of the samples, else at random."""
    generator = np.random.default_rng(seed)
    first, noise = generator.integers(classes, size=(2, count))
    return first, np.where(generator.random(count) < right, first, noise)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_a_planted_order_is_found(classes: int) -> None:
    first, second = answers(classes, 0.95)
    order = np.roll(np.arange(classes), 1)
    found = contradiction_of(pairs_of(first, order[second]), 2, classes, None)
    assert found is not None
    assert found.model == 2
    assert found.order == tuple(order)
    assert found.matched > 0.9 > 0.2 > found.agreement
    assert "model 1 and model 3 contradict" in found.because


def test_two_exchanged_classes_of_ten_are_enough() -> None:
    first, second = answers(10, 0.98, count=256)
    order = np.array([1, 0, *range(2, 10)])
    found = contradiction_of(pairs_of(first, order[second]), 1, 10, None)
    assert found is not None
    assert found.order == tuple(order)


@pytest.mark.parametrize("right", [0.0, 0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_models_that_differ_do_not_contradict(classes: int, right: float) -> None:
    """Of 1000 classes 128 samples fit some order always, and that on the other half never."""
    assert contradiction_of(pairs_of(*answers(classes, right)), 1, classes, agreement(3.0)) is None


def test_an_order_of_many_classes_is_not_guessed_from_few_samples() -> None:
    first, second = answers(1000, 1.0)
    assert contradiction_of(pairs_of(first, (second + 1) % 1000), 1, 1000, agreement(0.1)) is None


def test_who_answers_the_opposite_contradicts_if_it_is_sure() -> None:
    first, _ = answers(10, 1.0)
    noise = np.random.default_rng(1).integers(1, 10, size=128)
    pairs = pairs_of(first, (first + noise) % 10)
    assert contradiction_of(pairs, 1, 10, agreement(0.5)) is None
    found = contradiction_of(pairs, 1, 10, agreement(1.5))
    assert found is not None
    assert found.order == ()
    assert "answers the opposite" in found.because
    assert contradiction_of(pairs, 1, 10, agreement(1.5, divergence=0.5)) is None, "a broken model"


@pytest.mark.parametrize("labels", [True, False])
def test_a_diagnosis_names_them(labels: bool) -> None:
    trunk = trained(0)
    child = trained(1, start=trunk, steps=20)
    data = load_evaluation_data(images(labels=labels), None, trunk.config)
    other = with_rows(child, [1, 2, 3, 0])
    report = diagnose_models([trunk, other], data, region=line([0.5]))
    assert report.verdict.answer == "contradict"
    assert report.contradiction.order == (3, 0, 1, 2)
    assert hf_llfc.ConnectivityReport.from_dict(report.to_dict()) == report
    assert diagnose_models([trunk, negated(child)], data, region=line([0.5])).verdict.answer == "contradict"
    assert diagnose_models([trunk, child], data, region=line([0.5])).contradiction is None
    assert diagnose_models([trunk, child, other], data, region=simplex([1, 1, 1])).contradiction.model == 2
    assert diagnose_models([trunk, child, other], data, region=arithmetic([0.5, 0.5])).contradiction is None


def test_models_without_classes_have_none_in_another_order() -> None:
    head = bert(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification")
    assert diagnose_models([head, head], bert_data(head.config), region=line([0.5])).contradiction is None
