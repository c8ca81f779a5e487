"""Base and adapter as peft runs them answer as the folded model; where they do not, nothing is written."""

import dataclasses

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_llfc
from hf_llfc.checkpoints import load_model, open_checkpoint
from hf_llfc.checkpoints.checkpoint import Checkpoint
from hf_llfc.cli import main
from hf_llfc.errors import CheckpointError
from hf_llfc.parents import proof as proving
from hf_llfc.parents.proof import Proof, prove
from hf_llfc.publishing.record import RunRecord
from tests.checkpoints.views.test_adapted import KINDS, lora, trained
from tests.runs import byte_llama
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def base(tmp_path):
    """A Llama in bfloat16."""
    byte_llama(0, attention_bias=True).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("kind", [each for each in KINDS if each not in ("OSF", "OLoRA")])
def test_every_kind_is_proven(kind, base, tmp_path):
    adapter = trained(load_model(open_checkpoint(base)), KINDS[kind], tmp_path / "adapter")
    found = prove(open_checkpoint(f"{base}+{adapter}"))
    assert not found.left_out and found.difference < 1e-5 < found.effect
    assert 0 < found.changed == found.targeted


def test_experts_and_heads_are_proven(tmp_path):
    tiny_model("mixtral", "causal-lm").save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=3, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"], init_lora_weights=False
    )
    adapter = trained(load_model(open_checkpoint(tmp_path / "base")), config, tmp_path / "adapter")
    found = prove(open_checkpoint(f"{tmp_path / 'base'}+{adapter}"))
    assert found.difference < 1e-5 < found.effect and found.changed == found.targeted


def test_a_wrongly_folded_adapter_is_refused_before_anything_is_written(base, tmp_path, monkeypatch):
    adapter = lora(base, tmp_path / "adapter")
    real = proving.prove

    def wrong(checkpoint: Checkpoint) -> Proof:
        own = checkpoint.adapter
        scaled = {name: own.onto.read(name).float() for name in own.targets}

        def read(name):
            return scaled[name] + 0.9 * (own.read(name) - scaled[name]) if name in scaled else own.read(name)

        return real(dataclasses.replace(checkpoint, adapter=dataclasses.replace(own, read=read)))

    monkeypatch.setattr(proving, "prove", wrong)
    with pytest.raises(CheckpointError, match=r"folded, it answers otherwise than base and adapter as peft runs them"):
        hf_llfc.merge([adapter, base], out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    hf_llfc.merge([adapter, base], out=tmp_path / "out", prove=False)


def test_the_proof_is_told(base, tmp_path, capsys):
    adapter, zero = lora(base, tmp_path / "adapter"), lora(base, tmp_path / "zero", 2)
    state = load_file(zero / "adapter_model.safetensors")
    save_file({name: torch.zeros_like(each) for name, each in state.items()}, zero / "adapter_model.safetensors")
    assert main(["merge", str(adapter), str(zero), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    told = capsys.readouterr().out
    assert "4 of 4" in told and "0 of 4" in told
    first, second = RunRecord.load(tmp_path / "out").proofs
    assert first.startswith("./base+./adapter: 4 of 4 targeted tensors changed") and "0 of 4" in second
    assert "4 of 4 targeted tensors changed" in (tmp_path / "out" / "README.md").read_text()


def test_what_does_not_fit_in_memory_is_not_run(base, tmp_path, monkeypatch):
    adapter = lora(base, tmp_path / "adapter")
    monkeypatch.setattr(proving, "is_in_memory", lambda checkpoint: False)
    assert "half of the memory" in prove(open_checkpoint(adapter)).left_out
