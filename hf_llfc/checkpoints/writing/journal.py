"""What of an output is finished, so that an interrupted run goes on where it stopped.

The journal is one JSON file beside the output that is being made. It says what the output is made from (recipe, inputs,
versions), and then which stages and shards are done, with a checksum of every file that holds their result. It is
replaced as a whole after what it tells of lies on the disk, so that it never tells of more than a power cut leaves.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from hf_llfc.checkpoints.files import is_outside
from hf_llfc.checkpoints.positioned import checksum
from hf_llfc.errors import CheckpointError, StorageError

logger = logging.getLogger(__name__)

FORMAT = "hf_llfc.journal/1"
WEIGHTS_STAGE = "weights"
"""The stage after which the output is a checkpoint, whatever is measured and told of it afterwards."""
LARGEST_JOURNAL = 100_000_000
_SHOWN_DIFFERENCES = 5

Value = TypeVar("Value")


@dataclass
class Journal:
    """The finished parts of one output; in a run of several processes the main one alone writes it, from any thread.

    Attributes:
        path: The file.
        folder: Where the output is made.
        identity: What the output is made from, as JSON values.
        stages: Finished stage → `value`, its result as JSON values, and `files`, path below the folder →
            checksum.
        shards: Finished weight file → its checksum, as `write_checkpoint` tells it.
        is_complete: Whether everything is finished, and the output only has to be moved into place.
        of_weights: What the weights are made from, whatever is measured afterwards; None where that is not told apart.
    """

    path: Path
    folder: Path
    identity: Mapping[str, Any]
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)
    is_complete: bool = False
    of_weights: str | None = None
    _writing: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is finished yet."""
        return not (self.stages or self.shards or self.is_complete)

    def save(self) -> None:
        """Replaces the file.

        Raises:
            StorageError: The disk is full or cannot be written.
        """
        content = {
            "format": FORMAT,
            "identity": self.identity,
            "stages": self.stages,
            "shards": self.shards,
            "complete": self.is_complete,
            "of_weights": self.of_weights,
        }
        draft = self.path.with_suffix(".draft")
        with storing(self.path.parent):
            draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
            flush(draft)
            draft.replace(self.path)
            flush(self.path.parent)

    @classmethod
    def load(cls, path: Path, folder: Path) -> Journal | None:
        """Reads a journal; None if there is none.

        Raises:
            CheckpointError: The file is no journal.
        """
        try:
            if path.stat().st_size > LARGEST_JOURNAL:
                raise ValueError(f"more than {LARGEST_JOURNAL} bytes")
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls._checked(content, path, folder)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: what an interrupted run had finished cannot be read ({error}); begin anew with --restart"
            ) from None

    @classmethod
    def _checked(cls, content: Any, path: Path, folder: Path) -> Journal:
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"not a journal of format {FORMAT!r}")
        identity, stages = content.get("identity"), content.get("stages")
        shards: Any = content.get("shards")
        if not isinstance(identity, dict) or not isinstance(stages, dict) or not _are_checksums(shards):
            raise ValueError("identity, stages or shards are missing")
        for stage, entry in stages.items():
            if not isinstance(entry, dict) or "value" not in entry or not _are_checksums(entry.get("files")):
                raise ValueError(f"the stage {stage!r} is not complete")
        of_weights = content.get("of_weights")
        return cls(path, folder, identity, stages, shards, content.get("complete") is True, of_weights)

    def differences(self, identity: Mapping[str, Any]) -> list[str]:
        """Lists how the inputs of the journal's output differ from others; none if the two are the same."""
        return [
            f"{name} was {_short(before)} and is {_short(now)}"
            for name, before, now in _differing(self.identity, identity)
        ]

    def keep_weights(self, identity: Mapping[str, Any]) -> None:
        """Forgets all that came after the weights, for an output that differs in that alone.

        Args:
            identity: What that output is made from.
        """
        kept = list(self.stages)[: list(self.stages).index(WEIGHTS_STAGE) + 1]
        self.stages = {name: self.stages[name] for name in kept}
        self.identity, self.is_complete = identity, False
        self.save()

    def check_files(self) -> None:
        """Forgets every stage whose files are not as they were written, and all stages after it."""
        for stage, entry in list(self.stages.items()):
            if all(_has_checksum(self.folder / name, digest) for name, digest in entry["files"].items()):
                continue
            logger.warning("the files of the stage %r are not as they were written; it is done again", stage)
            index = list(self.stages).index(stage)
            for later in list(self.stages)[index:]:
                del self.stages[later]
            self.is_complete = False
            return

    def stage(
        self,
        name: str,
        make: Callable[[], Value],
        *,
        save: Callable[[Value], tuple[Any, Iterable[Path]]],
        load: Callable[[Any], Value],
    ) -> Value:
        """The result of a stage: read back where an interrupted run had finished it, else made and saved.

        Either way it is what `load` reads, so that a run that was interrupted gives bit for bit what any other gives.

        Args:
            name: What the journal calls the stage.
            make: Does the work.
            save: Writes the result below the folder; gives JSON values, and the files it wrote.
            load: Reads the result from these JSON values and files.

        Raises:
            StorageError: The disk is full or cannot be written.
        """
        if name not in self.stages:
            value, files = self._saved(save, make())
            self.finish(name, value, files)
        return load(self.stages[name]["value"])

    def _saved(self, save: Callable[[Value], tuple[Any, Iterable[Path]]], result: Value) -> tuple[Any, list[Path]]:
        with storing(self.folder):
            value, files = save(result)
            return value, list(files)

    def finish(self, name: str, value: Any = None, files: Iterable[Path] = ()) -> None:
        """Notes that a stage is finished, after its files are on the disk.

        Args:
            name: What the journal calls the stage.
            value: Its result, as JSON values.
            files: Where else it lies.
        """
        checksums = {}
        with storing(self.folder):
            for path in files:
                flush(path)
                flush(path.parent)
                checksums[path.relative_to(self.folder).as_posix()] = checksum(path)
            flush(self.folder)
        self.stages[name] = {"value": value, "files": checksums}
        self.save()

    def drop(self, names: Iterable[str]) -> None:
        """Forgets stages and removes their files, which nobody needs any more.

        Raises:
            StorageError: The disk is full or cannot be written.
        """
        entries = [self.stages.pop(name) for name in names]
        if entries:
            self.save()
        with storing(self.folder):
            for file in (file for entry in entries for file in entry["files"]):
                (self.folder / file).unlink(missing_ok=True)

    def release(self, name: str) -> None:
        """Removes the files of a stage whose value alone is needed from now on.

        Raises:
            StorageError: The disk is full or cannot be written.
        """
        files = self.stages[name]["files"]
        self.stages[name]["files"] = {}
        self.save()
        with storing(self.folder):
            for file in files:
                (self.folder / file).unlink(missing_ok=True)

    def finish_shard(self, filename: str, digest: str) -> None:
        """Notes that a weight file is written, after it is on the disk; `write_checkpoint` calls this."""
        with storing(self.folder):
            flush(self.folder / filename)
            flush(self.folder)
        with self._writing:
            self.shards[filename] = digest
            self.save()

    def complete(self) -> None:
        """Notes that only the move into place is left."""
        self.is_complete = True
        self.save()


