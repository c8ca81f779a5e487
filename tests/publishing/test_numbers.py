"""A number reads the same wherever it stands, whatever noise its last bits hold."""

import json
import math
import re

import pytest

from hf_llfc.foundation.numbers import rounded
from hf_llfc.publishing.card.templates import template_folder
from hf_llfc.publishing.numbers import ERROR, LOSS, cell_text, distance_text, height_text, metric_style, value_text
from hf_llfc.publishing.page import render_page
from tests.publishing.samples import as_report


@pytest.mark.parametrize("value", [47.525, 100 * 0.47525, math.nextafter(47.525, 0), math.nextafter(47.525, 99)])
def test_noise_does_not_decide_how_half_is_rounded(value: float) -> None:
    assert rounded(value, 2) == "47.53"
    assert rounded(-value, 2) == "-47.53"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (rounded(-1e-12, 3), "0.000"),
        (height_text(0.47525, ERROR), "47.53 points"),
        (height_text(1.5816, LOSS), "1.582 nats"),
        (height_text(2.0, metric_style("perplexity")), "2"),
        (value_text(0.8241, metric_style("accuracy")), "82.41 %"),
        (value_text(12.345, LOSS), "12.35"),
        (value_text(None, LOSS), "–"),
        (value_text(math.inf, LOSS), "not finite"),
        (distance_text(0.0), "0"),
        (distance_text(2e-4), "2.0e-04"),
        (distance_text(0.5), "0.500"),
        (distance_text(0.1, 2), "0.10"),
        (distance_text(1234.4), "1234"),
        (cell_text(1e-10), "0"),
        (cell_text(6e-6), "6e-6"),
    ],
)
def test_every_kind_of_number_has_one_form(text: str, shown: str) -> None:
    assert text == shown


def test_the_barrier_is_one_number_on_a_page() -> None:
    """Verdict, figure, chart and its description once told of 47.53 and of 47.52 points."""
    folder = template_folder() / "examples" / "fashion_vit_independent" / "llfc"
    page = render_page(as_report(json.loads((folder / "llfc_report.json").read_text())))
    assert set(re.findall(r"(47\.5\d) points", page)) == {"47.53"}
    assert page.count("47.53 points") == 4
