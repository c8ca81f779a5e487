"""The model card of a merge: metadata that the Hub understands, and the evidence for a reader."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import PathPoint
from hf_llfc.errors import PublishingError
from hf_llfc.limited_yaml import read_yaml
from hf_llfc.publishing.facts import (
    LOSS,
    merge_point,
    metric_style,
    model_points,
    number_text,
    read_report,
    shown_layers,
)
from hf_llfc.publishing.page import PAGE_FILE, write_page
from hf_llfc.publishing.parents import (
    CARD_FILE,
    License,
    ParentInfo,
    combined_license,
    is_hub_id,
    parts_of,
    read_parent_card,
    split_revision,
    union,
)
from hf_llfc.publishing.plots import PLOT_FILES, save_plots
from hf_llfc.publishing.templates import CARD_TEMPLATE, environment
from hf_llfc.publishing.usage import task_of, usage_snippet
from hf_llfc.publishing.words import (
    alignment_words,
    barrier_words,
    display_name,
    file_name,
    headline,
    layer_summary,
    measured_on,
)

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

logger = logging.getLogger(__name__)

LLFC_FOLDER = "llfc"
REPORT_FILE = "llfc_report.json"
RECIPE_FILE = "recipe.yaml"
METHOD_FILE = "method.json"
TAGS = ("merge", "hf-llfc")
LIBRARIES = ("hf-llfc", "torch", "transformers", "safetensors", "huggingface-hub")
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
        models: As for `render_card`; those of the recipe without it. The parents' own cards are read, where they can
            be, for licence, languages and data.
        alignment: As for `render_card`.
        results: As for `render_card`.
        task: Pipeline tag.
        name: What the model is called; a Hub id makes the snippets run as they are.
        license: What the user says the licence is.
        diagnosis_problem: Why there is no diagnosis, where one was asked for and failed.
        hardware: What it was computed on, in words.
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
    given = list(models) if models is not None else _models_of(recipe, report)
    described = [
        {**model, "card": read_parent_card(model["id"], model.get("revision"), token=token, endpoint=endpoint)}
        if "card" not in model
        else model
        for model in given
    ]
    for earlier in (*PLOT_FILES.values(), PAGE_FILE):
        (ours / earlier).unlink(missing_ok=True)
    if report is not None:
        save_plots(report, ours)
        title = name or folder.resolve().name
        write_page(report, ours, title=title, hardware=hardware, links={f"../{CARD_FILE}": "the model card"})
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
            and `card`, the metadata of its own card.
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
    metadata = _metadata(name, task, parents, license_found, data, rows, recipe)
    plots = {name: (folder / LLFC_FOLDER / file).is_file() for name, file in PLOT_FILES.items()}
    context = {
        "name": name.rsplit("/", 1)[-1],
        "architecture": (config.get("architectures") or [config.get("model_type") or "model"])[0],
        "headline": headline(measured, diagnosis_problem, len([p for p in parents if not p.is_base])),
        "parents": _parent_rows(parents),
        "count": _count(len([parent for parent in parents if not parent.is_base])),
        "method": _method(recipe, parents, computed_by(folder)),
        "has_base": any(parent.is_base for parent in parents),
        "license_problem": license_found.problem,
        "data": measured_on(data),
        "results": _result_table(rows),
        "barrier": barrier_words(measured),
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
        "alignments": [alignment_words(entry) for entry in alignments if entry],
        "snippet": usage_snippet(folder, config, task, name, of_bytes=data.get("tokenizer") == "bytes"),
        "recipe": _recipe_text(recipe),
        "versions": versions or (measured.versions if measured is not None else {}) or _installed_versions(),
        "hardware": hardware,
        "limits": _limits(measured, data, parents),
    }
    body = environment().get_template(CARD_TEMPLATE).render(context)
    return f"---\n{metadata.to_yaml()}\n---\n\n{body.strip()}\n"


def _parent(model: Mapping[str, Any]) -> ParentInfo:
    model_id, revision = split_revision(str(model["id"]))
    return ParentInfo(
        id=model_id,
        revision=model.get("revision") or revision,
        weight=model.get("weight"),
        is_base=bool(model.get("is_base", False)),
        card=model.get("card") or {},
    )


def _models_of(recipe: Mapping[str, Any], report: ConnectivityReport | None) -> list[dict[str, Any]]:
    """The parents as the recipe names them, else as the report does."""
    entries = list(recipe.get("models") or [])
    models: list[dict[str, Any]] = []
    for entry, weight in zip(entries, _shares(recipe, entries), strict=True):
        model_id, revision = split_revision(str(entry["model"]))
        models.append({"id": model_id, "revision": revision, "weight": weight})
    if not models and report is not None:
        models = [{"id": m.id, "revision": m.revision, "weight": m.weight} for m in report.models if m.id is not None]
    if recipe.get("base_model"):
        model_id, revision = split_revision(str(recipe["base_model"]))
        models.append({"id": model_id, "revision": revision, "is_base": True})
    if not models:
        raise PublishingError(
            "the card must name the parents: there is neither llfc/recipe.yaml nor a report that does"
        )
    return models


def _shares(recipe: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """The weight that each model has in the merge; None where it is not one number for all tensors."""
    if not any("parameters" in entry for entry in entries):
        return [1 / len(entries) for _ in entries]
    given = [(entry.get("parameters") or {}).get("weight", 1.0) for entry in entries]
    settings = recipe.get("parameters") or {}
    weights = [float(weight) if isinstance(weight, int | float) else None for weight in given]
    total = math.fsum(weight for weight in weights if weight is not None)
    if settings.get("normalize") is True:
        weights = [None if None in weights or total == 0 or weight is None else weight / total for weight in weights]
    scale = settings.get("lambda", 1.0)
    return [None if weight is None else weight * scale for weight in weights]


# -- metadata


def _metadata(
    name: str,
    task: str | None,
    parents: Sequence[ParentInfo],
    license: License,
    data: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    recipe: Mapping[str, Any],
) -> ModelCardData:
    from huggingface_hub import ModelCardData

    on_hub = list(dict.fromkeys(part.id for parent in parents for part in parent.parts if part.is_on_hub))
    results = _eval_results(name, task, data, rows)
    return ModelCardData(
        base_model=on_hub or None,
        base_model_relation="merge" if on_hub else None,
        language=union(parents, "language") or None,
        license=license.metadata.get("license"),
        license_name=license.metadata.get("license_name"),
        license_link=license.metadata.get("license_link"),
        library_name="transformers",
        pipeline_tag=task,
        tags=list(TAGS),
        datasets=union(parents, "datasets") or None,
        model_name=name.rsplit("/", 1)[-1] if results else None,
        eval_results=results or None,
    )


def _eval_results(
    name: str, task: str | None, data: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[EvalResult]:
    """What was measured of the merge itself, for the model-index."""
    from huggingface_hub import EvalResult

    merged = next((row for row in rows if row["is_merge"]), None)
    if merged is None or task is None or not data.get("dataset"):
        return []
    dataset, revision = split_revision(str(data["dataset"]))
    if not is_hub_id(dataset):
        dataset = file_name(dataset)
    values = {"loss": merged["loss"], **merged["metrics"]}
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=" ".join(filter(None, [dataset, data.get("name")])),
            dataset_config=data.get("name"),
            dataset_split=data.get("split"),
            dataset_revision=revision,
            metric_type=metric,
            metric_name=LOSS.title if metric == "loss" else metric_style(metric).title,
            metric_value=float(f"{value:.6g}"),
        )
        for metric, value in values.items()
        if value is not None and math.isfinite(value)
    ]


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
            "weight": None if parent.weight is None else f"{parent.weight:.4g}",
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
        settings = ", ".join(f"{key} {value}" for key, value in (elsewhere.get("parameters") or {}).items())
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


def _layer_table(report: ConnectivityReport | None) -> list[dict[str, str]]:
    if report is None:
        return []
    return [
        {
            "layer": row.layer,
            "llfc": _small(row.llfc.mean),
            "baseline": _small(row.baseline.mean),
            "ratio": "–" if row.ratio is None else f"{row.ratio:.2g}",
            "coefficient": "–" if row.coefficient.mean is None else f"{row.coefficient.mean:.3f}",
        }
        for row in shown_layers(report)
    ]


def _small(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return "0" if value == 0 else f"{value:.2g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def _recipe_text(recipe: Mapping[str, Any]) -> str | None:
    """The recipe as YAML for others: names in place of the paths of local folders, and nothing about the upload."""
    import yaml

    shown = {key: value for key, value in recipe.items() if key != "publish"}
    return yaml.safe_dump(_without_paths(shown), sort_keys=False, allow_unicode=True, width=100) if shown else None


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


def _installed_versions() -> dict[str, str]:
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            logger.debug("%s is not installed as a package", library)
    return versions


def _limits(report: ConnectivityReport | None, data: Mapping[str, Any], parents: Sequence[ParentInfo]) -> list[str]:
    """What a reader must not conclude from this card."""
    limits = []
    ordinary = [parent for parent in parents if not parent.is_base]
    if report is not None:
        samples = f"{data['samples']} samples of one data set" if data.get("samples") else "one data set"
        limits.append(
            f"All numbers come from {samples}. On other data, languages or domains the merge was not measured."
        )
        if len(report.path) > 2:
            points = f"{len(report.path)} values of α" if report.region == "line" else f"{len(report.path)} points"
            limits.append(f"The barrier is the largest among {points}; between them it may be higher.")
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
