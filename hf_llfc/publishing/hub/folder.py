"""What a folder must be to be published: whole, small enough for the Hub, and not known to be broken."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from hf_llfc.checkpoints.companions import companion_names
from hf_llfc.checkpoints.writing.listing import is_of_card, read_listing
from hf_llfc.errors import CheckpointError, PublishingError, raise_all, suggest
from hf_llfc.foundation.layout import CARD_FILE, LLFC_FOLDER, RECIPE_FILE, REPORT_FILE
from hf_llfc.foundation.model_names import existing
from hf_llfc.publishing.numbers import LOSS, value_text
from hf_llfc.publishing.reading import is_far_above, merge_point, model_points, not_finite, read_report
from hf_llfc.publishing.record import RunRecord

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

    from hf_llfc.checkpoints import TensorInfo

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
LARGEST_FILE = 50 * 10**9
"""In bytes: above it the Hub's client downloads through Xet alone (`MAX_HTTP_DOWNLOAD_SIZE`)."""
MOST_ENTRIES = 10_000
"""In one folder; https://huggingface.co/docs/hub/storage-limits."""
CHUNK = 8 * 1024 * 1024
_WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_NAMED = 10


@dataclass(frozen=True)
class LocalFile:
    """One file that is to be uploaded.

    Args:
        path: Its path in the repository.
        source: Where it lies.
        size: In bytes.
    """

    path: str
    source: Path
    size: int

    def is_stored_as(self, remote: RepoFile) -> bool:
        """Whether the repository holds exactly these bytes."""
        if remote.size != self.size:
            return False
        return self.sha256 == remote.lfs.sha256 if remote.lfs is not None else self.git_id == remote.blob_id

    @cached_property
    def sha256(self) -> str:
        """By which the Hub knows a large file."""
        return self._hash(hashlib.sha256())

    @cached_property
    def git_id(self) -> str:
        """By which the Hub knows a small file."""
        return self._hash(hashlib.sha1(b"blob %d\0" % self.size))

    def _hash(self, digest: Any) -> str:
        with self.source.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return str(digest.hexdigest())


def check_folder(folder: Path, include: Sequence[str] = ()) -> list[LocalFile]:
    """The files of an output folder that are published, if that is a whole one.

    These are the files that a run wrote, by its own list, and those that the user names. What others put there may be
    no one else's business: a key, a database, the state of a training run.

    Args:
        folder: The output folder.
        include: Patterns of further files, by their path in the folder; a star reaches into folders.

    Returns:
        Its files, by path.

    Raises:
        PublishingError: Everything that is missing, cut off or does not belong there, at once.
    """
    if existing(folder) is None or not folder.is_dir():
        raise PublishingError(f"{folder} is not a folder; give the output folder of a merge")
    problems: list[str] = []
    files: list[LocalFile] = []
    left: list[str] = []
    listing = read_listing(folder)
    found = {source.relative_to(folder).as_posix(): source for source in sorted(folder.rglob("*"))}
    for path, source in found.items():
        is_wanted = any(fnmatchcase(path, pattern) for pattern in include)
        is_ours = _is_of_checkpoint(path) if listing is None else path in listing.names or is_of_card(path)
        if not is_wanted and not is_ours:
            left += [path] if source.is_file() else []
        elif source.is_symlink():
            problems.append(f"{path} is a link; only what lies in the folder itself is uploaded: copy the file")
        elif source.is_file():
            files.append(LocalFile(path, source, source.stat().st_size))
    for pattern in include:
        if not any(fnmatchcase(path, pattern) and source.is_file() for path, source in found.items()):
            problems.append(f"no file is called {pattern}{suggest(pattern, left)}")
    if left:
        logger.warning(
            "%s: not uploaded, because no run wrote %s: %s; name what should be uploaded too (`--include`)",
            folder,
            "it" if len(left) == 1 else "them",
            ", ".join(left[:_NAMED]) + (f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""),
        )
    present = {file.path for file in files}
    for name, hint in (
        ("adapter_config.json" if ADAPTER in present else "config.json", "it is no checkpoint"),
        (CARD_FILE, "write the card with `hf_llfc.publishing.write_card`"),
        (f"{LLFC_FOLDER}/{RECIPE_FILE}", "only what hf_llfc merged is published with it"),
    ):
        if name not in present:
            problems.append(f"{name} is missing: {hint}")
    problems += _weight_problems(folder, present)
    problems += size_problems({file.path: file.size for file in files})
    raise_all(problems, PublishingError, f"{folder} cannot be published")
    return files


def _is_of_checkpoint(path: str) -> bool:
    """Whether a file of a folder without a list is one that a run writes, by its name."""
    if path.startswith(f"{LLFC_FOLDER}/"):
        return path.endswith((".json", ".yaml", ".safetensors", ".png", ".html"))
    return path in ("config.json", "adapter_config.json", ADAPTER, CARD_FILE) or bool(
        _WEIGHT_FILE.fullmatch(path) or companion_names([path])
    )


