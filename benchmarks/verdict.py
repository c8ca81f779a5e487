"""Asks `hf-llfc check` about pairs that none of its thresholds was fitted on, and compares its answers with labels.

    python benchmarks/verdict.py --out DIR [--only mnist genres language]    # trains and measures; what exists is kept
    python benchmarks/verdict.py --out DIR --write                           # writes the section of results/verdict.md

The pairs are made from seeds, texts and shapes of models that `pairs.py` does not use: MLP, ResNet and ViT on MNIST,
MiniLM on genres and tenses of sentences of the Brown corpus, byte-level Llama and GPT-2 on its genres. Each pair goes
through `hf_llfc.check` as a user's would; labels are those of samples that it has not seen. Records lie in
DIR/records.jsonl, one pair a line.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import train_parents as parents
from benchmarks import train_tasks as tasks
from benchmarks.pairs import TEN_LABELS, Pair, Plan, add_variant, digit_arrays, image_inputs, ten_labels
from tests import real_data
from tests.mlp_model import MLPConfig, MLPForImageClassification

SEED = 100
"""The first seed; those of `pairs.py` are below."""

DAMAGES = ("relabelled", "negated", "moved", "noise-0.5", "noise-2", "fresh", "scaled")
LANGUAGE_DAMAGES = ("moved", "noise-2", "scaled")
TEXT_DAMAGES = ("relabelled", "negated", "moved", "fresh")


def image_pairs(out: Path) -> list[Pair]:
    """MLP, ResNet and ViT on MNIST: two starts of each, their branches, and branches of overlapping halves."""
    group = parents.Group(out / "mnist")
    images, labels = digit_arrays()
    order = np.random.default_rng(SEED).permutation(len(images))
    images, labels = images[order], labels[order]
    held, shown = slice(0, 2500), slice(2500, None)
    for name, rows in (("test", held), ("train", shown)):
        make = partial(real_data.image_dataset, images[rows], labels[rows], TEN_LABELS)
        group.add_data(f"{name}.parquet", make)
    train = image_inputs(images[shown], labels[shown])
    held_out = {"test": image_inputs(images[held], labels[held])}
    few = {
        name: {key: values[chosen] for key, values in train.items()}
        for name, chosen in (("first", train["labels"] < 7), ("last", train["labels"] > 2))
    }
    common = {"num_channels": 1, **ten_labels()}
    vit = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=128,
        image_size=28,
        patch_size=7,
        **common,
    )
    resnet = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", **common
    )
    mlp = MLPConfig(hidden_sizes=(128, 128, 128), **ten_labels())
    plans = {
        "mlp": Plan(partial(MLPForImageClassification, mlp), 6, 64, 1e-3),
        "resnet": Plan(partial(transformers.ResNetForImageClassification, resnet), 4, 64, 3e-3),
        "vit": Plan(partial(transformers.ViTForImageClassification, vit), 8, 64, 1e-3),
    }
    pairs = []
    for family, plan in plans.items():

        def add(name: str, make: Callable[[], PreTrainedModel], family: str = family) -> Path:
            return group.add(f"{family}-{name}", make, parents.fashion_processor(), held_out)

        for seed in (SEED, SEED + 1):
            trunk = add(f"trunk-{seed}", partial(plan.fresh, train, seed=seed, epochs=1))
            for letter, order_seed in (("a", 1), ("b", 2)):
                make = partial(plan.onward, trunk, train, order=10 * seed + order_seed, epochs=plan.epochs - 1)
                add(f"{letter}-{seed}", make)
            for name, inputs in few.items():
                make = partial(plan.onward, group.folder / f"{family}-a-{seed}", inputs, order=seed, epochs=2)
                add(f"{name}-{seed}", make)
        rows = (
            "spawned a-100 b-100;spawned a-101 b-101;steps trunk-100 a-100;steps trunk-101 b-101;"
            "independent a-100 a-101;independent b-100 b-101;data first-100 last-100;data a-101 first-101"
        )
        pairs += listed(f"mnist-{family}", family, group.folder, rows, f"{family}-", "image-classification", "test")
    shown_data = str(group.folder / "data" / "train.parquet")
    return [replace(pair, shown=shown_data) for pair in pairs]


def text_pairs(out: Path) -> list[Pair]:
    """MiniLM on four genres and on tenses: other orders, other texts, other heads, and less training."""
    group = parents.Group(out / "genres")
    texts = tasks.Texts()
    pairs = []
    for task in ("genre", "tense"):
        labels = tasks.TASKS[task].labels
        rows = tasks.balanced(tasks.TASKS[task].rows(True), labels, 800, SEED)
        table = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
        group.add_data(f"{task}-test.jsonl", partial(Dataset.from_dict, table))
        held_out = {task: texts.inputs(rows)}

        def make(head: int, texts_of: int, order: int, epochs: int, task: str = task, labels: int = labels):
            model = tasks.classifier(labels, head)
            training = parents.Training(epochs, 16, 1e-4, order)
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                return parents.fit(model, texts.train(task, texts_of), training)

        # Head, texts and order by their seeds, and epochs.
        plans = {"a": (1, 1, 1, 2), "b": (1, 2, 2, 2), "c": (1, 1, 3, 2), "d": (2, 1, 4, 2), "early": (1, 1, 1, 1)}
        for name, (head, texts_of, order, epochs) in plans.items():
            chosen = partial(make, SEED + head, SEED + texts_of, SEED + order, epochs)
            group.add(f"{task}-{name}", chosen, texts.tokenizer, held_out)
        rows = "data a b;spawned a c;heads a d;heads b d;steps early a"
        pairs += listed(f"minilm-{task}", "bert", group.folder, rows, f"{task}-", "text-classification", f"{task}-test")
    return pairs


def language_pairs(out: Path) -> list[Pair]:
    """Byte-level Llama and GPT-2 on genres of the Brown corpus: two bases, branches by genre, and early branches."""
    group = parents.Group(out / "language")
    tokenizer = parents.byte_tokenizer()
    corpus = real_data.brown()
    genres = {"fiction": ("fiction", "adventure", "romance"), "facts": ("news", "government", "learned")}
    blocks = {}
    for domain, names in genres.items():
        chosen = [text for text, name in zip(corpus["text"], corpus["genre"], strict=True) if name in names]
        blocks[domain] = parents.text_blocks(chosen, " ")
    test = {domain: texts[:200] for domain, texts in blocks.items()}
    mixed = [text for pair in zip(*test.values(), strict=True) for text in pair]
    group.add_data("both-test.jsonl", partial(Dataset.from_dict, {"text": mixed}))

    def inputs(texts: list[str]) -> parents.Tensors:
        ids = tokenizer(texts, return_tensors="pt")["input_ids"]
        return {"input_ids": ids, "labels": ids}

    base = inputs([text for texts in blocks.values() for text in texts[200:1700]])
    held_out = {domain: inputs(texts[:50]) for domain, texts in test.items()}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": len(tokenizer)}
    configs = {
        "llama": transformers.LlamaConfig(
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=3,
            intermediate_size=192,
            max_position_embeddings=parents.BLOCK_BYTES,
            **special,
        ),
        "gpt2": transformers.GPT2Config(
            n_embd=96,
            n_layer=3,
            n_head=6,
            n_positions=parents.BLOCK_BYTES,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **special,
        ),
    }
    pairs = []
    for family, config in configs.items():
        plan = Plan(partial(transformers.AutoModelForCausalLM.from_config, config), 1, 16, 2e-3)

        def add(name: str, make: Callable[[], PreTrainedModel], family: str = family) -> Path:
            return group.add(f"{family}-{name}", make, tokenizer, held_out)

        for seed in (SEED, SEED + 1):
            trunk = add(f"base-{seed}", partial(plan.fresh, base, seed=seed))
            for order, (domain, texts) in enumerate(blocks.items()):
                chosen = inputs(texts[1700:3200])
                add(f"{domain}-{seed}", partial(plan.onward, trunk, chosen, order=seed + order, epochs=1))
        few = {name: values[::10] for name, values in base.items()}
        early = add("early", partial(plan.fresh, few, seed=SEED + 2))
        for order, letter in enumerate(("a", "b")):
            add(f"early-{letter}", partial(plan.onward, early, base, order=SEED + 10 + order, epochs=1))
        rows = (
            "data fiction-100 facts-100;data fiction-101 facts-101;steps base-100 fiction-100;steps base-101 facts-101;"
            "bases base-100 base-101;bases fiction-100 facts-101;spawned early-a early-b;steps early early-a"
        )
        pairs += listed(f"brown-{family}", family, group.folder, rows, f"{family}-", "text-generation", "both-test")
    return pairs


def listed(run: str, family: str, folder: Path, rows: str, prefix: str, task: str, data: str) -> list[Pair]:
    """Pairs as `kind a b;…`."""
    found = []
    for row in rows.split(";"):
        kind, *names = row.split()
        a, b = (str(folder / f"{prefix}{name}") for name in names)
        ending = "parquet" if task == "image-classification" else "jsonl"
        found.append(Pair(run, family, kind, a, b, task, str(folder / "data" / f"{data}.{ending}")))
    return found


GROUPS: Mapping[str, tuple[Callable[[Path], list[Pair]], tuple[str, ...]]] = {
    "mnist": (image_pairs, DAMAGES),
    "genres": (text_pairs, TEXT_DAMAGES),
    "language": (language_pairs, LANGUAGE_DAMAGES),
}
"""What makes pairs of a group, and how the second model of one pair of every run of it is damaged."""


def pairs_of(group: str, out: Path) -> list[Pair]:
    """All pairs of a group; trains what is missing."""
    make, damages = GROUPS[group]
    pairs = make(out)
    for run in dict.fromkeys(pair.run for pair in pairs):
        close = next(pair for pair in pairs if pair.run == run and pair.kind in ("spawned", "data"))
        for damage in damages:
            target = out / "variants" / run / f"{Path(close.b).name}-{damage}"
            target.parent.mkdir(parents=True, exist_ok=True)
            if add_variant(Path(close.b), target, damage) is not None:
                pairs.append(replace(close, kind=damage, b=str(target)))
    return pairs
