"""Whether checkpoints fit each other, and are as they should be.

One rule for every command. What a model class needs, its file must have, which opening a checkpoint has made sure of
(`hf_llfc.parents.specs`). What one model has and another lacks, though its class does without, the other borrows. What
no class uses goes along where all have it and the permutation spec knows it, and is left out else. What differs in the
configs is a problem where the class reads it. All that is not as it stands in the files is said.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from hf_llfc.adapters import known_model_types
from hf_llfc.checkpoints import Checkpoint
from hf_llfc.checkpoints.buffers import is_constant
from hf_llfc.checkpoints.views.view import View
from hf_llfc.errors import AlignmentError, CheckpointError, SpecError, raise_all, suggest
from hf_llfc.foundation.choices import GROUPS, HEADS
from hf_llfc.parents.specs import refuse_without_class, spec_of
from hf_llfc.recipe import AlignSection
from hf_llfc.symmetry.declarations import concrete_names

logger = logging.getLogger(__name__)


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
    problems = problems_of(checkpoints, bodies_only=True)
    raise_all(problems, CheckpointError, "these checkpoints have not the same base model")
    return checkpoints[0]


def refuse_incompatible(checkpoints: Sequence[Checkpoint]) -> None:
    """Raises every reason that forbids merging, at once.

    Raises:
        CheckpointError: The checkpoints differ in architecture, sizes, tensors or vocabulary.
    """
    raise_all(problems_of(checkpoints), CheckpointError, "these checkpoints cannot be merged")


def problems_of(checkpoints: Sequence[Checkpoint], *, bodies_only: bool = False) -> list[str]:
    """Finds everything that forbids merging checkpoints, and says what differs without changing what they compute.

    Args:
        checkpoints: All are compared with the first.
        bodies_only: Whether only what the base model computes must fit, not heads and labels.
    """
    from hf_llfc.checkpoints import compare
    from hf_llfc.checkpoints.config_differences import config_differences

    problems = compare(checkpoints, bodies_only=bodies_only)
    for other in checkpoints[1:] if not problems else ():
        first = checkpoints[0]
        differing = config_differences(first, other)[1]
        if differing:
            values = "; ".join(f"{key} {second!r} against {own!r}" for key, (own, second) in differing.items())
            logger.warning(
                "%s: keys of the config that %s does not read differ from those of %s: %s",
                other.label,
                type(first.config).__name__,
                first.label,
                values,
            )
    return problems


def refuse_torn(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuses files that hold two different tensors where their config has one, where that can be read here.

    Raises:
        CheckpointError: An output head is not the embedding that the config ties it to, say.
    """
    for checkpoint in checkpoints:
        for name in checkpoint.ties if checkpoint.is_here else ():
            checkpoint.read(name)


def in_one_class(checkpoints: Sequence[Checkpoint], *, base: int | None = None) -> list[Checkpoint]:
    """Gives checkpoints whose config names no class, and the base, the class of the others.

    Args:
        checkpoints: All of a run.
        base: Which of them is the base; it may lack the head of that class.

    Raises:
        CheckpointError: One lacks tensors that the class needs, or without a class has those of none.
    """
    named = next((each for each in checkpoints if each.architecture is not None), None)
    if named is None:
        for checkpoint in checkpoints:
            refuse_without_class(checkpoint)
        return list(checkpoints)
    if all(each.architecture == named.architecture for each in checkpoints):
        return list(checkpoints)
    from hf_llfc.checkpoints.planned import in_class_of

    return [
        in_class_of(each, checkpoints[0] if index == base else named, has_head=index != base)
        if index == base or each.architecture is None
        else each
        for index, each in enumerate(checkpoints)
    ]


