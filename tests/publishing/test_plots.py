"""The plots show the numbers of the report, and are legible whatever the report holds."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_llfc.errors import PublishingError
from hf_llfc.publishing.facts import read_report
from hf_llfc.publishing.plots import GROUND, plot_layers, plot_path, save_plots, short_layer_names
from tests.publishing.samples import layer, make_report


def lines_of(axis) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()}


def texts_of(figure) -> str:
    figure.canvas.draw()
    return " ".join(text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text")))


def test_the_path_plot_shows_loss_and_metric_against_the_line_between_the_parents() -> None:
    report = make_report()
    figure = plot_path(read_report(report))
    loss, accuracy = (lines_of(axis) for axis in figure.axes)
    alphas = [point["alpha"] for point in report["path"]]
    assert loss["measured on the path"] == (alphas, [point["loss"] for point in report["path"]])
    assert accuracy["measured on the path"][1] == [point["metrics"]["accuracy"] for point in report["path"]]
    assert loss["straight line between the parents"][1] == pytest.approx([0.5 - 0.25 * alpha for alpha in alphas])
    assert loss["this merge"] == ([0.5], [0.5])
    assert accuracy["this merge"] == ([0.5], [0.75])
    text = texts_of(figure)
    assert "barrier\n0.125" in text
    assert "barrier\n6.25 points" in text
    assert "α, weight of the first model" in text
    assert "loss (nats)" in text
    assert "bert-tweets" in text and "bert-films" in text


def test_a_better_path_has_no_barrier() -> None:
    path = [{"alpha": a, "loss": 1 - a * (1 - a), "metrics": {"accuracy": 0.5 + a * (1 - a)}} for a in (0, 0.5, 1)]
    assert "barrier" not in texts_of(plot_path(read_report(make_report(path=path))))


def test_a_metric_of_which_less_is_better_has_its_barrier_above_the_line() -> None:
    path = [{"alpha": a, "loss": 1.0, "metrics": {"perplexity": 10 + 8 * a * (1 - a)}} for a in (0, 0.5, 1)]
    text = texts_of(plot_path(read_report(make_report(path=path))))
    assert "barrier\n2" in text
    assert "Perplexity along the path" in text


def test_a_metric_that_is_not_known_is_drawn_without_a_judgement() -> None:
    path = [{"alpha": a, "loss": None, "metrics": {"my_score": a * (1 - a)}} for a in (0, 0.5, 1)]
    figure = plot_path(read_report(make_report(path=path, barrier={"loss": None, "error": None})))
    assert len(figure.axes) == 1
    assert "barrier" not in texts_of(figure)


def test_values_that_are_missing_leave_gaps() -> None:
    path = [{"alpha": a, "loss": None if a == 0.5 else 1.0, "metrics": {}} for a in (0, 0.5, 1)]
    figure = plot_path(read_report(make_report(path=path)))
    values = lines_of(figure.axes[0])["measured on the path"][1]
    assert math.isnan(values[1])
    assert "this merge" not in lines_of(figure.axes[0])


def test_the_layer_plot_shows_every_layer_at_the_alpha_of_the_merge() -> None:
    report = make_report()
    figure = plot_layers(read_report(report))
    distances, coefficients = figure.axes
    lines = lines_of(distances)
    shown = [row for row in report["layers"] if row["alpha"] == 0.5]
    # Equal features have no place on a logarithmic axis: a gap in the line and a mark at the bottom.
    assert lines["1 − cos(merged, blend): 0 is linear (LLFC)"][1][1:] == [row["llfc"]["mean"] for row in shown[1:]]
    assert lines["1 − cos(A, B): the parents apart"][1][1:] == [row["baseline"]["mean"] for row in shown[1:]]
    assert math.isnan(lines["1 − cos(A, B): the parents apart"][1][0])
    assert lines["equal (below $10^{-9}$)"][0] == [0]
    assert distances.get_yscale() == "log"
    means = [row["coefficient"]["mean"] for row in shown]
    assert any(list(line.get_ydata()) == means for line in coefficients.get_lines())
    assert [label.get_text() for label in coefficients.get_xticklabels()] == ["embeddings", "0", "1", "logits"]
    assert "α = 0.5" in distances.get_title(loc="left")


def test_identical_parents_can_be_drawn() -> None:
    rows = [layer(f"layer.{i}", 0.5, 0.0, 0.0, 1.0) for i in range(3)]
    assert "equal" in texts_of(plot_layers(read_report(make_report(layers=rows))))


def test_an_undefined_coefficient_can_be_drawn() -> None:
    rows = [
        layer("a", 0.5, 0.1, 0.2, 1.0),
        {**layer("b", 0.5, 0.1, 0.2, 1.0), "coefficient": {"mean": None, "std": None}},
    ]
    assert plot_layers(read_report(make_report(layers=rows))) is not None


@pytest.mark.parametrize("count", [1, 2, 33, 34, 35, 81, 300])
def test_labels_of_many_layers_do_not_overlap(count: int) -> None:
    rows = [layer(f"model.layers.{i}", 0.5, 0.001, 0.01, 0.99) for i in range(count - 1)]
    rows.append(layer("lm_head", 0.5, 0.01, 0.1, 0.9))
    figure = plot_layers(read_report(make_report(layers=rows)))
    figure.canvas.draw()
    axis = figure.axes[1]
    labels = [label for label in axis.get_xticklabels() if label.get_text()]
    assert labels[-1].get_text() == "lm_head"
    # Labels that stand upright may not touch; slanted ones need one line's height between their ends.
    slanted = labels[0].get_rotation() != 0
    renderer = figure.canvas.get_renderer()
    boxes = [label.get_window_extent(renderer) for label in labels]
    ends = [(box.x1 - 14, box.x1) if slanted else (box.x0, box.x1) for box in boxes]
    assert all(left[1] < right[0] + 1 for left, right in pairwise(ends))


def test_nothing_is_cut_off_at_the_edges(tmp_path: Path) -> None:
    models = [{"id": f"someone/{'a-very-long-name-' * 6}{i}", "revision": None, "weight": 0.5} for i in range(2)]
    rows = [layer(f"model.{'deep.' * 9}layers.{i}.{'x' * 30}", 0.5, 0.01, 0.1, 0.9) for i in range(12)]
    ground = np.array(Image.new("RGB", (1, 1), GROUND))[0, 0]
    for path in save_plots(make_report(models=models, layers=rows), tmp_path).values():
        pixels = np.asarray(Image.open(path).convert("RGB"))
        edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert np.abs(edges.astype(int) - ground).max() < 30, path.name


def test_pictures_are_opaque_wide_enough_and_the_same_every_time(tmp_path: Path) -> None:
    first = save_plots(make_report(), tmp_path / "first")
    again = save_plots(make_report(), tmp_path / "again")
    assert sorted(first) == ["layers", "path"]
    for key, path in first.items():
        image = Image.open(path)
        assert image.width == 1600
        assert image.mode == "RGB" or np.asarray(image)[..., 3].min() == 255
        assert path.read_bytes() == again[key].read_bytes()


def test_only_what_was_measured_is_drawn(tmp_path: Path) -> None:
    unlabelled = [{"alpha": a, "loss": None, "metrics": {}} for a in (0, 0.5, 1)]
    assert list(save_plots(make_report(path=unlabelled), tmp_path / "a")) == ["layers"]
    assert list(save_plots(make_report(layers=[]), tmp_path / "b")) == ["path"]
    assert save_plots(make_report(layers=[], path=[]), tmp_path / "c") == {}


def test_something_else_than_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PublishingError, match="schema"):
        save_plots({"schema": "other/1"}, tmp_path)


def test_names_are_shortened_only_where_they_stay_distinct() -> None:
    assert short_layer_names(["a.b.0", "a.b.1", "a.c"]) == ["0", "1", "c"]
    assert short_layer_names(["a.x.0", "b.x.0"]) == ["a.x.0", "b.x.0"]
    assert short_layer_names(["logits"]) == ["logits"]
    assert short_layer_names(["bert.encoder.layer.0", "logits"]) == ["bert.encoder.layer.0", "logits"]


def test_a_name_is_never_read_as_mathematics(tmp_path: Path) -> None:
    models = [
        {"id": r"me/$\frac{1}{$", "revision": None, "weight": 0.5},
        {"id": "a$b$", "revision": None, "weight": 0.5},
    ]
    rows = [layer(rf"$\frac{{$.{name}", 0.5, 0.01, 0.1, 0.9) for name in ("0", r"$\frac{$")]
    save_plots(make_report(models=models, layers=rows), tmp_path)
