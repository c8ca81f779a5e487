"""Trains six models of each family from independent seeds: three pairs that share nothing but their data.

    python benchmarks/train_seeds.py --out DIR [--only FAMILY …] [--seeds 1 2] [--threads 1]

What exists in DIR/seeds is kept. `benchmarks/symmetries.py` aligns and merges the pairs (1, 2), (3, 4) and (5, 6).
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import train_parents as parents
from tests import real_data

SEEDS = range(1, 7)
TRAIN_BLOCKS, TEST_BLOCKS = 4000, 400


# What is not as in the other families: epochs, blocks of text, a tied head, and a decay under which weights forget
# their initial values, as those of large models do in their long trainings; a weight keeps e^(-Σ learning rate × decay)
# of its own.
EPOCHS = {"vit-128-short": 3, "gpt2-long": 8}
BLOCKS = {"llama-short": 1000}
DECAY = {"llama-decay": 2.0}
TIED = ("llama-tied",)


# Width and side of the patches of each ViT.
VITS = {"vit": (64, 4), "vit-64": (64, 7), "vit-128": (128, 7), "vit-256": (256, 7), "vit-128-short": (128, 7)}


def vit_config(width: int, patch: int) -> transformers.ViTConfig:
    """Four layers of four heads, with twice as many neurons as channels."""
    return transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=2 * width,
        image_size=28,
        patch_size=patch,
        num_channels=1,
        num_labels=10,
        **parents.fashion_labels(),
    )


def resnet_config() -> transformers.ResNetConfig:
    """Basic blocks of 16, 32 and 64 channels."""
    return transformers.ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=10,
        **parents.fashion_labels(),
    )


def train_fashion(out: Path, seeds: Sequence[int], family: str) -> None:
    """Image classifiers on all of Fashion-MNIST."""
    group = parents.Group(out / "seeds")
    parents.add_fashion_data(group)
    train, test = parents.fashion_inputs("train"), parents.fashion_inputs("test")
    training = parents.Training(6, 64, 1e-3, 0) if family in VITS else parents.Training(4, 64, 3e-3, 0)
    training = parents.replace(training, epochs=EPOCHS.get(family, training.epochs))

    def make(seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        if family in VITS:
            model: PreTrainedModel = transformers.ViTForImageClassification(vit_config(*VITS[family]))
        else:
            model = transformers.ResNetForImageClassification(resnet_config())
        return parents.fit(model, train, parents.replace(training, seed=seed))

    for seed in seeds:
        group.add(f"{family}-{seed}", partial(make, seed), parents.fashion_processor(), {"test": test})


# Width of each language model.
LANGUAGE_MODELS = {
    "gpt2": 128,
    "gpt2-long": 128,
    "llama": 128,
    "llama-256": 256,
    "llama-decay": 128,
    "llama-short": 128,
    "llama-tied": 128,
}


def language_config(family: str, vocabulary: int) -> transformers.PreTrainedConfig:
    """Four layers: a GPT-2 with a tied head, or a Llama with grouped queries and rotary positions."""
    width = LANGUAGE_MODELS[family]
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if family.startswith("gpt2"):
        return transformers.GPT2Config(
            vocab_size=vocabulary,
            n_embd=width,
            n_layer=4,
            n_head=4,
            n_positions=parents.BLOCK_BYTES,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **special,
        )
    return transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=width * 43 // 16,
        max_position_embeddings=parents.BLOCK_BYTES,
        tie_word_embeddings=family in TIED,
        **special,
    )


def train_language(out: Path, seeds: Sequence[int], family: str) -> None:
    """Byte-level language models on one megabyte of the Brown corpus, twice over."""
    group = parents.Group(out / "seeds")
    tokenizer = parents.byte_tokenizer()
    blocks = parents.text_blocks(real_data.brown()["text"], " ")
    test, train = blocks[:TEST_BLOCKS], blocks[TEST_BLOCKS : TEST_BLOCKS + TRAIN_BLOCKS]
    group.add_data("brown-test.jsonl", partial(Dataset.from_dict, {"text": test}))
    group.add_data("brown-train.jsonl", partial(Dataset.from_dict, {"text": train}))

    def inputs(texts: list[str]) -> parents.Tensors:
        ids = tokenizer(texts, return_tensors="pt")["input_ids"]
        assert ids.shape == (len(texts), parents.BLOCK_BYTES)
        return {"input_ids": ids, "labels": ids}

    def make(seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(language_config(family, len(tokenizer)))
        training = parents.Training(EPOCHS.get(family, 2), 8, 2e-3, seed)
        training = parents.replace(training, weight_decay=DECAY.get(family, training.weight_decay))
        return parents.fit(model, inputs(train[: BLOCKS.get(family)]), training)

    for seed in seeds:
        group.add(f"{family}-{seed}", partial(make, seed), tokenizer, {"brown": inputs(test)})


FAMILIES = {
    **{name: partial(train_fashion, family=name) for name in (*VITS, "resnet")},
    **{name: partial(train_language, family=name) for name in LANGUAGE_MODELS},
}


def main() -> None:
    """Trains what is missing and says what each model reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the models go, and are kept")
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), help="some families; all of them by default")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS), help="some of the six")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    arguments = parser.parse_args()
    parents.settle(arguments.threads)
    for name in arguments.only or FAMILIES:
        FAMILIES[name](arguments.out, arguments.seeds)


if __name__ == "__main__":
    main()
