"""The plots show the numbers of the report, and are legible whatever the report holds."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_llfc.errors import PublishingError
from hf_llfc.publishing.plots import (
    PLOTS,
    plot_additivity,
    plot_commutativity,
    plot_heatmap,
    plot_layers,
    plot_path,
    plot_stitching,
    plot_weight_geometry,
    save_plots,
)
from hf_llfc.publishing.plots.canvas import GROUND
from hf_llfc.publishing.plots.layer_axis import layer_panels, short_layer_names
from hf_llfc.publishing.reading import read_report
from tests.publishing.samples import BERT_MAPS, as_report, layer, make_measured_report, make_report, make_simplex_report


def lines_of(axis) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()}


def texts_of(figure) -> str:
    figure.canvas.draw()
    return " ".join(text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text")))


def test_the_path_plot_shows_loss_and_metric_against_the_line_between_the_parents() -> None:
    report = make_report()
    figure = plot_path(as_report(report))
    loss, accuracy = (lines_of(axis) for axis in figure.axes)
    alphas = [point["alpha"] for point in report["path"]]
    assert loss["measured on the path"] == (alphas, [point["loss"] for point in report["path"]])
    assert accuracy["measured on the path"][1] == [point["metrics"]["accuracy"] for point in report["path"]]
    assert loss["straight line between the parents"][1] == pytest.approx([0.5 - 0.25 * alpha for alpha in alphas])
    assert loss["this merge"] == ([0.5], [0.5])
    assert accuracy["this merge"] == ([0.5], [0.75])
    text = texts_of(figure)
    assert "barrier 0.125" in text
    assert "barrier 6.25 points" in text
    assert "α, weight of the first model" in text
    assert "loss (nats)" in text
    assert "bert-tweets" in text and "bert-films" in text


def test_a_better_path_has_no_barrier() -> None:
    path = [{"alpha": a, "loss": 1 - a * (1 - a), "metrics": {"accuracy": 0.5 + a * (1 - a)}} for a in (0, 0.5, 1)]
    assert "barrier" not in texts_of(plot_path(as_report(make_report(path=path))))


def test_a_metric_of_which_less_is_better_has_its_barrier_above_the_line() -> None:
    path = [{"alpha": a, "loss": 1.0, "metrics": {"perplexity": 10 + 8 * a * (1 - a)}} for a in (0, 0.5, 1)]
    text = texts_of(plot_path(as_report(make_report(path=path))))
    assert "barrier 2" in text
    assert "Perplexity along the path" in text


def test_a_metric_that_is_not_known_is_drawn_without_a_judgement() -> None:
    path = [{"alpha": a, "loss": None, "metrics": {"my_score": a * (1 - a)}} for a in (0, 0.5, 1)]
    figure = plot_path(as_report(make_report(path=path, barrier={"loss": None, "error": None})))
    assert len(figure.axes) == 1
    assert "barrier" not in texts_of(figure)


def test_values_that_are_missing_leave_gaps() -> None:
    path = [{"alpha": a, "loss": None if a == 0.5 else 1.0, "metrics": {}} for a in (0, 0.5, 1)]
    figure = plot_path(as_report(make_report(path=path)))
    values = lines_of(figure.axes[0])["measured on the path"][1]
    assert math.isnan(values[1])
    assert "this merge" not in lines_of(figure.axes[0])


def test_the_layer_plot_shows_every_layer_at_the_alpha_of_the_merge() -> None:
    report = make_report()
    figure = plot_layers(as_report(report))
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
    assert "equal" in texts_of(plot_layers(as_report(make_report(layers=rows))))


def test_an_undefined_coefficient_can_be_drawn() -> None:
    rows = [
        layer("a", 0.5, 0.1, 0.2, 1.0),
        {**layer("b", 0.5, 0.1, 0.2, 1.0), "coefficient": {"mean": None, "std": None}},
    ]
    assert plot_layers(as_report(make_report(layers=rows))) is not None


@pytest.mark.parametrize("count", [1, 2, 33, 34, 35, 81, 300])
def test_labels_of_many_layers_do_not_overlap(count: int) -> None:
    rows = [layer(f"model.layers.{i}", 0.5, 0.001, 0.01, 0.99) for i in range(count - 1)]
    rows.append(layer("lm_head", 0.5, 0.01, 0.1, 0.9))
    figure = plot_layers(as_report(make_report(layers=rows)))
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
    long = make_report(models=models, layers=rows)
    for number, report in enumerate((long, make_measured_report(), make_simplex_report(8))):
        edges_are_empty(save_plots(as_report(report), tmp_path / str(number)), ground)


def edges_are_empty(pictures: dict[str, Path], ground: np.ndarray) -> None:
    for path in pictures.values():
        pixels = np.asarray(Image.open(path).convert("RGB"))
        edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert np.abs(edges.astype(int) - ground).max() < 30, path.name


def test_pictures_are_opaque_wide_enough_and_the_same_every_time(tmp_path: Path) -> None:
    first = save_plots(as_report(make_measured_report(3)), tmp_path / "first")
    again = save_plots(as_report(make_measured_report(3)), tmp_path / "again")
    assert list(first) == list(PLOTS)
    for key, path in first.items():
        image = Image.open(path)
        assert image.width == 1600
        assert image.mode in ("RGB", "P") or np.asarray(image)[..., 3].min() == 255
        assert path.read_bytes() == again[key].read_bytes()


def test_only_what_was_measured_is_drawn(tmp_path: Path) -> None:
    unlabelled = [{"alpha": a, "loss": None, "metrics": {}} for a in (0, 0.5, 1)]
    assert list(save_plots(as_report(make_report(path=unlabelled)), tmp_path / "a")) == ["layers", "heatmap"]
    assert list(save_plots(as_report(make_report(layers=[])), tmp_path / "b")) == ["path"]
    assert save_plots(as_report(make_report(layers=[], path=[])), tmp_path / "c") == {}


def test_something_else_than_a_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"schema": "other/1"}')
    with pytest.raises(PublishingError, match="schema"):
        read_report(tmp_path / "report.json")


def test_names_are_shortened_only_where_they_stay_distinct() -> None:
    assert short_layer_names(["a.b.0", "a.b.1", "a.c"]) == ["0", "1", "c"]
    assert short_layer_names(["a.x.0", "b.x.0"]) == ["a.x.0", "b.x.0"]
    assert short_layer_names(["logits"]) == ["logits"]
    assert short_layer_names(["h.0.mlp.act", "h.1.mlp.act", "lm_head"]) == ["0", "1", "lm_head"]
    assert short_layer_names(["h.0.mlp.act", "h.1.mlp.gate"]) == ["0.mlp.act", "1.mlp.gate"]
    assert short_layer_names(["bert.encoder.layer.0", "logits"]) == ["bert.encoder.layer.0", "logits"]


def test_a_name_is_never_read_as_mathematics(tmp_path: Path) -> None:
    models = [
        {"id": r"me/$\frac{1}{$", "revision": None, "weight": 0.5},
        {"id": "a$b$", "revision": None, "weight": 0.5},
    ]
    rows = [layer(rf"$\frac{{$.{name}", 0.5, 0.01, 0.1, 0.9) for name in ("0", r"$\frac{$")]
    save_plots(as_report(make_report(models=models, layers=rows)), tmp_path)


def test_modules_that_recur_in_every_block_get_a_panel_each() -> None:
    names = [f"bert.encoder.layer.{block}.{part}" for block in range(3) for part in BERT_MAPS] + ["classifier"]
    panels = layer_panels(names)
    assert [panel.title for panel in panels] == [*BERT_MAPS, "others"]
    assert panels[1].labels == ("0", "1", "2")
    assert [names[index] for index in panels[1].indices] == [
        f"bert.encoder.layer.{block}.attention.self.key" for block in range(3)
    ]
    assert sorted(index for panel in panels for index in panel.indices) == list(range(len(names)))


def test_panels_of_two_stacks_are_told_apart() -> None:
    names = [f"{stack}.block.{block}.mlp.wo" for stack in ("encoder", "decoder") for block in range(2)]
    assert [panel.title for panel in layer_panels(names)] == ["encoder.block.mlp.wo", "decoder.block.mlp.wo"]


def test_blocks_share_one_axis() -> None:
    (panel,) = layer_panels(["embeddings", "encoder.layer.0", "encoder.layer.1", "logits"])
    assert panel.title == ""
    assert panel.indices == (0, 1, 2, 3)


def test_quantiles_and_intervals_are_drawn_where_they_were_measured() -> None:
    text = texts_of(plot_layers(as_report(make_measured_report(2))))
    assert "band: 5 to 95 % of samples; bars: 95 % interval of the mean" in text
    tokens = {**make_measured_report(2), "data": {"unit": "token"}}
    assert "line: mean over tokens; band: 5 to 95 % of tokens" in texts_of(plot_layers(as_report(tokens)))
    assert "band: × and ÷ (1 + std/mean)" in texts_of(plot_layers(as_report(make_report())))


def cells_of(axis) -> np.ndarray:
    (mesh,) = axis.collections
    return np.ma.filled(mesh.get_array(), np.nan)


def test_the_heat_map_has_every_layer_at_every_alpha_inside_the_path() -> None:
    report = make_measured_report(6)
    figure = plot_heatmap(as_report(report))
    rows = [[row for row in report["layers"] if row["alpha"] == step / 10] for step in range(1, 10)]
    assert cells_of(figure.axes[0]) == pytest.approx(np.array([[row["llfc"]["mean"] for row in each] for each in rows]))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][:2] == ["0.1", "0.2"]
    ratios = np.array([[row["llfc"]["mean"] / row["baseline"]["mean"] for row in each] for each in rows])
    found = cells_of(plot_heatmap(as_report(report), relative=True).axes[0])
    assert found == pytest.approx(np.clip(ratios, 1e-3, None))


def test_the_heat_map_of_a_ratio_has_its_middle_at_one() -> None:
    figure = plot_heatmap(as_report(make_measured_report(6)), relative=True)
    norm = figure.axes[0].collections[0].norm
    assert norm(1.0) == pytest.approx(0.5)


def test_a_heat_map_needs_two_points_and_survives_gaps_and_zeros() -> None:
    one = [layer(f"h.{i}", 0.5, 0.1, 0.2, 1.0) for i in range(3)]
    assert plot_heatmap(as_report(make_report(layers=one))) is None
    rows = [layer("h.0", 0.5, 0.0, 0.2, 1.0), layer("h.1", 0.25, 0.1, 0.2, 1.0), layer("h.1", 0.5, 0.1, 0.2, 1.0)]
    figure = plot_heatmap(as_report(make_report(layers=rows)))
    assert np.isnan(cells_of(figure.axes[0])).tolist() == [[True, False], [False, False]]
    assert " 0 " in texts_of(figure) and "–" in texts_of(figure)
    equal = [layer("h.0", alpha, 0.0, 0.0, 1.0) for alpha in (0.25, 0.5)]
    assert plot_heatmap(as_report(make_report(layers=equal))) is None


def test_points_of_a_simplex_are_rows_by_name_with_the_blend_and_the_barrier() -> None:
    report = make_simplex_report(3)
    figure = plot_path(as_report(report))
    loss = lines_of(figure.axes[0])
    points = report["path"]
    assert loss["model"] == ([point["loss"] for point in points[:3]], [0, 1, 2])
    assert loss["merged"] == ([point["loss"] for point in points[3:]], [3, 4, 5, 6])
    own = [point["loss"] for point in points[:3]]
    blends = [np.dot(point["weights"], own) for point in points[3:]]
    assert loss["blend of the models' values"][0] == pytest.approx(blends)
    assert loss["this merge"] == ([points[6]["loss"]], [6])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[0] == "model 1: bert-1" and labels[3:] == [point["name"] for point in points[3:]]
    worst = max(point["loss"] - blend for point, blend in zip(points[3:], blends, strict=True))
    assert f"barrier {worst:.3g}" in texts_of(figure)


def test_outside_the_models_there_is_no_blend_of_their_values() -> None:
    figure = plot_path(as_report(make_simplex_report(3, "arithmetic")))
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    blends = lines_of(figure.axes[0])["blend of the models' values"]
    assert [names[place] for place in blends[1]] == ["0.5 × task vectors"]


def test_layers_of_a_simplex_are_shown_at_the_merge() -> None:
    report = make_simplex_report(3)
    figure = plot_layers(as_report(report))
    assert "centre" in figure.axes[0].get_title(loc="left")
    centre = [row for row in report["layers"] if row["weights"] == report["path"][-1]["weights"]]
    found = lines_of(figure.axes[0])["1 − cos(merged, blend): 0 is linear (LLFC)"][1]
    assert found == [row["llfc"]["mean"] for row in centre]
    heat = plot_heatmap(as_report(report)).axes[0]
    assert [label.get_text() for label in heat.get_yticklabels()] == [
        "centre", "models 2 and 3", "models 1 and 3", "models 1 and 2"
    ]  # fmt: skip


def test_additivity_and_commutativity_show_every_row() -> None:
    report = make_measured_report(3)
    (axis,) = plot_additivity(as_report(report)).axes
    lines = lines_of(axis)
    assert lines["1 − cos(σ(blend), blend of σ): 0 is additive"][1] == [
        row["distance"]["mean"] for row in report["additivity"]
    ]
    axes = plot_commutativity(as_report(report)).axes
    keys = [row for row in report["commutativity"] if row["layer"].endswith("self.key")]
    found = lines_of(axes[1])
    for label, name in (("Dist$_{com}$: 0 is commutative", "com"), ("Dist$_W$: weights of A and B", "weights"),
                        ("Dist$_H$: their inputs", "features")):  # fmt: skip
        assert found[label][1] == [row[name] for row in keys]


def test_a_distance_that_is_not_defined_leaves_a_gap() -> None:
    rows = [{"layer": f"h.{i}", "com": None if i else 0.1, "weights": 0.2, "features": 0.3} for i in range(2)]
    (axis,) = plot_commutativity(as_report(make_measured_report(commutativity=rows))).axes
    assert math.isnan(lines_of(axis)["Dist$_{com}$: 0 is commutative"][1][1])


def test_gated_units_are_named() -> None:
    rows = [{**row, "gated": True} for row in make_measured_report(2)["additivity"]]
    assert "gated units" in texts_of(plot_additivity(as_report(make_measured_report(additivity=rows))))


def test_stitching_stands_between_its_parents() -> None:
    report = make_measured_report(3)
    loss, accuracy = plot_stitching(as_report(report)).axes
    assert lines_of(loss)["stitched"][1] == [point["loss"] for point in report["stitching"]]
    assert lines_of(loss)["A alone: bert-tweets"][1] == [0.25, 0.25]
    assert lines_of(accuracy)["B alone: bert-films"][1] == [0.75, 0.75]


def test_geometry_has_ranks_and_angles() -> None:
    report = make_measured_report(3)
    rows = [row for row in report["geometry"] if row["of"] == "weights" and row["layer"].endswith("self.query")]
    ranks, angles = plot_weight_geometry(as_report(report)).axes[:2]
    assert lines_of(ranks)["rank of A"][1] == [row["rank_a"] for row in rows]
    assert lines_of(angles)["median, what the map writes"][1] == [row["angles"][1] for row in rows]
    assert lines_of(angles)["median, what the map reads"][1] == [2 * row["angles"][1] for row in rows]
    shares = lines_of(plot_weight_geometry(as_report(report)).axes[2])
    assert [list(values) for _, values in shares.values()] != []
    bare = [{**row, "angles": [], "rank_one_a": None, "rank_one_b": None} for row in rows]
    assert len(plot_weight_geometry(as_report(make_measured_report(geometry=bare))).axes) == 1


def test_layers_that_occur_once_are_not_joined_by_a_line() -> None:
    axes = plot_commutativity(as_report(make_measured_report(3))).axes
    styles = [{line.get_linestyle() for line in axis.get_lines()} for axis in (axes[0], axes[-1])]
    assert styles == [{"-", "--", "-."}, {"None"}]


def test_angles_that_are_zero_stand_at_the_foot_of_their_axis() -> None:
    rows = [{**row, "angles": [0.0, 0.0]} for row in make_measured_report(2)["geometry"]]
    axis = plot_weight_geometry(as_report(make_measured_report(2, geometry=rows))).axes[1]
    assert axis.get_yscale() == "log"
    assert set(lines_of(axis)["median, what the map writes"][1]) == {0.01}
