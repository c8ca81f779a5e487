"""What depth does to classes and answers, in words, tables and pictures."""

import math

import pytest

from hf_llfc.publishing.depth import (
    classes_sentence,
    classes_table,
    compression_slopes,
    settling_depths,
    settling_sentence,
    settling_table,
)
from hf_llfc.publishing.page import render_page
from hf_llfc.publishing.plots import plot_classes, plot_settling
from tests.publishing.samples import as_report, make_measured_report, make_report, make_simplex_report
from tests.publishing.test_plots import lines_of

LAYERS = ("h.0", "h.1", "h.2", "logits")


def class_rows(merge, least=None, *, models=(0.9, 0.95, 0.98, 0.96), directions=(0.1, 0.2)):
    """Two models that tell classes apart, and a merge."""
    rows = []
    for place, layer in enumerate(LAYERS):
        for of in ("model 1", "model 2", "blend", "merge"):
            mean = merge[place] if of == "merge" else models[place]
            worst = least[place] if least is not None and of == "merge" else mean
            turned = {"model 1": (0.0, 0.3), "model 2": (0.3, 0.0)}.get(of, directions)
            rows.append(
                {
                    "layer": layer,
                    "of": of,
                    "compression": 4.0 / 2**place,
                    "discrimination": 0.1,
                    "separability": mean,
                    "least": None if mean is None else worst,
                    "pair": [] if mean is None else ["cat", "dog"],
                    "directions": list(turned),
                }
            )
    return rows


def report_of(**parts):
    return as_report(make_report(**parts))


@pytest.mark.parametrize(
    ("merge", "least", "words"),
    [
        (
            (0.9, 0.94, 0.97, 0.95),
            None,
            "The merge tells classes apart in every layer as its models do: separability in logits is 0.950, and 0.960 "
            "in A, 0.960 in B.",
        ),
        (
            (0.9, 0.7, 0.9, 0.8),
            None,
            "From h.1 on the merge tells classes apart worse than each of its models: separability there is 0.700, and "
            "0.950 in A, 0.950 in B.",
        ),
        (  # what comes back is not lost
            (0.5, 0.94, 0.97, 0.95),
            None,
            "The merge tells classes apart in every layer as its models do: separability in logits is 0.950, and 0.960 "
            "in A, 0.960 in B.",
        ),
        (
            (0.9, 0.94, 0.97, 0.95),
            (0.9, 0.94, 0.6, 0.55),
            "From h.2 on the merge tells some classes apart worse than each of its models: separability of the worst "
            "pair (cat and dog) is 0.600, and 0.980 in A, 0.980 in B.",
        ),
        ((None,) * 4, None, "There are too few samples to say how well the merge tells classes apart."),
    ],
)
def test_the_layer_is_named_from_which_on_classes_are_lost(merge, least, words):
    assert classes_sentence(report_of(classes=class_rows(merge, least))) == words


def test_models_that_know_nothing_lose_nothing():
    rows = class_rows((0.01,) * 4, models=(0.1,) * 4)
    assert classes_sentence(report_of(classes=rows)).startswith("The merge tells classes apart in every layer as its")


def test_class_means_that_point_elsewhere_are_told():
    rows = class_rows((0.9, 0.94, 0.97, 0.95), directions=(0.7, 0.8))
    expected = (
        "; in logits the means of its classes point elsewhere, 0.70 from the nearest model where the models are 0.30 "
        "from each other."
    )
    assert classes_sentence(report_of(classes=rows)).endswith(expected)


def test_the_slope_of_compression_leaves_the_logits_out():
    rows = class_rows((0.9, 0.94, 0.97, 0.95))
    for row in rows:
        row["compression"] = 1e9 if row["layer"] == "logits" else row["compression"]
    slopes = compression_slopes(report_of(classes=rows))
    assert list(slopes) == ["model 1", "model 2", "blend", "merge"]
    assert slopes["merge"] == pytest.approx(-math.log(2))
    few = [row for row in rows if row["layer"] in ("h.0", "logits")]
    assert compression_slopes(report_of(classes=few)) == {}
    note = classes_table(report_of(classes=rows)).note
    assert note.endswith("compression changes by -0.69 in A, -0.69 in B, -0.69 in blend, -0.69 in merge.")


