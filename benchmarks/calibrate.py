"""Measures the pairs of `pairs.py` with and without labels, and how often `hf-llfc check` answers as the labels do.

    python benchmarks/calibrate.py --pairs DIR                # measures what is missing
    python benchmarks/calibrate.py --pairs DIR --write        # fits, and writes the section of results/verdict.md

Records lie in DIR/records.jsonl, one pair a line, and are kept. `calibration.py` says what counts as sound.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset, disable_progress_bars, load_dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tests.mlp_model  # noqa: F401  registers the MLP
from benchmarks.calibration import (
    ANSWERS,
    HELD_OUT,
    LEFT,
    RULES,
    Example,
    Rule,
    State,
    Thresholds,
    auc,
    auc_interval,
    example_of,
    fitted,
    margin_share,
    passes,
    reliability,
)
from benchmarks.results import markdown, replace_section
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.diagnostics import has_batch_norm, recompute_batch_norm
from hf_llfc.diagnostics.combination import CombinedModel
from hf_llfc.diagnostics.rows import UNSURE_NATS, UNSURE_SHARE, LayerRow, OutputAgreement
from hf_llfc.diagnostics.verdict import (
    BASELINE_LIMIT,
    DISAGREEMENT_LIMIT,
    DIVERGENCE_LIMIT,
    ERROR_BARRIER_TOLERANCE,
    GAIN_LIMIT,
    GAIN_SHARE,
    HARM_ERROR,
    HARM_LOSS,
    INFORMATION_LIMIT,
    LOSS_BARRIER_TOLERANCE,
    judge_weights,
)
from hf_llfc.evaluation import EvaluationConfig, EvaluationData
from hf_llfc.evaluation.models import evaluate_model
from hf_llfc.parents.data import open_data
from hf_llfc.parents.parent import Parent
from hf_llfc.pipeline.closeness import FAR_APART
from hf_llfc.pipeline.mergeability import HEADS_APART, compare_features, compare_weights

TRUTH_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
RECOMPUTED = 512
SAMPLES = {
    "image-classification": (128, 2000),
    "text-classification": (128, 800),
    "text-generation": (32, 160),
    "minilm": (128, 400),
}
"""By task or run: without labels for the signals, and others with labels for the barrier. MiniLM takes longest; a text
of a language model is 256 bytes."""

HOMES: dict[str, str] = {}
"""Of every run, the model whose tokenizer or processor its data are read with."""


def rows_of(path: str) -> Dataset:
    """A data file in a fixed random order."""
    kind = "parquet" if path.endswith(".parquet") else "json"
    rows = load_dataset(kind, data_files=path, split="train")
    return rows.select(np.random.default_rng(0).permutation(len(rows)))


def remembered(data: EvaluationData) -> EvaluationData:
    """Data whose batches are made once; they are read many times here."""
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def encode(positions: np.ndarray) -> dict[str, torch.Tensor]:
        if positions[0] not in kept:
            kept[positions[0]] = data.encode(positions)
        return kept[positions[0]]

    return replace(data, encode=encode)


def data_of(path: str, task: str, first: int, last: int, *, labels: bool) -> EvaluationConfig:
    """Some rows of a data file."""
    rows = rows_of(path)
    rows = rows.select(range(first, min(last, len(rows))))
    batch = 64 if task == "image-classification" else 32
    text = {"blocks": False, "max_length": 256} if task == "text-generation" else {}
    return EvaluationConfig(task, rows, batch_size=batch, labels=labels, **text)


@cache
def opened(path: str, task: str, model: str, first: int, last: int, labels: bool) -> EvaluationData:
    """Some rows of a data file as a model takes them."""
    return remembered(open_data(data_of(path, task, first, last, labels=labels), open_checkpoint(model)))


def measure(pair: dict) -> dict:
    """Signals without labels on some samples, and barriers with labels on others."""
    start = time.perf_counter()
    samples, labelled = SAMPLES.get(pair["run"]) or SAMPLES[pair["task"]]
    a, b = (open_checkpoint(pair[name]) for name in ("a", "b"))
    # Models of one run share tokenizer and processor.
    common = (pair["data"], pair["task"], HOMES.setdefault(pair["run"], pair["a"]))
    unlabelled = opened(*common, 0, samples, labels=False)
    truth = opened(*common, samples, samples + labelled, labels=True)
    weights = compare_weights(a, b)
    record = {
        "weights": {
            "cosine": weights.cosine,
            "cosine_before": weights.alignment.metadata["cosine_before"],
            "cosine_after": weights.alignment.metadata["cosine_after"],
            "swept": weights.swept,
            "gain": weights.gain,
            "moved": weights.moved,
            "units": weights.units,
            "heads_apart": weights.heads_apart,
            "tensors": [asdict(row) for row in weights.tensors],
        }
    }
    model_a = Parent(a).load()
    shown = None
    if pair["shown"] and has_batch_norm(model_a):
        shown = opened(pair["shown"], *common[1:], 0, RECOMPUTED, labels=True)
    record["weights_s"] = time.perf_counter() - start
    states = {"as_is": Parent(b)} | ({"aligned": Parent(b, weights.alignment)} if weights.moved else {})
    for state, parent in states.items():
        model_b = parent.load()
        begin = time.perf_counter()
        found = compare_features(model_a, model_b, unlabelled)
        assert found.outputs is not None
        record[state] = flat(found.layers, found.outputs)
        record[f"{state}_s"] = time.perf_counter() - begin
        record[f"{state}_truth"] = walk(model_a, model_b, truth, shown)
    return {**pair, **record, "seconds": time.perf_counter() - start}


def flat(layers: Sequence[LayerRow], outputs: OutputAgreement) -> dict:
    """Evidence of features as JSON values."""
    rows = [
        {
            "layer": row.layer,
            "llfc": row.llfc.mean,
            "baseline": row.baseline.mean,
            "coefficient": row.coefficient.mean,
        }
        for row in layers
    ]
    return {"layers": rows, "outputs": asdict(outputs)}


def walk(model_a, model_b, data, shown) -> list[dict]:
    """Loss and error along the line, batch normalization recomputed inside."""
    path = CombinedModel((model_a, model_b))
    points = []
    for alpha in TRUTH_ALPHAS:
        path.move_to((alpha, 1 - alpha))
        if shown is not None and 0 < alpha < 1:
            recompute_batch_norm(path.model, shown.batches())
        result = evaluate_model(path.model, data)
        points.append({"alpha": alpha, "loss": result.loss, "error": result.error})
    return points


def key_of(pair: dict) -> tuple:
    """What tells one pair from another."""
    return pair["run"], pair["kind"], pair["a"], pair["b"], pair["data"]


def measure_all(folder: Path, runs: list[str] | None) -> None:
    """Measures the pairs that have no record yet, one line of records.jsonl each."""
    file = folder / "records.jsonl"
    known = {key_of(json.loads(line)) for line in file.read_text().splitlines()} if file.is_file() else set()
    for pair in json.loads((folder / "pairs.json").read_text()):
        if key_of(pair) in known or (runs and pair["run"] not in runs):
            continue
        record = measure(pair)
        with file.open("a") as out:
            out.write(json.dumps(record) + "\n")
        example = example_of(record)
        state = example.as_is if example.aligned is None else example.aligned
        print(
            f"{example.run}, {example.kind}, {example.names}: {example.truth}; divergence {state.divergence:.3f}, "
            f"barrier {state.barrier_error:.3f} and {state.barrier_loss:.3f} nats, {record['seconds']:.0f} s",
            flush=True,
        )


def examples(folder: Path) -> list[Example]:
    """The records of the pairs that are listed."""
    listed = {key_of(pair) for pair in json.loads((folder / "pairs.json").read_text())}
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    found = {key_of(record): example_of(record) for record in records if key_of(record) in listed}
    missing = len(listed - found.keys())
    if missing:
        print(f"{missing} pairs are not measured yet", file=sys.stderr)
    return list(found.values())


# What `hf-llfc check` does with these numbers: `judged_by` in hf_llfc/diagnostics/verdict.py.
SHIPPED = RULES["divergence, share, ratio"]
SHIPPED_THRESHOLDS = {"divergence": DIVERGENCE_LIMIT, "share": INFORMATION_LIMIT, "ratio": BASELINE_LIMIT}


def wrong(found: list[Example], rule: Rule, thresholds: Thresholds) -> list[Example]:
    """The pairs that a rule answers otherwise than labels do; those that it leaves to labels are not among them."""
    return [example for example in found if example.answer(rule, thresholds) not in (example.truth, LEFT)]


def too_bold(found: list[Example], rule: Rule, thresholds: Thresholds) -> int:
    """How many pairs a rule would merge, as they are or aligned, that labels would not."""
    answers = ((example.answer(rule, thresholds), example.truth) for example in wrong(found, rule, thresholds))
    return sum(ANSWERS.index(answer) < ANSWERS.index(truth) for answer, truth in answers)


def states_of(found: list[Example]) -> list[State]:
    """All states of some pairs but those that are left to labels."""
    return [state for example in found for state in example.states if not state.is_left]


def confusion(found: list[Example], answer_of: Callable[[Example], str]) -> str:
    """Truth in rows, answers in columns."""
    counts = Counter((example.truth, answer_of(example)) for example in found)
    return markdown(
        [
            {"labels say": truth, **{f"check says {answer}": counts[truth, answer] for answer in (*ANSWERS, LEFT)}}
            for truth in ANSWERS
        ]
    )


def rule_row(name: str, rule: Rule, fitting: list[Example], held: list[Example]) -> dict:
    """How a candidate does, fitted."""
    thresholds, intervals = fitted(states_of(fitting), rule)
    every = [*fitting, *held]
    left_out = 0
    for family in dict.fromkeys(example.family for example in every):
        others = states_of([example for example in every if example.family != family])
        mine = [example for example in every if example.family == family]
        left_out += len(wrong(mine, rule, fitted(others, rule)[0]))

    def interval(signal: str) -> str:
        low, high = intervals[signal]
        return (
            f"{signal} {thresholds[signal]:.3g} ({low:.3g} to {high:.3g})" if high < 1e6 else f"{signal} over {low:.3g}"
        )

    return {
        "rule": name,
        "thresholds (interval that does as well)": ", ".join(map(interval, thresholds)),
        f"wrong of {len(fitting)} fitted": len(wrong(fitting, rule, thresholds)),
        f"wrong of {len(held)} held out": len(wrong(held, rule, thresholds)),
        "too bold, held out": too_bold(held, rule, thresholds),
        f"wrong of {len(every)}, family left out": left_out,
    }


INDICATORS: dict[str, tuple[str, Callable[[Example], float]]] = {
    "median cosine of the matrices": ("1", lambda pair: -pair.cosine),
    "share of the squared distance that matching removes": ("1", lambda pair: pair.gain),
    "distance of heads over that of bodies (classifiers)": ("1", lambda pair: pair.heads_apart),
    "LLFC of the logits over its baseline": ("2", lambda pair: pair.as_is.ratio),
    "divergence from the ensemble": ("2", lambda pair: pair.as_is.divergence),
    "estimate of the barrier": ("2", lambda pair: pair.as_is.estimate),
    "gain of the ensemble": ("2", lambda pair: pair.as_is.gain),
}
"""Number that is shown → its level, and the number: the less, the more likely a merge as they are is sound."""


def indicator_rows(found: list[Example]) -> list[dict]:
    """How well each number that is shown orders the pairs, alone."""
    rows = []
    for name, (level, value) in INDICATORS.items():
        there = [pair for pair in found if "classifiers" not in name or pair.heads_apart > 0]
        scores, truths = [value(pair) for pair in there], [pair.as_is.sound for pair in there]
        low, high = auc_interval(scores, truths)
        interval = f"{low:.2f} to {high:.2f}"
        rows.append(
            {"number": name, "level": level, "pairs": len(there), "AUC": f"{auc(scores, truths):.2f}", "95 %": interval}
        )
    return rows


def parts_of(found: list[Example]) -> list[tuple[str, list[State]]]:
    """The states of the pairs by what they were used for; last those that are left to labels."""
    every = [state for example in found for state in example.states]
    return [
        ("fitted", states_of([example for example in found if example.run not in HELD_OUT])),
        ("held out", states_of([example for example in found if example.run in HELD_OUT])),
        ("left to labels", [state for state in every if state.is_left]),
    ]


def reliability_row(part: str, states: list[State]) -> dict:
    """How well the estimate predicts the barrier of some states."""
    row = reliability(states)
    return {
        "pairs": part,
        "states": len(states),
        "R²": f"{row['r2']:.3f}",
        "median distance": f"{row['median']:.3f}",
        "90 % within": f"{row['most']:.2f}",
        "in the range": f"{row['covered']:.1%}",
        "in the interval of samples alone": f"{row['by_samples']:.1%}",
    }


def weights_answer(example: Example) -> str:
    """What level 1 answers."""
    answer = judge_weights(cosine=0.0, gain=example.gain, moved=example.moved, units=1).answer
    undecided = example.cosine < FAR_APART or example.heads_apart > HEADS_APART
    return LEFT if answer == "merge" and undecided else answer


def section(folder: Path) -> str:
    """The section of results/verdict.md."""
    found = examples(folder)
    held = [example for example in found if example.run in HELD_OUT]
    fitting = [example for example in found if example.run not in HELD_OUT]

    def answer(example: Example) -> str:
        return example.answer(SHIPPED, SHIPPED_THRESHOLDS)

    def agreement(part: list[Example], answer_of: Callable[[Example], str]) -> str:
        answered = [example for example in part if answer_of(example) != LEFT]
        right = sum(answer_of(example) == example.truth for example in answered)
        return f"{right} of {len(answered)} ({right / len(answered):.1%})"

    def left(part: list[Example]) -> str:
        there = [example for example in part if example.as_is.is_left]
        return f"{len(there)} (of which labels would merge {sum(example.truth == 'merge' for example in there)})"

    runs = [
        {
            "run": run,
            "": "held out" if run in HELD_OUT else "fitted",
            "pairs": len(mine),
            **{truth: sum(example.truth == truth for example in mine) for truth in ANSWERS},
            "check agrees": sum(answer(example) == example.truth for example in mine),
        }
        for run in dict.fromkeys(example.run for example in found)
        if (mine := [example for example in found if example.run == run])
    ]
    kinds = [
        {
            "kind": kind,
            "pairs": len(mine),
            **{truth: sum(example.truth == truth for example in mine) for truth in ANSWERS},
            "check agrees": sum(answer(example) == example.truth for example in mine),
        }
        for kind in dict.fromkeys(example.kind for example in found)
        if (mine := [example for example in found if example.kind == kind])
    ]
    faults = [
        {
            "": "held out" if example.run in HELD_OUT else "fitted",
            "run": example.run,
            "kind": example.kind,
            "pair": example.names,
            "labels": example.truth,
            "check": answer(example),
            "divergence": f"{decisive.divergence:.3f}",
            "barrier, points and nats": f"{100 * decisive.barrier_error:.1f}, {decisive.barrier_loss:.3f}",
            "midpoint over better parent": f"{100 * decisive.harm_error:.1f}, {decisive.harm_loss:.3f}",
        }
        for example in wrong(found, SHIPPED, SHIPPED_THRESHOLDS)
        for decisive in [example.states[-1] if "align" in (example.truth, answer(example)) else example.as_is]
    ]
    barrier_only = [(passes(state, SHIPPED, SHIPPED_THRESHOLDS), state.flat) for state in states_of(held)]
    agree = sum(called == flat for called, flat in barrier_only)
    shipped = SHIPPED, SHIPPED_THRESHOLDS
    tables = "\n\n{}".format
    parts = [
        "`python benchmarks/calibrate.py --pairs DIR --write`, after `python benchmarks/pairs.py --parents parents "
        "--out DIR` and a first call without `--write`, which measures. "
        f"{len(found)} pairs: {len(fitting)} to fit thresholds on, {len(held)} of other training runs held out.",
        "Labels say *merge* where error and loss stay on the line between the parents as they are (barrier at most "
        f"{100 * ERROR_BARRIER_TOLERANCE:g} points and {LOSS_BARRIER_TOLERANCE:g} nats over α = .25, .5, .75, on up to "
        "2000 images, 800 sentences or 160 texts of 256 bytes that the signals have not seen) and the midpoint is at "
        f"most {100 * HARM_ERROR:g} points and {HARM_LOSS:g} nats worse than the better parent; *align* where that is "
        "so after weight matching only. The second condition is for useless parents: below the line between a good "
        "and a broken model lies nearly everything. `check` sees 128 samples, 32 texts for language models, no label.",
        f"**Level 2** leaves {left(fitting)} of the fitted pairs and {left(held)} of those held out to labels, because "
        f"the parents disagree in more than {DISAGREEMENT_LIMIT:.0%} of their predictions and the ensemble gains more "
        f"than {GAIN_LIMIT:g} nats from it (of few classes, {GAIN_SHARE:g} of their log). "
        f"Of the others it agrees with labels in {agreement(fitting, answer)} and in "
        f"{agreement(held, answer)}; it is too bold (merges, or merges unaligned, what labels would "
        f"not) in {too_bold(fitting, *shipped)} and {too_bold(held, *shipped)}. Against the barrier alone, without the "
        f"second condition, it is right about {agree} of {len(barrier_only)} held-out states (a pair as it is, or "
        "after matching).",
        f"Fitted:{tables(confusion(fitting, answer))}",
        f"Held out:{tables(confusion(held, answer))}",
        f"What it gets wrong:{tables(markdown(faults))}" if faults else "It gets none wrong.",
        REMARKS,
        "**Level 1** looks at coordinates alone and cannot see whether matching suffices: its answer is that of labels "
        f"in {agreement(fitting, weights_answer)} and {agreement(held, weights_answer)}. Held out:"
        f"{tables(confusion(held, weights_answer))}",
        "**The estimate of the barrier** (divergence less gain) against the barrier that labels show at the midpoint, "
        "in nats, of all states:"
        + tables(markdown([reliability_row(*each) for each in parts_of(found)]))
        + "\n\nThe range "
        f"given with the estimate is that of its samples, wider on both sides by {UNSURE_SHARE:g} of divergence and "
        f"gain together and by {UNSURE_NATS:g} nats. The share holds 95 % of the fitted states not left to labels "
        f"({margin_share(states_of(fitting)):.2f} is what they need); it was fitted to no other.",
        "What each number that `check` shows is worth alone: the chance that of two pairs the sound one has the better "
        "number (AUC; .5 is none), over all pairs as they are:\n\n" + markdown(indicator_rows(found)),
        "Other rules for level 2, each with the thresholds that do best on the fitted pairs (a wrong merge counts "
        "twice; *family left out*: fitted on all other architectures):"
        + tables(markdown([rule_row(name, rule, fitting, held) for name, rule in RULES.items()])),
        f"By run:{tables(markdown(runs))}",
        f"By kind:{tables(markdown(kinds))}",
    ]
    return "\n\n".join(parts)


REMARKS = """\
Why. A copy with weights four times too large is overconfident, as is the blend, next to the limit of harm. Before pairs
whose parents disagree that much were left to labels, the rule was wrong on 10 of 191 pairs, most of them among these:
one parent useless on the samples, so that the midpoint is their faithful blend and still bad (*too bold*); parents of
different tasks or with a damaged layer, which merge to something better than their ensemble (*too cautious*). No number
that needs no labels told the two apart.

The form of the rule was settled when fashion-mlp-sgd, digits-resnet and fashion-vit had been seen, and before
small-llama, bytes-gpt2 and all but one pair of minilm were measured; its thresholds were fitted on the fitted runs
alone. The limits beyond which a pair is left to labels were chosen with all of these runs in sight; the pairs that
`verdict.py` makes are the test of them."""


def main(words: list[str] | None = None) -> None:
    """Measures what is missing, or writes the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=Path, required=True, metavar="DIR", help="what pairs.py wrote")
    parser.add_argument("--runs", nargs="*", help="measure the pairs of some runs")
    parser.add_argument("--write", action="store_true", help="write results/verdict.md; measures nothing")
    arguments = parser.parse_args(words)
    if arguments.write:
        text = section(arguments.pairs)
        replace_section("verdict", text)
        print(text)
        return
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    measure_all(arguments.pairs, arguments.runs)


if __name__ == "__main__":
    main()
