"""Methods of mergekit run on aligned parents, and their result is finished like any other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_llfc
from hf_llfc.cli import main
from hf_llfc.errors import CheckpointError, RecipeError
from hf_llfc.merging.mergekit_methods import MERGEKIT_METHODS, SWITCHES
from hf_llfc.recipe import dump_recipe, load_recipe
from tests.runs import byte_llama, moved, saved, text_data, text_recipe
from tests.vocabularies import save, trained


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A base, two fine-tunes of it, and the second in other coordinates; in bfloat16."""
    base = byte_llama(0)
    for seed, name in enumerate(("base", "a", "b", "c"), start=1):
        model = byte_llama(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.add_(0 * noise if name == "base" else 0.02 * noise)
        saved(model.to(torch.bfloat16), tmp_path / name)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    saved(moved(other, 7), tmp_path / "moved")
    assert base.config.model_type == "llama"
    return tmp_path


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def by_mergekit_itself(config: dict, folder: Path, seed: int = 0) -> dict[str, Tensor]:
    """The oracle: mergekit on its own, on the same folders."""
    folder.mkdir()
    (folder / "m.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(folder / "m.yaml"), str(folder / "out")]
    subprocess.run([*command, "--random-seed", str(seed), "--quiet"], check=True, capture_output=True)
    return tensors(folder / "out")


def config_of(method: str, shelf: Path, names: list[str], **parameters) -> dict:
    """A recipe that is also a configuration of mergekit."""
    spec = MERGEKIT_METHODS[method]
    settings = {key: 0.5 for key in spec.required} | parameters
    per_model = {key: settings.pop(key) for key in list(settings) if key in spec.of_model}
    return {
        "merge_method": method,
        "models": [{"model": str(shelf / name), "parameters": per_model} for name in names],
        **({"base_model": str(shelf / "base")} if spec.base == "required" else {}),
        "parameters": settings,
    }


@pytest.mark.parametrize("method", MERGEKIT_METHODS)
def test_the_table_is_that_of_mergekit(method):
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    spec, ours = registry.get(method).spec, MERGEKIT_METHODS[method]
    assert ours.title == spec.pretty_name
    assert ours.of_merge == tuple(each.name for each in spec.shared_parameters)
    assert ours.of_model == tuple(each.name for each in spec.input_parameters)
    assert ours.required == tuple(each.name for each in spec.parameters if each.required)
    assert {each.name for each in spec.parameters if each.value_type is bool} <= set(SWITCHES)
    assert not {each.name for each in spec.parameters if each.value_type is not bool} & set(SWITCHES)
    assert ours.base == {"ignored": "none"}.get(spec.contract.base.value, spec.contract.base.value)
    assert ours.inputs[1] is None or ours.inputs[1] >= (spec.contract.max_inputs or 0)
    assert set(MERGEKIT_METHODS) == {each.spec.name for each in registry.registered_methods()} - {
        "linear",
        "task_arithmetic",
        "passthrough",
    }


@pytest.mark.parametrize(
    ("method", "names", "parameters"),
    [
        ("ties", ["a", "b"], {"density": 0.5}),
        pytest.param("dare_ties", ["a", "b"], {"density": 0.5}, marks=pytest.mark.slow),
        ("slerp", ["a"], {"t": [0.2, 0.6]}),
        pytest.param("model_stock", ["a", "b", "c"], {}, marks=pytest.mark.slow),
        pytest.param("breadcrumbs", ["a", "b"], {"density": 0.9, "gamma": 0.05}, marks=pytest.mark.slow),
        pytest.param("della", ["a", "b"], {"density": 0.5, "epsilon": 0.1}, marks=pytest.mark.slow),
        pytest.param("karcher", ["a", "b"], {}, marks=pytest.mark.slow),
    ],
)
def test_the_result_is_what_mergekit_alone_makes_of_the_folders(method, names, parameters, shelf):
    pytest.importorskip("mergekit")
    config = config_of(method, shelf, names, **parameters)
    hf_llfc.run({**config, "output_dir": str(shelf / "out"), "seed": 3})
    expected = by_mergekit_itself({**config, "dtype": "float32", "out_dtype": "bfloat16"}, shelf / "oracle", seed=3)
    found = tensors(shelf / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert not list(shelf.glob(".out*"))


@pytest.mark.slow
@pytest.mark.parametrize("with_base", [False, True])
def test_the_union_of_vocabularies_has_the_rows_that_mergekit_gives_it(with_base, tmp_path):
    """Token by token: the ids of new tokens are mergekit's own, in no order that it promises."""
    pytest.importorskip("mergekit")
    names = ["a", "b", "c"] if with_base else ["a", "b"]
    for name in names:
        save(tmp_path / name, trained("BPE", name), "llama", "causal-lm", ord(name))
    config = {
        "merge_method": "task_arithmetic" if with_base else "linear",
        "models": [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in "ab"],
        **({"base_model": str(tmp_path / "c")} if with_base else {}),
        "tokenizer_source": "union",
        "dtype": "float32",
    }
    hf_llfc.run({**config, "output_dir": str(tmp_path / "out")})
    expected = by_mergekit_itself(config, tmp_path / "oracle")
    found = tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    ours = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "oracle" / "out").get_vocab()
    assert ours.keys() == theirs.keys()
    own, other = (torch.tensor([vocabulary[token] for token in sorted(ours)]) for vocabulary in (ours, theirs))
    for name, tensor in found.items():
        has_rows = name in ("model.embed_tokens.weight", "lm_head.weight")
        rows, wanted = (tensor[own], expected[name][other]) if has_rows else (tensor, expected[name])
        torch.testing.assert_close(rows, wanted, rtol=1e-6, atol=1e-7)


def test_parents_are_aligned_first(shelf):
    pytest.importorskip("mergekit")
    for name in ("b", "moved"):
        config = config_of("ties", shelf, ["a", name], density=0.5)
        align = {"method": "weight_matching"} if name == "moved" else {"method": "none"}
        hf_llfc.run({**config, "align": align, "output_dir": str(shelf / f"with-{name}")})
    found, expected = tensors(shelf / "with-moved"), tensors(shelf / "with-b")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (shelf / "with-moved" / "llfc").glob("alignment*.safetensors")


def test_an_adapter_is_a_parent_of_every_method(shelf):
    pytest.importorskip("mergekit")
    import peft

    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(byte_llama(0), settings).save_pretrained(shelf / "lora")
    name = f"{shelf / 'base'}+{shelf / 'lora'}"
    hf_llfc.merge([name], merge_method="slerp", base_model=shelf / "base", parameters={"t": 1}, out=shelf / "out")
    hf_llfc.merge([name], out=shelf / "alone")
    found, expected = tensors(shelf / "out"), tensors(shelf / "alone")
    for key in expected:  # the end of the path, but for mergekit's own float32
        assert torch.allclose(found[key].float(), expected[key].float(), rtol=2**-7, atol=1e-6), key


def test_the_evidence_says_what_computed_the_weights(shelf):
    pytest.importorskip("mergekit")
    from importlib.metadata import version

    config = config_of("ties", shelf, ["a", "b"], density=0.5)
    recipe = text_recipe(shelf / "a", shelf / "b", text_data(shelf), shelf / "out")
    result = hf_llfc.run({**recipe, **config})
    method = json.loads((shelf / "out" / "llfc" / "method.json").read_text())
    assert (method["title"], method["mergekit"], method["seed"]) == ("TIES", version("mergekit"), 0)
    card = (shelf / "out" / "README.md").read_text()
    assert f"TIES, computed by mergekit {version('mergekit')}" in card and "weighted average" not in card
    assert [row.get("is_merge", False) for row in result.table] == [False, False, True]
    assert result.report is not None and result.report.region == "line"
    again = load_recipe(shelf / "out" / "llfc" / "recipe.yaml")
    assert again.models[0].parameters.settings == {"weight": 0.5, "density": 0.5}
    assert load_recipe(yaml.safe_load(dump_recipe(again))) == again


def test_the_command_line_takes_parameters(shelf, capsys):
    pytest.importorskip("mergekit")
    words = ["merge", str(shelf / "b"), "--merge-method", "slerp", "--base-model", str(shelf / "a")]
    assert main([*words, "--parameter", "t=0.3", "--out", str(shelf / "out"), "--quiet"]) == 0
    assert main([*words, "--parameter", "t=0.3", "--out", str(shelf / "plan"), "--dry-run"]) == 0
    assert "by mergekit" in capsys.readouterr().out and not (shelf / "plan").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"merge_method": "tise"}, "merge_method: unknown 'tise'; did you mean 'ties'"),
        ({"base_model": None}, "base_model: ties needs one"),
        ({"parameters": {"densty": 0.5}}, "parameters.densty: unknown key; did you mean 'density'"),
        ({"parameters": {"density": 1.5}}, "parameters.density: a number from 0 to 1 is expected, found 1.5"),
        ({"parameters": {"rescale": 1}}, "parameters.rescale: true or false is expected, found 1"),
        ({"parameters": {"density": "half"}}, "parameters.density: a finite number, a list"),
        ({"parameters": {"density": [{"filtr": "mlp", "value": 1}]}}, "parameters.density: pairs of `filter` and"),
        (
            {"models": [{"model": "a", "parameters": {"weight": 1, "normalize": True}}]},
            "models.0.parameters.normalize: is one of the whole merge; write it under `parameters`",
        ),
        ({"models": [{"model": "a"}]}, "models.0.parameters.weight: missing, and ties has no default for it"),
        ({"merge_method": "slerp", "models": [{"model": "a"}]}, "parameters.t: missing, and slerp has no default"),
        (
            {"merge_method": "slerp", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"t": 0.5}},
            "models: slerp takes 2 models, the base included; there are 3",
        ),
        (
            {"merge_method": "karcher", "models": [{"model": "a"}, {"model": "b"}]},
            "base_model: has no meaning for karcher",
        ),
        ({"keep_where_broken": {"ratio": 0.5}}, "keep_where_broken: has a meaning for a linear merge"),
    ],
)
def test_what_a_method_does_not_take_is_refused_before_anything_is_opened(change, expected):
    recipe = {
        "merge_method": "ties",
        "models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 1}}],
        "base_model": "base",
        "output_dir": "out",
    }
    with pytest.raises(RecipeError) as caught:
        load_recipe({**recipe, **change})
    assert expected in str(caught.value)


def test_the_base_may_stand_among_the_models():
    models = [{"model": "base"}, {"model": "a"}]
    recipe = load_recipe(
        {"merge_method": "slerp", "models": models, "base_model": "base", "parameters": {"t": 0.5}, "output_dir": "o"}
    )
    assert [entry.model for entry in recipe.models] == ["a"]


def test_without_mergekit_one_message_says_what_to_install(shelf, monkeypatch):
    bare = shelf / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    monkeypatch.setenv("HF_LLFC_MERGEKIT", str(bare / "bin" / "python"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    recipe = {**config_of("ties", shelf, ["a", "b"]), "output_dir": str(shelf / "out")}
    with pytest.raises(CheckpointError, match=r"cannot import .*pip install 'hf-llfc\[mergekit\]'"):
        hf_llfc.run(recipe)
    monkeypatch.setenv("HF_LLFC_MERGEKIT", str(shelf / "gone"))
    with pytest.raises(CheckpointError, match=r"HF_LLFC_MERGEKIT is .*, which cannot be run"):
        hf_llfc.run(recipe)
    assert not (shelf / "out").exists() and not list(shelf.glob(".out*"))
