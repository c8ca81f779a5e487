"""Writing: the files of save_pretrained byte for byte, in any order, one tensor at a time, or nothing."""

import json
import os
import shutil
import weakref

import pytest
import torch
import transformers
from safetensors import safe_open

from hf_llfc.checkpoints import OutputFolder, TensorInfo, load_model, open_checkpoint, write_checkpoint
from hf_llfc.checkpoints.companions import by_name
from hf_llfc.checkpoints.writing.writer import MAX_SHARD_SIZE
from hf_llfc.errors import CheckpointError
from tests.tiny_models import TINY, tiny_model

SHARD = 20_000


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder, checkpoint, tensors=None, **options):
    folder.mkdir()
    tensors = checkpoint.state_dict() if tensors is None else tensors
    write_checkpoint(
        folder,
        checkpoint.tensors,
        tensors,
        config=checkpoint.config,
        companions=by_name(checkpoint.companion_files),
        **options,
    )
    return folder


# Shards of experts differ: save_pretrained counts the slices of one tensor in memory as one, wherever they go.
@pytest.mark.parametrize(("family", "head"), [row for row in dict(TINY).items() if row[0] != "mixtral"])
@pytest.mark.parametrize("size", [SHARD, MAX_SHARD_SIZE], ids=["sharded", "single"])
def test_the_files_are_those_of_save_pretrained_byte_for_byte(tmp_path, family, head, size):
    tiny_model(family, head).save_pretrained(tmp_path / "first")
    model = transformers.AutoModel if head == "base" else getattr(transformers, type(tiny_model(family, head)).__name__)
    model.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "theirs", max_shard_size=size)
    checkpoint = open_checkpoint(tmp_path / "theirs")
    ours = contents(write(tmp_path / "ours", checkpoint, max_shard_size=size))
    theirs = contents(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert ours == theirs
    assert ("model.safetensors.index.json" in ours) == (size == SHARD)


@pytest.mark.parametrize(("family", "head"), [("mixtral", "causal-lm"), ("vit", "image-classification")])
def test_what_is_written_loads_with_strict_keys(tmp_path, family, head):
    model = tiny_model(family, head)
    model.save_pretrained(tmp_path / "parent", save_original_format=False)
    folder = write(tmp_path / "child", open_checkpoint(tmp_path / "parent"), max_shard_size=SHARD)
    loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_index_of_a_sharded_model_with_experts_is_whole(tmp_path):
    model = tiny_model("mixtral", "causal-lm")
    checkpoint = open_checkpoint(model)
    folder = write(tmp_path / "child", checkpoint, max_shard_size=SHARD)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": model.num_parameters(), "total_size": checkpoint.nbytes}
    assert index["weight_map"].keys() == checkpoint.tensors.keys()
    for name, shard in index["weight_map"].items():
        with safe_open(folder / shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert torch.equal(file.get_tensor(name), checkpoint.read(name))


def test_sharded_and_single_are_equal_whatever_the_order(save, tmp_path):
    checkpoint = open_checkpoint(save())
    backwards = list(checkpoint.state_dict())[::-1]
    single = open_checkpoint(write(tmp_path / "single", checkpoint))
    sharded = open_checkpoint(write(tmp_path / "sharded", checkpoint, backwards, max_shard_size=SHARD))
    assert single.fingerprint() == sharded.fingerprint() == checkpoint.fingerprint()
    assert (tmp_path / "sharded" / "model-00001-of-00003.safetensors").exists()


def test_tensors_may_be_of_any_layout_in_memory(tmp_path):
    checkpoint = open_checkpoint(tiny_model("gpt2", "base"))
    odd = ((name, tensor.T.contiguous().T if tensor.ndim == 2 else tensor) for name, tensor in checkpoint.state_dict())
    assert open_checkpoint(write(tmp_path / "x", checkpoint, odd)).fingerprint() == checkpoint.fingerprint()


def test_only_one_tensor_is_kept(tmp_path):
    checkpoint = open_checkpoint(tiny_model("bert", "base"))
    alive: list[weakref.ref] = []
    most = 0

    def stream():
        nonlocal most
        for name, tensor in checkpoint.state_dict():
            copy = tensor.clone()
            alive.append(weakref.ref(copy))
            most = max(most, sum(reference() is not None for reference in alive))
            yield name, copy
            del copy

    write(tmp_path / "x", checkpoint, stream())
    assert most <= 2  # the one that is being made, and the one that was written last


def test_the_config_says_the_dtype_of_what_was_written(save, tmp_path):
    checkpoint = open_checkpoint(save())
    infos = {name: TensorInfo(torch.bfloat16, info.shape) for name, info in checkpoint.tensors.items()}
    (tmp_path / "half").mkdir()
    tensors = ((name, tensor.bfloat16()) for name, tensor in checkpoint.state_dict())
    write_checkpoint(tmp_path / "half", infos, tensors, config=checkpoint.config)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert checkpoint.config.dtype == torch.float32
    assert load_model(open_checkpoint(tmp_path / "half")).dtype == torch.bfloat16


def test_companions_are_copied_and_nothing_else(save, tmp_path):
    folder = save("a", "gpt2", "causal-lm")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("README.md", "optimizer.pt", "other.safetensors", "train.py"):
        (folder / name).write_text("{}")
    checkpoint = open_checkpoint(folder)
    child = write(tmp_path / "child", checkpoint)
    found = {path.relative_to(child).as_posix() for path in child.rglob("*") if path.is_file()}
    assert found == {
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert transformers.AutoTokenizer.from_pretrained(child)("good film").input_ids == [4, 6]


def test_a_generation_config_without_a_file_is_written(save, tmp_path):
    model = tiny_model("gpt2", "causal-lm")
    model.generation_config.max_new_tokens = 7
    checkpoint = open_checkpoint(model)
    child = tmp_path / "child"
    child.mkdir()
    write_checkpoint(child, checkpoint.tensors, checkpoint.state_dict(), config=checkpoint.settings)
    assert transformers.GenerationConfig.from_pretrained(child).max_new_tokens == 7
    assert open_checkpoint(child).generation_config.max_new_tokens == 7


def test_a_model_type_that_transformers_does_not_know_is_written_as_it_was(tmp_path):
    model = tiny_model("bert", "base")
    model.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config |= {"model_type": "unheard-of", "architectures": ["UnheardOf"]}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path / "a")
    child = write(tmp_path / "b", checkpoint, max_shard_size=SHARD)
    written = json.loads((child / "config.json").read_text())
    assert {key: written[key] for key in ("model_type", "architectures", "hidden_size")} == {
        "model_type": "unheard-of",
        "architectures": ["UnheardOf"],
        "hidden_size": config["hidden_size"],
    }
    index = json.loads((child / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == model.num_parameters()
    assert open_checkpoint(child).fingerprint() == checkpoint.fingerprint()


def test_a_full_disk_is_seen_before_work(save, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(save())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    (tmp_path / "x").mkdir()
    with pytest.raises(CheckpointError, match=r"the weights take 0\.00 GB, and 0\.00 GB are free"):
        write_checkpoint(tmp_path / "x", checkpoint.tensors, iter(()), config=checkpoint.config)
    assert not list((tmp_path / "x").iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_disk_that_fills_up_meanwhile_is_one_error(save, tmp_path):
    checkpoint = open_checkpoint(save())
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="the checkpoint cannot be written"):
        write_checkpoint(tmp_path / "x", checkpoint.tensors, checkpoint.state_dict(), config=checkpoint.config)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tensors: tensors[1:], "never came"),
        (lambda tensors: [*tensors, tensors[0]], "comes twice"),
        (lambda tensors: [("new", torch.ones(1)), *tensors], "not announced"),
        (lambda tensors: [(tensors[0][0], tensors[0][1].half()), *tensors[1:]], "announced"),
        (lambda tensors: [(tensors[0][0], tensors[0][1][:1]), *tensors[1:]], "announced"),
    ],
)
def test_tensors_that_were_not_announced_are_a_mistake_of_ours(save, tmp_path, change, expected):
    checkpoint = open_checkpoint(save())
    with pytest.raises(AssertionError, match=expected):
        write(tmp_path / "x", checkpoint, change(list(checkpoint.state_dict())))


def test_an_error_while_tensors_come_leaves_nothing(save, tmp_path):
    checkpoint = open_checkpoint(save())

    def stream():
        yield next(checkpoint.state_dict())
        raise CheckpointError("parent b: tensor x holds NaN")

    with pytest.raises(CheckpointError, match="holds NaN"), OutputFolder(tmp_path / "out") as folder:
        write_checkpoint(folder, checkpoint.tensors, stream(), config=checkpoint.config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
