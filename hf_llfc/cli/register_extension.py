"""`hf-llfc register-extension`."""

from __future__ import annotations

import argparse

from hf_llfc.console import print_json
from hf_llfc.extension import register


def execute(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    manifest = register()
    if options.format == "json":
        print_json({"manifest": str(manifest), "command": "hf llfc"})
    else:
        print("hf llfc")
    return 0
