"""Every merge method in a recipe: the checkpoint is mergekit's, parents are aligned first, the card says all."""

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
from hf_llfc.merging.methods import MERGE_METHODS
from hf_llfc.recipe import dump_recipe, load_recipe
from tests.runs import byte_llama, moved, saved, text_data, text_recipe
from tests.vocabularies import save, trained

TOLERANCE = 2e-6
"""Of the largest entry of a tensor: what mergekit's float32 is off by."""

RULES = [{"filter": "mlp", "value": 0.3}, {"filter": "self_attn", "value": [0.2, 0.9]}, {"value": 0.6}]

# Method, models beside the base, whether there is a base, parameters of every model, parameters of the merge.
RECIPES = [
    ("linear", "ab", False, {"weight": [0.3, 1.2]}, {}),
    ("linear", "abc", False, {"weight": 2.0}, {"normalize": False}),
    ("task_arithmetic", "ab", True, {"weight": 0.7}, {"lambda": 0.5}),
    ("slerp", "a", True, {}, {"t": RULES}),
    ("nuslerp", "ab", False, {"weight": 0.4}, {}),
    ("nuslerp", "ab", True, {"weight": 0.4}, {"nuslerp_flatten": False}),
    ("multislerp", "abc", False, {"weight": [0.2, 0.8]}, {}),
    ("karcher", "abc", False, {}, {"max_iter": 20}),
    ("nearswap", "a", True, {}, {"t": 0.01}),
    ("ties", "abc", True, {"weight": 0.5, "density": RULES}, {}),
    ("dare_linear", "ab", True, {"weight": 0.5, "density": 1.0}, {}),
    ("dare_ties", "ab", True, {"weight": 0.5, "density": 1.0}, {"lambda": 0.8}),
    ("breadcrumbs", "ab", True, {"weight": 0.5, "density": 0.8, "gamma": 0.05}, {}),
    ("breadcrumbs_ties", "ab", True, {"weight": [0.5, 1], "density": 0.8, "gamma": 0.05}, {}),
    ("della", "ab", True, {"weight": 0.5, "density": 1.0, "epsilon": 0.0}, {}),
    ("della_linear", "ab", True, {"weight": 0.5, "density": 1.0, "epsilon": 0.0}, {}),
    ("sce", "abc", True, {}, {"select_topk": 1.0}),
    ("model_stock", "abc", True, {}, {}),
    ("arcee_fusion", "a", True, {}, {}),
    ("ram", "ab", True, {}, {}),
    ("ramplus_tl", "ab", True, {}, {"r": 0.2}),
    ("passthrough", "a", False, {"scale": [{"filter": "o_proj", "value": 0.0}, {"value": 1.0}]}, {}),
]

# Runs many configurations in one process, with stable sorts: of equal elements the first are kept.
ORACLE = """
import json, sys, torch
from pathlib import Path
argsort, sort = torch.argsort, torch.sort
def stable_argsort(values, dim=-1, descending=False):
    return argsort(values, dim=dim, descending=descending, stable=True)
def stable_topk(values, k, largest=True):
    return tuple(each[:k] for each in sort(values, dim=-1, descending=True, stable=True))
torch.argsort = torch.Tensor.argsort = stable_argsort
torch.topk = stable_topk
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
folder = Path(sys.argv[1])
for number, config in enumerate(json.loads((folder / "configs.json").read_text())):
    config = MergeConfiguration.model_validate(config)
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(config, str(folder / str(number)), options=options)
"""


def shelf_in(folder: Path, dtype: torch.dtype) -> Path:
    """A base, three fine-tunes of it, and the second in other coordinates."""
    for seed, name in enumerate(("base", "a", "b", "c"), start=1):
        model = byte_llama(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.add_(0 * noise if name == "base" else 0.02 * noise)
        saved(model.to(dtype), folder / name)
    other = AutoModelForCausalLM.from_pretrained(folder / "b")
    saved(moved(other, 7), folder / "moved")
    return folder


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    return shelf_in(tmp_path, torch.bfloat16)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def config_of(shelf: Path, method: str, names: str, has_base: bool, of_model: dict, of_merge: dict) -> dict:
    """A recipe that is also a configuration of mergekit."""
    return {
        "merge_method": method,
        "models": [{"model": str(shelf / name), "parameters": of_model} for name in names],
        **({"base_model": str(shelf / "base")} if has_base else {}),
        "parameters": of_merge,
    }


def by_mergekit(configs: list[dict], folder: Path) -> list[dict[str, Tensor]]:
    """The oracle: mergekit on its own, on the same folders."""
    folder.mkdir()
    (folder / "configs.json").write_text(json.dumps(configs))
    subprocess.run([sys.executable, "-c", ORACLE, str(folder)], check=True, capture_output=True)
    return [tensors(folder / str(number)) for number in range(len(configs))]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory) -> tuple[Path, list[dict[str, Tensor]]]:
    pytest.importorskip("mergekit", reason="mergekit, the oracle for values, is not installed")
    folder = shelf_in(tmp_path_factory.mktemp("methods"), torch.float32)
    configs = [{**config_of(folder, *recipe), "dtype": "float32"} for recipe in RECIPES]
    return folder, by_mergekit(configs, folder / "oracle")


