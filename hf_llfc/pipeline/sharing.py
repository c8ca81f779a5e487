"""Work that the processes of a run share: stages whose results a journal keeps, and the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from hf_llfc.checkpoints import Checkpoint, OutputFolder, ShardFiles, write_checkpoint, write_share
from hf_llfc.checkpoints.writing.journal import Journal
from hf_llfc.checkpoints.writing.shards import MAX_SHARD_SIZE, ShardLayout
from hf_llfc.merging import Merge, merge_streamed
from hf_llfc.merging.streaming import MEMORY
from hf_llfc.parallel.processes import Processes

Value = TypeVar("Value")


def shared_stage(
    output: OutputFolder,
    processes: Processes,
    name: str,
    find: Callable[[], Value],
    *,
    save: Callable[[Journal, Value], tuple[Any, Iterable[Path]]],
    load: Callable[[Journal, Any], Value],
) -> Value:
    """The result of a stage whose work all processes share; see `Journal.stage`."""
    made = [] if processes.on_main(lambda: name in output.journal.stages) else [find()]

    def keep() -> Value:
        journal = output.journal
        return journal.stage(
            name, made.pop, save=lambda result: save(journal, result), load=lambda value: load(journal, value)
        )

    return processes.on_main(keep)


def write_shared(
    output: OutputFolder,
    processes: Processes,
    folder: Path,
    merge: Merge,
    first: Checkpoint,
    *,
    companions: Sequence[Path],
    max_shard_size: int = MAX_SHARD_SIZE,
    max_memory: int = MEMORY,
    tensors: Callable[[], Iterator[tuple[str, Tensor]]] | None = None,
    on_bytes: Callable[[int, int], None],
) -> None:
    """Writes a checkpoint whose tensors all processes share, and notes every weight file in the journal.

    Args:
        output: What is being made.
        processes: Each writes its share into files that the main one has made.
        folder: Where, on every process.
        merge: What becomes of every tensor.
        first: Gives the configs.
        companions: Files to copy beside the weights.
        max_shard_size: The size in bytes above which weights are split into several files.
        max_memory: See `merge_streamed`.
        tensors: Makes them on the main process alone, in place of the merge.
        on_bytes: Told how many bytes this process has done and how many it will do.
    """

    def fill(files: ShardFiles, names: Sequence[str]) -> None:
        workers = processes.workers()
        merge_streamed(merge, files, names=names, workers=workers, memory=max_memory, on_bytes=on_bytes)

    def write(fill: Iterable[tuple[str, Tensor]] | Callable[[ShardFiles], None]) -> None:
        write_checkpoint(
            folder,
            merge.infos,
            fill,
            config=first.settings,
            companions=companions,
            max_shard_size=max_shard_size,
            finished=output.journal.shards,
            on_shard=output.journal.finish_shard,
        )

    if tensors is not None:
        processes.on_main(lambda: write(tensors()))
    elif processes.is_main:
        write(lambda files: fill(files, processes.gather(files.names)[0]))
    else:
        names = processes.gather(None)[0]  # the main process has made the files by now
        write_share(folder, merge.infos, partial(fill, names=names), max_shard_size=max_shard_size)
    processes.on_main(lambda: note_shards(output.journal, ShardLayout.of(merge.infos, max_shard_size)))


def note_shards(journal: Journal, layout: ShardLayout) -> None:
    """Notes the weight files that several processes wrote, of which none alone knows when they are complete."""
    for filename, shard in layout.shards.items():
        if filename not in journal.shards:
            journal.finish_shard(filename, shard.checksum(journal.folder / filename))
