"""Tiny models and data under the names that the documents use."""

import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from tests.mlp_model import MLPConfig, MLPForImageClassification
from tests.runs import byte_llama, image_data, moved, saved, small_resnet

ROOT = Path(__file__).parents[1]
WORDS = [
    "the",
    "merged",
    "model",
    "is",
    "linear",
    "blend",
    "of",
    "its",
    "parents",
    "layer",
    "by",
    "or",
    "not",
    "good",
    "bad",
]


def make_inputs(folder: Path) -> None:
    """Models `A`, `B`, …, data sets, and small stand-ins for the trained parents that recipes name."""
    rows = [f"{' '.join(WORDS[(place + step) % len(WORDS)] for step in range(5))}" for place in range(400)]
    (folder / "data.csv").write_text(
        "text,label\n" + "".join(f"{row},{place % 2}\n" for place, row in enumerate(rows[:160]))
    )
    (folder / "texts.csv").write_text("text\n" + "".join(f"{row}\n" for row in rows[:160]))
    base = classifier()
    for seed, name in enumerate(("BASE", "A", "B", "C", "MODEL")):
        save_classifier(nearby(base, seed), folder / name)
    for seed, name in enumerate(("LORA-A", "LORA-B")):
        save_lora(folder / "BASE", folder / name, seed)
    llama = byte_llama(0)
    saved(llama, folder / "LLAMA-A")
    saved(moved(nearby(llama, 1), 2), folder / "LLAMA-B")

    (folder / "recipes").mkdir()
    for name in ("minilm_sentiment_two", "fashion_mlp_independent"):
        shutil.copy(ROOT / "recipes" / f"{name}.yaml", folder / "recipes")
    (folder / "tests").symlink_to(ROOT / "tests")
    parents = folder / "parents"
    for seed, name in enumerate(("tweets", "movies", "amazon", "editorials")):
        save_classifier(nearby(base, seed), parents / "minilm" / name)
    (parents / "minilm" / "data").mkdir()
    (parents / "minilm" / "data" / "all-test.jsonl").write_text(
        "".join(f'{{"text": "{row}", "label": {place % 2}}}\n' for place, row in enumerate(rows))
    )
    for seed, name in enumerate("ab"):
        saved(small_resnet(seed), parents / "fashion" / f"resnet-independent-{name}")
        saved(small_resnet(seed), folder / f"IMAGES-{name.upper()}")
    (parents / "fashion" / "data").mkdir()
    image_data(parents / "fashion" / "data", "test", 500)
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = MLPConfig(image_size=32, hidden_sizes=(12, 12), num_labels=3)
        saved(MLPForImageClassification(config), parents / "mlp" / f"seed-{seed}")
    (parents / "mlp" / "data").mkdir()
    image_data(parents / "mlp" / "data", "test", 2000)
    generator = np.random.default_rng(0)
    for place in range(256):
        path = folder / "images" / f"LABEL_{place % 3}" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32), dtype=np.uint8)).save(path)


def classifier() -> BertForSequenceClassification:
    """A BERT of two layers that tells two classes apart."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=64,
        num_labels=2,
    )
    return BertForSequenceClassification(config).eval()


def save_lora(base: Path, folder: Path, seed: int) -> None:
    """An adapter of a classifier."""
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False, task_type="SEQ_CLS")
    adapted = peft.get_peft_model(BertForSequenceClassification.from_pretrained(base), config)
    adapted.peft_config["default"].base_model_name_or_path = base.name
    adapted.save_pretrained(folder)


def nearby(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy with a little noise, as if it were fine-tuned."""
    generator = torch.Generator().manual_seed(seed)
    copy = type(model)(model.config).eval()
    copy.load_state_dict(
        {
            name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in model.state_dict().items()
        }
    )
    return copy


def save_classifier(model: PreTrainedModel, path: Path) -> None:
    """The model with a tokenizer of a word an id."""
    saved(model, path)
    vocabulary = {word: place for place, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(path)
