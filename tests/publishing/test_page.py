"""The interactive report says what the report says, to everybody, and runs nothing that a stranger wrote."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hf_llfc.diagnostics import ConnectivityReport
from hf_llfc.errors import PublishingError
from hf_llfc.foundation.layout import PAGE_FILE
from hf_llfc.publishing import page as pages
from hf_llfc.publishing import write_card
from hf_llfc.publishing.page.summary import meaning
from tests.publishing.samples import (
    MODELS,
    as_report,
    decomposition,
    layer,
    make_evidence,
    make_folder,
    make_measured_report,
    make_report,
    make_simplex_report,
)

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"' onfocus=alert(1) \u202e\u2028{{ 7 * 7 }}"
LARGEST_PAGE = 320_000
"""In bytes, for 32 layers with everything measured."""


def render_page(report: dict[str, Any], **about: Any) -> str:
    return pages.render_page(as_report(report), **about)


class Page(HTMLParser):
    """A page as a browser reads it: its elements with their attributes, and the text in elements with an id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[list[str]]] = {}
        self.scripts: list[str] = []
        self.table = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag == "table":
            self.table = found.get("id") or "models"
            self.texts[self.table] = []
        elif tag == "tr":
            self.texts[self.table].append([])
        elif tag in ("td", "th") and self.table:
            self.texts[self.table][-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.table = "" if tag == "table" else self.table

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script" and self.scripts and data.strip():
            self.scripts[-1] += data
        if self.table and self.texts[self.table] and self.texts[self.table][-1]:
            self.texts[self.table][-1][-1] += data.strip()


def body(page: Page, table: str) -> list[list[str]]:
    return page.texts[table][1:]


def test_every_number_is_in_its_place_without_a_script():
    page = Page(render_page(make_report()))
    assert body(page, "layers")[1] == [
        "bert.encoder.layer.0",
        "2.0e-04",
        "1.0e-04",
        "0.0300",
        "0.00667",
        "0.998",
        "0.010",
    ]
    assert page.texts["map"][0] == ["layer \\ α", "0.25", "0.5"]
    assert body(page, "map")[2] == ["1", "0.0058", "0.0078"]
    assert body(page, "path")[5] == ["0.5", "0.5000", "0.3750", "75.00 %"]
    assert [row[1:] for row in body(page, "models")] == [
        ["ada/bert-tweets", MODELS[0]["revision"], "0.5"],
        ["grace/bert-films", MODELS[1]["revision"], "0.5"],
    ]  # fmt: skip


def test_the_script_has_the_numbers_of_every_point():
    data = json.loads(Page(render_page(make_report())).scripts[0])
    assert data["points"] == ["α = 0.25", "α = 0.5"]
    assert data["alphas"] == [0.25, 0.5]
    assert data["layers"][2] == "bert.encoder.layer.1"
    assert data["cells"][2][0]["t"][0] == "0.00585"
    assert data["cells"][2][0]["m"] == ["0.0058", "0.032", "0.98"]
    assert data["cells"][2][0]["s"] == ["s4", "s4", "b1"]


@pytest.mark.parametrize(
    ("coefficient", "shade"), [(1.0, "s0"), (0.97, "b1"), (0.5, "b4"), (-0.9, "b4"), (1.06, "a2"), (1.5, "a4")]
)
def test_a_coefficient_is_shaded_by_its_side_of_one(coefficient, shade):
    report = make_report(layers=[layer("logits", 0.5, 0.1, 0.2, coefficient)])
    assert json.loads(Page(render_page(report)).scripts[0])["cells"][0][0]["s"] == ["s7", "s6", shade]


def test_the_barrier_is_shaded_where_the_path_is_worse_and_nowhere_else():
    html = render_page(make_report())
    assert html.count('<polygon class="shaded"') == 2
    assert ">barrier 0.125 nats<" in html and ">barrier 6.25 points<" in html
    path = [{"alpha": a, "loss": loss, "metrics": {}} for a, loss in ((0.0, 0.5), (0.5, 0.2), (1.0, 0.5))]
    better = render_page(make_report(path=path, barrier={"loss": 0.0, "error": 0.0}))
    assert "<polygon" not in better and "worse than" not in better


def test_models_and_merge_are_marked():
    html = render_page(make_report())
    assert html.count('class="mark parent"') == 5  # two a chart, one in the key
    assert html.count('class="mark merge"') == 3


@pytest.mark.parametrize(
    ("changes", "lead", "says"),
    [
        ({}, "Verdict: merge.", "one parent alone is better"),
        ({"verdict": {"answer": "align", "because": "x"}}, "Warning. Verdict: align first.", "different coordinates"),
        ({"verdict": {"answer": "do not merge", "because": "x"}}, "Warning. Verdict: do not merge.", "loses"),
        ({"layers": [{**layer("logits", 0.5, 0.1, 0.2, 1.0), "llfc": {"mean": None, "std": None}}]},
         "The diagnosis failed.", "not finite"),
    ],
)  # fmt: skip
def test_the_verdict_is_said_in_words_not_only_in_colour(changes, lead, says):
    html = render_page(make_report(**changes))
    verdict = re.search(r'<section id="verdict" class="verdict (\w+)".*?</section>', html, re.DOTALL)
    assert verdict and lead in verdict.group() and says in verdict.group()
    assert verdict.group(1) == ("good" if not changes else "bad")


def test_strangers_words_are_shown_and_never_obeyed():
    everywhere = make_report(
        models=[{"id": HOSTILE, "revision": HOSTILE, "weight": 0.5}, {"id": "a/b", "revision": None, "weight": 0.5}],
        verdict={"answer": "merge", "because": HOSTILE},
        versions={HOSTILE: HOSTILE},
        data={"task": HOSTILE, "dataset": HOSTILE, "name": HOSTILE, "split": HOSTILE},
        alignment={"method": HOSTILE, "model": HOSTILE, "reference": HOSTILE},
        layers=[layer(HOSTILE, 0.5, 0.1, 0.2, 1.0)],
        path=[{"alpha": a, "loss": 0.5, "metrics": {HOSTILE: 0.5}} for a in (0.0, 0.5, 1.0)],
    )
    html = render_page(everywhere, title=HOSTILE, hardware=HOSTILE, links={"a.json": HOSTILE})
    plain, page = Page(render_page(make_report(), links={"a.json": "x"})), Page(html)
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements}
    written = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", html, flags=re.DOTALL)
    assert not [sign for sign in ("<script>", "<img", "\u202e", "\u2028") if sign in written]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert written.count("{{ 7 * 7 }}") > 5
    targets = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert all(target and re.match(r"#|a\.json$|https://huggingface\.co/a/b$", target) for target in targets)
    assert json.loads(page.scripts[0])["layers"] == [re.sub("[\u202e\u2028]", " ", HOSTILE)]


