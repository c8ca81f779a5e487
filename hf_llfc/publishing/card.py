"""The model card of a merge: metadata that the Hub understands, and the evidence for a reader."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from hf_llfc.choices import UNION
from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import PathPoint
from hf_llfc.errors import PublishingError
from hf_llfc.layout import CARD_FILE, LLFC_FOLDER, METHOD_FILE, PAGE_FILE, RECIPE_FILE, REPORT_FILE
from hf_llfc.limited_yaml import read_yaml
from hf_llfc.publishing.facts import (
    LOSS,
    is_far_above,
    merge_is_outside,
    merge_point,
    metric_style,
    model_points,
    number_text,
    read_report,
    shown_layers,
)
from hf_llfc.publishing.machine import installed_versions
from hf_llfc.publishing.metadata import card_metadata
from hf_llfc.publishing.page import write_page
from hf_llfc.publishing.parents import (
    ParentInfo,
    combined_license,
    parts_of,
    read_parent_card,
    split_revision,
)
from hf_llfc.publishing.plots import PLOT_FILES, save_plots
from hf_llfc.publishing.record import RunRecord
from hf_llfc.publishing.shares import models_of, setting_in_words
from hf_llfc.publishing.templates import CARD_TEMPLATE, environment
from hf_llfc.publishing.usage import task_of, usage_snippet
from hf_llfc.publishing.words import (
    alignment_words,
    barrier_words,
    display_name,
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
    _read_json(folder / "config.json")
    if recipe is None:
        recipe = _read_yaml(ours / RECIPE_FILE) if (ours / RECIPE_FILE).is_file() else {}
    if report is None and diagnosis_problem is None and (ours / REPORT_FILE).is_file():
        report = _read_json(ours / REPORT_FILE)
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
    return _write_whole(folder / CARD_FILE, text)


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
    config = _read_json(folder / "config.json")
    measured = None if report is None else read_report(report)
    data = dict(measured.data) if measured is not None else {}
    task = task or data.get("task") or task_of(config)
    name = name or folder.resolve().name
    parents = [_parent(model) for model in models]
    license_found = combined_license(parents, license)
    rows = _result_rows(measured, results, parents)
    alignments = [alignment] if isinstance(alignment, Mapping) else list(alignment or [])
    aligned = [alignment_words(entry) for entry in alignments if entry]
    metadata = card_metadata(name, task, parents, license_found, data, rows)
    plots = {name: (folder / LLFC_FOLDER / file).is_file() for name, file in PLOT_FILES.items()}
    context = {
        "name": name.rsplit("/", 1)[-1],
        "architecture": (config.get("architectures") or [config.get("model_type") or "model"])[0],
        "headline": _headline(folder, measured, diagnosis_problem, models, results),
        "parents": _parent_rows(parents),
        "count": _count(len([parent for parent in parents if not parent.is_base])),
        "method": _method(recipe, parents, computed_by(folder)),
        "has_base": any(parent.is_base for parent in parents),
        "license_problem": license_found.problem,
        "data": measured_on(data),
        "results": _result_table(rows),
        "comparison": _comparison(rows),
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
        "layers": _layer_table(measured),
        "layers_are_many": measured is not None and len(shown_layers(measured)) > LONG_TABLE,
        "layer_summary": layer_summary(measured),
        "alignments": aligned,
        "united": recipe.get("tokenizer_source") == UNION,
        "nothing_moved": bool(aligned) and all(entry["units"] and not entry["moved"] for entry in aligned),
        "snippet": usage_snippet(folder, config, task, name, of_bytes=data.get("tokenizer") == "bytes"),
        "recipe": _recipe_text(recipe),
        "seeds": _seeds(recipe),
        "commits": [part for parent in parents for part in parent.parts if part.is_on_hub and part.revision],
        "versions": versions or (measured.versions if measured is not None else {}) or installed_versions(),
        "hardware": hardware,
        "limits": _limits(measured, data, parents, rows),
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


# -- the body, each part as plain values for the template


def _count(number: int) -> str:
    words = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")
    return words[number] if number < len(words) else str(number)


def _letters(parents: Sequence[ParentInfo]) -> list[str]:
    """A, B, … for the parents, 0 for the base."""
    names = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    return ["θ₀" if parent.is_base else next(names, "…") for parent in parents]


def _parent_rows(parents: Sequence[ParentInfo]) -> list[dict[str, Any]]:
    return [
        {
            "letter": letter,
            "parts": [
                {"name": part.name, "is_on_hub": part.is_on_hub, "id": part.id, "revision": part.revision}
                for part in parent.parts
            ],
            "weight": "base" if parent.is_base else parent.share_in_words,
            "license": parent.license,
        }
        for letter, parent in zip(_letters(parents), parents, strict=True)
    ]


def computed_by(folder: Path) -> dict[str, Any] | None:
    """What another program was asked for that computed the weights; None where they were computed here."""
    path = folder / LLFC_FOLDER / METHOD_FILE
    return _read_json(path) if path.is_file() else None


def _method(recipe: Mapping[str, Any], parents: Sequence[ParentInfo], elsewhere: Mapping[str, Any] | None) -> str:
    """How the parents were combined, as a formula where it is short."""
    if elsewhere is not None:
        settings = ", ".join(
            f"{key} {setting_in_words(value)}" for key, value in (elsewhere.get("parameters") or {}).items()
        )
        computed = f"{elsewhere.get('title')}, computed by mergekit {elsewhere.get('mergekit')}"
        return f"{computed} with {settings} and seed {elsewhere.get('seed')}" if settings else computed
    tensors = [(letter, p.weight) for letter, p in zip(_letters(parents), parents, strict=True) if not p.is_base]
    is_short = len(tensors) <= 4 and all(weight is not None for _, weight in tensors)
    if recipe.get("merge_method") == "task_arithmetic":
        terms = (
            " + ".join(f"{weight:.4g}·({letter} − θ₀)" for letter, weight in tensors) if is_short else "Σ λᵢ·(θᵢ − θ₀)"
        )
        return f"task arithmetic, θ₀ + {terms}"
    terms = " + ".join(f"{weight:.4g}·{letter}" for letter, weight in tensors) if is_short else "Σ wᵢ·θᵢ"
    return f"weighted average, {terms}"


def _result_rows(
    report: ConnectivityReport | None, results: Sequence[Mapping[str, Any]] | None, parents: Sequence[ParentInfo]
) -> list[dict[str, Any]]:
    """Loss and metrics, a row a model, the merge in its place; empty without numbers."""
    if results:
        return [
            {
                "id": str(row.get("id") or ""),
                "is_merge": bool(row.get("is_merge", False)),
                "loss": row.get("loss"),
                "metrics": dict(row.get("metrics") or {}),
            }
            for row in results
        ]
    if report is None:
        return []
    rows = []
    for point, model in (
        *zip(model_points(report), range(len(report.models)), strict=True),
        (merge_point(report), None),
    ):
        if point is None or not _has_numbers(point):
            continue
        model_id = "" if model is None or model >= len(report.models) else report.models[model].id or ""
        rows.append({"id": model_id, "is_merge": model is None, "loss": point.loss, "metrics": dict(point.metrics)})
    return rows


def _has_numbers(point: PathPoint) -> bool:
    return point.loss is not None or any(value is not None for value in point.metrics.values())


def _result_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The rows as cells of text."""
    if not rows:
        return None
    metrics = list(dict.fromkeys(metric for row in rows for metric in row["metrics"]))
    styles = [(metric, metric_style(metric)) for metric in metrics]
    arrows = {True: " ↑", False: " ↓", None: ""}
    has_loss = any(row["loss"] is not None for row in rows)
    heads = (["loss ↓"] if has_loss else []) + [style.title + arrows[style.higher_is_better] for _, style in styles]
    cells = []
    for row in rows:
        values = [number_text(row["loss"], LOSS)] if has_loss else []
        values += [number_text(row["metrics"].get(metric), style) for metric, style in styles]
        name = "this merge" if row["is_merge"] else display_name(str(row["id"]))
        cells.append({"name": name, "is_merge": row["is_merge"], "values": values})
    return {"heads": heads, "rows": cells}