@pytest.mark.parametrize("number", range(len(RECIPES)), ids=[f"{n}-{r[0]}" for n, r in enumerate(RECIPES)])
def test_a_recipe_gives_the_checkpoint_of_mergekit(number, oracle, tmp_path):
    folder, expected = oracle[0], oracle[1][number]
    hf_llfc.run({**config_of(folder, *RECIPES[number]), "output_dir": str(tmp_path / "out")})
    found = tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        largest = tensor.abs().max().item()
        assert (found[name] - tensor).abs().max().item() <= TOLERANCE * largest, name


def test_every_method_of_mergekit_is_tried():
    registry = pytest.importorskip("mergekit.merge_methods.registry", reason="mergekit is not installed")
    assert {each.spec.name for each in registry.registered_methods()} == {recipe[0] for recipe in RECIPES}


@pytest.mark.parametrize("method", ["dare_ties", "della", "dare_linear"])
def test_what_is_drawn_at_random_is_the_same_whatever_works(method, shelf, monkeypatch):
    config = config_of(shelf, method, "ab", True, {"weight": 0.5, "density": 0.5}, {})
    for seed, threads in ((3, 1), (3, 2), (4, 1)):
        torch.set_num_threads(threads)
        hf_llfc.run({**config, "seed": seed, "output_dir": str(shelf / f"{seed}-{threads}")})
    torch.set_num_threads(1)
    files = {name: (shelf / name / "model.safetensors").read_bytes() for name in ("3-1", "3-2", "4-1")}
    assert files["3-1"] == files["3-2"] != files["4-1"]


def test_spectral_methods_merge_checkpoints(shelf):
    base, a, b = (tensors(shelf / name) for name in ("base", "a", "b"))
    name = "model.layers.0.mlp.up_proj.weight"
    for method in ("tsv_m", "iso_c", "iso_cts", "wudi", "ace"):
        recipe = config_of(shelf, method, "ab", True, {}, {})
        hf_llfc.run({**recipe, "out_dtype": "float32", "output_dir": str(shelf / method)})
        update = tensors(shelf / method)[name].double() - base[name].double()
        summed = a[name].double() + b[name].double() - 2 * base[name].double()
        cosine = torch.dot(update.flatten(), summed.flatten()) / (update.norm() * summed.norm())
        assert 0.5 < cosine <= 1, (method, cosine)
    update = tensors(shelf / "iso_c")[name].double() - base[name].double()
    values = torch.linalg.svdvals(update)
    torch.testing.assert_close(values, values.mean().expand_as(values), rtol=1e-4, atol=0)


def test_parents_are_aligned_first(shelf):
    of_model = {"weight": 0.5, "density": 0.5}
    for name in ("b", "moved"):
        config = config_of(shelf, "ties", "a", True, of_model, {})
        config["models"].append({"model": str(shelf / name), "parameters": of_model})
        align = {"method": "weight_matching"} if name == "moved" else {"method": "none"}
        hf_llfc.run({**config, "align": align, "output_dir": str(shelf / f"with-{name}")})
    found, expected = tensors(shelf / "with-moved"), tensors(shelf / "with-b")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert list((shelf / "with-moved" / "llfc").glob("alignment*.safetensors"))


def test_an_adapter_is_a_parent_of_every_method(shelf):
    import peft

    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(byte_llama(0), settings).save_pretrained(shelf / "lora")
    name = f"{shelf / 'base'}+{shelf / 'lora'}"
    hf_llfc.merge([name], merge_method="slerp", base_model=shelf / "base", parameters={"t": 1}, out=shelf / "out")
    hf_llfc.merge([name], out=shelf / "alone")
    found, expected = tensors(shelf / "out"), tensors(shelf / "alone")
    for key in expected:  # the end of the path
        assert torch.allclose(found[key].float(), expected[key].float(), rtol=2**-7, atol=1e-6), key


