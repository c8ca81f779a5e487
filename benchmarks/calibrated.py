"""Repair and calibration of merges of independent models, beside the same from other starts and beside distillation.

    python benchmarks/calibrated.py DIR [--only mlp resnet vit-128 gpt2 llama] [--pairs 3] [--samples 1000] [--write]

DIR is where `benchmarks/train_seeds.py` and, for the MLPs, `benchmarks/train_parents.py` put their models. Each pair is
aligned without labels, averaged, and brought nearer to the blend of its parents' features on unlabelled training
samples; the barrier is measured at the midpoint on held-out data. The controls get the same samples: calibration from
one parent, from the average of models that are not aligned, and from random weights, and distillation of the blend of
logits into the average by Adam for as long as calibration took. What was measured is kept in DIR/calibrated.json;
`--write` puts the sections calibrated_FAMILY into results/calibration.md.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import symmetries
from benchmarks import train_parents as parents
from benchmarks.results import markdown, replace_section, require_sections
from benchmarks.symmetries import CLASSIFIERS, Pair, by_activations, pairs_of
from hf_llfc.alignment import match_weights
from hf_llfc.alignment.sources import anchors_of
from hf_llfc.calibration import Settings, Source, calibrate_model, choose_ridge
from hf_llfc.checkpoints.models import load_model
from hf_llfc.diagnostics import recompute_batch_norm
from hf_llfc.evaluation.models import forward_logits, predictions_in
from tests import real_data

FAMILIES = ("mlp", "resnet", "vit-128", "gpt2", "llama")
ALIGNED = {"mlp": "permutation", "resnet": "activations"}
"""The alignment without labels that leaves the lowest barrier; `full` by weights for the others."""
RIDGE = 0.01
BATCH = 250
BLOCKS_AT_ONCE = 8
COUNTS = (16, 64, 256)
"""Samples of which calibration is tried too."""
RATE = 3e-4
"""Learning rate of the distillation."""

Start = Callable[[], PreTrainedModel]


def unlabelled(family: str, count: int, other_domain: bool = False) -> list[tuple[parents.Tensors, Tensor]]:
    """Training samples in batches; or some of another domain: digits, or Python's own library."""
    inputs = other_inputs(family, count) if other_domain else next(symmetries.training_batches(family, count))
    size = BATCH if family in CLASSIFIERS else BLOCKS_AT_ONCE
    numbers = torch.arange(len(inputs["labels"]))
    return [
        ({name: value[chosen] for name, value in inputs.items() if name != "labels"}, chosen)
        for chosen in numbers.split(size)
    ]


def other_inputs(family: str, count: int) -> parents.Tensors:
    """Samples that none of the models was trained on."""
    if family in CLASSIFIERS:
        images = real_data.mnist()[:count]
        pixels = parents.fashion_processor()(images["image"], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor(images["label"])}
    blocks = parents.text_blocks(real_data.python_source()["text"], "\n")[:count]
    ids = parents.byte_tokenizer()(blocks, return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "labels": ids}