def test_nothing_is_loaded_from_anywhere():
    html = render_page(make_measured_report())
    page = Page(html)
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none';") and "unsafe" not in policy
    assert not [a for tag, a in page.elements if "src" in a or (tag == "link" and a["href"] != "data:,")]
    assert "url(http" not in html and "@import" not in html


def test_a_deep_model_with_every_measure_stays_small():
    assert len(render_page(make_measured_report(32)).encode()) < LARGEST_PAGE


@pytest.mark.parametrize(
    ("region", "points"),
    [("simplex", ["models 1 and 2", "models 1 and 3", "models 2 and 3", "centre"]),
     ("arithmetic", ["-1 × task vectors", "0.5 × task vectors", "merge"])],
)  # fmt: skip
def test_of_several_models_the_points_have_names(region, points):
    html = render_page(make_simplex_report(3, region))
    page = Page(html)
    assert page.texts["map"][0] == ["layer", *points]
    assert json.loads(page.scripts[0])["alphas"] is None
    assert [row[0] for row in body(page, "path")][3:] == points if region == "simplex" else True
    assert 'class="curve"' not in html and 'class="blend"' in html
    # A sum of task vectors may lie outside the models; the barrier between them is not its own.
    assert ("the merge lies outside" in html) == (region == "arithmetic")
    assert ("linearly connected" in html) == (region == "simplex")


