"""Merges the real parents by the recipes, with every alignment, and writes what was measured into results/.

    python benchmarks/real_input.py --parents DIR [--only minilm_sentiment_two …] [--out DIR]

DIR is what `python benchmarks/train_parents.py --out DIR` made. Each section between its markers is replaced
by this run's tables; sections that were not run stay.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hf_llfc
import tests.mlp_model  # noqa: F401  registers the MLP and its adapter
from benchmarks.results import markdown, replace_section, require_sections
from hf_llfc.checkpoints import load_model, open_checkpoint
from hf_llfc.pipeline.flow import Result
from hf_llfc.recipe import load_recipe

Rows = list[dict[str, Any]]


def main() -> None:
    """Runs the sections asked for, each into its page of results/ as soon as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parents", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args()
    require_sections(*(options.only or SECTIONS))
    for name in options.only or SECTIONS:
        started = time.perf_counter()
        text = SECTIONS[name](options.parents.resolve(), options.out.resolve())
        command = f"python benchmarks/real_input.py --parents parents --only {name}"
        seconds = time.perf_counter() - started
        replace_section(name, f"`{command}` ({seconds:.0f} s on this machine)\n\n{text}")
        print(f"{name}: {seconds:.0f} s", flush=True)


def recipe_section(
    name: str, *methods: str, data: str | None = None, averaged_batch_norm: bool = False
) -> Callable[[Path, Path], str]:
    """A section that runs one recipe with several alignments, and the last of them without recomputed BatchNorm."""

    def section(parents: Path, out: Path) -> str:
        rows, layers = [], ""
        for method in methods:
            result, seconds = run_recipe(name, method, parents, out, data)
            rows.append(row(method, result, seconds))
            if method == "weight_matching":
                layers = layer_table(result)
        if averaged_batch_norm:
            changes = {"diagnose.batch_norm": "{recompute: false}"}
            result, seconds = run_recipe(name, methods[-1], parents, out, data, **changes)
            rows.append(row(f"{methods[-1]}, BatchNorm averaged", result, seconds))
        return f"{markdown(rows)}\n\nLayer by layer at the midpoint, after weight matching:\n\n{layers}"

    return section


def run_recipe(
    name: str, method: str, parents: Path, out: Path, data: str | None = None, **changes: Any
) -> tuple[Result, float]:
    """Runs a recipe of recipes/ with another alignment; `data` is a file for calibration, beside the parents."""
    target = out / f"{name}-{method}"
    overrides = [f"output_dir={target}", "overwrite=true", f"align.method={method}"]
    overrides += [f"{key}={value}" for key, value in changes.items()]
    working = parents.parent if parents.name == "parents" else link_to(parents, out)
    os.chdir(working)
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    if "activation_matching" in method:
        assert data is not None and recipe.diagnose is not None
        calibration = {
            "task": recipe.diagnose.data.task,
            "dataset": str(parents / data),
            "samples": 1000,
            "labels": False,
        }
        calibration |= {"batch_size": recipe.diagnose.data.batch_size}
        if recipe.diagnose.data.max_length is not None:
            calibration["max_length"] = recipe.diagnose.data.max_length
        if recipe.diagnose.data.task == "text-generation":
            calibration |= {"blocks": False, "samples": 64}
        overrides.append(f"align.calibration={json.dumps(calibration)}")
    started = time.perf_counter()
    result = hf_llfc.run(load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides))
    return result, time.perf_counter() - started


def link_to(parents: Path, out: Path) -> Path:
    """A folder in which the recipes find `parents/`."""
    folder = out / "working"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "parents"
    if not link.exists():
        link.symlink_to(parents, target_is_directory=True)
    return folder


