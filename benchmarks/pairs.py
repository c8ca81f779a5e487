"""Makes the pairs of models on which the verdict of `hf-llfc check` is calibrated, from fixed seeds.

    python benchmarks/pairs.py --parents DIR --out DIR [--only digits bert lm] [--threads 1]

DIR of --parents is what `train_parents.py` wrote; small parents of many more runs are trained into --out, and what
exists is kept. Then variants of parents are written beside them, moved along every symmetric axis or damaged, and
pairs.json lists every pair with its kind, its run and the data that `calibrate.py` measures it on.
"""

import argparse
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.train_parents import (
    BLOCK_BYTES,
    FASHION_MEAN,
    FASHION_STD,
    HELD_OUT,
    SENTENCE_TOKENS,
    SENTENCES,
    Group,
    Tensors,
    Training,
    byte_tokenizer,
    fashion_processor,
    fit,
    load,
    settle,
    text_blocks,
    train_each,
)
from hf_llfc.adapters import spec_for
from tests import real_data
from tests.mlp_model import MLPConfig, MLPForImageClassification

DIGITS_HELD_OUT = 2000
TEN_LABELS = [str(label) for label in range(10)]


@dataclass(frozen=True)
class Plan:
    """How the models of one architecture descend from one another.

    Attributes:
        make: A fresh model; the weights follow from torch's seed.
        epochs: Of a path from a fresh model to its end.
        batch_size: Samples a step.
        learning_rate: Of a fresh model; half of it for what starts from a trained one.
    """

    make: Callable[[], PreTrainedModel]
    epochs: int
    batch_size: int
    learning_rate: float

    def fresh(self, inputs: Tensors, *, seed: int, order: int | None = None, epochs: int | None = None):
        """A model from its own start; the seed of the order of the data may be another."""
        torch.manual_seed(seed)
        rate = self.learning_rate
        chosen = Training(epochs or self.epochs, self.batch_size, rate, seed if order is None else order)
        return fit(self.make(), inputs, chosen)

    def onward(self, trunk: Path, inputs: Tensors, *, order: int, epochs: int):
        """A model that starts where another one ended."""
        return fit(load(trunk), inputs, Training(epochs, self.batch_size, self.learning_rate / 2, order))


def ten_labels() -> dict[str, object]:
    """Ten classes by number, whatever they show: heads of models of different tasks then have equal shapes."""
    return {"id2label": dict(enumerate(TEN_LABELS)), "label2id": {name: int(name) for name in TEN_LABELS}}


def digit_arrays() -> tuple[np.ndarray, np.ndarray]:
    """The MNIST subset in a fixed random order: images [sample, 28, 28] and labels [sample]."""
    rows = real_data.mnist()
    order = np.random.default_rng(0).permutation(len(rows))
    images = np.stack([np.asarray(image, dtype=np.uint8) for image in rows["image"]])
    return images[order], np.array(rows["label"])[order]


def image_inputs(images: np.ndarray, labels: np.ndarray) -> Tensors:
    """Images as `fashion_processor` prepares them."""
    pixels = (torch.from_numpy(images.astype(np.float32)) / 255 - FASHION_MEAN) / FASHION_STD
    return {"pixel_values": pixels.unsqueeze(1), "labels": torch.from_numpy(labels).long()}