def _comparison(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Whether a parent alone has the lower loss, in one sentence."""
    losses = {display_name(str(row["id"])): row["loss"] for row in rows if not row["is_merge"]}
    losses = {name: loss for name, loss in losses.items() if loss is not None and math.isfinite(loss)}
    own = next((row["loss"] for row in rows if row["is_merge"]), None)
    if own is None or not math.isfinite(own) or not losses:
        return None
    best = min(losses, key=lambda name: losses[name])
    if own < losses[best]:
        return "On these data the merge has a lower loss than every one of its parents."
    if len(losses) > 1 and own >= max(losses.values()):
        return "On these data every one of its parents alone does as well or better, by loss."
    return f"On these data {best} alone does as well or better, by loss."


def _layer_table(report: ConnectivityReport | None) -> list[dict[str, str]]:
    if report is None:
        return []
    return [
        {
            "layer": row.layer,
            "llfc": _small(row.llfc.mean),
            "baseline": _small(row.baseline.mean),
            "ratio": _small(row.ratio),
            "coefficient": "–" if row.coefficient.mean is None else f"{row.coefficient.mean:.3f}",
        }
        for row in shown_layers(report)
    ]


def _small(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return "0" if value == 0 else _two_digits(value) if abs(value) >= 1e-3 else f"{value:.1e}"


def _two_digits(value: float) -> str:
    """Two digits that count, also where the second is a zero."""
    return f"{value:#.2g}".rstrip(".") if abs(value) < 100 else f"{value:.0f}"


def _recipe_text(recipe: Mapping[str, Any]) -> str | None:
    """The recipe as YAML for others: names in place of the paths of local folders, and nothing about the upload."""
    import yaml

    shown = {key: value for key, value in recipe.items() if key != "publish"}
    if not shown:
        return None
    # Lists of numbers go into one line.
    return yaml.safe_dump(
        _without_paths(shown), sort_keys=False, allow_unicode=True, width=100, default_flow_style=None
    )


def _seeds(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every seed of the recipe by its key, those of sections behind their section's name."""
    seeds = [{"key": "seed", "value": recipe["seed"]}] if "seed" in recipe else []
    sections = {key: value for key, value in recipe.items() if isinstance(value, Mapping) and "seed" in value}
    return seeds + [{"key": f"{key}.seed", "value": value["seed"]} for key, value in sections.items()]


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and len(parts := parts_of(value)) > 1:
        return "+".join(str(_without_paths(part)) for part in parts)
    if isinstance(value, str | PurePath) and os.path.isabs(value):
        return f"./{PurePath(value).name}"
    return str(value) if isinstance(value, PurePath) else value


def _limits(
    report: ConnectivityReport | None,
    data: Mapping[str, Any],
    parents: Sequence[ParentInfo],
    rows: Sequence[Mapping[str, Any]],
) -> list[str]:
    """What a reader must not conclude from this card."""
    limits = []
    if report is None:
        limits.append("Nothing was measured: whether this model can do what its parents can is not known.")
    ordinary = [parent for parent in parents if not parent.is_base]
    if report is not None:
        samples = f"{data['samples']} samples of one data set" if data.get("samples") else "one data set"
        limits.append(
            f"All numbers come from {samples}. On other data, languages or domains the merge was not measured."
        )
        if len(report.path) > 2:
            points = f"{len(report.path)} values of α" if report.region == "line" else f"{len(report.path)} points"
            limits.append(f"The barrier is the largest among {points}; between them it may be higher.")
        if (error := _standard_error(data, rows)) is not None:
            limits.append(error)
        if report.barrier.loss is None:
            limits.append("There were no labels: features were compared, loss and metric were not measured.")
        if len(ordinary) > 2 and report.region == "line":
            limits.append(f"Path and layers were measured for two of the {len(ordinary)} parents.")
        elif merge_point(report) is None:
            limits.append("The merge itself does not lie on the path that was measured.")
    limits.append("What the parents get wrong, and the biases they learnt, can be inherited by the merge.")
    local = [parent.name for parent in parents if not parent.is_on_hub]
    if local:
        limits.append(f"Not on the Hub, so that others cannot repeat the merge: {', '.join(local)}.")
    source = measured_on(data) if report is not None else None
    if source is not None and source["link"] is None:
        limits.append(f"Not on the Hub, so that others cannot repeat the measurement: {source['name']}.")
    return limits


def _standard_error(data: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """How far chance alone moves an accuracy: √(p(1−p)/n) of a share p of n samples."""
    merged = next((row["metrics"].get("accuracy") for row in rows if row["is_merge"]), None)
    samples = data.get("samples")
    if merged is None or not 0 <= merged <= 1 or not isinstance(samples, int) or samples < 1:
        return None
    error = 100 * math.sqrt(merged * (1 - merged) / samples)
    return f"With {samples} samples the accuracy of this merge has a standard error of {error:.1f} points."


# -- files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PublishingError(f"{path.parent} holds no {path.name}; give the output folder of a merge") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PublishingError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise PublishingError(f"{path} holds no JSON object")
    return values


def _read_yaml(path: Path) -> dict[str, Any]:
    values = read_yaml(path, PublishingError)
    if not isinstance(values, dict):
        raise PublishingError(f"{path} holds no recipe")
    return values


def _write_whole(path: Path, text: str) -> Path:
    """Writes a file so that it is there as a whole or not at all."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", newline="\n", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


def main() -> None:
    """`python -m hf_llfc.publishing.card FOLDER`: writes the card of a folder again from what lies in its llfc/."""
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