def row(method: str, result: Result, seconds: float) -> dict[str, Any]:
    """One line of a section's table."""
    report = result.report
    assert report is not None
    middle = report.at(0.5)[-1]
    moved = sum(axis["moved"] for summary in result.alignments for axis in summary["axes"])
    units = sum(axis["units"] for summary in result.alignments for axis in summary["axes"])
    metric = next(name for name in ("bits_per_byte", "accuracy") if name in result.table[-1]["metrics"])
    values = [entry["metrics"][metric] for entry in result.table]
    return {
        "alignment": method.replace("_", " "),
        "units moved": f"{moved} of {units}" if units else "–",
        f"parents, {metric.replace('_', ' ')}": " / ".join(f"{value:.4f}" for value in values[:-1]),
        f"merge, {metric.replace('_', ' ')}": f"{values[-1]:.4f}",
        "loss barrier": f"{report.barrier.loss:.4f}",
        "error barrier": f"{report.barrier.error:.4f}",
        "logits: LLFC / baseline": f"{middle.llfc.mean:.4f} / {middle.baseline.mean:.4f}",
        "coefficient": f"{middle.coefficient.mean:.3f}",
        "verdict": report.verdict.answer,
        "seconds": f"{seconds:.0f}",
    }


def layer_table(result: Result) -> str:
    """1 − cos, baseline, ratio and coefficient of every layer at the midpoint."""
    assert result.report is not None
    return markdown(
        [
            {
                "layer": each.layer,
                "1 − cos(merged, blend)": f"{each.llfc.mean:.4f}",
                "1 − cos(A, B)": f"{each.baseline.mean:.4f}",
                "ratio": "–" if each.ratio is None else f"{each.ratio:.3f}",
                "coefficient": f"{each.coefficient.mean:.3f}",
            }
            for each in result.report.at(0.5)
        ]
    )


def minilm_planted(parents: Path, out: Path) -> str:
    """MiniLM moved by a random transform of every symmetric axis, and brought back."""
    source = open_checkpoint(parents / "minilm" / "tweets")
    model = load_model(source)
    spec = hf_llfc.PermutationSpec.from_config(source.config)
    planted = spec.random_alignment(torch.Generator().manual_seed(0))
    state = dict(source.state_dict())
    model = load_model(source, state_dict=planted.apply(state))
    model.save_pretrained(out / "planted")
    started = time.perf_counter()
    alignment = hf_llfc.align(out / "planted", to=parents / "minilm" / "tweets")
    seconds = time.perf_counter() - started
    found = alignment.apply(dict(open_checkpoint(out / "planted").state_dict()))
    exact = sum(torch.equal(found[name], tensor) for name, tensor in state.items())
    models = [parents / "minilm" / "tweets", out / "planted"]
    merged = hf_llfc.merge(models, out=out / "planted-merge", align="weight_matching", overwrite=True)
    difference = max(
        float((tensor - state[name]).abs().max())
        for name, tensor in load_file(merged.folder / "model.safetensors").items()
    )
    moved = sum(count for count, _ in alignment.moved.values())
    return markdown(
        [
            {
                "units moved back": moved,
                "tensors equal bit for bit": f"{exact} of {len(state)}",
                "largest difference of merge and original": f"{difference:.1e}",
                "sweeps": len(alignment.metadata["sweeps"]),
                "matching, seconds": f"{seconds:.0f}",
            }
        ]
    )


def mlp_pairs(parents: Path, out: Path) -> str:
    """The four independent pairs of MLPs, over three ways of alignment."""
    rows: Rows = []
    for label, method, start in (
        ("none", "none", None),
        ("weight matching", "weight_matching", None),
        ("activation matching", "activation_matching", None),
        ("weight matching, started from activations", "weight_matching", "activation_matching"),
    ):
        measured = []
        for pair in range(4):
            names = [f"parents/mlp/seed-{2 * pair}", f"parents/mlp/seed-{2 * pair + 1}"]
            measured.append(mlp_pair(names, method, start, parents, out))
        columns = np.array(measured)
        means, errors = columns.mean(0), columns.std(0, ddof=1) / len(columns) ** 0.5
        rows.append(
            {
                "alignment": label,
                "ends, accuracy": f"{means[0]:.4f}",
                "midpoint, accuracy": f"{means[1]:.4f} ± {errors[1]:.4f}",
                "accuracy barrier, points": f"{100 * means[2]:.2f} ± {100 * errors[2]:.2f}",
                "test-loss barrier": f"{means[3]:.3f} ± {errors[3]:.3f}",
                "training-loss barrier": f"{means[4]:.3f} ± {errors[4]:.3f}",
                "matching, seconds": f"{means[5]:.1f}",
            }
        )
    note = "Mean and standard error over the four pairs; barriers at the worst of eleven points of the path."
    return f"{markdown(rows)}\n\n{note}"


