"""A base with an adapter is what peft makes of the two, in float32, under the base's names."""

import json
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_llfc
from hf_llfc.checkpoints import Checkpoint, compare, load_model, open_checkpoint, state_dict_on_disk
from hf_llfc.checkpoints.views import folding as folding_module
from hf_llfc.errors import CheckpointError
from hf_llfc.foundation.model_names import split_adapter
from hf_llfc.recipe import load_recipe
from tests.checkpoints.conftest import save_tokenizer
from tests.parents.test_what_fits import QWEN_VL, model
from tests.runs import byte_llama
from tests.tiny_models import tiny_model

LINEAR = ["q_proj", "down_proj"]

KINDS = {
    "LoRA": peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, init_lora_weights=False),
    "LoRA of every linear layer": peft.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, rank_pattern={"layers.1.mlp.up_proj": 2}
    ),
    "rsLoRA": peft.LoraConfig(r=4, use_rslora=True, target_modules=LINEAR, init_lora_weights=False),
    "DoRA": peft.LoraConfig(r=4, use_dora=True, target_modules=LINEAR, init_lora_weights=False),
    "LoRA with biases": peft.LoraConfig(r=4, bias="all", target_modules=LINEAR, init_lora_weights=False),
    "LoRA of embeddings": peft.LoraConfig(r=4, target_modules=["embed_tokens", "v_proj"], init_lora_weights=False),
    "LoRA with a trained head": peft.LoraConfig(
        r=4, target_modules=LINEAR, modules_to_save=["lm_head", "embed_tokens"], init_lora_weights=False
    ),
    "LoRA with trained tokens": peft.LoraConfig(
        r=4, target_modules=LINEAR, trainable_token_indices=[3, 7], init_lora_weights=False
    ),
    "PiSSA": peft.LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="pissa"),
    "OLoRA": peft.LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="olora"),
    "AdaLoRA": peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=LINEAR, init_lora_weights=False
    ),
    "IA3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "LoHa": peft.LoHaConfig(r=4, target_modules=LINEAR, init_weights=False),
    "LoKr": peft.LoKrConfig(r=4, target_modules=LINEAR, init_weights=False),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR, init_weights=False),
    "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=LINEAR, init_weights=False),
    "HRA": peft.HRAConfig(r=4, target_modules=LINEAR, init_weights=False),
    "VeRA": peft.VeraConfig(r=4, target_modules=["q_proj", "k_proj"], init_weights=False),
    "VeRA without its projections": peft.VeraConfig(
        r=4, target_modules=["q_proj", "k_proj"], init_weights=False, save_projection=False
    ),
    "FourierFT": peft.FourierFTConfig(n_frequency=10, target_modules=LINEAR, init_weights=False),
    "RandLoRA": peft.RandLoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_weights=False),
    "LayerNorm tuning": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "MiSS": peft.MissConfig(r=4, target_modules=["q_proj"], init_weights=False),
    "SHiRA": peft.ShiraConfig(r=4, target_modules=["q_proj"], init_weights=False),
    "VB-LoRA": peft.VBLoRAConfig(r=4, vector_length=4, num_vectors=16, target_modules=["q_proj"]),
    "C3A": peft.C3AConfig(block_size=8, target_modules=["q_proj"], init_weights=False),
    "OSF": peft.OSFConfig(target_modules=["q_proj"]),
}  # fmt: skip


