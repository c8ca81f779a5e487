"""What must hold for every adapter: one table of properties × every family and head of `tests.tiny_models.TINY`.

A new row there, or a new family, is tested by everything here without another line.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_llfc import PermutationSpec
from hf_llfc.alignment import Parameters, match_activations, match_weights
from hf_llfc.errors import SpecError
from hf_llfc.symmetry import Alignment
from tests.properties.invariance import (
    RELATIVE_CHANGE,
    assert_equal,
    change_by_random_transform,
    outputs,
    relative_change,
    shapes,
)
from tests.tiny_models import HEADS, TINY, tiny_inputs, tiny_model

# Without rotary positions a key bias adds the same to all of a query's scores, and the softmax takes it away.
KEY_BIAS = re.compile(r"attention\.(self\.key|attention\.key|k_lin|k_proj)\.bias$")

# Units of a ReLU that never fire on the data are all alike to it: recovered up to their order.
WITH_RELU = [row for row in TINY if row[0].startswith("resnet") or row == ("distilbert", "sequence-classification")]


@dataclass(frozen=True)
class Row:
    """One family with one head, in float64: the model, its spec, and its tensors as `save_pretrained` writes them."""

    family: str
    head: str
    folder: Path
    model: PreTrainedModel
    spec: PermutationSpec
    on_disk: dict[str, Tensor]

    def random(self, seed: int) -> Alignment:
        return self.spec.random_alignment(torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=TINY, ids="-".join)
def row(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Row:
    family, head = request.param
    model = tiny_model(family, head, dtype=torch.float64)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    config = type(model.config).from_pretrained(folder)
    return Row(
        family, head, folder, model, PermutationSpec.from_config(config), load_file(folder / "model.safetensors")
    )


def test_every_tensor_is_declared_exactly_once(row: Row):
    binding = row.spec.bind(shapes(row.on_disk))
    assert binding.tensors.keys() == row.on_disk.keys()
    declarations = [(bound.spec.name, bound.index) for bound in binding.tensors.values()]
    assert len(set(declarations)) == len(declarations)
    for name, tensor in row.on_disk.items():
        assert binding.tensors[name].spec.shape(binding.sizes) == tensor.shape


def test_the_error_names_every_tensor_that_does_not_fit(row: Row):
    binding = row.spec.bind(shapes(row.on_disk))
    required = [name for name, bound in binding.tensors.items() if not bound.spec.optional]
    missing, misshapen = required[0], required[-1]
    wrong = shapes(row.on_disk)
    del wrong[missing]
    wrong[misshapen] = torch.Size([*wrong[misshapen], 3])
    wrong["one.too.many"] = torch.Size([3])
    with pytest.raises(SpecError) as error:
        row.spec.bind(wrong)
    message = str(error.value)
    assert "3 problems" in message
    assert f"{binding.tensors[missing].spec.name_at(binding.tensors[missing].index)}: missing" in message
    assert f"{misshapen}: shape {list(wrong[misshapen])} found" in message
    assert "one.too.many: not declared" in message


def test_names_with_and_without_the_head_prefix_are_the_same_tensors(row: Row):
    declared = {name: bound.spec.name for name, bound in row.spec.bind(shapes(row.on_disk)).tensors.items()}
    prefix = row.spec.prefix
    assert prefix
    names = [name.removeprefix(prefix) for name in row.on_disk]
    if row.head == "base":
        assert names == list(row.on_disk), "save_pretrained writes a base model without the prefix"
        names = [prefix + name for name in row.on_disk]
    other = row.spec.bind(dict(zip(names, shapes(row.on_disk).values(), strict=True)))
    assert [other.tensors[name].spec.name for name in names] == list(declared.values())


def test_names_in_memory_and_names_on_disk_move_alike(row: Row, tmp_path: Path):
    alignment = row.random(1)
    in_memory = alignment.apply(row.model.state_dict())
    save_file(alignment.apply(row.on_disk), tmp_path / "model.safetensors", metadata={"format": "pt"})
    row.model.config.save_pretrained(tmp_path)
    loaded = type(row.model).from_pretrained(tmp_path, dtype=torch.float64)
    assert_equal(loaded.state_dict(), in_memory)


def test_a_checkpoint_saved_under_the_names_in_memory_binds(row: Row, tmp_path: Path):
    row.model.save_pretrained(tmp_path, save_original_format=False)
    as_in_memory = load_file(tmp_path / "model.safetensors")
    binding = row.spec.bind(shapes(as_in_memory))
    assert binding.symmetric_axes == row.spec.bind(shapes(row.on_disk)).symmetric_axes
    moved, in_memory = row.random(1).apply(as_in_memory), row.random(1).apply(row.model.state_dict())
    assert_equal(moved, {name: in_memory[name] for name in as_in_memory})


def test_a_random_transform_of_every_symmetric_axis_keeps_the_outputs(row: Row):
    assert change_by_random_transform(row.model, row.spec, tiny_inputs(row.model)) <= RELATIVE_CHANGE


def test_a_random_transform_moves_every_symmetric_axis(row: Row):
    # An axis of two entries stays in half of the draws, never in 20 of them.
    moved = [row.random(seed).moved for seed in range(20)]
    used = row.spec.bind(shapes(row.on_disk)).symmetric_axes
    assert used
    for axis in used:
        assert row.spec.axes[axis].size > 1 and any(each[axis][0] for each in moved), axis


def test_the_inverse_undoes_a_transform_bit_for_bit(row: Row):
    alignment = row.random(3)
    assert_equal(alignment.inverse().apply(alignment.apply(row.on_disk)), row.on_disk)
    assert_equal(alignment.apply(alignment.inverse().apply(row.on_disk)), row.on_disk)
    assert alignment.then(alignment.inverse()).is_identity
    assert alignment.inverse().then(alignment).is_identity
    assert alignment.inverse().inverse().transforms == alignment.transforms


def test_a_composition_moves_as_its_parts_one_after_the_other(row: Row):
    first, second = row.random(4), row.random(5)
    assert_equal(first.then(second).apply(row.on_disk), second.apply(first.apply(row.on_disk)))


def test_an_alignment_file_gives_back_the_alignment(row: Row, tmp_path: Path):
    alignment = row.random(6).with_metadata(objective_after=0.25, sweeps=[{"sweep": 1}])
    alignment.save(tmp_path / "alignment.safetensors")
    loaded = Alignment.load(tmp_path / "alignment.safetensors", row.spec)
    assert loaded.transforms == alignment.transforms
    assert loaded.metadata == alignment.metadata
    assert_equal(loaded.apply(row.on_disk), alignment.apply(row.on_disk))


def test_tied_tensors_stay_tied(row: Row):
    state = row.model.state_dict()
    moved = row.random(7).apply(state)

    def tied(tensors: Mapping[str, Tensor]) -> list[list[str]]:
        by_storage: dict[int, list[str]] = {}
        for name, tensor in tensors.items():
            by_storage.setdefault(tensor.data_ptr(), []).append(name)
        return [names for names in by_storage.values() if len(names) > 1]

    assert tied(moved) == tied(state)
    assert bool(tied(state)) == bool(row.model.all_tied_weights_keys)


def test_weight_matching_recovers_a_planted_transform_exactly(row: Row):
    planted = row.random(8)
    moved = planted.apply(row.on_disk)
    found = match_weights(
        Parameters.from_state_dict(row.spec, row.on_disk), Parameters.from_state_dict(row.spec, moved)
    )
    assert_equal(found.apply(moved), row.on_disk)
    assert found.metadata["converged"]
    assert found.metadata["cosine_before"] < 0.9
    assert found.metadata["cosine_after"] == pytest.approx(1, abs=1e-12)


def test_activation_matching_recovers_a_planted_transform_exactly(row: Row):
    planted = row.random(9)
    moved = copy.deepcopy(row.model)
    moved.load_state_dict(planted.apply(row.model.state_dict()))
    batches = [tiny_inputs(row.model, seed=seed, batch_size=32) for seed in range(2)]
    found = match_activations(row.model, moved, batches, row.spec)
    # Experts are fused into one tensor, where no linear map shows them: their weights finish what is left.
    experts = {axis for axis in row.spec.symmetric_axes if axis.split(".")[0] in ("experts", "neurons")}
    assert set(found.metadata["unmatched"]) == (experts if row.family == "mixtral" else set())
    if found.metadata["unmatched"]:
        rest = row.spec.keep(*found.metadata["unmatched"])
        by_weights = match_weights(
            Parameters.from_state_dict(rest, row.model.state_dict()),
            Parameters.from_state_dict(rest, found.apply(moved.state_dict())),
        )
        found = found.then(by_weights)
    moved.load_state_dict(found.apply(moved.state_dict()))
    if (row.family, row.head) not in WITH_RELU:
        assert_equal(moved.state_dict(), row.model.state_dict())
    for batch in batches:
        assert relative_change(read_by_maps(row.model, batch), read_by_maps(moved, batch)) <= RELATIVE_CHANGE


def read_by_maps(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What every linear map and convolution reads."""
    read: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, arguments, name=name: read.__setitem__(name, arguments[0]))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | Conv1D)
    ]
    outputs(model, inputs)
    for handle in handles:
        handle.remove()
    return read


