"""Checkpoints on the Hub: over real HTTP against the double, with only the needed files fetched, and from the cache."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from hf_llfc.checkpoints import compare, load_model, open_checkpoint
from hf_llfc.errors import CheckpointError
from tests.tiny_models import tiny_model

NAME = "someone/parent"
CODE = "import sys; from hf_llfc.checkpoints import open_checkpoint as o; print(o(sys.argv[1]).fingerprint())"


def refused(model, *expected, **options):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model, **options)
    assert str(caught.value).startswith(f"{model}")
    for part in expected:
        assert part in str(caught.value)


def downloads(hub) -> set[str]:
    """The files whose content was asked for at the Hub."""
    return {
        request.path.rpartition("/")[2]
        for request in hub.requests
        if request.method == "GET" and "/resolve/" in request.path
    }


def body_requests(hub) -> list[str]:
    """What was asked for at the storage host, where the large files lie."""
    return [request.path for request in hub.requests if request.on_storage_host]


@pytest.fixture(params=[5 * 10**9, 20_000], ids=["single", "sharded"])
def folder(request, save) -> Path:
    return save("local", max_shard_size=request.param)


def test_an_id_is_opened_checked_and_read(hub, folder):
    commit = hub.add_repo(NAME, folder)
    checkpoint, local = open_checkpoint(NAME), open_checkpoint(folder)
    assert (checkpoint.id, checkpoint.revision) == (NAME, commit)
    assert checkpoint.tensors == local.tensors
    assert compare([checkpoint, local]) == []
    assert {path.name for path in checkpoint.companion_files} == {"tokenizer.json", "tokenizer_config.json"}
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert not any((checkpoint.folder / shard).exists() for shard in shards)
    assert local.is_here and not checkpoint.is_here
    assert checkpoint.fingerprint() == local.fingerprint() and checkpoint.is_here
    assert {path.name for path in checkpoint.folder.glob("*.safetensors")} == shards
    assert torch.equal(load_model(checkpoint).classifier.weight, load_model(local).classifier.weight)


def test_only_what_is_needed_is_fetched(hub, folder):
    shards = {path.name for path in folder.glob("*.safetensors")}
    for name in (
        "pytorch_model.bin",
        "optimizer.pt",
        "README.md",
        "onnx/model.onnx",
        "model.fp16.safetensors",
        "a.gguf",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"0" * 1000)
    hub.add_repo(NAME, folder)
    open_checkpoint(NAME).fingerprint()
    index = {"model.safetensors.index.json"} if len(shards) > 1 else set()
    assert downloads(hub) == {"config.json", "tokenizer.json", "tokenizer_config.json"} | index | shards


def test_the_headers_of_large_files_are_fetched_without_the_files(hub, tmp_path):
    import transformers

    config = transformers.BertConfig(
        vocab_size=4000, hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    hub.add_repo(NAME, tmp_path)
    checkpoint = open_checkpoint(NAME)
    assert checkpoint.tensors == open_checkpoint(tmp_path).tensors
    assert not list(checkpoint.folder.glob("*.safetensors"))
    assert len(body_requests(hub)) == 1


def test_a_header_beyond_the_first_request_is_fetched_whole(hub, save, monkeypatch):
    from hf_llfc.checkpoints import hub as module

    monkeypatch.setattr(module, "_FIRST_REQUEST_BYTES", 100)
    folder = save()
    hub.add_repo(NAME, folder)
    assert open_checkpoint(NAME).tensors == open_checkpoint(folder).tensors
    assert len(body_requests(hub)) == 2


def test_no_token_goes_to_the_storage_host(hub, save):
    hub.add_repo(NAME, save())
    open_checkpoint(NAME, token=hub.token).fingerprint()
    assert body_requests(hub)
    assert not any(request.has_token for request in hub.requests if request.on_storage_host)


def test_a_second_reading_asks_for_no_file(hub, folder):
    hub.add_repo(NAME, folder)
    fingerprint = open_checkpoint(NAME).fingerprint()
    hub.requests.clear()
    assert open_checkpoint(NAME).fingerprint() == fingerprint
    assert downloads(hub) == set() and body_requests(hub) == []


def test_a_revision_is_resolved_once_and_stays(hub, save):
    first, second = save("first", seed=1), save("second", seed=2)
    old = hub.add_repo(NAME, first)
    checkpoint = open_checkpoint(f"{NAME}@main")
    new = hub.commit(NAME, second)
    assert (checkpoint.id, checkpoint.label, checkpoint.revision) == (NAME, f"{NAME}@main", old)
    assert checkpoint.fingerprint() == open_checkpoint(first).fingerprint()
    assert open_checkpoint(f"{NAME}@{old}").fingerprint() == checkpoint.fingerprint()
    assert open_checkpoint(f"{NAME}@refs/heads/main").revision == new
    latest = open_checkpoint(NAME)
    assert latest.revision == new and latest.fingerprint() == open_checkpoint(second).fingerprint()


def test_a_bin_file_on_the_hub_is_read(hub, save):
    from safetensors.torch import load_file

    folder = save()
    expected = open_checkpoint(folder).fingerprint()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hub.add_repo(NAME, folder)
    assert open_checkpoint(NAME, allow_pickle=True).fingerprint() == expected


def test_a_folder_goes_before_a_repository_of_that_name(hub, save, tmp_path, monkeypatch):
    hub.add_repo(NAME, save("remote", seed=1))
    (tmp_path / "someone").mkdir()
    shutil.move(save("local", seed=2), tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint(NAME)
    assert checkpoint.revision is None and not hub.requests


# -- refusals


def test_what_is_not_there_is_refused(hub, save):
    hub.add_repo(NAME, save())
    refused("someone/parrent", "neither a local folder nor a model on the Hub", "check the spelling")
    refused(f"{NAME}@v9", "no such revision", f"{hub.endpoint}/{NAME}/tree/main")
    refused(f"{NAME}@" + "0" * 40)
    refused("not a name", "neither a local folder nor a Hub id")
    refused("some--one/parent", "neither a local folder nor a Hub id")


def test_private_and_gated_models_need_a_login(hub, save):
    folder = save()
    hub.add_repo("other/private", folder, private=True)
    hub.add_repo("other/gated", folder, gated=True)
    refused("other/private", "if it is private log in with 'hf auth login'")
    refused("other/gated", "access to this model must be granted first", f"{hub.endpoint}/other/gated")
    token = hub.add_user("other")
    assert open_checkpoint("other/private", token=token).fingerprint() == open_checkpoint(folder).fingerprint()


def test_a_repository_without_config_or_weights_is_refused(hub, save):
    folder = save()
    (folder / "model.safetensors").unlink()
    hub.add_repo("someone/no-weights", folder)
    refused("someone/no-weights", "no weights found", "tokenizer.json")
    (folder / "config.json").unlink()
    hub.add_repo("someone/no-config", folder)
    refused("someone/no-config", "the repository has no config.json", "tokenizer.json")


def test_a_quantised_repository_is_refused_before_its_weights_are_asked_for(hub, save):
    folder = save()
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"bert.pooler.dense.qweight": torch.ones(2, dtype=torch.int32)}, folder / "model.safetensors")
    hub.add_repo(NAME, folder)
    refused(NAME, "bert.pooler.dense.qweight", "qzeros is missing")
    assert not any((Path(constants.HF_HUB_CACHE)).rglob("*.safetensors"))


def test_a_file_that_is_cut_off_is_refused_before_it_is_fetched(hub, save):
    folder = save()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    hub.add_repo(NAME, folder)
    refused(NAME, f"{NAME}/model.safetensors: the file is cut off: tensor classifier.weight needs")


def test_a_missing_tensor_is_found_before_the_weights_are_fetched(hub, save):
    folder = save()
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 44}
    (folder / "config.json").write_text(json.dumps(config))
    hub.add_repo(NAME, folder)
    refused(NAME, "but the config makes it [44, 24]")
    snapshots = Path(constants.HF_HUB_CACHE).glob("models--someone--parent/snapshots/*/*")
    assert "model.safetensors" not in {path.name for path in snapshots}


def test_an_index_that_points_out_of_the_repository_is_refused(hub, save):
    folder = save("a", max_shard_size=20_000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["classifier.bias"] = "../../secret.safetensors"
    path.write_text(json.dumps(index))
    hub.add_repo(NAME, folder)
    refused(NAME, "outside the checkpoint's folder")


def test_an_error_of_the_hub_is_one_message(hub, save):
    hub.add_repo(NAME, save())
    hub.fail("GET", r"/api/models/", status=403, times=100, message="no")
    refused(NAME, "the Hub refused")


def test_a_passing_failure_is_survived(hub, save):
    hub.add_repo(NAME, save())
    hub.fail("GET", r"model\.safetensors", status=503, times=1)
    assert open_checkpoint(NAME).fingerprint()


# -- without a connection


def test_offline_everything_comes_from_the_cache(hub, folder, monkeypatch):
    hub.add_repo(NAME, folder)
    expected = open_checkpoint(NAME)
    expected.fingerprint()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    checkpoint = open_checkpoint(NAME)
    assert checkpoint.fingerprint() == expected.fingerprint()
    assert (checkpoint.revision, checkpoint.tensors) == (expected.revision, expected.tensors)
    assert not hub.requests


@pytest.mark.slow
def test_offline_a_child_process_reads_the_cache(hub, save):
    hub.add_repo(NAME, save())
    expected = open_checkpoint(NAME).fingerprint()
    environment = hub.env | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", CODE, NAME], env=environment, cwd=root, capture_output=True, text=True, timeout=100
    )
    assert run.stdout.strip() == expected, run.stderr


def test_offline_what_is_not_in_the_cache_is_refused(hub, folder, monkeypatch):
    hub.add_repo(NAME, folder)
    hub.add_repo("someone/other", folder)
    open_checkpoint(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("someone/other", "not completely in the Hub's cache", "unset HF_HUB_OFFLINE")
    refused(NAME, "not completely in the Hub's cache", "unset HF_HUB_OFFLINE")


def test_offline_a_cache_filled_by_transformers_is_enough(hub, folder, monkeypatch):
    import transformers

    hub.add_repo(NAME, folder)
    transformers.AutoModelForSequenceClassification.from_pretrained(NAME)
    transformers.AutoTokenizer.from_pretrained(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_checkpoint(NAME).fingerprint() == open_checkpoint(folder).fingerprint()


def test_a_hub_that_cannot_be_reached_is_one_message(hub, save, monkeypatch):
    hub.add_repo(NAME, save())
    hub.fail("GET", r"/api/models/", drop=True, times=1000)
    hub.fail("HEAD", r"", drop=True, times=1000)
    refused(NAME, "the Hub cannot be reached")


def test_a_model_in_the_cache_survives_a_hub_that_is_down(hub, save):
    hub.add_repo(NAME, save())
    expected = open_checkpoint(NAME).fingerprint()
    hub.fail("GET", r"/api/models/", status=503, times=1000)
    assert open_checkpoint(NAME).fingerprint() == expected


def test_a_model_loaded_from_the_hub_is_opened_from_memory(hub, save):
    import transformers

    folder = save()
    hub.add_repo(NAME, folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(NAME)
    checkpoint = open_checkpoint(model)
    assert checkpoint.id == NAME
    assert {path.name for path in checkpoint.companion_files} == {"tokenizer.json", "tokenizer_config.json"}
    assert checkpoint.fingerprint() == open_checkpoint(tiny_model("bert", "sequence-classification")).fingerprint()
