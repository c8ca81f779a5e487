"""What suggested weights gain over equal ones, and what keeping one model's layers where features break does.

    python benchmarks/weights.py --parents DIR [--only suggested_weights layer_selective]

Writes the sections of these names of results/merging.md. Suggested weights are chosen on one half of the samples and
judged on the other, see `hf_llfc.diagnostics.suggest`.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hf_llfc
import tests.mlp_model  # noqa: F401  registers the MLP
from benchmarks.results import markdown, replace_section, require_sections
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.diagnostics.suggest import suggest_weights
from hf_llfc.evaluation import EvaluationConfig
from hf_llfc.parents.data import open_data
from hf_llfc.parents.parent import Parent

MINILM = {"task": "text-classification", "dataset": "minilm/data/all-test.jsonl", "batch_size": 16, "max_length": 48}
IMAGES = {"task": "image-classification", "dataset": "fashion/data/test.parquet", "batch_size": 100}
BYTES = {"task": "text-generation", "dataset": "lm/data/both-test.jsonl", "batch_size": 8, "max_length": 256}
BLOCKS = tuple(f"bert.encoder.layer.{place}" for place in range(6))

SUGGESTED = (
    (
        "MiniLM, four domains",
        ("tweets", "movies", "amazon", "editorials"),
        "minilm",
        {**MINILM, "samples": 1200},
        BLOCKS,
    ),
    ("MiniLM, two domains", ("tweets", "movies"), "minilm", {**MINILM, "samples": 640}, ()),
    ("ViT, spawned", ("vit-spawned-a", "vit-spawned-b"), "fashion", {**IMAGES, "samples": 2000}, ()),
    ("Llama, Brown and Python", ("llama-brown", "llama-python"), "lm", {**BYTES, "blocks": False, "samples": 128}, ()),
)

SELECTIVE = (
    ("ResNet, independent", ("resnet-independent-a", "resnet-independent-b"), 2000),
    ("ViT, independent", ("vit-independent-a", "vit-independent-b"), 2000),
)


def main() -> None:
    """Runs the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parents", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=SECTIONS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    require_sections(*(options.only or SECTIONS))
    for name in options.only or SECTIONS:
        started = time.perf_counter()
        text = SECTIONS[name](options.parents.resolve())
        command = f"python benchmarks/weights.py --parents parents --only {name}"
        replace_section(name, f"`{command}` ({time.perf_counter() - started:.0f} s on this machine)\n\n{text}")


def suggested_weights(parents: Path) -> str:
    """Suggested against equal weights, with labels and without, one weight a model and one a layer."""
    rows = []
    for title, names, group, settings, layers in SUGGESTED:
        checkpoints = [open_checkpoint(parents / group / name) for name in names]
        models = [Parent(checkpoint).load() for checkpoint in checkpoints]
        equal = [1 / len(models)] * len(models)
        ways = [(True, ()), (False, ()), *([(True, layers)] if layers else [])]
        for labels, modules in ways:
            config = EvaluationConfig(
                **{**settings, "dataset": str(parents / settings["dataset"])}, labels=labels, seed=1
            )
            found = suggest_weights(models, open_data(config, checkpoints[0]), reference=equal, layers=modules)
            kept = found.because.startswith("keep")
            weights = " ".join(f"{weight:.2f}" for weight in found.weights or ()) or "by layer"
            rows.append(
                {
                    "models": title,
                    "chosen with": ("labels" if labels else "no labels") + (", by layer" if modules else ""),
                    "suggested": "equal weights" if kept else weights,
                    "held-out": found.because,
                }
            )
            print(rows[-1], flush=True)
    return markdown(rows)


def layer_selective(parents: Path) -> str:
    """Merges of aligned independent models, plain and with the broken layers of the first kept."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for title, names, samples in SELECTIVE:
            for ratio in (None, 0.5, 0.25, 0.1):
                settings = {"keep_where_broken": {"model": 0, "ratio": ratio}} if ratio is not None else {}
                result = hf_llfc.merge(
                    [parents / "fashion" / name for name in names],
                    out=Path(folder) / "out",
                    align="weight_matching",
                    diagnose={
                        **IMAGES,
                        "dataset": str(parents / IMAGES["dataset"]),
                        "samples": samples,
                        "alphas": [0.0, 0.5, 1.0],
                    },
                    overwrite=True,
                    **settings,
                )
                report = result.report
                ratios = [row.ratio for row in report.at(0.5)]
                kept = report.data.get("kept", {"layers": []})["layers"]
                first, second, merged = (row["metrics"]["accuracy"] for row in result.table)
                rows.append(
                    {
                        "models": title,
                        "kept above": "–" if ratio is None else ratio,
                        "layers of the first": f"{len(kept)} of {len(ratios) - 1}",
                        "LLFC ÷ baseline by layer": " ".join(f"{each:.2f}" for each in ratios),
                        "parents": f"{first:.3f} / {second:.3f}",
                        "merge": f"{merged:.3f}",
                    }
                )
                print(rows[-1], flush=True)
    return markdown(rows)


SECTIONS = {"suggested_weights": suggested_weights, "layer_selective": layer_selective}

if __name__ == "__main__":
    main()