@contextmanager
def storing(folder: Path) -> Iterator[None]:
    """Turns what the system says of a full or failing disk into one error.

    Raises:
        StorageError: The disk is full or cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StorageError(f"{folder}: the output cannot be written ({what}); make room there and run again") from error


def flush(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on the disk."""
    if path.is_dir() and os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(folder: Path) -> None:
    """Waits until everything in a folder is on the disk."""
    for path in sorted(folder.rglob("*")):
        flush(path)
    flush(folder)


def _has_checksum(path: Path, digest: str) -> bool:
    with suppress(OSError):
        return path.is_file() and checksum(path) == digest
    return False


def _are_checksums(value: object) -> bool:
    """Whether these are files below a folder with a checksum each."""
    return isinstance(value, dict) and all(
        name.isprintable() and not is_outside(name) and isinstance(digest, str) for name, digest in value.items()
    )


def _differing(before: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Lists where two JSON values differ: the path, and both values there."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*before, *(key for key in now if key not in before)]
        differences = [
            _differing(before.get(key), now.get(key), f"{name}.{key}" if name else key)
            for key in keys
            if before.get(key) != now.get(key)
        ]
        return [difference for listed in differences for difference in listed]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        differences = [_differing(*pair, f"{name}.{index}") for index, pair in enumerate(zip(before, now, strict=True))]
        return [difference for listed in differences for difference in listed]
    return [] if before == now else [(name, before, now)]


def listed(differences: list[str]) -> str:
    """The first differences in one line."""
    more = len(differences) - _SHOWN_DIFFERENCES
    return "; ".join(differences[:_SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")


def _short(value: Any) -> str:
    return "absent" if value is None else repr(value)[:80]
