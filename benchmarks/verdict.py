"""Asks `hf-llfc check` about pairs that none of its thresholds was fitted on, and compares its answers with labels.

    python benchmarks/verdict.py --out DIR [--only mnist genres language]    # trains and measures; what exists is kept
    python benchmarks/verdict.py --out DIR --write                           # writes the section of results/verdict.md

The pairs are made from seeds, texts and shapes of models that `pairs.py` does not use: MLP, ResNet and ViT on MNIST,
MiniLM on genres and tenses of sentences of the Brown corpus, byte-level Llama and GPT-2 on its genres. Each pair goes
through `hf_llfc.check` as a user's would; labels are those of samples that it has not seen. Records lie in
DIR/records.jsonl, one pair a line.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_llfc
from benchmarks import train_parents as parents
from benchmarks import train_tasks as tasks
from benchmarks.calibrate import RECOMPUTED, SAMPLES, data_of, flat, key_of, opened, reliability_row, walk
from benchmarks.calibration import ANSWERS, LEFT, State, state_of, truth_of
from benchmarks.pairs import TEN_LABELS, Pair, Plan, add_variant, digit_arrays, image_inputs, ten_labels
from benchmarks.results import markdown, replace_section, require_sections
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.diagnostics import has_batch_norm
from hf_llfc.diagnostics.verdict import HARM_ERROR
from hf_llfc.evaluation.models import evaluation_mode, forward_logits
from hf_llfc.parents.data import open_data
from hf_llfc.parents.parent import Parent
from hf_llfc.pipeline.mergeability import compare_weights
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


def measure(pair: Pair) -> dict[str, Any]:
    """What `check` answers, what it takes beside bare passes, and what labels say."""
    samples, labelled = SAMPLES[pair.task]
    a, b = (open_checkpoint(each) for each in (pair.a, pair.b))
    config = data_of(pair.data, pair.task, 0, samples, labels=False)
    record: dict[str, Any] = {}
    for level, data in ((1, None), (2, config)):
        start = time.process_time()
        result = hf_llfc.check(pair.a, pair.b, level=level, data=data)
        record[f"level_{level}"] = {
            "seconds": time.process_time() - start,
            "answer": result.answer,
            "because": result.because,
            "level": result.level,
            "aligned": result.aligned,
            "signals": None if result.outputs is None else flat(result.layers, result.outputs),
        }
    start = time.process_time()
    model_a, model_b = Parent(a).load(), Parent(b).load()
    unlabelled = open_data(config, a)
    for model in (model_a, model_b, model_a):
        with evaluation_mode(model):
            for batch, _ in unlabelled.batches():
                forward_logits(model, batch)
    record["bare_seconds"] = time.process_time() - start
    truth = opened(pair.data, pair.task, pair.a, samples, samples + labelled, True)
    shown = None
    if pair.shown and has_batch_norm(model_a):
        shown = opened(pair.shown, pair.task, pair.a, 0, RECOMPUTED, True)
    record["as_is_truth"] = walk(model_a, model_b, truth, shown)
    alignment = compare_weights(a, b).alignment
    if any(count for count, _ in alignment.moved.values()):
        record["aligned_truth"] = walk(model_a, Parent(b, alignment).load(), truth, shown)
    return {**asdict(pair), **record}


@dataclass(frozen=True)
class Answered:
    """A pair, what `check` answers and what labels say.

    Attributes:
        run: The training run.
        kind: How the two are related.
        names: Of both models.
        levels: The answers of levels 1 and 2; `LEFT` where they leave the pair to labels.
        truth: What labels answer.
        harm: Points of error, and nats, by which the midpoint is worse than the better parent.
        state: Signals and barrier of the state that level 2 answered about; None where no model ran.
        times: Seconds of the processor of level 1, level 2, and three bare passes with the models opened.
    """

    run: str
    kind: str
    names: str
    levels: tuple[str, str]
    truth: str
    harm: tuple[float, float]
    state: State | None
    times: tuple[float, float, float]


def answer_in(level: Mapping[str, Any]) -> str:
    """The answer of a level; `LEFT` where it leaves the pair to labels."""
    return LEFT if level["answer"] in ("undecided", "contradict") else level["answer"]


def answered(record: dict[str, Any]) -> Answered:
    """What one line of records.jsonl says."""
    first, second = record["level_1"], record["level_2"]
    truths = {name: record[f"{name}_truth"] for name in ("as_is", "aligned") if f"{name}_truth" in record}
    state = None
    if second["signals"] is not None:
        state = state_of(second["signals"], truths["aligned" if second["aligned"] else "as_is"])
    sound = {name: truth_of(points) for name, points in truths.items()}
    as_is = sound["as_is"]
    return Answered(
        run=record["run"],
        kind=record["kind"],
        names=" + ".join(Path(record[each]).name for each in ("a", "b")),
        levels=(answer_in(first), answer_in(second)),
        truth="merge" if as_is.sound else "align" if "aligned" in sound and sound["aligned"].sound else "do not merge",
        harm=(as_is.harm_error, as_is.harm_loss),
        state=state,
        times=(first["seconds"], second["seconds"], record["bare_seconds"]),
    )


def measure_all(groups: Sequence[str], out: Path) -> None:
    """Measures the pairs that have no record yet, one line of records.jsonl each."""
    file = out / "records.jsonl"
    known = {key_of(json.loads(line)) for line in file.read_text().splitlines()} if file.is_file() else set()
    for group in groups:
        for pair in pairs_of(group, out):
            if key_of(asdict(pair)) in known:
                continue
            record = measure(pair)
            with file.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
            found = answered(record)
            print(f"{found.run}, {found.kind}, {found.names}: {found.truth}; check says {found.levels}", flush=True)


def section(found: Sequence[Answered]) -> str:
    """The section of results/verdict.md."""
    decided = [pair for pair in found if pair.levels[1] != LEFT]
    wrong = [pair for pair in decided if pair.levels[1] != pair.truth]
    left = [pair for pair in found if pair.levels[1] == LEFT]
    harmful = [pair for pair in found if pair.levels[1] == "merge" and pair.harm[0] > HARM_ERROR]
    states = [pair.state for pair in found if pair.state is not None]
    parts = [
        ("not left to labels", [state for state in states if not state.is_left]),
        ("left to labels", [state for state in states if state.is_left]),
    ]
    ran = [pair for pair in found if pair.state is not None]
    ratios = [median(pair.times[level] / pair.times[2] for pair in ran) for level in (0, 1)]
    costs = [
        {
            "run": run,
            "pairs": len(mine),
            "level 1, s": f"{median(pair.times[0] for pair in mine):.2f}",
            "level 2, s": f"{median(pair.times[1] for pair in mine):.2f}",
            "three bare passes and opening the models, s": f"{median(pair.times[2] for pair in mine):.2f}",
        }
        for run in dict.fromkeys(pair.run for pair in ran)
        if (mine := [pair for pair in ran if pair.run == run])
    ]
    faults = [
        {
            "run": pair.run,
            "kind": pair.kind,
            "pair": pair.names,
            "labels": pair.truth,
            "check": pair.levels[1],
            "midpoint over better parent, points and nats": f"{100 * pair.harm[0]:.1f}, {pair.harm[1]:.3f}",
        }
        for pair in wrong
    ]
    kinds = [
        {
            "kind": kind,
            "pairs": len(mine),
            **{truth: sum(pair.truth == truth for pair in mine) for truth in ANSWERS},
            "check agrees": sum(pair.levels[1] == pair.truth for pair in mine),
            LEFT: sum(pair.levels[1] == LEFT for pair in mine),
        }
        for kind in dict.fromkeys(pair.kind for pair in found)
        if (mine := [pair for pair in found if pair.kind == kind])
    ]
    sure = [
        f"*{answer}* {sum(pair.truth == answer for pair in mine)} of {len(mine)}"
        for answer in ANSWERS
        if (mine := [pair for pair in found if pair.levels[0] == answer])
    ]
    bold = sum(pair.levels[1] == "merge" for pair in wrong)
    agreed, would = len(decided) - len(wrong), sum(pair.truth != "do not merge" for pair in left)
    return "\n\n".join(
        [
            f"`python benchmarks/verdict.py --out DIR --write`, after a first call without `--write`. {len(found)} "
            "pairs of models that no threshold was fitted on: other seeds, shapes, texts and tasks (MLP, ResNet and "
            "ViT on MNIST, MiniLM on genres and tenses of the Brown corpus, byte-level Llama and GPT-2 on its genres). "
            "Each goes through `hf_llfc.check` with 128 samples, 32 texts of language models, without labels; what "
            "labels say is told as above, on samples that it has not seen.",
            f"**Level 2** decides {len(decided)} pairs and agrees with labels in {agreed} "
            f"({agreed / len(decided):.1%}). It merges {bold} against the labels, and {len(harmful)} of which the "
            f"midpoint is more than five points worse than the better parent. {len(left)} it leaves to labels, since "
            "the parents contradict each other or disagree in much, or one is at chance; of these labels would "
            f"merge {would}, as they are or aligned.\n\n{confusion(found, 1)}",
            "The limit on what the ensemble gains was 0.3 nats for all when the pairs of MNIST were first seen; one "
            "of them (vit-a-101 + vit-first-101, 0.27 nats) was merged and should not have been. A tenth of the log of "
            "the classes became a limit too, and all pairs were asked again; those of texts had not been seen.",
            f"What it gets wrong:\n\n{markdown(faults)}" if faults else "It gets none wrong.",
            "**The estimate of the barrier** against the barrier that labels show at the midpoint:\n\n"
            + markdown([reliability_row(name, part) for name, part in parts if len(part) > 1]),
            f"**Level 1** answers as labels do, by its answer: {', '.join(sure)}.\n\n{confusion(found, 0)}",
            f"Time of the processor, medians. Level 2 takes {ratios[1]:.2f} times what three bare passes and opening "
            f"the models take, level 1 {ratios[0]:.2f} times.\n\n{markdown(costs)}",
            f"By kind:\n\n{markdown(kinds)}",
        ]
    )


def confusion(found: Sequence[Answered], level: int) -> str:
    """Truth in rows, answers in columns."""
    counts = Counter((pair.truth, pair.levels[level]) for pair in found)
    return markdown(
        [
            {"labels say": truth, **{f"check says {answer}": counts[truth, answer] for answer in (*ANSWERS, LEFT)}}
            for truth in ANSWERS
        ]
    )


def main(words: list[str] | None = None) -> None:
    """Trains and measures what is missing, or writes the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where all goes, and is kept")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), help="some groups; all of them by default")
    parser.add_argument("--write", action="store_true", help="write results/verdict.md; measures nothing")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    arguments = parser.parse_args(words)
    if arguments.write:
        require_sections("verdict-held-out")
        lines = (arguments.out / "records.jsonl").read_text().splitlines()
        text = section([answered(json.loads(line)) for line in lines])
        replace_section("verdict-held-out", text)
        print(text)
        return
    parents.settle(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    measure_all(arguments.only or list(GROUPS), arguments.out)


if __name__ == "__main__":
    main()