def sharing(checkpoints: Sequence[Checkpoint], *, base: int | None = None) -> list[Checkpoint]:
    """Gives each checkpoint the tensors of all, where they fit each other.

    Args:
        checkpoints: All of a run.
        base: Which of them is the base. Tensors that it lacks are those of a head that it never had: all models are
            given those of the first.

    Returns:
        The same checkpoints with the same tensors, some of them lent by another.
    """
    names = _in_one_order(checkpoints)
    head = () if base is None else tuple(name for name in names if name not in checkpoints[base].tensors)
    carried = _carried(checkpoints)
    everyone = []
    for index, checkpoint in enumerate(checkpoints):
        borrowed = {
            name: _lender(name, checkpoints)
            for name in names
            if name not in checkpoint.tensors or (name in head and index > 0)
        }
        everyone.append(_with_tensors(checkpoint, [*names, *carried], borrowed, checkpoints))
        _say_what_is_lent(checkpoint, borrowed, head, checkpoints)
        _say_what_is_spare(checkpoint, carried)
    return everyone


def _in_one_order(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """The names of all tensors, in the order of a checkpoint that has most of them."""
    names = dict.fromkeys(max(checkpoints, key=lambda checkpoint: len(checkpoint.tensors)).tensors)
    for checkpoint in checkpoints:
        names |= dict.fromkeys(checkpoint.tensors)
    return list(names)


def _lender(name: str, checkpoints: Sequence[Checkpoint]) -> int:
    return next(index for index, checkpoint in enumerate(checkpoints) if name in checkpoint.tensors)


def _with_tensors(
    checkpoint: Checkpoint, names: Sequence[str], borrowed: Mapping[str, int], checkpoints: Sequence[Checkpoint]
) -> Checkpoint:
    """A checkpoint with tensors that it has, and some that others lend."""
    if list(checkpoint.tensors) == list(names) and not borrowed:
        return checkpoint
    held = {**checkpoint.tensors, **checkpoint.spare}
    infos = {name: checkpoints[borrowed[name]].tensors[name] if name in borrowed else held[name] for name in names}
    lenders = [checkpoints[index].weights for index in sorted(set(borrowed.values()))]

    def make(name: str) -> Tensor:
        return checkpoints[borrowed[name]].read_unrounded(name)

    weights = View(checkpoint.weights, infos, frozenset(borrowed), make, beside=tuple(lenders))
    return replace(checkpoint, tensors=infos, weights=weights, borrowed=dict(borrowed))


def _carried(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Tensors that no class uses and that go along: all models have them, and the spec says how they move."""
    first = checkpoints[0]
    common = [
        name
        for name, info in first.spare.items()
        if all(name in each.spare and each.spare[name].shape == info.shape for each in checkpoints)
    ]
    if not common or first.settings.model_type not in known_model_types():
        return []
    spec = spec_of(first)
    optional = [replace(tensor, condition=None) for tensor in spec.declarations if tensor.optional]
    declared = concrete_names(optional, spec.axes, lambda _: True)
    common = [name for name in common if name in declared]
    shapes = {name: info.shape for name, info in first.tensors.items()}
    try:
        spec.bind({**shapes, **{name: first.spare[name].shape for name in common}})
    except SpecError:
        return []
    return common


def _say_what_is_lent(
    checkpoint: Checkpoint, borrowed: Mapping[str, int], head: Sequence[str], checkpoints: Sequence[Checkpoint]
) -> None:
    from hf_llfc.checkpoints.comparison import listed

    for index in sorted(set(borrowed.values())):
        lent = [name for name in borrowed if borrowed[name] == index and name in checkpoint.lacking]
        if lent:
            why = "is a base without the head of the models" if set(lent) <= set(head) else "does without them"
            logger.warning(
                "%s: has no %s, and %s; %s lends %s",
                checkpoint.label,
                listed(lent),
                why,
                checkpoints[index].label,
                "its own, and all models are given that head" if set(lent) <= set(head) else "its own",
            )


def _say_what_is_spare(checkpoint: Checkpoint, carried: Sequence[str]) -> None:
    from hf_llfc.checkpoints.comparison import listed

    left = [name for name in checkpoint.spare if name not in carried]
    for names, what in ((carried, "all models have them, and they are merged like all others"), (left, "left out")):
        if names:
            logger.warning("%s: %s does not use %s: %s", checkpoint.label, checkpoint.architecture, listed(names), what)


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
