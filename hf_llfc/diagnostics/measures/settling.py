"""After which block the answers of a model are settled, told by the logit lens.

The lens applies what a model does after its last block, final norm and head, to the output of an earlier one. The
settling depth of a prediction is the first block from which on that gives the final answer (the most probable class or
token), or from which on KL(final ‖ lens) < `CLOSE`. Models in which answers settle early could be cut there (depth-
adaptive transformers, arXiv 2010.15376, ask for the same layer).

The residual stream of pre-norm models is what the lens can read. Of a model whose blocks end in a norm
there is none; of one that works in stages of different widths it reads the last stage.

No layer below the one where all answers differ from the final one is looked at, and of long samples some of the tokens:
a large head costs as much as several blocks.

Shape legend: n samples, t tokens, p predictions, v classes or vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_llfc.diagnostics.features.blocks import find_blocks
from hf_llfc.diagnostics.features.hooks import hooked, replaced_forwards
from hf_llfc.diagnostics.features.layers import handing_over
from hf_llfc.diagnostics.features.trial import LOGITS, Layer, Trial, first_tensor, two_copies
from hf_llfc.diagnostics.measures.passes import MERGE, Run, model_names
from hf_llfc.diagnostics.measures.stitching import copied
from hf_llfc.diagnostics.measures.subject import Subject
from hf_llfc.diagnostics.rows import SettlingRow
from hf_llfc.diagnostics.streaming import check_complete, check_finite
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.models import forward_logits

CLOSE = 0.1
"""In nats: two distributions nearer than this are taken for one."""

MOST_TOKENS = 64
"""Of a sample whose predictions are followed, evenly spaced."""

ELEMENTS_AT_ONCE = 2**24
"""Logits of the lens that are held at a time."""


@dataclass
class SettlingSums:
    """Number of predictions by settling depth.

    Args:
        counts: By model (the merge is the last), criterion (answer, closeness) and block, (m, 2, l).
    """

    counts: torch.Tensor

    def merge(self, other: SettlingSums) -> None:
        """Adds what another process has gathered."""
        self.counts = self.counts + other.counts

    def cpu(self) -> SettlingSums:
        """A copy in main memory, for other processes."""
        return SettlingSums(self.counts.cpu())


class Lens:
    """What a model does after its last block, applied to the output of any block.

    The model runs with its blocks replaced: each hands on what it is given, the last one hands on the features.

    Args:
        model: A model in evaluation mode.
        batch: A batch whose first sample is used for trial runs.

    Raises:
        EvaluationError: There is no such lens for the model.
    """

    def __init__(self, model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
        trial = Trial.run(model, batch)
        name = type(model).__name__
        if trial.logits is None:
            raise _no_lens(f"{name} has no logits")
        outputs = [call for call in trial.calls if call.side == "output"]
        found = find_blocks(model, outputs)
        ran = [call for call in outputs if call.module in found]
        self.blocks = tuple(dict.fromkeys(call.module for call in ran))
        if len(ran) > len(self.blocks):
            raise _no_lens(f"{name} runs a block more than once")
        stack = [call for call in ran if _stack(call.module) == _stack(ran[-1].module)]
        if len(stack) < 2:
            raise _no_lens(f"{name} has no stack of blocks")
        last = stack[-1]
        if any(call.tensor.shape != last.tensor.shape for call in stack):
            raise _no_lens(f"the blocks of {name} give features of different shapes")
        if not _norm_follows(model, trial, last.module):
            raise _no_lens(f"{name} has no norm between its last block and its head")
        self.layers = tuple(
            Layer(trial.label(call), call.module, 0, "output", (), call.tensor._version != call.version)
            for call in stack
        )
        if last.tensor.shape[0] != 2:
            raise _no_lens(f"the blocks of {name} give features that do not divide into samples")
        copies = two_copies(batch)
        self.by_token = "attention_mask" in copies and trial.logits.shape[:-1] == copies["attention_mask"].shape
        self._check(model, copies)

    def _check(self, model: PreTrainedModel, copies: Mapping[str, torch.Tensor]) -> None:
        """Raises where the lens on the last block's output does not give the logits, token by token."""
        given: dict[str, Any] = {}

        def keep(name: str, module: nn.Module, output: Any) -> None:
            if name in self.blocks:
                given[name] = copied(output)

        with hooked(model, after=keep):
            logits = forward_logits(model, copies)
        assert logits is not None, "the trial run has logits"
        self._outputs = given
        features = first_tensor(given[self.layers[-1].module])
        assert features is not None, "the trial run found a tensor here"
        features = features.flip(1) if self.by_token else features
        expected = logits.flip(1) if self.by_token else logits
        size = float(logits.abs().max())
        if not torch.allclose(self(model, copies, features), expected, rtol=1e-3, atol=1e-3 * size, equal_nan=True):
            raise _no_lens(f"the logits of {type(model).__name__} depend on more than its last block")

    def __call__(
        self, model: PreTrainedModel, batch: Mapping[str, torch.Tensor], features: torch.Tensor
    ) -> torch.Tensor:
        """Logits of the features.

        Args:
            model: The model, or one of the same architecture.
            batch: Inputs of as many samples as the features are of.
            features: In the shape of a block's output.
        """
        with self._replaced(model, features):
            logits = forward_logits(model, batch)
        assert logits is not None, "the trial run has logits"
        return logits

    @contextmanager
    def _replaced(self, model: nn.Module, features: torch.Tensor) -> Iterator[None]:
        last = self.layers[-1].module

        def stand_in(name: str, _: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given = features if name == last else first_tensor([args, kwargs])
                assert given is not None, "blocks are given features"
                return with_tensor(self._outputs[name], given)

            return forward

        with replaced_forwards(model, self.blocks, stand_in):
            yield


def with_tensor(output: Any, tensor: torch.Tensor) -> Any:
    """What a module gave with its first tensor, as `first_tensor` finds it, replaced."""
    if isinstance(output, torch.Tensor):
        return tensor
    if isinstance(output, Mapping):
        first = next(name for name, item in output.items() if first_tensor(item) is not None)
        twin = copy.copy(output)
        twin[first] = with_tensor(output[first], tensor)  # type: ignore[index]  # blocks give dictionaries
        return twin
    first_index = next(index for index, item in enumerate(output) if first_tensor(item) is not None)
    items = [with_tensor(item, tensor) if index == first_index else item for index, item in enumerate(output)]
    return tuple(items) if isinstance(output, tuple) else items


def _no_lens(why: str) -> EvaluationError:
    return EvaluationError(
        f"settling: {why}, so that its head cannot read earlier blocks; leave settling out of the measures"
    )


def _stack(block: str) -> str:
    """Name of the list that a block is in."""
    return block.rpartition(".")[0]


def _norm_follows(model: nn.Module, trial: Trial, block: str) -> bool:
    """Whether the first module with weights that runs after a block is a norm."""
    modules = dict(model.named_modules())
    done = max(index for index, call in enumerate(trial.calls) if call.module == block)
    for call in trial.calls[done + 1 :]:
        own = modules[call.module]
        if call.side == "input" and next(own.parameters(recurse=False), None) is not None:
            return "norm" in type(own).__name__.lower()
    return False


class Settling:
    """Settling depths of the predictions of the models and of the merge.

    Args:
        subject: The merge and its models, in evaluation mode.
        batch: Any batch, for trial runs.

    Raises:
        EvaluationError: The head of the models cannot read earlier blocks.
    """

    def __init__(self, subject: Subject, batch: Mapping[str, torch.Tensor]) -> None:
        self.subject = subject
        first = subject.models[0]
        self.lens = Lens(first, batch)
        shape = len(subject.models) + 1, 2, len(self.lens.layers)
        self.sums = SettlingSums(torch.zeros(shape, dtype=torch.int64, device=first.device))

    @contextmanager
    def watch(self, run: Run) -> Iterator[None]:
        """Keeps the output of every block, then follows the predictions from the last block back."""
        kept: dict[int, torch.Tensor] = {}
        layers = self.lens.layers

        def keep(index: int, tensor: torch.Tensor) -> None:
            kept[index] = tensor.clone() if layers[index].overwritten else tensor

        with handing_over(run.model, layers, keep):
            yield
        check_complete(layers, kept)
        assert run.logits is not None, "the trial run has logits"
        check_finite(run.logits.flatten(1).double().sum(dim=1), run.sample_ids, LOGITS, run.name)
        follow = self._follow_tokens if self.lens.by_token else self._follow_samples
        for depths in follow(run, [kept[index] for index in range(len(layers))], run.logits):
            for counts, depth in zip(self.sums.counts[run.number], depths, strict=True):
                counts += torch.bincount(depth, minlength=len(layers))

    def _follow_samples(
        self, run: Run, features: Sequence[torch.Tensor], logits: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """Settling depths by criterion of one prediction a sample, (2, p)."""

        def through(block: int, chosen: torch.Tensor) -> torch.Tensor:
            rows = {name: value[chosen.to(value.device)] for name, value in run.batch.items()}
            return self.lens(run.model, rows, features[block][chosen])

        yield settling_depths(logits, through, len(features))

    def _follow_tokens(
        self, run: Run, features: Sequence[torch.Tensor], logits: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """The same of one prediction a token, some tokens at a time."""
        _, length, vocabulary = logits.shape
        mask = run.batch["attention_mask"].to(logits.device)
        samples, tokens = followed(mask).nonzero(as_tuple=True)
        at_once = length * max(1, ELEMENTS_AT_ONCE // (length * vocabulary))
        for start in range(0, len(samples), at_once):
            here = samples[start : start + at_once], tokens[start : start + at_once]

            def through(
                block: int, chosen: torch.Tensor, here: tuple[torch.Tensor, torch.Tensor] = here
            ) -> torch.Tensor:
                # What follows the blocks looks at single tokens, so those of several samples may share a row.
                own = features[block][here[0][chosen], here[1][chosen]]
                count = -(-len(own) // length)
                packed = own.new_zeros(count * length, own.shape[-1])
                packed[: len(own)] = own
                rows = {name: value[:count] for name, value in run.batch.items()}
                rows["attention_mask"] = torch.ones_like(rows["attention_mask"])
                return self.lens(run.model, rows, packed.view(count, length, -1)).flatten(0, 1)[: len(own)]

            yield settling_depths(logits[here], through, len(features))

    def rows(self, sums: SettlingSums) -> tuple[SettlingRow, ...]:
        """One row a block and model, then the merge."""
        names = (*model_names(self.subject), MERGE)
        settled = sums.counts.cumsum(dim=2).double() / sums.counts.sum(dim=2, keepdim=True)
        return tuple(
            SettlingRow(layer.label, name, *settled[number, :, block].tolist())
            for block, layer in enumerate(self.lens.layers)
            for number, name in enumerate(names)
        )


def followed(mask_nt: torch.Tensor) -> torch.Tensor:
    """At most `MOST_TOKENS` tokens of each sample that are no padding, evenly spaced, (n, t)."""
    present = mask_nt != 0
    count = present.sum(dim=1, keepdim=True).clamp(min=1)
    most = count.clamp(max=MOST_TOKENS)
    rank = present.cumsum(dim=1) - 1
    return present & (rank * most // count > (rank - 1) * most // count)


def settling_depths(
    final_pv: torch.Tensor, through: Callable[[int, torch.Tensor], torch.Tensor], blocks: int
) -> torch.Tensor:
    """The first block from which on predictions are as they are in the end, by answer and by divergence, (2, p).

    Args:
        final_pv: Logits of the predictions.
        through: Logits that the lens gives after a block for the predictions with these indices.
        blocks: Number of blocks; predictions are settled after the last one.
    """
    wide = torch.promote_types(final_pv.dtype, torch.float32)
    final_pv = final_pv.to(wide).log_softmax(dim=-1)
    answers = final_pv.argmax(dim=-1)
    depths = torch.full((2, len(final_pv)), blocks - 1, device=final_pv.device)
    settled = torch.ones_like(depths, dtype=torch.bool)
    for block in range(blocks - 2, -1, -1):
        chosen = settled.any(dim=0).nonzero()[:, 0]
        if not len(chosen):
            break
        lens_pv = through(block, chosen).to(wide).log_softmax(dim=-1)
        divergence = nn.functional.kl_div(lens_pv, final_pv[chosen], reduction="none", log_target=True).sum(dim=-1)
        settled[0, chosen] &= lens_pv.argmax(dim=-1) == answers[chosen]
        settled[1, chosen] &= divergence < CLOSE
        depths[settled] = block
    return depths