def mlp_pair(names: list[str], method: str, start: str | None, parents: Path, out: Path) -> list[float]:
    """Accuracy of ends and midpoint, barriers on test and training data, seconds of matching."""
    from hf_llfc.evaluation import EvaluationConfig

    os.chdir(link_to(parents, out) if parents.name != "parents" else parents.parent)
    data = {
        name: EvaluationConfig(
            "image-classification", str(parents / "mlp" / "data" / f"{name}.parquet"), samples=samples, batch_size=500
        )
        for name, samples in (("test", None), ("train", 10000))
    }
    seconds, alignment = 0.0, None
    if method != "none":
        calibration = EvaluationConfig(
            "image-classification", data["train"].dataset, samples=2000, batch_size=500, labels=False, seed=1
        )
        started = time.perf_counter()
        alignment = hf_llfc.align(
            names[1], to=names[0], method=method, start=start or "identity", calibration=calibration
        )
        seconds = time.perf_counter() - started
    test, train = (hf_llfc.diagnose(names[0], names[1], each, align=alignment or "none") for each in data.values())
    accuracy = {point.alpha: point.metrics["accuracy"] for point in test.path}
    assert test.barrier.error is not None and test.barrier.loss is not None and train.barrier.loss is not None
    ends = (accuracy[0.0] + accuracy[1.0]) / 2
    return [ends, accuracy[0.5], test.barrier.error, test.barrier.loss, train.barrier.loss, seconds]


def vit_pairs(parents: Path, out: Path) -> str:
    """Five pairs of ViTs with no common ancestor, with whole heads matched and with the channels inside them too."""
    pairs = ["independent-a independent-b", "spawned-a independent-a", "spawned-b independent-b"]
    pairs += ["independent-b spawned-a", "independent-a spawned-b"]
    inside = ("head_dim", "value_dim")
    rows: Rows = []
    for label, method, start, exclude in (
        ("none", "none", "identity", ()),
        ("weight matching, whole heads", "weight_matching", "identity", inside),
        ("weight matching", "weight_matching", "identity", ()),
        ("activation matching, whole heads", "activation_matching", "identity", inside),
        ("activation matching", "activation_matching", "identity", ()),
        ("weight matching, started from activations, whole heads", "weight_matching", "activation_matching", inside),
        ("weight matching, started from activations", "weight_matching", "activation_matching", ()),
    ):
        measured = np.array([vit_pair(pair.split(), method, start, exclude, parents) for pair in pairs])
        means, errors = measured.mean(0), measured.std(0, ddof=1) / len(measured) ** 0.5
        names = ("midpoint, accuracy", "midpoint, loss", "logits: LLFC", "coefficient")
        cells = (f"{mean:.3f} ± {error:.3f}" for mean, error in zip(means, errors, strict=True))
        rows.append({"alignment": label, **dict(zip(names, cells, strict=True))})
    return f"{markdown(rows)}\n\nMean and standard error over the pairs; parents reach .82 to .83."


def vit_pair(names: list[str], method: str, start: str, exclude: tuple[str, ...], parents: Path) -> list[float]:
    """Accuracy, loss, LLFC and coefficient at the midpoint of two ViTs."""
    from hf_llfc.evaluation import EvaluationConfig

    first, second = (parents / "fashion" / f"vit-{name}" for name in names)
    test, train = (str(parents / "fashion" / "data" / f"{part}.parquet") for part in ("test", "train"))
    alignment = None
    if method != "none":
        calibration = EvaluationConfig("image-classification", train, samples=1000, batch_size=250, labels=False)
        alignment = hf_llfc.align(
            second, to=first, method=method, start=start, exclude=exclude, calibration=calibration
        )
    data = EvaluationConfig("image-classification", test, samples=2000, batch_size=250)
    report = hf_llfc.diagnose(first, second, data, align=alignment or "none", alphas=[0.0, 0.5, 1.0])
    middle, point = report.at(0.5)[-1], next(point for point in report.path if point.alpha == 0.5)
    return [point.metrics["accuracy"], point.loss, middle.llfc.mean, middle.coefficient.mean]


