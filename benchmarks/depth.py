"""What depth does to classes and answers: two published findings, real merges, and what it costs; into results/llfc.md.

    python benchmarks/depth.py --parents DIR [--only NAME …] [--out runs/depth]

DIR holds what `train_parents.py --only mlp fashion` and `train_seeds.py` make. Every part leaves its numbers as JSON in
--out, and what exists is kept.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tests.mlp_model  # noqa: F401  (registers the MLP)
from benchmarks.results import markdown, replace_section
from hf_llfc.alignment.checkpoints import align_checkpoints
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.diagnostics.measures.classes import (
    MOST_DIRECTIONS,
    ClassMoments,
    compressions,
    discriminations,
    separabilities,
)
from hf_llfc.diagnostics.measures.measures import run_merge_measures
from hf_llfc.diagnostics.measures.subject import Subject
from hf_llfc.diagnostics.points import line
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation import EvaluationConfig, evaluate_model
from hf_llfc.evaluation.models import evaluation_mode, forward_logits
from hf_llfc.parents.data import open_data
from hf_llfc.parents.parent import Parent
from hf_llfc.recipe import AlignSection

SEEDS = range(3)
LINEAR_SEEDS = range(5)

ORTHOGONAL = 0.99
"""Discrimination from which on the means of classes are orthogonal but for rounding."""

IMAGES = {"task": "image-classification", "samples": 1000, "batch_size": 250}
TEXTS = {"task": "text-generation", "samples": 32, "batch_size": 8, "max_length": 256}
PAIRS = {
    "mlp, independent": ("mlp/seed-0", "mlp/seed-1", "none", "mlp/data/test.parquet", IMAGES),
    "mlp, matched": ("mlp/seed-0", "mlp/seed-1", "weight_matching", "mlp/data/test.parquet", IMAGES),
    "resnet, one start": (
        "fashion/resnet-spawned-a", "fashion/resnet-spawned-b", "none", "fashion/data/test.parquet", IMAGES
    ),
    "resnet, independent": (
        "fashion/resnet-independent-a", "fashion/resnet-independent-b", "none", "fashion/data/test.parquet", IMAGES
    ),
    "vit, independent": ("seeds/vit-128-1", "seeds/vit-128-2", "none", "seeds/data/test.parquet", IMAGES),
    "vit, matched": ("seeds/vit-128-1", "seeds/vit-128-2", "weight_matching", "seeds/data/test.parquet", IMAGES),
    "llama, independent": ("seeds/llama-1", "seeds/llama-2", "none", "seeds/data/brown-test.jsonl", TEXTS),
    "gpt2, independent": ("seeds/gpt2-1", "seeds/gpt2-2", "none", "seeds/data/brown-test.jsonl", TEXTS),
}  # fmt: skip


def numbers_of(features: torch.Tensor, labels: torch.Tensor, classes: int) -> tuple[float, float, float]:
    """Compression, discrimination and separability of some features."""
    moments = ClassMoments.of(features.double()[None], labels, classes, MOST_DIRECTIONS)
    separability, compression = separabilities(moments)[0], compressions(moments)[0]
    discrimination = discriminations(moments)[0]
    assert compression is not None and discrimination is not None
    return compression, discrimination, separability.mean if separability is not None else math.nan


def deep_linear(seed: int) -> dict[str, Any]:
    """A linear network of 6 layers, trained by gradient descent to a loss of zero on nearly orthogonal inputs."""
    generator = torch.Generator().manual_seed(seed)
    layers, width, inputs, classes, each = 6, 80, 80, 3, 20
    labels = torch.arange(classes * each) % classes
    noise = torch.randn(len(labels), inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    orthogonal = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator, dtype=torch.float64))[0]
    shared = 0.1 / inputs**0.5  # without a part that all have, classes would be orthogonal from the start
    data, wanted = orthogonal[: len(labels)] + shared + 0.1 * noise, nn.functional.one_hot(labels).double()
    weights = []
    for i, o in zip([inputs, *[width] * (layers - 1)], [*[width] * (layers - 1), classes], strict=True):
        start = torch.linalg.qr(torch.randn(max(i, o), min(i, o), generator=generator, dtype=torch.float64))[0]
        weights.append((0.4 * (start if start.shape == (o, i) else start.T)).requires_grad_(True))
    optimizer = torch.optim.SGD(weights, lr=0.02)
    loss = torch.tensor(0.0)
    for _ in range(2500):
        optimizer.zero_grad()
        outputs = data
        for weight in weights:
            outputs = outputs @ weight.T
        loss = 0.5 * (outputs - wanted).square().sum()
        loss.backward()
        optimizer.step()
    features, rows = data, []
    with torch.no_grad():
        for weight in weights[:-1]:
            features = features @ weight.T
            rows.append(numbers_of(features, labels, classes))
    return {
        "loss": float(loss.detach()),
        "compression": [c for c, _, _ in rows],
        "discrimination": [d for _, d, _ in rows],
    }


def straight(values: list[float]) -> tuple[float, float]:
    """Slope of the least-squares line, and R²."""
    places = np.arange(len(values))
    slope, start = np.polyfit(places, values, 1)
    left = np.var(np.asarray(values) - slope * places - start)
    return float(slope), float(1 - left / np.var(values))


def over_training(seed: int, parents: Path) -> dict[str, Any]:
    """Separability and accuracy of an MLP on held-out images while it trains."""
    import datasets

    def read(name: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = datasets.load_dataset(
            "parquet", data_files=str(parents / "mlp" / "data" / name), split=f"train[:{count}]"
        )
        images = np.stack([np.asarray(image, dtype=np.float32).ravel() / 255 for image in rows["image"]])
        return torch.from_numpy(images), torch.tensor(rows["label"])

    torch.manual_seed(seed)
    train, train_labels = read("train.parquet", 6000)
    test, test_labels = read("test.parquet", 2000)
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rows = []
    generator = torch.Generator().manual_seed(seed)
    wanted = sorted({round(1.35**power) for power in range(26)} | {0})
    for step in range(wanted[-1] + 1):
        if step in wanted:
            with torch.no_grad():
                features = model[:4](test)
                hits = (model[4](features).argmax(dim=1) == test_labels).double().mean()
            rows.append(
                {"step": step, "accuracy": float(hits), "separability": numbers_of(features, test_labels, 10)[2]}
            )
        chosen = torch.randint(len(train), (128,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train[chosen]), train_labels[chosen]).backward()
        optimizer.step()
    return {"rows": rows}


def merge(name: str, parents: Path) -> dict[str, Any]:
    """Both measures of one merge at the midpoint, and their processor time beside bare passes."""
    first, second, method, file, settings = PAIRS[name]
    checkpoints = [open_checkpoint(str(parents / model)) for model in (first, second)]
    alignment = align_checkpoints(*checkpoints, AlignSection(method))
    models = [Parent(checkpoints[0]).load(), Parent(checkpoints[1], alignment).load()]
    values = dict(settings)
    data = open_data(EvaluationConfig(values.pop("task"), str(parents / file), **values), checkpoints[0])
    subject = Subject.at(models, line([0.5]), data)
    whole = [evaluate_model(model, data) for model in (*models, subject.merge)]
    metric = "accuracy" if "accuracy" in whole[0].metrics else "token_accuracy"
    found: dict[str, Any] = {"metric": [result.metrics[metric] for result in whole], "seconds": {}}
    started = time.process_time()
    with evaluation_mode(*models, subject.merge):
        for batch, _ in data.batches():
            for model in (*models, subject.merge):
                forward_logits(model, batch)
    found["seconds"]["bare"] = time.process_time() - started
    possible = []
    for measure in ("classes", "settling"):
        started = time.process_time()
        try:
            rows = run_merge_measures([measure], subject, data)[measure]
        except EvaluationError as error:
            found[measure] = str(error)
            continue
        found["seconds"][measure] = time.process_time() - started
        found[measure] = [vars(row) for row in rows]
        possible.append(measure)
    started = time.process_time()
    run_merge_measures(possible, subject, data)
    found["seconds"]["both"] = time.process_time() - started
    return found


def classes_line(name: str, found: dict[str, Any]) -> dict[str, str]:
    """Last block and logits of both models and the merge."""
    rows = {(row["layer"], row["of"]): row for row in found["classes"]}
    layers = list(dict.fromkeys(layer for layer, _ in rows))

    def cells(layer: str, key: str) -> str:
        return ", ".join(f"{rows[layer, of][key]:.3f}" for of in ("model 1", "model 2", "merge"))

    return {
        "merge": name,
        "accuracy of A, B, merge": ", ".join(f"{value:.3f}" for value in found["metric"]),
        "compression, last block": cells(layers[-2], "compression"),
        "separability, last block": cells(layers[-2], "separability"),
        "worst pair, last block": cells(layers[-2], "least"),
        "worst pair, logits": cells("logits", "least"),
        "logits' class means, A from B, merge from A": ", ".join(
            f"{rows['logits', of]['directions'][place]:.3f}" for of, place in (("model 1", 1), ("merge", 0))
        ),
    }


def settling_line(name: str, found: dict[str, Any]) -> dict[str, str]:
    """Mean settling depth, and the share of answers that are settled before the last block."""
    shares: dict[str, list[float]] = {}
    for row in found["settling"]:
        shares.setdefault(row["of"], []).append(row["answer"])
    return {
        "merge": name,
        "accuracy of A, B, merge": ", ".join(f"{value:.3f}" for value in found["metric"]),
        "blocks": str(len(shares["merge"])),
        "settled after, in the mean, A, B, merge": ", ".join(f"{len(s) - sum(s[:-1]):.2f}" for s in shares.values()),
        "settled before the last block, A, B, merge": ", ".join(f"{s[-2]:.3f}" for s in shares.values()),
    }


def cost_line(name: str, found: dict[str, Any]) -> dict[str, str]:
    """Processor time of the measures over that of three bare passes."""
    seconds = found["seconds"]
    ratios = {key: f"{seconds[key] / seconds['bare']:.2f}" for key in ("classes", "settling", "both") if key in seconds}
    return {"merge": name, "three bare passes, s": f"{seconds['bare']:.1f}", "classes": "–", "settling": "–", **ratios}


def linear_lines(found: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """One line a seed."""
    lines = []
    for seed, values in found.items():
        slope, geometric = straight([math.log(value) for value in values["compression"]])
        rise, linear = straight(values["discrimination"])
        lines.append(
            {
                "seed": seed,
                "C, first to last hidden layer": f"{values['compression'][0]:.2g} to {values['compression'][-1]:.2g}",
                "factor a layer": f"{math.exp(slope):.3f}",
                "log C, R²": f"{geometric:.4f}",
                "D, first to last": f"{values['discrimination'][0]:.3f} to {values['discrimination'][-1]:.3f}",
                "rise a layer": f"{rise:.4f}",
                "D, R²": f"{linear:.4f}",
            }
        )
    return lines


def training_lines(found: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """One line a seed."""
    lines = []
    for seed, values in found.items():
        accuracy, separability = ([row[key] for row in values["rows"]] for key in ("accuracy", "separability"))
        ranks = [np.argsort(np.argsort(series)) for series in (accuracy, separability)]
        lines.append(
            {
                "seed": seed,
                "checkpoints": str(len(accuracy)),
                "accuracy": f"{accuracy[0]:.3f} to {accuracy[-1]:.3f}",
                "separability": f"{separability[0]:.3f} to {separability[-1]:.3f}",
                "correlation": f"{np.corrcoef(accuracy, separability)[0, 1]:.3f}",
                "rank correlation": f"{np.corrcoef(*ranks)[0, 1]:.3f}",
            }
        )
    return lines


def report(linear: dict[str, Any], training: dict[str, Any], merges: dict[str, Any]) -> str:
    """The section."""
    lines = linear_lines(linear)
    rising = [
        line for line, values in zip(lines, linear.values(), strict=True) if values["discrimination"][0] < ORTHOGONAL
    ]
    geometric, straight_up = (
        min(float(line[key]) for line in of) for of, key in ((lines, "log C, R²"), (rising, "D, R²"))
    )
    parts = [
        "`python benchmarks/depth.py --parents parents`",
        "Compression C and discrimination D of the hidden layers of deep linear networks, trained by gradient descent "
        "to a loss of zero. Published (arXiv 2311.02960): C falls by one factor from layer to layer, D rises by one "
        f"step. R² of straight lines, the smallest of all seeds: {geometric:.4f} through log C; {straight_up:.4f} "
        f"through D, of seeds whose classes are not orthogonal from the start (D below {ORTHOGONAL}): others have "
        "nothing to rise.",
        markdown(lines),
        "Separability F/(1+F) of the last hidden layer of an MLP and its accuracy, on held-out Fashion-MNIST while it "
        "trains. Published (arXiv 2307.13962): they move together.",
        markdown(training_lines(training)),
        "Classes at the midpoint of two models:",
        markdown([classes_line(name, found) for name, found in merges.items() if isinstance(found["classes"], list)]),
        "Answers that settle, by the logit lens:",
        markdown([settling_line(name, found) for name, found in merges.items() if isinstance(found["settling"], list)]),
        "Processor time over that of three bare passes (A, B and the merge):",
        markdown([cost_line(name, found) for name, found in merges.items()]),
    ]
    return "\n\n".join(parts)


def main() -> None:
    """Measures what is asked for and rewrites the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parents", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(PAIRS))
    parser.add_argument("--out", type=Path, default=Path("runs/depth"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    parents = options.parents.resolve()

    def kept(name: str, make: Any) -> dict[str, Any]:
        path = options.out / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        if not path.exists():
            path.write_text(json.dumps(make()))
            print(name, flush=True)
        values: dict[str, Any] = json.loads(path.read_text())
        return values

    linear = {str(seed): kept(f"linear {seed}", lambda seed=seed: deep_linear(seed)) for seed in LINEAR_SEEDS}
    training = {str(seed): kept(f"training {seed}", lambda seed=seed: over_training(seed, parents)) for seed in SEEDS}
    merges = {name: kept(name, lambda name=name: merge(name, parents)) for name in options.only or PAIRS}
    text = report(linear, training, merges)
    print(text)
    replace_section("depth", text)


if __name__ == "__main__":
    main()
