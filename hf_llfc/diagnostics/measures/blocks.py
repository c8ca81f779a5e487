"""Where a merge breaks: its barrier by block, the angle of the models' task vectors there, and where its drift arises.

Three questions to every block (and to what runs before and after all of them), with the rest of the network as it is:

    alone    only this block is merged, and the rest is a parent's
    without  all is merged but this block, which is a parent's
    step     all up to and with this block is merged, and the rest is a parent's: by how much this block adds to that

Each is the loss less that of the parents, as the barrier is, in the mean over the parents by their shares; so the steps
of all blocks sum to the barrier. Landscaping linear mode connectivity (arXiv 2406.16300) takes the first two.

The drift of a block is the distance of its output in the merge from the blend of the parents' outputs. It is split by
running the merge's block on the blend of its inputs: what is off then arose here, the rest came from upstream.

No trial runs the blocks before the one that it changes: what they gave is kept for the time of a batch.

Shape legend: b parts, n samples.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_llfc.diagnostics.batch_norm import batch_norm_state, has_batch_norm, recompute_batch_norm
from hf_llfc.diagnostics.combination import tensors_by_name
from hf_llfc.diagnostics.features.layers import sample_vectors
from hf_llfc.diagnostics.features.parts import Part, find_parts
from hf_llfc.diagnostics.features.trial import Layer, first_tensor
from hf_llfc.diagnostics.measures.scores import BatchScores
from hf_llfc.diagnostics.measures.stitching import Boundary, changed_in_place, recorded, replaced, with_first_tensor
from hf_llfc.diagnostics.measures.subject import Subject
from hf_llfc.diagnostics.rows import BlockRow
from hf_llfc.diagnostics.statistics import products
from hf_llfc.diagnostics.streaming import attention_mask, check_finite
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.data import EvaluationData
from hf_llfc.evaluation.models import forward_logits

MERGE = -1
"""Stands for the merge where the number of a model is expected."""

Question = tuple[str, int, int]
"""What is asked, the number of the part, and the parent whose the rest (or the part) is."""


@dataclass
class BlockSums:
    """Sums over the samples seen.

    Args:
        losses: Summed loss of every network.
        count: Number of predictions.
        drift: ‖merged − blend‖², the inner product of that difference with its local part, and ‖blend‖², (b, 3).
    """

    losses: dict[Question, float]
    count: int
    drift: Tensor

    def merge(self, other: BlockSums) -> None:
        """Adds what another process has gathered."""
        for question, loss in other.losses.items():
            self.losses[question] = self.losses.get(question, 0.0) + loss
        self.count += other.count
        self.drift = self.drift + other.drift

    def cpu(self) -> BlockSums:
        """A copy in main memory, for other processes."""
        return BlockSums(dict(self.losses), self.count, self.drift.cpu())


class Blocks:
    """The barrier, the models' differences and the drift of features by block.

    Without labels the loss is the cross-entropy with the predictions of the parents' ensemble (the blend of their
    logits), as where the barrier itself is told without labels.

    Args:
        subject: The merge and its models, in evaluation mode.
        batch: Any batch, for the trial run.
        data: Says whether and how outputs are scored.

    Raises:
        EvaluationError: A weight is not in memory.
    """

    def __init__(self, subject: Subject, batch: Mapping[str, Tensor], data: EvaluationData) -> None:
        self.subject, self.data = subject, data
        self.parts = find_parts(subject.models[0], batch)
        self.overwritten = changed_in_place(subject.models[0], batch)
        self.tensors = {index: tensors_by_name(model) for index, model in enumerate(subject.models)}
        self.tensors[MERGE] = tensors_by_name(subject.merge)
        if any(tensor.device.type == "meta" for tensor in self.tensors[0].values()):
            raise EvaluationError("blocks: weights are offloaded; leave blocks out of the measures, or load all models")
        self.distances = [self._distance(part) for part in self.parts]
        self.working = _Working(subject.models[0], self.parts, self.tensors)
        self.buffers = dict(self._recomputed()) if subject.batch_norm_data is not None else {}
        device = subject.models[0].device
        drift = torch.zeros((len(self.parts), 3), dtype=torch.float64, device=device)
        self.sums = BlockSums(defaultdict(float), 0, drift)

    def _questions(self, number: int) -> list[tuple[str, int, int | None]]:
        """The networks that tell of a part: the question, the part from which on they run, and who runs before it.

        None stands for the parent.
        """
        asked: list[tuple[str, int, int | None]] = [("alone", number, None), ("without", number, MERGE)]
        return asked + ([("upto", number + 1, MERGE)] if number < len(self.parts) - 1 else [])

    def _recomputed(self) -> Iterator[tuple[Question, dict[str, Tensor]]]:
        """Statistics of batch normalization of every network, from the part on that is not as in one of the models."""
        data = self.subject.batch_norm_data
        assert data is not None
        if not has_batch_norm(self.working.model):
            return
        for parent in self.subject.parents:
            for number in range(len(self.parts)):
                for question, at, _ in self._questions(number):
                    self.working.become(self._sources(question, at, parent))
                    recompute_batch_norm(self.working.model, data.batches())
                    later = {name for part in self.parts[at:] for name in part.tensors}
                    state = batch_norm_state(self.working.model)
                    yield (question, number, parent), {name: state[name] for name in later & set(state)}
                    self.working.forget()

    def _distance(self, part: Part) -> tuple[float | None, float | None]:
        """Angle between the task vectors of a part in degrees, and size of the models' differences there."""
        *models, last = (dict(model.named_parameters()) for model in self.subject.models)
        names = [name for name in part.tensors if name in last]
        if self.subject.has_base:
            gram = sum((_gram([own[name] for own in models], last[name]) for name in names), torch.zeros(()))
            size = sum(float(last[name].double().square().sum()) for name in names)
            return _mean_angle(gram), _ratio(float(gram.diagonal().mean()), size) if names else None
        models = [*models, last]
        apart = sum(float(_gram([a[n]], b[n])) for a, b in combinations(models, 2) for n in names)
        size = sum(float(_gram([own[name]])) for own in models for name in names) / len(models)
        return None, _ratio(apart / math.comb(len(models), 2), size)

    def add(self, batch: Mapping[str, Tensor], sample_ids: Tensor) -> None:
        """Runs every model, and every trial from the block on that it changes."""
        subject = self.subject
        mask = attention_mask(batch, sample_ids, self._layers(), subject.models[0].device)
        used = [index for index in range(len(subject.models)) if subject.shares[index] or subject.blend[index]]
        runs = {index: self._recorded(subject.models[index], batch) for index in used}
        with _arguments(subject.merge, self.parts) as taken:
            runs[MERGE] = self._recorded(subject.merge, batch)
        self._add_drift(runs, taken, sample_ids, mask)
        logits = {index: run.logits for index, run in runs.items() if run.logits is not None}
        if len(logits) < len(runs):
            return
        parents = [(subject.shares[index], logits[index]) for index in subject.parents]
        score = BatchScores.of(self.data, batch, sample_ids, parents)
        self.sums.count += score.count
        for index in (*subject.parents, MERGE):
            self.sums.losses["own", 0, index] += score(logits[index], "a model")[0]
        for parent in subject.parents:
            for number in range(len(self.parts)):
                for question, at, before in self._questions(number):
                    boundary = runs[parent if before is None else before].boundaries.get(at)
                    key = question, number, parent
                    out = self._trial(key, at, boundary, batch)
                    self.sums.losses[key] += score(out, f"the network {question} {self.parts[number].name}")[0]

    def _layers(self) -> list[Layer]:
        """Every place where a block takes or gives features."""
        return [layer for part in self.parts for layer in (part.input, part.output) if layer is not None]

    def _recorded(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> _Run:
        """A run with its state before every part, and the output of every block."""
        places = [(number, part.starts) for number, part in enumerate(self.parts) if part.starts is not None]
        given = [(number, part.output) for number, part in enumerate(self.parts) if part.output is not None]
        layers = [layer for _, layer in (*places, *given)]
        own = list(dict.fromkeys(layers))
        boundaries, logits = recorded(model, batch, own, self.overwritten)
        at = {layer: boundaries.get(index) for index, layer in enumerate(own)}
        return _Run(
            {number: found for number, layer in places if (found := at[layer]) is not None},
            {number: found.features for number, layer in given if (found := at[layer]) is not None},
            logits,
        )

    def _sources(self, question: str, at: int, parent: int) -> list[int]:
        """Whose every part is.

        Args:
            question: ``alone``, ``without``, or ``upto``: merged before `at`, a parent's from there on.
            at: Number of a part.
            parent: Number of the parent.
        """
        parts = range(len(self.parts))
        if question == "upto":
            return [MERGE if number < at else parent for number in parts]
        inside, outside = (MERGE, parent) if question == "alone" else (parent, MERGE)
        return [inside if number == at else outside for number in parts]

    def _trial(self, key: Question, at: int, boundary: Boundary | None, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits of a network of the merge's and a parent's parts.

        Args:
            key: The question.
            at: The part from which on it must run.
            boundary: Its state there; None where all of it must run.
            batch: The samples.
        """
        question, _, parent = key
        self.working.become(self._sources(question, at, parent), self.buffers.get(key))
        layer = self.parts[at].starts
        known = replaced(self.working.model, boundary, layer) if boundary is not None and layer else nullcontext()
        with known:
            logits = forward_logits(self.working.model, batch)
        assert logits is not None
        return logits

    def _add_drift(
        self, runs: Mapping[int, _Run], taken: Mapping[str, tuple[Any, Any]], sample_ids: Tensor, mask: Tensor | None
    ) -> None:
        """Adds the drift of every block, and how much of it is left if its input is the blend."""
        shares = [(index, weight) for index, weight in enumerate(self.subject.blend) if weight]
        for number, part in enumerate(self.parts):
            if part.input is None or part.output is None or part.name not in taken:
                continue
            layer = part.output

            def vectors(tensor: Tensor, layer: Layer = layer) -> Tensor:
                return sample_vectors(tensor, layer, len(sample_ids), mask).double()

            given = sum(weight * runs[index].boundaries[number].features for index, weight in shares)
            assert isinstance(given, Tensor)
            args, kwargs = with_first_tensor(*taken[part.name], given)
            local = first_tensor(self.subject.merge.get_submodule(part.name)(*args, **kwargs))
            assert local is not None
            blend = sum(weight * vectors(runs[index].outputs[number]) for index, weight in shares)
            assert isinstance(blend, Tensor)
            off, arose = vectors(runs[MERGE].outputs[number]) - blend, vectors(local) - blend
            xx, xy, _ = products(off, arose)
            check_finite(xx + xy, sample_ids, part.name, "the merge")
            self.sums.drift[number] += torch.stack([xx.sum(), xy.sum(), blend.square().sum()])

    def rows(self, sums: BlockSums) -> tuple[BlockRow, ...]:
        """One row a part, in the order in which they run."""
        rows, before = [], 0.0
        for number, part in enumerate(self.parts):
            alone = without = step = None
            if sums.count:
                alone, without, upto = (self._height(sums, name, number) for name in ("alone", "without", "upto"))
                step, before = upto - before, upto
            off, arose, size = sums.drift[number].tolist()
            local = arose / off if off else None
            rows.append(BlockRow(part.name, alone, without, step, *self.distances[number], _ratio(off, size), local))
        return tuple(rows)

    def _height(self, sums: BlockSums, question: str, number: int) -> float:
        """By how much the networks of a question lie above the parents, in the mean over the parents."""
        total = 0.0
        for parent in self.subject.parents:
            key = question, number, parent
            if question == "upto" and number == len(self.parts) - 1:
                key = "own", 0, MERGE
            total += self.subject.shares[parent] * (sums.losses[key] - sums.losses["own", 0, parent])
        return total / sums.count


@dataclass(frozen=True)
class _Run:
    """What one model gave for a batch: its state before every part, and the output of every block."""

    boundaries: Mapping[int, Boundary]
    outputs: Mapping[int, Tensor]
    logits: Tensor | None


class _Working:
    """A model that takes its parts from several models."""

    def __init__(
        self, first: PreTrainedModel, parts: Sequence[Part], tensors: Mapping[int, Mapping[str, Tensor]]
    ) -> None:
        self.model = copy.deepcopy(first).eval().requires_grad_(False)
        self._own, self._parts, self._tensors = tensors_by_name(self.model), parts, tensors
        self._sources: list[int | None] = [0] * len(parts)

    @torch.no_grad()
    def become(self, sources: Sequence[int], buffers: Mapping[str, Tensor] | None = None) -> None:
        """Takes every part from the model whose number is given, and some buffers as they are given."""
        for number, (old, new) in enumerate(zip(self._sources, sources, strict=True)):
            if old != new:
                for name in self._parts[number].tensors:
                    self._own[name].copy_(self._tensors[new][name])
        self._sources = list(sources)
        for name, value in (buffers or {}).items():
            self._own[name].copy_(value)
        if buffers:
            self.forget()

    def forget(self) -> None:
        """Takes every part anew the next time."""
        self._sources = [None] * len(self._parts)


@contextmanager
def _arguments(model: nn.Module, parts: Sequence[Part]) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Inside, what every block is given is kept by its name."""
    taken: dict[str, tuple[Any, Any]] = {}

    def keep(name: str) -> Any:
        return lambda module, args, kwargs: taken.setdefault(name, (args, kwargs)) and None

    handles = [
        model.get_submodule(part.name).register_forward_pre_hook(keep(part.name), with_kwargs=True)
        for part in parts
        if part.input is not None
    ]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def _gram(tensors: Sequence[Tensor], zero: Tensor | None = None) -> Tensor:
    """Inner products of the differences of several tensors from one, or of themselves; float64."""
    flat = torch.stack([tensor.detach().double().flatten() for tensor in tensors])
    flat = flat if zero is None else flat - zero.detach().double().flatten()
    return (flat @ flat.T).cpu()


def _mean_angle(gram: Tensor) -> float | None:
    """The mean angle in degrees between vectors that are not zero, from their inner products."""
    norms = gram.diagonal().sqrt() if gram.dim() else gram
    pairs = [pair for pair in combinations(range(norms.numel()), 2) if all(norms[index] for index in pair)]
    cosines = [float(gram[a, b] / (norms[a] * norms[b])) for a, b in pairs]
    angles = [math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) for cosine in cosines]
    return sum(angles) / len(angles) if angles else None


def _ratio(squared: float, size: float) -> float | None:
    """The root of the ratio of two squared norms; None where the second is zero."""
    return math.sqrt(squared / size) if size else None


def trial_passes(parts: int, parents: int) -> float:
    """Whole forward passes that the trials of a measure take, of networks whose parts are equally long.

    Args:
        parts: Number of the parts.
        parents: Number of the parents with a share.
    """
    from_there = sum((parts - number) / parts for number in range(parts))
    return parents * (3 * from_there - 1)