def two_processes(parents: Path, out: Path) -> str:
    """One recipe alone and over two processes: align, merge and diagnose must agree."""
    working = link_to(parents, out) if parents.name != "parents" else parents.parent
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29571"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    outcomes, seconds = [], []
    for name, words in (("one", []), ("two", launcher)):
        recipe = ROOT / "recipes" / "fashion_mlp_independent.yaml"
        target = f"output_dir={out / ('processes-' + name)}"
        command = [
            sys.executable,
            *words,
            "-m",
            "hf_llfc",
            "--import",
            str(ROOT / "tests" / "mlp_model.py"),
            str(recipe),
            target,
        ]
        command += ["overwrite=true", "--format", "json"]
        started = time.perf_counter()
        outcomes.append(
            json.loads(subprocess.run(command, cwd=working, env=environment, capture_output=True, check=True).stdout)
        )
        seconds.append(time.perf_counter() - started)
    gaps = {
        part: max(
            abs(a - b) / max(abs(a), 1e-3)
            for a, b in zip(numbers(outcomes[0]["report"][part]), numbers(outcomes[1]["report"][part]), strict=True)
        )
        for part in ("path", "barrier", "layers")
    }
    same = all(
        (out / "processes-one" / file).read_bytes() == (out / "processes-two" / file).read_bytes()
        for file in ("model.safetensors", "llfc/alignment.safetensors")
    )
    return markdown(
        [
            {
                "merged weights and alignment": "equal byte for byte" if same else "DIFFERENT",
                **{f"{part}, largest relative difference": f"{gap:.1e}" for part, gap in gaps.items()},
                "seconds, one / two processes": f"{seconds[0]:.0f} / {seconds[1]:.0f}",
            }
        ]
    )


def numbers(value: Any) -> list[float]:
    """All numbers of a JSON value."""
    if isinstance(value, dict):
        return [number for each in value.values() for number in numbers(each)]
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def four_domains(parents: Path, out: Path) -> str:
    """The uniform average of four fine-tunes against the best single one, and the path."""
    result, seconds = run_recipe("minilm_sentiment_four", "weight_matching", parents, out)
    rows = [
        {
            "model": Path(each["id"]).name,
            "mean accuracy over the four domains": f"{each['metrics']['accuracy']:.4f}",
            "loss": f"{each['loss']:.4f}",
        }
        for each in result.table
    ]
    best = max(each["metrics"]["accuracy"] for each in result.table[:-1])
    merged = result.table[-1]["metrics"]["accuracy"]
    assert result.report is not None
    points = [
        {"point": each.name, "accuracy": f"{each.metrics['accuracy']:.4f}", "loss": f"{each.loss:.4f}"}
        for each in result.report.path
    ]
    return (
        f"{markdown(rows)}\n\nBest single model {best:.4f}, uniform average {merged:.4f} ({seconds:.0f} s). Over the "
        f"simplex:\n\n{markdown(points)}\n\nFeatures at its centre; the baseline is the mean over the pairs of models:"
        f"\n\n{layer_table(result)}"
    )


ALL = ("none", "weight_matching", "activation_matching")
SECTIONS: dict[str, Callable[[Path, Path], str]] = {
    "mlp_pairs": mlp_pairs,
    "fashion_mlp_independent": recipe_section("fashion_mlp_independent", *ALL, data="mlp/data/train.parquet"),
    "minilm_planted": minilm_planted,
    "minilm_sentiment_two": recipe_section("minilm_sentiment_two", "none", "weight_matching"),
    "minilm_sentiment_four": four_domains,
    "minilm_task_arithmetic": recipe_section("minilm_task_arithmetic", "none", "weight_matching"),
    "llama_bytes_branches": recipe_section("llama_bytes_branches", *ALL, data="lm/data/brown-train.jsonl"),
    "gpt2_bytes_branches": recipe_section("gpt2_bytes_branches", "none", "weight_matching"),
    "two_processes": two_processes,
    "fashion_resnet_spawned": recipe_section("fashion_resnet_spawned", "none", "weight_matching"),
    "fashion_resnet_independent": recipe_section(
        "fashion_resnet_independent", *ALL, data="fashion/data/train.parquet", averaged_batch_norm=True
    ),
    "fashion_vit_spawned": recipe_section("fashion_vit_spawned", "none", "weight_matching"),
    "fashion_vit_independent": recipe_section("fashion_vit_independent", *ALL, data="fashion/data/train.parquet"),
    "vit_pairs": vit_pairs,
}

if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
