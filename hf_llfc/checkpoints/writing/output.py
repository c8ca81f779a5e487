"""A folder that is either written completely or not at all, by one run at a time, and taken up again after a stop."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from hf_llfc.checkpoints.writing.journal import WEIGHTS_STAGE, Journal, flush, flush_all, listed, storing
from hf_llfc.checkpoints.writing.listing import Listing, list_files, read_listing
from hf_llfc.errors import CheckpointError, LLFCError, ProcessError, StorageError

logger = logging.getLogger(__name__)


# What the folder `.NAME.partial` beside an output holds: the output as far as it is made, what of it is finished, the
# lock of the run that makes it, what it needs on the way, and while the one takes the other's place the earlier output.
OUTPUT = "output"
EARLIER = "earlier"
WORK = "work"
JOURNAL = "journal.json"
LOCK = "lock"
_KNOWN = {OUTPUT, EARLIER, WORK, JOURNAL, "journal.draft", LOCK}

LONGEST_NAME = 255
"""Bytes of a name that file systems take."""
LONGEST_PATH = 4000
"""Bytes of a path that systems take, with room for the files in an output."""
_NAMED = 5

# The lock dies with its process, but a worker that the process forked may live on for a moment.
_LOCK_SECONDS = 2.0


class OutputFolder:
    """Yields a staging folder beside the target, which takes the target's place on success.

    After an error the staging folder is removed and the target is as it was. After an interrupt of any kind (from the
    keyboard, SIGKILL, a power cut, a full disk) what the journal calls finished is kept in `.NAME.partial`, and the
    next run that makes its output from the same goes on from there.

    Example:
        with OutputFolder("merged") as folder:
            (folder / "config.json").write_text("{}")
    """

    def __init__(self, path: str | Path, overwrite: bool = False, restart: bool = False) -> None:
        """Takes the target; nothing is checked or made yet.

        Args:
            path: The target.
            overwrite: Whether an earlier output at the target may be replaced. A folder that no run has written, or
                that holds files which no run has written, is refused all the same.
            restart: Whether what an interrupted run had finished is discarded.
        """
        # A link stays a link: what it points at is replaced.
        self._named = str(path) or "''"
        try:
            self.path = Path(path).expanduser().resolve()
        except (OSError, RuntimeError, ValueError) as error:  # of a user that is not known, in a circle of links
            raise CheckpointError(f"{self._named}: the output cannot be called that ({error}); name a folder") from None
        self.overwrite = overwrite
        self.restart = restart
        self._partial = self.path.parent / _partial_name(self.path.name)
        self._identity: Mapping[str, Any] = {}
        self._of_weights: str | None = None
        self._journal: Journal | None = None
        self._lock: FileLock | None = None
        self._made_parents: list[Path] = []

    @property
    def journal(self) -> Journal:
        """Journal of what is finished; between entering and leaving."""
        assert self._journal is not None, "nothing is being made"
        return self._journal

    @property
    def work(self) -> Path:
        """A folder on the same disk for what is needed on the way; whoever makes it need not remove it."""
        return self._partial / WORK

    def made_from(self, identity: Mapping[str, Any], of_weights: Mapping[str, Any] | None = None) -> None:
        """Says what the output is made from, before it is entered: what of it another run had finished is taken up.

        Args:
            identity: Everything that determines the output, as JSON values.
            of_weights: What of it determines the weights: those that another run had finished are taken up where all
                else differs.
        """
        self._identity = json.loads(json.dumps(identity))
        if of_weights is not None:
            self._of_weights = hashlib.sha256(json.dumps(of_weights, sort_keys=True).encode()).hexdigest()

    def free_bytes(self) -> int:
        """Bytes on the disk of the target that are free, or taken by what an interrupted run left there."""
        parent = self._partial
        while not parent.exists():
            parent = parent.parent
        left = [path for path in (self._partial / OUTPUT).rglob("*") if path.is_file()]
        return shutil.disk_usage(parent).free + sum(path.stat().st_size for path in left)

    def check(self) -> None:
        """Refuses a target that cannot be written, without making anything.

        Raises:
            CheckpointError: If the target is a file, a mount point, not empty, or in a folder that cannot be written.
        """
        longest = max(len(os.fsencode(part)) for part in self.path.parts)
        if longest > LONGEST_NAME or len(os.fsencode(self.path)) > LONGEST_PATH:
            raise CheckpointError(
                f"{self._named}: the name is too long for a file system, which takes {LONGEST_NAME} bytes a name and"
                f" {LONGEST_PATH} a path; choose a shorter one"
            )
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(
                f"{self._named}: the output must be a folder, and this is a file; choose another path"
            )
        if os.path.ismount(self.path):
            raise CheckpointError(
                f"{self._named}: the output folder is a mount point, which nothing can take the place of; name a folder"
                " in it"
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
        if not held or self._is_moved():
            return
        with suppress(OSError):
            self._partial.rmdir()  # empty where a run was stopped in its very last moment
        if not self.overwrite:
            raise CheckpointError(
                f"{self._named}: the output folder is not empty (it holds {_few(held)}); choose another one, or "
                "overwrite it (`--overwrite`, in a recipe `overwrite: true`)"
            )
        listing = read_listing(self.path)
        if listing is None:
            raise CheckpointError(
                f"{self._named}: the output folder was not written by hf-llfc, so it is not overwritten (it holds "
                f"{_few(held)}); choose another one"
            )
        refuse_losses(self.path, listing, self._named)

    def _is_moved(self) -> bool:
        """Whether a run was stopped in the moment between moving its output into place and tidying up."""
        if self.restart or not self.path.is_dir() or (self._partial / OUTPUT).exists():
            return False
        journal = Journal.load(self._partial / JOURNAL, self.path)
        return journal is not None and journal.is_complete

    def __enter__(self) -> Path:
        """Makes the staging folder, or takes up that of an interrupted run."""
        self.check()
        self._acquire()
        is_first = not (self._partial / JOURNAL).exists()
        try:
            self._journal = self._begin()
        except BaseException:
            if is_first:
                self._discard()
            self._release()
            raise
        return self._journal.folder

    def _acquire(self) -> None:
        """Makes the folder beside the output and locks it; another run may be removing the same folder meanwhile."""
        end = time.monotonic() + _LOCK_SECONDS
        while self._lock is None:
            lock = FileLock(self._partial / LOCK)
            try:
                self._make_parents()
                self._partial.mkdir(exist_ok=True)
                lock.acquire(timeout=max(0.0, end - time.monotonic()))
            except FileNotFoundError as error:  # removed by another run, who tidies up
                if time.monotonic() > end:
                    raise CheckpointError(f"{self._named}: the output cannot be written ({error.strerror})") from error
                time.sleep(0.01)
                continue
            except Timeout:
                raise self._in_use() from None
            except OSError as error:
                self._remove_parents()
                raise CheckpointError(f"{self._named}: the output cannot be written ({error.strerror})") from error
            if (self._partial / LOCK).exists():  # else what is locked is what another run has removed
                self._lock = lock
            else:
                lock.release()

    def _in_use(self) -> CheckpointError:
        return CheckpointError(
            f"{self._named}: another run is writing this output; wait until it ends, or choose another folder"
        )

    def _begin(self) -> Journal:
        """Takes up the journal of an interrupted run, or makes a fresh staging folder.

        Raises:
            CheckpointError: What is there is not ours, or it is of another run.
        """
        foreign = sorted({entry.name for entry in self._partial.iterdir()} - _KNOWN)
        if foreign:
            raise CheckpointError(
                f"{self._named}: {self._partial} is where the output would be made, and it holds"
                f" {', '.join(foreign[:5])}, which is not ours; rename that folder, or choose another output"
            )
        if (self._partial / EARLIER).exists() and not self.path.exists():
            (self._partial / EARLIER).rename(self.path)
        self.check()
        is_moved = self._is_moved()
        if not is_moved:
            self._refuse_fixed()
        folder = self.path if is_moved else self._partial / OUTPUT
        journal = None if self.restart else Journal.load(self._partial / JOURNAL, folder)
        if journal is not None and not journal.is_empty:
            differences = journal.differences(self._identity)
            is_of_weights = self._of_weights is not None and journal.of_weights == self._of_weights
            if differences and is_of_weights and WEIGHTS_STAGE in journal.stages and not is_moved:
                logger.warning("%s: the weights are those of a run that differs in what follows them", self._named)
                journal.keep_weights(self._identity)
                differences = []
            is_same = bool(self._identity) and not differences
            if is_same:
                journal.check_files()
            if is_same and (journal.is_complete or not is_moved):
                logger.warning("%s: goes on after an interrupted run (%s)", self._named, _told(journal))
                self._remove_unfinished(journal)
                return journal
            if not is_moved and not differences:
                raise CheckpointError(
                    f"{self._named}: {folder} holds a finished output that could not be moved into place; rename that"
                    " folder, or discard it with --restart (in Python restart=True)"
                )
            if not is_moved:
                raise CheckpointError(
                    f"{self._named}: {self._partial} holds an interrupted run of something else"
                    f" ({listed(differences)}); run the same again to go on with it, or discard it with --restart (in"
                    " Python restart=True)"
                )
            (self._partial / JOURNAL).unlink()  # that run's output is in its place, or was
            self.check()
        return self._fresh()

    def _refuse_fixed(self) -> None:
        """Refuses, before any work, a target folder that cannot be moved away, by moving it away and back.

        Raises:
            CheckpointError: The system does not move it.
        """
        if not self.path.exists():
            return
        earlier = self._partial / EARLIER
        shutil.rmtree(earlier, ignore_errors=True)  # there only if its successor is in its place
        try:
            self.path.rename(earlier)
        except OSError as error:
            raise CheckpointError(
                f"{self._named}: the output folder cannot be replaced ({error.strerror}); name a new folder"
            ) from error
        earlier.rename(self.path)

    def _remove_unfinished(self, journal: Journal) -> None:
        """Removes files that were being written when the run stopped; they are written again."""
        if journal.is_complete:
            return
        finished = {*journal.shards, *(name for entry in journal.stages.values() for name in entry["files"])}
        with storing(self._partial):
            journal.folder.mkdir(exist_ok=True)
            for path in sorted(journal.folder.rglob("*")):
                if not path.is_dir() and path.relative_to(journal.folder).as_posix() not in finished:
                    path.unlink()

    def _fresh(self) -> Journal:
        folder = self._partial / OUTPUT
        with storing(self._partial):
            for name in (EARLIER, WORK):
                shutil.rmtree(self._partial / name, ignore_errors=True)
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir()
        journal = Journal(self._partial / JOURNAL, folder, self._identity, of_weights=self._of_weights)
        journal.save()
        return journal

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Moves the staging folder to the target, or removes it, or leaves it to be taken up."""
        try:
            if kind is None:
                self._finish()
            else:
                self._stop(error)
        finally:
            self._release()
            self._journal = None

    def _stop(self, error: BaseException | None) -> None:
        at_fault = isinstance(error, LLFCError) and not isinstance(error, StorageError | ProcessError)
        has_weights = WEIGHTS_STAGE in self.journal.stages
        if self.journal.is_empty or (at_fault and not self.journal.is_complete and not has_weights):
            self._discard()
            return
        if isinstance(error, LLFCError) and at_fault and has_weights:
            raise type(error)(
                f"{error}\nThe weights are complete, and kept in {self.journal.folder}: run the same"
                " again to go on, also with other data or another target of `publish`, or move that folder to"
                f" {self.path} to take it as it is, without its card, or begin anew with --restart (in Python"
                " restart=True)"
            ) from error
        logger.warning(
            "%s: stopped before the end; %s is kept (%s): run the same again to go on, or with --restart to begin anew",
            self._named,
            self._partial,
            _told(self.journal),
        )

    def _finish(self) -> None:
        """Moves the output into place once all of it lies on the disk."""
        staging = self.journal.folder
        if staging != self.path:
            with storing(staging):
                list_files(staging, self.journal.shards)
                flush_all(staging)
            self.journal.complete()
            try:
                self.check()  # for what was written there meanwhile
                self._replace(staging)
                flush(self.path.parent)
            except (OSError, CheckpointError) as failure:
                reason = failure.strerror if isinstance(failure, OSError) else failure
                raise CheckpointError(
                    f"{self._named}: the output is complete, but could not be moved into place ({reason}); it is kept"
                    f" in {staging}: move away what is at {self.path}, and rename that folder to it"
                ) from failure
        self._discard()

    def _replace(self, staging: Path) -> None:
        if not self.path.exists():
            staging.rename(self.path)
            return
        # An empty folder, or with overwrite an earlier checkpoint: kept until the new one is in its place.
        if not self.overwrite:
            self.path.rmdir()
            staging.rename(self.path)
            return
        earlier = self._partial / EARLIER
        self.path.rename(earlier)
        try:
            staging.rename(self.path)
        except OSError:
            earlier.rename(self.path)
            raise

    def _discard(self) -> None:
        """Removes what was being made; the journal last, for who stops here leaves what the next run understands."""
        for name in (OUTPUT, EARLIER, WORK):
            shutil.rmtree(self._partial / name, ignore_errors=True)
        for name in sorted(_KNOWN - {OUTPUT, EARLIER, WORK, JOURNAL}):
            with suppress(PermissionError):  # where an open file cannot be removed, _release does it
                (self._partial / name).unlink(missing_ok=True)
        (self._partial / JOURNAL).unlink(missing_ok=True)
        self._remove_empty()

    def _remove_empty(self) -> None:
        """Removes the folder beside the output, if nothing is in it."""
        try:
            self._partial.rmdir()
        except OSError:  # another run uses it by now
            return
        self._remove_parents()

    def _release(self) -> None:
        if self._lock is None:
            return
        self._lock.release()
        self._lock = None
        if os.name != "posix" and not (self._partial / JOURNAL).exists():
            with suppress(OSError):  # another run holds it by now
                (self._partial / LOCK).unlink(missing_ok=True)
            self._remove_empty()

    def _make_parents(self) -> None:
        missing = []
        parent = self.path.parent
        while not parent.exists():
            missing.append(parent)
            parent = parent.parent
        for folder in reversed(missing):
            with suppress(FileExistsError):  # another run made it meanwhile, who removes it if need be
                folder.mkdir()
                self._made_parents.append(folder)

    def _remove_parents(self) -> None:
        for folder in reversed(self._made_parents):
            try:
                folder.rmdir()
            except OSError:  # someone else uses it by now, or the output lies there
                break
        self._made_parents.clear()


