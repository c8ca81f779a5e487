"""Trains the real parents that the slow tests, the recipes and RESULTS.md merge, each once, from fixed seeds.

    python benchmarks/train_parents.py --out DIR [--only minilm fashion lm mlp] [--threads 1]

What exists in DIR is kept. A parent is an ordinary checkpoint with its tokenizer or image processor; the data to
evaluate it on lies beside it. README.md in this folder lists what comes out.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from huggingface_hub import ModelCardData
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import real_data
from tests.mlp_model import MLPConfig, MLPForImageClassification

Tensors = dict[str, torch.Tensor]

FASHION_MEAN, FASHION_STD = 0.2860, 0.3530
SENTENCES, HELD_OUT, SENTENCE_TOKENS = 2000, 900, 64
BLOCK_BYTES = 256
END_OF_TEXT = "<|endoftext|>"

# What models of these data say of themselves: tests/real_data.py says where the data come from.
FASHION_CARD = {"license": "mit", "datasets": ["zalando-datasets/fashion_mnist"]}
PYTHON_CARD = {
    "license": "other",
    "license_name": "psf-2.0",
    "license_link": "https://docs.python.org/3/license.html",
    "language": ["en", "code"],
}


@dataclass(frozen=True)
class Training:
    """How one model is trained: linear warm-up over a twentieth of the steps, then a cosine down to zero.

    Attributes:
        epochs: passes over the data.
        batch_size: samples a step.
        learning_rate: at its peak.
        seed: of the order of the data and of dropout.
        optimiser: adamw, or sgd with momentum.
        weight_decay: of every parameter.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    optimiser: str = "adamw"
    weight_decay: float = 0.01


