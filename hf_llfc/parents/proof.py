"""The proof of a folded adapter: base and adapter as peft runs them, and the folded model, answer the same.

Random inputs go through both before anything is written. A weight under a wrong name, a scale that is left out, or a
kind of adapter that peft merges otherwise than it runs it, would make another model of a parent, and the merge silently
another one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from hf_llfc.checkpoints import Checkpoint
from hf_llfc.checkpoints.checkpoint import Adapter
from hf_llfc.errors import CheckpointError, LLFCError
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.parents.probe import ROWS, built, is_in_memory, raise_if_unread, runnable

logger = logging.getLogger(__name__)

BOUND = 1e-4
"""Largest difference of answers that counts as rounding, relative to the largest: ten times what deep models show."""


@dataclass(frozen=True)
class Proof:
    """What the proof of one adapter found.

    Attributes:
        model: The parent.
        changed: How many tensors the adapter changes.
        targeted: How many it means to change.
        difference: Of the answers of the folded model from those of base and adapter, relative to the largest.
        effect: The same of the answers of the base.
        seconds: What it took.
        left_out: Why it was not run; empty where it was.
    """

    model: str
    changed: int = 0
    targeted: int = 0
    difference: float = 0.0
    effect: float = 0.0
    seconds: float = 0.0
    left_out: str = ""

    @property
    def sentence(self) -> str:
        """The proof in words."""
        if self.left_out:
            return f"{self.model}: not run to prove that it is folded right: {self.left_out}"
        return (
            f"{self.model}: {self.changed} of {self.targeted} targeted tensors changed; folded, its answers differ by "
            f"{self.difference:.0e} of the largest from base and adapter as peft runs them, and by {self.effect:.0e} "
            f"from the base ({self.seconds:.1f} s)"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def prove_all(checkpoints: Sequence[Checkpoint], progress: Progress = silent) -> list[Proof]:
    """Proves every adapter among some checkpoints; see `prove`."""
    adapted = [each for each in checkpoints if each.adapter is not None]
    proofs = []
    for index, checkpoint in enumerate(adapted):
        progress("proving adapters", index, len(adapted))
        proofs.append(prove(checkpoint))
        log = logger.warning if proofs[-1].left_out or not proofs[-1].changed else logger.info
        log("%s", proofs[-1].sentence)
    return proofs


def prove(checkpoint: Checkpoint) -> Proof:
    """Runs base and adapter as peft does, and the folded model.

    Args:
        checkpoint: With an adapter.

    Raises:
        CheckpointError: They answer differently.
    """
    adapter = checkpoint.adapter
    assert adapter is not None, "a checkpoint with an adapter"
    started = perf_counter()
    if not is_in_memory(adapter.onto):
        return Proof(checkpoint.id, left_out="the model takes more than half of the memory that is free")
    try:
        changed = [name for name in adapter.targets if not _is_same(adapter, name)]
        difference, effect = _answers_apart(adapter)
    except Exception as error:  # whatever the code of a model, or what is not known of it, may raise
        raise_if_unread(error)
        logger.debug("proving %s", checkpoint.label, exc_info=True)
        reason = str(error).splitlines()[0] if isinstance(error, LLFCError) else f"{type(error).__name__}: {error}"
        return Proof(checkpoint.id, left_out=reason)
    if not difference <= BOUND:
        raise CheckpointError(
            f"{checkpoint.label}: folded, it answers otherwise than base and adapter as peft runs them: random inputs "
            f"give answers that differ by {difference:.1e} of the largest; rounding makes {BOUND:.0e} at most, and the "
            f"adapter itself {effect:.1e}. Name the folder that merge_and_unload() of peft and save_pretrained() "
            f"make, and report the kind {adapter.kind} with its adapter_config.json"
        )
    seconds = round(perf_counter() - started, 1)
    # The bias beside a weight is among the targets where a kind might change it.
    targeted = {*changed, *(name for name in adapter.targets if not name.endswith("bias"))}
    # One digit: how many threads computed it is of no account.
    difference, effect = (float(f"{value:.0e}") for value in (difference, effect))
    return Proof(checkpoint.id, len(changed), len(targeted), difference, effect, seconds)


def _is_same(adapter: Adapter, name: str) -> bool:
    base = adapter.onto.read_unrounded(name)
    return torch.equal(adapter.read(name).to(torch.float32), base.to(torch.float32))


def _answers_apart(adapter: Adapter) -> tuple[float, float]:
    """How far the answers of the folded model, and of the base, are from those of base and adapter."""
    from hf_llfc.adapters.derived import answer_of, relative_change, sample_inputs
    from hf_llfc.checkpoints.views.folding import added

    onto = runnable(adapter.onto)
    model = built(onto, onto.read_unrounded, torch.float32)
    inputs = sample_inputs(model, batch_size=ROWS)
    before = _copied(answer_of(model, inputs))
    running: Any = added(adapter.id, model, adapter.config, adapter.state).eval()
    as_run = _copied(answer_of(running.get_base_model(), inputs))
    del model, running
    if not any(bool(value.isfinite().any()) for value in as_run.values()):
        raise CheckpointError("it has no finite answer to random inputs")
    folded = answer_of(built(onto, adapter.read, torch.float32), inputs)
    return relative_change(as_run, folded), relative_change(as_run, before)


def _copied(answers: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in answers.items()}
