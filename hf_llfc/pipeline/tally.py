"""What becomes of every tensor of the models: merged, copied from the only model that has it, or dropped."""

from __future__ import annotations

from collections.abc import Iterable

from hf_llfc.checkpoints import Checkpoint
from hf_llfc.merging import Merge, Merges
from hf_llfc.parents.opening import Models
from hf_llfc.publishing.record import TensorsOf, TensorsRecord


def tally(opened: Models, merge: Merge | Merges) -> TensorsRecord:
    """Finds what becomes of every tensor.

    Args:
        opened: The models.
        merge: What is made of them.
    """
    copied: dict[str, list[str]] = {}
    for part in merge.parts:
        for name in part.infos:
            if (owner := _only_owner(opened, part, name)) is not None:
                copied.setdefault(owner, []).append(name)
    total = len(merge.infos)
    dropped = {each.id: [name for name in each.spare if name not in each.tensors] for each in opened.all}
    return TensorsRecord(
        total,
        total - sum(map(len, copied.values())),
        tuple(TensorsOf.of(model, names) for model, names in copied.items()),
        tuple(TensorsOf.of(model, names) for model, names in dropped.items() if names),
        sum(each.buffers for each in opened.all),
    )


def _only_owner(opened: Models, part: Merge, name: str) -> str | None:
    """The model that a tensor is copied from; None where several have it."""
    holders = [each for each in opened.all if name not in each.borrowed]
    if len(holders) == 1 < len(opened.all):
        return holders[0].id
    weights = part.weights.get(name, ())
    if part.base is None and part.method is None and sorted(weights) == [*[0.0] * (len(weights) - 1), 1.0]:
        return _id_of(part.sources[list(weights).index(1.0)].label, opened.all)
    return None


def _id_of(label: str, models: Iterable[Checkpoint]) -> str:
    return next((each.id for each in models if each.label == label), label)
