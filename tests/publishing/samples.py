"""A finished merge as the publishing tests need it: a folder, its recipe and its report."""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from hf_llfc.diagnostics import ConnectivityReport
from hf_llfc.publishing.card.card import Evidence
from hf_llfc.publishing.lineage import ParentInfo
from hf_llfc.publishing.record import AlignmentSummary, Result, RunRecord
from hf_llfc.recipe import load_recipe

A_REVISION = "0123456789abcdef0123456789abcdef01234567"
B_REVISION = "fedcba9876543210fedcba9876543210fedcba98"
VERSIONS = {"python": "3.11.7", "hf-llfc": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
CONFIG = {"architectures": ["BertForSequenceClassification"], "model_type": "bert", "hidden_size": 8}
MODELS: list[dict[str, Any]] = [
    {
        "id": "ada/bert-tweets",
        "revision": A_REVISION,
        "weight": 0.5,
        "card": {"license": "mit", "language": "en", "datasets": ["ada/tweets"]},
    },
    {
        "id": "grace/bert-films",
        "revision": B_REVISION,
        "weight": 0.5,
        "card": {"license": "mit", "language": ["en", "fr"]},
    },
]
ALIGNMENT: dict[str, Any] = {
    "method": "weight_matching",
    "objective_before": 812.5,
    "objective_after": 1000.0,
    "cosine_before": 0.8125,
    "cosine_after": 1.0,
    "converged": True,
    "reference": "ada/bert-tweets",
    "model": "grace/bert-films",
    "axes": [{"axis": "neurons", "moved": 30, "units": 32}, {"axis": "heads", "moved": 0, "units": 4}],
}
RECIPE: dict[str, Any] = {
    "models": [
        {"model": f"ada/bert-tweets@{A_REVISION}", "parameters": {"weight": 0.5}},
        {"model": f"grace/bert-films@{B_REVISION}", "parameters": {"weight": 0.5}},
    ],
    "merge_method": "linear",
    "align": {"method": "weight_matching", "seed": 0},
    "seed": 0,
    "output_dir": "merged",
}


def as_report(values: Mapping[str, Any]) -> ConnectivityReport:
    """A report from its JSON values."""
    return ConnectivityReport.from_dict(values)


def as_parents(models: Sequence[Mapping[str, Any]]) -> list[ParentInfo]:
    """Parents from plain values, with a card that was read and is empty where they say nothing of it."""
    return [
        ParentInfo.named(**{"card": {}, **{k: v for k, v in m.items() if k != "id"}, "name": m["id"]}) for m in models
    ]


def make_evidence(
    folder: Path | None = None,
    *,
    recipe: Mapping[str, Any] | None = RECIPE,
    report: Mapping[str, Any] | None = None,
    models: Sequence[Mapping[str, Any]] = MODELS,
    alignments: Sequence[Mapping[str, Any]] = (),
    results: Sequence[Mapping[str, Any]] = (),
    **of_run: Any,
) -> Evidence:
    """The evidence of a card from plain values."""
    summaries = tuple(map(AlignmentSummary.from_dict, alignments))
    return Evidence(
        as_parents(models),
        load_recipe(recipe) if recipe else None,
        as_report(report) if report else None,
        RunRecord(summaries, tuple(Result(**row) for row in results), **of_run),
    )


def statistic(mean: float | None, std: float | None = 0.0) -> dict[str, float | None]:
    return {"mean": mean, "std": std}


def layer(name: str, alpha: float, llfc: float, baseline: float, coefficient: float) -> dict[str, Any]:
    return {
        "layer": name,
        "alpha": alpha,
        "llfc": statistic(llfc, llfc / 2),
        "baseline": statistic(baseline, baseline / 2),
        "coefficient": statistic(coefficient, 0.01),
    }


def make_report(**changes: Any) -> dict[str, Any]:
    """A report of eleven α and four layers, with some of its parts changed."""
    path = []
    for step in range(11):
        alpha = step / 10
        bump = 4 * alpha * (1 - alpha)
        loss = 0.5 * (1 - alpha) + 0.25 * alpha + 0.125 * bump
        accuracy = 0.75 * (1 - alpha) + 0.875 * alpha - 0.0625 * bump
        path.append({"alpha": alpha, "loss": loss, "metrics": {"accuracy": accuracy}})
    rows = []
    for name, llfc, baseline, coefficient in (
        ("bert.embeddings", 0.0, 0.0, 1.0),
        ("bert.encoder.layer.0", 0.0002, 0.03, 0.998),
        ("bert.encoder.layer.1", 0.0078, 0.18, 0.98),
        ("logits", 0.04, 0.32, 0.91),
    ):
        rows += [layer(name, alpha, llfc * 4 * alpha * (1 - alpha), baseline, coefficient) for alpha in (0.25, 0.5)]
    report = {
        "schema": "hf_llfc.report/1",
        "models": [{key: model[key] for key in ("id", "revision", "weight")} for model in MODELS],
        "path": path,
        "barrier": {"loss": 0.125, "error": 0.0625},
        "layers": rows,
        "verdict": {"answer": "merge", "because": "the barrier is low and the logits are the blend of the parents'"},
        "data": {
            "task": "text-classification",
            "dataset": "ada/reviews@abc123",
            "name": "plain",
            "split": "test[:512]",
            "samples": 512,
        },
        "alignment": {"method": "weight_matching"},
        "versions": VERSIONS,
    }
    return {**report, **changes}


def full_statistic(mean: float, spread: float = 0.5) -> dict[str, Any]:
    """A statistic with quantiles and the interval of its mean."""
    levels = {"0.05": -1.0, "0.25": -0.5, "0.5": -0.1, "0.75": 0.4, "0.95": 1.2}
    quantiles = {level: mean * (1 + spread * height) for level, height in levels.items()}
    return {
        "mean": mean,
        "std": abs(mean) * spread,
        "quantiles": quantiles,
        "interval": [mean * (1 - spread / 8), mean * (1 + spread / 8)],
    }


def decomposition(alpha: float, *, labelled: bool = True, **changes: Any) -> dict[str, Any]:
    """The barrier taken apart at one point: the ensemble gains 0.125 nats, non-linearity costs 0.25."""

    def in_nats(mean: float) -> dict[str, Any]:
        return {"mean": mean, "std": 1.0, "interval": [mean - 0.0625, mean + 0.0625]}

    with_labels = {"cost": in_nats(0.25), "barrier": in_nats(0.125), "half_share": 0.0625}
    return {
        "alpha": alpha,
        "gain": in_nats(0.125),
        "divergence": in_nats(0.3125),
        "estimate": in_nats(0.1875),
        "bound": in_nats(0.875),
        "merged_disagreement": 0.125,
        "parents_disagreement": 0.25,
        "orphans": 0.03125,
        **(with_labels if labelled else {}),
        **changes,
    }


BERT_MAPS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


def make_measured_report(blocks: int = 12, **changes: Any) -> dict[str, Any]:
    """A report of a pair of BERTs with everything that can be measured."""
    encoder = [f"bert.encoder.layer.{block}" for block in range(blocks)]
    maps = [f"{block}.{name}" for block in encoder for name in BERT_MAPS] + ["bert.pooler.dense", "classifier"]
    rows = []
    for place, name in enumerate([*encoder, "logits"]):
        for step in range(1, 10):
            alpha = step / 10
            rows.append(
                {
                    "layer": name,
                    "alpha": alpha,
                    "llfc": full_statistic(4 * alpha * (1 - alpha) * 1e-6 * 3**place),
                    "baseline": full_statistic(1e-3 * 1.6**place),
                    "coefficient": full_statistic(1 - 0.02 * place, 0.1),
                }
            )
    measured = {
        "additivity": [
            {
                "layer": f"{block}.intermediate.intermediate_act_fn",
                "alpha": 0.5,
                "distance": full_statistic(1e-4 * 1.5**place),
                "baseline": full_statistic(2e-2 * 1.2**place),
            }
            for place, block in enumerate(encoder)
        ],
        "commutativity": [
            {
                "layer": name,
                "com": 1e-5 * (place + 1),
                "weights": 2e-3 * (place % 6 + 1),
                "features": 1e-3 * (place + 1),
            }
            for place, name in enumerate(maps)
        ],
        "stitching": [
            {"layer": name, "loss": 0.5 - 0.02 * place, "metrics": {"accuracy": 0.75 + 0.01 * place}}
            for place, name in enumerate(encoder)
        ],
        "blocks": [
            {
                "block": name,
                "alone": 0.01 * place,
                "without": 0.125 - 0.005 * place,
                "step": 0.0125 * (place + 1),
                "angle": None,
                "distance": 0.5 + 0.1 * place,
                "drift": None if place in (0, blocks + 1) else 0.05 * place,
                "local": None if place in (0, blocks + 1) else 1 / place,
            }
            for place, name in enumerate(["before the blocks", *encoder, "after the blocks"])
        ],
        "fold": [
            {"models": [0], "loss": 0.0, "error": 0.0, "length": 0.5},
            {"models": [1], "loss": 0.01, "error": 0.005, "length": 0.55},
            {"models": [0, 1], "loss": 0.02, "error": 0.01, "length": 1.05},
        ],
        "importance": [
            {"tensor": f"{name}.weight", "block": name, "fisher": [1.0 + place, 2.0], "feedback": [3.0, 1.0 + place]}
            for place, name in enumerate(["before the blocks", *encoder, "after the blocks"])
        ],
        "units": [
            {"layer": f"{name}.act", "units": 64, "always": [0.0, 0.125, 0.25], "never": [0.25, 0.125, 0.5]}
            for name in encoder
        ],
        "classes": [
            {
                "layer": name,
                "of": of,
                "compression": 2.0 * factor * 0.8**place,
                "discrimination": 0.01 * (place + 1),
                "separability": 1 - factor * 0.5 * 0.9**place,
                "least": 1 - factor * 0.6 * 0.9**place,
                "pair": ["negative", "positive"],
                "directions": [distance, distance / 2],
            }
            for place, name in enumerate([*encoder, "logits"])
            for of, factor, distance in (
                ("model 1", 1.0, 0.0),
                ("model 2", 0.9, 0.5),
                ("blend", 0.95, 0.25),
                ("merge", 1.1, 0.3),
            )
        ],
        "settling": [
            {"layer": name, "of": of, "answer": (place + 1 - late) / (blocks - late), "close": (place + 1) / blocks}
            for place, name in enumerate(encoder)
            for of, late in (("model 1", 0.0), ("model 2", 0.25), ("merge", 0.5))
        ],
        "samples": [
            {
                "sample": 17 + place,
                "label": "positive",
                "predictions": 1,
                "loss": 2.5 - 0.25 * place,
                "losses": [0.25, 0.5],
                "answer": "negative",
                "answers": ["positive", "positive"],
                "share": 0.125,
            }
            for place in range(3)
        ],
        "geometry": [
            {
                "layer": name,
                "of": of,
                "angles": [turn * (place + 1) * height for height in (0.25, 0.5, 0.75)],
                "rank_a": 200.0 + place,
                "rank_b": 190.0 - place,
                **({"rank_one_a": 0.1, "rank_one_b": 0.2, "turn_a": 80.0} if of == "weights" else {}),
            }
            for of, names, turn in (("weights", maps, 0.5), ("weights, inputs", maps, 1.0), ("features", encoder, 1.0))
            for place, name in enumerate(names)
        ],
    }
    return {**make_report(layers=rows), **measured, **changes}


def make_simplex_report(models: int = 4, region: str = "simplex", **changes: Any) -> dict[str, Any]:
    """A report of several models: themselves, every pair and all; or of task vectors over a base, which comes last."""
    points = [(tuple(float(other == own) for other in range(models)), f"model {own + 1}") for own in range(models)]
    if region == "simplex":
        for first, second in combinations(range(models), 2):
            weights = tuple(0.5 * (place in (first, second)) for place in range(models))
            points.append((weights, f"models {first + 1} and {second + 1}"))
        points.append(((1 / models,) * models, "centre"))
    else:
        points[-1] = (points[-1][0], "base")
        for scale, name in ((-1.0, "-1 × task vectors"), (0.5, "0.5 × task vectors"), (1.0, "merge")):
            weights = (scale * 0.6,) * (models - 1)
            points.append(((*weights, 1 - sum(weights)), name))
    path, rows = [], []
    for place, (weights, name) in enumerate(points):
        mixed = 1 - max(weights)
        own = sum(weight * (0.5 + 0.04 * model) for model, weight in enumerate(weights))
        bump = (0.2 if place % 2 else -0.1) * mixed
        loss, accuracy = own + bump, 0.9 - 0.2 * own - bump / 2
        place_of = {"alpha": weights[0], "weights": list(weights)}
        path.append({**place_of, "loss": loss, "metrics": {"accuracy": accuracy}, "name": name})
        for depth, module in enumerate(["bert.encoder.layer.0", "bert.encoder.layer.1", "logits"]):
            distance = full_statistic(abs(mixed) * 10.0 ** (depth - 4))
            rows.append({"layer": module, **place_of, "llfc": distance, "baseline": full_statistic(0.05),
                         "coefficient": full_statistic(1 - 0.1 * mixed, 0.1)})  # fmt: skip
    rows.sort(key=lambda row: row["layer"])
    references = [{"id": f"ada/bert-{number}", "revision": None, "weight": None} for number in range(1, models + 1)]
    return {**make_report(models=references, path=path, layers=rows), "region": region, **changes}


def make_folder(
    folder: Path,
    *,
    config: Mapping[str, Any] = CONFIG,
    report: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] = RECIPE,
    card: str = "---\nlicense: mit\ntags:\n- merge\n- hf-llfc\n---\n\n# A merge\n",
    seed: int = 0,
) -> Path:
    """An output folder with two shards, tokenizer, card and what lies in llfc/."""
    (folder / "llfc").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    generator = np.random.default_rng(seed)
    weight_map = {}
    for number in (1, 2):
        shard = f"model-{number:05d}-of-00002.safetensors"
        names = [f"layer.{number}.weight", f"layer.{number}.bias"]
        save_file({name: generator.standard_normal((16, 8)).astype(np.float32) for name in names}, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": 2048}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text(card)
    (folder / "llfc" / "recipe.yaml").write_text(yaml.safe_dump(dict(recipe)))
    if report is not None:
        (folder / "llfc" / "llfc_report.json").write_text(json.dumps(report))
    return folder