def test_the_barrier_is_taken_apart():
    html = render_page(make_report(decomposition=[decomposition(0.5)]))
    assert "The barrier taken apart, in nats" in html
    assert "non-linearity costs 0.250 nats" in html
    assert body(Page(html), "decomposition")[0][:3] == ["0.5", "0.1250", "0.2500"]
    assert "taken apart" not in render_page(make_report())


def test_without_labels_there_is_no_path():
    path = [{"alpha": alpha, "loss": None, "metrics": {}} for alpha in (0.0, 0.5, 1.0)]
    html = render_page(make_report(path=path, barrier={"loss": None, "error": None}))
    assert "path-section" not in html and ">nan" not in html.lower()
    assert 'id="map"' in html


@pytest.mark.parametrize(
    "changes",
    [
        {"alignment": {"method": ["weight_matching"]}},
        {"alignment": {"method": "x", "alignments": [3]}},
        {"alignment": {"method": "x", "axes": [{"axis": "heads", "moved": "1", "units": 2}]}},
        {"data": {"dataset": {"name": "x"}}},
    ],
)
def test_a_report_that_tells_its_data_or_alignment_otherwise_is_refused(changes: dict[str, Any]):
    with pytest.raises(PublishingError, match="not what is expected there"):
        render_page(make_report(**changes))


def test_it_lies_beside_the_card_and_links_to_what_is_there(tmp_path: Path):
    folder = make_folder(tmp_path / "merged", report=make_report())
    write_card(folder, make_evidence(report=make_report()))
    page = (folder / "llfc" / PAGE_FILE).read_text()
    linked = re.findall(r'<li><a href="([^#"]+)">', page)
    assert linked == ["llfc_report.json", "recipe.yaml", "../README.md"]
    assert all((folder / "llfc" / target).is_file() for target in linked)
    assert "(llfc/report.html)" in (folder / "README.md").read_text()
    (folder / "llfc" / "llfc_report.json").unlink()
    write_card(folder, make_evidence())
    assert not (folder / "llfc" / PAGE_FILE).exists()
    assert "report.html" not in (folder / "README.md").read_text()


# -- in a browser


def opened(browse: Any, folder: Path, report: dict[str, Any] | None = None, **options: Any) -> Any:
    return browse(pages.write_page(as_report(report or make_measured_report(4)), folder).as_uri(), **options)


def shown_rows(page: Any, table: str) -> list[list[str]]:
    rows = page.locator(f"#{table} tbody tr:visible").all()
    return [row.locator("th, td").all_inner_texts() for row in rows]


@pytest.mark.browser
def test_a_table_is_sorted_by_its_heads(browse, tmp_path: Path):
    page = opened(browse, tmp_path)
    head = page.locator("#layers thead th").filter(has_text="coefficient")
    in_order = [row[0] for row in shown_rows(page, "layers")]
    orders = []
    for state in ("descending", "ascending", "none"):
        head.get_by_role("button").press("Enter")
        assert head.get_attribute("aria-sort") == state
        orders.append([row[0] for row in shown_rows(page, "layers")])
    assert orders[0] == in_order and orders[1] == in_order[::-1] and orders[2] == in_order
    llfc = page.locator("#layers thead th").nth(1)
    llfc.get_by_role("button").click()
    values = [float(row[1]) for row in shown_rows(page, "layers")]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]
    assert head.get_attribute("aria-sort") == "none"


