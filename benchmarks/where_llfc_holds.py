"""In which layers LLFC holds, by architecture and kind of pair, from what `calibrate.py` measured.

    python benchmarks/where_llfc_holds.py --pairs DIR

DIR is that of `python benchmarks/pairs.py`, after `python benchmarks/calibrate.py --pairs DIR`. Midpoints, one feature
vector a sample. Writes the section of this name of results/llfc.md.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import markdown, replace_section

CONNECTED = ("spawned", "steps", "data", "task")
"""One start: branches of one run, fine-tunes of one base."""

APART = ("independent", "bases")
"""Independent seeds, and tunes of independent bases."""

STATES = (
    ("one start", CONNECTED, "as_is"),
    ("moved", ("moved",), "as_is"),
    ("moved, then matched", ("moved",), "aligned"),
    ("independent", APART, "as_is"),
    ("independent, then matched", APART, "aligned"),
)
FAMILIES = ("mlp", "resnet", "vit", "bert", "llama", "gpt2")


def main() -> None:
    """Writes the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    options = parser.parse_args()
    records = [json.loads(line) for line in (options.pairs / "records.jsonl").read_text().splitlines()]
    records = list({(each["a"], each["b"], each["kind"]): each for each in records}.values())
    rows = [
        row(family, title, [each[state]["layers"] for each in records if chosen(each, family, kinds, state)])
        for family in FAMILIES
        for title, kinds, state in STATES
        if any(chosen(each, family, kinds, state) for each in records)
    ]
    replace_section(
        "where_llfc_holds",
        "`python benchmarks/where_llfc_holds.py --pairs DIR`, after `pairs.py` and `calibrate.py`. 1 − cos(merged, "
        "blend) over 1 − cos(A, B) at the midpoint: median over pairs (smallest–largest); the coefficient is the one "
        f"farthest from 1 among all layers of a pair.\n\n{markdown(rows)}",
    )


def chosen(record: dict[str, Any], family: str, kinds: tuple[str, ...], state: str) -> bool:
    """Whether a pair belongs into a row."""
    return record["family"] == family and record["kind"] in kinds and record.get(state) is not None


def row(family: str, title: str, pairs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """One line of the table."""
    return {
        "architecture": family,
        "pairs": f"{title} ({len(pairs)})",
        "first block": spread([ratio(layers[0]) for layers in pairs]),
        "last block": spread([ratio(layers[-2]) for layers in pairs]),
        "logits": spread([ratio(layers[-1]) for layers in pairs]),
        "coefficient": spread([worst(layers) for layers in pairs]),
    }


def ratio(layer: dict[str, Any]) -> float | None:
    """LLFC over its baseline; None where the parents do not differ."""
    return layer["llfc"] / layer["baseline"] if layer["baseline"] > 1e-9 else None


def worst(layers: list[dict[str, Any]]) -> float | None:
    """The coefficient farthest from one."""
    values = [layer["coefficient"] for layer in layers if layer["coefficient"] is not None]
    return max(values, key=lambda value: abs(value - 1), default=None)


def spread(values: list[float | None]) -> str:
    """Median, smallest and largest."""
    found = [value for value in values if value is not None]
    if not found:
        return "–"
    middle = f"{statistics.median(found):.2g}"
    return middle if len(found) == 1 else f"{middle} ({min(found):.2g}–{max(found):.2g})"


if __name__ == "__main__":
    main()
