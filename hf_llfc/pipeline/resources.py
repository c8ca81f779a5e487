"""What a run needs of disk and memory, and whether it is there, asked before the work begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_llfc.alignment.costs import matching_memory
from hf_llfc.checkpoints import Checkpoint, OutputFolder, TensorInfo
from hf_llfc.errors import CheckpointError
from hf_llfc.foundation.choices import AUTO
from hf_llfc.parallel.memory import available_memory
from hf_llfc.parents.probe import probe_memory
from hf_llfc.pipeline.weighting import working_dtype
from hf_llfc.recipe import Recipe

# The card, plots, tokenizer and alignments beside the weights.
_ROOM_BESIDE = 50_000_000


def peak_memory(recipe: Recipe, checkpoints: Sequence[Checkpoint], infos: Mapping[str, TensorInfo]) -> int:
    """Bytes that tensors of the models take at the peak of a run; Python and its libraries come on top.

    Args:
        recipe: What is run.
        checkpoints: All that are merged, the first of them first.
        infos: What is written.
    """
    # Merged in parts, except what an alignment moves.
    largest = max((info.nbytes for info in infos.values()), default=0)
    held = min(largest * (len(checkpoints) + 2), recipe.max_memory)
    if recipe.align.method != "none":
        held = max(held, 2 * largest)
    if checkpoints[0].reindexing is not None:
        # The embeddings of all models, and those of one before and after rows of the others stand in.
        held = max(held, (len(checkpoints) + 3) * largest)
    if recipe.align.method != "none":
        held = max(held, matching_memory(checkpoints[0], recipe.align, len(checkpoints)))
        held = max(held, probe_memory(checkpoints[0]) if recipe.align.probe else 0)
    if recipe.measures_importance:
        # A model, its gradient and its importance in float32.
        held = max(held, max(each.nbytes for each in checkpoints) + 3 * importance_bytes(infos))
    if recipe.calibrate is not None:
        # The merge and its parents, and the merge once more to begin anew with another ridge.
        held = max(held, (len(recipe.models) + 1 + (recipe.calibrate.ridge == AUTO)) * working_bytes(infos))
    if recipe.diagnose is not None and not recipe.diagnose.offload:
        # The models, and the one between them, in the dtype in which they are stored.
        held = max(held, sum(each.nbytes for each in checkpoints) + sum(info.nbytes for info in infos.values()))
    return held


def bytes_beside(recipe: Recipe, infos: Mapping[str, TensorInfo]) -> int:
    """Bytes on the disk that a run takes beside its output while it works."""
    beside = len(recipe.models) * importance_bytes(infos) if recipe.measures_importance else 0
    if recipe.calibrate is not None:
        # The merge, what is finished of its calibration, all of that, and the merge as it would be written.
        beside += 3 * working_bytes(infos) + sum(info.nbytes for info in infos.values())
    return beside


def working_bytes(infos: Mapping[str, TensorInfo]) -> int:
    """Bytes of a model that is calibrated."""
    return working_dtype(infos).itemsize * sum(info.elements for info in infos.values())


def importance_bytes(infos: Mapping[str, TensorInfo]) -> int:
    """Bytes of the importance of one model's weights."""
    return 4 * sum(info.elements for info in infos.values())


def refuse_without_room(output: OutputFolder, infos: Mapping[str, TensorInfo], beside: int = 0) -> None:
    """Refuses to begin where the weights will not fit on the disk.

    Args:
        output: Where they go.
        infos: What is written.
        beside: Bytes of what lies there while the run works.

    Raises:
        CheckpointError: They do not.
    """
    needed = sum(info.nbytes for info in infos.values()) + _ROOM_BESIDE + beside
    free = output.free_bytes()
    if needed > free:
        raise CheckpointError(
            f"{output.path}: the output takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there; make room"
            " or choose another output folder"
        )


def refuse_without_memory(needed: int) -> None:
    """Refuses to begin what will not fit into memory and swap.

    Args:
        needed: Bytes.

    Raises:
        CheckpointError: It does not.
    """
    free = available_memory()
    if needed > free:
        raise CheckpointError(
            f"tensors take {needed / 1e9:.2f} GB of memory at the peak of this run, and {free / 1e9:.2f} GB are free;"
            " free some, or ask for less: `offload` in `diagnose`, no `calibrate`, or `exclude` the widest axis of"
            " `align`"
        )
