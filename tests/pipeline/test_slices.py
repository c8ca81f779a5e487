"""Slices, modules and documents: the checkpoint is mergekit's, the config follows, and what cannot be is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import hf_llfc
from hf_llfc.cli import main
from hf_llfc.errors import CheckpointError, LLFCError
from hf_llfc.pipeline.planning import plan
from hf_llfc.recipe import load_recipe
from tests.pipeline.test_methods import TOLERANCE, by_mergekit, tensors
from tests.runs import byte_llama, moved, saved, text_data, text_recipe, written

LAYERS = 4
NAMES = ("base", "a", "b", "c")


def shelf_in(folder: Path) -> Path:
    """Four models of four layers."""
    for seed, name in enumerate(NAMES):
        model = byte_llama(0, num_hidden_layers=LAYERS)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.add_(0.05 * noise)
        saved(model, folder / name)
    return folder


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    return shelf_in(tmp_path_factory.mktemp("slices"))


def at(shelf: Path, value):
    """A recipe with the folders of its models."""
    if isinstance(value, dict):
        return {
            key: str(shelf / each) if key in ("model", "base_model") and each in NAMES else at(shelf, each)
            for key, each in value.items()
        }
    return [at(shelf, each) for each in value] if isinstance(value, list) else value


def source(model: str, first: int, end: int, **parameters) -> dict:
    return {"model": model, "layer_range": [first, end], **({"parameters": parameters} if parameters else {})}


GRADIENTS = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]
WITHOUT_OUTPUT = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]

# Each is also a configuration of mergekit; "gradient-slerp", "44-layer", "linear" and "ties" are its own examples.
RECIPES = {
    "gradient-slerp": {
        "slices": [{"sources": [source("a", 0, 4), source("b", 0, 4)]}],
        "merge_method": "slerp",
        "base_model": "a",
        "parameters": {"t": GRADIENTS},
    },
    "44-layer": {
        "slices": [{"sources": [source("a", 0, 3)]}, {"sources": [source("b", 1, 4)]}],
        "merge_method": "passthrough",
    },
    "linear": {
        "models": [
            {"model": name, "parameters": {"weight": weight}} for name, weight in (("a", 1.0), ("b", 0.3), ("c", 0.5))
        ],
        "merge_method": "linear",
    },
    "ties": {
        "models": [
            {"model": "a", "parameters": {"density": [1, 0.7, 0.1], "weight": 1.0}},
            {"model": "b", "parameters": {"density": 0.5, "weight": [0, 0.3, 0.7, 1]}},
            {
                "model": "c",
                "parameters": {"density": 0.33, "weight": [{"filter": "mlp", "value": 0.5}, {"value": 0}]},
            },
        ],
        "merge_method": "ties",
        "base_model": "base",
        "parameters": {"normalize": True, "int8_mask": True},
    },
    "bio": {
        "models": [{"model": name, "parameters": {"density": 0.5, "weight": 0.5}} for name in ("a", "b")],
        "merge_method": "ties",
        "base_model": "base",
        "parameters": {"normalize": False, "int8_mask": True},
    },
    "scaled": {  # repeated layers that leave the residual stream as it is
        "slices": [
            {"sources": [source("a", 0, 2)]},
            {"sources": [source("a", 1, 3, scale=WITHOUT_OUTPUT)]},
            {"sources": [source("b", 2, 4)]},
        ],
        "merge_method": "passthrough",
    },
    "several": {  # layers at other places, several sources, gradients within each slice
        "slices": [
            {"sources": [source("a", 0, 2), source("b", 0, 2)]},
            {"sources": [source("a", 1, 4), source("c", 0, 3)], "parameters": {"t": [0.1, 0.9]}},
            {"sources": [source("c", 3, 4), source("a", 3, 4)]},
        ],
        "merge_method": "slerp",
        "base_model": "a",
        "parameters": {"t": [{"filter": "mlp", "value": [0.2, 0.6]}, {"filter": "norm", "value": 0.3}, {"value": 0.5}]},
    },
    "weights": {  # a weight by filter of a source's own layer, what it leaves open from the slice and the recipe
        "slices": [
            {
                "sources": [
                    source("a", 0, 2, weight=[{"filter": "layers.1.", "value": 0.9}]),
                    source("b", 1, 3, weight=[{"filter": "layers.1.", "value": 0.2}]),
                ],
                "parameters": {"weight": [{"filter": "mlp", "value": 0.7}]},
            },
            {"sources": [source("b", 2, 4), source("c", 2, 4, weight=[0.1, 0.8])]},
        ],
        "merge_method": "multislerp",
        "parameters": {"weight": 0.4},
    },
    "bases": {  # a base of its own
        "slices": [
            {"sources": [source("base", 0, 3), source("a", 0, 3), source("b", 0, 3)]},
            {"sources": [source("a", 1, 3), source("c", 2, 4)], "base_model": "c"},
        ],
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "parameters": {"weight": 0.6, "lambda": 0.5},
    },
    "module": {
        "modules": {"default": {"slices": [{"sources": [source("a", 0, 1)]}, {"sources": [source("b", 1, 4)]}]}},
        "merge_method": "passthrough",
    },
}


@pytest.fixture(scope="module")
def oracle(shelf) -> dict[str, dict[str, Tensor]]:
    pytest.importorskip("mergekit", reason="mergekit, the oracle for values, is not installed")
    configs = [{**at(shelf, recipe), "dtype": "float32"} for recipe in RECIPES.values()]
    return dict(zip(RECIPES, by_mergekit(configs, shelf / "oracle"), strict=True))


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= TOLERANCE * tensor.abs().max(), name


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_the_checkpoint_of_mergekit(name, shelf, oracle, tmp_path):
    hf_llfc.run({**at(shelf, RECIPES[name]), "output_dir": str(tmp_path / "out")})
    close(tensors(tmp_path / "out"), oracle[name])
    depth = AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers
    assert depth == 1 + max(int(each.split(".")[2]) for each in oracle[name] if "layers." in each)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def t5(seed: int) -> transformers.T5ForConditionalGeneration:
    """A random encoder and decoder."""
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=64, **sizes))


def stacked(shelf: Path, *slices: list[dict], **more) -> dict:
    return at(shelf, {"slices": [{"sources": each} for each in slices], "merge_method": "passthrough", **more})


def run(recipe: dict, out: Path) -> dict[str, Tensor]:
    hf_llfc.run({**recipe, "output_dir": str(out)})
    return tensors(out)


def test_modules_have_slices_of_their_own(tmp_path):
    """The encoder is stacked, the decoder merged whole; what no module names is that of the first model."""
    for seed, name in enumerate("ab"):
        saved(t5(seed), tmp_path / name)
    a, b = (tensors(tmp_path / name) for name in "ab")
    recipe = {
        "modules": {
            "encoder": {
                "slices": [
                    {"sources": [source(str(tmp_path / "a"), 1, 3)]},
                    {"sources": [source(str(tmp_path / "b"), 0, 2)]},
                ]
            },
            "decoder": {
                "models": [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in "ab"],
                "merge_method": "linear",
            },
        },
        "merge_method": "passthrough",
    }
    found = run(recipe, tmp_path / "out")
    own, rest = "encoder.block.{}.layer.1.DenseReluDense.wi.weight", "decoder.block.2.layer.2.DenseReluDense.wi.weight"
    for index, (model, at_index) in enumerate([(a, 1), (a, 2), (b, 0), (b, 1)]):
        assert torch.equal(found[own.format(index)], model[own.format(at_index)])
    # The table of positions is in the first layer alone, whichever layer that is.
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(found[table], a[table]) and not any("block.2" in name and "relative" in name for name in found)
    torch.testing.assert_close(found[rest], (a[rest] + b[rest]) / 2)
    assert torch.equal(found["shared.weight"], a["shared.weight"])
    assert torch.equal(found["encoder.final_layer_norm.weight"], b["encoder.final_layer_norm.weight"])
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.num_layers, config.num_decoder_layers) == (4, 3)
    _, info = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_every_slice_may_have_a_method_of_its_own(shelf, tmp_path):
    a, b, c = (tensors(shelf / name) for name in "abc")
    recipe = stacked(shelf, [source("a", 0, 1)], [source("b", 1, 3, weight=3), source("c", 0, 2, weight=1)])
    recipe["slices"][1]["merge_method"] = "linear"
    found = run(recipe, tmp_path / "out")
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(found[name.format(0)], a[name.format(0)])
    for index in (1, 2):
        expected = 0.75 * b[name.format(index)] + 0.25 * c[name.format(index - 1)]
        torch.testing.assert_close(found[name.format(index)], expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(found["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    torch.testing.assert_close(found["lm_head.weight"], 0.75 * b["lm_head.weight"] + 0.25 * c["lm_head.weight"])


# A model, and what its config says of the layers 0, 1, 2 of one and 1, 2, 3 of another one like it.
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
KINDS = ["sliding_attention", "full_attention"] * 2
CONFIGS = {
    "windows": (
        transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=2),
        {"layer_types": [("full", "sliding")[index > 1] + "_attention" for index in (0, 1, 2, 1, 2, 3)]},
    ),
    "no-windows": (transformers.Qwen2Config(**SIZES, max_window_layers=4), {"max_window_layers": 6}),
    "alternating": (
        transformers.Gemma3TextConfig(**SIZES, head_dim=4, sliding_window=8, layer_types=KINDS),
        {"layer_types": KINDS + KINDS[:2]},
    ),
    "rope": (
        transformers.SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1, 1], pad_token_id=0),
        {"no_rope_layers": [1, 0, 1, 0, 1, 1]},
    ),
    "pairs": (
        transformers.GPTNeoConfig(
            vocab_size=64, hidden_size=16, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]]
        ),
        {"num_layers": 6, "attention_layers": ["global", "local", "global", "local", "global", "local"]},
    ),
    "indices": (
        transformers.Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=8, head_dim=4, mlp_only_layers=[1]),
        {"mlp_only_layers": [1, 3]},
    ),
    "other-names": (
        transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=4, n_head=4, n_positions=32),
        {"n_layer": 6},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_follows(name, tmp_path):
    config, expected = CONFIGS[name]
    for seed, model in enumerate("ab"):
        torch.manual_seed(seed)
        saved(AutoModelForCausalLM.from_config(config), tmp_path / model)
    recipe = stacked(tmp_path, *([source(str(tmp_path / m), first, first + 3)] for m, first in (("a", 0), ("b", 1))))
    run(recipe, tmp_path / "out")
    found = AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    assert {key: found[key] for key in expected} == expected
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = (json.loads((tmp_path / each / "config.json").read_text()) for each in ("a", "out"))
    depth = {"num_hidden_layers", "num_layers", "n_layer", "layer_types", "attention_layers", "attention_types"}
    assert {key for key in {*before, *after} if before.get(key) != after.get(key)} <= {*depth, *expected}


def test_layers_of_models_of_other_depths(shelf, tmp_path):
    saved(byte_llama(5, num_hidden_layers=6), tmp_path / "deep")
    found = run(stacked(shelf, [source("a", 0, 2)], [source(str(tmp_path / "deep"), 3, 6)]), tmp_path / "out")
    deep = tensors(tmp_path / "deep")
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert all(torch.equal(found[name.format(2 + index)], deep[name.format(3 + index)]) for index in range(3))
    assert torch.equal(found["model.norm.weight"], deep["model.norm.weight"])


def test_one_range_is_a_model_of_those_layers(shelf, tmp_path):
    found = run(stacked(shelf, [source("a", 1, 3)]), tmp_path / "out")
    expected = tensors(shelf / "a")
    assert len({each.split(".")[2] for each in found if "layers." in each}) == 2
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], expected["model.layers.1.mlp.up_proj.weight"])
    again = load_recipe(tmp_path / "out" / "llfc" / "recipe.yaml")
    assert again.layer_range == (1, 3)


def test_whole_slices_are_one_merge_of_models(shelf, tmp_path):
    """Aligned, diagnosed and told as under `models`: they are opened as the same, and the recipe as run says so."""
    saved(moved(AutoModelForCausalLM.from_pretrained(shelf / "b"), 7), tmp_path / "moved")
    folders = (str(shelf / "a"), str(tmp_path / "moved"))
    align = {"method": "weight_matching", "restarts": 1, "max_sweeps": 3}
    slices = [{"sources": [source(folder, 0, LAYERS, weight=0.5) for folder in folders]}]
    models = [{"model": folder, "parameters": {"weight": 0.5}} for folder in folders]
    for name, given in (("slices", slices), ("models", models)):
        hf_llfc.run({name: given, "merge_method": "linear", "align": align, "output_dir": str(tmp_path / name)})
    files = [(tmp_path / each / "model.safetensors").read_bytes() for each in ("models", "slices")]
    texts = [(tmp_path / each / "llfc" / "recipe.yaml").read_text() for each in ("models", "slices")]
    recipes = [{**yaml.safe_load(text), "output_dir": ""} for text in texts]
    assert files[0] == files[1] and recipes[0] == recipes[1]


def test_what_is_stacked_can_be_aligned_and_diagnosed(shelf, tmp_path):
    """The sources at one place of all slices are a model of the result's shape, and may lie in other coordinates."""
    saved(moved(AutoModelForCausalLM.from_pretrained(shelf / "a"), 7), tmp_path / "moved")
    other = str(tmp_path / "moved")
    ranges = ((0, 2), (1, 4))
    recipe = text_recipe(shelf / "a", shelf / "b", text_data(tmp_path), tmp_path / "out", merge_method="linear")
    del recipe["models"]
    recipe["slices"] = [{"sources": [source(str(shelf / "a"), *each), source(other, *each)]} for each in ranges]
    result = hf_llfc.run(recipe)
    # Both columns are one function, so aligned they are one model.
    (alignment,) = result.alignments
    assert alignment["cosine_after"] > 0.9999 > alignment["cosine_before"]
    found, expected = tensors(tmp_path / "out"), tensors(shelf / "a")
    for index, own in enumerate((0, 1, 1, 2, 3)):
        name = "model.layers.{}.mlp.down_proj.weight"
        torch.testing.assert_close(found[name.format(index)], expected[name.format(own)], rtol=1e-5, atol=1e-6)
    assert [each.id for each in result.report.models] == ["a 0 to 1, a 1 to 3", "moved 0 to 1, moved 1 to 3"]
    assert result.report.data["stack"][1][0] == "layers 2 to 4"
    assert [row["id"] for row in result.table] == [str(shelf / "a"), other, str(tmp_path / "out")]


