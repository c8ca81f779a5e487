"""Stitching: a network that is A up to and with a layer and B from there on, without a trained adapter between.

Measured at every boundary between layers as in Zhou et al. (NeurIPS 2023, arXiv 2307.08286, section 5.2), who follow
Lenc and Vedaldi (CVPR 2015) and Bansal et al. (NeurIPS 2021): that the stitched networks do as well as their parents
shows that B's later layers understand A's features as they are.

Nothing is rebuilt. While A runs, the outputs of the outermost modules that are done when the boundary is reached are
noted; then B runs with these modules replaced by what they gave in A. So their work is not repeated, and whatever later
layers take besides the last features, residual streams, masks, the other side of an encoder-decoder, is A's as well.
Weights that a module under way at the boundary holds itself, in no module of their own, are B's.

Shape legend: n samples.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_llfc.diagnostics.features.hooks import hooked, replaced_forwards
from hf_llfc.diagnostics.features.layers import sample_vectors, select_layers
from hf_llfc.diagnostics.features.trial import LOGITS, Layer, first_tensor, two_copies
from hf_llfc.diagnostics.rows import StitchingPoint
from hf_llfc.diagnostics.streaming import attention_mask, check_complete, check_finite
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.data import EvaluationData
from hf_llfc.evaluation.models import evaluation_mode, forward_logits
from hf_llfc.evaluation.scoring import ScoreSums, score_samples


@dataclass
class StitchingSums:
    """Loss and hits of the stitched networks, by the index of the boundary."""

    scores: list[ScoreSums]

    def merge(self, other: StitchingSums) -> None:
        """Adds what another process has gathered."""
        for own, others in zip(self.scores, other.scores, strict=True):
            own.merge(others)

    def cpu(self) -> StitchingSums:
        """Itself: it holds numbers only."""
        return self


@dataclass
class _Done:
    """A module's call that is over.

    Args:
        module: Its name.
        call: Number of the module's call.
        output: Output of the call.
        inside: Number of runs of every module within, itself not counted.
    """

    module: str
    call: int
    output: Any
    inside: Counter[str]


@dataclass
class _Frame:
    """A module's call that is under way, with the calls inside it that are over."""

    module: str
    call: int
    done: list[_Done] = field(default_factory=list)


@dataclass(frozen=True)
class Boundary:
    """State of A when it reaches a boundary: the outermost calls that are over, and the features themselves."""

    done: tuple[_Done, ...]
    features: torch.Tensor


class _Recorder:
    """Keeps the call tree of one run as far as it is needed: calls under way, and the outermost calls that are over."""

    def __init__(
        self,
        layers: Sequence[Layer],
        overwritten: frozenset[tuple[str, int]],
        reached: Callable[[int, Boundary], None],
    ) -> None:
        self.indices = {(layer.module, layer.call, layer.side): index for index, layer in enumerate(layers)}
        self.overwritten = overwritten
        self.reached = reached
        self.seen: Counter[str] = Counter()
        self.open = [_Frame("", 0)]

    def enter(self, name: str, arguments: Any) -> None:
        call = self.seen[name]
        self.seen[name] += 1
        self._at(name, call, "input", arguments)
        self.open.append(_Frame(name, call))

    def leave(self, name: str, output: Any) -> None:
        frame = self.open.pop()
        assert frame.module == name, "modules end in the reverse of the order in which they begin"
        inside: Counter[str] = Counter()
        for done in frame.done:
            inside += done.inside
            inside[done.module] += 1
        # What the model changes in place afterwards is kept as the module gave it.
        kept = copied(output) if (name, frame.call) in self.overwritten else output
        self.open[-1].done.append(_Done(name, frame.call, kept, inside))
        self._at(name, frame.call, "output", kept)

    def _at(self, name: str, call: int, side: str, value: Any) -> None:
        index = self.indices.get((name, call, side))
        if index is None:
            return
        features = first_tensor(value)
        assert features is not None, "the trial run found a tensor here"
        if side == "input":
            features = features.clone()
        self.reached(index, Boundary(tuple(done for frame in self.open for done in frame.done), features))


def recorded(
    model: PreTrainedModel,
    batch: Mapping[str, torch.Tensor],
    layers: Sequence[Layer],
    overwritten: frozenset[tuple[str, int]],
) -> tuple[dict[int, Boundary], torch.Tensor | None]:
    """Runs the first part of stitched networks, A.

    Args:
        model: A.
        batch: A batch as `EvaluationData.batches` yields it.
        layers: Where the boundaries are.
        overwritten: Calls that `changed_in_place` found.

    Returns:
        The state at every boundary, by its index in `layers`, and the logits.
    """
    boundaries: dict[int, Boundary] = {}
    recorder = _Recorder(layers, overwritten, boundaries.__setitem__)

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        recorder.enter(name, [args, kwargs])

    def after(name: str, module: nn.Module, output: Any) -> None:
        recorder.leave(name, output)

    with hooked(model, before=before, after=after):
        logits = forward_logits(model, batch)
    return boundaries, logits


