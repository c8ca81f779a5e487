"""What the LLFC paper measures besides LLFC, on pairs with and without a common ancestor, into results/llfc.md.

    python benchmarks/paper_measures.py --parents DIR [--only NAME …] [--out runs/paper_measures] [--threads 1]

Every pair leaves its rows as JSON in --out, and what exists is kept; the tables are made from all of them.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tests.mlp_model  # noqa: F401  (registers the MLP)
from benchmarks.results import markdown, replace_section
from hf_llfc.alignment.checkpoints import align_checkpoints
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.diagnostics.measures.measures import run_measures
from hf_llfc.evaluation import EvaluationConfig, evaluate_model
from hf_llfc.parents.data import open_data
from hf_llfc.parents.parent import Parent
from hf_llfc.recipe import AlignSection

MEASURES = ("additivity", "commutativity", "stitching", "geometry")


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two parents and what to measure them on.

    Attributes:
        first: Folder of A below the parents.
        second: Of B.
        kind: ``one base``, ``independent``, or ``independent, matched`` by weight matching.
        data: File below the parents.
        task: Of the file.
        settings: Further keys of the evaluation.
    """

    first: str
    second: str
    kind: str
    data: str
    task: str = "image-classification"
    settings: tuple[tuple[str, Any], ...] = (("samples", 1000), ("batch_size", 250))

    def config(self, parents: Path) -> EvaluationConfig:
        """The data."""
        return EvaluationConfig(self.task, str(parents / self.data), **dict(self.settings))


SENTENCES = (("samples", 400), ("batch_size", 50), ("max_length", 64))
BLOCKS = (("samples", 128), ("batch_size", 32), ("blocks", False))
FASHION, MLP = "fashion/data/test.parquet", "mlp/data/test.parquet"

PAIRS = {
    "resnet spawned": Pair("fashion/resnet-spawned-a", "fashion/resnet-spawned-b", "one base", FASHION),
    "resnet independent": Pair("fashion/resnet-independent-a", "fashion/resnet-independent-b", "independent", FASHION),
    "resnet matched": Pair(
        "fashion/resnet-independent-a", "fashion/resnet-independent-b", "independent, matched", FASHION
    ),
    "vit spawned": Pair("fashion/vit-spawned-a", "fashion/vit-spawned-b", "one base", FASHION),
    "vit independent": Pair("fashion/vit-independent-a", "fashion/vit-independent-b", "independent", FASHION),
    "vit matched": Pair("fashion/vit-independent-a", "fashion/vit-independent-b", "independent, matched", FASHION),
    "mlp independent": Pair("mlp/seed-0", "mlp/seed-1", "independent", MLP),
    "mlp matched": Pair("mlp/seed-0", "mlp/seed-1", "independent, matched", MLP),
    "llama branches": Pair(
        "lm/llama-brown", "lm/llama-python", "one base", "lm/data/both-test.jsonl", "text-generation", BLOCKS
    ),
    "gpt2 branches": Pair(
        "lm/gpt2-brown", "lm/gpt2-python", "one base", "lm/data/both-test.jsonl", "text-generation", BLOCKS
    ),
    "minilm tweets movies": Pair(
        "minilm/tweets", "minilm/movies", "one base", "minilm/data/all-test.jsonl", "text-classification", SENTENCES
    ),
}


def measure(pair: Pair, parents: Path) -> dict[str, Any]:
    """Rows of all measures, and what the parents score."""
    config = pair.config(parents)
    checkpoints = [open_checkpoint(str(parents / name)) for name in (pair.first, pair.second)]
    method = "weight_matching" if "matched" in pair.kind else "none"
    alignment = align_checkpoints(*checkpoints, AlignSection(method))
    model_a, model_b = Parent(checkpoints[0]).load(), Parent(checkpoints[1], alignment).load()
    data = open_data(config, checkpoints[0])
    started = time.perf_counter()
    alone = [evaluate_model(model, data) for model in (model_a, model_b)]
    bare, started = time.perf_counter() - started, time.perf_counter()
    found: dict[str, Any] = {"kind": pair.kind, "samples": len(data), "seconds": {"parents alone": bare}}
    for name in MEASURES:
        rows = run_measures([name], model_a, model_b, data, alphas=[0.5])[name]
        found[name] = [dataclasses.asdict(row) for row in rows]
        found["seconds"][name], started = time.perf_counter() - started, time.perf_counter()
    found["parents"] = [{"loss": result.loss, **result.metrics} for result in alone]
    return found


