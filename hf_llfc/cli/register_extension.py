"""`hf-llfc register-extension`: an entry for an installed package among the extensions of the Hub's own command."""

from __future__ import annotations

import argparse
import shutil
import sys
from datetime import datetime, timezone
from pathlib import Path

from hf_llfc.cli.console import print_json
from hf_llfc.errors import LLFCError

SCRIPT = "hf-llfc"
NO_OWNER = "-"
"""In place of the owner of a repository on GitHub, who cannot be called that: nothing is ever updated from there."""


def register(script: Path | None = None) -> Path:
    """Lets the Hub's `hf` command find the console script of this package as `hf llfc`.

    Writes the manifest that `hf extensions install` writes, without the environment that it makes beside it;
    `hf extensions remove llfc` removes it again and leaves the package.

    Args:
        script: The console script; that of this environment without it.

    Returns:
        The manifest.

    Raises:
        LLFCError: There is no console script, the Hub's client knows no extensions, or an extension is installed.
    """
    try:
        from huggingface_hub.cli.extensions import EXTENSIONS_ROOT, MANIFEST_FILENAME, ExtensionManifest
    except ImportError:
        raise LLFCError(
            "this huggingface_hub has no extensions; install a newer one: pip install -U huggingface_hub"
        ) from None
    script = script or _console_script()
    folder = EXTENSIONS_ROOT.expanduser() / SCRIPT
    manifest = folder / MANIFEST_FILENAME
    if folder.exists():
        found = ExtensionManifest.load(folder) if manifest.is_file() else None
        if found is None or found.owner != NO_OWNER:
            raise LLFCError(f"{folder} holds an extension already; remove it first: hf extensions remove llfc")
    ExtensionManifest(
        owner=NO_OWNER,
        repo=SCRIPT,
        repo_id=f"{NO_OWNER}/{SCRIPT}",
        short_name=SCRIPT.removeprefix("hf-"),
        executable_path=str(script),
        type="python",
        installed_at=datetime.now(timezone.utc),
        description="Align, merge and diagnose fine-tuned checkpoints, layer by layer",
    ).save(folder)
    return manifest


def execute(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    manifest = register()
    if options.format == "json":
        print_json({"manifest": str(manifest), "command": "hf llfc"})
    else:
        print("hf llfc")
    return 0


def _console_script() -> Path:
    called = Path(sys.argv[0])
    if called.stem == SCRIPT and called.is_file():
        return called.resolve()
    beside = shutil.which(SCRIPT, path=str(Path(sys.executable).parent)) or shutil.which(SCRIPT)
    if beside is None:
        raise LLFCError(f"there is no command {SCRIPT} in this environment; install the package with pip first")
    return Path(beside).resolve()