@contextmanager
def replaced(model: nn.Module, boundary: Boundary, layer: Layer) -> Iterator[None]:
    """Inside, the calls that are over at a boundary give what they gave in the other model, without running.

    Args:
        model: The model that goes on from there, B.
        boundary: State of A at the boundary.
        layer: Where the boundary is; if it is an input, that is replaced too.
    """
    outputs = {(done.module, done.call): done for done in boundary.done}
    names = {done.module for done in boundary.done} | {layer.module}
    seen: Counter[str] = Counter()

    def stand_in(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = seen[name]
            seen[name] += 1
            done = outputs.get((name, call))
            if done is not None:
                seen.update(done.inside)
                # B may change in place what it is given, and A's own is still needed.
                return copied(done.output)
            if (name, call, "input") == (layer.module, layer.call, layer.side):
                args, kwargs = with_first_tensor(args, kwargs, boundary.features.clone())
            return original(*args, **kwargs)

        return forward

    with replaced_forwards(model, sorted(names), stand_in):
        yield


def copied(value: Any) -> Any:
    """A copy of every tensor in what a module gave; other objects are passed on as they are."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, ModelOutput):
        twin = copy.copy(value)
        for name, item in value.items():
            twin[name] = copied(item)
        return twin
    if isinstance(value, dict):
        return {name: copied(item) for name, item in value.items()}
    if isinstance(value, tuple) and type(value) is not tuple:
        return type(value)(*(copied(item) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(copied(item) for item in value)
    return value


def with_first_tensor(args: Any, kwargs: Any, tensor: torch.Tensor) -> tuple[Any, Any]:
    """Arguments with the first tensor among them, as `first_tensor` finds it, replaced."""
    for index, arg in enumerate(args):
        if isinstance(arg, torch.Tensor):
            return (*args[:index], tensor, *args[index + 1 :]), kwargs
    for name, arg in kwargs.items():
        if isinstance(arg, torch.Tensor):
            return args, {**kwargs, name: tensor}
    return args, kwargs


class Stitching:
    """Loss and metrics of the network stitched at every boundary.

    Args:
        model_a: The first part, in evaluation mode.
        model_b: The second part, aligned onto the first.
        batch: Any batch, for the trial run.
        data: With labels; says how outputs are scored.
        layers: Where to stitch, as patterns or words of `select_layers`; after every block without them.

    Raises:
        EvaluationError: The model has no logits, or no layers but these.
    """

    def __init__(
        self,
        model_a: PreTrainedModel,
        model_b: PreTrainedModel,
        batch: Mapping[str, torch.Tensor],
        data: EvaluationData,
        layers: Sequence[str] | None = None,
    ) -> None:
        selected = select_layers(model_a, batch, layers)
        if selected[-1].label != LOGITS:
            raise EvaluationError(f"{type(model_a).__name__} has no logits; a model with a task head is needed")
        if len(selected) == 1:
            raise EvaluationError(f"stitching: {type(model_a).__name__} has no layers but its logits; name its layers")
        self.models = model_a, model_b
        self.data = data
        self.layers = selected[:-1]
        self.overwritten = changed_in_place(model_a, batch)
        self.sums = StitchingSums([ScoreSums() for _ in self.layers])

    def add(self, batch: Mapping[str, torch.Tensor], sample_ids: torch.Tensor) -> None:
        """Runs A once and B once per boundary."""
        model_a, model_b = self.models
        mask = attention_mask(batch, sample_ids, self.layers, model_a.device)
        boundaries, _ = recorded(model_a, batch, self.layers, self.overwritten)
        check_complete(self.layers, boundaries)
        labels = batch["labels"]
        for index, layer in enumerate(self.layers):
            boundary = boundaries.pop(index)
            vectors = sample_vectors(boundary.features, layer, len(sample_ids), mask)
            norms = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
            check_finite(norms, sample_ids, layer.label, "the first model")
            with replaced(model_b, boundary, layer):
                logits = forward_logits(model_b, batch)
            assert logits is not None
            scores = score_samples(self.data.task, logits, labels.to(logits.device))
            check_finite(scores.loss_sums, sample_ids, LOGITS, f"the network stitched after {layer.label!r}")
            self.sums.scores[index].add(scores)

    def rows(self, sums: StitchingSums) -> tuple[StitchingPoint, ...]:
        """One point per boundary, in the order in which the layers run."""
        points = []
        for layer, scores in zip(self.layers, sums.scores, strict=True):
            values = scores.metrics(self.data.metrics, self.data.byte_count)
            metrics = {name: value if math.isfinite(value) else None for name, value in values.items()}
            points.append(StitchingPoint(layer.label, scores.loss, metrics))
        return tuple(points)


def changed_in_place(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> frozenset[tuple[str, int]]:
    """The calls whose output the model changes in place afterwards, found in a trial run."""
    given: list[tuple[str, int, torch.Tensor, int]] = []
    seen: Counter[str] = Counter()

    def after(name: str, module: nn.Module, output: Any) -> None:
        call = seen[name]
        seen[name] += 1
        given.extend((name, call, tensor, tensor._version) for tensor in _tensors(output))

    with hooked(model, after=after), evaluation_mode(model):
        forward_logits(model, two_copies(batch))
    return frozenset((name, call) for name, call, tensor, version in given if tensor._version != version)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)
