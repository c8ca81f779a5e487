"""What the lockstep costs over the bare forward passes, and over keeping every feature, in time and memory.

    python benchmarks/lockstep.py --parents DIR [--repeats 5] [--alphas 9] [--samples 256] [--only NAME …]

For K values of α inside the path, in turns, each in a process of its own, on one thread:

- bare: the forward passes of K + 2 models and nothing else; the K models in between are the same weights moved once.
- lockstep: `diagnose_models`, from the two models to the report, the K merges of weights a batch included.
- keep everything: the features of every layer of all K + 2 models of all samples are kept, and compared at the end.

Memory is the peak of the process over what it held with the data and three models loaded.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tests.mlp_model  # noqa: F401  registers the MLP
from benchmarks.results import markdown, replace_section, require_sections
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.diagnostics import diagnose_models, select_layers
from hf_llfc.diagnostics.combination import CombinedModel
from hf_llfc.diagnostics.features.layers import handing_over, sample_vectors
from hf_llfc.diagnostics.points import line
from hf_llfc.diagnostics.statistics import cosine_distance, products
from hf_llfc.evaluation import EvaluationConfig
from hf_llfc.evaluation.models import evaluation_mode, forward_logits
from hf_llfc.parents.data import open_data
from hf_llfc.parents.parent import Parent

PAIRS = {
    "minilm": (
        "MiniLM, sentences of up to 64 tokens",
        ("minilm/tweets", "minilm/movies"),
        {"task": "text-classification", "dataset": "minilm/data/all-test.jsonl", "batch_size": 32, "max_length": 64},
    ),
    "vit": (
        "ViT, Fashion-MNIST",
        ("fashion/vit-spawned-a", "fashion/vit-spawned-b"),
        {"task": "image-classification", "dataset": "fashion/data/test.parquet", "batch_size": 64},
    ),
    "resnet": (
        "ResNet, Fashion-MNIST",
        ("fashion/resnet-spawned-a", "fashion/resnet-spawned-b"),
        {"task": "image-classification", "dataset": "fashion/data/test.parquet", "batch_size": 64},
    ),
    "llama": (
        "Llama, 256 bytes",
        ("lm/llama-brown", "lm/llama-python"),
        {
            "task": "text-generation",
            "dataset": "lm/data/both-test.jsonl",
            "batch_size": 16,
            "max_length": 256,
            "blocks": False,
        },
    ),
}
WAYS = ("bare", "lockstep", "keep everything")


def main() -> None:
    """Measures every pair, the ways in turns, and writes its section of results/llfc.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parents", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--alphas", type=int, default=9, help="values inside the path")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--only", nargs="+", choices=PAIRS)
    parser.add_argument("--one", nargs=2, metavar=("PAIR", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options)))
        return
    require_sections(*(f"lockstep_{pair}" for pair in options.only or PAIRS))
    for pair in options.only or PAIRS:
        runs: dict[tuple[str, int], list[dict[str, float]]] = {}
        for _ in range(options.repeats):
            for way in WAYS:
                runs.setdefault((way, options.samples), []).append(in_process(pair, way, options, options.samples))
        for way in WAYS[1:]:  # memory against samples
            runs["more " + way, 4 * options.samples] = [in_process(pair, way, options, 4 * options.samples)]
        middle = {
            key: {name: statistics.median(run[name] for run in each) for name in each[0]} for key, each in runs.items()
        }
        bare, ours, keep = (middle[way, options.samples] for way in WAYS)
        figures = {
            "pair": PAIRS[pair][0],
            "bare, s of CPU": f"{bare['cpu']:.2f}",
            "lockstep ÷ bare, CPU": f"{ours['cpu'] / bare['cpu']:.3f}",
            "lockstep ÷ bare, wall": f"{ours['wall'] / bare['wall']:.3f}",
            "keep everything ÷ bare, CPU": f"{keep['cpu'] / bare['cpu']:.3f}",
            "lockstep, MB": f"{ours['megabytes']:.0f}",
            "… 4 × the samples": f"{middle['more lockstep', 4 * options.samples]['megabytes']:.0f}",
            "keep everything, MB": f"{keep['megabytes']:.0f}",
            "… 4 × samples": f"{middle['more keep everything', 4 * options.samples]['megabytes']:.0f}",
        }
        command = f"python benchmarks/lockstep.py --parents parents --only {pair} --repeats {options.repeats} "
        replace_section(
            f"lockstep_{pair}",
            f"`{command}--samples {options.samples}`, medians, one thread; {options.alphas} values of α inside the "
            f"path, block outputs and logits, no labels.\n\n{markdown([figures])}",
        )
        print(figures, flush=True)


def in_process(pair: str, way: str, options: argparse.Namespace, samples: int) -> dict[str, float]:
    """One measurement in a fresh process."""
    words = [sys.executable, __file__, "--parents", str(options.parents), "--alphas", str(options.alphas)]
    words += ["--samples", str(samples), "--one", pair, way]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(pair: str, way: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds and memory of one way on one pair."""
    torch.set_num_threads(1)
    _, names, settings = PAIRS[pair]
    checkpoints = [open_checkpoint(options.parents / name) for name in names]
    models = [Parent(checkpoint).load() for checkpoint in checkpoints]
    settings = {**settings, "dataset": str(options.parents / settings["dataset"])}
    data = open_data(EvaluationConfig(**settings, samples=options.samples, labels=False), checkpoints[0])
    alphas = [step / (options.alphas + 1) for step in range(1, options.alphas + 1)]
    with evaluation_mode(*models):
        combined = CombinedModel(models)
        combined.move_to((0.5, 0.5))
        batch, _ = next(data.batches())
        layers = select_layers(models[0], batch)
        forward_logits(combined.model, batch)
        held = peak()
        wall, cpu = time.perf_counter(), time.process_time()
        if way == "bare":
            for batch, _ in data.batches():
                for model in [*models, *[combined.model] * len(alphas)]:
                    forward_logits(model, batch)
        elif way == "lockstep":
            del combined  # diagnose_models makes its own
            diagnose_models(models, data, region=line(alphas))
        else:
            keep_everything(models, combined, layers, data, alphas)
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "megabytes": (peak() - held) / 1e6,
    }


def keep_everything(models, combined, layers, data, alphas) -> None:
    """The straightforward way: all features of all models of all samples, then the comparison."""
    kept = []
    for alpha in (None, None, *alphas):
        model = combined.model if alpha is not None else models[len(kept)]
        if alpha is not None:
            combined.move_to((alpha, 1 - alpha))
        features = [[] for _ in layers]
        for batch, _ in data.batches():
            mask = batch.get("attention_mask")
            n = len(next(iter(batch.values())))

            def keep(index, tensor, features=features, mask=mask, n=n):
                features[index].append(sample_vectors(tensor, layers[index], n, mask).clone())

            with handing_over(model, layers, keep):
                logits = forward_logits(model, batch)
            keep(len(layers) - 1, logits)
        kept.append(features)
    a, b, *merged = kept
    for alpha, features in zip(alphas, merged, strict=True):
        for layer in range(len(layers)):
            for x, f_a, f_b in zip(features[layer], a[layer], b[layer], strict=True):
                cosine_distance(*products(x, f_a, f_b, alpha))


def peak() -> float:
    """The most memory that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
