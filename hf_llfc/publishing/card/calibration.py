"""What a card says of a merge that was fitted to its parents' features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.publishing.numbers import ERROR, LOSS, decimal_text, distance_text, height_text
from hf_llfc.publishing.record import CalibrationRecord, MapRecord, MeasuredData
from hf_llfc.publishing.words import calibrated_on

NAMED = 3
"""Maps that stayed of which a card gives the names, for each reason."""


@dataclass(frozen=True)
class CalibrationWords:
    """The section of a card.

    Attributes:
        heading: Its heading.
        claim: What was done, and what that does not say.
        facts: Sentences.
        layers: LLFC before and after, the baseline, and the coefficient before and after, of every layer, as text.
    """

    heading: str
    claim: str
    facts: list[str]
    layers: list[tuple[str, ...]]


def calibration_words(record: CalibrationRecord | None, report: ConnectivityReport | None) -> CalibrationWords | None:
    """The section of a card about a calibration; None where there was none.

    Args:
        record: What was done.
        report: The diagnosis, whose barrier is that of the line.
    """
    if record is None:
        return None
    measured = record.measured
    return CalibrationWords(
        "Repair" if record.method == "repair" else "Calibration",
        _claim(record),
        [*_facts(record), *_fold(record, report)],
        [
            (
                row.layer,
                *(distance_text(value, 2) for value in (row.before, row.after, row.baseline)),
                *(decimal_text(value, 3) for value in (row.coefficient_before, row.coefficient_after)),
            )
            for row in (measured.layers if measured is not None else ())
        ],
    )


def limit_of_calibration(record: CalibrationRecord | None, data: MeasuredData) -> str | None:
    """Says where a merge is measured on the data that it was fitted on."""
    fitted: list[Mapping[str, Any]] = list(record.data) if record is not None else []
    if any(each.get("dataset") == data.dataset and each.get("split") == data.split for each in fitted):
        return (
            "The merge was fitted to unlabelled samples of the data that it is measured on; elsewhere it may do worse."
        )
    return None


def _claim(record: CalibrationRecord) -> str:
    what = "The mean and size of its channels were" if record.method == "repair" else "Its weights were"
    tried = ", ".join(f"{each:g}" for each in sorted(trial.ridge for trial in record.trials))
    chosen = f", chosen among {tried} on held-out samples" if tried else ""
    how = f" (ridge {record.ridge:g}{chosen})" if record.ridge is not None else ""
    imitated = "those of each parent on its own samples" if record.targets == "own" else "the average of its parents'"
    return (
        f"This model is not the merge alone. {what} fitted to {calibrated_on(record)}, without labels, so that its "
        f"features imitate {imitated}{how}. With many samples this works even from random weights, as a distillation "
        "of the parents. A good result therefore does not say that the weights of the parents can be averaged: for "
        "that, read the verdict and the barrier, which are of averages of the parents."
    )


def _facts(record: CalibrationRecord) -> list[str]:
    maps = record.maps
    moved = [row for row in maps if row.moved is not None]
    facts = []
    if record.moved is not None and moved:
        farthest = max(moved, key=lambda row: row.moved or 0.0)
        facts.append(
            f"From the merge to this model {len(maps)} maps moved, by {distance_text(record.moved)} times the distance "
            f"of the parents; {farthest.name} moved most, {distance_text(farthest.moved)} times."
        )
    if maps:
        fewest = min(maps, key=_rows_per_input)
        facts.append(
            f"A map had {distance_text(median(map(_rows_per_input, maps)))} rows of samples for each of its inputs "
            f"(median), and {distance_text(_rows_per_input(fewest))} at least ({fewest.name})."
        )
        before, after = (median(getattr(row, name) for row in maps) for name in ("before", "after"))
        facts.append(
            "On these samples the distance of a map's output from its target, as a share of the target's variance, "
            f"went from {distance_text(before)} to {distance_text(after)} (median)."
        )
    reasons: dict[str, list[str]] = {}
    for name, reason in record.left.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        facts.append(f"As in the merge: {', '.join(names[:NAMED])}{more}, because {reason}.")
    return facts


def _rows_per_input(row: MapRecord) -> float:
    return row.rows / row.inputs


def _fold(record: CalibrationRecord, report: ConnectivityReport | None) -> list[str]:
    measured = record.measured
    if measured is None or measured.fold_loss is None or measured.loss_before is None:
        return []
    heights = [height_text(measured.fold_loss, LOSS) + " of loss"]
    heights += [height_text(measured.fold_error, ERROR) + " of error"] if measured.fold_error is not None else []
    line = report.barrier.loss if report is not None else None
    beside = (
        f" On the straight line between the parents it is {height_text(line, LOSS)} of loss."
        if line is not None
        else ""
    )
    return [
        f"On the way from one parent straight to this model, and from there to another, the barrier is "
        f"{' and '.join(heights)}.{beside}"
    ]
