"""The model card of a merge: metadata that the Hub understands, and the evidence for a reader."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_llfc.checkpoints.companions import MODULES_FILE
from hf_llfc.checkpoints.writing.listing import rewriting
from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.errors import PublishingError
from hf_llfc.foundation.choices import UNION
from hf_llfc.foundation.layout import CARD_FILE, LLFC_FOLDER, PAGE_FILE, RECIPE_FILE, REPORT_FILE
from hf_llfc.publishing.card.adapter import LIBRARY, adapter_snippet, adapter_words, config_of
from hf_llfc.publishing.card.calibration import calibration_words, limit_of_calibration
from hf_llfc.publishing.card.metadata import SENTENCES, card_metadata, eval_results
from hf_llfc.publishing.card.results import comparison, result_rows, result_table
from hf_llfc.publishing.card.sections import (
    layer_table,
    letters_of,
    limits_of,
    method_words,
    number_word,
    recipe_text,
    seeds_of,
    stack_table,
)
from hf_llfc.publishing.card.templates import CARD_TEMPLATE, environment
from hf_llfc.publishing.card.usage import task_of, usage_snippet
from hf_llfc.publishing.files import read_json, read_recipe, write_whole
from hf_llfc.publishing.lineage import ParentInfo, combined_license, models_of, read_parent_card
from hf_llfc.publishing.machine import installed_versions
from hf_llfc.publishing.numbers import LOSS, is_number, value_text
from hf_llfc.publishing.page import write_page
from hf_llfc.publishing.plots import PLOT_FILES, save_plots
from hf_llfc.publishing.reading import is_far_above, merge_is_outside, read_report
from hf_llfc.publishing.record import MeasuredData, RunRecord
from hf_llfc.publishing.words import (
    Headline,
    alignment_sentence,
    barrier_words,
    calibrated_on,
    decomposition_summary,
    headline,
    layer_summary,
)
from hf_llfc.recipe import Recipe

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
    "blocks": ("blocks", "What every block adds to the barrier, and how much of the drift of features arises there"),
    "fold": ("ways over the merge", "Barrier and length of the ways from every parent to the merge, and over it"),
    "importance": ("importance", "Importance of every block in every parent, as a share of the whole parent's"),
    "units": ("active units", "Units that are always or never active, in the parents and in the merge"),
    "classes": ("classes", "How well every layer tells classes apart, in the parents, their blend, and the merge"),
    "settling": ("settled answers", "After which block answers are settled, in the parents and in the merge"),
}
"""Pictures that are folded away in a card: what a reader calls them, and what they show."""
LONG_TABLE = 16
"""Layers from which on their table is folded away."""


@dataclass(frozen=True)
class Evidence:
    """Everything that a card tells, beside the checkpoint itself.

    Attributes:
        parents: The models merged, the first α of the path in front, the base of task arithmetic last.
        recipe: As run, if it is known.
        report: The diagnosis, if there is one.
        record: Alignments, results, versions and hardware of the run.
    """

    parents: Sequence[ParentInfo]
    recipe: Recipe | None = None
    report: ConnectivityReport | None = None
    record: RunRecord = field(default_factory=RunRecord)

    @classmethod
    def read(cls, folder: str | Path, *, ask: bool = True) -> Evidence:
        """Reads the evidence that lies in llfc/ of an output folder.

        The parents' own cards are read for licence, languages and data; where they cannot be, what llfc/run.json says
        of them counts.

        Args:
            folder: The output folder.
            ask: Whether the parents' cards are read anew, from the Hub if they are there.

        Raises:
            PublishingError: A file in llfc/ cannot be read, or nothing names the parents.
        """
        ours = Path(folder) / LLFC_FOLDER
        recipe = read_recipe(ours / RECIPE_FILE) if (ours / RECIPE_FILE).is_file() else None
        report = read_report(ours / REPORT_FILE) if (ours / REPORT_FILE).is_file() else None
        record, parents = RunRecord.load(Path(folder)), models_of(recipe, report)
        recorded = record.cards if len(record.cards) == len(parents) else [{}] * len(parents)
        parents = [
            replace(
                parent,
                card=(ask and read_parent_card(parent.id, parent.revision)) or earlier,
                is_gone=index in record.gone,
            )
            for index, (parent, earlier) in enumerate(zip(parents, recorded, strict=True))
        ]
        return cls(parents, recipe, report, record)

    @property
    def is_average(self) -> bool:
        """Whether the merge is a weighted sum of its parents, or of their differences from the base."""
        is_sum = self.recipe is None or self.recipe.method is None
        return is_sum and self.record.calibration is None

    @property
    def merged(self) -> list[ParentInfo]:
        """The parents without the base."""
        return [parent for parent in self.parents if not parent.is_base]


def write_card(
    folder: str | Path, evidence: Evidence | None = None, *, name: str | None = None, license: str | None = None
) -> Path:
    """Writes the card, its plots and the interactive report into an output folder.

    Args:
        folder: The merged checkpoint; the card becomes its README.md, plots and report go to llfc/.
        evidence: What the card tells; that in llfc/ without it.
        name: What the model is called; a Hub id makes the snippets run as they are.
        license: What the user says the licence is.

    Returns:
        The path of the card.

    Raises:
        PublishingError: The folder holds no checkpoint, or a file in llfc/ cannot be read.
    """
    folder = Path(folder)
    ours = folder / LLFC_FOLDER
    if not (folder / "adapter_config.json").is_file():
        read_json(folder / "config.json")
    evidence = Evidence.read(folder) if evidence is None else evidence
    with rewriting(folder):
        for earlier in (*PLOT_FILES.values(), PAGE_FILE):
            (ours / earlier).unlink(missing_ok=True)
        if evidence.report is not None:
            save_plots(evidence.report, ours)
            _write_page(folder, evidence, name)
        return write_whole(folder / CARD_FILE, render_card(folder, evidence, name=name, license=license))


def _write_page(folder: Path, evidence: Evidence, name: str | None) -> None:
    """Writes the interactive report beside the card."""
    assert evidence.report is not None
    write_page(
        evidence.report,
        folder / LLFC_FOLDER,
        title=name or folder.resolve().name,
        hardware=evidence.record.hardware,
        links={f"../{CARD_FILE}": "the model card"},
        lead=_headline(evidence),
    )


def rename_card(folder: Path, name: str) -> bool:
    """Makes the card one for another name, the repository that it goes to say; what a user changed in it stays.

    Args:
        folder: An output folder with its card.
        name: What the model is called from now on.

    Returns:
        Whether anything had to be changed.

    Raises:
        PublishingError: The folder holds no checkpoint, or a file in llfc/ cannot be read.
    """
    evidence = Evidence.read(folder, ask=False)
    recipe, path = evidence.recipe, folder / CARD_FILE
    earlier = evidence.record.name
    if earlier is None:
        earlier = Path(recipe.output_dir).name if recipe is not None else folder.resolve().name
    if earlier == name or not path.is_file():
        return False
    license = recipe.publish.license if recipe is not None and recipe.publish is not None else None
    cards = [render_card(folder, evidence, name=each, license=license) for each in (earlier, name)]
    pairs = zip(*(card.splitlines() for card in cards), strict=False)  # a name changes words, not lines
    changed = {before: after for before, after in pairs if before != after}
    lines = path.read_text(encoding="utf-8").split("\n")
    with rewriting(folder):
        write_whole(path, "\n".join(changed.get(line, line) for line in lines))
        if evidence.report is not None and (folder / LLFC_FOLDER / PAGE_FILE).is_file():
            _write_page(folder, evidence, name)
        replace(evidence.record, name=name).save(folder)
    return True


def render_card(folder: str | Path, evidence: Evidence, *, name: str | None = None, license: str | None = None) -> str:
    """The card of a merge as text. Asks no network and writes nothing.

    Args:
        folder: The merged checkpoint: its config says the architecture, its files how to use it, and plots are shown
            where llfc/ has them.
        evidence: What the card tells. Where no results were measured they are taken from the path, if the merge lies
            on it; without recorded versions those of the report count, or those installed.
        name: What the model is called, best its Hub id; the folder's name without it.
        license: What the user says the licence is, instead of what the parents say.

    Returns:
        Metadata and Markdown.

    Raises:
        PublishingError: The folder holds no checkpoint, or the report is not one of this package.
    """
    folder = Path(folder)
    config, adapter = config_of(folder, evidence.record), evidence.record.adapter
    name = name or folder.resolve().name
    data = MeasuredData.of(evidence.report)
    of_sentences = (folder / MODULES_FILE).is_file()
    task = data.task or task_of(config) or ("sentence-similarity" if of_sentences else None)
    library = LIBRARY if adapter is not None else SENTENCES if of_sentences else "transformers"
    license_found = combined_license(evidence.parents, license)
    rows = result_rows(evidence.report, evidence.record.results)
    metadata = card_metadata(name, task, evidence.parents, license_found, eval_results(task, data, rows), library)
    context = {
        "name": name.rsplit("/", 1)[-1],
        "architecture": (config.get("architectures") or [config.get("model_type") or "model"])[0],
        "license_problem": license_found.problem,
        "data": data if data.dataset else None,
        "results": result_table(rows),
        "comparison": comparison(rows),
        "snippet": usage_snippet(folder, config, task, name, of_bytes=data.tokenizer == "bytes")
        if adapter is None
        else adapter_snippet(adapter, task, name),
        "adapter": adapter_words(adapter),
        "limits": limits_of(evidence.report, data, evidence.parents, rows),
        **_of_merge(evidence),
        **_of_report(folder, evidence.report),
    }
    if (limit := limit_of_calibration(evidence.record.calibration, data)) is not None:
        context["limits"].insert(0, limit)
    body = environment().get_template(CARD_TEMPLATE).render(context)
    return f"---\n{metadata.to_yaml()}\n---\n\n{body.strip()}\n"


def _of_merge(evidence: Evidence) -> dict[str, Any]:
    """What the template shows of parents, recipe and run."""
    recipe, report, record = evidence.recipe, evidence.report, evidence.record
    return {
        "headline": _headline(evidence),
        "parents": list(zip(letters_of(evidence.parents), evidence.parents, strict=True)),
        "count": number_word(len(evidence.merged)),
        "method": _method_words(evidence),
        "calibration": calibration_words(record.calibration, report),
        "stack": stack_table(recipe),
        "has_base": any(parent.is_base for parent in evidence.parents),
        "is_average": evidence.is_average,
        "alignments": [alignment_sentence(alignment) for alignment in record.alignments],
        "nothing_moved": bool(record.alignments) and all(a.units and not a.moved for a in record.alignments),
        "vocabulary": record.vocabulary,
        "united": recipe is not None and recipe.tokenizer_source == UNION,
        "gone": [parent.name for parent in evidence.parents if parent.is_gone],
        "local": any(not part.is_on_hub and not part.is_gone for parent in evidence.parents for part in parent.parts),
        "recipe": recipe_text(recipe, can_run=not any(parent.is_gone for parent in evidence.parents)),
        "warnings": record.warnings,
        "proofs": record.proofs,
        "left": record.left,
        "quantised": record.quantised,
        "tensors": record.tensors.sentence if record.tensors is not None else None,
        "seeds": seeds_of(recipe),
        "commits": [part for parent in evidence.parents for part in parent.parts if part.is_on_hub and part.revision],
        "versions": record.versions or (report.versions if report is not None else {}) or installed_versions(),
        "hardware": record.hardware,
    }


def _method_words(evidence: Evidence) -> str:
    """How the parents were combined, and what was done then."""
    words, calibration = method_words(evidence.recipe, evidence.parents), evidence.record.calibration
    if calibration is None:
        return words
    done = "repaired" if calibration.method == "repair" else "calibrated"
    return f"{words}, then {done} on {calibrated_on(calibration)}, without labels"


def _of_report(folder: Path, report: ConnectivityReport | None) -> dict[str, Any]:
    """What the template shows of the diagnosis and of the pictures in llfc/."""
    plots = {name: (folder / LLFC_FOLDER / file).is_file() for name, file in PLOT_FILES.items()}
    layers = layer_table(report)
    return {
        "barrier": barrier_words(report),
        "is_outside": report is not None and merge_is_outside(report),
        "page": PAGE_FILE if (folder / LLFC_FOLDER / PAGE_FILE).is_file() else None,
        "on_line": report is None or report.region == "line",
        "plots": plots,
        "more_plots": [
            {"name": name, "says": says, "file": PLOT_FILES[key]}
            for key, (name, says) in MORE_PLOTS.items()
            if plots[key]
        ],
        "layers": layers,
        "layers_are_many": len(layers) > LONG_TABLE,
        "layer_summary": layer_summary(report),
        "decomposition_summary": decomposition_summary(report),
    }


def _headline(evidence: Evidence) -> Headline:
    """The verdict in one sentence; a merge that was evaluated and found broken is called that first."""
    own = next((result.loss for result in evidence.record.results if result.is_merge), None)
    losses = [result.loss for result in evidence.record.results if result.is_parent]
    of_parents = [loss for loss in losses if is_number(loss)]
    if own is not None and not math.isfinite(own):
        return Headline("The merge is broken.", "Its loss is not finite.")
    verdict = headline(evidence.report, len(evidence.merged), is_average=evidence.is_average)
    if own is None or not of_parents:
        return verdict
    if evidence.report is None:
        verdict = replace(verdict, text="Its features were not compared with those of its parents.")
    listed = " and ".join(value_text(loss, LOSS) for loss in of_parents)
    values = f"loss is {value_text(own, LOSS)}, that of its parents {listed}."
    if is_far_above(own, of_parents):
        return Headline("Warning. The merge is far worse than its parents.", f"Its {values} {verdict.text}")
    if not evidence.is_average:
        fitted = evidence.record.calibration is not None
        what = "was fitted to samples and is not an average" if fitted else "is not an average"
        return replace(verdict, text=f"{verdict.text} This merge {what}: its {values}")
    return verdict


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
