"""A table of text and its columns, for a terminal and for the page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        title: Its heading.
        note: What it holds, in a few words.
        short: The heading where there is little room; empty where that is the title.
    """

    title: str
    note: str = ""
    short: str = ""


@dataclass(frozen=True)
class Table:
    """A part of a report as text.

    Args:
        key: Names the table in the page.
        title: What it shows.
        columns: The first names the rows.
        rows: One text a column. A text begins with the number to sort by.
        note: How to read it.
        numbers: Whether all columns but the first hold numbers.
    """

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    numbers: bool = True

    @property
    def records(self) -> list[dict[str, str]]:
        """The rows as texts by the short headings of their columns."""
        names = [column.short or column.title for column in self.columns]
        return [dict(zip(names, row, strict=True)) for row in self.rows]