class Trial:
    """One pair, aligned, and the models that calibration starts from."""

    def __init__(self, folder: Path, family: str, seeds: tuple[int, int]) -> None:
        groups = "permutation" if family == "mlp" else "full"
        self.family = family
        self.pair = Pair.opened(folder, family, seeds, groups)
        self.of_b = dict(self.pair.aligned(self._alignment(ALIGNED.get(family, "full"))))
        self.parents = [self._load(self.pair.state_a), self._load(self.of_b)]
        self.not_aligned = [self.parents[0], self._load(self.pair.state_b)]

    def _alignment(self, kind: str) -> Any:
        if kind == "activations":
            return by_activations(self.pair)
        anchors = 1.0 if kind == "permutation" else anchors_of(self.pair.spec)
        return match_weights(*(each.with_anchors(anchors) for each in self.pair.parameters()))

    def _load(self, state: Mapping[str, Tensor], *, recompute: bool = False) -> PreTrainedModel:
        model = load_model(self.pair.a, state_dict=dict(state)).eval()
        if recompute and self.pair.has_batch_norm:
            batches = symmetries.training_batches(self.family, symmetries.BATCH_NORM_SIZE)
            chosen = (next(batches) for _ in range(symmetries.BATCH_NORM_BATCHES))
            recompute_batch_norm(model, ((batch, batch["labels"]) for batch in chosen))
        return model

    def average(self, of_b: Mapping[str, Tensor]) -> PreTrainedModel:
        """The midpoint, with statistics of batch normalization of its own."""
        merged = {
            name: torch.lerp(of_b[name], value, 0.5) if value.is_floating_point() else value
            for name, value in self.pair.state_a.items()
        }
        return self._load(merged, recompute=True)

    def random(self) -> PreTrainedModel:
        """Weights as before any training."""
        torch.manual_seed(0)
        return self._load(type(self.parents[0])(self.pair.a.config).state_dict(), recompute=True)

    def barriers(self, model: PreTrainedModel) -> dict[str, float]:
        """Loss, and accuracy of classifiers in points, against the mean of the parents."""
        own, ends = parents.measure(model, self.pair.data), self.pair.ends
        found = {"loss": own["loss"] - sum(each["loss"] for each in ends) / 2}
        if "accuracy" in own:
            found["points"] = 100 * (sum(each["accuracy"] for each in ends) / 2 - own["accuracy"])
        return found


def distil(model: PreTrainedModel, teachers: Sequence[PreTrainedModel], data: Any, seconds: float) -> None:
    """Adam on KL(blend of logits ‖ model), a batch of 50 images or 4 blocks a step, for so many seconds."""
    batches = []
    for batch, ids in data:
        for chosen in torch.arange(len(ids)).split(50 if "pixel_values" in batch else 4):
            batches.append({name: value[chosen] for name, value in batch.items()})
    optimiser = torch.optim.Adam(model.parameters(), RATE)
    end = perf_counter() + seconds
    for batch in cycle(batches):
        if perf_counter() > end:
            break
        with torch.no_grad():
            answers = [predictions_in(logits_of(teacher, batch), batch) for teacher in teachers]
            blend = torch.stack(answers).mean(0).softmax(-1)
        own = predictions_in(logits_of(model, batch), batch).log_softmax(-1)
        loss = -(blend * own).sum(-1).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    model.eval()


def logits_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's answer."""
    logits = forward_logits(model, batch)
    assert logits is not None
    return logits


class Measured:
    """What was measured, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, key: str, find: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What is known, or is measured now."""
        if key not in self._known:
            self._known[key] = find()
            self._path.write_text(json.dumps(self._known, indent=0))
            print(key, {name: round(value, 4) for name, value in self._known[key].items()}, flush=True)
        return dict(self._known[key])


