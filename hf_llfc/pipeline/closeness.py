"""How near models lie before they are merged, by a glance at their weights, and what their files warn of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from hf_llfc.checkpoints import TensorInfo
from hf_llfc.checkpoints.comparison import has_tokenizer
from hf_llfc.checkpoints.preparation import preparation_differences
from hf_llfc.checkpoints.source import Source
from hf_llfc.recipe import Recipe

if TYPE_CHECKING:  # a plan loads neither weights nor torch for a warning
    import torch

    from hf_llfc.parents.carrying import Carried
    from hf_llfc.parents.opening import Models

COMMON_ANCESTOR = 0.9
"""Median cosine over matrices from which on two models count as children of one ancestor before anything is matched."""

FAR_APART = 0.5
"""Median cosine over matrices below which a merge of models as they are is warned of."""

SAMPLED_BLOCKS = 8
SAMPLED_ELEMENTS = 4096
"""Of every matrix, so many blocks of so many elements are compared where the bytes lie in a file."""

MATRICES_MADE = 16
"""Matrices that are compared of models whose tensors are made as they are read."""


@dataclass(frozen=True)
class Closeness:
    """How near the weights of two models lie, by a sample of them.

    Attributes:
        model: Label of the one.
        reference: Label of the other.
        cosine: Median cosine of the matrices.
        matrices: How many were compared.
    """

    model: str
    reference: str
    cosine: float
    matrices: int

    @property
    def is_far(self) -> bool:
        """Whether averages of the two, as they are, are likely to be of no use."""
        return self.cosine < FAR_APART

    @property
    def sentence(self) -> str:
        """What there is to know about it."""
        return (
            f"the weights of {self.model} and {self.reference} are far apart, and nothing aligned them, so this merge "
            f"is probably broken: the median cosine of {self.matrices} matrices is {self.cosine:.3f}, of fine-tunes of "
            f"one model above {COMMON_ANCESTOR:g}; align them (`align` in a recipe, `--align weight_matching`), or "
            "ask `hf-llfc check`"
        )


def warnings_of(opened: Models, beside: Carried) -> list[str]:
    """What the files beside the weights tell of a merge, a sentence each.

    Args:
        opened: The models.
        beside: What goes along.
    """
    prepared = f"inputs are prepared as {opened.tokenizer_source.label} does"
    has_own_template = opened.chat_template is not None
    differences = preparation_differences(opened.parents, templates=not has_own_template)
    warnings = [f"{prepared}: {difference}" for difference in differences]
    if has_own_template:
        of_templates = [each for each in preparation_differences(opened.parents) if each not in differences]
        warnings += [f"the chat template is that of the recipe: {difference}" for difference in of_templates]
    warnings += _without_tokenizer(opened)
    if beside.reason is not None:
        warnings.append(
            f"the modules of the SentenceTransformer {opened.parents[0].label} (modules.json and what it names) are not"
            f" part of the merge: {beside.reason}"
        )
    return warnings


def _without_tokenizer(opened: Models) -> list[str]:
    """Models without a tokenizer beside others with one: nothing tells which tokens their rows are of."""
    known = [each.label for each in opened.all if has_tokenizer(each)]
    if opened.union is not None or opened.sections or not known:
        return []
    return [
        f"{each.label} has no tokenizer, so that its rows are taken to be of the same tokens as those of {known[0]}"
        for each in opened.all
        if each.label not in known
    ]


def closeness(opened: Models, recipe: Recipe) -> list[Closeness]:
    """How near every model is to the one that it is merged with; nothing where an alignment is asked for."""
    if recipe.align.method != "none" or opened.sections:
        return []
    from hf_llfc.parents.parent import Parent

    first, *others = ([opened.base] if opened.base is not None else []) + list(opened.parents)
    sources = [Parent(each).source for each in (first, *others)]
    return [sampled_closeness(sources[0], each, first.tensors) for each in sources[1:]]


def sampled_closeness(reference: Source, model: Source, infos: Mapping[str, TensorInfo]) -> Closeness:
    """Level 1 at the cost of a glance: the median cosine of the matrices, by blocks spread over each.

    Args:
        reference: One model.
        model: The other.
        infos: Dtype and shape of their tensors.

    Raises:
        CheckpointError: A tensor cannot be read.
    """
    from hf_llfc.checkpoints.buffers import is_constant
    from hf_llfc.parents.task_vectors import gram

    names = [name for name, info in infos.items() if len(info.shape) > 1 and info.dtype.is_floating_point]
    names = [name for name in names if not is_constant(name)]
    made = [name for name in names if reference.span(name) is None or model.span(name) is None]
    skipped = set(made) - set(made[:: -(-len(made) // MATRICES_MADE)] if made else [])
    cosines = []
    for name in names:
        if name in skipped:
            continue
        (aa, ab), (_, bb) = gram([_sample(each, name) for each in (reference, model)]).tolist()
        if aa > 0 and bb > 0 and math.isfinite(aa + bb):
            cosines.append(ab / math.sqrt(aa * bb))
    return Closeness(model.label, reference.label, median(cosines) if cosines else 1.0, len(cosines))


def _sample(source: Source, name: str) -> torch.Tensor:
    """Blocks of a tensor in one row: the same of every model."""
    import torch

    from hf_llfc.checkpoints import tensor_bytes

    span = source.span(name)
    if span is None:
        whole = source.read(name).flatten()
        return torch.cat([whole[start : start + count] for start, count in _blocks(whole.numel())])
    blocks = _blocks(span.nbytes // span.dtype.itemsize)
    sample = [torch.empty(count, dtype=span.dtype) for _, count in blocks]
    for block, (start, _) in zip(sample, blocks, strict=True):
        span.read_into(tensor_bytes(block), start * span.dtype.itemsize)
    return torch.cat(sample)


def _blocks(size: int) -> list[tuple[int, int]]:
    """First element and number of elements of every block of a sample, spread evenly."""
    count = min(SAMPLED_ELEMENTS, -(-size // SAMPLED_BLOCKS))
    return [(index * (size - count) // (SAMPLED_BLOCKS - 1), count) for index in range(SAMPLED_BLOCKS)]
