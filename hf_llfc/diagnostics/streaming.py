"""What every streamed measurement shares: the loop over batches, the sum over processes, padding, broken features.

Shape legend: n samples, t tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from hf_llfc.diagnostics.features.trial import Layer
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.data import EvaluationData, problems_over_processes
from hf_llfc.foundation.progress import Progress, silent

if TYPE_CHECKING:
    from hf_llfc.diagnostics.combination import MovingModel
    from hf_llfc.parallel.ranks import Ranks


@dataclass(frozen=True)
class Execution:
    """How measurements run.

    Attributes:
        processes: Processes that share the samples, each of which gets the result over all; None for this one alone.
        progress: Told what is done, the samples done and all samples of this process.
        combined: Model that takes the weights of every point between the models; a copy of the first where None.
    """

    processes: Ranks | None = None
    progress: Progress = silent
    combined: MovingModel | None = None

    @property
    def share(self) -> tuple[int, int]:
        """Rank of this process, and the number of processes."""
        return (0, 1) if self.processes is None else (self.processes.rank, self.processes.count)


IN_ONE_PROCESS = Execution()


class Sums(Protocol):
    """Sums over the samples seen; they grow with neither samples nor batches."""

    def merge(self: S, other: S) -> None:
        """Adds what another process has gathered."""

    def cpu(self: S) -> S:
        """A copy in main memory, for other processes."""


S = TypeVar("S", bound=Sums)


def over_batches(
    data: EvaluationData,
    add: Callable[[Mapping[str, torch.Tensor], torch.Tensor], None],
    sums: S,
    doing: str,
    execution: Execution = IN_ONE_PROCESS,
) -> S:
    """Feeds the batches of this process to a measurement and sums over all processes.

    Args:
        data: The samples.
        add: Takes a batch and the numbers of its samples, and adds to `sums`.
        sums: Sums that this process gathers.
        doing: Description of the work for the progress.
        execution: Processes and progress.

    Returns:
        The sums over all samples, equal on all processes.

    Raises:
        EvaluationError: What `add` raised on any of the processes, on all of them.
    """
    processes = execution.processes
    problem: str | None = None
    try:
        for batch, sample_ids in data.batches(*execution.share, partial(execution.progress, doing)):
            add(batch, sample_ids)
    except EvaluationError as error:
        problem = str(error)
    if processes is None:
        problems_over_processes([problem])
        return sums
    parts = processes.gather((sums.cpu(), problem))
    problems_over_processes([problem for _, problem in parts])
    whole: S = parts[0][0]
    for part, _ in parts[1:]:
        whole.merge(part)
    return whole


def attention_mask(
    batch: Mapping[str, torch.Tensor], sample_ids: torch.Tensor, layers: Sequence[Layer], device: torch.device
) -> torch.Tensor | None:
    """The attention mask where it is needed.

    Args:
        batch: A batch as `EvaluationData.batches` yields it.
        sample_ids: Numbers of its samples, for the message.
        layers: Layers whose features are to be divided.
        device: Where to put the mask.

    Returns:
        (n, t), or None where there is no mask or it hides nothing.

    Raises:
        EvaluationError: A sample is padded everywhere.
    """
    mask = batch.get("attention_mask")
    if mask is None:
        return None
    empty = sample_ids[mask.sum(dim=-1) == 0].tolist()
    if empty:
        raise EvaluationError(
            f"sample {empty[0]} is empty: its attention mask is zero everywhere; leave it out of the data"
        )
    # A first dimension over samples and tokens can only be taken apart with a mask.
    flattened = any(layer.token_axes == (-1,) for layer in layers)
    return mask.to(device) if flattened or not bool(mask.all()) else None


def check_finite(values: torch.Tensor, sample_ids: torch.Tensor, label: str, model: str) -> None:
    """Stops at features that are not finite.

    Args:
        values: One a sample, not finite if any of its features is not, (n,).
        sample_ids: Numbers of the samples, (n,).
        label: Name of the layer.
        model: Name of the model (``the first model``).

    Raises:
        EvaluationError: Names layer, model and the first such sample.
    """
    finite = values.isfinite()
    if finite.all():
        return
    sample = int(sample_ids[int((~finite).nonzero()[0])])
    raise EvaluationError(
        f"features of layer {label!r} of {model} are not finite (NaN or Inf) for sample {sample}; leave the sample "
        "out, or look for overflow in a wider dtype"
    )


def check_complete(layers: Sequence[Layer], measured: Mapping[int, object]) -> None:
    """Stops where a layer that ran in the trial run did not run for a batch.

    Args:
        layers: All layers that are measured.
        measured: Values measured, by the index of the layer.

    Raises:
        EvaluationError: Names the first layer without a value.
    """
    missing = [layer.label for index, layer in enumerate(layers) if index not in measured]
    if missing:
        raise EvaluationError(f"layer {missing[0]!r} did not run for a batch, unlike in its trial run")
