"""The snippet of a card runs as it stands, for every task and whatever files the checkpoint has."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_llfc.publishing.card.usage import task_of, usage_snippet

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "A", "sentence", "to", "classify", "The", "capital", "of", "."]
BERT = BertConfig(
    vocab_size=32,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=64,
)
LLAMA = LlamaConfig(
    vocab_size=256,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=16,
)
VIT = ViTConfig(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    image_size=12,
    patch_size=4,
    num_channels=1,
)
RESNET = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")


def add_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{f"{key}_token": name for key, name in names.items()})
    fast.save_pretrained(folder)


def snippet_of(folder: Path, *, of_bytes: bool = False) -> str:
    config = json.loads((folder / "config.json").read_text())
    return usage_snippet(folder, config, task_of(config), str(folder), of_bytes=of_bytes)


@pytest.mark.parametrize(
    ("model_class", "config", "tokenizer", "of_bytes", "way"),
    [
        (BertForSequenceClassification, BERT, True, False, 'pipeline("text-classification"'),
        (BertForTokenClassification, BERT, True, False, 'pipeline("token-classification"'),
        (BertForMaskedLM, BERT, True, False, 'pipeline("fill-mask"'),
        (LlamaForCausalLM, LLAMA, True, False, 'pipeline("text-generation"'),
        (LlamaForCausalLM, LLAMA, False, True, "AutoModelForCausalLM"),
        (BertForMaskedLM, BertConfig(**{**BERT.to_dict(), "vocab_size": 256}), False, True, "AutoModelForMaskedLM"),
        (BertModel, BERT, True, False, "AutoTokenizer, AutoModel"),
        (BertForSequenceClassification, BERT, False, False, "AutoModelForSequenceClassification"),
        (ViTForImageClassification, VIT, False, False, "AutoModelForImageClassification"),
        (ResNetForImageClassification, RESNET, False, False, "AutoModelForImageClassification"),
    ],
)
def test_the_snippet_runs(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    model_class: Any,
    config: Any,
    tokenizer: bool,
    of_bytes: bool,
    way: str,
) -> None:
    torch.manual_seed(0)
    model_class(config).save_pretrained(tmp_path)
    if tokenizer:
        add_tokenizer(tmp_path)
    snippet = snippet_of(tmp_path, of_bytes=of_bytes)
    assert way in snippet
    exec(compile(snippet, "snippet", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.strip() if "print(" in snippet else not printed


def test_images_with_a_processor_go_through_the_pipeline(tmp_path: Path) -> None:
    ViTForImageClassification(VIT).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    snippet = snippet_of(tmp_path)
    assert 'pipeline("image-classification"' in snippet
    assert 'classifier("picture.png")' in snippet


def test_a_model_of_the_users_own_is_loaded_by_its_class(tmp_path: Path) -> None:
    config = {"architectures": ["PlainMLP"], "model_type": "plain-mlp"}
    snippet = usage_snippet(tmp_path, config, None, "me/mlp", of_bytes=False)
    assert "from your_package import PlainMLP" in snippet
    assert 'PlainMLP.from_pretrained("me/mlp")' in snippet


def test_code_on_the_hub_is_asked_for_openly(tmp_path: Path) -> None:
    config = {"architectures": ["MyForCausalLM"], "model_type": "mine", "auto_map": {"AutoModelForCausalLM": "x.My"}}
    (tmp_path / "tokenizer.json").write_text("{}")
    snippet = usage_snippet(tmp_path, config, "text-generation", "me/x", of_bytes=False)
    assert 'pipeline("text-generation", model="me/x", trust_remote_code=True)' in snippet


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertForSequenceClassification", "text-classification"),
        ("GPT2LMHeadModel", "text-generation"),
        ("MixtralForCausalLM", "text-generation"),
        ("ViTForImageClassification", "image-classification"),
        ("RobertaForMaskedLM", "fill-mask"),
        ("BertModel", None),
    ],
)
def test_the_head_says_the_task(architecture: str, task: str | None) -> None:
    assert task_of({"architectures": [architecture]}) == task
    assert task_of({}) is None
