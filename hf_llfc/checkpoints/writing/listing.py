"""The list of the files that a run wrote, in the folder itself: what may be replaced, and what a user changed since."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_llfc.checkpoints.positioned import checksum
from hf_llfc.checkpoints.writing.shards import Shard
from hf_llfc.errors import LLFCError
from hf_llfc.foundation.layout import CARD_FILE, FILES_FILE, LLFC_FOLDER

FILES_FORMAT = "hf_llfc.files/1"
_LARGEST_LIST = 100_000_000
_LIST = f"{LLFC_FOLDER}/{FILES_FILE}"


@dataclass(frozen=True)
class Listing:
    """The files that a run wrote.

    Attributes:
        names: Their paths below the folder, with `/`.
        states: Path → `size` in bytes, and `checksum` of the file or `pieces` of a weight file.
        written: When the list was written, after all other files, in nanoseconds.
    """

    names: frozenset[str]
    states: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    written: int = 0

    def strangers(self, folder: Path) -> Iterator[str]:
        """Files in a folder that no run wrote, by their paths."""
        for name in files_in(folder):
            if name not in self.names and not (is_of_card(name) and not (folder / name).stat().st_size):
                yield name

    def edited(self, folder: Path) -> Iterator[str]:
        """Files that are not as the run wrote them, by their paths; not those that are gone."""
        for name in files_in(folder):
            if name in self.states and not self.is_as_written(folder, name):
                yield name

    def is_as_written(self, folder: Path, name: str) -> bool:
        """Whether a file is as the list says; its content is read only where the file is younger than the list."""
        path, state = folder / name, self.states[name]
        with suppress(OSError, LLFCError, ValueError):
            status = path.lstat()
            if "link" in state or path.is_symlink():
                return path.is_symlink() and os.readlink(path) == state.get("link")
            if status.st_size != state.get("size"):
                return False
            if max(status.st_mtime_ns, status.st_ctime_ns) <= self.written:
                return True
            if "pieces" in state:
                return Shard.of_file(path).checksum(path) == state["pieces"]
            return checksum(path) == state.get("checksum")
        return False


def list_files(folder: Path, pieces: Mapping[str, str] | None = None, of_run: Collection[str] | None = None) -> None:
    """Writes the list of the files in an output folder into it.

    Args:
        folder: The folder.
        pieces: Weight file → its checksum as `write_checkpoint` tells it, so that it need not be read again.
        of_run: Which of the files the run has written; all where None.
    """
    (folder / LLFC_FOLDER).mkdir(exist_ok=True)
    pieces = pieces or {}
    names = frozenset({name for name in files_in(folder) if of_run is None or name in of_run} | {_LIST})
    states = {name: state_of(folder / name, pieces.get(name)) for name in sorted(names - {_LIST})}
    _write(folder, Listing(names, states))


def read_listing(folder: Path) -> Listing | None:
    """The list in a folder; None if there is none."""
    path = folder / _LIST
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= _LARGEST_LIST else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("format") != FILES_FORMAT:
        return None
    files, states = content.get("files"), content.get("states", {})
    if not isinstance(files, list) or not isinstance(states, dict):
        return None
    told = {str(name): state for name, state in states.items() if isinstance(state, dict)}
    return Listing(frozenset(map(str, files)), told, path.stat().st_ctime_ns)


@contextmanager
def rewriting(folder: Path) -> Iterator[None]:
    """Keeps the list of a folder true while files of the run are written again, and cards that were not there.

    What a user had changed before stays known as changed, and what nobody wrote stays unlisted.
    """
    listing = read_listing(folder)
    before = set() if listing is None else {*listing.edited(folder), *listing.strangers(folder)}
    yield
    if listing is None:
        return
    ours = {name for name in files_in(folder) if name not in before and (name in listing.names or is_of_card(name))}
    states = {name: state for name, state in listing.states.items() if name in before}
    kept = {name for name in ours if name in listing.states and listing.is_as_written(folder, name)}
    states |= {name: listing.states[name] if name in kept else state_of(folder / name) for name in ours - {_LIST}}
    _write(folder, Listing(listing.names | ours, states))


def state_of(path: Path, pieces: str | None = None) -> dict[str, Any]:
    """What tells a file from what may become of it."""
    told: dict[str, Any] = {"size": path.lstat().st_size}
    if path.is_symlink():
        return {**told, "link": os.readlink(path)}
    return {**told, "pieces": pieces} if pieces is not None else {**told, "checksum": checksum(path)}


def is_of_card(name: str) -> bool:
    """Whether a file is one of a card, which may be written later, by its path below the folder."""
    return name == CARD_FILE or (name.startswith(f"{LLFC_FOLDER}/") and name.endswith((".png", ".html", ".json")))


def files_in(folder: Path) -> Iterator[str]:
    """The paths of all files below a folder, with `/`."""
    for path, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(path) / name).is_symlink()]
        for name in sorted([*names, *links]):
            yield (Path(path) / name).relative_to(folder).as_posix()


def _write(folder: Path, listing: Listing) -> None:
    content = {"format": FILES_FORMAT, "files": sorted(listing.names), "states": dict(sorted(listing.states.items()))}
    (folder / _LIST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