def train_digits(out: Path) -> None:
    """MLP, ResNet and ViT on handwritten digits: spawned at four steps, independent, half tasks, another task."""
    group = Group(out / "digits")
    images, labels = digit_arrays()
    shown, held = slice(DIGITS_HELD_OUT, None), slice(0, DIGITS_HELD_OUT)
    clothes, clothes_labels = real_data.fashion_mnist_arrays("train")
    other, other_labels = real_data.fashion_mnist_arrays("test")
    train = image_inputs(images[shown], labels[shown])
    tasks = {
        "digits": train,
        "low": image_inputs(images[shown][labels[shown] < 5], labels[shown][labels[shown] < 5]),
        "high": image_inputs(images[shown][labels[shown] >= 5], labels[shown][labels[shown] >= 5]),
        "clothes": image_inputs(clothes[:8000], clothes_labels[:8000]),
    }
    held_out = {
        "test": image_inputs(images[held], labels[held]),
        "clothes": image_inputs(other[:2000], other_labels[:2000]),
    }
    rows = {
        "test": (images[held], labels[held]),
        "train": (images[shown], labels[shown]),
        "both-test": (
            np.concatenate([images[held], other[:2000]]),
            np.concatenate([labels[held], other_labels[:2000]]),
        ),
        "both-train": (
            np.concatenate([images[shown][:2000], clothes[:2000]]),
            np.concatenate([labels[shown][:2000], clothes_labels[:2000]]),
        ),
    }
    for name, (pictures, classes) in rows.items():
        group.add_data(f"{name}.parquet", partial(real_data.image_dataset, pictures, classes, TEN_LABELS))
    vit = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=28,
        patch_size=7,
        num_channels=1,
        **ten_labels(),
    )
    resnet = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[1, 1, 1],
        layer_type="basic",
        **ten_labels(),
    )
    mlp = MLPConfig(hidden_sizes=(256, 256), **ten_labels())
    plans = {
        "mlp": Plan(partial(MLPForImageClassification, mlp), 8, 64, 1e-3),
        "vit": Plan(partial(transformers.ViTForImageClassification, vit), 12, 64, 1e-3),
        "resnet": Plan(partial(transformers.ResNetForImageClassification, resnet), 6, 64, 3e-3),
    }
    for family, plan in plans.items():

        def add(name: str, make: Callable[[], PreTrainedModel], family: str = family) -> Path:
            return group.add(f"{family}-{name}", make, fashion_processor(), held_out)

        early = add("early", partial(plan.fresh, train, seed=0, epochs=1))
        late = add("late", partial(plan.onward, early, train, order=1, epochs=plan.epochs - 2))
        for letter, order in (("a", 11), ("b", 12)):
            add(f"start-{letter}", partial(plan.fresh, train, seed=0, order=order))
            add(f"early-{letter}", partial(plan.onward, early, train, order=order, epochs=plan.epochs - 1))
            add(f"late-{letter}", partial(plan.onward, late, train, order=order, epochs=2))
            add(f"independent-{letter}", partial(plan.fresh, train, seed=order))
        for order, task in enumerate(("low", "high", "clothes"), start=21):
            add(task, partial(plan.onward, late, tasks[task], order=order, epochs=3))


def sentence_inputs(tokenizer: transformers.PreTrainedTokenizerBase, rows: Dataset) -> Tensors:
    """Sentences as a classifier takes them."""
    encoded = tokenizer(
        list(rows["text"]), truncation=True, max_length=SENTENCE_TOKENS, padding="max_length", return_tensors="pt"
    )
    return {**encoded, "labels": torch.tensor(rows["label"])}


def sentences() -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """Training and held-out sentences by domain, as `train_parents.py` splits them, and the task of their origin.

    Of `origin` the label says whether a sentence is a tweet or from an editorial: a task of equal shape to sentiment.
    """
    train, test = {}, {}
    for domain in real_data.SENTIMENT_DOMAINS:
        rows = real_data.sentiment(domain).shuffle(seed=0)
        train[domain] = rows.select(range(SENTENCES))
        test[domain] = rows.select(range(SENTENCES, SENTENCES + HELD_OUT))
    for part in (train, test):
        part["all"] = concatenate_datasets([part[domain] for domain in real_data.SENTIMENT_DOMAINS]).shuffle(seed=0)
        part["origin"] = Dataset.from_dict(
            {
                "text": [*part["tweets"]["text"], *part["editorials"]["text"]],
                "label": [0] * len(part["tweets"]) + [1] * len(part["editorials"]),
            }
        ).shuffle(seed=0)
    return train, test


def two_labels() -> dict[str, object]:
    """Names of the two classes, as a config holds them."""
    return {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}


def add_sentences(group: Group, test: dict[str, Dataset]) -> None:
    """Held-out sentences of each domain, of all, and of both tasks together."""

    def plain(rows: Dataset) -> Dataset:
        return Dataset.from_dict({"text": list(rows["text"]), "label": list(rows["label"])})

    for name, rows in test.items():
        group.add_data(f"{name}-test.jsonl", partial(plain, rows))
    both = {"text": [*test["all"]["text"][:1800], *test["origin"]["text"]]}
    both["label"] = [*test["all"]["label"][:1800], *test["origin"]["label"]]
    group.add_data("both-test.jsonl", partial(Dataset.from_dict, both))


