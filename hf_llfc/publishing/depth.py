"""What depth does to classes and answers, in sentences and tables: where a merge loses classes, where it decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from hf_llfc.diagnostics.report import ConnectivityReport
from hf_llfc.diagnostics.rows import ClassesRow, SettlingRow
from hf_llfc.foundation.numbers import rounded
from hf_llfc.publishing.columns import Column, Table
from hf_llfc.publishing.numbers import NOTHING, decimal_text, distance_text
from hf_llfc.publishing.reading import model_names

LOST = 0.5
"""A merge whose Fisher ratio is below this share of that of each of its models tells classes apart worse."""

TOLD_APART = 0.2
"""Separability from which on classes are told apart at all, in the mean over pairs."""

PAIR_TOLD_APART = 0.5
"""The same of the worst pair, which few samples can make look worse than it is."""

TURNED = 0.05
"""Class means of a merge that lie farther from every model than this, and than twice what the models lie apart."""

LATER = 0.05
"""A merge decides later if its mean settling depth lies this share of all blocks behind."""

MERGE, BLEND = "merge", "blend"


def shown_names(report: ConnectivityReport) -> dict[str, str]:
    """What a reader calls what rows are of, by the name that they have in reports."""
    names = model_names(report)
    models = {name if name == "base" else f"model {number}": name for number, name in enumerate(names, start=1)}
    return {**models, BLEND: BLEND, MERGE: MERGE}


def by_layer(rows: Sequence[ClassesRow]) -> dict[str, dict[str, ClassesRow]]:
    """The rows of every layer by what they are of, in the order of computation."""
    layers: dict[str, dict[str, ClassesRow]] = {}
    for row in rows:
        layers.setdefault(row.layer, {})[row.of] = row
    return layers


def fisher_ratio(separability: float | None) -> float:
    """F of F / (1 + F); NaN where there is none."""
    if separability is None:
        return math.nan
    return separability / (1 - separability) if separability < 1 else math.inf


def lost_from(report: ConnectivityReport, value: Callable[[ClassesRow], float | None], told_apart: float) -> str | None:
    """The layer from which on a merge tells classes apart worse than each of its models; None where it does not.

    Args:
        report: The report.
        value: The separability that counts.
        told_apart: What it must be in the models at least.
    """
    found = None
    for layer, rows in by_layer(report.classes).items():
        least = min((fisher_ratio(value(rows[of])) for of in _models(rows)), default=math.nan)
        is_lost = least >= fisher_ratio(told_apart) and fisher_ratio(value(rows[MERGE])) < LOST * least
        found = (found or layer) if is_lost else None
    return found


def compression_slopes(report: ConnectivityReport) -> dict[str, float]:
    """By how much the logarithm of compression changes from block to block, by what it is of; empty where unknown.

    The slope of the least-squares line through all layers but the logits; of those with fewer than three, none.
    """
    layers = [rows for layer, rows in by_layer(report.classes).items() if layer != "logits"]
    slopes = {}
    for of in layers[0] if len(layers) > 2 else ():
        values = [rows[of].compression for rows in layers]
        logs = [math.log(value) for value in values if value]
        if len(logs) < len(layers):
            continue
        middle = (len(logs) - 1) / 2
        spread = sum((index - middle) ** 2 for index in range(len(logs)))
        slopes[of] = sum((index - middle) * value for index, value in enumerate(logs)) / spread
    return slopes


def classes_sentence(report: ConnectivityReport) -> str | None:
    """At which layer the merge stops telling classes apart; None where this was not measured."""
    layers = by_layer(report.classes)
    if not layers:
        return None
    last, rows = list(layers.items())[-1]
    if rows[MERGE].separability is None:
        return "There are too few samples to say how well the merge tells classes apart."
    of_all, of_pair = lost_from(report, _mean, TOLD_APART), lost_from(report, _least, PAIR_TOLD_APART)
    order = list(layers)
    if of_all is not None and (of_pair is None or order.index(of_all) <= order.index(of_pair)):
        text = f"From {of_all} on the merge tells classes apart worse than each of its models: separability there is "
        text += _compared(report, of_all, _mean)
    elif of_pair is not None:
        text = f"From {of_pair} on the merge tells some classes apart worse than each of its models: separability of "
        text += f"the worst pair{_named(layers[of_pair][MERGE])} is {_compared(report, of_pair, _least)}"
    else:
        text = f"The merge tells classes apart in every layer as its models do: separability in {last} is "
        text += _compared(report, last, _mean)
    nearest, apart = _turned(rows)
    if nearest > max(TURNED, 2 * apart):
        text += (
            f"; in {last} the means of its classes point elsewhere, {distance_text(nearest, 2)} from the nearest model "
            f"where the models are {distance_text(apart, 2)} from each other"
        )
    return f"{text}."


def _models(rows: dict[str, ClassesRow]) -> list[str]:
    """The models that know the task: not the base of task vectors."""
    return [of for of in rows if of not in (BLEND, MERGE, "base")]


def _mean(row: ClassesRow) -> float | None:
    return row.separability


def _least(row: ClassesRow) -> float | None:
    return row.least


def _named(row: ClassesRow) -> str:
    return f" ({row.pair[0]} and {row.pair[1]})" if row.pair else ""


def _compared(report: ConnectivityReport, layer: str, value: Callable[[ClassesRow], float | None]) -> str:
    """The separabilities of one layer."""
    rows, names = by_layer(report.classes)[layer], shown_names(report)
    others = ", ".join(f"{decimal_text(value(rows[of]), 3)} in {names[of]}" for of in _models(rows))
    return f"{decimal_text(value(rows[MERGE]), 3)}, and {others}"


def _turned(rows: dict[str, ClassesRow]) -> tuple[float, float]:
    """How far class means of the merge point from those of the nearest model, and those of models from each other."""
    models = _models(rows)
    between = [rows[of].directions[index] for of in models for index in range(len(models)) if of != models[index]]
    nearest = min((value for value in rows[MERGE].directions[: len(models)] if value is not None), default=0.0)
    return nearest, max((value for value in between if value is not None), default=0.0)


def classes_table(report: ConnectivityReport) -> Table:
    """Class statistics of every layer, of the models, the blend and the merge."""
    names, models = shown_names(report), model_names(report)
    columns = (
        Column("layer"),
        Column("of"),
        Column("compression", "variance within classes over that between", "compr."),
        Column("discrimination", "1 − the largest cosine of two class means", "discr."),
        Column("separability", "mean over pairs of classes", "separ."),
        Column("least", "of the worst pair"),
        *(Column(f"from {name}", "how far class means point from its own") for name in models),
    )
    rows = tuple(
        (
            row.layer,
            names.get(row.of, row.of),
            distance_text(row.compression),
            distance_text(row.discrimination),
            decimal_text(row.separability, 3),
            decimal_text(row.least, 3),
            *(distance_text(value, 2) if value is None or value > 1e-9 else "0" for value in row.directions),
        )
        for row in report.classes
    )
    slopes = ", ".join(
        f"{rounded(slope, 2)} in {names[of]}" for of, slope in compression_slopes(report).items() if of in names
    )
    note = f" From block to block the logarithm of compression changes by {slopes}." if slopes else ""
    return Table("classes", "classes", columns, rows, f"{classes_sentence(report) or ''}{note}")


def settling_depths(report: ConnectivityReport) -> dict[str, float]:
    """The mean number of blocks after which answers are settled, by what they are of."""
    shares: dict[str, list[float]] = {}
    for row in report.settling:
        shares.setdefault(row.of, []).append(row.answer)
    return {of: len(values) - sum(values[:-1]) for of, values in shares.items()}


def settling_sentence(report: ConnectivityReport) -> str | None:
    """After which block answers are settled, in one sentence; None where this was not measured."""
    depths, names = settling_depths(report), shown_names(report)
    if MERGE not in depths:
        return None
    blocks = len(_blocks(report.settling))
    models = [of for of in depths if of not in (MERGE, "base")]
    told = ", ".join(f"{rounded(depths[of], 1)} in {names[of]}" for of in models)
    behind = depths[MERGE] - max(depths[of] for of in models)
    ahead = min(depths[of] for of in models) - depths[MERGE]
    word = "later than its models" if behind > LATER * blocks else "earlier than its models"
    word = word if max(behind, ahead) > LATER * blocks else "where its models do"
    text = f"The merge decides {word}: of {blocks} blocks its answers are settled after {rounded(depths[MERGE], 1)}"
    return f"{text} in the mean, and after {told}."


def _blocks(rows: Sequence[SettlingRow]) -> list[str]:
    return list(dict.fromkeys(row.layer for row in rows))


def settling_table(report: ConnectivityReport) -> Table:
    """Shares of settled answers after every block."""
    names = {of: name for of, name in shown_names(report).items() if of != BLEND}
    found = {(row.layer, row.of): row for row in report.settling}
    columns = (
        Column("block"),
        *(Column(name, "answers settled") for name in names.values()),
        *(Column(f"{name} close", "distributions settled") for name in names.values()),
    )
    rows = tuple(
        (
            block,
            *(
                NOTHING if (row := found.get((block, of))) is None else f"{rounded(100 * value(row), 1)} %"
                for value in (_answer, _close)
                for of in names
            ),
        )
        for block in _blocks(report.settling)
    )
    return Table("settling", "settling", columns, rows, settling_sentence(report) or "")


def _answer(row: SettlingRow) -> float:
    return row.answer


def _close(row: SettlingRow) -> float:
    return row.close
