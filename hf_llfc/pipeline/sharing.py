"""The files of a checkpoint, whose writing the processes of a run share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from torch import Tensor

from hf_llfc.checkpoints import ShardFiles, write_checkpoint, write_share
from hf_llfc.checkpoints.chat_templates import set_template
from hf_llfc.checkpoints.writing.journal import storing
from hf_llfc.checkpoints.writing.shards import ShardLayout
from hf_llfc.foundation.tensor_files import save_tensors
from hf_llfc.merging import Merge, Merges, merge_streamed
from hf_llfc.pipeline.run_context import RunContext


def write_shared(
    run: RunContext,
    merge: Merge | Merges,
    tensors: Callable[[], Iterator[tuple[str, Tensor]]] | None = None,
    *,
    doing: str = "merging",
) -> None:
    """Writes a checkpoint into the staging folder, and notes every weight file in the journal.

    Args:
        run: Its first parent gives the configs. Each process writes its share into files that the main one has made.
        merge: What becomes of every tensor.
        tensors: Makes them on the main process alone, in place of the merge.
        doing: What the progress is called.
    """
    recipe = run.recipe

    def fill(files: ShardFiles, names: Sequence[str]) -> None:
        for number, part in enumerate(merge.parts, start=1):
            what = doing if len(merge.parts) == 1 else f"{doing} part {number} of {len(merge.parts)}"
            merge_streamed(
                part,
                files,
                names=[name for name in names if name in part.infos],
                workers=run.processes.workers(),
                memory=recipe.max_memory,
                on_bytes=partial(run.progress, what),
            )

    def write(fill: Iterable[tuple[str, Tensor]] | Callable[[ShardFiles], None]) -> None:
        write_modules(run)
        write_checkpoint(
            run.staging,
            merge.infos,
            fill,
            config=run.models.parents[0].settings,
            companions=run.carried.files,
            max_shard_size=recipe.max_shard_size,
            journal=run.output.journal,
        )
        if run.models.chat_template is not None:
            with storing(run.staging):
                set_template(run.staging, run.models.chat_template)

    if tensors is not None:
        run.on_main(lambda run: write(tensors()))
    elif run.processes.is_main:
        write(lambda files: fill(files, run.processes.gather(files.names)[0]))
    else:
        names = run.processes.gather(None)[0]  # the main process has made the files by now
        write_share(run.staging, merge.infos, partial(fill, names=names), max_shard_size=recipe.max_shard_size)
    run.on_main(lambda run: note_shards(run, ShardLayout.of(merge.infos, recipe.max_shard_size)))


def write_modules(run: RunContext) -> None:
    """Writes the weights of modules beside the model, which are small and made at once."""
    with storing(run.staging):
        for name, tensors in run.carried.weights.items():
            (run.staging / name).parent.mkdir(exist_ok=True)
            save_tensors(tensors, run.staging / name, {"format": "pt"})


def note_shards(run: RunContext, layout: ShardLayout) -> None:
    """Notes the weight files that several processes wrote, of which none alone knows when they are complete."""
    journal = run.output.journal
    for filename, shard in layout.shards.items():
        if filename not in journal.shards:
            journal.finish_shard(filename, shard.checksum(journal.folder / filename))