def fit(model: PreTrainedModel, inputs: Tensors, training: Training) -> PreTrainedModel:
    """Trains a model in place on stacked inputs that include the labels."""
    torch.manual_seed(training.seed)
    order = torch.Generator().manual_seed(training.seed)
    size = len(inputs["labels"])
    steps = training.epochs * math.ceil(size / training.batch_size)
    if training.optimiser == "sgd":
        optimiser = torch.optim.SGD(
            model.parameters(), training.learning_rate, momentum=0.9, weight_decay=training.weight_decay
        )
    else:
        optimiser = torch.optim.AdamW(model.parameters(), training.learning_rate, weight_decay=training.weight_decay)
    schedule = transformers.get_cosine_schedule_with_warmup(optimiser, steps // 20, steps)
    model.train()
    for _ in range(training.epochs):
        for indices in torch.randperm(size, generator=order).split(training.batch_size):
            loss = model(**select(inputs, indices)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
    return model.eval()


def select(inputs: Tensors, indices: torch.Tensor) -> Tensors:
    """Some samples, without the columns that are padding in all of them."""
    batch = {name: tensor[indices] for name, tensor in inputs.items()}
    if "attention_mask" in batch:
        length = int(batch["attention_mask"].sum(1).max())
        batch = {name: tensor[:, :length] if tensor.ndim == 2 else tensor for name, tensor in batch.items()}
    return batch


@torch.no_grad()
def measure(model: PreTrainedModel, inputs: Tensors, batch_size: int = 200) -> dict[str, float]:
    """Mean loss on held-out inputs, and the accuracy of a classifier or the bits per byte of a language model."""
    model.eval()
    size = len(inputs["labels"])
    loss, correct = 0.0, 0
    for indices in torch.arange(size).split(batch_size):
        batch = select(inputs, indices)
        output = model(**batch)
        loss += output.loss.item() * len(indices)
        if output.logits.ndim == 2:
            correct += int((output.logits.argmax(-1) == batch["labels"]).sum())
    scores = {"loss": loss / size}
    if inputs["labels"].ndim == 1:
        return scores | {"accuracy": correct / size}
    return scores | {"bits_per_byte": loss / size / math.log(2)}


class Group:
    """The parents of one group: a folder of checkpoints, their data, and parents.json with what each reached."""

    def __init__(self, folder: Path, card: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.card = dict(card or {})
        self.summary = folder / "parents.json"
        folder.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        name: str,
        make: Callable[[], PreTrainedModel],
        companion: transformers.PreTrainedTokenizerBase | transformers.BaseImageProcessor,
        held_out: dict[str, Tensors],
        card: Mapping[str, Any] | None = None,
    ) -> Path:
        """Makes, measures and saves a parent, or keeps the one that exists; its card adds to that of the group."""
        target = self.folder / name
        metadata = {**self.card, **(card or {})}
        if (target / "config.json").is_file():
            write_card(target, metadata)
            print(f"{target}: kept", flush=True)
            return target
        start = time.perf_counter()
        model = make()
        seconds = round(time.perf_counter() - start, 1)
        scores = {data: measure(model, inputs) for data, inputs in held_out.items()}
        unfinished = self.folder / f".{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        companion.save_pretrained(unfinished)
        write_card(unfinished, metadata)
        unfinished.rename(target)
        known = json.loads(self.summary.read_text(encoding="utf-8")) if self.summary.is_file() else {}
        known[name] = {"seconds": seconds, "held_out": scores}
        self.summary.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        print(f"{target}: {seconds} s, {json.dumps(scores)}", flush=True)
        return target

    def add_data(self, name: str, make: Callable[[], Dataset]) -> None:
        """Writes data to evaluate on as data/NAME, parquet or jsonl by its suffix, unless it exists."""
        path = self.folder / "data" / name
        if path.is_file():
            return
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_name(f".{path.name}")
        dataset = make()
        if path.suffix == ".parquet":
            dataset.to_parquet(str(unfinished))
        else:
            dataset.to_json(str(unfinished), force_ascii=False)
        unfinished.rename(path)


def write_card(folder: Path, metadata: Mapping[str, Any]) -> None:
    """What a parent says of its licence, languages and data, from which the card of a merge takes its own."""
    if metadata:
        text = ModelCardData(**metadata).to_yaml()
        (folder / "README.md").write_text(
            f"---\n{text}\n---\n\nMade by benchmarks/train_parents.py.\n", encoding="utf-8"
        )


def load(folder: Path) -> PreTrainedModel:
    """A checkpoint as the class that saved it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    classes = {"mlp_classifier": MLPForImageClassification}
    model_class = classes.get(config.model_type) or getattr(transformers, config.architectures[0])
    return model_class.from_pretrained(folder, config=config)


def fashion_processor() -> transformers.BaseImageProcessor:
    """Grey 28×28 images to normalised pixels."""
    return transformers.ViTImageProcessor(
        do_resize=False, size={"height": 28, "width": 28}, image_mean=[FASHION_MEAN], image_std=[FASHION_STD]
    )


def fashion_inputs(split: str) -> Tensors:
    """A whole split of Fashion-MNIST as `fashion_processor` would prepare it."""
    images, labels = real_data.fashion_mnist_arrays(split)
    pixels = (torch.from_numpy(images.astype(np.float32)) / 255 - FASHION_MEAN) / FASHION_STD
    sample = real_data.image_dataset(images[:8], labels[:8], real_data.FASHION_MNIST_LABELS)
    expected = fashion_processor()(list(sample["image"]), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[:8].unsqueeze(1), expected)
    return {"pixel_values": pixels.unsqueeze(1), "labels": torch.from_numpy(labels)}


def fashion_labels() -> dict[str, object]:
    """The label names as a config holds them."""
    names = real_data.FASHION_MNIST_LABELS
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def add_fashion_data(group: Group) -> None:
    """The test split, and training images for calibration and for the training-loss barrier."""
    group.add_data("test.parquet", partial(real_data.fashion_mnist, "test"))
    group.add_data("train.parquet", partial(real_data.fashion_mnist, "train"))


def train_mlp(out: Path) -> None:
    """Four independent pairs of 784-512-512-512-10: seeds 0 to 3 by Adam, 4 to 7 by SGD."""
    group = Group(out / "mlp", FASHION_CARD)
    add_fashion_data(group)
    train, test = fashion_inputs("train"), fashion_inputs("test")

    def make(seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = MLPForImageClassification(MLPConfig(num_labels=10, **fashion_labels()))
        if seed < 4:
            return fit(model, train, Training(6, 128, 1e-3, seed, "adamw"))
        return fit(model, train, Training(6, 128, 0.1, seed, "sgd", 5e-4))

    for seed in range(8):
        group.add(f"seed-{seed}", partial(make, seed), fashion_processor(), {"test": test})


def train_fashion(out: Path) -> None:
    """For a ResNet and a ViT: a trunk with two branches of different data order, and two independent models."""
    group = Group(out / "fashion", FASHION_CARD)
    add_fashion_data(group)
    train, test = fashion_inputs("train"), fashion_inputs("test")
    resnet = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=10,
        **fashion_labels(),
    )
    vit = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=28,
        patch_size=4,
        num_channels=1,
        num_labels=10,
        **fashion_labels(),
    )
    first_20000 = {name: tensor[:20000] for name, tensor in train.items()}
    held_out = {"test": test}
    make_resnet = partial(transformers.ResNetForImageClassification, resnet)
    make_vit = partial(transformers.ViTForImageClassification, vit)
    add_fashion_family(group, "resnet", make_resnet, train, held_out, Training(6, 64, 3e-3, 0), trunk_epochs=2)
    add_fashion_family(group, "vit", make_vit, first_20000, held_out, Training(8, 64, 1e-3, 0), trunk_epochs=3)


def add_fashion_family(
    group: Group,
    family: str,
    make: Callable[[], PreTrainedModel],
    inputs: Tensors,
    held_out: dict[str, Tensors],
    training: Training,
    *,
    trunk_epochs: int,
) -> None:
    """A trunk and its two branches, and two independent models; every path from a fresh model has equal epochs."""

    def fresh(training: Training) -> PreTrainedModel:
        torch.manual_seed(training.seed)
        return fit(make(), inputs, training)

    def branch(training: Training) -> PreTrainedModel:
        return fit(load(trunk), inputs, training)

    processor = fashion_processor()
    first = replace(training, epochs=trunk_epochs)
    rest = replace(training, epochs=training.epochs - trunk_epochs, learning_rate=training.learning_rate / 2)
    trunk = group.add(f"{family}-trunk", partial(fresh, first), processor, held_out)
    group.add(f"{family}-spawned-a", partial(branch, replace(rest, seed=1)), processor, held_out)
    group.add(f"{family}-spawned-b", partial(branch, replace(rest, seed=2)), processor, held_out)
    group.add(f"{family}-independent-a", partial(fresh, replace(training, seed=3)), processor, held_out)
    group.add(f"{family}-independent-b", partial(fresh, replace(training, seed=4)), processor, held_out)


def train_minilm(out: Path) -> None:
    """all-MiniLM-L6-v2 with one random head, fine-tuned on 2000 sentences of each of four domains."""
    group = Group(out / "minilm", {"license": "apache-2.0", "language": "en"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_data.minilm())

    def inputs(dataset: Dataset) -> Tensors:
        encoded = tokenizer(
            list(dataset["text"]),
            truncation=True,
            max_length=SENTENCE_TOKENS,
            padding="max_length",
            return_tensors="pt",
        )
        return {**encoded, "labels": torch.tensor(dataset["label"])}

    train, test = {}, {}
    for domain in real_data.SENTIMENT_DOMAINS:
        dataset = real_data.sentiment(domain).shuffle(seed=0)
        train[domain] = dataset.select(range(SENTENCES))
        test[domain] = dataset.select(range(SENTENCES, SENTENCES + HELD_OUT))
    for name, part in (("train", train), ("test", test)):
        every = {**part, "all": concatenate_datasets(list(part.values())).shuffle(seed=0)}
        for domain, dataset in every.items():
            group.add_data(f"{domain}-{name}.jsonl", partial(Dataset.flatten_indices, dataset))
    held_out = {domain: inputs(dataset) for domain, dataset in test.items()}

    def start() -> PreTrainedModel:
        torch.manual_seed(0)
        labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
        return transformers.BertForSequenceClassification.from_pretrained(real_data.minilm(), **labels).eval()

    def fine_tuned(domain: str, seed: int, epochs: int = 2) -> PreTrainedModel:
        return fit(start(), inputs(train[domain]), Training(epochs, 16, 5e-5, seed))

    group.add("base", start, tokenizer, held_out)
    for seed, domain in enumerate(real_data.SENTIMENT_DOMAINS, start=1):
        group.add(domain, partial(fine_tuned, domain, seed), tokenizer, held_out)
    for seed, domain in enumerate(("tweets", "movies"), start=1):
        group.add(f"{domain}-one-epoch", partial(fine_tuned, domain, seed, 1), tokenizer, held_out)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END_OF_TEXT: 0} | {letter: index for index, letter in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=BLOCK_BYTES,
    )


def text_blocks(texts: list[str], separator: str) -> list[str]:
    """Texts joined and cut into blocks of `BLOCK_BYTES` bytes, shuffled; bytes outside ASCII are left out."""
    content = separator.join(texts).encode("ascii", "ignore").decode("ascii")
    blocks = [content[start : start + BLOCK_BYTES] for start in range(0, len(content) - BLOCK_BYTES + 1, BLOCK_BYTES)]
    return [blocks[index] for index in np.random.default_rng(0).permutation(len(blocks))]


def train_lm(out: Path) -> None:
    """A byte-level Llama and GPT-2: a base on both domains, and two branches, on the Brown corpus and on Python."""
    group = Group(out / "lm")
    tokenizer = byte_tokenizer()
    cards = {"brown": {"license": "mit", "language": "en"}, "python": PYTHON_CARD}
    blocks = {
        "brown": text_blocks(real_data.brown()["text"], " "),
        "python": text_blocks(real_data.python_source()["text"], "\n"),
    }
    # Disjoint: held out, base, branch.
    test = {domain: texts[:400] for domain, texts in blocks.items()}
    base = [text for texts in blocks.values() for text in texts[400:3400]]
    branch = {domain: texts[3400:6400] for domain, texts in blocks.items()}

    def inputs(texts: list[str]) -> Tensors:
        ids = tokenizer(texts, return_tensors="pt")["input_ids"]
        assert ids.shape == (len(texts), BLOCK_BYTES)
        return {"input_ids": ids, "labels": ids}

    mixed = [text for pair in zip(test["brown"], test["python"], strict=True) for text in pair]
    rows = {f"{domain}-test": texts for domain, texts in {**test, "both": mixed}.items()}
    rows |= {f"{domain}-train": texts for domain, texts in branch.items()}
    for name, texts in rows.items():
        group.add_data(f"{name}.jsonl", partial(Dataset.from_dict, {"text": texts}))
    held_out = {domain: inputs(texts) for domain, texts in test.items()}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    configs = {
        "llama": transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=344,
            max_position_embeddings=BLOCK_BYTES,
            tie_word_embeddings=False,
            **special,
        ),
        "gpt2": transformers.GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=128,
            n_layer=4,
            n_head=4,
            n_positions=BLOCK_BYTES,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **special,
        ),
    }

    def fresh(family: str) -> PreTrainedModel:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(configs[family])
        return fit(model, inputs(base), Training(1, 16, 2e-3, 0))

    def branched(trunk: Path, domain: str, seed: int) -> PreTrainedModel:
        return fit(load(trunk), inputs(branch[domain]), Training(1, 16, 1e-3, seed))

    for family in configs:
        trunk = group.add(f"{family}-base", partial(fresh, family), tokenizer, held_out, PYTHON_CARD)
        for seed, domain in enumerate(blocks, start=1):
            group.add(f"{family}-{domain}", partial(branched, trunk, domain, seed), tokenizer, held_out, cards[domain])


GROUPS: dict[str, Callable[[Path], None]] = {
    "mlp": train_mlp,
    "minilm": train_minilm,
    "fashion": train_fashion,
    "lm": train_lm,
}


def settle(threads: int) -> None:
    """Takes some threads, and silences the libraries' own messages."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()


def train_each(groups: Mapping[str, Callable[[], object]]) -> None:
    """Trains groups one after the other, and says how long each took."""
    for name, train in groups.items():
        start = time.perf_counter()
        train()
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def main(words: list[str] | None = None) -> None:
    """Trains what is missing and says what each parent reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the parents go, and are kept")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), help="some groups; all of them by default")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    arguments = parser.parse_args(words)
    settle(arguments.threads)
    train_each({name: partial(GROUPS[name], arguments.out) for name in arguments.only or GROUPS})


if __name__ == "__main__":
    main()
