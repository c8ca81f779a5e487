"""Measures the pairs of `pairs.py` with and without labels, and how often `hf-llfc check` answers as the labels do.

    python benchmarks/calibrate.py --pairs DIR                                  # measures what is missing
    python benchmarks/calibrate.py --pairs DIR --write benchmarks/RESULTS.md         # the section of RESULTS.md

Records lie in DIR/records.jsonl, one pair a line, and are kept.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset, disable_progress_bars, load_dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tests.mlp_model  # noqa: F401  registers the MLP
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.diagnostics import has_batch_norm, recompute_batch_norm
from hf_llfc.diagnostics.combination import CombinedModel
from hf_llfc.evaluation import EvaluationConfig, EvaluationData
from hf_llfc.evaluation.models import evaluate_model
from hf_llfc.mergeability import FeatureEvidence, compare_features, compare_weights
from hf_llfc.stages import Parent, open_data

TRUTH_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
RECOMPUTED = 512
SAMPLES = {"image-classification": (128, 2000), "text-classification": (128, 800), "text-generation": (32, 160)}
"""Without labels for the signals, and others with labels for the barrier; a text of a language model is 256 bytes."""

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


@cache
def opened(path: str, task: str, model: str, first: int, last: int, labels: bool) -> EvaluationData:
    """Some rows of a data file as a model takes them."""
    rows = rows_of(path)
    rows = rows.select(range(first, min(last, len(rows))))
    batch = 64 if task == "image-classification" else 32
    text = {"blocks": False, "max_length": 256} if task == "text-generation" else {}
    config = EvaluationConfig(task, rows, batch_size=batch, labels=labels, **text)
    return remembered(open_data(config, open_checkpoint(model)))


def measure(pair: dict) -> dict:
    """Signals without labels on some samples, and barriers with labels on others."""
    start = time.perf_counter()
    samples, labelled = SAMPLES[pair["task"]]
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
        record[state] = flat(compare_features(model_a, model_b, unlabelled))
        record[f"{state}_s"] = time.perf_counter() - begin
        record[f"{state}_truth"] = walk(model_a, model_b, truth, shown)
    return {**pair, **record, "seconds": time.perf_counter() - start}


def flat(features: FeatureEvidence) -> dict:
    """Evidence of features as JSON values."""
    layers = [
        {
            "layer": row.layer,
            "llfc": row.llfc.mean,
            "baseline": row.baseline.mean,
            "coefficient": row.coefficient.mean,
        }
        for row in features.layers
    ]
    return {"layers": layers, "outputs": asdict(features.outputs)}


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
    return pair["run"], pair["kind"], pair["a"], pair["b"], pair["data"]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=Path, required=True, metavar="DIR", help="what pairs.py wrote")
    parser.add_argument("--runs", nargs="*")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    file = arguments.pairs / "records.jsonl"
    known = {key_of(json.loads(line)) for line in file.read_text().splitlines()} if file.is_file() else set()
    pairs = json.loads((arguments.pairs / "pairs.json").read_text())
    for pair in pairs:
        if key_of(pair) in known or (arguments.runs and pair["run"] not in arguments.runs):
            continue
        record = measure(pair)
        with file.open("a") as out:
            out.write(json.dumps(record) + "\n")
        truth = record["as_is_truth"]
        print(
            pair["run"], pair["kind"], Path(pair["a"]).name, Path(pair["b"]).name, f"{record['seconds']:.0f} s",
            [round(point["error"], 3) for point in truth], [round(point["loss"], 3) for point in truth],
            [round(point["error"], 3) for point in record.get("aligned_truth", [])], flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