def settled(depths, blocks=4):
    """Rows of models whose answers all settle after these blocks."""
    return [
        {"layer": f"h.{place}", "of": of, "answer": float(place + 1 >= depth), "close": float(place + 1 >= depth)}
        for place in range(blocks)
        for of, depth in zip(("model 1", "model 2", "merge"), depths, strict=True)
    ]


@pytest.mark.parametrize(
    ("depths", "word"),
    [((2, 3, 4), "later than"), ((3, 4, 2), "earlier than"), ((2, 3, 3), "where"), ((2, 4, 3), "where")],
)
def test_the_merge_decides_before_or_after_its_models(depths, word):
    report = report_of(settling=settled(depths))
    assert settling_depths(report) == dict(zip(("model 1", "model 2", "merge"), depths, strict=True))
    a, b, merge = (f"{depth}.0" for depth in depths)
    expected = f"of 4 blocks its answers are settled after {merge} in the mean, and after {a} in A, {b} in B."
    says = settling_sentence(report)
    assert says.startswith(f"The merge decides {word} its models") and says.endswith(expected)


def test_nothing_is_said_or_drawn_of_what_was_not_measured():
    report = report_of()
    assert classes_sentence(report) is settling_sentence(report) is None
    assert plot_classes(report) is plot_settling(report) is None
    assert not classes_table(report).rows and not settling_table(report).rows


def test_pictures_have_a_line_for_each_model_the_blend_and_the_merge():
    values = make_measured_report(3)
    report = as_report(values)
    compression, discrimination, separability, worst, means = plot_classes(report).axes
    merge = [row for row in values["classes"] if row["of"] == "merge"]
    assert lines_of(compression)["merge"][1] == [row["compression"] for row in merge]
    assert lines_of(discrimination)["A"][1] == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert lines_of(separability)["merge"][1] == pytest.approx(
        [row["separability"] / (1 - row["separability"]) for row in merge]
    )
    assert set(lines_of(worst)) == {"A", "B", "blend", "merge"}
    assert lines_of(means)["merge from A"][1] == [0.3] * 4
    assert lines_of(means)["A from B"][1] == [0.0] * 4
    answers, close = plot_settling(report).axes
    assert lines_of(answers)["B"][1] == pytest.approx([100 * 0.75 / 2.75, 100 * 1.75 / 2.75, 100])
    assert lines_of(close)["merge"][1] == pytest.approx([100 / 3, 200 / 3, 100])


def test_values_without_spread_or_samples_are_drawn():
    rows = class_rows((None,) * 4, models=(None,) * 4)
    for row in rows:
        row["compression"] = row["discrimination"] = None
    assert len(plot_classes(report_of(classes=rows)).axes) == 3
    assert len(plot_classes(report_of(classes=class_rows((1.0, 0.0, 1.0, 0.0)))).axes) == 5


def test_more_models_have_names_of_their_own():
    names = ("model 1", "model 2", "model 3", "blend", "merge")
    rows = [
        {"layer": layer, "of": of, "compression": 1.0, "discrimination": 0.5, "separability": 0.9, "least": 0.8,
         "pair": ["a", "b"], "directions": [0.1, 0.2, 0.3]}
        for layer in LAYERS
        for of in names
    ]  # fmt: skip
    report = as_report(make_simplex_report(3, classes=rows))
    assert [row[1] for row in classes_table(report).rows[:5]] == list(names)
    assert set(lines_of(plot_classes(report).axes[0])) == set(names)
    assert "0.900 in model 3" in classes_sentence(report)


def test_the_page_has_both_tables_with_their_sentences():
    page = render_page(as_report(make_measured_report(3)))
    assert "The merge tells classes apart in every layer as its models do" in page
    assert "The merge decides" in page
