"""A merge written as an adapter, run by peft, is the merge of the folded models."""

import json
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_llfc
from hf_llfc.checkpoints import Checkpoint, load_model, open_checkpoint
from hf_llfc.cli import main
from hf_llfc.errors import CheckpointError, RecipeError
from hf_llfc.pipeline.planning import plan
from hf_llfc.publishing.record import RunRecord
from hf_llfc.recipe import load_recipe
from tests.checkpoints.views.test_adapted import edit_config, folded_by_peft, lora, trained
from tests.runs import byte_llama
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A Llama in float32."""
    byte_llama(0, attention_bias=True).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def two(base: Path, tmp_path: Path) -> list[Path]:
    """Two adapters of different weights, ranks and scales."""
    other = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"layers.1.mlp.up_proj": 2},
    }
    return [lora(base, tmp_path / "one", 1), lora(base, tmp_path / "two", 2, **other)]


def distance(found: dict[str, Tensor], expected: dict[str, Tensor], base: Path) -> float:
    """How far two models are from each other, as a share of how far one is from the base."""
    assert found.keys() == expected.keys()
    start = dict(open_checkpoint(base).state_dict())
    apart = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in found)
    size = sum(
        float((expected[name].double() - start[name].double()).square().sum())
        for name in found
        if name in start and start[name].shape == expected[name].shape
    )
    return (apart / size) ** 0.5


def dense(models: list[Path], folder: Path, **settings) -> dict[str, Tensor]:
    hf_llfc.merge(models, settings.pop("weights", None), out=folder, dtype="float32", **settings)
    return dict(open_checkpoint(folder).state_dict())


METHODS = [
    {"merge_method": "linear", "weights": [0.3, 0.7]},
    {"merge_method": "task_arithmetic", "weights": [0.7, -1.5], "parameters": {"lambda": 0.8}},
    {"merge_method": "ties", "parameters": {"density": 0.5, "weight": 0.5}},
    {"merge_method": "dare_linear", "parameters": {"density": 0.5, "weight": 0.5}},
    {"merge_method": "della", "parameters": {"density": 0.5, "weight": 0.5}},
    {"merge_method": "breadcrumbs", "parameters": {"density": 0.8, "weight": 0.5}},
    {"merge_method": "model_stock"},
    {"merge_method": "model_stock", "parameters": {"filter_wise": True}},
    {"merge_method": "nuslerp", "parameters": {"weight": 0.5}},
    {"merge_method": "multislerp", "parameters": {"weight": 0.5}},
    {"merge_method": "sce"},
    {"merge_method": "tsv_m"},
    {"merge_method": "iso_c"},
    {"merge_method": "karcher"},
]  # fmt: skip


@pytest.mark.parametrize("settings", METHODS, ids=lambda each: " ".join(map(str, each.values())))
def test_every_method_gives_what_it_gives_of_folded_models(settings, base, two, tmp_path):
    out = hf_llfc.merge(two, out=tmp_path / "out", save_as="adapter", **settings)
    needs = settings["merge_method"] not in ("linear", "karcher")
    expected = dense(two, tmp_path / "dense", **settings, base_model=base if needs else None)
    assert distance(folded_by_peft(base, tmp_path / "out"), expected, base) < 3e-6
    assert out.adapter.error < 1e-6 and not out.adapter.lost
    assert (tmp_path / "out" / "README.md").is_file()


def test_sums_keep_to_the_ranks_of_the_adapters_and_read_nothing_of_the_base(base, two, tmp_path, monkeypatch):
    def unread(self, name):
        raise AssertionError(name)

    for reading in ("read", "read_unrounded"):
        monkeypatch.setattr(Checkpoint, reading, unread)
    result = hf_llfc.merge(two, [0.5, 0.5], out=tmp_path / "out", save_as="adapter").adapter
    ranks = {row.name.removeprefix("model.layers."): row.rank for row in result.factors}
    assert ranks["0.self_attn.q_proj.weight"] == 7 and ranks["0.mlp.up_proj.weight"] == 3
    assert ranks["1.mlp.up_proj.weight"] == 2 and ranks["1.mlp.down_proj.weight"] == 4
    assert result.ways == {"subspace": len(ranks), "changes": 0, "weights": 0}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["rank_pattern"] == config["alpha_pattern"]


KINDS = {
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "biases": {"bias": "all"},
    "a bias of its own": {"lora_bias": True, "target_modules": ["q_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "a trained head": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "trained norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "trained tokens": {"trainable_token_indices": [3, 7]},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lora_comes_in_and_goes_out(kind, base, two, tmp_path):
    given = lora(base, tmp_path / "kind", 3, **KINDS[kind])
    out = tmp_path / "out"
    hf_llfc.merge([two[0], given], [0.4, 0.6], out=out, save_as="adapter")
    expected = dense([two[0], given], tmp_path / "dense", weights=[0.4, 0.6])
    assert distance(folded_by_peft(base, out), expected, base) < 3e-6
    assert (PeftModel, open_checkpoint(out).adapter.kind) == (PeftModel, "LORA")


@pytest.mark.parametrize("config", [
    peft.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False),
    peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False),
    peft.LNTuningConfig(target_modules=["input_layernorm"]),
    peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
], ids=lambda config: str(config.peft_type) + str(getattr(config, "init_lora_weights", "")))  # fmt: skip
def test_other_kinds_are_multiplied_out(config, base, two, tmp_path):
    given = trained(load_model(open_checkpoint(base)), config, tmp_path / "kind")
    edit_config(given, base_model_name_or_path=str(base))
    hf_llfc.merge([two[0], given], out=tmp_path / "out", save_as="adapter")
    expected = dense([two[0], given], tmp_path / "dense")
    assert distance(folded_by_peft(base, tmp_path / "out"), expected, base) < 1e-5


@pytest.mark.parametrize(("family", "head", "targets"), [
    ("bert", "sequence-classification", ["query", "dense"]),
    ("gpt2", "causal-lm", ["c_attn", "c_proj"]),
    ("vit", "image-classification", ["q_proj", "fc1", "projection"]),
    ("mixtral", "causal-lm", ["q_proj"]),
])  # fmt: skip
@pytest.mark.parametrize("method", ["linear", "ties", "model_stock"])
def test_layouts_of_other_families(family, head, targets, method, tmp_path):
    base = tmp_path / "base"
    tiny_model(family, head).save_pretrained(base)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if family == "mixtral" else None
    given = [
        trained(
            load_model(open_checkpoint(base)),
            peft.LoraConfig(r=rank, target_modules=targets, target_parameters=experts, init_lora_weights=False),
            tmp_path / f"adapter-{rank}",
            seed=rank,
        )
        for rank in (2, 3)
    ]
    for adapter in given:
        edit_config(adapter, base_model_name_or_path=str(base))
    settings = {"merge_method": method, **({"parameters": {"weight": 0.5, "density": 0.5}} if method == "ties" else {})}
    hf_llfc.merge(given, out=tmp_path / "out", save_as="adapter", **settings)
    expected = dense(given, tmp_path / "dense", **settings, base_model=None if method == "linear" else base)
    assert distance(folded_by_peft(base, tmp_path / "out"), expected, base) < 1e-5


def test_identity_negation_and_scale(base, two, tmp_path):
    zero = lora(base, tmp_path / "zero", 4, init_lora_weights=True)
    state = load_file(zero / "adapter_model.safetensors")
    save_file({name: torch.zeros_like(each) for name, each in state.items()}, zero / "adapter_model.safetensors")
    plain = dict(open_checkpoint(base).state_dict())

    def merged(models, weights):
        folder = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        hf_llfc.merge(models, weights, out=folder, save_as="adapter", merge_method="task_arithmetic")
        return folded_by_peft(base, folder)

    assert all(torch.equal(tensor, plain[name]) for name, tensor in merged([zero], [1.0]).items())
    one = folded_by_peft(base, two[0])
    for name, tensor in merged([two[0], two[0]], [1.0, -1.0]).items():
        assert torch.allclose(tensor, plain[name], atol=1e-7), name
    for weight in (-1.0, 2.0):
        for name, tensor in merged([two[0], zero], [weight, 1.0]).items():
            assert torch.allclose(tensor, plain[name] + weight * (one[name] - plain[name]), atol=1e-6), name


def test_a_rank_and_an_error_are_kept_to_and_the_error_is_told(base, two, tmp_path):
    plain = dict(open_checkpoint(base).state_dict())
    expected = dense(two, tmp_path / "dense")
    for number, asked in enumerate(({"rank": 2}, {"rank": "2"}, {"max_error": 0.3}, {"rank": 2, "dtype": "bfloat16"})):
        out = tmp_path / f"out-{number}"
        record = hf_llfc.merge(two, out=out, save_as="adapter", **asked).adapter
        folded = folded_by_peft(base, out)
        wrong = 0.0
        for row in record.factors:
            change = (expected[row.name] - plain[row.name]).double()
            error = float((folded[row.name].double() - expected[row.name].double()).norm())
            assert error / float(change.norm()) == pytest.approx(row.relative, rel=1e-2, abs=2e-6), row.name
            best = float(torch.linalg.svdvals(change)[row.rank :].norm() / change.norm())
            assert row.relative >= best - 1e-6 and ("dtype" in asked or row.relative <= best + 1e-6)
            assert row.rank <= 2 if "rank" in asked else row.relative <= 0.3
            wrong += error**2
        assert distance(folded, expected, base) == pytest.approx(record.error, rel=1e-2)
        assert RunRecord.load(out).adapter.error == record.error
    assert "relative error of the whole change" in (out / "README.md").read_text()
    assert load_file(out / "adapter_model.safetensors").popitem()[1].dtype is torch.bfloat16


def finetuned(base: Path, folder: Path, rank: int | None = None, also=()) -> Path:
    """A model whose linear maps moved, by changes of some rank, and with them what else is named."""
    model = load_model(open_checkpoint(base))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = parameter.shape
            if name.endswith("proj.weight"):
                change = torch.randn(shape, generator=generator)
                if rank is not None:
                    change = torch.randn(shape[0], rank, generator=generator) @ torch.randn(
                        rank, shape[1], generator=generator
                    )
                parameter.add_(0.02 * change)
            elif name in also:
                parameter.add_(0.02 * torch.randn(shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def test_extract_keeps_a_change_of_low_rank_and_all_that_changed_beside_it(base, tmp_path):
    also = ("model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "model.embed_tokens.weight")
    model = finetuned(base, tmp_path / "finetuned", 3, also)
    record = hf_llfc.extract(base, model, rank="auto", out=tmp_path / "out").adapter
    assert distance(folded_by_peft(base, tmp_path / "out"), dict(open_checkpoint(model).state_dict()), base) < 1e-5
    assert {row.rank for row in record.factors if "proj" in row.name} == {3} and not record.lost
    assert record.saved == ("model.norm", "model.layers.0.self_attn.q_proj.bias")
    run = PeftModel.from_pretrained(load_model(open_checkpoint(base)), tmp_path / "out")
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.allclose(run(tokens).logits, load_model(open_checkpoint(model))(tokens).logits, atol=1e-5)


def test_extract_is_the_best_of_its_rank_and_measures_what_it_lost(base, tmp_path, capsys):
    model, plain = finetuned(base, tmp_path / "finetuned"), dict(open_checkpoint(base).state_dict())
    assert main(["extract", str(base), str(model), "--rank", "4", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    record = RunRecord.load(tmp_path / "out").adapter
    assert (
        f"rank 4 (rank 4), float32; relative error of the whole change: {record.error:.2g}" in capsys.readouterr().out
    )
    squares = total = 0.0
    for name, tensor in open_checkpoint(model).state_dict():
        values = torch.linalg.svdvals((tensor - plain[name]).double()) if tensor.dim() == 2 else torch.zeros(1)
        squares, total = squares + float(values[4:].square().sum()), total + float(values.square().sum())
    assert record.error == pytest.approx((squares / total) ** 0.5, rel=1e-4)


def test_what_is_written_whole_is_counted_in_the_error(base, tmp_path):
    model = finetuned(base, tmp_path / "finetuned", 3, ("model.norm.weight", "model.layers.0.self_attn.q_proj.bias"))
    record = hf_llfc.extract(base, model, rank="auto", dtype="bfloat16", out=tmp_path / "out").adapter
    real = distance(folded_by_peft(base, tmp_path / "out"), dict(open_checkpoint(model).state_dict()), base)
    assert record.error == pytest.approx(real, rel=0.05) and record.error > 1e-3
    with pytest.raises(RecipeError, match="cannot be held in bfloat16"):
        hf_llfc.extract(base, model, max_error=1e-4, dtype="bfloat16", out=tmp_path / "no")


def test_what_an_adapter_cannot_hold_is_said(tmp_path):
    base = tmp_path / "base"
    byte_llama(0, tie_word_embeddings=True).save_pretrained(base)
    model = finetuned(base, tmp_path / "finetuned", 2, ("model.embed_tokens.weight",))
    record = hf_llfc.extract(base, model, rank="auto", out=tmp_path / "out").adapter
    assert "tied" in record.lost["model.embed_tokens.weight"] and record.error > 0.01
    assert "model.embed_tokens.weight" in (tmp_path / "out" / "README.md").read_text().replace("\\", "")
    for asked, message in (
        ({}, "--rank 32"),
        ({"rank": 0}, "a whole number above 0"),
        ({"rank": 2, "max_error": 0.1}, "stands beside a rank"),
        ({"rank": 2, "base_model": "other", "merge_method": "ties"}, "merge_method, base_model: an extraction has"),
        ({"rank": 2, "align": {"method": "weight_matching"}}, "align: is not possible with `save_as: adapter`"),
    ):
        with pytest.raises(RecipeError, match=message):
            hf_llfc.extract(base, model, out=tmp_path / "no", **asked)
    with pytest.raises(CheckpointError, match="changes nothing of"):
        hf_llfc.extract(base, base, rank=2, out=tmp_path / "no")
    with pytest.raises(RecipeError, match="is of an adapter; add `save_as: adapter`"):
        hf_llfc.merge([base, model], out=tmp_path / "no", rank=3)
    assert not (tmp_path / "no").exists()


def test_adapters_of_two_bases_and_sums_that_scale_the_base_are_refused(base, two, tmp_path):
    other = tmp_path / "other"
    byte_llama(1, attention_bias=True).save_pretrained(other)
    for models, weights, error, message in (
        (
            [two[0], lora(other, tmp_path / "of-other")],
            None,
            CheckpointError,
            "is an adapter of .*other, not of",
        ),
        ([base, base], None, CheckpointError, "none of the models is an adapter that names one"),
    ):
        with pytest.raises(error, match=message):
            hf_llfc.merge(models, weights, out=tmp_path / "no", save_as="adapter")
    with pytest.raises(RecipeError, match="fisher weighs single elements"):
        hf_llfc.merge(two, out=tmp_path / "no", save_as="adapter", merge_method="fisher")
    dora = lora(base, tmp_path / "dora", 3, use_dora=True)
    with pytest.raises(RecipeError, match=r"sum to 2, so that"):
        hf_llfc.merge([dora, dora], [1.0, 1.0], out=tmp_path / "no", save_as="adapter", parameters={"normalize": False})
    with pytest.raises(RecipeError, match=r"sum to 1\.5, so that a linear merge scales the base"):
        hf_llfc.merge(two, [1.0, 0.5], out=tmp_path / "no", save_as="adapter", parameters={"normalize": False})
    assert not (tmp_path / "no").exists()


def test_an_encoder_comes_out_with_its_norms_biases_and_head(tmp_path):
    base = tmp_path / "base"
    tiny_model("bert", "sequence-classification").save_pretrained(base)
    model = load_model(open_checkpoint(base))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "finetuned")
    record = hf_llfc.extract(base, tmp_path / "finetuned", rank="auto", out=tmp_path / "out").adapter
    expected = dict(open_checkpoint(tmp_path / "finetuned").state_dict())
    assert distance(folded_by_peft(base, tmp_path / "out"), expected, base) < 1e-5 and not record.lost


def test_a_plan_says_how_and_how_much_and_writes_nothing(base, two, tmp_path):
    recipe = {
        "models": [{"model": str(each)} for each in two],
        "output_dir": str(tmp_path / "out"),
        "save_as": "adapter",
    }
    steps = {}
    for method, parameters in (("linear", {}), ("ties", {"weight": 1.0}), ("karcher", {})):
        read = load_recipe({**recipe, "merge_method": method, "parameters": parameters})
        planned = plan(read, compare="none")
        steps[method] = {step["step"]: step["what"] for step in planned["steps"]}
        assert "prove" not in steps[method] and 0 < planned["cost"]["bytes_written"] < 100_000
    assert steps["linear"]["adapter"] == (
        "rank auto, 6 weights, merged in the subspace of their factors; no error but rounding"
    )
    assert "multiplied out one at a time" in steps["ties"]["adapter"]
    assert "over the weights of the base" in steps["karcher"]["adapter"]
    assert str(base) in steps["ties"]["read"] and not (tmp_path / "out").exists()
    hf_llfc.merge(two, out=tmp_path / "out", save_as="adapter")
    written = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert written <= planned["cost"]["bytes_written"] + 10_000
