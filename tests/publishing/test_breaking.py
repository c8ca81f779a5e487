"""Where a merge breaks, in words: which blocks are named, and what the table of samples shows."""

import pytest

from hf_llfc.publishing.breaking import breaking_sentence, samples_table
from hf_llfc.publishing.page import render_page
from tests.publishing.samples import as_report, make_measured_report, make_report, make_simplex_report

NUMBERS = {"alone": 0.0, "angle": None, "distance": 1.0, "drift": None, "local": None}


def report_of(steps, without=None):
    names = ["before the blocks", *(f"vit.layers.{index}" for index in range(len(steps) - 2)), "after the blocks"]
    left = without or [sum(steps)] * len(steps)
    rows = [{"block": n, "step": s, "without": w, **NUMBERS} for n, s, w in zip(names, steps, left, strict=True)]
    return as_report(make_report(blocks=rows))


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([0, 0.02, 0.3, 0.5, 0.1, 0.08], "vit.layers.1 to 2 carry 80 % of the barrier of 1.000 nats."),
        ([0.0, 0.01, 0.02, 0.9, 0.07, 0.0], "vit.layers.2 carries 90 % of the barrier of 1.000 nats."),
        ([0.9, 0.2, 0.1, -0.2, 0, 0], "what runs up to vit.layers.0 carries 92 % of the barrier of 1.000 nats."),
        ([0.9, 0.1, 0, 0, 0, 0], "what runs before the blocks carries 90 % of the barrier of 1.000 nats."),
        ([0, 0, 0, 0, 0.1, 0.9], "what runs after the blocks carries 90 % of the barrier of 1.000 nats."),
        (
            [0.004, 0, 0, 0, 0, -0.01],
            "No block stands out: the merge loses 0.006 nats less than its models.",
        ),
    ],
)
def test_the_shortest_run_of_blocks_is_named(steps, words):
    assert breaking_sentence(report_of(steps)) == words


def test_a_block_is_named_whose_leaving_out_helps_most():
    text = breaking_sentence(report_of([0, 0.02, 0.3, 0.5, 0.1, 0.08], [1, 1, 0.9, 0.25, 1, 1]))
    assert text.endswith("; with vit.layers.2 left out of the merge, 0.250 nats of it are left.")


def test_nothing_is_said_without_a_loss():
    assert breaking_sentence(as_report(make_report())) is None


def test_samples_have_the_answers_of_all_models():
    table = samples_table(as_report(make_measured_report(2)))
    assert table.records[0] == {
        "sample": "17", "label": "positive", "answer of A": "positive", "answer of B": "positive",
        "answer of merge": "negative", "loss of A": "0.2500", "loss of B": "0.5000", "loss of merge": "2.5000",
        "share of the barrier": "12.5 %",
    }  # fmt: skip
    assert table.note == "Together they carry 38 % of the barrier."


def test_texts_have_tokens_in_place_of_answers():
    row = {"sample": 3, "label": None, "predictions": 127, "loss": 2.5, "losses": [2.0, 2.0, 2.25]}
    table = samples_table(as_report(make_simplex_report(3, samples=[row])))
    assert table.records[0] == {
        "sample": "3", "tokens": "127", "loss of model 1": "2.0000", "loss of model 2": "2.0000",
        "loss of model 3": "2.2500", "loss of merge": "2.5000", "share of the barrier": "–",
    }  # fmt: skip


def test_the_page_shows_both():
    page = render_page(as_report(make_measured_report(2)))
    assert "Where it breaks" in page and "Samples that carry the barrier" in page
    assert "carry" in page and "38 % of the barrier" in page
