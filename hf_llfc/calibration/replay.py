"""A model that is run to one point again and again, without the blocks before it that no longer change.

Of every batch only the hidden states at the end of the last finished block are kept (and what else that block gave out,
a position bias, say). A finished block gives them out without running; everything else, masks and embeddings among it,
is made by the model's own code. The run ends as soon as all tensors that are looked at have been seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_llfc.diagnostics.features.layers import handing_over
from hf_llfc.diagnostics.features.trial import LOGITS, Layer, first_tensor
from hf_llfc.evaluation.models import evaluation_mode, forward, forward_logits, logits_in

_PLACE = object()
"""Stands in an output for its first tensor."""


class _AllSeen(Exception):
    """Ends a run whose rest is not needed."""


@dataclass
class Replay:
    """Runs one model on known batches.

    Attributes:
        model: In evaluation mode.
        chains: Blocks in the order in which they run; see `hf_llfc.calibration.maps.Plan`.
    """

    model: PreTrainedModel
    chains: Sequence[Sequence[str]]
    _ends: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    _rests: dict[int, dict[str, Any]] = field(default_factory=dict)

    def run(
        self,
        number: int,
        batch: Mapping[str, Tensor],
        layers: Sequence[Layer],
        receive: Callable[[int, Tensor], None],
        finished: set[str],
    ) -> None:
        """Runs a batch until all layers have been seen.

        Args:
            number: Of the batch; it must always be the same one.
            batch: The samples.
            layers: What is looked at.
            receive: Called with the index of a layer and its tensor.
            finished: Blocks whose weights, and those of all that runs before them, change no more.
        """
        waiting = set(range(len(layers)))

        def take(index: int, tensor: Tensor) -> None:
            receive(index, tensor)
            waiting.discard(index)
            if not waiting:
                raise _AllSeen

        with self._resumed(number, finished), handing_over(self.model, layers, take), evaluation_mode(self.model):
            try:
                logits = forward_logits(self.model, batch)
            except _AllSeen:
                return
        for index in list(waiting):
            if layers[index].side == LOGITS and logits is not None:
                receive(index, logits)

    @torch.no_grad()
    def answer(self, number: int, batch: Mapping[str, Tensor], finished: set[str]) -> Tensor:
        """What the model answers to a batch; see `run` and `answer_of`."""
        with self._resumed(number, finished):
            return answer_of(self.model, batch)

    @contextmanager
    def _resumed(self, number: int, finished: set[str]) -> Iterator[None]:
        """Inside, finished blocks give out what they are known to give, or it becomes known."""
        ends = self._ends.setdefault(number, {})
        rests = self._rests.setdefault(number, {})
        stubs: list[tuple[nn.Module, Any]] = []
        handles = []
        for chain_number, chain in enumerate(self.chains):
            done = [name for name in chain if name in finished]
            known = [name for name in done if name in rests]
            for name in known:
                module = self.model.get_submodule(name)
                stubs.append((module, module.__dict__.get("forward")))
                module.forward = _giving(rests[name], ends[chain_number])
            for name in done[len(known) :]:
                handles.append(
                    self.model.get_submodule(name).register_forward_hook(self._keep(number, chain_number, name))
                )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, forward in stubs:
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward

    def _keep(self, number: int, chain: int, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            assert tensor is not None, "the trial run found a tensor here"
            self._ends[number][chain] = tensor.clone()  # what runs next may change it in place
            self._rests[number][name] = _replaced(output, tensor, _PLACE)

        return hook


def _giving(rest: Any, end: Tensor) -> Callable[..., Any]:
    return lambda *args, **kwargs: _replaced(rest, _PLACE, end.clone())


def _replaced(value: Any, old: Any, new: Any) -> Any:
    """An output with something else in the first place where `old` is."""
    if value is old:
        return new
    if isinstance(value, tuple | list):
        items = list(value)
        for index, item in enumerate(items):
            if (replaced := _replaced(item, old, new)) is not item:
                items[index] = replaced
                break
        else:
            return value
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        for key, item in value.items():
            if (replaced := _replaced(item, old, new)) is not item:
                changed = copy(value)
                changed[key] = replaced  # type: ignore[index]  # outputs of models can be changed
                return changed
    return value


def chains_that_hold(
    model: PreTrainedModel, chains: Sequence[Sequence[str]], batch: Mapping[str, Tensor]
) -> Sequence[Sequence[str]]:
    """The chains, or none of them if the model looks at more of its blocks than what the last of a chain gives out.

    Args:
        model: Any model that takes the batch.
        chains: Its blocks.
        batch: Samples for two runs.
    """
    blocks = {block for chain in chains for block in chain}
    if not blocks:
        return ()
    replay = Replay(model, chains)
    with evaluation_mode(model):
        once, again = (replay.answer(0, batch, blocks) for _ in range(2))
    return chains if torch.equal(once, again) else ()


def answer_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits, or the first output of a model that has none."""
    return answer_in(forward(model, batch))


def answer_in(output: Any) -> Tensor:
    """The logits of what a model gives out, or its first tensor if there are none."""
    logits = logits_in(output)
    answer = first_tensor(output) if logits is None else logits
    assert answer is not None, "a model gives something"
    return answer