def _partial_name(name: str) -> str:
    """The name of the folder beside an output, also where there is hardly room for more than the output's own."""
    whole = f".{name}.partial"
    if len(os.fsencode(whole)) <= LONGEST_NAME:
        return whole
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f".{os.fsdecode(os.fsencode(name)[:200]).encode(errors='ignore').decode(errors='ignore')}.{digest}.partial"


def refuse_losses(folder: Path, listing: Listing, named: str) -> None:
    """Refuses to replace a folder with files that no run wrote, or that were changed since.

    Args:
        folder: The folder.
        listing: What a run wrote into it.
        named: What messages call the folder.

    Raises:
        CheckpointError: There are such files.
    """
    for names, what in (
        (listing.strangers(folder), "files that no run of hf-llfc wrote, and overwriting would delete them"),
        (listing.edited(folder), "files that were changed since hf-llfc wrote them, and the changes would be lost"),
    ):
        found = list(islice(names, _NAMED + 1))
        if found:
            raise CheckpointError(
                f"{named}: the output folder holds {what}: {_few(found)}; move them elsewhere, or choose another folder"
            )


def _few(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


def _told(journal: Journal) -> str:
    """Describes what is finished."""
    parts = [f"{len(journal.shards)} weight files"] if journal.shards else []
    return "finished: " + ", ".join([*journal.stages, *parts])