def measure(folder: Path, family: str, seeds: tuple[int, int], samples: int, known: Measured) -> dict[str, Any]:
    """All rows of one pair: name → barriers, seconds of the calibration, and how far it moved the weights."""
    made: list[Trial] = []
    key = f"{family} {seeds[0]}-{seeds[1]}"

    def trial() -> Trial:
        if not made:
            made.append(Trial(folder, family, seeds))
        return made[0]

    def calibrated(
        start: str, count: int, other_domain: bool = False, method: str = "calibrate", auto: bool = False
    ) -> dict[str, float]:
        of = trial()
        starts: dict[str, Start] = {
            "merge": partial(of.average, of.of_b),
            "one parent": partial(of._load, of.pair.state_a),
            "not aligned": partial(of.average, of.pair.state_b),
            "random": of.random,
        }
        model, data = starts[start](), unlabelled(family, count, other_domain)
        teachers = of.not_aligned if start == "not aligned" else of.parents
        begun = perf_counter()
        settings, source = Settings(method, RIDGE), Source(data, (0.5, 0.5))
        if auto:
            settings = replace(settings, ridge=choose_ridge(model, teachers, [source], settings)[0].ridge)
        result = calibrate_model(model, teachers, [source], settings)
        seconds = perf_counter() - begun
        moved = sum(row.change**2 for row in result.changes) ** 0.5 / sum(row.apart**2 for row in result.changes) ** 0.5
        return {**of.barriers(model), "seconds": seconds, "moved": moved}

    def distilled(seconds: float) -> dict[str, float]:
        of = trial()
        model = of.average(of.of_b)
        distil(model.train(), of.parents, unlabelled(family, samples), seconds)
        return {**of.barriers(model), "seconds": seconds}

    def one(name: str, find: Callable[[], dict[str, float]]) -> dict[str, float]:
        return known.get(f"{key} {name}", find)

    rows = {"merge": one("merge", lambda: trial().barriers(trial().average(trial().of_b)))}
    rows[f"repair, {samples} samples"] = one(f"repair {samples}", lambda: calibrated("merge", samples, method="repair"))
    for count in [*(each for each in COUNTS if each < samples), samples]:
        rows[f"calibration, {count} samples"] = one(f"calibrate {count}", partial(calibrated, "merge", count))
    for count in (COUNTS[0], samples):
        rows[f"calibration, {count} samples, ridge: auto"] = one(
            f"auto {count}", partial(calibrated, "merge", count, auto=True)
        )
    seconds = rows[f"calibration, {samples} samples"]["seconds"]
    rows["… on another domain"] = one(f"other {samples}", partial(calibrated, "merge", samples, other_domain=True))
    rows["control: from one parent"] = one(f"one parent {samples}", partial(calibrated, "one parent", samples))
    rows["control: from the average that is not aligned"] = one(
        f"not aligned {samples}", partial(calibrated, "not aligned", samples)
    )
    rows["control: from random weights"] = one(f"random {samples}", partial(calibrated, "random", samples))
    rows["control: merge distilled by Adam for as long"] = one(f"distilled {samples}", lambda: distilled(seconds))
    return rows


def table(measured: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """A row a way, with the mean over pairs and its standard error."""
    rows = []
    for name in measured[0]:
        of_pairs = [each[name] for each in measured]
        row = {"": name, "loss barrier, nats": symmetries.summary([each["loss"] for each in of_pairs], 3)}
        if "points" in of_pairs[0]:
            row["accuracy barrier, points"] = symmetries.summary([each["points"] for each in of_pairs], 2)
        moved = [each["moved"] for each in of_pairs if "moved" in each]
        row["moved ÷ distance of the parents"] = f"{statistics.mean(moved):.2f}" if moved else "–"
        seconds = [each["seconds"] for each in of_pairs if "seconds" in each]
        row["seconds"] = f"{statistics.median(seconds):.0f}" if seconds else "–"
        rows.append(row)
    return markdown(rows)


def main() -> None:
    """Measures family by family, and writes the section of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--pairs", type=int, choices=(1, 2, 3, 4), default=3, help="how many; only the MLPs have four")
    parser.add_argument("--samples", type=int, default=1000, help="unlabelled images, or blocks of 256 bytes")
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/results")
    options = parser.parse_args()
    require_sections(*(f"calibrated_{family}" for family in options.only))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    known = Measured(options.folder / "calibrated.json")
    for family in options.only:
        pairs = pairs_of(family)[: options.pairs]
        measured = [measure(options.folder, family, pair, options.samples, known) for pair in pairs]
        text = table(measured)
        print(text)
        if options.write:
            words = ["DIR", "--only", family, "--pairs", str(options.pairs), "--samples", str(options.samples)]
            command = f"`python benchmarks/calibrated.py {shlex.join(words)} --write`"
            count = f"{len(pairs)} pair{'s' if len(pairs) > 1 else ''} of independent seeds"
            replace_section(f"calibrated_{family}", f"{command}: {count}, ridge {RIDGE:g}.\n\n{text}")


if __name__ == "__main__":
    main()
