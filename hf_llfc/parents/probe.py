"""The probe of a moved model: random inputs through the original and the moved one, which must answer the same.

A symmetry is declared by hand, or derived from a small copy. Where a declaration is wrong for a config, an alignment
changes the model, and what is merged then is silently another one. Running both once finds that before anything is
written.

Weights are cast to float32, whatever they are stored in, so that a true symmetry changes the answers by rounding alone.
What is more than that is looked at again in float64, where rounding is nowhere near a false symmetry.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_llfc.checkpoints import Checkpoint
from hf_llfc.errors import AlignmentError, LLFCError
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.parallel.memory import available_memory
from hf_llfc.parallel.workers import ALONE, Workers
from hf_llfc.parents.parent import Parent
from hf_llfc.symmetry import Alignment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

NOISE = {torch.float32: 1e-5, torch.float64: 1e-8}
"""The largest change of an answer that counts as rounding, relative to its largest entry: some hundred times what deep
models show, and less than a hundredth of what the mildest false symmetry does."""

UNCONFIRMED = 1e-3
"""The same in float32 where a model does not run in float64."""

ROWS = 2
"""Samples of the random inputs."""

TOKENS = 24
"""What those of a text model hold together."""

Read = Callable[[str], Tensor]


def probed(
    alignment: Alignment | None,
    model: Checkpoint,
    *,
    asked: bool = True,
    workers: Workers = ALONE,
    progress: Progress = silent,
) -> Alignment | None:
    """The alignment of a model, after it has shown that it keeps what the model answers.

    Args:
        alignment: How the model moves; None if it stays as it is.
        model: The model, as it is aligned.
        asked: Whether it is probed.
        workers: The processes of a launcher, of which the first runs the model.
        progress: Shown meanwhile.

    Returns:
        The alignment with `probe` in its metadata: the largest `change` of an answer relative to its largest entry, the
        `precision` of the weights; or why it was `left_out`.

    Raises:
        AlignmentError: The moved model answers otherwise.
    """
    if alignment is None:
        return None
    if not asked:
        return alignment.with_metadata(probe={"left_out": "not asked for"})
    progress("probing", 0, 1)
    found = workers.gather(probe(alignment, model) if workers.rank == 0 else None)[0]
    progress("probing", 1, 1)
    return alignment.with_metadata(probe=found)


def probe(alignment: Alignment, model: Checkpoint) -> dict[str, Any]:
    """Runs a model before and after it is moved, see `probed`."""
    if alignment.is_identity and model.canonical is None:
        return {"change": 0.0, "precision": "float32"}
    started = perf_counter()
    dtype = torch.float32
    try:
        run = _Run(model)
        change = run.change(alignment, dtype)
    except Exception as error:  # whatever the code of a model, or what is not known of it, may raise
        raise_if_unread(error)
        logger.debug("probing %s", model.label, exc_info=True)
        reason = str(error).splitlines()[0] if isinstance(error, LLFCError) else f"{type(error).__name__}: {error}"
        logger.warning("%s: the moved model was not probed: %s", model.label, reason)
        return {"left_out": reason}
    noise = NOISE[dtype]
    if change > noise:
        change, dtype, noise = run.looked_at_again(alignment, change)
    logger.info("%s: probed in %.1f s, answers change by %.0e", model.label, perf_counter() - started, change)
    if change > noise:
        raise AlignmentError(_accusation(run, alignment, change, dtype, noise))
    # One digit: how many threads computed it is of no account.
    return {"change": float(f"{change:.0e}"), "precision": str(dtype).removeprefix("torch.")}


def raise_if_unread(error: Exception) -> None:
    """A file that cannot be read ends the run, whoever reads it."""
    if isinstance(error, LLFCError) and isinstance(error.__cause__, OSError):
        raise error


def is_in_memory(model: Checkpoint, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a probe holds the whole model: where it takes no more than half of the memory that is free."""
    return _whole(model, dtype) <= available_memory() / 2


def probe_memory(model: Checkpoint) -> int:
    """Bytes that a probe takes at its peak, in float32; of a model that is not held, those of its largest tensor."""
    if is_in_memory(model):
        return _whole(model, torch.float32)
    return max((info.elements * 4 + info.nbytes for info in model.tensors.values()), default=0)


