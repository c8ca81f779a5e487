"""What is loaded for which command: seconds of a command line are what it imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_llfc
from hf_llfc.adapters import spec_for
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.checkpoints.files import LocalFiles
from hf_llfc.checkpoints.settings import Settings
from hf_llfc.parents.specs import MAY_BE_MISSING, _spec_as_said, as_saved, open_weights
from tests.runs import byte_llama, saved
from tests.tiny_models import TINY, tiny_model

HEAVY = {
    "torch", "transformers", "accelerate", "datasets", "evaluate", "huggingface_hub", "matplotlib", "numpy",
    "pandas", "rich", "safetensors", "scipy", "sklearn", "yaml",
}  # fmt: skip

# What describes a model by its config and headers.
NEEDED_BY_HEADERS = {"torch", "huggingface_hub", "numpy", "rich", "safetensors", "yaml"}

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


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_inspect_and_a_check_of_headers_load_no_transformers(shelf, name):
    for words in (["inspect", name], ["check", name, name, "--level", "0"]):
        code, modules = loaded_by(*[str(shelf / word) if word == name else word for word in words])
        assert code == 0 and modules <= NEEDED_BY_HEADERS, words


def config_of_type(model_type: str):
    """A config with more heads than key/value heads, and no two sizes alike."""
    small = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": 40}
    if model_type == "distilbert":
        small = {"dim": 48, "n_heads": 6, "n_layers": 2, "hidden_dim": 20, "vocab_size": 40}
    elif "bert" not in model_type:
        small |= {"num_key_value_heads": 2, "intermediate_size": 20}
    config = CONFIG_MAPPING[model_type](**small)
    config.architectures = ["AnyForSequenceClassification"]
    return config


@pytest.mark.parametrize("model_type", MAY_BE_MISSING)
def test_a_spec_without_the_config_class_is_that_of_the_class(model_type, tmp_path):
    """Also where the file leaves out what it may leave out; and what else it leaves out is for the class."""
    raw = json.loads(config_of_type(model_type).to_json_string(use_diff=False))
    for missing in [None, *sorted(raw)]:
        values = {key: value for key, value in raw.items() if key != missing and value is not None}
        if missing == "model_type":
            continue
        said = spec_as_said(values, tmp_path)
        try:
            config = CONFIG_MAPPING[model_type].from_dict(values)
        except StrictDataclassClassValidationError:  # what the class puts there does not go with the rest
            assert said is None
            continue
        assert said is None or said == spec_for(config), missing
        assert said is not None or missing not in (None, *MAY_BE_MISSING[model_type]), missing
    assert spec_as_said({**raw, "partial_rotary_factor": 0.5}, tmp_path) is None
    assert spec_as_said({**raw, "auto_map": {"AutoConfig": "mine.Config"}}, tmp_path) is None


def spec_as_said(values, folder):
    """What `config.json` alone says."""
    files = LocalFiles("model", folder)
    return _spec_as_said(Settings.of_file(files, values, trust_remote_code=False))


@pytest.mark.parametrize("change", ["head missing", "buffer too many", "classes of another number"])
def test_headers_that_the_class_would_refuse_are_refused(change, tmp_path, capsys):
    model = tiny_model("bert", "sequence-classification") if change.startswith("classes") else byte_llama(0)
    folder = saved(model, tmp_path / "model")
    light = open_weights(folder)
    assert light.model_class is None and dict(light.tensors) == dict(open_checkpoint(folder).tensors)
    tensors = load_file(folder / "model.safetensors")
    if change == "head missing":
        del tensors["lm_head.weight"]
    elif change == "buffer too many":
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    else:
        labels = {str(index): f"class {index}" for index in range(9)}
        (folder / "config.json").write_text(json.dumps(config_of(folder) | {"id2label": labels}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if change == "buffer too many":  # the class has no use for it, and says so
        assert open_weights(folder).model_class is not None
        return
    with pytest.raises(hf_llfc.LLFCError, match=r"lm_head\.weight|classifier"):
        open_weights(folder)


def test_the_first_line_comes_before_anything_is_loaded(shelf, tmp_path):
    code = """
import sys
from hf_llfc.cli import main
class Note:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "numpy", "yaml"):
            sys.stderr.write(f"loads {name}\\n")
sys.meta_path.insert(0, Note())
main(sys.argv[1:])
"""
    words = ["merge", str(shelf / "llama"), str(shelf / "llama"), "--out", str(tmp_path / "merged")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and lines[0] == f"hf-llfc: reading {words[1]}, {words[2]}"
    assert "loads torch" in lines and lines[-1] == "hf-llfc: merging"
    quiet = subprocess.run([sys.executable, "-m", "hf_llfc", *words, "--overwrite", "--quiet"], capture_output=True)
    assert (quiet.returncode, quiet.stderr) == (0, b"")


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
    over = ["--merge-method", "ties", "--base-model", words[0], "--weights", "1"]
    code, modules = loaded_by("merge", *words[1:-1], str(tmp_path / "over"), *over)
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
    values = {key: value for key, value in (config_of(folder) | change).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    found = as_saved(open_checkpoint(folder, as_stored=True))
    assert dict(found.tensors) == dict(open_checkpoint(folder).tensors)


@pytest.mark.parametrize("value", ["wide", -1, [8]], ids=str)
def test_a_config_that_no_class_can_read_is_refused_all_the_same(value, tmp_path):
    folder = saved(byte_llama(0), tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(config_of(folder) | {"hidden_size": value}))
    with pytest.raises(hf_llfc.LLFCError, match=r"config\.json|size"):
        as_saved(open_checkpoint(folder, as_stored=True))


def config_of(folder: Path) -> dict[str, object]:
    """What its config.json says."""
    return json.loads((folder / "config.json").read_text())
