"""What matching takes, against figures worked out by hand from the shapes of one tiny Llama."""

import pytest
import torch

import hf_llfc.alignment.costs
from hf_llfc.alignment.assignment.auction import PASSES
from hf_llfc.alignment.costs import machine_costs, matching_cost, matching_memory
from hf_llfc.alignment.gains import CASTS, PARTS
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.foundation.choices import METHODS_WITH_DATA
from hf_llfc.recipe import AlignSection
from hf_llfc.recipe.data import EvaluationConfig
from tests.runs import byte_llama

HIDDEN, NEURONS, LAYERS, VOCABULARY = 24, 40, 2, 256
HEADS, GROUPS, WIDTH = 6, 2, 8
EMBEDDING = VOCABULARY * HIDDEN
MLP = 3 * HIDDEN * NEURONS
ATTENTION = 2 * HIDDEN * HEADS * WIDTH + 2 * HIDDEN * GROUPS * WIDTH
ELEMENTS = 2 * EMBEDDING + LAYERS * (MLP + ATTENTION + 2 * HIDDEN) + HIDDEN
"""All numbers of the model, whose head is not its embedding."""

SQUARES = HIDDEN**2 + LAYERS * (NEURONS**2 + GROUPS**2 + (HEADS // GROUPS) ** 2 + WIDTH**2)
"""Entries of a matrix for every axis: stream, neurons, groups of heads, heads of a group, values of a head."""

BY_WEIGHTS = (PARTS + 1) * 4 * NEURONS**2 + 8 * EMBEDDING
"""Gains of the widest axis, in parts and once more, and a tensor of each model in float32; one thread."""


def section_of(options: dict) -> AlignSection:
    """A section; the memory does not depend on the data, which are not opened."""
    runs_models = any(options.get(key) in METHODS_WITH_DATA for key in ("method", "start"))
    data = EvaluationConfig(task="text-generation", dataset="d") if runs_models else None
    return AlignSection(**options, calibration=data)


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(byte_llama(0))


@pytest.mark.parametrize(
    ("options", "models", "expected"),
    [
        ({}, 2, BY_WEIGHTS),
        ({"axes": ("residual",)}, 2, (PARTS + 1) * 4 * HIDDEN**2 + 8 * EMBEDDING),
        ({"together": "universe"}, 3, BY_WEIGHTS + 8 * ELEMENTS),
        ({"start": "activation_matching"}, 2, 2 * 4 * ELEMENTS + 8 * SQUARES),
        ({"method": "activation_matching"}, 2, 2 * 4 * ELEMENTS + 8 * SQUARES),
        ({"method": "activation_matching"}, 5, 2 * 4 * ELEMENTS + 8 * SQUARES),
        ({"method": "activation_matching", "together": "universe"}, 5, 5 * 4 * ELEMENTS + 10 * 8 * SQUARES),
        ({"method": "commutativity_matching"}, 2, 2 * 4 * ELEMENTS + 2 * 8 * ELEMENTS + 4 * 8 * SQUARES),
        ({"method": "learned_matching"}, 2, 5 * 4 * ELEMENTS + 4 * 4 * SQUARES),
    ],
)
def test_memory_of_every_method(checkpoint, options, models, expected):
    assert checkpoint.nbytes == 4 * ELEMENTS
    assert matching_memory(checkpoint, section_of(options), models) == expected


def test_every_thread_holds_gains_and_tensors_of_its_own(checkpoint):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert matching_memory(checkpoint, AlignSection()) == (PARTS + 3) * 4 * NEURONS**2 + 3 * 8 * EMBEDDING
    finally:
        torch.set_num_threads(before)


OPERATIONS = {
    "neurons.*": LAYERS * 2 * NEURONS * MLP,
    # Every tensor has the stream on one side: as many products as numbers, for every entry of the stream.
    "residual": 2 * HIDDEN * ELEMENTS,
}
READ = {"neurons.*": LAYERS * MLP, "residual": ELEMENTS}
ASSIGNED = {"neurons.*": LAYERS * NEURONS**2, "residual": HIDDEN**2}


@pytest.mark.parametrize("axes", [("neurons.*",), ("residual",), ("neurons.*", "residual")])
@pytest.mark.parametrize(("together", "involved"), [("reference", 2), ("universe", 3)])
def test_operations_bytes_and_time_of_a_sweep(checkpoint, monkeypatch, axes, together, involved):
    options = AlignSection(axes=axes, together=together)
    operations, read, assigned = (sum(part[axis] for axis in axes) for part in (OPERATIONS, READ, ASSIGNED))
    # A machine that only multiplies, and one that only copies.
    for per_operation, per_byte in ((1.0, 0.0), (0.0, 1.0)):
        monkeypatch.setattr(
            hf_llfc.alignment.costs, "machine_costs", lambda device, costs=(per_operation, per_byte): costs
        )
        cost = matching_cost(checkpoint, options, models=3)
        assert (cost["operations"], cost["bytes"]) == (operations, involved * 4 * read)
        moved = read * (involved * 4 + CASTS * 4) + assigned * PASSES * 4
        assert cost["seconds"] == per_operation * operations + per_byte * moved


def test_half_precision_is_read_in_half_the_bytes(checkpoint):
    half = open_checkpoint(byte_llama(0).bfloat16())
    whole, halved = (matching_cost(model, AlignSection()) for model in (checkpoint, half))
    assert halved["bytes"] == whole["bytes"] / 2
    assert halved["operations"] == whole["operations"]


def test_this_machine_multiplies_and_copies_in_a_measurable_time():
    per_operation, per_byte = machine_costs()
    # Between a supercomputer and a machine that could not have loaded torch.
    assert 1e-16 < per_operation < 1e-6 and 1e-14 < per_byte < 1e-5