@pytest.mark.browser
def test_missing_values_come_last_in_both_directions(browse, tmp_path: Path):
    rows = [layer(name, 0.5, 0.1, baseline, 1.0) for name, baseline in (("a", 0.0), ("b", 0.2), ("logits", 0.4))]
    page = opened(browse, tmp_path, make_report(layers=rows))
    ratio = page.locator("#layers thead th").filter(has_text="ratio").get_by_role("button")
    for order in (["b", "logits", "a"], ["logits", "b", "a"]):
        ratio.click()
        assert [row[0] for row in shown_rows(page, "layers")] == order


@pytest.mark.browser
def test_layers_are_filtered_by_name_and_ratio(browse, tmp_path: Path):
    page = opened(browse, tmp_path)
    page.get_by_label("Layers named").fill("layer .2")
    assert [row[0] for row in shown_rows(page, "layers")] == ["bert.encoder.layer.2"]
    assert [row[0] for row in shown_rows(page, "map")] == ["2"]
    assert page.locator("#count").inner_text() == "1 of 5 layers shown"
    assert all("layer.2" in row[0] for row in shown_rows(page, "stitching"))
    page.get_by_label("Layers named").fill("")
    page.get_by_label("ratio at least").fill("0.003")
    ratios = [float(row[4]) for row in shown_rows(page, "layers")]
    assert len(ratios) == 3 and min(ratios) >= 0.003
    page.get_by_label("Layers named").fill("nothing of this name")
    assert shown_rows(page, "layers") == [] and page.locator("#count").inner_text() == "0 of 5 layers shown"


@pytest.mark.browser
def test_the_map_is_walked_with_arrows_and_read_aloud(browse, tmp_path: Path):
    page = opened(browse, tmp_path)
    assert page.locator("#map td[tabindex='0']").count() == 1
    page.locator("#map td[tabindex='0']").focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    focused = page.locator("#map td:focus")
    assert focused.inner_text() == "6e-6" and focused.get_attribute("role") == "gridcell"
    assert (
        page.locator("#readout").inner_text().startswith("bert.encoder.layer.2 at α = 0.2: LLFC 5.8e-06, 95 % interval")
    )
    outline = focused.evaluate("cell => getComputedStyle(cell).outlineStyle + getComputedStyle(cell).outlineWidth")
    assert outline == "solid3px"
    page.keyboard.press("Control+End")
    assert page.locator("#readout").inner_text().startswith("logits at α = 0.9")
    page.keyboard.press("ArrowRight")
    assert page.locator("#readout").inner_text().startswith("logits at α = 0.9")
    page.keyboard.press("Enter")
    assert page.get_by_label("At the point").input_value() == "8"
    assert shown_rows(page, "layers")[-1][1] == "2.9e-05"
    assert page.locator("#map td[tabindex='0']").count() == 1


@pytest.mark.browser
def test_the_filter_leaves_a_way_into_the_map(browse, tmp_path: Path):
    page = opened(browse, tmp_path)
    page.get_by_label("Layers named").fill("logits")
    stop = page.locator("#map td[tabindex='0']")
    assert stop.count() == 1 and stop.is_visible()


