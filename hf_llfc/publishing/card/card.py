"""The model card of a merge: metadata that the Hub understands, and the evidence for a reader."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.errors import PublishingError
from hf_llfc.foundation.choices import UNION
from hf_llfc.foundation.layout import CARD_FILE, LLFC_FOLDER, PAGE_FILE, RECIPE_FILE, REPORT_FILE
from hf_llfc.foundation.model_names import split_revision
from hf_llfc.publishing.card.metadata import card_metadata
from hf_llfc.publishing.card.results import comparison, result_rows, result_table
from hf_llfc.publishing.card.sections import (
    layer_table,
    limits_of,
    method_words,
    number_word,
    parent_rows,
    recipe_text,
    seeds_of,
)
from hf_llfc.publishing.card.templates import CARD_TEMPLATE, environment
from hf_llfc.publishing.card.usage import task_of, usage_snippet
from hf_llfc.publishing.files import computed_by, read_json, read_recipe, write_whole
from hf_llfc.publishing.lineage import ParentInfo, combined_license, read_parent_card
from hf_llfc.publishing.machine import installed_versions
from hf_llfc.publishing.page import write_page
from hf_llfc.publishing.plots import PLOT_FILES, save_plots
from hf_llfc.publishing.reading import (
    LOSS,
    is_far_above,
    merge_is_outside,
    number_text,
    read_report,
    shown_layers,
)
from hf_llfc.publishing.record import RunRecord
from hf_llfc.publishing.shares import models_of
from hf_llfc.publishing.words import (
    alignment_words,
    barrier_words,
    headline,
    layer_summary,
    measured_on,
)

MORE_PLOTS = {
    "heatmap": ("LLFC at every point", "1 − cosine of merged features and blend, every layer at every measured point"),
    "additivity": ("weak additivity", "Weak additivity of every activation function, against the parents' distance"),
    "commutativity": (
        "commutativity",
        "Commutativity of every linear map, beside the distances of weights and of inputs",
    ),
    "stitching": ("stitching", "Loss and metric of one parent up to a layer and the other one from there on"),
    "weight_geometry": ("weights", "Effective rank of both parents' weights, and the angles between them"),
    "feature_geometry": ("features", "Effective rank of both parents' features, and the angles between them"),
}
"""Pictures that are folded away in a card: what a reader calls them, and what they show."""
LONG_TABLE = 16
"""Layers from which on their table is folded away."""


def write_card(
    folder: str | Path,
    *,
    recipe: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | ConnectivityReport | None = None,
    models: Sequence[Mapping[str, Any]] | None = None,
    alignment: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    results: Sequence[Mapping[str, Any]] | None = None,
    task: str | None = None,
    name: str | None = None,
    license: str | None = None,
    diagnosis_problem: str | None = None,
    hardware: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> Path:
    """Writes the card, its plots and the interactive report into an output folder.

    Args:
        folder: The merged checkpoint; the card becomes its README.md, plots and report go to llfc/.
        recipe: As run; llfc/recipe.yaml without it.
        report: The diagnosis; llfc/llfc_report.json without it, if that is there.
        models: As for `render_card`; those of the recipe without it. The parents' own cards are read for licence,
            languages and data; where they cannot be, what llfc/run.json says of them counts.
        alignment: As for `render_card`; what llfc/run.json says without it.
        results: As for `render_card`; what llfc/run.json says without them.
        task: Pipeline tag.
        name: What the model is called; a Hub id makes the snippets run as they are.
        license: What the user says the licence is.
        diagnosis_problem: Why there is no diagnosis, where one was asked for and failed.
        hardware: What it was computed on, in words; what llfc/run.json says without it.
        token: To read the cards of private parents.
        endpoint: Of the Hub, where it is not the usual one.

    Returns:
        The path of the card.

    Raises:
        PublishingError: The folder holds no checkpoint, or a file in llfc/ cannot be read.
    """
    folder = Path(folder)
    ours = folder / LLFC_FOLDER
    read_json(folder / "config.json")
    if recipe is None:
        recipe = read_recipe(ours / RECIPE_FILE) if (ours / RECIPE_FILE).is_file() else {}
    if report is None and diagnosis_problem is None and (ours / REPORT_FILE).is_file():
        report = read_json(ours / REPORT_FILE)
    report = None if report is None else read_report(report)
    record = RunRecord.load(folder)
    given = list(models) if models is not None else models_of(recipe, report)
    recorded = record.cards if models is None and len(record.cards) == len(given) else [{}] * len(given)
    described = [
        model if "card" in model else {**model, "card": parent_card(model, token=token, endpoint=endpoint) or earlier}
        for model, earlier in zip(given, recorded, strict=True)
    ]
    alignment = record.alignments if alignment is None else alignment
    results = (record.results or None) if results is None else results
    hardware = hardware or record.hardware
    for earlier in (*PLOT_FILES.values(), PAGE_FILE):
        (ours / earlier).unlink(missing_ok=True)
    if report is not None:
        save_plots(report, ours)
        title = name or folder.resolve().name
        lead = _headline(folder, report, diagnosis_problem, described, results)
        links = {f"../{CARD_FILE}": "the model card"}
        write_page(report, ours, title=title, hardware=hardware, links=links, lead=lead)
    text = render_card(
        folder,
        recipe=recipe,
        report=report,
        models=described,
        alignment=alignment,
        results=results,
        task=task,
        name=name,
        license=license,
        diagnosis_problem=diagnosis_problem,
        hardware=hardware,
        versions=record.versions or None,
    )
    return write_whole(folder / CARD_FILE, text)


def render_card(
    folder: str | Path,
    *,
    recipe: Mapping[str, Any],
    report: Mapping[str, Any] | ConnectivityReport | None,
    models: Sequence[Mapping[str, Any]],
    alignment: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    results: Sequence[Mapping[str, Any]] | None = None,
    task: str | None = None,
    name: str | None = None,
    license: str | None = None,
    diagnosis_problem: str | None = None,
    hardware: str | None = None,
    versions: Mapping[str, str] | None = None,
) -> str:
    """The card of a merge as text. Asks no network and writes nothing.

    Args:
        folder: The merged checkpoint: its config says the architecture, its files how to use it, and plots are shown
            where llfc/ has them.
        recipe: As run.
        report: The diagnosis, if there is one.
        models: The parents, the first α of the path in front: `id` and, where known, `revision`, `weight`, `is_base`
            and `card`, the metadata of its own card; `share` says in words what is no one weight.
        alignment: Summaries of the alignments: `method`, `model`, `reference`, `axes` (mappings with `axis`, `moved`
            and `units`), and any of `objective_before`, `objective_after`, `cosine_before` and `cosine_after`.
        results: Loss and metrics of parents and merge on the same data: mappings with `id`, `loss`, `metrics` and,
            for the merge, `is_merge`. Without them they are taken from the path, where the merge lies on it.
        task: Pipeline tag; else that of the report's data, or of the architecture.
        name: What the model is called, best its Hub id; the folder's name without it.
        license: What the user says the licence is, instead of what the parents say.
        diagnosis_problem: Why there is no diagnosis, where one was asked for and failed.
        hardware: What it was computed on, in words.
        versions: Of the libraries; else those of the report, or those installed.

    Returns:
        Metadata and Markdown.

    Raises:
        PublishingError: The folder holds no checkpoint, or the report is not one.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    measured = None if report is None else read_report(report)
    data = dict(measured.data) if measured is not None else {}
    task = task or data.get("task") or task_of(config)
    name = name or folder.resolve().name
    parents = [_parent(model) for model in models]
    license_found = combined_license(parents, license)
    rows = result_rows(measured, results)
    alignments = [alignment] if isinstance(alignment, Mapping) else list(alignment or [])
    aligned = [alignment_words(entry) for entry in alignments if entry]
    metadata = card_metadata(name, task, parents, license_found, data, rows)
    plots = {name: (folder / LLFC_FOLDER / file).is_file() for name, file in PLOT_FILES.items()}
    context = {
        "name": name.rsplit("/", 1)[-1],
        "architecture": (config.get("architectures") or [config.get("model_type") or "model"])[0],
        "headline": _headline(folder, measured, diagnosis_problem, models, results),
        "parents": parent_rows(parents),
        "count": number_word(len([parent for parent in parents if not parent.is_base])),
        "method": method_words(recipe, parents, computed_by(folder)),
        "has_base": any(parent.is_base for parent in parents),
        "license_problem": license_found.problem,
        "data": measured_on(data),
        "results": result_table(rows),
        "comparison": comparison(rows),
        "barrier": barrier_words(measured),
        "is_outside": measured is not None and merge_is_outside(measured),
        "is_average": computed_by(folder) is None,
        "page": PAGE_FILE if (folder / LLFC_FOLDER / PAGE_FILE).is_file() else None,
        "on_line": measured is None or measured.region == "line",
        "plots": plots,
        "more_plots": [
            {"name": name, "says": says, "file": PLOT_FILES[key]}
            for key, (name, says) in MORE_PLOTS.items()
            if plots[key]
        ],
        "layers": layer_table(measured),
        "layers_are_many": measured is not None and len(shown_layers(measured)) > LONG_TABLE,
        "layer_summary": layer_summary(measured),
        "alignments": aligned,
        "united": recipe.get("tokenizer_source") == UNION,
        "nothing_moved": bool(aligned) and all(entry["units"] and not entry["moved"] for entry in aligned),
        "snippet": usage_snippet(folder, config, task, name, of_bytes=data.get("tokenizer") == "bytes"),
        "recipe": recipe_text(recipe),
        "seeds": seeds_of(recipe),
        "commits": [part for parent in parents for part in parent.parts if part.is_on_hub and part.revision],
        "versions": versions or (measured.versions if measured is not None else {}) or installed_versions(),
        "hardware": hardware,
        "limits": limits_of(measured, data, parents, rows),
    }
    body = environment().get_template(CARD_TEMPLATE).render(context)
    return f"---\n{metadata.to_yaml()}\n---\n\n{body.strip()}\n"


