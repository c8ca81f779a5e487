"""Where merges of independent models break, the ways over them, whose weights matter, and what the measures cost.

    python benchmarks/where_it_breaks.py --seeds DIR --mlp DIR [--only blocks fold importance low_rank cost] [--write]

The directories are where `benchmarks/train_seeds.py` and `benchmarks/train_parents.py --only mlp` put their models.
Every part leaves its rows as JSON in --out, and what exists is kept; `--write` puts the section `where_it_breaks` into
results/llfc.md.
"""

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_llfc
import tests.mlp_model  # noqa: F401  (registers the MLP)
from benchmarks.results import markdown, replace_section
from hf_llfc import ConnectivityReport
from hf_llfc.diagnostics.measures.geometry import angle_to, rank_one_share
from hf_llfc.diagnostics.rows import AFTER, BEFORE
from hf_llfc.publishing.breaking import breaking_sentence

DEPTH, WIDTH = 10, 128
STEPS, BATCH, RATE = 3000, 128, 0.01
"""Of the deep networks that tell two classes apart."""


@dataclass(frozen=True)
class Merge:
    """A merge of independent models.

    Attributes:
        models: Their folders, below that of their family.
        align: Method of alignment.
        task: Of the data.
        samples: To measure on.
        fitted_on: Training samples, where the merge is calibrated.
    """

    models: tuple[str, ...]
    align: str = "weight_matching"
    task: str = "image-classification"
    samples: int = 500
    fitted_on: int = 0

    def run(self, folder: Path, measures: Sequence[str]) -> tuple[ConnectivityReport, float]:
        """The report of a recipe that merges and measures, and the seconds that it took."""
        language = self.task == "text-generation"
        test, train = ("brown-test.jsonl", "brown-train.jsonl") if language else ("test.parquet", "train.parquet")
        settings: dict[str, Any] = {"task": self.task, "batch_size": 16 if language else 250}
        settings |= {"max_length": 128, "blocks": False} if language else {}
        with tempfile.TemporaryDirectory() as out:
            recipe = {
                "models": [
                    {"model": str(folder / name), "parameters": {"weight": 1 / len(self.models)}}
                    for name in self.models
                ],
                "align": {"method": self.align},
                "diagnose": {
                    **settings,
                    "dataset": str(folder / "data" / test),
                    "samples": self.samples,
                    "alphas": 3,
                    "measures": list(measures),
                },
                "output_dir": f"{out}/merge",
            }
            if self.fitted_on:
                fitted = {**settings, "dataset": str(folder / "data" / train), "samples": self.fitted_on}
                recipe["calibrate"] = fitted
            started = time.perf_counter()
            report = hf_llfc.run(recipe).report
        assert report is not None
        return report, time.perf_counter() - started


TEXT: Mapping[str, Any] = {"task": "text-generation", "samples": 48}
BROKEN = {
    "MLP, as they are": Merge(("seed-0", "seed-1"), "none"),
    "MLP": Merge(("seed-0", "seed-1")),
    "ResNet": Merge(("resnet-1", "resnet-2")),
    "ViT": Merge(("vit-128-1", "vit-128-2")),
    "GPT-2": Merge(("gpt2-1", "gpt2-2"), **TEXT),
    "Llama": Merge(("llama-1", "llama-2"), **TEXT),
}
FOLDED = {
    "MLP, as they are": Merge(("seed-0", "seed-1"), "none", fitted_on=2000),
    "MLP": Merge(("seed-0", "seed-1"), fitted_on=2000),
    "three MLPs": Merge(("seed-0", "seed-1", "seed-2"), fitted_on=2000),
    "ResNet": Merge(("resnet-1", "resnet-2"), fitted_on=2000),
    "three ResNets": Merge(("resnet-1", "resnet-2", "resnet-3"), fitted_on=2000),
    "ViT": Merge(("vit-128-1", "vit-128-2"), fitted_on=2000),
}


def folder_of(merge: Merge, options: argparse.Namespace) -> Path:
    """Where the models of a merge are."""
    chosen: Path = options.mlp if merge.models[0].startswith("seed-") else options.seeds
    return chosen.resolve()


def blocks(options: argparse.Namespace) -> list[dict[str, str]]:
    """Which blocks carry the barrier of every pair."""
    rows = []
    for name, merge in BROKEN.items():
        report, _ = merge.run(folder_of(merge, options), ["blocks"])
        steps = [row.step or 0.0 for row in report.blocks]
        drifts = [row for row in report.blocks if row.local is not None]
        rows.append(
            {
                "pair": name,
                "barrier": f"{sum(steps):.3f}",
                "steps, in order": ", ".join(f"{step:.2f}" for step in steps),
                "alone": ", ".join(f"{row.alone:.2f}" for row in report.blocks),
                "without": ", ".join(f"{row.without:.2f}" for row in report.blocks),
                "drift": ", ".join(f"{row.drift:.2f}" for row in drifts),
                "of it local": ", ".join(f"{100 * row.local:.0f} %" for row in drifts),
                "where it breaks": str(breaking_sentence(report)),
                "ten samples carry": f"{100 * sum(row.share or 0.0 for row in report.samples):.0f} %",
            }
        )
        print(rows[-1], flush=True)
    return rows


