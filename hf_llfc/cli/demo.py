"""`hf-llfc demo`: the main job on data and models that need no network.

Small Hugging Face models are trained on scikit-learn's handwritten digits: for each architecture two independent seeds
and a spawned pair (one shared start, two branches). Each pair is then merged by recipes, without and with
alignment, through the pipeline that any recipe runs. What is printed is what the run measured. A demo that was stopped
goes on with the models and merges that it had finished.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from torch import Tensor
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_llfc import __version__
from hf_llfc.checkpoints.files import CONFIG_FILE, SINGLE_FILE
from hf_llfc.checkpoints.writing.listing import Listing, files_in, list_files, read_listing
from hf_llfc.checkpoints.writing.output import refuse_losses
from hf_llfc.cli.console import print_json, print_table, progress_bars
from hf_llfc.diagnostics import ConnectivityReport
from hf_llfc.errors import CheckpointError
from hf_llfc.foundation.layout import LLFC_FOLDER, REPORT_FILE
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.parallel.threads import one_thread
from hf_llfc.pipeline.flow import run
from hf_llfc.recipe import load_recipe

logger = logging.getLogger(__name__)

TEST_IMAGES = 360
METHODS = {"independent": ("none", "weight_matching", "activation_matching"), "spawned": ("none", "weight_matching")}
PARENTS = ("a", "b", "branch-a", "branch-b")
SUMMARY = "demo.json"
UNFINISHED = "unfinished.json"
"""Beside the summary's place while the demo runs: the seed and the versions, on which all results depend."""
BATCH_SIZE = 64


@dataclass(frozen=True)
class Architecture:
    """What the demo trains.

    Attributes:
        title: As the table names it.
        scale: By how much the 8 × 8 digits are enlarged.
        epochs: Of an independent run; a spawned pair shares the first half and adds as many for each branch.
        learning_rate: Peak of the one-cycle schedule.
    """

    title: str
    scale: int
    epochs: int
    learning_rate: float

    def build(self) -> PreTrainedModel:
        """A fresh model from torch's global seed."""
        common: dict[str, Any] = {"num_channels": 1, "num_labels": 10}
        if self.title == "resnet":
            return ResNetForImageClassification(
                ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", **common)
            )
        return ViTForImageClassification(
            ViTConfig(
                image_size=8 * self.scale,
                patch_size=2 * self.scale,
                hidden_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=128,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                **common,
            )
        )


ARCHITECTURES = (Architecture("resnet", 2, 8, 2e-2), Architecture("vit", 1, 24, 2e-3))


@dataclass(frozen=True)
class Digits:
    """Images `[n, 1, height, width]` in −1 … 1 and labels `[n]`."""

    images: Tensor
    labels: Tensor


