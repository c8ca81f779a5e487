"""`hf-llfc push`."""

from __future__ import annotations

import argparse

from hf_llfc.cli.console import print_json
from hf_llfc.publishing import publish


def execute(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    url = publish(
        options.folder,
        options.repo_id,
        private=options.private,
        create_pr=options.create_pr,
        revision=options.revision,
        tag=options.tag,
        force=options.force,
    )
    if options.format == "json":
        print_json({"url": url})
    else:
        print(url)
    return 0