def parent_card(
    model: Mapping[str, Any], *, token: str | bool | None = None, endpoint: str | None = None
) -> dict[str, Any]:
    """The metadata of the card of one of `models_of`; empty if it has none, or cannot be read."""
    return read_parent_card(model["id"], model.get("revision"), token=token, endpoint=endpoint)


def _parent(model: Mapping[str, Any]) -> ParentInfo:
    model_id, revision = split_revision(str(model["id"]))
    return ParentInfo(
        id=model_id,
        revision=model.get("revision") or revision,
        weight=model.get("weight"),
        is_base=bool(model.get("is_base", False)),
        card=model.get("card") or {},
        share=model.get("share"),
    )


def _headline(
    folder: Path,
    report: ConnectivityReport | None,
    problem: str | None,
    models: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]] | None,
) -> dict[str, str]:
    """The verdict in one sentence; a merge that was evaluated and found broken is called that first."""
    losses: dict[bool, list[float]] = {True: [], False: []}
    for row in results or ():
        losses[bool(row.get("is_merge"))] += [row["loss"]] if row.get("loss") is not None else []
    own, of_parents = losses[True][:1], [loss for loss in losses[False] if math.isfinite(loss)]
    if own and not math.isfinite(own[0]):
        return {"lead": "The merge is broken.", "text": "Its loss is not finite."}
    found = headline(
        report,
        problem,
        len([model for model in models if not model.get("is_base")]),
        is_on_path=computed_by(folder) is None,
    )
    if not own or not of_parents:
        return found
    listed = " and ".join(number_text(loss, LOSS) for loss in of_parents)
    values = f"loss is {number_text(own[0], LOSS)}, that of its parents {listed}."
    if is_far_above(own[0], of_parents):
        return {"lead": "Warning. The merge is far worse than its parents.", "text": f"Its {values} {found['text']}"}
    if computed_by(folder) is not None:
        return {**found, "text": f"{found['text']} This merge is no average: its {values}"}
    return found


def main() -> None:
    """`python -m hf_llfc.publishing.card.card FOLDER`: writes the card of a folder again from its llfc/."""
    import argparse

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", help="what the model is called; a Hub id makes the snippet run as it is")
    parser.add_argument("--license", help="the licence, where it is not that of the parents")
    options = parser.parse_args()
    try:
        print(write_card(options.folder, name=options.name, license=options.license))
    except PublishingError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
