"""`hf-llfc push`."""

from __future__ import annotations

import argparse

from hf_llfc.cli.console import print_json
from hf_llfc.cli.settings import given
from hf_llfc.publishing import publish
from hf_llfc.recipe import PublishSection


def execute(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    where = PublishSection(**given(options, PublishSection))
    url = publish(options.folder, where, force=options.force, include=options.include)
    if options.format == "json":
        print_json({"url": url})
    else:
        print(url)
    return 0