def train_bert(out: Path) -> None:
    """A BERT of two layers from scratch, on sentences of four domains: two bases, branches of domains and of a task."""
    group = Group(out / "bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_data.minilm())
    train, test = sentences()
    inputs = {name: sentence_inputs(tokenizer, rows) for name, rows in train.items()}
    held_out = {name: sentence_inputs(tokenizer, test[name]) for name in ("all", "origin")}
    add_sentences(group, test)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        **two_labels(),
    )
    plan = Plan(partial(transformers.BertForSequenceClassification, config), 3, 32, 1e-3)
    for seed in (0, 1):
        base = group.add(f"base-{seed}", partial(plan.fresh, inputs["all"], seed=seed), tokenizer, held_out)
        branches = ("tweets", "movies") if seed else ("tweets", "movies", "amazon", "editorials", "origin")
        for order, name in enumerate(branches, start=1):
            make = partial(plan.onward, base, inputs[name], order=order, epochs=2)
            group.add(f"{name}-{seed}", make, tokenizer, held_out)
        make = partial(plan.onward, base, inputs["tweets"], order=9, epochs=2)
        group.add(f"tweets-again-{seed}", make, tokenizer, held_out)


def train_lm(out: Path) -> None:
    """Byte-level Llama and GPT-2 of two layers: two bases, branches of two domains, and two spawned early."""
    group = Group(out / "lm")
    tokenizer = byte_tokenizer()
    blocks = {
        "brown": text_blocks(real_data.brown()["text"], " "),
        "python": text_blocks(real_data.python_source()["text"], "\n"),
    }
    test = {domain: texts[:400] for domain, texts in blocks.items()}
    base = [text for texts in blocks.values() for text in texts[400:2900]]
    branch = {domain: texts[2900:4900] for domain, texts in blocks.items()}

    def inputs(texts: list[str]) -> Tensors:
        ids = tokenizer(texts, return_tensors="pt")["input_ids"]
        return {"input_ids": ids, "labels": ids}

    mixed = [text for pair in zip(test["brown"], test["python"], strict=True) for text in pair]
    for name, texts in {**test, "both": mixed}.items():
        group.add_data(f"{name}-test.jsonl", partial(Dataset.from_dict, {"text": texts}))
    held_out = {domain: inputs(texts[:100]) for domain, texts in test.items()}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    configs = {
        "llama": transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=172,
            max_position_embeddings=BLOCK_BYTES,
            tie_word_embeddings=False,
            **special,
        ),
        "gpt2": transformers.GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=BLOCK_BYTES,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **special,
        ),
    }
    for family, config in configs.items():
        plan = Plan(partial(transformers.AutoModelForCausalLM.from_config, config), 1, 16, 3e-3)
        for seed in (0, 1):
            trunk = group.add(
                f"{family}-base-{seed}", partial(plan.fresh, inputs(base), seed=seed), tokenizer, held_out
            )
            for order, domain in enumerate(blocks, start=1):
                make = partial(plan.onward, trunk, inputs(branch[domain]), order=order, epochs=1)
                group.add(f"{family}-{domain}-{seed}", make, tokenizer, held_out)
        early = group.add(f"{family}-early", partial(plan.fresh, inputs(base[::8]), seed=2), tokenizer, held_out)
        for letter, order in (("a", 11), ("b", 12)):
            make = partial(plan.onward, early, inputs(base), order=order, epochs=1)
            group.add(f"{family}-early-{letter}", make, tokenizer, held_out)


@dataclass(frozen=True)
class Pair:
    """Two models whose verdict is compared with labels.

    Attributes:
        run: The training run that both come from; pairs are held out by it.
        family: The architecture.
        kind: How the two are related.
        a: Folder of the first model.
        b: Folder of the second.
        task: What both do.
        data: Labelled samples of all that either was trained for.
        shown: Samples from which batch normalization is recomputed; None where there is none.
    """

    run: str
    family: str
    kind: str
    a: str
    b: str
    task: str
    data: str
    shown: str | None = None


DAMAGES = ("moved", "noise-0.1", "noise-0.5", "noise-2", "fresh", "zeroed", "scaled", "swapped")
"""What is done to the second model of a pair. It is moved along every symmetric axis, which changes its coordinates
alone, or its middle block is damaged: gaussian noise of some standard deviations of each matrix, matrices drawn anew,
the largest one zeroed, all four times too large, or the block exchanged with the next one, where shapes allow it."""


HEAD_DAMAGES = ("relabelled", "negated")
"""What is done to the head of a classifier: its classes are in another order, or it answers the opposite of what it
knows. Both parents are as good as before, and contradict each other."""

LARGE_RUNS, LARGE_DAMAGES = ("minilm", "bytes-llama", "bytes-gpt2"), ("moved", "fresh", "swapped")
"""Runs whose models take longest to measure, and what is done to them."""


