"""The card of a merge names base and adapter, each with its commit and its licence."""

from pathlib import Path

import peft
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import hf_llfc
from hf_llfc.foundation.model_names import parts_of
from hf_llfc.publishing.lineage import ParentInfo, combined_license
from tests.runs import byte_llama


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA with a card of its own."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(byte_llama(0), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    (tmp_path / "lora" / "README.md").write_text("---\nlicense: cc-by-4.0\nlanguage: en\ndatasets: someone/data\n---\n")
    return tmp_path / "lora"


def test_both_are_linked_at_their_commits_with_both_licences(hub, adapter, tmp_path):
    byte_llama(0).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: de\n---\n")
    commits = [hub.add_repo("someone/base", tmp_path / "base"), hub.add_repo("someone/lora", adapter)]
    hf_llfc.merge(["someone/base+someone/lora", tmp_path / "base"], [0.4, 0.6], out=tmp_path / "merged")
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.base_model == ["someone/base", "someone/lora"] and card.data.base_model_relation == "merge"
    assert sorted(card.data.language) == ["de", "en"] and card.data.datasets == ["someone/data"]
    assert card.data.license_name == "licences-of-the-parents"
    for name, commit in zip(("base", "lora"), commits, strict=True):
        assert f"[someone/{name}](https://huggingface.co/someone/{name})" in card.text
        assert f"https://huggingface.co/someone/{name}/tree/{commit}" in card.text
    assert "apache-2.0 and cc-by-4.0" in card.text and "someone/lora: cc-by-4.0" in card.text


def test_folders_are_named_without_their_paths(adapter, tmp_path):
    byte_llama(0).save_pretrained(tmp_path / "base")
    hf_llfc.merge([f"{tmp_path / 'base'}+{adapter}"], out=tmp_path / "merged")
    text = (tmp_path / "merged" / "README.md").read_text()
    assert str(tmp_path) not in text and "base (not on the Hub) + lora (not on the Hub)" in text
    shown = yaml.safe_load(text.partition("```yaml")[2].partition("```")[0])
    assert shown["models"][0]["model"] == "./base+./lora"


def test_a_part_without_a_licence_is_named():
    card = {"parts": [{"license": "mit"}, {}]}
    parent = ParentInfo("someone/base@" + "a" * 40 + "+someone/lora@" + "b" * 40, card=card)
    assert [(part.id, part.revision) for part in parent.parts] == [
        ("someone/base", "a" * 40),
        ("someone/lora", "b" * 40),
    ]
    assert parent.license is None and parent.is_on_hub and parent.name == "someone/base + someone/lora"
    assert "someone/lora" in (combined_license([parent]).problem or "")
    assert parts_of("someone/base") == ["someone/base"]
