"""What is loaded for which command: seconds of a command line are what it imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_llfc
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.parents.specs import as_saved
from tests.runs import byte_llama, saved
from tests.tiny_models import TINY, tiny_model

HEAVY = {
    "torch", "transformers", "accelerate", "datasets", "evaluate", "huggingface_hub", "matplotlib", "numpy",
    "pandas", "rich", "safetensors", "scipy", "sklearn", "yaml",
}  # fmt: skip

NEEDED_BY_CONFIGS = {"torch", "transformers", "huggingface_hub", "numpy", "rich", "safetensors", "yaml"}

# What of torch and transformers runs, compiles and spreads models.
HEAVY_PARTS = {"torch._dynamo", "torch.distributed.tensor", "transformers.modeling_utils", "sympy"}


def loaded_by(*words: str) -> tuple[int, set[str]]:
    """Exit code of a command, and the modules of `HEAVY` and `HEAVY_PARTS` that it loads."""
    code = f"""
import sys
from hf_llfc.cli import main
try:
    code = main({list(words)!r})
except SystemExit as stop:
    code = stop.code
sys.stderr.write("\\n" + __import__("json").dumps([code, sorted({HEAVY | HEAVY_PARTS!r} & sys.modules.keys())]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    exit_code, modules = json.loads(done.stderr.splitlines()[-1])
    return exit_code, set(modules)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT and a Llama."""
    folder = tmp_path_factory.mktemp("shelf")
    saved(tiny_model("bert", "sequence-classification"), folder / "bert")
    saved(byte_llama(0), folder / "llama")
    return folder


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--help"], 0), (["merge", "--help"], 0), (["--version"], 0), (["mrege"], 2), (["merge", "a", "--wieghts"], 2)],
    ids=str,
)
def test_help_and_wrong_usage_load_nothing(words, code):
    assert loaded_by(*words) == (code, set())


def test_inspect_loads_what_configs_need(shelf):
    code, modules = loaded_by("inspect", str(shelf / "bert"))
    assert code == 0 and modules <= NEEDED_BY_CONFIGS
    # The config class of Llama loads parts of torch that run models; what runs data or measures is not among them.
    code, modules = loaded_by("inspect", str(shelf / "llama"))
    assert code == 0 and modules <= NEEDED_BY_CONFIGS | {"accelerate"} | HEAVY_PARTS - {"transformers.modeling_utils"}


def test_check_of_headers_loads_no_data_and_no_metrics(shelf):
    code, modules = loaded_by("check", str(shelf / "bert"), str(shelf / "bert"), "--level", "0")
    assert code == 0 and not modules & {"datasets", "evaluate", "matplotlib", "pandas", "sklearn"}


@pytest.mark.parametrize(("family", "head"), TINY)
def test_headers_alone_tell_what_the_model_class_tells(family, head, tmp_path):
    folder = saved(tiny_model(family, head), tmp_path / "model")
    found, full = as_saved(open_checkpoint(folder, as_stored=True)), open_checkpoint(folder)
    if found is not None:
        assert dict(found.tensors) == dict(full.tensors) and not full.unused
    # A base model is saved without the prefix that its tensors have beside a head.
    assert (found is None) == (head == "base")


@pytest.mark.parametrize("change", ["missing bias", "older name", "copy of a tied weight", "a tensor of no use"])
def test_other_names_are_for_the_model_class(change, tmp_path):
    tied = change == "copy of a tied weight"
    model = byte_llama(0, tie_word_embeddings=True) if tied else tiny_model("bert", "sequence-classification")
    folder = saved(model, tmp_path / "model")
    assert as_saved(open_checkpoint(folder, as_stored=True)) is not None
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if change == "missing bias":
        del tensors["bert.encoder.layer.1.attention.self.query.bias"]
    elif change == "older name":
        tensors["bert.embeddings.LayerNorm.gamma"] = tensors.pop("bert.embeddings.LayerNorm.weight")
    elif tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    else:
        tensors["bert.embeddings.position_ids"] = torch.arange(8)
    save_file(tensors, file, metadata={"format": "pt"})
    assert as_saved(open_checkpoint(folder, as_stored=True)) is None
    if change == "missing bias":
        with pytest.raises(hf_llfc.LLFCError, match=r"query\.bias .* is missing"):
            hf_llfc.inspect(folder)
    else:
        names = {row["tensor"] for row in hf_llfc.inspect(folder).tensors}
        assert names.isdisjoint({"bert.embeddings.LayerNorm.gamma", "lm_head.weight", "bert.embeddings.position_ids"})


def test_a_merge_of_weights_alone_loads_no_transformers(shelf, tmp_path):
    other = saved(byte_llama(1), tmp_path / "other")
    words = [str(shelf / "llama"), str(other), "--align", "none", "--out", str(tmp_path / "merged")]
    without = {"accelerate", "huggingface_hub", "numpy", "safetensors", "torch", "yaml"}
    code, modules = loaded_by("merge", *words)
    assert code == 0 and modules <= without
    recipe = {"models": [{"model": words[0]}], "output_dir": str(tmp_path / "sharded"), "max_shard_size": 20_000}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    code, modules = loaded_by("run", str(tmp_path / "recipe.yaml"))
    assert code == 0 and modules <= without
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == byte_llama(1).num_parameters()
    loaded = AutoModelForCausalLM.from_pretrained(shelf / "llama")
    loaded.save_pretrained(tmp_path / "theirs", max_shard_size=20_000)
    assert index == json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == config_of(shelf / "llama")
    assert open_checkpoint(tmp_path / "merged").config.to_dict() == open_checkpoint(shelf / "llama").config.to_dict()


@pytest.mark.parametrize(
    "change", [{"num_key_value_heads": None}, {"tie_word_embeddings": ...}, {"auto_map": {}}], ids=str
)
def test_what_a_config_leaves_open_is_for_its_class(change, tmp_path):
    folder = saved(byte_llama(0, num_key_value_heads=6), tmp_path / "model")
    assert as_saved(open_checkpoint(folder, as_stored=True)).settings.is_kept
    values = {key: value for key, value in (config_of(folder) | change).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    found = as_saved(open_checkpoint(folder, as_stored=True))
    assert not found.settings.is_kept and dict(found.tensors) == dict(open_checkpoint(folder).tensors)


@pytest.mark.parametrize("value", ["wide", -1, [8]], ids=str)
def test_a_config_that_no_class_can_read_is_refused_all_the_same(value, tmp_path):
    folder = saved(byte_llama(0), tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(config_of(folder) | {"hidden_size": value}))
    with pytest.raises(hf_llfc.LLFCError, match=r"config\.json|size"):
        as_saved(open_checkpoint(folder, as_stored=True))


def config_of(folder: Path) -> dict[str, object]:
    """What its config.json says."""
    return json.loads((folder / "config.json").read_text())
