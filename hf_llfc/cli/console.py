"""What a terminal shows: progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hf_llfc.foundation.progress import Progress, silent

SECONDS_BETWEEN_LINES = 30.0
"""How often long work says how far it is where stderr is no terminal."""


@contextmanager
def progress_bars(*, shown: bool) -> Iterator[Progress]:
    """Shows on stderr one bar with an estimate per description, plain lines where that is no terminal.

    Args:
        shown: Whether anything is shown at all.
    """
    if not shown or not sys.stderr.isatty():
        yield plain_lines() if shown else silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import (
        Progress as Bars,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(description: str, done: int, total: int) -> None:
            if description not in tasks:
                tasks[description] = bars.add_task(description, total=total)
            bars.update(tasks[description], completed=done, total=total)

        yield advance


def plain_lines(now: Callable[[], float] = time.monotonic) -> Progress:
    """Says on stderr when a stage begins, and every `SECONDS_BETWEEN_LINES` how far it is and how long it may take.

    Steps of a stage share its line: what a description says after its first comma or colon names the step.

    Args:
        now: The time in seconds.
    """
    stage, step, began, last = "", "", 0.0, 0.0

    def say(description: str, done: int, total: int) -> None:
        nonlocal stage, step, began, last
        time_now = now()
        if description != step:
            step, began = description, time_now
        name = re.split("[,:] ", description)[0]
        if name == stage and (time_now - last < SECONDS_BETWEEN_LINES or not 0 < done < total):
            return
        far = ""
        if name == stage:
            left = (time_now - began) * (total - done) / done
            far = f", {done:,} of {total:,} ({done / total:.0%}), about {format_seconds(left)} left"
        stage, last = name, time_now
        print(f"hf-llfc: {description if far else name}{far}", file=sys.stderr, flush=True)

    return say


def print_json(value: Any) -> None:
    """Prints a value as JSON on stdout."""
    is_ascii = (sys.stdout.encoding or "").lower() not in ("utf-8", "utf8")
    print(json.dumps(value, indent=2, ensure_ascii=is_ascii, allow_nan=False))


def print_table(
    title: str, rows: Sequence[Mapping[str, Any]], *, columns: Sequence[str] | None = None, numbers: bool = False
) -> None:
    """Prints rows as a table on stdout; full width where stdout is a file.

    Args:
        title: Above it.
        rows: Values by the names of their columns.
        columns: Which, in which order; those of the first row without it.
        numbers: Whether all columns but the first hold numbers that have been written as text.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = list(columns or (rows[0] if rows else ()))
    table = Table()
    for place, name in enumerate(names):
        numeric = (numbers and place > 0) or all(isinstance(row.get(name), int | float | None) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(format_value(row.get(name))) for name in names))
    console = Console() if sys.stdout.isatty() else Console(width=max(100, _width(rows, names)))
    # A title of the table's own would be folded to its width.
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)


def format_value(value: Any) -> str:
    """A value as a reader wants it: four significant digits, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"
    return str(value)


def format_bytes(count: float) -> str:
    """A number of bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_seconds(seconds: float) -> str:
    """A time that is an estimate."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _width(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> int:
    widths = [max([len(name), *(len(format_value(row.get(name))) for row in rows)]) for name in names]
    return sum(widths) + 3 * len(widths) + 1


def fold_layers(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Folds rows that differ in a number only (`layers.0`, `layers.1`, …) into one, with `{i}` for the number."""
    folded: dict[tuple[str, ...], dict[str, Any]] = {}
    counts: dict[tuple[str, ...], int] = {}
    for row in rows:
        # The first number in the tensor's name is the layer; it stands for itself in the names of axes.
        layer = re.search(r"\.(\d+)\.", str(row["tensor"]))
        shown = {name: _with_placeholder(format_value(value), layer and layer[1]) for name, value in row.items()}
        key = tuple(shown.values())
        folded.setdefault(key, shown)
        counts[key] = counts.get(key, 0) + 1
    return [
        {**row, "tensor": row["tensor"] + (f"  ×{counts[key]}" if counts[key] > 1 else "")}
        for key, row in folded.items()
    ]


def _with_placeholder(text: str, layer: str | None) -> str:
    return text if layer is None else re.sub(rf"(?<=\.){layer}(?=[.\[\] )]|$)", "{i}", text, count=0)
