"""Merges of fine-tunes for distinct tasks, calibrated on unlabelled samples of each task.

    python benchmarks/calibrated_tasks.py DIR [--seeds 1] [--samples 480] [--write]

Trains what is missing of the five distinct tasks of `benchmarks/which_method.py` (MiniLM, a classifier of its own each)
in DIR/tasks, merges the bodies, and calibrates each merge so that on the training texts of a task, without labels, its
features come near to those of that task's model. Accuracy is measured on held-out texts under each model's own
classifier, over that of the model itself. The control changes the last map alone. What was measured is kept in
DIR/calibrated_tasks.json.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import train_tasks, which_method
from benchmarks.calibrated import Measured
from benchmarks.results import markdown, replace_section, require_sections
from benchmarks.symmetries import summary
from hf_llfc.calibration import Settings, Source, calibrate_model
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.checkpoints.models import load_model

STARTS = ("linear", "tsv_m")
RIDGE = 0.1
WAYS = {
    "calibrate": Settings(ridge=RIDGE),
    "calibrate, targets from a mix of inputs (own .3)": Settings(ridge=RIDGE, own=0.3),
    "control: the last map alone": Settings(ridge=RIDGE, layers=("pooler.dense",)),
}
BATCH = 40


class Tasks:
    """The models of one seed, and their texts."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed = seed
        self.family = which_method.Family(folder, "minilm")
        self.members = [(task, seed) for task in which_method.DISTINCT]
        self.texts = train_tasks.Texts()
        self.experts = [load_model(open_checkpoint(self.family.path(member))).eval() for member in self.members]

    def sources(self, samples: int) -> list[Source]:
        """Texts of each task, where its own model is the target."""
        found = []
        for place, (task, _) in enumerate(self.members):
            inputs = self.texts.train(task, self.seed)
            numbers = torch.arange(min(samples, len(inputs["labels"])))
            batches = [
                ({name: value[chosen] for name, value in inputs.items() if name != "labels"}, chosen)
                for chosen in numbers.split(BATCH)
            ]
            found.append(Source(batches, tuple(float(place == other) for other in range(len(self.members)))))
        return found

    def merge(self, label: str) -> PreTrainedModel:
        """The merged body."""
        state = self.family.state(self.members, which_method.CHOICES[label])
        return load_model(self.family.opened(), state_dict=state).eval()

    def relative(self, model: PreTrainedModel) -> dict[str, float]:
        """Accuracy under each model's head over that of the model, by task."""
        scores = self.family.scores(model.state_dict(), self.members)
        return {task: score / own for (task, _), score, own in zip(self.members, scores, self._of_experts, strict=True)}

    @cached_property
    def _of_experts(self) -> list[float]:
        """What each model reaches on its own task."""
        pairs = zip(self.experts, self.members, strict=True)
        return [self.family.scores(expert.state_dict(), [member])[0] for expert, member in pairs]


def measure(tasks: Tasks, samples: int, known: Measured) -> dict[str, dict[str, float]]:
    """Row → relative accuracy by task, and seconds."""
    rows = {}

    def found(label: str, settings: Settings | None = None) -> dict[str, float]:
        model = tasks.merge(label)
        if settings is None:
            return tasks.relative(model)
        begun = perf_counter()
        calibrate_model(model, tasks.experts, tasks.sources(samples), settings)
        return {"seconds": perf_counter() - begun, **tasks.relative(model)}

    for label in STARTS:
        key = f"seed {tasks.seed} {label}"
        rows[label] = known.get(key, partial(found, label))
        for way, settings in WAYS.items():
            rows[f"{label}, {way}"] = known.get(f"{key} {way} {samples}", partial(found, label, settings))
    return rows


def table(measured: Sequence[dict[str, dict[str, float]]]) -> str:
    """A row a way; mean over tasks, and each task."""
    rows = []
    for name in measured[0]:
        of_seeds = [each[name] for each in measured]
        means = [statistics.mean(each[task] for task in which_method.DISTINCT) for each in of_seeds]
        row: dict[str, Any] = {"merge": name, "mean of accuracy ÷ that of the single model": summary(means, 3)}
        row |= {task: f"{statistics.mean(each[task] for each in of_seeds):.2f}" for task in which_method.DISTINCT}
        seconds = [each["seconds"] for each in of_seeds if "seconds" in each]
        row["seconds"] = f"{statistics.median(seconds):.0f}" if seconds else "–"
        rows.append(row)
    return markdown(rows)


def main() -> None:
    """Trains, merges, calibrates and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, choices=train_tasks.MINILM_SEEDS, default=[1])
    parser.add_argument("--samples", type=int, default=480, help="texts of each task")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/results")
    options = parser.parse_args()
    require_sections("calibrated_tasks")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    train_tasks.train_minilm(options.folder, which_method.DISTINCT, options.seeds)
    known = Measured(options.folder / "calibrated_tasks.json")
    text = table([measure(Tasks(options.folder, seed), options.samples, known) for seed in options.seeds])
    print(text)
    if options.write:
        seeds = " ".join(map(str, options.seeds))
        words = f"python benchmarks/calibrated_tasks.py DIR --seeds {seeds} --samples {options.samples} --write"
        tests = len(options.seeds) * train_tasks.TEST
        replace_section("calibrated_tasks", f"`{words}`: ridge {RIDGE:g}, {tests} held-out texts a task.\n\n{text}")


if __name__ == "__main__":
    main()