def fold(options: argparse.Namespace) -> list[dict[str, str]]:
    """Barriers over calibrated merges beside those of straight lines."""
    rows = []
    for name, merge in FOLDED.items():
        line = Merge(merge.models, merge.align, merge.task, merge.samples).run(folder_of(merge, options), ["fold"])[0]
        report, _ = merge.run(folder_of(merge, options), ["fold"])
        ways, folds = ([row for row in report.fold if len(row.models) == count] for count in (1, 2))
        rows.append(
            {
                "models": name,
                "over their mean": ", ".join(f"{row.loss:.3f}" for row in line.fold if len(row.models) == 2),
                "over the calibrated merge": ", ".join(f"{row.loss:.3f}" for row in folds),
                "in points of error": ", ".join(f"{100 * row.error:.1f}" for row in folds),
                "from each model to it": ", ".join(f"{row.loss:.3f}" for row in ways),
                "length": ", ".join(f"{row.length:.3f}" for row in folds),
            }
        )
        print(rows[-1], flush=True)
    return rows


def importance(options: argparse.Namespace) -> list[dict[str, str]]:
    """Where the weights of a model matter, and whether both importances say the same."""
    rows = []
    for name, merge in BROKEN.items():
        if merge.align == "none":
            continue
        report, _ = merge.run(folder_of(merge, options), ["importance"])
        tensors = report.importance
        order = [BEFORE, *dict.fromkeys(row.block for row in tensors if row.block not in (BEFORE, AFTER)), AFTER]
        whole = {kind: sum(getattr(row, kind)[0] for row in tensors) for kind in ("fisher", "feedback")}

        def shares(kind: str, tensors: Any = tensors, order: Sequence[str] = order, whole: Any = whole) -> str:
            found = [sum(getattr(row, kind)[0] for row in tensors if row.block == block) for block in order]
            return ", ".join(f"{100 * value / whole[kind]:.0f} %" for value in found if value)

        logs = [np.log([getattr(row, kind)[0] for row in tensors if row.fisher[0]]) for kind in ("fisher", "feedback")]
        models = [np.log([row.fisher[m] for row in tensors if all(row.fisher)]) for m in (0, 1)]
        rows.append(
            {
                "pair": name,
                "Fisher of A, in order": shares("fisher"),
                "feedback of A": shares("feedback"),
                "rank correlation of both, over tensors": f"{spearmanr(*logs).statistic:.2f}",
                "of Fisher in A and in B": f"{spearmanr(*models).statistic:.2f}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def low_rank(options: argparse.Namespace) -> list[dict[str, str]]:
    """Rank-one share of deep ReLU networks that tell two classes apart, before and after training."""
    inputs, labels = two_classes(options.mlp / "data" / "train.parquet")
    rows = []
    for decay in (0.0, 1e-2):
        for seed in (0, 1):
            network = deep_network(inputs.shape[1], seed)
            before = numbers_of(network)
            active = train_network(network, inputs, labels, seed, decay)
            after = numbers_of(network)
            rows.append(
                {
                    "weight decay": f"{decay:g}",
                    "seed": str(seed),
                    "rank one at the start, in order": ", ".join(f"{share:.2f}" for share in before[0]),
                    "rank one after training": ", ".join(f"{share:.2f}" for share in after[0]),
                    "turn, in degrees": ", ".join(f"{turn:.0f}" for turn in after[1]),
                    "always active": ", ".join(f"{100 * share:.0f} %" for share in active[0]),
                    "never active": ", ".join(f"{100 * share:.0f} %" for share in active[1]),
                }
            )
            print(rows[-1], flush=True)
    return rows


def two_classes(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of the first two classes in rows, from -1 to 1, and which class each is of."""
    columns = pq.read_table(path, columns=["image", "label"]).slice(0, 20_000).to_pydict()
    chosen = [index for index, label in enumerate(columns["label"]) if label < 2]
    images = [np.asarray(Image.open(io.BytesIO(columns["image"][index]["bytes"]))) for index in chosen]
    pixels = torch.tensor(np.stack(images), dtype=torch.float32).flatten(1) / 127.5 - 1
    return pixels, torch.tensor([columns["label"][index] for index in chosen])


def deep_network(inputs: int, seed: int) -> nn.Sequential:
    """Linear maps with ReLU between."""
    torch.manual_seed(seed)
    sizes = [inputs, *[WIDTH] * (DEPTH - 1)]
    network = nn.Sequential(*(module for a, b in pairwise(sizes) for module in (nn.Linear(a, b), nn.ReLU())))
    network.append(nn.Linear(WIDTH, 2))
    for module in network:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return network


def train_network(
    network: nn.Sequential, inputs: torch.Tensor, labels: torch.Tensor, seed: int, decay: float
) -> tuple[list[float], list[float]]:
    """Trains by SGD, and tells the shares of units that are always and never active."""
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9, weight_decay=decay)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        rows = torch.randint(len(inputs), (BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(network(inputs[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    always, never, features = [], [], inputs
    with torch.no_grad():
        for module in network:
            features = module(features)
            if isinstance(module, nn.ReLU):
                always.append(float((features > 0).all(0).double().mean()))
                never.append(float((features == 0).all(0).double().mean()))
    return always, never


def numbers_of(network: nn.Sequential) -> tuple[list[float], list[float]]:
    """Rank-one shares of all maps but the last, whose rank is two at most, and the angles from one to the next."""
    maps = [module.weight.detach().double() for module in network if isinstance(module, nn.Linear)]
    parts = [torch.linalg.svd(weight, full_matrices=False) for weight in maps]
    shares = [rank_one_share(values) or 0.0 for _, values, _ in parts[:-1]]
    turns = [angle_to(before[0][:, 0], after[2][0]) or 0.0 for before, after in pairwise(parts)]
    return shares, turns


def cost(options: argparse.Namespace) -> list[dict[str, str]]:
    """Seconds of every measure beside those of passes of both models and the merge."""
    from hf_llfc.alignment.checkpoints import align_checkpoints
    from hf_llfc.checkpoints import open_checkpoint
    from hf_llfc.diagnostics.combination import CombinedModel
    from hf_llfc.diagnostics.measures.measures import run_merge_measures
    from hf_llfc.diagnostics.measures.subject import Subject
    from hf_llfc.evaluation import EvaluationConfig, evaluate_model
    from hf_llfc.parents.data import open_data
    from hf_llfc.parents.parent import Parent
    from hf_llfc.recipe import AlignSection

    rows = []
    for name in ("ResNet", "ViT"):
        merge = BROKEN[name]
        folder = folder_of(merge, options)
        checkpoints = [open_checkpoint(str(folder / model)) for model in merge.models]
        alignment = align_checkpoints(*checkpoints, AlignSection(merge.align))
        models = Parent(checkpoints[0]).load(), Parent(checkpoints[1], alignment).load()
        language = merge.task == "text-generation"
        config = EvaluationConfig(
            merge.task,
            str(folder / "data" / ("brown-test.jsonl" if language else "test.parquet")),
            samples=4 * merge.samples,
            batch_size=16 if language else 250,
            **({"max_length": 128, "blocks": False} if language else {}),
        )
        data = open_data(config, checkpoints[0])
        combined = CombinedModel(models)
        combined.move_to((0.5, 0.5))
        subject = Subject(models, combined.model, (0.5, 0.5), (0.5, 0.5))
        bare = sum(seconds_of(partial(evaluate_model, model, data)) for model in (*models, combined.model))
        row = {"pair": name, "samples": str(len(data)), "three passes, s": f"{bare:.1f}"}
        for measure in ("units", "importance", "fold", "blocks"):
            taken = seconds_of(partial(run_merge_measures, [measure], subject, data))
            row[f"{measure}, × that"] = f"{taken / bare:.1f}"
        rows.append(row)
        print(row, flush=True)
    return rows


def seconds_of(work: Callable[[], object]) -> float:
    """The faster of two runs."""
    taken = []
    for _ in range(2):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


PARTS: Mapping[str, tuple[str, Callable[[argparse.Namespace], list[dict[str, str]]]]] = {
    "blocks": (
        "Barrier by block at the midpoint, in nats: losses above the models' if one block alone is merged (*alone*), "
        "if all is but this block (*without*), and what each adds on top of those before it (*steps*, which sum to the "
        "barrier); *drift* of features from the blend, and its share that arises in the block",
        blocks,
    ),
    "fold": (
        "Barriers from one model to another by way of their mean, and by way of the same calibrated on 2000 samples; "
        "length over the distance of the two models",
        fold,
    ),
    "importance": ("Shares of the blocks in Fisher information and feedback, 64 samples", importance),
    "low_rank": (
        f"Deep ReLU networks ({DEPTH} maps, {WIDTH} wide) that tell two classes of Fashion-MNIST apart, {STEPS} steps "
        "of SGD: share of the largest singular value of each map but the last, and angle between what a map writes and "
        "the next reads most",
        low_rank,
    ),
    "cost": ("What the measures take, over three bare passes (both models and the merge)", cost),
}


def main() -> None:
    """Measures the parts asked for and rewrites the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=Path, required=True)
    parser.add_argument("--mlp", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/where_it_breaks"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only or PARTS:
        path = options.out / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(PARTS[name][1](options)))
    files = {title: options.out / f"{name}.json" for name, (title, _) in PARTS.items()}
    tables = [f"{title}:\n\n{markdown(json.loads(path.read_text()))}" for title, path in files.items() if path.exists()]
    text = "`python benchmarks/where_it_breaks.py --seeds parents/seeds --mlp parents/mlp --write`\n\n" + "\n\n".join(
        tables
    )
    print(text)
    if options.write:
        replace_section("where_it_breaks", text)


if __name__ == "__main__":
    main()
