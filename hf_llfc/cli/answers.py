"""What several commands print."""

from __future__ import annotations

import argparse

from hf_llfc.cli.console import print_json, print_table
from hf_llfc.diagnostics import ConnectivityReport
from hf_llfc.publishing.breaking import breaking_sentence
from hf_llfc.publishing.depth import classes_sentence, settling_sentence
from hf_llfc.publishing.tables import report_tables


def show_report(report: ConnectivityReport, options: argparse.Namespace) -> None:
    """Prints a diagnosis."""
    if options.format == "json":
        print_json(report.to_dict())
        return
    for table in report_tables(report):
        print_table(table.title, table.records, numbers=table.numbers)
    sentences = {
        "where it breaks": breaking_sentence(report),
        "classes": classes_sentence(report),
        "settling": settling_sentence(report),
    }
    for about, says in sentences.items():
        if says:
            print(f"{about}: {says.removesuffix('.')}")
    if report.suggestion is not None:
        print(f"suggestion: {report.suggestion.because}")
    print(f"verdict: {report.verdict.answer}: {report.verdict.because}")