def _whole(model: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of the model in a dtype, and of what it is made from."""
    elements = sum(info.elements for info in model.tensors.values())
    return elements * dtype.itemsize + max(elements * dtype.itemsize, model.nbytes)


class _Run:
    """Random inputs through a model as it was opened, and as it is moved.

    Attributes:
        original: The model as it was opened.
        model: The same as it is aligned: in canonical form where there are more groups than permutations.
    """

    def __init__(self, model: Checkpoint) -> None:
        self.model = runnable(model)
        self.original = self.model if model.original is None else runnable(model.original)
        self._inputs: dict[str, Tensor] = {}
        self._before: dict[torch.dtype, dict[str, Tensor]] = {}

    def change(self, alignment: Alignment, dtype: torch.dtype) -> float:
        """How much the answers change, relative to their largest entry.

        Raises:
            AlignmentError: The model has no finite answer.
        """
        from hf_llfc.adapters.derived import relative_change

        if dtype not in self._before:
            self._before[dtype] = self._answers(self.original, self.original.read_unrounded, dtype)
        before = self._before[dtype]
        if not any(bool(value.isfinite().any()) for value in before.values()):
            raise AlignmentError("it has no finite answer to random inputs")
        return relative_change(before, self._answers(self.model, Parent(self.model, alignment).read_unrounded, dtype))

    def looked_at_again(self, alignment: Alignment, change: float) -> tuple[float, torch.dtype, float]:
        """The change in float64, its dtype and the bound; as it was where the model does not run in that."""
        try:
            return self.change(alignment, torch.float64), torch.float64, NOISE[torch.float64]
        except Exception as error:  # whatever the code of a model may raise
            raise_if_unread(error)
            logger.debug("running %s in float64", self.model.label, exc_info=True)
            return change, torch.float32, UNCONFIRMED

    def first_fault(self, alignment: Alignment, dtype: torch.dtype, noise: float) -> str | None:
        """The axis whose transform changes the answers while those before it do not; None if nothing moved does."""
        moved = [axis for axis, transform in alignment.transforms.items() if not transform.is_identity]

        def is_wrong(count: int) -> bool:
            part = {axis: alignment.transforms[axis] for axis in moved[:count]}
            return self.change(Alignment(alignment.spec, part), dtype) > noise

        if not moved or is_wrong(0):
            return None
        right, wrong = 0, len(moved)
        while wrong - right > 1:
            middle = (right + wrong) // 2
            right, wrong = (right, middle) if is_wrong(middle) else (middle, wrong)
        return moved[right]

    def _answers(self, checkpoint: Checkpoint, read: Read, dtype: torch.dtype) -> dict[str, Tensor]:
        from hf_llfc.adapters.derived import answer_of, sample_inputs

        model = built(checkpoint, read, dtype)
        self._inputs = self._inputs or sample_inputs(model, batch_size=ROWS)
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in self._inputs.items()}
        return answer_of(model, inputs)


def built(checkpoint: Checkpoint, read: Read, dtype: torch.dtype) -> PreTrainedModel:
    """The model with other weights, in memory where there is room; otherwise read as its modules run."""
    from hf_llfc.checkpoints import load_model
    from hf_llfc.checkpoints.streamed import StreamedModel

    def cast(name: str) -> Tensor:
        tensor = read(name)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    if not is_in_memory(checkpoint, dtype):
        return StreamedModel(checkpoint, [cast], [1.0], dtype=dtype).model
    state = {name: read(name) for name in checkpoint.tensors}
    return load_model(checkpoint, state_dict=state, dtype=dtype).eval()


def runnable(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with its model class, and attention and experts that every precision has.

    Raises:
        AlignmentError: The class is not known.
    """
    from hf_llfc.checkpoints.names import Layout, find_model_class

    config = copy.deepcopy(checkpoint.config)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model_class = checkpoint.model_class
    if model_class is None and checkpoint.architecture is not None:
        model_class = find_model_class(checkpoint.architecture, config, folder=checkpoint.folder)
    if model_class is None:
        raise AlignmentError(f"its model class {checkpoint.architecture or '(the config names none)'} is not known")
    unused = set(Layout(model_class, config).plan(checkpoint.tensors, checkpoint.label).unused)
    return replace(
        checkpoint,
        settings=checkpoint.settings.with_config(config),
        model_class=model_class,
        tensors={name: info for name, info in checkpoint.tensors.items() if name not in unused},
    )


def _accusation(run: _Run, alignment: Alignment, change: float, dtype: torch.dtype, noise: float) -> str:
    """What is wrong with a moved model, and what to do."""
    model = run.model
    text = (
        f"{model.label}: moved, it answers otherwise than before: random inputs give answers that differ by "
        f"{change:.1e} of the largest, where rounding makes {noise:.0e} at most"
    )
    axis = run.first_fault(alignment, dtype, noise)
    if axis is None:
        return f"{text}; its canonical form is not the same model; align with the groups `permutation`"
    binding = alignment.spec.bind({name: info.shape for name, info in model.tensors.items()})
    names = [name for name, bound in binding.tensors.items() if axis in {use.axis for use in bound.spec.axes}]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    kind = axis.split(".")[0]
    return (
        f"{text}. The axis {axis} ({shown}) is declared symmetric, and this model is not symmetric along it. Leave it "
        f"where it is (`exclude: [{kind}]`, or --exclude {kind}), and report the model type "
        f"{alignment.spec.model_type!r} with its config.json: `hf-llfc inspect {model.label} --verify` shows it, too"
    )
