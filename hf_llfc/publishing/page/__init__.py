"""The interactive report: one HTML file beside the card that asks nothing of a network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.foundation.layout import PAGE_FILE, RECIPE_FILE, REPORT_FILE
from hf_llfc.publishing.card.templates import environment
from hf_llfc.publishing.numbers import capitalized, weights_text
from hf_llfc.publishing.page.charts import path_charts
from hf_llfc.publishing.page.layers import layer_map
from hf_llfc.publishing.page.summary import key_facts, meaning, provenance
from hf_llfc.publishing.reading import merge_point
from hf_llfc.publishing.tables import decomposition_table, page_tables, path_table
from hf_llfc.publishing.words import Headline, decomposition_summary, headline, layer_summary

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

_FOLDER = Path(__file__).resolve().parent
_COMPANIONS = {
    REPORT_FILE: "all numbers, as JSON",
    RECIPE_FILE: "the recipe as run",
    "alignment.safetensors": "the alignment",
}
_SAFE_JSON = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def write_page(
    report: ConnectivityReport,
    folder: str | Path,
    *,
    title: str | None = None,
    hardware: str | None = None,
    links: Mapping[str, str] | None = None,
    lead: Headline | None = None,
) -> Path:
    """Writes the interactive report beside the files it links to.

    Args:
        report: The report.
        folder: The `llfc` folder of an output; created if need be.
        title: What the merge is called; the names of its parents without it.
        hardware: What it was computed on, in words.
        links: Further files, and what they hold.
        lead: The headline; the report's verdict without it.

    Returns:
        The path of the page.

    Raises:
        PublishingError: The report says of its data or alignment what none of this package does.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    beside = {name: says for name, says in _COMPANIONS.items() if (folder / name).is_file()}
    text = render_page(report, title=title, hardware=hardware, links={**beside, **(links or {})}, lead=lead)
    (folder / PAGE_FILE).write_text(text, encoding="utf-8", newline="\n")
    return folder / PAGE_FILE


def render_page(
    report: ConnectivityReport,
    *,
    title: str | None = None,
    hardware: str | None = None,
    links: Mapping[str, str] | None = None,
    lead: Headline | None = None,
) -> str:
    """The interactive report as HTML: whole without its script, which only sorts, filters and points.

    Args:
        report: The report. Whatever strangers wrote into it is shown as text.
        title: What the merge is called; the names of its parents without it.
        hardware: What it was computed on, in words.
        links: Files beside the page, and what they hold.
        lead: The headline; the report's verdict without it.

    Raises:
        PublishingError: The report says of its data or alignment what none of this package does.
    """
    style, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    layers = layer_map(report)
    parents = len(report.models) - (report.region == "arithmetic")
    facts = provenance(report, hardware)
    merged = merge_point(report)
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            title=title or " + ".join(model["name"] for model in facts["models"]) or "Merge",
            policy=_policy(style, script),
            style=style,
            script=script,
            data=_safe_json(layers.data if layers is not None else {}),
            answer=report.verdict.answer,
            headline=lead or headline(report, parents),
            meaning=meaning(report),
            facts=key_facts(report),
            charts=path_charts(report),
            path=path_table(report),
            decomposition=decomposition_table(report),
            decomposition_summary=decomposition_summary(report),
            on_line=report.region == "line",
            merged=merged,
            layers=layers,
            layer_summary=layer_summary(report),
            measures=page_tables(report),
            suggestion=report.suggestion,
            provenance=facts,
            links=links or {},
        )
    )


def _safe_json(values: Any) -> str:
    """JSON that ends neither its element nor a line of a script, whatever it says; its texts are those of the page."""
    text = json.dumps(_without_controls(values), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_SAFE_JSON)


def _policy(style: str, script: str) -> str:
    """A content security policy under which this style and this script run and nothing is loaded."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)
    )
    return (
        f"default-src 'none'; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _environment() -> jinja2.Environment:
    page = environment(_FOLDER, autoescape=True, finalize=_without_controls)
    page.filters |= {"breakable": _breakable, "capitalized": capitalized, "weights": weights_text}
    return page


def _breakable(name: str) -> Markup:
    """The name of a module as markup that may go on in the next line after each of its dots."""
    from markupsafe import Markup

    return Markup(".<wbr>").join(_without_controls(name).split("."))


def _without_controls(value: Any) -> Any:
    """Text without what turns its direction or hides; markup of the template's own stays as it is."""
    if type(value) is str:
        return "".join(sign if sign.isprintable() else " " for sign in value)
    if type(value) in (list, tuple):
        return [_without_controls(item) for item in value]
    if type(value) is dict:
        return {key: _without_controls(item) for key, item in value.items()}
    return value
