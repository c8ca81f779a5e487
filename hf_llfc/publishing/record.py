"""What neither recipe nor report says of a run, kept in llfc/run.json: with it a card can be written again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_llfc.errors import PublishingError
from hf_llfc.foundation.layout import LLFC_FOLDER, RUN_FILE
from hf_llfc.publishing.lineage import relevant
from hf_llfc.publishing.words import display_name

SCHEMA = "hf_llfc.run/1"


@dataclass(frozen=True)
class RunRecord:
    """What a run did.

    Attributes:
        alignments: A summary of each, as `hf_llfc.parents.provenance.alignment_summary` gives it.
        results: Loss and metrics of every parent and of the merge on the same data: mappings with `id`, `loss`,
            `metrics` and, for the merge, `is_merge`.
        versions: Of the libraries.
        hardware: In words.
        cards: Of every parent, in the order of `shares.models_of`, what of its own card that of the merge depends on.
    """

    alignments: Sequence[Mapping[str, Any]] = ()
    results: Sequence[Mapping[str, Any]] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: str | None = None
    cards: Sequence[Mapping[str, Any]] = ()

    def save(self, folder: Path) -> Path:
        """Writes it into an output folder, without the paths of a disk."""
        path = folder / LLFC_FOLDER / RUN_FILE
        values = {
            "schema": SCHEMA,
            **asdict(self),
            "alignments": [_named(entry, "model", "reference", "centre") for entry in self.alignments],
            "results": [_named(row, "id") for row in self.results],
            "cards": [relevant(card) for card in self.cards],
        }
        text = json.dumps(_without_nan(values), indent=1, ensure_ascii=False, allow_nan=False)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8", newline="\n")
        return path

    @classmethod
    def load(cls, folder: Path) -> RunRecord:
        """Reads that of an output folder; an empty one where there is none.

        Raises:
            PublishingError: The file cannot be read or is not one.
        """
        path = folder / LLFC_FOLDER / RUN_FILE
        if not path.is_file():
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise PublishingError(f"{path} cannot be read: {error}") from None
        if not _is_record(values):
            raise PublishingError(f"{path} is no record of a run ({SCHEMA}); delete it, or merge again")
        return cls(
            alignments=values["alignments"],
            results=[{**row, "loss": math.nan if row["loss"] is None else row["loss"]} for row in values["results"]],
            versions=values["versions"],
            hardware=values["hardware"],
            cards=values["cards"],
        )


def _is_record(values: Any) -> bool:
    """Whether the parts that are read are there and of the right kind."""
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        return False
    alignments, results, versions, cards = (values.get(key) for key in ("alignments", "results", "versions", "cards"))
    return (
        isinstance(alignments, list)
        and all(isinstance(entry, dict) and _are_axes(entry.get("axes", [])) for entry in alignments)
        and isinstance(results, list)
        and all(map(_is_result, results))
        and isinstance(versions, dict)
        and isinstance(cards, list)
        and all(isinstance(card, dict) for card in cards)
        and isinstance(values.get("hardware"), str | None)
    )


def _are_axes(axes: Any) -> bool:
    return isinstance(axes, list) and all(
        isinstance(axis, dict) and isinstance(axis.get("moved"), int) and isinstance(axis.get("units"), int)
        for axis in axes
    )


def _is_result(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("metrics"), dict) or "loss" not in row:
        return False
    return all(isinstance(value, int | float | None) for value in (row["loss"], *row["metrics"].values()))


def _named(entry: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The entry with Hub ids as they are and folders by their name, without the sentence that says the same."""
    entry = {key: value for key, value in entry.items() if key != "sentence"}
    return {**entry, **{key: display_name(str(entry[key])) for key in keys if entry.get(key)}}


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