def trained(model: torch.nn.Module, config: peft.PeftConfig, folder: Path, seed: int = 1) -> Path:
    """Saves an adapter of a model whose every number has moved, as training would move it."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


def folded_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    """The oracle: the whole base in float32, through peft's own functions, under the names on disk."""
    model = PeftModel.from_pretrained(load_model(open_checkpoint(base), dtype=torch.float32), adapter)
    return state_dict_on_disk(model.merge_and_unload(safe_merge=True))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A Llama in bfloat16."""
    folder = tmp_path / "base"
    byte_llama(0, attention_bias=True).to(torch.bfloat16).save_pretrained(folder)
    return folder


def lora(base: Path, folder: Path, seed: int = 1, **changes) -> Path:
    settings = {"r": 4, "target_modules": LINEAR, "init_lora_weights": False, **changes}
    trained(load_model(open_checkpoint(base)), peft.LoraConfig(**settings), folder, seed)
    edit_config(folder, base_model_name_or_path=str(base))
    return folder


def unrounded(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: checkpoint.read_unrounded(name) for name in checkpoint.tensors}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_folded_as_peft_folds_it(kind, base, tmp_path):
    adapter = trained(load_model(open_checkpoint(base)), KINDS[kind], tmp_path / "adapter")
    checkpoint, plain = open_checkpoint(f"{base}+{adapter}"), open_checkpoint(base)
    expected = folded_by_peft(base, adapter)
    found = unrounded(checkpoint)
    assert checkpoint.tensors == plain.tensors and found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].float(), tensor), name
        assert torch.equal(checkpoint.read(name), tensor.to(torch.bfloat16)), name
    changed = [name for name in expected if not torch.equal(expected[name], plain.read(name).float())]
    assert changed
    # What the adapter leaves alone is read where it lies.
    for name in expected:
        assert name not in changed or checkpoint.span(name) is None
    assert compare([plain, checkpoint]) == []


def test_only_what_is_asked_for_is_read_of_the_base(base, tmp_path, monkeypatch):
    adapter = lora(base, tmp_path / "adapter")
    read: list[str] = []
    of_base = Checkpoint.read_unrounded

    def reading(self, name):
        if not self.adapter:
            read.append(name)
        return of_base(self, name)

    monkeypatch.setattr(Checkpoint, "read_unrounded", reading)
    checkpoint = open_checkpoint(f"{base}+{adapter}")
    assert read == []
    checkpoint.read_unrounded("model.layers.1.mlp.down_proj.weight")
    assert read == ["model.layers.1.mlp.down_proj.weight"]
    spans = [name for name in checkpoint.tensors if checkpoint.span(name) is not None]
    assert len(spans) == len(checkpoint.tensors) - 6  # two weights a layer, and the bias of one of them


@pytest.mark.parametrize(("family", "head", "targets"), [
    ("bert", "sequence-classification", ["query", "dense"]),
    ("gpt2", "causal-lm", ["c_attn", "c_proj"]),
    ("vit", "image-classification", ["q_proj", "fc1"]),
    ("mixtral", "causal-lm", ["q_proj"]),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_names_are_those_on_disk(family, head, targets, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_model(family, head).save_pretrained(base)
    config = peft.LoraConfig(
        r=3,
        target_modules=targets,
        # Experts lie in one tensor in memory, and in one tensor each on disk.
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if family == "mixtral" else None,
        init_lora_weights=False,
    )
    trained(load_model(open_checkpoint(base)), config, adapter)
    checkpoint, expected = open_checkpoint(f"{base}+{adapter}"), folded_by_peft(base, adapter)
    assert list(checkpoint.tensors) == list(open_checkpoint(base).tensors)
    for _ in range(2):  # what was kept beside the first answer is not the second
        found = unrounded(checkpoint)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_merge_rounds_once(base, tmp_path):
    adapters = [lora(base, tmp_path / f"adapter-{seed}", seed) for seed in (1, 2)]
    hf_llfc.merge([f"{base}+{each}" for each in adapters], [0.3, 0.7], out=tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    one, two = (folded_by_peft(base, each) for each in adapters)
    rounded_twice = 0
    for name, tensor in merged.items():
        exact = 0.3 * one[name].double() + 0.7 * two[name].double()
        # Through float32 to odd, as of two roundings the first must not land on a tie of the second.
        assert torch.equal(tensor, hf_llfc_rounded(exact)), name
        parents = [each[name].to(torch.bfloat16).double() for each in (one, two)]
        rounded_twice += int((hf_llfc_rounded(0.3 * parents[0] + 0.7 * parents[1]) != tensor).sum())
    assert tensor.dtype == torch.bfloat16 and rounded_twice > 0
    recipe = load_recipe(tmp_path / "merged" / "llfc" / "recipe.yaml")
    named = [[Path(part).resolve() for part in entry.model.split("+")] for entry in recipe.models]
    assert named == [[Path(base).resolve(), Path(each).resolve()] for each in adapters]


def hf_llfc_rounded(exact: Tensor) -> Tensor:
    """Float64 to bfloat16, to nearest, ties to even, with integers."""
    mantissa, exponent = torch.frexp(exact)
    return torch.ldexp(torch.round(mantissa * 256), exponent - 8).to(torch.bfloat16)


def test_a_single_parent_is_the_adapter_folded_and_rounded(base, tmp_path):
    adapter = lora(base, tmp_path / "adapter")
    hf_llfc.merge([adapter], out=tmp_path / "merged")
    merged, expected = load_file(tmp_path / "merged" / "model.safetensors"), folded_by_peft(base, adapter)
    assert all(torch.equal(merged[name], expected[name].to(torch.bfloat16)) for name in expected)


def test_an_adapter_alone_names_its_base(base, tmp_path):
    adapter = lora(base, tmp_path / "adapter")
    alone, named = open_checkpoint(adapter), open_checkpoint(f"{base}+{adapter}")
    assert alone.pinned == named.pinned == f"{base}+{adapter}" and alone.fingerprint() == named.fingerprint()
    assert alone.adapter is not None and alone.adapter.kind == "LORA" and alone.adapter.base.id == str(base)
    edit_config(adapter, base_model_name_or_path=str(tmp_path / "gone"))
    refused(adapter, f"{tmp_path / 'gone'}", "there is no such folder", "BASE+ADAPTER")
    edit_config(adapter, base_model_name_or_path=None)
    refused(adapter, "names no base", f"BASE+{adapter}")


def test_base_and_adapter_on_the_hub_are_named_by_their_commits(hub, base, tmp_path):
    adapter = lora(base, tmp_path / "adapter")
    edit_config(adapter, base_model_name_or_path="someone/base")
    commits = [hub.add_repo("someone/base", base), hub.add_repo("someone/lora", adapter)]
    hub.commit("someone/lora", {"adapter_model.safetensors": None})
    local = open_checkpoint(f"{base}+{adapter}")
    for name in (f"someone/base+someone/lora@{commits[1]}", f"someone/lora@{commits[1]}"):
        checkpoint = open_checkpoint(name)
        assert checkpoint.pinned == f"someone/base@{commits[0]}+someone/lora@{commits[1]}"
        assert (checkpoint.id, checkpoint.revision) == ("someone/base+someone/lora", "+".join(commits))
        assert checkpoint.fingerprint() == local.fingerprint()
    hf_llfc.merge([f"someone/lora@{commits[1]}", "someone/base"], out=tmp_path / "merged")
    recipe = (tmp_path / "merged" / "llfc" / "recipe.yaml").read_text()
    assert f"model: someone/base@{commits[0]}+someone/lora@{commits[1]}" in recipe


def test_what_tells_a_run_from_another_holds_the_adapter(base, tmp_path):
    first, second = lora(base, tmp_path / "first", 1), lora(base, tmp_path / "second", 2)
    checkpoint = open_checkpoint(f"{base}+{first}")
    before = checkpoint.identity()
    shutil.copy(second / "adapter_model.safetensors", first)
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        checkpoint.refuse_changed()
    assert open_checkpoint(f"{base}+{first}").identity()["files"] != before["files"]
    edit_config(first, lora_alpha=1)
    alpha = open_checkpoint(f"{base}+{first}").identity()
    assert alpha["files"]["adapter_config.json"] != before["files"]["adapter_config.json"]


def test_the_tokenizer_is_that_of_the_adapter_if_it_has_one(base, tmp_path):
    save_tokenizer(base)
    (base / "chat_template.jinja").write_text("of the base")
    adapter = lora(base, tmp_path / "adapter")
    with_none = open_checkpoint(adapter)
    assert with_none.folder == base and all(path.parent == base for path in with_none.companion_files)
    save_tokenizer(adapter)
    with_own = open_checkpoint(adapter)
    files = {path.name: path.parent for path in with_own.companion_files}
    assert with_own.folder == files["tokenizer.json"] == adapter
    assert files["generation_config.json"] == base and "chat_template.jinja" not in files
    assert set(with_own.folders) == {base, adapter}
    with pytest.raises(CheckpointError, match="was not written by hf-llfc"):
        hf_llfc.merge([adapter], out=base, overwrite=True)
    hf_llfc.merge([base], out=tmp_path / "merged")
    with pytest.raises(CheckpointError, match="would replace its own input"):
        hf_llfc.merge([f"{tmp_path / 'merged'}+{adapter}"], out=tmp_path / "merged", overwrite=True)


def test_tied_weights_stay_tied_or_are_refused(tmp_path):
    base = tmp_path / "base"
    byte_llama(0, tie_word_embeddings=True).save_pretrained(base)
    for place, changes in enumerate([{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}]):
        adapter = lora(base, tmp_path / f"torn-{place}", **changes)
        refused(f"{base}+{adapter}", "the base ties lm_head.weight to model.embed_tokens.weight", "merge_and_unload")
    adapter = lora(base, tmp_path / "tokens", trainable_token_indices=[3, 7])
    checkpoint, expected = open_checkpoint(f"{base}+{adapter}"), folded_by_peft(base, adapter)
    assert checkpoint.tensors.keys() == expected.keys() and "lm_head.weight" not in expected
    assert torch.equal(checkpoint.read("model.embed_tokens.weight"), expected["model.embed_tokens.weight"])
    rows = expected["model.embed_tokens.weight"] != open_checkpoint(base).read("model.embed_tokens.weight")
    assert rows.any(dim=1).nonzero().flatten().tolist() == [3, 7]


def edit_config(adapter: Path, **changes) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(model: str | Path, *expected: str, **options) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model, **options)
    for part in expected:
        assert part in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    wide = tmp_path / "wide"
    byte_llama(0, hidden_size=48, num_hidden_layers=3).save_pretrained(wide)
    refused(f"{base}+{lora(wide, tmp_path / 'adapter')}", "is it of another base?", "size mismatch")
    deep = tmp_path / "deep"
    byte_llama(0, attention_bias=True, num_hidden_layers=3).save_pretrained(deep)
    adapter = lora(deep, tmp_path / "of-deep")
    refused(f"{base}+{adapter}", "the base has no place for base_model.model.model.layers.2")
    refused(f"{deep}+{lora(base, tmp_path / 'of-base')}", "the file lacks base_model.model.model.layers.2")
    bert = tmp_path / "bert"
    tiny_model("bert", "sequence-classification").save_pretrained(bert)
    refused(f"{bert}+{adapter}", "is it of another base?", "q_proj")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
        (peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PREFIX_TUNING"),
        (peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "P_TUNING"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_change_of_weights_is_refused(config, kind, base, tmp_path):
    adapter = trained(load_model(open_checkpoint(base)), config, tmp_path / "adapter")
    refused(f"{base}+{adapter}", f"of the kind {kind} does not change weights")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layer_replication": [[0, 2], [0, 2]]}, "repeats layers of its base"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "belongs to a model of Megatron"),
        ({"peft_type": "LORAX"}, "peft cannot read this adapter's config"),
        ({"peft_type": "XLORA"}, "XLORA"),
        ({"alora_invocation_tokens": [1, 2]}, "acts on what follows certain tokens only"),
    ],
)
def test_what_the_config_asks_for_and_cannot_be_folded_is_refused(changes, expected, base, tmp_path):
    adapter = lora(base, tmp_path / "adapter")
    edit_config(adapter, **changes)
    refused(f"{base}+{adapter}", expected, str(adapter))


def test_a_pickle_is_opened_where_it_is_allowed_and_never_run(base, tmp_path):
    adapter = lora(base, tmp_path / "adapter")
    expected = open_checkpoint(adapter).fingerprint()
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter, "the weights are pickled", "--allow-pickle")
    assert open_checkpoint(adapter, allow_pickle=True).fingerprint() == expected
    torch.save({"a": os.system}, adapter / "adapter_model.bin")
    refused(adapter, "could run code", allow_pickle=True)


def test_without_peft_one_message_says_what_to_install(base, tmp_path, monkeypatch):
    adapter = lora(base, tmp_path / "adapter")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    refused(f"{base}+{adapter}", "peft, which folds it into its base, is not installed", "pip install 'hf-llfc[peft]'")


def test_files_that_are_not_there_or_no_adapter_are_named(base, tmp_path):
    adapter = lora(base, tmp_path / "adapter")
    refused(f"{base}+{base}", f"{base}: there is no adapter_config.json")
    refused(f"{tmp_path}/gone+{adapter}", f"{tmp_path}/gone: there is no such folder")
    refused(f"{base}+{tmp_path}/gone", f"{tmp_path}/gone: there is no such folder")
    refused(f"{adapter}+{adapter}", "not into another adapter")
    edit_config(adapter, base_model_name_or_path=str(adapter))
    refused(str(adapter), f"{adapter}: an adapter can be folded into a model", "names it as its base")


@pytest.mark.parametrize("changes", [{"target_modules": r"(\w+\.?)+!"}, {"rank_pattern": {r"(\w+\.?)+!": 2}}])
def test_a_pattern_that_backtracks_without_end_is_one_error(base, tmp_path, monkeypatch, changes):
    adapter = lora(base, tmp_path / "adapter")
    edit_config(adapter, **changes)
    monkeypatch.setattr(folding_module, "_MATCHING_SECONDS", 2.0)
    refused(f"{base}+{adapter}", "patterns in adapter_config.json", r"does not end in 2 s (of (\w+\.?)+!)")


def test_patterns_that_end_are_matched(base, tmp_path):
    adapter = lora(base, tmp_path / "adapter", target_modules=r".*\.layers\.\d+\.(self_attn|mlp)\.(q_proj|up_proj)")
    found = open_checkpoint(f"{base}+{adapter}")
    changed = [name for name in found.tensors if found.span(name) is None]
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "up_proj"}
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter, "expected adapter_model.safetensors")


def test_a_quantised_base_of_the_config_is_refused_with_how_to_name_another(base, tmp_path):
    adapter = lora(base, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    shutil.copytree(base, tmp_path / "bits")
    (tmp_path / "bits" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "nf"}}))
    save_file({"lm_head.weight.absmax": torch.ones(2)}, tmp_path / "bits" / "model.safetensors")
    edit_config(adapter, base_model_name_or_path=str(tmp_path / "bits"))
    refused(adapter, "a quantised layer (nf)", "BASE+ADAPTER")
    assert open_checkpoint(f"{base}+{adapter}").adapter is not None


WRAPPED = {
    "torch.compile": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "DDP": "module.{}".format,
    "the adapter's own name": lambda name: name.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_names_of_a_wrapped_adapter_are_those_inside(wrapper, base, tmp_path):
    adapter = lora(base, tmp_path / "adapter")
    expected = open_checkpoint(f"{base}+{adapter}").fingerprint()
    tensors = load_file(adapter / "adapter_model.safetensors")
    changed = {WRAPPED[wrapper](name): tensor for name, tensor in tensors.items()}
    assert changed.keys() != tensors.keys()
    save_file(changed, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(f"{base}+{adapter}").fingerprint() == expected


def test_a_revision_beside_a_local_base_means_nothing(base, tmp_path):
    adapter = lora(base, tmp_path / "adapter")
    expected = open_checkpoint(adapter).fingerprint()
    edit_config(adapter, revision="main")
    assert open_checkpoint(adapter).fingerprint() == expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "targets", [["q_proj", "qkv"], ["model.layers.0.self_attn.q_proj"], r"^(?!.*visual).*(?:q_proj|v_proj)$"], ids=str
)
def test_an_adapter_of_an_older_layout_is_folded_into_the_same_modules(targets, tmp_path):
    model("Qwen2_5_VLForConditionalGeneration", 0, **QWEN_VL).save_pretrained(tmp_path / "base")
    own = [f"model.language_{path}" if path.startswith("model.") else path for path in targets]
    adapter = lora(
        tmp_path / "base", tmp_path / "adapter", r=2, target_modules=own if isinstance(targets, list) else targets
    )
    expected = open_checkpoint(adapter).fingerprint()
    old = {
        name.replace("model.model.language_model.", "model.model.").replace(
            "model.model.visual.", "model.visual."
        ): each
        for name, each in load_file(adapter / "adapter_model.safetensors").items()
    }
    save_file(old, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    edit_config(adapter, target_modules=targets)
    assert open_checkpoint(adapter).fingerprint() == expected != open_checkpoint(tmp_path / "base").fingerprint()


def test_two_names_around_a_plus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a+b", "c++", "base", "lora"):
        (tmp_path / name).mkdir()
    assert split_adapter("a+b") == ("a+b", None)
    assert split_adapter("c+++lora") == ("c++", "lora")
    assert split_adapter("base+c++") == ("base", "c++")
    assert split_adapter("org/base@main+org/lora@v1.0") == ("org/base@main", "org/lora@v1.0")
    assert split_adapter(f"{tmp_path}/c+++org/lora") == (f"{tmp_path}/c++", "org/lora")
    assert split_adapter("org/base") == ("org/base", None)
    assert split_adapter("/gone/c++/model") == ("/gone/c++/model", None)


def test_every_kind_that_is_folded_by_module_is_known_to_peft():
    assert {str(kind.value) for kind in peft.PeftType} >= folding_module._INDEPENDENT_KINDS
