"""Quantised models as parents: in every command, mixed with others, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, PreTrainedModel

from hf_llfc import diagnose
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.checkpoints.models import load_model
from hf_llfc.cli import main
from hf_llfc.errors import CheckpointError
from hf_llfc.merging import streaming
from hf_llfc.merging.combination import linear_combination
from tests.quantised_layers import KINDS, mxfp4_experts
from tests.runs import byte_llama, saved, text_data

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}


def quantised(
    folder: Path, kind: str, seed: int, is_layer: Callable[[str], bool] = lambda name: name.endswith("_proj")
) -> Path:
    """A small model in bfloat16 with some of its layers quantised."""
    saved(byte_llama(seed, **SIZES, dtype="bfloat16").to(torch.bfloat16), folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if is_layer(name.removesuffix(".weight"))]:
        stored, config, _ = KINDS[kind](tensors.pop(name).float(), name.removesuffix(".weight"))
        tensors |= {key: tensor.contiguous() for key, tensor in stored.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config=config)
    return folder


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture
def of_8_bits(tmp_path) -> Path:
    return quantised(tmp_path / "fp8", "FP8 of transformers", 0)


@pytest.fixture
def of_16_bits(tmp_path) -> Path:
    return saved(byte_llama(1, **SIZES, dtype="bfloat16").to(torch.bfloat16), tmp_path / "bf16")


def test_parents_of_different_precision_are_summed_unrounded(of_8_bits, of_16_bits, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "PART", 1000)  # so that a tensor takes several parts, cut within rows
    for name, models in (("first", (of_8_bits, of_16_bits)), ("second", (of_16_bits, of_8_bits))):
        run("merge", *models, "--weights", 0.3, 0.7, "--align", "none", "--out", tmp_path / name)
        wide = [open_checkpoint(model) for model in models]
        merged = weights_of(tmp_path / name)
        assert merged.keys() == wide[0].tensors.keys()
        for tensor, value in merged.items():
            unrounded = [each.read_unrounded(tensor) for each in wide]
            exact = linear_combination(unrounded, (0.3, 0.7), out_dtype=torch.bfloat16)
            assert value.dtype == torch.bfloat16 and torch.equal(value, exact), tensor
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert "quantization_config" not in config and config["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["NF4", "packed, 4 bits, zeros", "GPTQ, 4 bits", "AWQ", "NVFP4 of modelopt"])
@pytest.mark.parametrize("method", ["linear", "dare_linear"])
def test_kinds_merge_in_parts_as_they_do_whole(kind, method, of_8_bits, of_16_bits, tmp_path, monkeypatch):
    other = quantised(tmp_path / "other", kind, 2)
    recipe: dict[str, Any] = {"models": [{"model": str(model)} for model in (of_8_bits, other)], "merge_method": method}
    if method == "dare_linear":
        recipe |= {"base_model": str(of_16_bits), "parameters": {"density": 0.5, "weight": 0.5}}
    for name, part in (("whole", 1 << 20), ("parts", 1000)):
        monkeypatch.setattr(streaming, "PART", part)
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"output_dir": str(tmp_path / name)}))
        run("run", tmp_path / "recipe.yaml")
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_every_command_takes_them(of_8_bits, of_16_bits, tmp_path, capsys):
    assert main(["check", str(of_8_bits), str(of_16_bits)]) == 1  # they were trained apart
    run("align", of_8_bits, "--to", of_16_bits, "--out", tmp_path / "aligned")
    aligned = open_checkpoint(tmp_path / "aligned")
    assert aligned.quantised is None
    run("inspect", of_8_bits, "--verify")
    data = {"task": "text-generation", "dataset": str(text_data(tmp_path)), "tokenizer": "bytes", "samples": 4}
    report = diagnose(of_8_bits, of_16_bits, data, alphas=[0, 0.5, 1])
    assert len(report.layers) > 1


def test_the_model_is_that_which_the_library_loads(of_8_bits):
    ours = load_model(open_checkpoint(of_8_bits))
    theirs = AutoModelForCausalLM.from_pretrained(of_8_bits, dtype=torch.bfloat16)  # dequantises where no GPU is
    state = theirs.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())


def test_scales_may_lie_in_another_file(of_8_bits, of_16_bits, tmp_path):
    before = open_checkpoint(of_8_bits).fingerprint()
    tensors = weights_of(of_8_bits)
    parts = [{n: t for n, t in tensors.items() if n.endswith("_inv") == is_scale} for is_scale in (False, True)]
    (of_8_bits / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, of_8_bits / name, metadata={"format": "pt"})
    weight_map = {n: name for name, part in zip(names, parts, strict=True) for n in part}
    (of_8_bits / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert open_checkpoint(of_8_bits).fingerprint() == before
    path = of_8_bits / names[1]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="cut off"):
        open_checkpoint(of_8_bits)


def test_plan_record_and_card_say_from_what(of_8_bits, of_16_bits, tmp_path, capsys):
    words = ["merge", of_8_bits, of_16_bits, "--align", "none", "--out", tmp_path / "out"]
    run(*words, "--dry-run")
    said = "FP8, blocks of 16 × 32 (14 of 21 tensors)"
    assert said in capsys.readouterr().out
    run(*words)
    record = json.loads((tmp_path / "out" / "llfc" / "run.json").read_text())
    assert record["quantised"] == [f"./fp8: {said}"]
    assert f"**Quantised models.** ./fp8: {said}" in (tmp_path / "out" / "README.md").read_text()


def test_two_kinds_in_one_model(tmp_path, of_16_bits):
    mixed = quantised(tmp_path / "mixed", "FP8 of fbgemm", 0, lambda name: name.endswith("down_proj"))
    tensors = weights_of(mixed)
    name = "model.layers.0.mlp.up_proj"
    stored, config, _ = KINDS["packed, 4 bits"](tensors.pop(f"{name}.weight").float(), name)
    save_file({**tensors, **stored}, mixed / "model.safetensors", metadata={"format": "pt"})
    edit_config(mixed, quantization_config=config)
    assert open_checkpoint(mixed).quantised == (
        "FP8, one scale a row (2 of 21 tensors); whole numbers of 4 bits, groups of 32 (1 of 21 tensors)"
    )


def small_gpt_oss(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GptOssConfig(
        hidden_size=64, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=3, num_experts_per_tok=2, vocab_size=64, dtype="bfloat16",
    )  # fmt: skip
    return GptOssForCausalLM(config).to(torch.bfloat16)


def test_experts_of_gpt_oss(tmp_path):
    """MXFP4 of all experts together, laid out the other way round, with a parent in bfloat16."""
    other = saved(small_gpt_oss(1), tmp_path / "bf16")
    folder = saved(small_gpt_oss(0), tmp_path / "mxfp4")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert tensors.pop(name).shape == (3, 64, 24)
    stored, config, expected = mxfp4_experts(torch.Generator().manual_seed(0), name)
    save_file({**tensors, **stored}, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config=config)
    run("merge", folder, other, "--align", "none", "--weights", 0.25, 0.75, "--out", tmp_path / "out")
    merged = weights_of(tmp_path / "out")[name]
    exact = linear_combination([expected, weights_of(other)[name]], (0.25, 0.75), out_dtype=torch.bfloat16)
    assert torch.equal(merged, exact)


def test_a_damaged_scale_ends_in_one_message_and_no_output(of_8_bits, of_16_bits, tmp_path, capsys):
    tensors = weights_of(of_8_bits)
    tensors["model.layers.1.mlp.up_proj.weight_scale_inv"][0, 0] = float("nan")
    save_file(tensors, of_8_bits / "model.safetensors", metadata={"format": "pt"})
    assert main(["merge", str(of_8_bits), str(of_16_bits), "--align", "none", "--out", str(tmp_path / "out")]) != 0
    said = capsys.readouterr().err
    assert "model.layers.1.mlp.up_proj.weight: scales in" in said and "NaN" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_quantised_base(tmp_path):
    """Folded into the base as it is read, unrounded, and proven against the same base."""
    peft = pytest.importorskip("peft")
    base = quantised(tmp_path / "base", "packed, 4 bits", 0)
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_model(open_checkpoint(base)), options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    model.save_pretrained(tmp_path / "adapter")
    run("merge", f"{base}+{tmp_path / 'adapter'}", base, "--align", "none", "--out", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "llfc" / "run.json").read_text())
    assert len(record["quantised"]) == 2 and "4 of 4" in record["proofs"][0]
