"""The card says what the report says, drops what is not there, and shows strangers' words as they are."""

import json
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hf_llfc.errors import PublishingError
from hf_llfc.publishing import render_card, write_card
from hf_llfc.publishing.lineage import models_of
from hf_llfc.publishing.record import RunRecord
from hf_llfc.recipe import load_recipe
from tests.hub_double import HubDouble, validate_card
from tests.publishing.samples import (
    A_REVISION,
    ALIGNMENT,
    B_REVISION,
    MODELS,
    RECIPE,
    VERSIONS,
    decomposition,
    layer,
    make_evidence,
    make_folder,
    make_measured_report,
    make_report,
    make_simplex_report,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def render(folder: Path, **changes: Any) -> str:
    about = {key: changes.pop(key) for key in ("name", "license") if key in changes}
    given: dict[str, Any] = {
        "report": make_report(),
        "alignments": [ALIGNMENT],
        "hardware": "two CPU cores",
        "versions": VERSIONS,
    }
    evidence = make_evidence(folder, **{**given, **changes})
    return render_card(folder, evidence, **{"name": "me/bert-two-domains", **about})


ARITHMETIC = {**RECIPE, "merge_method": "task_arithmetic", "base_model": "google/bert"}
TIES_RECIPE = {
    **RECIPE,
    "merge_method": "ties",
    "base_model": f"google/bert@{'9' * 40}",
    "models": [
        {**RECIPE["models"][0], "parameters": {"weight": 0.5, "density": 0.25}},
        {**RECIPE["models"][1], "parameters": {"density": [0.25, 0.75], "weight": [{"filter": "mlp", "value": 1}]}},
    ],
    "parameters": {"normalize": True, "lambda": 0.5},
    "seed": 7,
}


def evaluated(loss: float) -> list[dict[str, Any]]:
    """Loss and accuracy of both parents, and of a merge with this loss."""
    parents = [
        {"id": model["id"], "loss": own, "metrics": {"accuracy": 0.75}}
        for model, own in zip(MODELS, (0.25, 0.5), strict=True)
    ]
    return [*parents, {"id": "merged", "is_merge": True, "loss": loss, "metrics": {"accuracy": 0.5}}]


def body_of(card: str) -> str:
    return ModelCard(card).text


class Page(HTMLParser):
    """A card as a browser has it: its headings, links, tables by row and cell, text, and every element used."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.headings: list[str] = []
        self.links: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.prose = ""
        self.open: list[str] = []
        self.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        if tag == "img":
            self.links.append(dict(attrs)["src"] or "")
            return
        self.open.append(tag)
        if tag == "a":
            self.links.append(dict(attrs)["href"] or "")
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag in ("h1", "h2"):
            self.headings.append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        self.prose += "" if "pre" in self.open else data
        if "h1" in self.open or "h2" in self.open:
            self.headings[-1] += data
        elif "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass


ALL_HEADINGS = [
    "bert-two-domains",
    "What was merged",
    "How good it is",
    "Layer by layer",
    "How to use it",
    "How to reproduce it",
    "Limits",
]


@pytest.mark.parametrize("name", ["merge", "align_first", "not_diagnosed", "not_finite", "far_worse", "ties"])
def test_cards_are_as_they_were_approved(tmp_path: Path, name: str) -> None:
    """Set HF_LLFC_UPDATE_GOLDEN=1 to write the files again, then read what changed."""
    folder = make_folder(tmp_path)
    changes: dict[str, Any] = {}
    if name == "align_first":
        changes = {
            "models": [MODELS[0], {**MODELS[1], "card": {"license": "apache-2.0"}}],
            "alignments": [],
            "report": make_report(verdict={"answer": "align", "because": "the models have not been aligned"}),
        }
    if name == "not_diagnosed":
        changes = {"report": None, "alignments": [], "hardware": None}
    if name == "not_finite":
        path = [{"alpha": alpha, "loss": alpha, "metrics": {"accuracy": 0.5}} for alpha in (0, 0.5, 1)]
        path[1] |= {"loss": None, "metrics": {"accuracy": None}}
        changes = {"report": make_report(path=path, barrier={"loss": None, "error": None})}
    if name in ("far_worse", "ties"):
        changes = {"results": evaluated(2.0 if name == "far_worse" else 0.375)}
    if name == "ties":
        recipe, report = TIES_RECIPE, make_report()
        report["models"] = [{**model, "weight": None} for model in report["models"]]
        models = [{**vars(parent), "card": {}} for parent in models_of(load_recipe(recipe), None)]
        changes |= {"recipe": recipe, "models": models, "report": report}
    card = render(folder, **changes)
    golden = GOLDEN / f"{name}.md"
    if os.environ.get("HF_LLFC_UPDATE_GOLDEN"):
        golden.write_text(card, encoding="utf-8")
    assert card == golden.read_text(encoding="utf-8")


def test_the_metadata_is_what_the_hub_shows(tmp_path: Path) -> None:
    card = render(make_folder(tmp_path))
    data = ModelCard(card).data
    assert data.base_model == ["ada/bert-tweets", "grace/bert-films"]
    assert data.base_model_relation == "merge"
    assert data.to_dict()["base_model_revisions"] == [f"{model['id']}@{model['revision']}" for model in MODELS]
    assert data.tags == ["merge", "hf-llfc"]
    assert data.license == "mit"
    assert data.language == ["en", "fr"]
    assert data.datasets == ["ada/tweets"]
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-classification"
    assert data.model_name == "bert-two-domains"
    found = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in found.items()} == {"loss": 0.5, "accuracy": 0.75}
    accuracy = found["accuracy"]
    assert (accuracy.dataset_type, accuracy.dataset_revision) == ("ada/reviews", "abc123")
    assert (accuracy.dataset_config, accuracy.dataset_split) == ("plain", "test[:512]")
    assert accuracy.task_type == "text-classification"
    assert accuracy.dataset_args == {"samples": 512}
    assert validate_card(card) == ([], [])


def test_the_hub_accepts_the_metadata(hub: HubDouble, tmp_path: Path) -> None:
    ModelCard(render(make_folder(tmp_path))).validate()
    different = [MODELS[0], {**MODELS[1], "card": {"license": "other", "license_name": "my-own-1.0"}}]
    ModelCard(render(make_folder(tmp_path), models=different, report=None)).validate()


def test_every_number_of_the_report_is_in_its_place(tmp_path: Path) -> None:
    page = Page(body_of(render(make_folder(tmp_path))))
    assert page.headings == ALL_HEADINGS
    parents, results, layers = page.tables
    assert parents[1:] == [
        ["A", "ada/bert-tweets", "0123456", "0.5", "mit"],
        ["B", "grace/bert-films", "fedcba9", "0.5", "mit"],
    ]
    assert results == [
        ["model", "loss ↓", "accuracy ↑"],
        ["ada/bert-tweets", "0.2500", "87.50 %"],
        ["grace/bert-films", "0.5000", "75.00 %"],
        ["this merge", "0.5000", "75.00 %"],
    ]
    assert layers[1:] == [
        ["bert.embeddings", "0", "0", "–", "1.000"],
        ["bert.encoder.layer.0", "2.0e-04", "0.030", "0.0067", "0.998"],
        ["bert.encoder.layer.1", "0.0078", "0.18", "0.043", "0.980"],
        ["logits", "0.040", "0.32", "0.12", "0.910"],
    ]
    assert "Barrier: 0.125 nats of loss and 6.25 points of error." in page.text
    assert "On this data, each of its parents alone has an equal or lower loss." in page.text
    assert "at most 0.12 times as far" in page.text
    assert "the coefficient is 0.91 where it is farthest from 1 (in logits)" in page.text
    assert "moved 30 of 36 units (30 of 32 neurons, 0 of 4 heads)" in page.text
    assert "cosine of the weights 0.8125 → 1" in page.text
    assert "weighted average, 0.5·A + 0.5·B" in page.text
    assert "Measured on ada/reviews@abc123, plain, split test[:512], 512 samples." in page.text
    for line in (
        f"ada/bert-tweets: commit {A_REVISION}",
        f"grace/bert-films: commit {B_REVISION}",
        "Data: ada/reviews@abc123, plain, split test[:512], 512 samples",
        "Seeds: seed 0, align.seed 0",
        "Versions: python 3.11.7, hf-llfc 0.1.0, torch 2.13.0, transformers 5.23.0",
        "Hardware: two CPU cores",
    ):
        assert f"\n{line}\n" in page.text
    # √(0.75·0.25/512)
    assert "With 512 samples the accuracy of this merge has a standard error of 1.9 points." in page.text


def test_the_verdict_comes_first(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)

    def opening(**changes: Any) -> str:
        return body_of(render(folder, **changes)).split("\n\n")[1]

    assert opening().startswith("> **Verdict: merge.** The barrier is low")
    assert opening(report=None).startswith("> **Not diagnosed.** ")
    for answer, lead in (("align", "align first"), ("do not merge", "do not merge")):
        report = make_report(verdict={"answer": answer, "because": "of 2 < 3"})
        assert opening(report=report) == f"> **Warning. Verdict: {lead}.** Of 2 \\< 3."
    broken = make_report()
    broken["path"][5] = {"alpha": 0.5, "loss": 1.0, "metrics": {"accuracy": None}}
    expected = "> **The diagnosis failed.** Not every number is finite: accuracy at α = 0.5."
    assert opening(report=broken) == expected
    assert opening(results=evaluated(0.7)).startswith("> **Verdict: merge.** ")
    expected = "> **Warning. The merge is far worse than its parents.** Its loss is 0.8000, "
    assert opening(results=evaluated(0.8)).startswith(expected)
    assert opening(results=evaluated(math.nan)) == "> **The merge is broken.** Its loss is not finite."
    assert opening(results=evaluated(math.nan), report=None).startswith("> **The merge is broken.**")


def without(report: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in keys}


UNLABELLED = make_report(
    path=[{"alpha": alpha, "loss": None, "metrics": {}} for alpha in (0, 0.5, 1)], barrier={"loss": None, "error": None}
)
THREE = [*MODELS, {"id": "./local/third", "weight": 0.25}]


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"report": None}, {"How good it is", "Layer by layer"}),
        ({"report": None, "recipe": {}, "versions": {}}, {"How good it is", "Layer by layer"}),
        ({"report": UNLABELLED}, {"How good it is"}),
        ({"report": make_report(layers=[])}, {"Layer by layer"}),
        ({"report": without(make_report(), "data", "versions", "alignment")}, set()),
        ({"report": make_report(models=[{}, {}])}, set()),
        ({"alignments": []}, set()),
        ({"alignments": [ALIGNMENT, {**ALIGNMENT, "converged": False}]}, set()),
        ({"recipe": {}}, set()),
        ({"models": THREE}, set()),
        ({"models": [{"id": "a/b"}]}, set()),
        (
            {
                "models": [*MODELS, {"id": "a/base", "is_base": True}],
                "recipe": ARITHMETIC,
            },
            set(),
        ),
        ({"hardware": None, "name": None}, set()),
        ({"results": [{"id": "a", "loss": None, "metrics": {}}, {"id": "m", "is_merge": True, "loss": 1.0}]}, set()),
    ],
)
def test_what_is_missing_drops_out_cleanly(tmp_path: Path, changes: dict[str, Any], gone: set[str]) -> None:
    card = render(make_folder(tmp_path / "bert-two-domains"), **changes)
    assert validate_card(card)[0] == []
    body = body_of(card)
    page = Page(body)
    assert page.headings == [heading for heading in ALL_HEADINGS if heading not in gone]
    assert not re.search(r"\bNone\b|\bnan\b|undefined|\{\{|\}\}|\(\)|\b0 of 0\b|  +\S| [,.;:]", page.prose)
    assert "\n\n\n" not in body
    assert not re.search(r"^#+ .*\n+#", body, re.MULTILINE), "a heading without a section"
    for table in page.tables:
        assert len({len(row) for row in table}) == 1, table


def test_the_merge_of_more_than_two_says_that_only_a_pair_was_measured(tmp_path: Path) -> None:
    report = make_report(models=[{"id": "ada/bert-tweets", "weight": 0.4}, {"id": "grace/bert-films", "weight": 0.35}])
    text = Page(body_of(render(make_folder(tmp_path), models=THREE, report=report))).text
    assert "Three checkpoints of one architecture" in text
    assert "Of the first two parents: the barrier is low" in text
    assert "Path and layers were measured for two of the 3 parents." in text
    assert "third (not on the Hub)" in text
    assert "this merge" not in text
    assert "model-index" not in render(make_folder(tmp_path), models=THREE, report=report)


def test_measured_results_take_precedence_over_the_path(tmp_path: Path) -> None:
    results = [
        {"id": f"ada/bert-tweets@{'0' * 40}", "loss": 0.3, "metrics": {"accuracy": 0.8}},
        {"id": "/home/me/parents/films", "loss": 0.4, "metrics": {"accuracy": 0.7}},
        {"id": "/home/me/merged", "is_merge": True, "loss": 0.2, "metrics": {"accuracy": 0.9}},
    ]
    card = render(make_folder(tmp_path), results=results)
    _, table, _ = Page(body_of(card)).tables
    assert [row[0] for row in table[1:]] == ["ada/bert-tweets", "films", "this merge"]
    assert [row[2] for row in table[1:]] == ["80.00 %", "70.00 %", "90.00 %"]
    assert {r.metric_type: r.metric_value for r in ModelCard(card).data.eval_results} == {"loss": 0.2, "accuracy": 0.9}


def test_others_who_repeat_the_merge_do_not_push_it(tmp_path: Path) -> None:
    card = render(make_folder(tmp_path), recipe={**RECIPE, "publish": {"repo_id": "me/bert-two-domains"}})
    assert "publish:" not in card


def test_task_arithmetic_is_written_with_its_base(tmp_path: Path) -> None:
    models = [*MODELS, {"id": "google/bert", "revision": "9" * 40, "is_base": True, "card": {"license": "mit"}}]
    card = render(
        make_folder(tmp_path),
        models=models,
        recipe=ARITHMETIC,
    )
    page = Page(body_of(card))
    assert "θ₀ + 0.5·(A − θ₀) + 0.5·(B − θ₀)" in page.text
    assert page.tables[0][3] == ["θ₀", "google/bert", "9999999", "base", "mit"]
    assert "Two checkpoints" in page.text
    assert ModelCard(card).data.base_model == ["ada/bert-tweets", "grace/bert-films", "google/bert"]


def test_that_nothing_moved_is_said_once(tmp_path: Path) -> None:
    still = {**ALIGNMENT, "axes": [{"axis": "neurons", "moved": 0, "units": 32}], "cosine_after": 0.8125}
    for alignments, times in (([still], 1), ([still, still], 1), ([still, ALIGNMENT], 0)):
        text = Page(body_of(render(make_folder(tmp_path), alignments=alignments))).text
        assert text.count("moved none of 32 units; cosine of the weights 0.8125.") == len(alignments) - (times == 0)
        assert text.count("Nothing had to move") == times


HOSTILE = [
    "x\n---\n# Owned\n",
    "</td></tr></table><script>alert(1)</script>",
    "a|b|c",
    "`code` **bold** [link](https://evil.example) ![i](https://evil.example/x.png)",
    "{{ 7 * 7 }} {% raw %}",
    "https://evil.example www.evil.example <https://evil.example> &lt;b&gt; $x$",
    "```\n# Owned\n```",
    "\x00\x07\u202e",
    '\'; --- "quoted": yes',
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_parents_say_is_shown_and_never_obeyed(tmp_path: Path, hostile: str) -> None:
    """Names, licences, languages and data of strangers neither become markup nor reach the metadata."""
    models = [
        {"id": f"/data/{hostile}", "share": hostile, "card": {"license": "other", "license_name": hostile}},
        {"id": f"x/{hostile}", "revision": hostile, "weight": 0.5},
        {
            **MODELS[1],
            "card": {"license": hostile, "license_link": hostile, "language": [hostile, "de"], "datasets": [hostile]},
        },
    ]
    report = make_report(
        models=[{"id": hostile, "weight": 0.5}, {"id": "b", "weight": 0.5}],
        layers=[layer(hostile, 0.5, 0.1, 0.2, 1.0)],
        data={"dataset": hostile, "name": hostile, "split": hostile, "samples": 3},
        verdict={"answer": "merge", "because": hostile},
    )
    alignment = {**ALIGNMENT, "method": hostile, "model": hostile, "axes": [{"axis": hostile, "moved": 1, "units": 2}]}
    recipe = {"models": [{"model": hostile}], "output_dir": hostile, "logging_dir": hostile}
    card = render(
        make_folder(tmp_path),
        models=models,
        report=report,
        alignments=[alignment],
        recipe=recipe,
        hardware=hostile,
        versions={hostile: hostile},
        results=[{"id": hostile, "loss": 1.0, "metrics": {hostile: 0.5}}],
    )
    assert validate_card(card)[0] == []
    data = yaml.safe_load(card.split("---\n")[1])
    assert data["language"] == ["de"]
    assert "datasets" not in data
    # A name that is not one of a licence is not repeated in the metadata.
    assert re.fullmatch(r"[a-z0-9.-]+", data.get("license_name", "none"))
    page = Page(body_of(card))
    assert page.headings == ALL_HEADINGS
    assert set(page.elements) <= {
        "h1", "h2", "p", "strong", "a", "img", "blockquote", "table", "thead", "tbody", "tr", "th", "td", "code",
        "pre", "ul", "li", "em",
    }  # fmt: skip
    allowed = ("https://huggingface.co/grace/bert-films", "https://arxiv.org/abs/2307.08286", "llfc/")
    assert all(link.startswith(allowed) for link in page.links), page.links
    for table in page.tables:
        assert len({len(row) for row in table}) == 1
    # Bare addresses would become links on the Hub, outside of code.
    outside = re.sub(r"(`+).*?\1", "", body_of(card), flags=re.DOTALL)
    assert "https://evil" not in outside
    assert "www.evil" not in outside


@pytest.mark.parametrize(
    ("cards", "chosen", "metadata", "told"),
    [
        (["mit", "mit"], None, {"license": "mit"}, None),
        (["mit", "apache-2.0"], None, {"license": "other", "license_name": "licences-of-the-parents"}, "different"),
        (["mit", "apache-2.0"], "apache-2.0", {"license": "apache-2.0"}, "different"),
        (["mit", None], None, {}, "grace/bert-films"),
        ([None, None], None, {}, "ada/bert-tweets, grace/bert-films"),
        ([None, None], "mit", {"license": "mit"}, "No licence is stated"),
        (["gpl-3.0", "gpl-3.0"], "mit", {"license": "mit"}, "published under mit"),
        (["mit", "mit"], "mit", {"license": "mit"}, None),
        (["unknown", "mit"], None, {}, "ada/bert-tweets"),
        ([["mit"], "mit"], None, {"license": "mit"}, None),
        (["made-up-1.0", "made-up-1.0"], None, {"license": "other", "license_name": "made-up-1.0"}, None),
    ],
)
def test_the_licence_is_that_of_the_parents(
    tmp_path: Path, cards: list[Any], chosen: str | None, metadata: dict[str, str], told: str | None
) -> None:
    models = [{**model, "card": {"license": license}} for model, license in zip(MODELS, cards, strict=True)]
    card = render(make_folder(tmp_path), models=models, license=chosen)
    data = ModelCard(card).data.to_dict()
    assert {key: value for key, value in data.items() if key.startswith("license")} == metadata
    text = Page(body_of(card)).text
    assert ("Licence: read this first." in text) == (told is not None)
    assert told is None or told in text


def test_a_licence_of_its_own_keeps_its_name_and_link(tmp_path: Path) -> None:
    own = {"license": "other", "license_name": "my-own-1.0", "license_link": "https://example.org/LICENSE"}
    card = render(make_folder(tmp_path), models=[{**model, "card": own} for model in MODELS])
    data = ModelCard(card).data
    assert (data.license, data.license_name, data.license_link) == tuple(own.values())


def test_many_layers_are_folded_away(tmp_path: Path) -> None:
    rows = [layer(f"model.layers.{i}", 0.5, 0.01, 0.1, 1.0) for i in range(40)]
    body = body_of(render(make_folder(tmp_path), report=make_report(layers=rows)))
    assert body.count("<details>") == body.count("</details>") == 1
    assert "All 40 layers as a table" in body
    _, _, table = Page(body).tables
    assert len(table) == 41


def test_paths_of_a_disk_stay_private(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    recipe = {
        "models": [{"model": "/home/ada/secret/tweets"}, {"model": "/home/ada/secret/films"}],
        "diagnose": {"task": "text-classification", "dataset": "/home/ada/secret/data.csv", "layers": ["*"]},
        "output_dir": "/home/ada/secret/merged",
    }
    report = make_report(
        models=[{"id": f"/home/ada/secret/{name}", "weight": 0.5} for name in ("tweets", "films")],
        data={"dataset": "/home/ada/secret/data.csv", "task": "text-classification", "samples": 10},
    )
    models = [{"id": f"/home/ada/secret/{name}", "weight": 0.5, "card": {}} for name in ("tweets", "films")]
    alignment = {**ALIGNMENT, "model": "/home/ada/secret/films", "reference": "/home/ada/secret/tweets"}
    card = render(folder, recipe=recipe, report=report, models=models, alignments=[alignment])
    assert "secret" not in card
    assert "./tweets" in card and "data.csv" in card
    assert "base_model" not in card
    text = Page(body_of(card)).text
    assert "Others cannot repeat the merge, because these parents are not on the Hub: tweets, films." in text
    assert "Others cannot repeat the measurement, because its data is not on the Hub: data.csv." in text


# -- write_card


def test_the_card_of_a_folder_is_written_from_what_lies_in_it(hub: HubDouble, tmp_path: Path) -> None:
    for model in MODELS:
        metadata = yaml.safe_dump(model["card"])
        hub.add_repo(model["id"], {"README.md": f"---\n{metadata}---\n# A parent\n", "config.json": "{}"})
    parents = [f"{model['id']}@{hub.commits(model['id'])[0].sha}" for model in MODELS]
    recipe = {**RECIPE, "models": [{"model": parent, "parameters": {"weight": 0.5}} for parent in parents]}
    folder = make_folder(tmp_path / "merged", report=make_report(), recipe=recipe)
    path = write_card(folder)
    assert path == folder / "README.md"
    assert {p.name for p in (folder / "llfc").iterdir()} >= {"path.png", "layers.png"}
    card = ModelCard.load(path)
    assert card.data.license == "mit"
    assert card.data.datasets == ["ada/tweets"]
    page = Page(card.text)
    pictures = ["llfc/path.png", "llfc/layers.png", "llfc/heatmap.png"]
    assert [link for link in page.links if link.startswith("llfc/")] == ["llfc/report.html", *pictures]
    assert all(f"{parent.split('@')[1][:7]}" in page.text for parent in parents)
    assert 'pipeline("text-classification", model="merged")' in page.text
    again = path.read_bytes()
    write_card(folder)
    assert path.read_bytes() == again
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_a_card_is_written_again_from_the_record_of_its_run(tmp_path: Path) -> None:
    paths = [{**row, "id": f"/home/ada/secret/{row['id']}"} for row in evaluated(0.375)]
    aligned = {**ALIGNMENT, "model": "/home/ada/secret/films", "reference": "/home/ada/secret/tweets"}
    run = {"alignments": [aligned], "results": paths, "versions": VERSIONS, "hardware": "two CPU cores"}
    evidence = make_evidence(report=make_report(), **run)
    cards = []
    for folder in (make_folder(tmp_path / name / "merged", report=make_report()) for name in "ab"):
        assert "secret" not in evidence.record.save(folder).read_text()
        read = replace(evidence, record=RunRecord.load(folder))
        assert read.record.versions == VERSIONS
        cards.append(write_card(folder, read if cards else evidence).read_text())
    assert cards[0] == cards[1]
    assert all(text in cards[1] for text in ("0.3750", "two CPU cores", "moved 30 of 36 units"))
    assert "secret" not in cards[1]


def test_a_loss_that_is_not_finite_survives_its_record(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, report=make_report())
    assert "NaN" not in make_evidence(results=evaluated(math.nan)).record.save(folder).read_text()
    assert math.isnan(RunRecord.load(folder).results[-1].loss)
    evidence = replace(make_evidence(), record=RunRecord.load(folder))
    assert "**The merge is broken.**" in write_card(folder, evidence).read_text()
    (folder / "llfc" / "run.json").unlink()
    assert RunRecord.load(folder) == RunRecord()


def test_what_parents_said_counts_when_they_cannot_be_read(tmp_path: Path) -> None:
    entries = [{"model": f"parents/{name}/x"} for name in "ab"]
    folder = make_folder(tmp_path / "merged", recipe={"models": entries, "output_dir": "merged"})
    said = {"license": "mit", "language": "de", "datasets": ["ada/tweets"], "widget": "private"}
    assert "private" not in RunRecord(cards=(said, said)).save(folder).read_text()
    data = ModelCard.load(write_card(folder)).data
    assert (data.license, data.language, data.datasets) == ("mit", ["de"], ["ada/tweets"])
    RunRecord(cards=(said,)).save(folder)  # of another merge
    assert ModelCard.load(write_card(folder)).data.license is None


def test_a_parent_without_a_card_or_a_hub_is_no_problem(hub: HubDouble, tmp_path: Path) -> None:
    hub.add_repo("ada/bert-tweets", {"README.md": "---\na: b: c\n---\n"})
    hub.fail("GET", "bert-films", status=500, times=-1)
    write_card(make_folder(tmp_path / "a"))
    text = Page(ModelCard.load(tmp_path / "a" / "README.md").text).text
    assert "No licence is stated by ada/bert-tweets, grace/bert-films" in text


def test_local_parents_are_read_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("a", "b"):
        parent = make_folder(tmp_path / name, card="---\nlicense: apache-2.0\nlanguage: de\n---\n")
        assert parent.is_dir()
    recipe = {"models": [{"model": str(tmp_path / name)} for name in ("a", "b")], "output_dir": "merged"}
    folder = make_folder(tmp_path / "merged", recipe=recipe, report=make_report())
    data = ModelCard.load(write_card(folder)).data
    assert data.license == "apache-2.0"
    assert data.language == ["de"]
    parents = Page(ModelCard.load(folder / "README.md").text).tables[0]
    assert [row[3] for row in parents[1:]] == ["0.5", "0.5"]


@pytest.mark.parametrize(
    ("models", "settings", "shares"),
    [
        ([{}, {}], {}, ["0.5", "0.5"]),
        ([{"parameters": {}}, {"parameters": {"weight": 0.5}}], {"normalize": False}, ["1", "0.5"]),
        ([{"parameters": {"weight": 3}}, {"parameters": {}}], {"normalize": True}, ["0.75", "0.25"]),
        ([{"parameters": {}}, {"parameters": {}}], {"method": "task_arithmetic", "lambda": 0.3}, ["0.3", "0.3"]),
        (
            [{"parameters": {"weight": [0, 1]}}, {"parameters": {"weight": 0.5}}],
            {"normalize": False},
            ["by layer", "by layer"],
        ),
        ([{"parameters": {"weight": [0, 1]}}, {"parameters": {}}], {"normalize": True}, ["by layer", "by layer"]),
        (
            [{"parameters": {"weight": 0.5, "density": 0.25}}, {"parameters": {"density": [0.25, 1], "weight": 2}}],
            {"method": "ties", "normalize": True},
            ["0.5, density 0.25", "2, density 0.25 … 1 by layer"],
        ),
        ([{}, {}], {"method": "karcher"}, ["–", "–"]),
        (
            [{"parameters": {"weight": [{"value": 1}], "density": 1}}, {"parameters": {"weight": 1}}],
            {"method": "dare_ties"},
            ["by tensor, density 1", "1"],
        ),
    ],
)
def test_the_weights_are_those_that_the_recipe_means(
    tmp_path: Path, models: list[dict[str, Any]], settings: dict[str, Any], shares: list[str]
) -> None:
    entries = [{"model": str(tmp_path / name), **model} for name, model in zip("ab", models, strict=True)]
    method = settings.pop("method", "linear")
    base = {} if method in ("linear", "karcher") else {"base_model": "google/bert"}
    recipe = {"models": entries, "merge_method": method, "parameters": settings, "output_dir": "merged", **base}
    folder = make_folder(tmp_path / "merged", recipe=recipe)
    table = Page(ModelCard.load(write_card(folder)).text).tables[0]
    assert [row[3] for row in table[1:3]] == shares


def test_a_card_says_what_non_linearity_costs(tmp_path: Path) -> None:
    report = make_report(decomposition=[decomposition(0.5)])
    card = render(make_folder(tmp_path), report=report)
    assert "the ensemble gains 0.125 nats" in Page(body_of(card)).prose
    path = [{"alpha": 0.5, "loss": None, "metrics": {}}]
    report |= {"path": path, "barrier": {"loss": None, "error": None}}
    report["decomposition"] = [decomposition(0.5, labelled=False)]
    assert "at most 0.875 nats above it whatever they are" in Page(body_of(render(tmp_path, report=report))).prose


def test_measures_that_were_asked_for_are_folded_away(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, report=make_measured_report(2))
    write_card(folder, make_evidence(report=make_measured_report(2)))
    page = Page(ModelCard.load(folder / "README.md").text)
    pictures = [link for link in page.links if link.endswith(".png")]
    assert sorted(pictures) == sorted(f"llfc/{path.name}" for path in (folder / "llfc").glob("*.png"))
    assert pictures[:2] == ["llfc/path.png", "llfc/layers.png"]
    assert "More measurements: LLFC at every point, weak additivity, commutativity" in page.text
    assert page.elements.count("details") == 1


def test_a_merge_of_many_shows_them_all_and_the_merge(tmp_path: Path) -> None:
    report = make_simplex_report(3)
    models = [{**MODELS[0], "id": f"ada/bert-{number}", "weight": 1 / 3} for number in (1, 2, 3)]
    page = Page(render(make_folder(tmp_path), report=report, models=models, alignments=[]))
    table = next(table for table in page.tables if "loss ↓" in table[0])
    losses = [*(point["loss"] for point in report["path"][:3]), report["path"][-1]["loss"]]
    assert [row[0] for row in table[1:]] == ["ada/bert-1", "ada/bert-2", "ada/bert-3", "this merge"]
    assert [row[1] for row in table[1:]] == [f"{loss:.4f}" for loss in losses]
    assert "worse than the blend of their values" in page.text
    assert "At the centre the merged features" in page.text
    assert "The barrier is the largest among 7 points" in page.text
    assert "two of the 3 parents" not in page.text and "Of the first two parents" not in page.text


def test_plots_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, report=make_report())
    write_card(folder, make_evidence(report=make_report()))
    write_card(folder, make_evidence())
    assert not list((folder / "llfc").glob("*.png"))
    assert "llfc/path.png" not in (folder / "README.md").read_text()


def spoiled_record(**changes: Any) -> str:
    empty = {"schema": "hf_llfc.run/1", "alignments": [], "results": [], "versions": {}, "hardware": None, "cards": []}
    return json.dumps({**empty, **changes})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "llfc" / "recipe.yaml").write_text("a: b: c"), "not valid YAML"),
        (lambda folder: (folder / "llfc" / "recipe.yaml").write_text("- 1"), "holds no recipe"),
        (lambda folder: (folder / "llfc" / "recipe.yaml").write_text("modells: []"), "recipe.yaml: the recipe cannot"),
        (lambda folder: (folder / "llfc" / "recipe.yaml").unlink(), "must name the parents"),
        (lambda folder: (folder / "llfc" / "llfc_report.json").write_text("[]"), "holds no report"),
        (lambda folder: (folder / "llfc" / "run.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "llfc" / "run.json").write_text("{}"), "no record of a run"),
        (lambda folder: (folder / "llfc" / "run.json").write_text(spoiled_record(results=[1])), "no record of a run"),
        (
            lambda folder: (folder / "llfc" / "run.json").write_text(
                spoiled_record(results=[{"loss": "1", "metrics": {}}])
            ),
            "no record of a run",
        ),
        (
            lambda folder: (folder / "llfc" / "run.json").write_text(spoiled_record(alignments=[{"axes": [{}]}])),
            "no record of a run",
        ),
        (lambda folder: (folder / "llfc" / "llfc_report.json").write_text(json.dumps({"schema": 1})), "schema"),
    ],
)
def test_a_folder_that_is_not_a_merge_is_refused(tmp_path: Path, spoil: Any, message: str) -> None:
    folder = make_folder(tmp_path, report=make_report(models=[{}, {}]))
    before = (folder / "README.md").read_text()
    spoil(folder)
    with pytest.raises(PublishingError, match=message):
        write_card(folder)
    assert (folder / "README.md").read_text() == before


def test_the_module_is_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from hf_llfc.publishing.card import card

    recipe = {"models": [{"model": str(tmp_path / "a")}, {"model": str(tmp_path / "b")}], "output_dir": "merged"}
    folder = make_folder(tmp_path / "merged", recipe=recipe)
    monkeypatch.setattr("sys.argv", ["card", str(folder), "--name", "me/x", "--license", "mit"])
    card.main()
    assert capsys.readouterr().out.strip() == str(folder / "README.md")
    assert ModelCard.load(folder / "README.md").data.license == "mit"
    monkeypatch.setattr("sys.argv", ["card", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        card.main()
    assert stopped.value.code == 2
    assert "holds no config.json" in capsys.readouterr().err


@pytest.mark.parametrize("region", ["simplex", "arithmetic"])
def test_a_merge_outside_the_models_has_no_barrier_of_its_own(region: str, tmp_path: Path) -> None:
    card = render(make_folder(tmp_path), report=make_simplex_report(3, region))
    assert ("**Barrier:" in card) == (region == "simplex")
    assert ("**No barrier.** This merge lies outside the models" in card) == (region == "arithmetic")
