"""Task vectors as matrices, for methods that decompose them.

Shape suffix: `oi` outputs and inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from hf_llfc.merging.methods.parts import around_base, differences, merge_in_parts
from hf_llfc.merging.methods.settings import Settings


def as_matrix(tensor: Tensor) -> Tensor:
    """Outputs × the rest, in float64."""
    return tensor.double().reshape(tensor.shape[0], -1)


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor has two and more outputs, and two and more inputs."""
    return tensor.dim() > 1 and 1 < tensor.shape[0] < tensor.numel()


def merged_change(
    models: Sequence[Tensor], base: Tensor, settings: Settings, change: Callable[[Sequence[Tensor]], Tensor]
) -> Tensor:
    """θ₀ + λΔ, with Δ the mean of the task vectors for everything that is no matrix.

    Args:
        models: Every model's tensor, of one shape.
        base: That of the base.
        settings: `lambda`.
        change: From the task vectors, in the shape of the tensors, to Δ in float64, outputs × the rest.

    Returns:
        The merge.
    """
    scale = settings.number("lambda")
    if is_matrix(base):
        merged_oi = change(differences(models, base)).mul_(scale)
        return merged_oi.add_(base.reshape(merged_oi.shape)).to(base.dtype).contiguous().view(base.shape)

    def mean(models_c: Sequence[Tensor], base_c: Tensor | None) -> Tensor:
        return around_base(models_c, base_c, [scale / len(models_c)] * len(models_c))

    return merge_in_parts(mean, models, base)