def run_demo(out: str | Path, *, seed: int = 0, overwrite: bool = False, progress: Progress = silent) -> dict[str, Any]:
    """Trains, aligns, merges and diagnoses; leaves parents, data, recipes and merged models in a folder.

    Args:
        out: The folder to write.
        seed: Seed of everything random.
        overwrite: Whether an earlier demo at `out` may be replaced.
        progress: Shown meanwhile.

    Returns:
        `rows` of the table, `sentences` that sum it up, `seconds` and `out`, as JSON values.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    folder = _begin(Path(out), seed, overwrite)
    try:
        with one_thread():  # the models are tiny
            for architecture in ARCHITECTURES:
                rows += _train_and_merge(folder, architecture, seed, progress)
    except BaseException:
        if any((folder / "parents").glob("*")):
            logger.warning("%s: stopped before the end; what is finished is kept: run the same again to go on", out)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    seconds = time.monotonic() - started
    result = {
        "rows": rows,
        "sentences": _sentences(rows, Path(out), seconds),
        "seconds": round(seconds, 1),
        "out": str(out),
    }
    (folder / SUMMARY).write_text(json.dumps(result, indent=2))
    (folder / UNFINISHED).unlink()
    list_files(folder, of_run=_own_names())
    return result


def execute(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    with progress_bars(shown=not options.quiet) as progress:
        result = run_demo(options.out, seed=options.seed or 0, overwrite=options.overwrite, progress=progress)
    if options.format == "json":
        print_json(result)
    else:
        print_table("midpoint of two models, before and after alignment", result["rows"])
        for sentence in result["sentences"]:
            print(sentence)
    return 0


def _train_and_merge(folder: Path, architecture: Architecture, seed: int, progress: Progress) -> list[dict[str, Any]]:
    """The rows of one architecture: every pair, merged by every method."""
    train, test = _digits(architecture.scale, seed)
    data = {name: _write_data(folder, architecture, name, part) for name, part in (("train", train), ("test", test))}
    rows = []
    for pair, parents in _train_parents(folder, architecture, train, seed, progress).items():
        for method in METHODS[pair]:
            report = _merge(folder, architecture, pair, parents, method, data, progress)
            rows.append(_row(architecture, pair, method, report))
    return rows


def _begin(out: Path, seed: int, overwrite: bool) -> Path:
    """The folder to write, absolute: a new one, or that of the same demo stopped; only demos are replaced."""
    folder = out.expanduser().resolve()
    libraries = {"hf_llfc": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    identity = {"seed": seed, **libraries}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if (folder / UNFINISHED).is_file() and _read(folder / UNFINISHED) == identity:
            logger.warning("%s: goes on after an interrupted demo", out)
            return folder
        if not any((folder / name).is_file() for name in (SUMMARY, UNFINISHED)):
            raise CheckpointError(f"{out}: the folder is not empty; choose another with --out")
        if not overwrite:
            found = "an interrupted demo of another seed or version" if (folder / UNFINISHED).is_file() else "a demo"
            raise CheckpointError(f"{out}: the folder is not empty, it holds {found}; --overwrite replaces it")
        _refuse_losses(folder, out)
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out}: the folder cannot be made ({error.strerror})") from None
    (folder / UNFINISHED).write_text(json.dumps(identity))
    return folder


def _refuse_losses(folder: Path, out: Path) -> None:
    """Refuses to replace a demo in which there is more than a demo wrote."""
    listing = read_listing(folder) or Listing(frozenset())
    of_runs: set[str] = set()
    for merged in sorted((folder / "merged").glob("*")):
        inner = read_listing(merged)
        if inner is not None:
            refuse_losses(merged, inner, str(out / "merged" / merged.name))
            of_runs |= {f"merged/{merged.name}/{name}" for name in files_in(merged)}
    for partial in (folder / "merged").glob(".*.partial"):
        of_runs |= {f"merged/{partial.name}/{name}" for name in files_in(partial)}
    refuse_losses(folder, replace(listing, names=listing.names | _own_names() | of_runs), str(out))


def _own_names() -> set[str]:
    """The files that a demo itself writes; those in `merged` are written by its runs."""
    titles = [each.title for each in ARCHITECTURES]
    models = ["draft", *(f"parents/{title}-{name}" for title in titles for name in PARENTS)]
    names = {SUMMARY, UNFINISHED, *(f"{model}/{name}" for model in models for name in (CONFIG_FILE, SINGLE_FILE))}
    for title in titles:
        names |= {f"data/{title}-{part}.{ending}" for part in ("train", "test") for ending in ("parquet", "draft")}
        names |= {f"recipes/{title}-{pair}-{method}.yaml" for pair in METHODS for method in METHODS[pair]}
    return names


def _read(path: Path) -> Any:
    """What a file says as JSON; None where a stop left half of it."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def _digits(scale: int, seed: int) -> tuple[Digits, Digits]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    images = torch.from_numpy(digits.images[order]).float()[:, None] / 8 - 1
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    labels = torch.from_numpy(digits.target[order]).long()
    return Digits(images[TEST_IMAGES:], labels[TEST_IMAGES:]), Digits(images[:TEST_IMAGES], labels[:TEST_IMAGES])


def _write_data(folder: Path, architecture: Architecture, name: str, part: Digits) -> Path:
    import datasets

    path = folder / "data" / f"{architecture.title}-{name}.parquet"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        columns = {"image": list(part.images.numpy()), "label": part.labels.tolist()}
        draft = path.with_suffix(".draft")
        datasets.Dataset.from_dict(columns).to_parquet(str(draft))
        draft.rename(path)
    return path


