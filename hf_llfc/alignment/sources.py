"""Where matching reads tensors from: a checkpoint on disk or a state dict, bound to its permutation spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from hf_llfc.symmetry.alignment import Alignment
from hf_llfc.symmetry.spec import Binding, PermutationSpec


@dataclass(frozen=True)
class Parameters:
    """The tensors of one model, read one at a time.

    Attributes:
        binding: Their declarations, by the model's own names.
        read: Gives a tensor by name, in its stored dtype. Matching computes on the device where it puts the
            reference's tensors.
        label: What error messages call the model.
    """

    binding: Binding
    read: Callable[[str], Tensor]
    label: str = ""

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
        """(declared name, index along the axes in the name) → the model's own name."""
        return {(bound.spec.name, bound.index): name for name, bound in self.binding.tensors.items()}

    def aligned(self, name: str, alignment: Alignment) -> Tensor:
        """Reads one tensor moved by an alignment."""
        return alignment.read_aligned(name, self.binding, self.read)
