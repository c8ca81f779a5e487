"""Kinds of quantised layers: recognised by their tensors, and read as the library reads them that wrote them."""

from __future__ import annotations

from collections.abc import Mapping

from hf_llfc.checkpoints.views.quantisation.bitsandbytes import four_bits
from hf_llfc.checkpoints.views.quantisation.matrices import QuantisedTensor
from hf_llfc.checkpoints.views.quantisation.packed import gptq_and_awq, packed
from hf_llfc.checkpoints.views.quantisation.scaled import (
    experts_of_4_bits,
    floats_of_4_bits,
    floats_of_8_bits,
    whole_numbers,
)
from hf_llfc.checkpoints.views.quantisation.stored import Stored
from hf_llfc.checkpoints.views.quantisation.unread import refuse_unread

_KINDS = (four_bits, experts_of_4_bits, floats_of_4_bits, packed, gptq_and_awq, whole_numbers, floats_of_8_bits)


def quantised_tensors(stored: Stored) -> tuple[Mapping[str, QuantisedTensor], frozenset[str]]:
    """Finds how the tensors of quantised layers are made.

    Args:
        stored: What is stored.

    Returns:
        Name → how it is made; and the names of the stored tensors that they are made from.

    Raises:
        CheckpointError: One is of a kind that is not read, or its tensors do not belong together.
    """
    made: dict[str, QuantisedTensor] = {}
    used: set[str] = set()
    for kind in _KINDS:
        for name, tensor, names in kind(stored):
            if name in made or (name in stored and name in used):
                raise stored.error(name, "it is stored twice, quantised in two ways; save the checkpoint again")
            made[name] = tensor
            used |= {name, *names}
    refuse_unread(stored, used)
    return made, frozenset(used)
