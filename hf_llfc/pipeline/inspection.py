"""What there is to know of a model by its permutation spec; `hf_llfc.inspect` asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.parents.specs import as_saved, bind, spec_of

if TYPE_CHECKING:
    from hf_llfc.parents.opening import Model
    from hf_llfc.symmetry import PermutationSpec


@dataclass(frozen=True)
class Inspection:
    """What `inspect` tells about a model.

    Attributes:
        model: Its id.
        model_type: Of its config.
        architecture: Its class.
        spec: Its permutation spec.
        parameters: How many numbers its tensors hold.
        symmetric_axes: Names of the axes that may move.
        tensors: A row a tensor: `tensor`, `shape`, `dtype`, its `axes` as an expression, and which are `symmetric`.
        verification: Largest relative change of the logits under a random transform (`change`) beside the float
            `noise` of the model, and whether it is `verified`; None where not asked for.
    """

    model: str
    model_type: str
    architecture: str | None
    spec: PermutationSpec
    parameters: int
    symmetric_axes: Sequence[str]
    tensors: Sequence[Mapping[str, Any]]
    verification: Mapping[str, Any] | None = None

    def __bool__(self) -> bool:
        """Whether the symmetries hold, where that was verified: false as the command then ends with 1."""
        return self.verification is None or bool(self.verification["verified"])


def inspect_model(
    model: Model, *, verify: bool = False, seed: int = 0, trust_remote_code: bool = False, allow_pickle: bool = False
) -> Inspection:
    """Describes the permutation spec of a model; see `hf_llfc.inspect`."""
    open_it = partial(open_checkpoint, model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    by_headers = isinstance(model, str | Path) and not verify
    # Loading the model class takes longer than everything else that is done here.
    checkpoint = (as_saved(open_it(as_stored=True)) if by_headers else None) or open_it()
    spec = spec_of(checkpoint)
    binding = bind(spec, checkpoint)
    tensors = [
        {
            "tensor": name,
            "shape": list(checkpoint.tensors[name].shape),
            "dtype": str(checkpoint.tensors[name].dtype).removeprefix("torch."),
            "axes": bound.spec.expression,
            "symmetric": [
                axis for axis in dict.fromkeys(use.axis for use in bound.spec.axes) if spec.axes[axis].symmetric
            ],
        }
        for name, bound in binding.tensors.items()
    ]
    verification: dict[str, Any] | None = None
    if verify:
        from hf_llfc.parents.invariance import largest_logit_change

        verification = {**largest_logit_change(checkpoint, seed=seed)}
        verification["verified"] = verification["change"] <= 10 * max(verification["noise"], 1e-12)
    return Inspection(
        model=checkpoint.id,
        model_type=checkpoint.settings.model_type,
        architecture=checkpoint.architecture,
        spec=spec,
        parameters=sum(info.elements for info in checkpoint.tensors.values()),
        symmetric_axes=binding.symmetric_axes,
        tensors=tensors,
        verification=verification,
    )
