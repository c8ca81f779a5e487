"""The derived spec of a config: derived at its own size, verified on a small copy."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from hf_llfc.adapters.derived.derive import derive, folded, generalised
from hf_llfc.adapters.derived.inputs import sample_inputs
from hf_llfc.adapters.derived.shrink import shrunken
from hf_llfc.adapters.derived.verify import Verification, randomise, verify
from hf_llfc.adapters.model_classes import model_class_for
from hf_llfc.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hf_llfc.symmetry.spec import PermutationSpec

logger = logging.getLogger(__name__)

# Specs of the configs seen last: a run asks for the spec of each of its models, and deriving one takes a second.
_REMEMBERED = 8


def derived_spec(config: PreTrainedConfig) -> PermutationSpec:
    """Derives the permutation spec of a config that has no adapter, and verifies it.

    The spec is derived at the config's own size, without its weights. A copy with the same structure and tiny sizes
    is derived as well, and checked in float64 with random weights. Axes that fail there, and axes of tensors that the
    copy does not show them in, are fixed; the spec's notes say which.

    Args:
        config: The config.

    Raises:
        SpecError: No class of transformers builds it, it cannot be run, or it cannot be verified.
    """
    return _derived(_Key(config))


class _Key:
    """A config that may be the key of a cache."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self._text = f"{type(config).__qualname__} {config.to_json_string(use_diff=False)}"

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._text == other._text


@lru_cache(maxsize=_REMEMBERED)
def _derived(key: _Key) -> PermutationSpec:
    config = key.config
    model_class = model_class_for(config)
    with torch.random.fork_rng(devices=[]):
        try:
            spec = derive(model_class, config)
            small, verification = verified_copy(model_class, config)
        except SpecError:
            raise
        except Exception as error:
            # Whatever the code of a model may raise; the caller can do nothing about it but fix all axes.
            logger.debug("deriving the spec of %s", config.model_type, exc_info=True)
            raise SpecError(
                f"model type {config.model_type!r}: its symmetries cannot be derived ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''})"
            ) from error
    failed = _with_indices(spec.symmetric_axes, {generalised(axis) for axis in verification.failed})
    shown = set(_places(small, small.symmetric_axes))
    unseen = sorted(
        {axis for axis in spec.symmetric_axes if axis not in failed and not shown.issuperset(_places(spec, (axis,)))}
    )
    notes = [
        *spec.notes,
        f"verified on a copy of {verification.parameters:,} parameters with random weights, in float64: largest "
        f"relative change {verification.change:.1e}",
    ]
    if failed:
        notes.append(f"fixed because they failed: {folded(failed)}")
    if unseen:
        notes.append(f"fixed because the copy does not show their tensors: {folded(unseen)}")
    return replace(spec.fix(*failed, *unseen) if failed or unseen else spec, notes=tuple(notes))


def verified_copy(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0
) -> tuple[PermutationSpec, Verification]:
    """Derives and verifies the spec of a tiny copy of a config.

    Args:
        model_class: The class that the config builds.
        config: A config of any size.
        seed: Of weights and inputs.

    Returns:
        The spec of the copy, failed axes included, and what verification found.

    Raises:
        SpecError: The config cannot be shrunk, or there are no inputs for the model.
    """
    small = shrunken(config)
    spec = derive(model_class, small)
    model = model_with_random_weights(model_class, small, seed)
    return spec, verify(spec, model, sample_inputs(model, seed=seed))


def model_with_random_weights(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int, dtype: torch.dtype = torch.float64
) -> PreTrainedModel:
    """A model in eval mode whose every parameter and running statistic is drawn from `seed`.

    Its attention and experts are those that float64 can run.
    """
    config = deepcopy(config)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the fused kernels have no float64
    # Modelling files draw their first weights from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(config)
    randomise(model, torch.Generator().manual_seed(seed))
    return model.to(dtype).eval()


def _with_indices(axes: Iterable[str], patterns: set[str]) -> list[str]:
    return [axis for axis in axes if generalised(axis) in patterns]


def _places(spec: PermutationSpec, axes: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Every tensor that holds one of some axes, and the axis, both without numbers: equal in a larger model."""
    wanted = set(axes)
    for tensor in spec.declarations:
        for use in tensor.axes:
            if use.axis in wanted:
                yield generalised(tensor.name), generalised(use.axis)