def test_a_stack_is_planned_and_told_of(shelf, tmp_path, capsys):
    recipe = stacked(shelf, [source("a", 0, 3)], [source("b", 1, 4, scale=WITHOUT_OUTPUT)])
    data = {"task": "text-generation", "dataset": str(text_data(tmp_path)), "tokenizer": "bytes", "max_length": 32}
    file = written({**recipe, "diagnose": data, "output_dir": str(tmp_path / "out")}, tmp_path)
    assert main(["run", str(file), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "layers 3 to 5" in shown and f"passthrough of {shelf / 'b'} 1 to 3" in shown
    assert not (tmp_path / "out").exists()
    result = hf_llfc.run(file)
    assert result.report is None and [row["id"] for row in result.table[:2]] == [str(shelf / "a"), str(shelf / "b")]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 3–5 | b 1–3 | Passthrough |" in card and "Features were not compared" in card
    assert "Nothing was measured" not in card and "layer_range: [1, 4]" in card


DOCUMENTS = [
    {
        "name": "second",
        "models": [{"model": "first", "parameters": {"weight": 0.5}}, {"model": "c", "parameters": {"weight": 0.5}}],
        "merge_method": "linear",
    },
    {
        "name": "first",
        "slices": [{"sources": [source("a", 0, 4), source("b", 0, 4)]}],
        "merge_method": "slerp",
        "base_model": "a",
        "parameters": {"t": GRADIENTS},
    },
    {
        "models": [{"model": "second", "parameters": {"weight": 0.7, "density": [1, 0.7, 0.1]}}],
        "merge_method": "ties",
        "base_model": "base",
    },
]


def documents(shelf: Path, folder: Path) -> Path:
    path = folder / "documents.yaml"
    path.write_text(yaml.safe_dump_all(at(shelf, DOCUMENTS)) + "---\n")
    return path


def test_documents_refer_to_each_other_as_in_mergekit(shelf, tmp_path):
    pytest.importorskip("mergekit", reason="mergekit, the oracle for values, is not installed")
    path = tmp_path / "oracle.yaml"
    path.write_text(yaml.safe_dump_all([{**each, "dtype": "float32"} for each in at(shelf, DOCUMENTS)]))
    words = ["--out-path", "expected", "-I", "inner", "--no-copy-tokenizer", "--no-write-model-card"]
    command = [sys.executable, "-m", "mergekit.scripts.multimerge", str(path), *words]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    hf_llfc.run(load_recipe(documents(shelf, tmp_path), [f"output_dir={tmp_path / 'out'}"]))
    close(tensors(tmp_path / "out"), tensors(tmp_path / "expected"))
    close(tensors(tmp_path / "out-documents" / "first"), tensors(tmp_path / "inner" / "first"))


def test_documents_are_made_once(shelf, tmp_path):
    file, out = documents(shelf, tmp_path), tmp_path / "out"
    recipe = load_recipe(file, [f"output_dir={out}"])
    steps = plan(recipe)["steps"]
    assert [step["what"] for step in steps if step["step"] == "document"] == ["first", "second", "the last one"]
    assert not out.exists()
    hf_llfc.run(recipe)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out-documents").rglob("model.safetensors")}
    assert len(made) == 2
    hf_llfc.run(load_recipe(file, [f"output_dir={out}", "overwrite=true", "models.0.parameters.weight=0.1"]))
    assert {path: path.stat().st_mtime_ns for path in made} == made
    # Another t makes the first anew, and what is made of it.
    hf_llfc.run(load_recipe(file, [f"output_dir={out}", "overwrite=true", "first.parameters.t=0.2"]))
    assert all(path.stat().st_mtime_ns != stamp for path, stamp in made.items())
    card = (out / "README.md").read_text()
    assert "| A | b (not on the Hub) | – | in second |" in card and "first (not" not in card and "name: second" in card
    again = load_recipe(out / "llfc" / "recipe.yaml")
    assert [each.document for each in again.earlier] == ["first", "second"] and again.overwrite


def test_a_document_that_cannot_be_made_is_refused_before_the_first_one(shelf, tmp_path):
    first = at(shelf, DOCUMENTS[1])
    last = {"models": [{"model": "first"}, {"model": str(saved(byte_llama(0), tmp_path / "shallow"))}]}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump_all([first, {**last, "output_dir": str(tmp_path / "out")}]))
    with pytest.raises(CheckpointError, match="num_hidden_layers in the config is 2, but in that of document first 4"):
        hf_llfc.run(file)
    assert not (tmp_path / "out-documents").exists()


def test_models_in_memory_give_layers(shelf, tmp_path):
    models = [AutoModelForCausalLM.from_pretrained(shelf / name) for name in "ab"]
    recipe = load_recipe(
        {**stacked(shelf, [source("a", 0, 2)], [source("b", 2, 4)]), "output_dir": str(tmp_path / "o")}
    )
    hf_llfc.run(recipe, models=models)
    found = load_file(tmp_path / "o" / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(found[name], models[1].state_dict()[name])


WRONG = {
    "range": (
        [[source("a", 0, 2)], [source("b", 1, 9)]],
        r"slices\[1\]\.sources\[0\]\.layer_range: \[1, 9\] goes beyond the 4",
    ),
    "only-range": ([[source("a", 0, 9)]], r"slices\[0\]\.sources\[0\]\.layer_range: \[0, 9\] goes beyond the 4 layers"),
    "filter": (
        [[source("a", 0, 2)], [source("b", 1, 3, scale=[{"filter": "oproj", "value": 0}, {"value": 1}])]],
        r"slices\[1\], scale: the filter 'oproj' matches no tensor and no axis",
    ),
    "width": (
        [[source("a", 0, 2)], [source("wide", 1, 3)]],
        r"slices\[1\]\.sources\[0\]: .*intermediate_size .* is 48",
    ),
    "kind": ([[source("a", 0, 2)], [source("bert", 1, 2)]], r"slices\[1\]\.sources\[0\]: .*has the model type bert"),
}


@pytest.mark.parametrize("name", WRONG)
def test_layers_that_cannot_be_taken_are_named_and_nothing_is_written(name, shelf, tmp_path):
    slices, expected = WRONG[name]
    saved(byte_llama(1, num_hidden_layers=LAYERS, intermediate_size=48), tmp_path / "wide")
    bert = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    saved(transformers.BertForMaskedLM(transformers.BertConfig(**bert, num_hidden_layers=2)), tmp_path / "bert")
    for each in (entry for sources in slices for entry in sources):
        if each["model"] in ("wide", "bert"):
            each["model"] = str(tmp_path / each["model"])
    with pytest.raises(LLFCError, match=expected):
        run(stacked(shelf, *slices), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_of_other_kinds_are_not_merged(tmp_path):
    config, _ = CONFIGS["alternating"]
    for seed, model in enumerate("ab"):
        torch.manual_seed(seed)
        saved(AutoModelForCausalLM.from_config(config), tmp_path / model)
    a, b = (str(tmp_path / name) for name in "ab")
    recipe = stacked(tmp_path, [source(a, 0, 2), source(b, 1, 3)], [source(a, 0, 1)], merge_method="linear")
    with pytest.raises(
        CheckpointError, match=r"slices\[0\]\.sources\[1\]\.layer_range: layer_types of these layers is"
    ):
        run(recipe, tmp_path / "out")


def test_a_model_of_several_modules_wants_them_named(tmp_path):
    folder = str(saved(t5(0), tmp_path / "a"))
    with pytest.raises(CheckpointError, match=r"slices\[0\]: .* has several modules \(decoder, encoder, shared\)"):
        run(stacked(tmp_path, [source(folder, 0, 3)]), tmp_path / "out")
    modules = {"encodr": {"slices": [{"sources": [source(folder, 0, 2)]}]}}
    with pytest.raises(CheckpointError, match=r"modules\.encodr: .* has no such module; did you mean 'encoder'"):
        run({"modules": modules, "merge_method": "passthrough"}, tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "key", "layer"),
    [
        (transformers.Glm4MoeConfig(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
         "num_nextn_predict_layers", "model.layers.3."),
        (transformers.Qwen3Config(), "mtp_num_hidden_layers", "mtp.layers.0."),
    ],
    ids=["glm4_moe", "mtp"],
)  # fmt: skip
def test_layers_that_predict_further_tokens_are_left_out_and_told_of(config, key, layer, tmp_path, caplog):
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8, "num_hidden_layers": 3}
    config.update({**sizes, "num_attention_heads": 2, "num_key_value_heads": 2, "layer_types": None, key: 1})
    for name in "ab":
        saved(AutoModelForCausalLM.from_config(type(config)(**config.to_dict())), tmp_path / name)
        whole = tensors(tmp_path / name)
        last = {each: tensor for each, tensor in whole.items() if each.startswith("model.layers.2.")}
        further = {each.replace("model.layers.2.", layer): tensor.clone() for each, tensor in last.items()}
        further[f"{layer}eh_proj.weight"] = torch.zeros(16, 32)
        save_file({**whole, **further}, tmp_path / name / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    found = run(stacked(tmp_path, [source("a", 0, 2)], [source("b", 1, 3)]), out)
    written = json.loads((out / "config.json").read_text())
    assert (written["num_hidden_layers"], written[key]) == (4, 0)
    assert {int(name.split(".")[2]) for name in found if "layers." in name} == {0, 1, 2, 3}
    assert not any("eh_proj" in name for name in found)
    assert sum("left out, since they were trained behind the last layer" in each for each in caplog.messages) == 2


def test_encoder_and_decoder_of_bart_have_slices_of_their_own(tmp_path):
    depths = {"encoder_layers": 3, "decoder_layers": 2, "max_position_embeddings": 32}
    sizes = {key: 2 for key in ("encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim")}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = transformers.BartConfig(vocab_size=64, d_model=8, decoder_ffn_dim=12, **depths, **sizes)
        saved(transformers.BartForConditionalGeneration(config), tmp_path / name)
    a, b = (tensors(tmp_path / name) for name in "ab")
    encoder = stacked(tmp_path, [source("a", 0, 2)], [source("b", 1, 3)])["slices"]
    decoder = stacked(tmp_path, [source("a", 0, 2, weight=0.25), source("b", 0, 2, weight=0.75)])["slices"]
    modules = {"encoder": {"slices": encoder}, "decoder": {"slices": decoder, "merge_method": "linear"}}
    found = run({"modules": modules, "merge_method": "passthrough"}, tmp_path / "out")
    for name, tensor in found.items():
        place = {"encoder.layers.2": (b, "encoder.layers.1"), "encoder.layers.3": (b, "encoder.layers.2")}
        key = name[len("model.") : len("model.encoder.layers.0")]
        model, own = place.get(key, (a, key))
        expected = model[name.replace(key, own)]
        if ".decoder." in name:
            expected = 0.25 * a[name] + 0.75 * b[name]
        torch.testing.assert_close(tensor, expected)
    config = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "out").config
    assert (config.encoder_layers, config.decoder_layers) == (4, 2)
