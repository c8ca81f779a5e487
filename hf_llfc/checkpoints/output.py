"""A folder that is either written completely or not at all."""

import logging
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType

from hf_llfc.checkpoints.files import CONFIG_FILE
from hf_llfc.errors import CheckpointError

logger = logging.getLogger(__name__)

OWN_FOLDER = "llfc"


class OutputFolder:
    """Yields an empty staging folder beside the target, which takes the target's place on success.

    On any error, also an interrupt from the keyboard, the staging folder is removed and the target is as it was.

    Example:
        with OutputFolder("merged") as folder:
            (folder / "config.json").write_text("{}")
    """

    def __init__(self, path: str | Path, overwrite: bool = False) -> None:
        """Takes the target; nothing is checked or made yet.

        Args:
            path: The target.
            overwrite: Whether an earlier checkpoint at the target may be replaced. Any other folder that is not
                empty is refused all the same.
        """
        # A link stays a link: what it points at is replaced.
        self.path = Path(path).expanduser().resolve()
        self.overwrite = overwrite
        self._named = str(path)
        self._staging: Path | None = None
        self._made_parents: list[Path] = []

    def check(self) -> None:
        """Refuses a target that cannot be written, without making anything.

        Raises:
            CheckpointError: If the target is a file, not empty, or in a folder that cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(
                f"{self._named}: the output must be a folder, and this is a file; choose another path"
            )
        parent = self.path.parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise CheckpointError(
                f"{self._named}: the output cannot be written, because {parent} is not a folder you may write to;"
                " choose another path"
            )
        if not self.path.is_dir():
            return
        if self.path == Path.cwd() or self.path in Path.cwd().parents:
            raise CheckpointError(f"{self._named}: the output would replace the current folder; name a new one")
        try:
            held = sorted(entry.name for entry in self.path.iterdir())
        except OSError as error:
            raise CheckpointError(f"{self._named}: the output folder cannot be read ({error.strerror})") from error
        if not held:
            return
        few = ", ".join(held[:5]) + (", …" if len(held) > 5 else "")
        if not self.overwrite:
            raise CheckpointError(
                f"{self._named}: the output folder is not empty (it holds {few}); choose another one, or overwrite"
            )
        if CONFIG_FILE not in held and OWN_FOLDER not in held:
            raise CheckpointError(
                f"{self._named}: the output folder holds no checkpoint that could be overwritten, but {few}; choose"
                " another one"
            )

    def __enter__(self) -> Path:
        """Makes the staging folder."""
        self.check()
        try:
            self._make_parents()
            staging = self.path.parent / f".{self.path.name}.{secrets.token_hex(4)}.partial"
            staging.mkdir()
        except OSError as error:
            self._remove_parents()
            raise CheckpointError(f"{self._named}: the output cannot be written ({error.strerror})") from error
        self._staging = staging
        return staging

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Moves the staging folder to the target, or removes it."""
        assert self._staging is not None
        staging, self._staging = self._staging, None
        if kind is not None:
            shutil.rmtree(staging, ignore_errors=True)
            self._remove_parents()
            return
        try:
            self._replace(staging)
        except OSError as failure:
            shutil.rmtree(staging, ignore_errors=True)
            raise CheckpointError(
                f"{self._named}: the output could not be moved into place ({failure.strerror}); was something else"
                " written there meanwhile?"
            ) from failure

    def _replace(self, staging: Path) -> None:
        if not self.path.exists():
            staging.rename(self.path)
            return
        # An empty folder, or with overwrite an earlier checkpoint: kept until the new one is in its place.
        if not self.overwrite:
            self.path.rmdir()
            staging.rename(self.path)
            return
        earlier = staging.with_suffix(".earlier")
        self.path.rename(earlier)
        try:
            staging.rename(self.path)
        except OSError:
            earlier.rename(self.path)
            raise
        shutil.rmtree(earlier, ignore_errors=True)

    def _make_parents(self) -> None:
        missing = []
        parent = self.path.parent
        while not parent.exists():
            missing.append(parent)
            parent = parent.parent
        for folder in reversed(missing):
            folder.mkdir()
            self._made_parents.append(folder)

    def _remove_parents(self) -> None:
        for folder in reversed(self._made_parents):
            try:
                folder.rmdir()
            except OSError:  # someone else uses it by now
                break
        self._made_parents.clear()
