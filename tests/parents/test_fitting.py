"""Whether checkpoints fit each other, and are as they should be."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.errors import AlignmentError, CheckpointError
from hf_llfc.parents.data import evaluate_parents, open_data
from hf_llfc.parents.fitting import comparable, in_groups, refuse_changed, refuse_incompatible, refuse_not_finite
from hf_llfc.parents.opening import open_models
from hf_llfc.parents.parent import Parent
from hf_llfc.recipe import AlignSection
from hf_llfc.recipe.data import EvaluationConfig
from tests.runs import byte_llama, saved, text_data


@pytest.fixture
def pair(tmp_path):
    return [open_checkpoint(saved(byte_llama(seed), tmp_path / name)) for seed, name in enumerate("ab")]


def test_models_that_fit_are_let_through(pair):
    refuse_incompatible(pair)
    assert comparable(pair, "own", aligned=True) is None
    assert comparable(pair, "first", aligned=False) is pair[0]
    with pytest.raises(AlignmentError, match="models under one head are not aligned"):
        comparable(pair, "first", aligned=True)


def test_every_reason_is_told(pair, tmp_path):
    wide = open_checkpoint(saved(byte_llama(0, intermediate_size=48), tmp_path / "wide"))
    with pytest.raises(CheckpointError, match=r"(?s)cannot be merged.*intermediate_size"):
        refuse_incompatible([*pair, wide])


def test_a_file_that_was_written_to_is_refused(pair, tmp_path):
    refuse_changed(pair)
    path = tmp_path / "b" / "model.safetensors"
    state = load_file(path)
    save_file({name: tensor + 1 for name, tensor in state.items()}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="b"):
        refuse_changed(pair)


def test_what_is_not_finite_is_named(tmp_path):
    model = byte_llama(0)
    with torch.no_grad():
        model.model.norm.weight[2] = float("inf")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight of .*NaN or infinite"):
        refuse_not_finite(open_checkpoint(saved(model, tmp_path / "bad")))


def test_all_groups_take_the_canonical_form(pair):
    assert in_groups(pair, AlignSection()) == pair
    grouped = in_groups(pair, AlignSection(groups="full"))
    assert all(checkpoint.canonical is not None for checkpoint in grouped)
    opened = open_models([checkpoint.folder for checkpoint in pair], align=AlignSection(groups="full"))
    assert opened.reference.canonical is not None and opened.tokenizer_source.canonical is None


def test_losses_are_those_of_the_model(pair, tmp_path):
    config = EvaluationConfig(
        task="text-generation", dataset=str(text_data(tmp_path)), tokenizer="bytes", max_length=32, batch_size=2
    )
    opened = open_data(config, pair[0])
    rows = evaluate_parents([Parent(checkpoint) for checkpoint in pair], opened)
    for row, seed in zip(rows, (0, 1), strict=True):
        model, total, count = byte_llama(seed), 0.0, 0
        for batch, _ in opened.batches():
            logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1].double()
            labels = batch["labels"][:, 1:]
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
            ).item()
            count += int((labels != -100).sum())
        assert row["loss"] == pytest.approx(total / count, rel=1e-5)