def blocks_of(state: dict[str, torch.Tensor]) -> list[dict[str, str]]:
    """Tensors of every repeated block, by their name inside the block."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for name in state:
        match = re.match(r"(.*?)\.(\d+)\.(.*)", name)
        if match is not None:
            found.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = name
    blocks = max(found.values(), key=lambda stack: sum(len(block) for block in stack.values()))
    return [blocks[number] for number in sorted(blocks)]


def damaged(state: dict[str, torch.Tensor], damage: str) -> dict[str, torch.Tensor] | None:
    """A copy of the tensors with one of the damages but `moved`; None where no two blocks can be exchanged."""
    generator = torch.Generator().manual_seed(0)
    blocks = blocks_of(state)
    middle = min(len(blocks) // 2, len(blocks) - 1)
    matrices = [name for name in blocks[middle].values() if state[name].ndim > 1]
    changed = dict(state)
    kind, _, amount = damage.partition("-")
    if kind in HEAD_DAMAGES:
        heads = [name for name in state if state[name].ndim == 2 and "embeddings" not in name]
        head = min(heads, key=lambda name: len(state[name]))
        for name in (head, f"{head.removesuffix('weight')}bias"):
            changed[name] = state[name].roll(1, 0) if kind == "relabelled" else -state[name]
    elif kind == "swapped":
        shapes = [{inside: state[name].shape for inside, name in block.items()} for block in blocks]
        places = [place for place in range(len(blocks) - 1) if shapes[place] == shapes[place + 1]]
        if not places:
            return None
        first, second = blocks[places[len(places) // 2]], blocks[places[len(places) // 2] + 1]
        for inside in first:
            changed[first[inside]], changed[second[inside]] = state[second[inside]], state[first[inside]]
    elif kind == "zeroed":
        largest = max(matrices, key=lambda name: state[name].numel())
        changed[largest] = torch.zeros_like(state[largest])
    else:
        for name in matrices:
            tensor = state[name]
            noise = torch.randn(tensor.shape, generator=generator) * tensor.std()
            if kind == "noise":
                changed[name] = tensor + float(amount) * noise
            else:
                changed[name] = noise if kind == "fresh" else 4 * tensor
    return {name: tensor.clone().contiguous() for name, tensor in changed.items()}


def add_variant(source: Path, target: Path, damage: str) -> Path | None:
    """Writes a checkpoint with one of the damages, or keeps the one that exists."""
    if (target / "config.json").is_file():
        return target
    state = load_file(source / "model.safetensors")
    if damage == "moved":
        spec = spec_for(transformers.AutoConfig.from_pretrained(source))
        changed = spec.random_alignment(torch.Generator().manual_seed(0)).apply(state)
    else:
        found = damaged(state, damage)
        if found is None:
            return None
        changed = found
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(source, unfinished)
    save_file(
        {name: tensor.contiguous() for name, tensor in changed.items()},
        unfinished / "model.safetensors",
        {"format": "pt"},
    )
    unfinished.rename(target)
    return target


def related(parents: Path, out: Path) -> list[Pair]:
    """All pairs of trained models, with how they are related."""
    pairs: list[Pair] = []

    def add(run: str, family: str, folder: Path, task: str, data: Path, rows: str, shown: Path | None = None) -> None:
        for row in rows.split(";"):
            kind, a, b = row.split()
            folders = (str(name if "/" in name else folder / name) for name in (a, b))
            pairs.append(Pair(run, family, kind, *folders, task, str(data), None if shown is None else str(shown)))

    images = "image-classification"
    clothes = parents / "mlp" / "data" / "test.parquet"
    for run, seeds in (("fashion-mlp-adam", range(4)), ("fashion-mlp-sgd", range(4, 8))):
        rows = ";".join(f"independent seed-{a} seed-{b}" for a, b in combinations(seeds, 2))
        add(run, "mlp", parents / "mlp", images, clothes, rows)
    shown = parents / "fashion" / "data" / "train.parquet"
    for family in ("resnet", "vit"):
        rows = (
            "spawned *-spawned-a *-spawned-b;steps *-trunk *-spawned-a;independent *-independent-a *-independent-b;"
            "independent *-spawned-a *-independent-a;independent *-spawned-b *-independent-b"
        ).replace("*", family)
        add(f"fashion-{family}", family, parents / "fashion", images, clothes, rows, shown)
    for family in ("mlp", "resnet", "vit"):
        rows = (
            "spawned *-start-a *-start-b;spawned *-early-a *-early-b;spawned *-late-a *-late-b;"
            "steps *-early *-late;steps *-early-a *-late-a;steps *-late *-late-b;"
            "independent *-independent-a *-independent-b;independent *-late-a *-independent-a;"
            "data *-low *-high;data *-late *-low"
        ).replace("*", family)
        folder = out / "digits"
        shown = folder / "data" / "train.parquet"
        add(f"digits-{family}", family, folder, images, folder / "data" / "test.parquet", rows, shown)
        rows = "task *-late *-clothes;task *-low *-clothes".replace("*", family)
        both = folder / "data" / "both-test.parquet"
        add(f"digits-{family}", family, folder, images, both, rows, folder / "data" / "both-train.parquet")

    sentiment = "text-classification"
    test = out / "bert" / "data" / "all-test.jsonl"
    rows = (
        "data tweets-0 movies-0;data amazon-0 editorials-0;data tweets-0 amazon-0;data movies-0 editorials-0;"
        "spawned tweets-0 tweets-again-0;spawned tweets-1 tweets-again-1;steps base-0 tweets-0;steps base-1 movies-1;"
        "data tweets-1 movies-1;bases base-0 base-1;bases tweets-0 tweets-1;bases tweets-0 movies-1"
    )
    add("bert", "bert", out / "bert", sentiment, test, rows)
    rows = "task movies-0 origin-0;task base-0 origin-0"
    add("bert", "bert", out / "bert", sentiment, test.with_name("both-test.jsonl"), rows)
    rows = "data tweets movies;data amazon editorials;data tweets editorials;steps base movies"
    add("minilm", "bert", parents / "minilm", sentiment, test, rows)

    writing = "text-generation"
    for family in ("llama", "gpt2"):
        rows = "data *-brown *-python;steps *-base *-brown;steps *-base *-python".replace("*", family)
        test = parents / "lm" / "data" / "both-test.jsonl"
        add(f"bytes-{family}", family, parents / "lm", writing, test, rows)
        rows = (
            "data *-brown-0 *-python-0;data *-brown-1 *-python-1;steps *-base-0 *-brown-0;"
            "steps *-base-0 *-python-0;bases *-base-0 *-base-1;bases *-brown-0 *-brown-1;"
            "bases *-brown-0 *-python-1;spawned *-early-a *-early-b;steps *-early *-early-a"
        ).replace("*", family)
        test = out / "lm" / "data" / "both-test.jsonl"
        add(f"small-{family}", family, out / "lm", writing, test, rows)
    return pairs


def variants(pairs: list[Pair], out: Path) -> list[Pair]:
    """One pair of every run, its second model moved or damaged, and a copy of a model that was."""
    found = []
    for run in dict.fromkeys(pair.run for pair in pairs):
        mine = [pair for pair in pairs if pair.run == run]
        close = next((pair for pair in mine if pair.kind in ("spawned", "data")), None)
        first, second = (mine[0].a, mine[0].a) if close is None else (close.a, close.b)
        pattern = mine[0] if close is None else close
        damages = LARGE_DAMAGES if run in LARGE_RUNS else DAMAGES
        for damage in damages if pattern.task == "text-generation" else (*damages, *HEAD_DAMAGES):
            target = out / "variants" / run / f"{Path(second).name}-{damage}"
            target.parent.mkdir(parents=True, exist_ok=True)
            if add_variant(Path(second), target, damage) is not None:
                found.append(replace(pattern, kind=damage, a=first, b=str(target)))
        if run in MOVED_STRANGERS:
            strangers = next(pair for pair in mine if pair.kind in ("independent", "bases"))
            target = out / "variants" / run / f"{Path(strangers.b).name}-moved"
            add_variant(Path(strangers.b), target, "moved")
            found.append(replace(strangers, kind="independent-moved", b=str(target)))
    return found


MOVED_STRANGERS = ("fashion-mlp-adam", "digits-mlp", "digits-vit", "bert", "small-gpt2")


def main(words: list[str] | None = None) -> None:
    """Trains what is missing, then writes the variants and the list of pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parents", type=Path, required=True, metavar="DIR", help="what train_parents.py wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the rest goes, and is kept")
    groups = {
        "digits": train_digits,
        "bert": train_bert,
        "lm": train_lm,
    }
    parser.add_argument("--only", nargs="*", choices=list(groups), help="train some groups; all of them by default")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    arguments = parser.parse_args(words)
    settle(arguments.threads)
    chosen = groups if arguments.only is None else arguments.only
    train_each({name: partial(groups[name], arguments.out) for name in chosen})
    pairs = related(arguments.parents.resolve(), arguments.out.resolve())
    pairs += variants(pairs, arguments.out.resolve())
    listed = json.dumps([asdict(pair) for pair in pairs], indent=1)
    (arguments.out / "pairs.json").write_text(listed + "\n", encoding="utf-8")
    kinds = Counter(pair.kind for pair in pairs)
    print(f"{len(pairs)} pairs: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}", flush=True)


if __name__ == "__main__":
    main()
