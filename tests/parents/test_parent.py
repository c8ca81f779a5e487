"""Parents are read in the coordinates of the reference, as a whole and in parts."""

import pytest
import torch
from safetensors.torch import load_file

from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.checkpoints.writing.shards import ShardFiles, ShardLayout
from hf_llfc.merging import Merge, WeightSchedule, merge_streamed
from hf_llfc.parallel.workers import Workers
from hf_llfc.parents.parent import Parent
from hf_llfc.parents.specs import spec_of
from tests.runs import saved
from tests.tiny_models import TINY, tiny_model


@pytest.mark.parametrize(("family", "head"), TINY)
def test_a_moved_parent_is_merged_in_parts_as_it_is_as_a_whole(family, head, tmp_path, generator):
    checkpoint = open_checkpoint(saved(tiny_model(family, head), tmp_path / "model"))
    alignment = spec_of(checkpoint).random_alignment(generator)
    moved = Parent(checkpoint, alignment)
    infos = checkpoint.tensors
    schedules = [WeightSchedule.constant(weight) for weight in (0.3, 0.7)]
    merge = Merge.plan([Parent(checkpoint).source, moved.source], infos, schedules)
    (tmp_path / "out").mkdir()
    with ShardFiles(tmp_path / "out", ShardLayout.of(infos)).create() as files:
        merge_streamed(merge, files, workers=Workers(1))
    found = load_file(tmp_path / "out" / "model.safetensors")
    by_parts = [name for name in infos if moved.moved(name) is not None]
    assert by_parts and all(infos[name].shape == moved.read(name).shape for name in by_parts)
    for name, tensor in merge.tensors():
        assert torch.equal(found[name], tensor), name
