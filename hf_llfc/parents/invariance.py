"""Whether the permutation spec of a model holds for its weights: moved at random, it must answer the same."""

from __future__ import annotations

import torch

from hf_llfc.checkpoints import Checkpoint
from hf_llfc.parents.parent import Parent
from hf_llfc.parents.specs import spec_of


def largest_logit_change(checkpoint: Checkpoint, *, seed: int = 0) -> dict[str, float]:
    """How much a random transform of every symmetric axis changes the logits, against float noise.

    Args:
        checkpoint: Any supported model.
        seed: Seed of the transform and the inputs.

    Returns:
        `change`: largest change of the logits, relative to the largest logit, in float64; `noise`: that of computing
        them in float32 instead of float64.
    """
    from hf_llfc.adapters.derived import answer_of, relative_change, sample_inputs

    random = spec_of(checkpoint).random_alignment(torch.Generator().manual_seed(seed))
    model = Parent(checkpoint).load()
    moved = Parent(checkpoint, random).load()
    for each in (model, moved):
        if type(each)._can_set_experts_implementation():
            each.set_experts_implementation("eager")  # the grouped kernels have no float64
    inputs = sample_inputs(model.float(), seed=seed)
    single = {name: answer.double() for name, answer in answer_of(model, inputs).items()}
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    exact = answer_of(model.double(), inputs)
    return {
        "change": relative_change(exact, answer_of(moved.double(), inputs)),
        "noise": relative_change(exact, single),
    }