def refuse_too_large_for_the_hub(infos: Mapping[str, TensorInfo], max_shard_size: int) -> None:
    """Refuses, before a merge, weight files that could not be published.

    Args:
        infos: The tensors to be written.
        max_shard_size: In bytes; only a tensor that is larger makes a larger file.

    Raises:
        PublishingError: A file would be larger than the Hub takes.
    """
    sizes = [info.nbytes for info in infos.values()]
    largest = min(sum(sizes), max(max_shard_size, *sizes))
    raise_all(size_problems({WEIGHTS: largest}), PublishingError, "the merge could not be published")


def size_problems(sizes: Mapping[str, int]) -> list[str]:
    """What of an upload the Hub would not take.

    Args:
        sizes: Bytes of every file by its path in the repository.

    Returns:
        A line a problem.
    """
    problems = [
        f"{path} has {size / 1e9:.1f} GB, more than the {LARGEST_FILE / 1e9:.0f} GB that every client of the Hub can "
        "load in one file: merge again with a smaller max_shard_size"
        for path, size in sizes.items()
        if size > LARGEST_FILE
    ]
    entries = Counter(str(PurePosixPath(path).parent) for path in sizes)
    problems += [
        f"the folder {name} has {count} files, more than the {MOST_ENTRIES} that the Hub takes: merge again with a "
        "larger max_shard_size"
        for name, count in entries.items()
        if count > MOST_ENTRIES
    ]
    return problems


def _weight_problems(folder: Path, present: set[str]) -> list[str]:
    """What is wrong with the safetensors files: missing, cut off, or not what the index says."""
    from hf_llfc.checkpoints.header import read_header

    shards = _shards(folder, present)
    if isinstance(shards, str):
        return [shards]
    problems = []
    for shard, expected in sorted(shards.items()):
        if shard not in present:
            problems.append(f"{shard} is missing, which {WEIGHTS_INDEX} names")
            continue
        try:
            stored = read_header(folder / shard, shard).spans
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if missing := sorted(expected - stored.keys()):
            problems.append(
                f"{shard} lacks {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            )
    return problems


def _shards(folder: Path, present: set[str]) -> dict[str, set[str]] | str:
    """Weight file → tensors that the index says are in it, or what is wrong."""
    if WEIGHTS_INDEX in present:
        try:
            weight_map = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"]
            shards: dict[str, set[str]] = {}
            for name, shard in weight_map.items():
                shards.setdefault(str(shard), set()).add(name)
        except (ValueError, KeyError, AttributeError, TypeError):
            return f"{WEIGHTS_INDEX} is not an index of shards"
        return shards
    for name in (WEIGHTS, ADAPTER):
        if name in present:
            return {name: set()}
    return f"there are no weights: neither {WEIGHTS} nor {WEIGHTS_INDEX}"


def check_sanity(folder: Path) -> None:
    """Refuses a merge that is broken: by its diagnosis, or where there is none by its weights.

    Args:
        folder: The output folder.

    Raises:
        PublishingError: A number is not finite, the loss is far above the parents', or the verdict is not to merge.
    """
    path = folder / LLFC_FOLDER / REPORT_FILE
    own = [row.loss for row in RunRecord.load(folder).results if row.is_merge]
    reasons = _diagnosed_reasons(path, own) if path.is_file() else _weight_reasons(folder)
    reasons = reasons or _evaluated_reasons(folder)
    if reasons:
        raise PublishingError(f"{folder} should not be published: {'; '.join(reasons)}. Force it to push it anyway")


def _diagnosed_reasons(path: Path, own: Sequence[float | None]) -> list[str]:
    """What a diagnosis says; of a calibrated merge whose own loss is known its verdict on the line does not count."""
    report, reasons = read_report(path), []
    if broken := not_finite(report):
        reasons.append("not every number is finite: " + ", ".join(broken[:3]))
    merged = merge_point(report)
    losses = [point.loss for point in model_points(report) if point is not None and point.loss is not None]
    if merged is not None and merged.loss is not None and losses and is_far_above(merged.loss, losses):
        reasons.append(_far_above(merged.loss, losses))
    on_the_line = report.data.get("calibrated") is not None and report.data.get("judged") is None
    is_known = on_the_line and any(loss is not None for loss in own)
    if report.verdict.answer in ("do not merge", "contradict") and not is_known:
        reasons.append(f"the verdict is not to merge: {report.verdict.because}")
    return reasons


def _evaluated_reasons(folder: Path) -> list[str]:
    """What the evaluation of the merge itself says, which need not lie on the path that was diagnosed."""
    rows = RunRecord.load(folder).results
    own = [row.loss for row in rows if row.is_merge and row.loss is not None]
    parents = [row.loss for row in rows if row.is_parent and row.loss is not None and math.isfinite(row.loss)]
    if not all(map(math.isfinite, own)):
        return ["the loss of the merge is not finite"]
    return [_far_above(loss, parents) for loss in own if parents and is_far_above(loss, parents)]


def _far_above(loss: float, parents: Sequence[float]) -> str:
    return (
        f"the loss of the merge is {value_text(loss, LOSS)}, that of its worst parent {value_text(max(parents), LOSS)}"
    )


def _weight_reasons(folder: Path) -> list[str]:
    """The first weight that is not finite: such a model has no finite logits either."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - an open file is no mapping
                tensor = file.get_tensor(name)
                # Numbers of eight bits have no test of their own.
                tensor = tensor.float() if tensor.element_size() == 1 else tensor
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    return [f"not every weight is finite: {name}"]
    return []
