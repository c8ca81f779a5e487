"""Trains fine-tunes of one base in distinct and in redundant tasks, for benchmarks/which_method.py.

    python benchmarks/train_tasks.py --out DIR [--only minilm llama gpt2] [--threads 1]

What exists in DIR is kept. DIR/tasks/minilm has the bodies of all-MiniLM-L6-v2, fine-tuned with a classifier on each of
`TASKS`, one a seed; the classifiers lie in `heads`. DIR/tasks/lm has a byte-level Llama and GPT-2 and their
fine-tunes in three domains. A seed draws its own training texts, order, dropout and classifier.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import train_parents as parents
from benchmarks.train_seeds import language_config
from tests import real_data

Rows = list[tuple[str, int]]
"""Texts and their labels."""

TRAIN, VALIDATION, TEST = 480, 80, 120
"""Texts of a task and seed: to train a model on, to choose parameters of a merge on, and to measure it on."""

WORDS = range(4, 15)
"""How many a text has, so that a fine-tune takes seconds."""

TOKENS = 20
"""Of a text, at most."""

MINILM_SEEDS = range(1, 6)
LM_SEEDS = range(1, 4)

GENRES = ("news", "learned", "romance", "hobbies")
PAST, PRESENT = {"vbd", "bed", "bedz", "hvd", "dod"}, {"vbz", "bez", "ber", "bem", "hvz", "doz"}

DOMAINS = {
    "fiction": ("fiction", "adventure", "romance", "mystery"),
    "news": ("news", "editorial", "government", "hobbies"),
    "python": (),
}
"""Domain of language models → its genres of the Brown corpus."""

BASE_BLOCKS, BRANCH_BLOCKS, LM_TEST_BLOCKS = 400, 200, 80
"""Blocks of 256 bytes: of each domain for the base, for a fine-tune, and held out, half of them for validation."""


@dataclass(frozen=True)
class Task:
    """What a classifier is to tell.

    Attributes:
        labels: How many there are.
        rows: Whether texts are held out → all of them.
    """

    labels: int
    rows: Callable[[bool], Rows]


@cache
def brown_rows(held_out: bool) -> list[dict[str, str]]:
    """Short sentences of the Brown corpus; those of every fifth document are held out."""
    corpus = real_data.brown()
    chosen = {name: index % 5 == 0 for index, name in enumerate(sorted(set(corpus["document"])))}
    return [row for row in corpus if chosen[row["document"]] == held_out and len(row["text"].split()) in WORDS]


def sentiment(domain: str, held_out: bool) -> Rows:
    """Negative or positive."""
    data = real_data.sentiment(domain).shuffle(seed=0)
    rows = [row for row in zip(data["text"], data["label"], strict=True) if len(row[0].split()) in WORDS]
    return rows[: len(rows) // 3] if held_out else rows[len(rows) // 3 :]


def source(held_out: bool) -> Rows:
    """Tweet, film review, product review or editorial."""
    return [
        (text, label)
        for label, domain in enumerate(real_data.SENTIMENT_DOMAINS)
        for text, _ in sentiment(domain, held_out)
    ]


def genre(held_out: bool) -> Rows:
    """The genre of a sentence, from documents that are not among those of the training."""
    return [(row["text"], GENRES.index(row["genre"])) for row in brown_rows(held_out) if row["genre"] in GENRES]


def tense(held_out: bool) -> Rows:
    """Past or present, of sentences whose finite verbs have one tense: SentEval's task Tense."""
    rows = []
    for row in brown_rows(held_out):
        tags = set(row["tags"].split())
        if bool(tags & PAST) != bool(tags & PRESENT):
            rows.append((row["text"], int(bool(tags & PRESENT))))
    return rows


def question(held_out: bool) -> Rows:
    """Whether a sentence is a question, its last mark taken away."""
    ends = {".": 0, "?": 1}
    return [(row["text"][:-1], ends[row["text"][-1]]) for row in brown_rows(held_out) if row["text"][-1] in ends]


