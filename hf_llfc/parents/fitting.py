"""Whether checkpoints fit each other, and are as they should be."""

from __future__ import annotations

from collections.abc import Sequence

from hf_llfc.checkpoints import Checkpoint
from hf_llfc.checkpoints.buffers import is_constant
from hf_llfc.errors import AlignmentError, CheckpointError, SpecError, raise_all, suggest
from hf_llfc.foundation.choices import GROUPS, HEADS
from hf_llfc.recipe import AlignSection


def comparable(checkpoints: Sequence[Checkpoint], heads: str, *, aligned: bool) -> Checkpoint | None:
    """Refuses checkpoints that cannot be compared.

    Args:
        checkpoints: All.
        heads: One of `HEADS`.
        aligned: Whether some of them are to be moved.

    Returns:
        The checkpoint whose head all others are given, or None where each has its own.

    Raises:
        CheckpointError: They do not fit each other, or, with one head for all, their base models do not.
        AlignmentError: Models of different heads were to be aligned.
    """
    if heads not in HEADS:
        raise CheckpointError(f"unknown heads {heads!r}{suggest(heads, HEADS)} (known: {', '.join(HEADS)})")
    if heads == "own":
        refuse_incompatible(checkpoints)
        return None
    if aligned:
        raise AlignmentError("models under one head are not aligned; leave out align, or compare them with their own")
    from hf_llfc.checkpoints import compare

    problems = compare(checkpoints, bodies_only=True)
    raise_all(problems, CheckpointError, "these checkpoints have not the same base model")
    return checkpoints[0]


def refuse_incompatible(checkpoints: Sequence[Checkpoint]) -> None:
    """Raises every reason that forbids merging, at once.

    Raises:
        CheckpointError: The checkpoints differ in architecture, sizes, tensors or vocabulary.
    """
    from hf_llfc.checkpoints import compare

    raise_all(compare(checkpoints), CheckpointError, "these checkpoints cannot be merged")


def refuse_changed(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuses checkpoints whose files were written to while they were read.

    Raises:
        CheckpointError: One was.
    """
    for checkpoint in checkpoints:
        checkpoint.refuse_changed()


def refuse_not_finite(checkpoint: Checkpoint) -> None:
    """Names the first tensor with NaN or Inf, which a model would spread over everything that it computes.

    Raises:
        CheckpointError: There is one.
    """
    for name, tensor in checkpoint.state_dict():
        if not is_constant(name) and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{name} of {checkpoint.label}: some elements are NaN or infinite; the file is damaged or the training "
                "diverged: use another checkpoint or revision"
            )


def in_groups(checkpoints: Sequence[Checkpoint], options: AlignSection) -> list[Checkpoint]:
    """The checkpoints as they are aligned: in canonical form where more than permutations are asked for.

    Raises:
        SpecError: The architecture knows no more than permutations.
        AlignmentError: The options ask for more than permutations from a method that knows no others.
    """
    if options.groups not in GROUPS:
        raise AlignmentError(
            f"unknown groups {options.groups!r}{suggest(options.groups, GROUPS)} (known: {', '.join(GROUPS)})"
        )
    if options.groups == "permutation" or options.method == "none":
        return list(checkpoints)
    from hf_llfc.adapters.canonical_forms import canonical_form
    from hf_llfc.checkpoints.views.canonical import canonical_checkpoint

    grouped = []
    for checkpoint in checkpoints:
        try:
            form = canonical_form(checkpoint.config)
        except SpecError as error:
            raise SpecError(f"{checkpoint.label}: {error}") from None
        grouped.append(canonical_checkpoint(checkpoint, form))
    return grouped
