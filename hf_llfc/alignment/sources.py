"""Where matching reads tensors from: a checkpoint on disk or a state dict, bound to its permutation spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hf_llfc.symmetry.binding import Binding
from hf_llfc.symmetry.declarations import PERMUTATION, TensorSpec
from hf_llfc.symmetry.spec import Alignment, PermutationSpec

ANCHORS = 16.0
"""How often an anchor counts where an axis is transformed by matrices, see `Parameters.with_anchors`."""


def anchors_of(spec: PermutationSpec) -> float:
    """Default weight of an anchor: 1 where all axes are permuted."""
    return ANCHORS if any(spec.axes[axis].group != PERMUTATION for axis in spec.symmetric_axes) else 1.0


@dataclass(frozen=True)
class Parameters:
    """The tensors of one model, read one at a time.

    Attributes:
        binding: Their declarations, by the model's own names.
        stored: Gives a tensor by name, in its stored dtype.
        label: Name of the model in error messages.
        device: Where tensors are put as they are read; they stay where they are where None. Matching computes where
            those of the reference are.
    """

    binding: Binding
    stored: Callable[[str], Tensor]
    label: str = ""
    device: torch.device | None = None

    def read(self, name: str) -> Tensor:
        """One tensor, in its stored dtype, on the device."""
        tensor = self.stored(name)
        return tensor if self.device is None else tensor.to(self.device)

    @classmethod
    def from_state_dict(cls, spec: PermutationSpec, state_dict: Mapping[str, Tensor]) -> Parameters:
        """Binds tensors that are in memory.

        Raises:
            SpecError: They do not fit the spec.
        """
        binding = spec.bind({name: tensor.shape for name, tensor in state_dict.items()})
        return cls(binding, state_dict.__getitem__)

    @cached_property
    def keys(self) -> dict[tuple[str, tuple[int, ...]], str]:
        """Names of the model's tensors by (declared name, index along the axes in the name)."""
        return {(bound.spec.name, bound.index): name for name, bound in self.binding.tensors.items()}

    def with_anchors(self, weight: float) -> Parameters:
        """The same model with ⟨A, T·B⟩ of the tensors that anchor an axis counted `weight` times.

        A tensor anchors an axis that is the only symmetric one it has, beside fixed ones: an embedding anchors the
        residual stream by its words, a classifier by its classes. What else the stream is in was itself chosen to fit:
        the best permutation of neurons brings even weights that were shuffled at random some way together (to a cosine
        of .2 where true ones reach .3; `benchmarks/anchors.py`). An anchor flatters nobody.

        Args:
            weight: Above 0; 1 for the tensors as they are.
        """
        if weight == 1:
            return self
        anchors = {name for name, bound in self.binding.tensors.items() if self._is_anchor(bound.spec)}

        def read(name: str) -> Tensor:
            tensor = self.read(name)
            if name not in anchors:
                return tensor
            # Both models are weighted, each by the root.
            return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * weight**0.5

        return replace(self, stored=read)

    def _is_anchor(self, tensor: TensorSpec) -> bool:
        moving = [use for use in tensor.axes if self.binding.spec.axes[use.axis].symmetric]
        return len(moving) == 1 and moving[0].parent is None and len(tensor.dimensions) > 1

    def aligned(self, name: str, alignment: Alignment) -> Tensor:
        """Reads one tensor moved by an alignment."""
        return alignment.read_aligned(name, self.binding, self.read)