TASKS = {
    "movies": Task(2, partial(sentiment, "movies")),
    "source": Task(4, source),
    "genre": Task(len(GENRES), genre),
    "tense": Task(2, tense),
    "question": Task(2, question),
    "tweets": Task(2, partial(sentiment, "tweets")),
    "amazon": Task(2, partial(sentiment, "amazon")),
    "editorials": Task(2, partial(sentiment, "editorials")),
}


def balanced(rows: Rows, labels: int, count: int, seed: int) -> Rows:
    """Some rows, shuffled, with equally many of every label as far as there are."""
    generator = np.random.default_rng(seed)
    order = [rows[index] for index in generator.permutation(len(rows))]
    ranked: list[tuple[int, int, tuple[str, int]]] = []
    seen = [0] * labels
    for place, row in enumerate(order):
        ranked.append((seen[row[1]], place, row))
        seen[row[1]] += 1
    chosen = [row for _, _, row in sorted(ranked)[:count]]
    return [chosen[index] for index in generator.permutation(len(chosen))]


class Texts:
    """The texts of all tasks, as tokens."""

    def __init__(self) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(real_data.minilm())

    def inputs(self, rows: Rows) -> parents.Tensors:
        """Tokens, their masks and the labels."""
        encoded = self.tokenizer(
            [text for text, _ in rows], truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt"
        )
        return {**encoded, "labels": torch.tensor([label for _, label in rows])}

    def train(self, task: str, seed: int) -> parents.Tensors:
        """What the model of a seed is trained on."""
        return self.inputs(balanced(TASKS[task].rows(False), TASKS[task].labels, TRAIN, seed))

    def held_out(self, task: str, seed: int) -> tuple[parents.Tensors, parents.Tensors]:
        """What parameters are chosen on, and what is measured on."""
        rows = balanced(TASKS[task].rows(True), TASKS[task].labels, VALIDATION + TEST, seed)
        return self.inputs(rows[:VALIDATION]), self.inputs(rows[VALIDATION:])


def classifier(labels: int, seed: int) -> PreTrainedModel:
    """The base under a fresh classifier; the embeddings of words stay as they are in the training."""
    torch.manual_seed(seed)
    model = transformers.BertForSequenceClassification.from_pretrained(real_data.minilm(), num_labels=labels)
    model.bert.embeddings.word_embeddings.requires_grad_(False)
    return model


def train_minilm(out: Path, tasks: Sequence[str] = tuple(TASKS), seeds: Sequence[int] = MINILM_SEEDS) -> Path:
    """The base and a body and a classifier for every task and seed; returns their folder."""
    folder = out / "tasks" / "minilm"
    (folder / "heads").mkdir(parents=True, exist_ok=True)
    texts = Texts()
    if not (folder / "base").is_dir():
        save(transformers.BertModel.from_pretrained(real_data.minilm()), texts.tokenizer, folder / "base")
    for seed in seeds:
        for task in tasks:
            target = folder / f"{task}-{seed}"
            if target.is_dir():
                continue
            start = time.perf_counter()
            model = classifier(TASKS[task].labels, seed)
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # its cache would keep the first weights
                parents.fit(model, texts.train(task, seed), parents.Training(2, 16, 1e-4, seed))
            seconds = time.perf_counter() - start
            scores = parents.measure(model, texts.held_out(task, seed)[1])
            head = {name: tensor.contiguous() for name, tensor in model.classifier.state_dict().items()}
            save_file(head, folder / "heads" / f"{task}-{seed}.safetensors")
            save(model.bert, texts.tokenizer, target)
            note(folder, target.name, seconds, {task: scores})
    return folder