def _train_parents(
    folder: Path, architecture: Architecture, train: Digits, seed: int, progress: Progress
) -> dict[str, tuple[Path, Path]]:
    """Two independent runs, and two branches of the first half of a third; those that are there stay."""
    paths = {name: folder / "parents" / f"{architecture.title}-{name}" for name in PARENTS}
    missing = [name for name, path in paths.items() if not path.exists()]
    branches = [name for name in missing if name.startswith("branch")]
    epochs = architecture.epochs
    total = len(missing) * epochs + (epochs // 2 if branches else 0)
    done = 0

    def fit(model: PreTrainedModel, count: int, order_seed: int) -> PreTrainedModel:
        nonlocal done
        for _ in _epochs(model, train, count, architecture.learning_rate, order_seed):
            progress(f"training {architecture.title}", done, total)
            done += 1
        return model

    def save(model: PreTrainedModel, name: str) -> None:
        draft = folder / "draft"
        shutil.rmtree(draft, ignore_errors=True)
        model.save_pretrained(draft)
        paths[name].parent.mkdir(exist_ok=True)
        draft.rename(paths[name])

    for offset, name in enumerate(("a", "b")):
        if name in missing:
            torch.manual_seed(seed + offset)
            save(fit(architecture.build(), epochs, seed + offset), name)
    if branches:
        torch.manual_seed(seed + 2)
        shared = fit(architecture.build(), epochs // 2, seed + 2)
        state = {name: tensor.clone() for name, tensor in shared.state_dict().items()}
    for name in branches:
        branch = architecture.build()
        branch.load_state_dict(state)
        save(fit(branch, epochs, seed + 10 + ("branch-a", "branch-b").index(name)), name)
    progress(f"training {architecture.title}", total, total)
    return {"independent": (paths["a"], paths["b"]), "spawned": (paths["branch-a"], paths["branch-b"])}


def _epochs(model: PreTrainedModel, train: Digits, count: int, learning_rate: float, seed: int) -> Iterator[int]:
    """Trains for a number of epochs, yielding before each."""
    generator = torch.Generator().manual_seed(seed)
    steps = count * -(-len(train.labels) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for epoch in range(count):
        yield epoch
        model.train()
        for picked in torch.randperm(len(train.labels), generator=generator).split(BATCH_SIZE):
            loss = model(pixel_values=train.images[picked], labels=train.labels[picked]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def _merge(
    folder: Path,
    architecture: Architecture,
    pair: str,
    parents: tuple[Path, Path],
    method: str,
    data: Mapping[str, Path],
    progress: Progress,
) -> ConnectivityReport:
    """Writes a recipe and runs it, unless it was run."""
    name = f"{architecture.title}-{pair}-{method}"
    merged = folder / "merged" / name
    # An output is there when all of it is, and what it was made in is gone.
    if merged.exists() and not (merged.parent / f".{name}.partial").exists():
        return ConnectivityReport.load(merged / LLFC_FOLDER / REPORT_FILE)
    calibration = {"task": "image-classification", "dataset": str(data["train"]), "samples": 512, "batch_size": 256}
    align: dict[str, Any] = {"method": method}
    if method == "activation_matching":
        align["calibration"] = calibration
    diagnose: dict[str, Any] = {
        "task": "image-classification",
        "dataset": str(data["test"]),
        "batch_size": 180,
        "alphas": 11,
    }
    if architecture.title == "resnet":
        diagnose["batch_norm"] = {"recompute": True, **{key: calibration[key] for key in ("dataset", "samples")}}
    recipe = {
        "models": [{"model": str(parent), "parameters": {"weight": 0.5}} for parent in parents],
        "merge_method": "linear",
        "align": align,
        "diagnose": diagnose,
        "output_dir": str(merged),
    }
    path = folder / "recipes" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))

    def say(description: str, done: int, total: int) -> None:
        progress(f"merging {name}: {description}", done, total)

    # A run that was stopped as its output had just been moved into place finishes over it.
    result = run(replace(load_recipe(path), overwrite=merged.exists()), progress=say)
    assert result.report is not None
    return result.report


def _row(architecture: Architecture, pair: str, method: str, report: ConnectivityReport) -> dict[str, Any]:
    points = {point.alpha: point for point in report.path}
    logits = report.at(0.5)[-1]
    return {
        "model": architecture.title,
        "pair": pair,
        "alignment": method,
        "parents": f"{points[1.0].metrics['accuracy']:.1%} / {points[0.0].metrics['accuracy']:.1%}",
        "midpoint": f"{points[0.5].metrics['accuracy']:.1%}",
        "loss barrier": report.barrier.loss,
        "LLFC logits": logits.llfc.mean,
        "baseline": logits.baseline.mean,
        "coefficient": logits.coefficient.mean,
        "verdict": report.verdict.answer,
    }


def _sentences(rows: list[dict[str, Any]], out: Path, seconds: float) -> list[str]:
    sentences = []
    for architecture in ARCHITECTURES:
        independent = {
            row["alignment"]: row for row in rows if row["model"] == architecture.title and row["pair"] == "independent"
        }
        before, after = independent["none"], independent["weight_matching"]
        closed = "closes" if after["loss barrier"] < 0.1 * before["loss barrier"] else "narrows"
        if after["loss barrier"] >= before["loss barrier"]:
            closed = "does not narrow"
        sentences.append(
            f"{architecture.title}: weight matching {closed} the barrier between independent models "
            f"({before['loss barrier']:.2f} → {after['loss barrier']:.2f} nats; "
            f"midpoint {before['midpoint']} → {after['midpoint']})"
        )
    sentences.append(f"{seconds:.0f} s; models, recipes, cards and plots are in {out}")
    return sentences
