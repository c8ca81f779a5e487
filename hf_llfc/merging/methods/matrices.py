"""Task vectors as matrices, for methods that decompose them.

Shape suffix: `oi` outputs and inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from hf_llfc.merging.methods.parts import around_base, merge_in_parts
from hf_llfc.merging.methods.settings import Settings


class Tasks:
    """The task vectors τᵢ = θᵢ − θ₀ as matrices in float64, each made when it is asked for.

    A matrix is outputs × the rest, which for the kernel of a convolution are its inputs and places.
    """

    def __init__(self, models: Sequence[Tensor], base: Tensor) -> None:
        """Makes none yet.

        Args:
            models: Every model's tensor, of one shape.
            base: That of the base.
        """
        self._models = models
        self._base = base
        self.shape = (base.shape[0], base.numel() // base.shape[0])

    def __len__(self) -> int:
        return len(self._models)

    def __iter__(self) -> Iterator[Tensor]:
        """Yields new tensors, one after the other."""
        for model in self._models:
            yield model.double().sub(self._base).reshape(self.shape)

    def sum(self) -> Tensor:
        """Σ τᵢ."""
        summed_oi = self._base.double() * -len(self)
        for model in self._models:
            summed_oi.add_(model)
        return summed_oi.reshape(self.shape)


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor has two and more outputs, and two and more inputs."""
    return tensor.dim() > 1 and 1 < tensor.shape[0] < tensor.numel()


def merged_change(
    models: Sequence[Tensor], base: Tensor, settings: Settings, change: Callable[[Tasks], Tensor]
) -> Tensor:
    """θ₀ + λΔ, with Δ the mean of the task vectors for everything that is no matrix.

    Args:
        models: Every model's tensor, of one shape.
        base: That of the base.
        settings: `lambda`.
        change: From the task vectors to Δ, a new tensor in float64, outputs × the rest.

    Returns:
        The merge.
    """
    scale = settings.number("lambda")
    if is_matrix(base):
        merged_oi = change(Tasks(models, base)).mul_(scale)
        return merged_oi.add_(base.reshape(merged_oi.shape)).to(base.dtype).contiguous().view(base.shape)

    def mean(models_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        return around_base(models_c, base_c, [scale / len(models_c)] * len(models_c))

    return merge_in_parts(mean, models, base)