def save(model: PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, target: Path) -> None:
    """Writes a checkpoint; it is there as a whole or not at all."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(target)


def note(folder: Path, name: str, seconds: float, scores: dict[str, dict[str, float]]) -> None:
    """Adds a model to parents.json."""
    summary = folder / "parents.json"
    known = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    known[name] = {"seconds": round(seconds, 1), "held_out": scores}
    summary.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    print(f"{folder / name}: {seconds:.0f} s, {json.dumps(scores)}", flush=True)


class Blocks:
    """The texts of all domains, in blocks of bytes."""

    def __init__(self) -> None:
        self.tokenizer = parents.byte_tokenizer()
        corpus = real_data.brown()
        self._blocks = {}
        for domain, genres in DOMAINS.items():
            texts = [text for text, name in zip(corpus["text"], corpus["genre"], strict=True) if name in genres]
            source = texts or real_data.python_source()["text"]
            self._blocks[domain] = parents.text_blocks(source, " " if texts else "\n")

    def inputs(self, blocks: Sequence[str]) -> parents.Tensors:
        """Their tokens."""
        ids = self.tokenizer(list(blocks), return_tensors="pt")["input_ids"]
        return {"input_ids": ids, "labels": ids}

    def base(self) -> parents.Tensors:
        """What the base is trained on: all domains alike."""
        parts = (blocks[LM_TEST_BLOCKS : LM_TEST_BLOCKS + BASE_BLOCKS] for blocks in self._blocks.values())
        return self.inputs([block for part in parts for block in part])

    def train(self, domain: str, seed: int) -> parents.Tensors:
        """What the fine-tune of a seed is trained on; seeds share as little as the domain's size allows."""
        rest = self._blocks[domain][LM_TEST_BLOCKS + BASE_BLOCKS :]
        first = (seed - LM_SEEDS[0]) * BRANCH_BLOCKS
        return self.inputs([rest[(first + index) % len(rest)] for index in range(BRANCH_BLOCKS)])

    def held_out(self, domain: str) -> tuple[parents.Tensors, parents.Tensors]:
        """What parameters are chosen on, and what is measured on."""
        blocks = self._blocks[domain]
        middle = LM_TEST_BLOCKS // 2
        return self.inputs(blocks[:middle]), self.inputs(blocks[middle:LM_TEST_BLOCKS])


def train_language(out: Path, family: str, seeds: Sequence[int] = LM_SEEDS) -> Path:
    """A base and its fine-tunes for every domain and seed; returns their folder."""
    group = parents.Group(out / "tasks" / "lm")
    blocks = Blocks()
    held_out = {domain: blocks.held_out(domain)[1] for domain in DOMAINS}

    def fresh() -> PreTrainedModel:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(language_config(family, len(blocks.tokenizer)))
        return parents.fit(model, blocks.base(), parents.Training(1, 16, 2e-3, 0))

    def branch(domain: str, seed: int) -> PreTrainedModel:
        return parents.fit(parents.load(trunk), blocks.train(domain, seed), parents.Training(1, 16, 1e-3, seed))

    trunk = group.add(f"{family}-base", fresh, blocks.tokenizer, held_out)
    for seed in seeds:
        for domain in DOMAINS:
            group.add(f"{family}-{domain}-{seed}", partial(branch, domain, seed), blocks.tokenizer, held_out)
    return group.folder


GROUPS = ("minilm", "llama", "gpt2")


def train(group: str, out: Path, seeds: Sequence[int] | None = None) -> Path:
    """Trains what is missing of a group, or of some seeds of it; returns its folder."""
    if group == "minilm":
        return train_minilm(out, seeds=seeds or MINILM_SEEDS)
    return train_language(out, group, seeds or LM_SEEDS)


def main(words: list[str] | None = None) -> None:
    """Trains what is missing and says what each model reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the models go, and are kept")
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="some groups; all of them by default")
    parser.add_argument("--seeds", nargs="+", type=int, choices=MINILM_SEEDS, help="some seeds")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    arguments = parser.parse_args(words)
    parents.settle(arguments.threads)
    groups = arguments.only or GROUPS
    parents.train_each({name: partial(train, name, arguments.out, arguments.seeds) for name in groups})


if __name__ == "__main__":
    main()