def tables(results: dict[str, dict[str, Any]]) -> str:
    """The pairs beside one another."""
    sections = [
        ("Weak additivity at α = 0.5, over activation functions", additivity),
        ("Commutativity, over linear maps", commutativity),
        ("Stitching after every block", stitching),
        ("Leading principal angles and effective ranks", geometry),
        ("Seconds", seconds),
    ]
    return "\n\n".join(
        f"{title}:\n\n{markdown([{'pair': name, **line(found)} for name, found in results.items()])}"
        for title, line in sections
    )


def spread(values: Sequence[float], form: str = "{:.2g}") -> str:
    """Median and range."""
    low, middle, high = (form.format(value) for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}–{high})"


def additivity(found: dict[str, Any]) -> dict[str, str]:
    """Distance and baseline."""
    rows = found["additivity"]
    return {
        "functions": f"{len(rows)}{', gated' if any(row['gated'] for row in rows) else ''}",
        "1 − cos of the two sides": spread([row["distance"]["mean"] for row in rows]),
        "1 − cos(σ(h_A), σ(h_B))": spread([row["baseline"]["mean"] for row in rows]),
        "ratio": spread([row["distance"]["mean"] / row["baseline"]["mean"] for row in rows]),
    }


def commutativity(found: dict[str, Any]) -> dict[str, str]:
    """The three distances, and how far the first lies below the others.

    Small differences that have nothing to do with one another give Dist_com = Dist_W · Dist_H / 4 if weights are as
    isotropic as they are: ‖ΔW ΔH‖ is then to ‖W H‖ as ‖ΔW‖‖ΔH‖ to ‖W‖‖H‖, and each side is twice W H.
    """
    rows = [row for row in found["commutativity"] if None not in (row["com"], row["weights"], row["features"])]
    ratios = [row["com"] / min(row["weights"], row["features"]) for row in rows if min(row["weights"], row["features"])]
    return {
        "maps": str(len(rows)),
        "Dist_com": spread([row["com"] for row in rows]),
        "Dist_W": spread([row["weights"] for row in rows]),
        "Dist_H": spread([row["features"] for row in rows]),
        "Dist_com / min(Dist_W, Dist_H)": spread(ratios),
        "Dist_com / (Dist_W · Dist_H)": spread(
            [row["com"] / (row["weights"] * row["features"]) for row in rows if row["weights"] and row["features"]]
        ),
    }


def stitching(found: dict[str, Any]) -> dict[str, str]:
    """Parents and stitched networks."""
    name = next(name for name in ("accuracy", "token_accuracy") if name in found["parents"][0])
    return {
        "metric": name.replace("_", " "),
        "A, B": ", ".join(f"{parent[name]:.3f}" for parent in found["parents"]),
        "stitched, in order": ", ".join(f"{point['metrics'][name]:.3f}" for point in found["stitching"]),
        "loss of A, B": ", ".join(f"{parent['loss']:.3f}" for parent in found["parents"]),
        "loss, in order": ", ".join(f"{point['loss']:.3f}" for point in found["stitching"]),
    }


def geometry(found: dict[str, Any]) -> dict[str, str]:
    """Median angle of each subspace, and ranks."""
    cells = {}
    for of, name in (("weights", "written"), ("weights, inputs", "read"), ("features", "features")):
        rows = [row for row in found["geometry"] if row["of"] == of and row["angles"]]
        cells[f"{name}, median angle"] = spread([statistics.median(row["angles"]) for row in rows], "{:.0f}°")
    features = [row for row in found["geometry"] if row["of"] == "features"]
    for letter in "ab":
        cells[f"rank of features, {letter.upper()}"] = spread([row[f"rank_{letter}"] for row in features], "{:.0f}")
    return cells


def seconds(found: dict[str, Any]) -> dict[str, str]:
    """What each measure took, beside both parents evaluated once."""
    return {name: f"{value:.1f}" for name, value in found["seconds"].items()}


def main() -> None:
    """Measures the pairs asked for and rewrites the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parents", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(PAIRS))
    parser.add_argument("--out", type=Path, default=Path("runs/paper_measures"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only or PAIRS:
        path = options.out / f"{name.replace(' ', '-')}.json"
        if not path.exists():
            path.write_text(json.dumps(measure(PAIRS[name], options.parents.resolve())))
        print(name, flush=True)
    files = {name: options.out / f"{name.replace(' ', '-')}.json" for name in PAIRS}
    results = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
    text = (
        "`python benchmarks/paper_measures.py --parents parents`\n\nMedian (smallest–largest) where there are several."
    )
    print(tables(results))
    replace_section("paper_measures", f"{text}\n\n{tables(results)}")


if __name__ == "__main__":
    main()