def moved_alone(row: Row) -> Iterator[tuple[str, str, Tensor]]:
    """Each tensor moved along each of its symmetric axes while all others stay: (tensor, axis, moved).

    The tensors below the head are those of every row of a family; one row of it shows them.
    """
    state = row.model.state_dict()
    shows_all = row.head == HEADS[row.family][-1]
    binding = row.spec.bind(shapes(state))
    for axis, transform in row.random(10).transforms.items():
        alone = Alignment(row.spec, {axis: transform})
        for name, bound in binding.tensors.items():
            below_head = name.startswith(row.spec.prefix) or row.head == "base"
            if axis in {use.axis for use in bound.spec.axes} and (shows_all or not below_head):
                moved = alone.read_aligned(name, binding, state.__getitem__)
                if not torch.equal(moved, state[name]):
                    yield name, axis, moved


def test_no_declaration_could_be_wrong_unseen(row: Row):
    """A tensor that does not follow a transform changes the outputs, so a wrong declaration fails the test above."""
    inputs = tiny_inputs(row.model)
    before = outputs(row.model, inputs)
    state = row.model.state_dict()
    unseen = set()
    for name, axis, moved in moved_alone(row):
        original = state[name].clone()
        state[name].copy_(moved)
        if relative_change(before, outputs(row.model, inputs)) < 1e3 * RELATIVE_CHANGE:
            unseen.add((name, axis))
        state[name].copy_(original)
    assert relative_change(before, outputs(row.model, inputs)) == 0
    assert {name for name, _ in unseen if not KEY_BIAS.search(name)} == set()


def test_an_alignment_file_carries_its_spec(row: Row, tmp_path: Path):
    alignment = row.random(3)
    alignment.save(tmp_path / "alignment.safetensors")
    alone = Alignment.load(tmp_path / "alignment.safetensors")
    assert alone.spec.to_dict() == row.spec.to_dict()
    for tensors in (row.on_disk, row.model.state_dict()):
        assert_equal(alone.apply(tensors), alignment.apply(tensors))
