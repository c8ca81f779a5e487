"""The stages of a run one by one, with real models, data and one real process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_llfc.checkpoints import OutputFolder
from hf_llfc.errors import CheckpointError
from hf_llfc.foundation.progress import silent
from hf_llfc.parallel.processes import Processes
from hf_llfc.pipeline.flow import identify
from hf_llfc.pipeline.run_context import open_run
from hf_llfc.pipeline.stages import align_parents, find_broken, measure, score, write_merge
from hf_llfc.pipeline.weighting import Broken
from hf_llfc.recipe import load_recipe
from tests.runs import byte_llama, moved, saved, text_data


@pytest.fixture
def shelf(tmp_path):
    for seed, name in enumerate(("base", "a", "b")):
        saved(byte_llama(seed), tmp_path / name)
    saved(moved(byte_llama(1), 5), tmp_path / "moved")
    text_data(tmp_path)
    return tmp_path


@pytest.fixture
def opened(shelf):
    """Opens a run over the models that are named."""
    with Processes() as processes:

        def open_it(*names, **changes):
            models = [{"model": str(shelf / name), "parameters": {"weight": 0.5}} for name in names]
            recipe = load_recipe({"models": models, "output_dir": str(shelf / "out"), **changes})
            run = open_run(recipe, OutputFolder(recipe.output_dir), processes, silent)
            identify(run)
            return run

        yield open_it


def data(shelf, **more):
    return {"task": "text-generation", "dataset": str(shelf / "text.txt"), "tokenizer": "bytes", "alphas": 3, **more}


def test_nothing_is_aligned_without_a_method(opened):
    run = align_parents(opened("a", "b"))
    assert run.alignments == [None, None] and all(parent.alignment is None for parent in run.parents)


def test_a_moved_model_is_brought_back(opened):
    run = opened("a", "moved", align={"method": "weight_matching"})
    with run.staged() as run:
        run = align_parents(run)
        assert run.alignments[0] is None
        original, back = (parent.state_dict() for parent in run.parents)
        assert all(torch.equal(original[name], back[name]) for name in original)
        again = align_parents(replace(run, alignments=()))  # from the journal
        assert again.alignments[1].transforms == run.alignments[1].transforms
        assert "align" in run.output.journal.stages


def test_a_stage_is_found_once(opened):
    made = []

    def find():
        made.append(1)
        return 7

    with opened("a", "b").staged() as run:
        kept = {"save": lambda journal, value: (value, ()), "load": lambda journal, value: value}
        assert [run.stage("seven", find, **kept) for _ in range(2)] == [7, 7]
    assert made == [1]


def test_work_on_the_main_process_gets_the_run(opened):
    run = opened("a", "b")
    assert run.on_main(lambda given: given) is run
    with pytest.raises(CheckpointError, match="mine"):
        run.on_main(lambda given: (_ for _ in ()).throw(CheckpointError("mine")))


def test_a_merge_is_written_and_its_blocks_are_kept(opened, shelf):
    names = [name for name in load_file(shelf / "a" / "model.safetensors") if "layers.1." in name]
    with opened("a", "b").staged() as run:
        write_merge(run, Broken(("model.layers.1",), names))
        merged = load_file(run.staging / "model.safetensors")
    a, b = (load_file(shelf / name / "model.safetensors") for name in "ab")
    for name, tensor in merged.items():
        expected = a[name] if name in names else ((a[name].double() + b[name].double()) / 2).float()
        assert torch.equal(tensor, expected), name
    assert Path(shelf / "out" / "model.safetensors").is_file()  # moved into place at the end


def test_nothing_is_measured_without_data(opened):
    with opened("a", "b").staged() as run:
        write_merge(run)
        assert measure(run) is None and find_broken(run) is None
        assert [set(row) for row in score(run)] == [{"id"}, {"id"}]


def test_the_table_has_the_losses_of_parents_and_merge(opened, shelf):
    run = opened("a", "b", diagnose=data(shelf))
    with run.staged() as run:
        write_merge(run)
        report, table = measure(run), score(run)
    assert [row.get("is_merge", False) for row in table] == [False, False, True]
    # α is the weight of the first model: the ends of the path are the parents, its middle is the merge.
    at = {point.alpha: point.loss for point in report.path}
    assert [at[1.0], at[0.0], at[0.5]] == pytest.approx([row["loss"] for row in table], rel=1e-6)


def test_no_block_is_broken_between_a_model_and_itself(opened, shelf):
    changes = {"diagnose": data(shelf), "keep_where_broken": {"ratio": 0.5}}
    with opened("a", "a", **changes).staged() as run:
        broken = find_broken(run)
    assert broken is not None and not broken.blocks and not broken.tensors


def test_an_input_is_never_the_output(opened, shelf):
    with pytest.raises(CheckpointError, match="the output would replace its own input"):
        opened("a", "b", output_dir=str(shelf / "a"), overwrite=True)