@pytest.mark.browser
def test_pointing_shows_numbers_and_the_map_changes_what_it_shows(browse, tmp_path: Path):
    page = opened(browse, tmp_path)
    page.locator("#map tbody tr").nth(3).locator("td").nth(4).hover()
    assert "bert.encoder.layer.3 at α = 0.5" in page.locator("#readout").inner_text()
    page.get_by_label("coefficient", exact=True).check()
    assert [row[5] for row in shown_rows(page, "map")] == ["1.00", "0.98", "0.96", "0.94", "0.92"]
    assert page.locator(".legend:visible").count() == 1
    page.get_by_label("At the point").select_option("0")
    assert shown_rows(page, "layers")[2][1] == "3.2e-06"


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("kind", ["line", "simplex"])
def test_it_fits_every_screen_and_can_be_read_on_it(browse, tmp_path: Path, width: int, dark: bool, kind: str):
    report = make_measured_report(32) if kind == "line" else make_simplex_report(4)
    page = opened(browse, tmp_path, report, width=width, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # WCAG 2.2, 1.4.3: text of a cell against its own ground.
    contrasts = page.evaluate("""() => {
        const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const light = (colour) => {
            canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
                .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const cell = document.querySelector("#map td"), found = {};
        for (const shade of ["s0","s1","s2","s3","s4","s5","s6","s7","s8","b1","b2","b3","b4","a1","a2","a3","a4"]) {
            cell.className = shade;
            const style = getComputedStyle(cell);
            found[shade] = ratio(light(style.color), light(style.backgroundColor));
        }
        const page = getComputedStyle(document.body).backgroundColor;
        for (const name of ["small", "a", "p", ".tick", ".note"]) {
            const style = getComputedStyle(document.querySelector("main " + name));
            found[name] = ratio(light(name === ".tick" ? style.fill : style.color), light(page));
        }
        return found;
    }""")
    assert {name: value for name, value in contrasts.items() if value < 4.5} == {}


@pytest.mark.browser
def test_it_is_whole_without_a_script_and_harmless_with_a_strangers_words(browse, tmp_path: Path):
    page = opened(browse, tmp_path / "plain", script=False)
    assert page.locator("#filter").is_hidden() and len(shown_rows(page, "layers")) == 5
    hostile = make_report(models=[{"id": HOSTILE, "revision": HOSTILE, "weight": 0.5}] * 2,
                          layers=[layer(HOSTILE, 0.5, 0.1, 0.2, 1.0), layer("logits", 0.5, 0.1, 0.2, 1.0)])  # fmt: skip
    page = opened(browse, tmp_path / "hostile", hostile)
    page.locator("#map td").first.hover()
    page.get_by_label("Layers named").fill("<script>")
    assert len(shown_rows(page, "layers")) == 1
    assert "<img src=x" in page.locator("#readout").inner_text()


@pytest.mark.browser
def test_who_does_not_see_it_gets_the_same(browse, tmp_path: Path):
    page = opened(browse, tmp_path, make_report())
    tree = page.locator("body").aria_snapshot()
    for expected in (
        'heading "✓ Verdict: merge."', 'img "loss along the path', 'grid "Layer by layer, at every point"',
        'columnheader "LLFC', 'rowheader "bert.encoder.layer.0"', 'searchbox "Layers named"', 'radio "LLFC" [checked]',
    ):  # fmt: skip
        assert expected in tree.replace('heading "Verdict', 'heading "✓ Verdict'), expected
    described = page.locator("svg desc").first.text_content()
    assert described == (
        "Loss: α = 0 0.5000, α = 0.5 0.5000, α = 1 0.2500. Barrier 0.125 nats."
    )  # fmt: skip


@pytest.mark.browser
def test_on_paper_everything_is_open(browse, tmp_path: Path):
    page = opened(browse, tmp_path)
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#path").is_visible() and page.locator("#filter").is_hidden()
    assert page.pdf().startswith(b"%PDF")


@pytest.mark.parametrize(("name", "best", "worse"), [("loss", 0.25, 0.51), ("accuracy", 0.875, 0.82)])
def test_a_merge_that_one_parent_beats_is_not_praised(name, best, worse):
    values = make_report(verdict={"answer": "merge", "because": "reasons"})
    for point in values["path"]:
        point.update(loss=0.25, metrics={"accuracy": 0.875})
    assert meaning(ConnectivityReport.from_dict(values)) == "No measurement speaks against this merge."
    for point in values["path"]:
        value = best if point["alpha"] == 1 else worse
        point.update({"loss": value} if name == "loss" else {"metrics": {"accuracy": value}})
    assert "one parent alone is better" in meaning(ConnectivityReport.from_dict(values))