def test_the_card_says_how_the_weights_were_merged(shelf):
    recipe = text_recipe(shelf / "a", shelf / "b", text_data(shelf), shelf / "out")
    config = config_of(shelf, "dare_ties", "ab", True, {"weight": 0.5, "density": 0.5}, {"lambda": 0.9})
    result = hf_llfc.run({**recipe, **config, "seed": 5})
    card = (shelf / "out" / "README.md").read_text()
    method = MERGE_METHODS["dare_ties"]
    assert f"{method.title} with lambda 0.9, seed 5 ({method.paper})" in card and "weighted average" not in card
    assert [row.get("is_merge", False) for row in result.table] == [False, False, True]
    assert result.report is not None and result.report.region == "line"
    again = load_recipe(shelf / "out" / "llfc" / "recipe.yaml")
    assert again.models[0].parameters.settings == {"weight": 0.5, "density": 0.5}
    assert load_recipe(yaml.safe_load(dump_recipe(again))) == again


def test_the_command_line_takes_parameters(shelf, capsys):
    words = ["merge", str(shelf / "b"), "--merge-method", "slerp", "--base-model", str(shelf / "a")]
    assert main([*words, "--parameter", "t=0.3", "--out", str(shelf / "out"), "--quiet"]) == 0
    assert main([*words, "--parameter", "t=0.3", "--out", str(shelf / "plan"), "--dry-run"]) == 0
    assert "slerp of 1 models" in capsys.readouterr().out and not (shelf / "plan").exists()


def test_damage_is_named_and_nothing_is_written(shelf):
    state = tensors(shelf / "b")
    state["model.norm.weight"][3] = float("nan")
    from safetensors.torch import save_file

    save_file(state, shelf / "b" / "model.safetensors", metadata={"format": "pt"})
    config = config_of(shelf, "ties", "ab", True, {"weight": 0.5, "density": 0.5}, {})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight of .*b: 1 of 24 elements are NaN or infinite"):
        hf_llfc.run({**config, "output_dir": str(shelf / "out")})
    assert not (shelf / "out").exists()


@pytest.mark.parametrize("of_model", [{"weight": [{"filter": "no_such", "value": 1}, {"value": 0.5}], "density": 0.5}])
def test_a_filter_that_matches_nothing_is_an_error(shelf, of_model):
    config = config_of(shelf, "ties", "ab", True, of_model, {})
    with pytest.raises(RecipeError, match=r"a, parameters\.weight: the filter 'no_such' matches no tensor"):
        hf_llfc.run({**config, "output_dir": str(shelf / "out")})


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
    (expected,) = by_mergekit([config], tmp_path / "oracle")
    found = tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    ours = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "oracle" / "0").get_vocab()
    assert ours.keys() == theirs.keys()
    own, other = (torch.tensor([vocabulary[token] for token in sorted(ours)]) for vocabulary in (ours, theirs))
    for name, tensor in found.items():
        has_rows = name in ("model.embed_tokens.weight", "lm_head.weight")
        rows, wanted = (tensor[own], expected[name][other]) if has_rows else (tensor, expected[name])
        torch.testing.assert_close(rows, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"merge_method": "tise"}, "merge_method: unknown 'tise'; did you mean 'ties'"),
        ({"base_model": None}, "base_model: ties needs one"),
        ({"parameters": {"densty": 0.5}}, "parameters.densty: unknown key; did you mean 'density'"),
        ({"parameters": {"density": 1.5}}, "parameters.density: density must be at most 1, not 1.5"),
        ({"parameters": {"rescale": 2}}, "parameters.rescale: rescale must be true or false, not 2"),
        ({"parameters": {"density": "half"}}, "parameters.density: density must be a number, not 'half'"),
        ({"parameters": {"density": [{"filtr": "mlp", "value": 1}]}}, "parameters.density: pairs of `filter` and"),
        (
            {"models": [{"model": "a", "parameters": {"weight": 1, "normalize": True}}]},
            "models.0.parameters.normalize: is one of the whole merge; write it under `parameters`",
        ),
        ({"models": [{"model": "a"}]}, "models.0.parameters.weight: missing, and ties has no default for it"),
        ({"merge_method": "slerp", "models": [{"model": "a"}]}, "parameters.t: missing, and slerp has no default"),
        (
            {"merge_method": "slerp", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"t": 0.5}},
            "models: slerp takes 1 models beside the base; there are 2",
        ),
        (
            {"merge_method": "passthrough", "models": [{"model": "a"}]},
            "base_model: passthrough has no base, and takes 1 model; remove one of them",
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
