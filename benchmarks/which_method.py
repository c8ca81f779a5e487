"""Which merge method for which job: all methods on distinct and redundant fine-tunes, and what tells the cases apart.

    python benchmarks/which_method.py --out DIR [--only distinct redundant llama gpt2 rule] [--seeds 1 2 3] [--known]

Trains what benchmarks/train_tasks.py describes, merges the models of every seed by every data-free method that merges
more than two, and measures each merge on held-out data under each model's own head. What was measured is kept in
DIR/tasks/measured.json. Writes the sections which_method_* of results/merging.md.
"""

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import train_parents as parents
from benchmarks import train_tasks
from benchmarks.results import markdown, replace_section, require_sections
from benchmarks.thresholds import Outcome, Threshold, fitted, ranked
from hf_llfc.checkpoints import Checkpoint, open_checkpoint
from hf_llfc.checkpoints.models import load_model
from hf_llfc.merging import Merge
from hf_llfc.merging.methods import Base, find_method
from hf_llfc.parents.opening import open_recipe
from hf_llfc.parents.task_vectors import TaskVectors, compare_task_vectors
from hf_llfc.pipeline.weighting import plan_merge
from hf_llfc.recipe import load_recipe

DISTINCT = ("movies", "source", "genre", "tense", "question")
REDUNDANT = ("movies", "tweets", "amazon", "editorials")
LAMBDAS = (0.2, 0.3, 0.4, 0.6, 1.0)
FROZEN = "embeddings.word_embeddings.weight"
"""The tensor that no fine-tune of MiniLM changed: it is that of the base in every merge."""

CONTROL = "task_arithmetic, tuned"


@dataclass(frozen=True)
class Choice:
    """A method with the parameters that are tried.

    Attributes:
        method: Its name.
        weight: Of each model: a number, or `share`, 1 over the number of models; None where the method has none.
        parameters: All others, where they are not the defaults.
    """

    method: str
    weight: float | str | None = None
    parameters: Mapping[str, float] | None = None

    def shown(self) -> str:
        """The parameters, for a table."""
        weight = {"share": "1/T"}.get(str(self.weight), self.weight)
        given = {**({"weight": weight} if weight is not None else {}), **(self.parameters or {})}
        return ", ".join(f"{name} {value}" for name, value in given.items()) or "–"


# Defaults. Where a method needs weights, they sum to one, or the method divides them by their sum; densities are
# those of the papers.
CHOICES = {
    "linear": Choice("linear", "share"),
    "task_arithmetic, λ = 0.3": Choice("task_arithmetic", 1.0, {"lambda": 0.3}),
    "task_arithmetic, λ = 1": Choice("task_arithmetic", 1.0),
    "ties": Choice("ties", 1.0, {"density": 0.2}),
    "tsv_m": Choice("tsv_m"),
    "iso_c": Choice("iso_c"),
    "iso_cts": Choice("iso_cts"),
    "wudi": Choice("wudi"),
    "ace": Choice("ace"),
    "model_stock": Choice("model_stock"),
    "karcher": Choice("karcher"),
    "multislerp": Choice("multislerp", 1.0),
    "dare_linear": Choice("dare_linear", "share", {"density": 0.5}),
    "dare_ties": Choice("dare_ties", "share", {"density": 0.5}),
    "breadcrumbs": Choice("breadcrumbs", "share", {"density": 0.9}),
    "breadcrumbs_ties": Choice("breadcrumbs_ties", "share", {"density": 0.9}),
    "della": Choice("della", 1.0, {"density": 0.7}),
    "della_linear": Choice("della_linear", "share", {"density": 0.7}),
    "sce": Choice("sce"),
    "ram": Choice("ram"),
    "ramplus_tl": Choice("ramplus_tl"),
}

PLAIN, SPECTRAL = "linear", "tsv_m"
"""What the rule decides between: the methods that every case of it is merged by."""


@dataclass(frozen=True)
class Case:
    """Models that are merged together.

    Attributes:
        name: What it is called in tables.
        group: `minilm`, `llama` or `gpt2`.
        members: Task or domain, and seed, of each model.
    """

    name: str
    group: str
    members: tuple[tuple[str, int], ...]

    @property
    def key(self) -> str:
        """What it is kept under."""
        return f"{self.group}:" + "+".join(f"{task}-{seed}" for task, seed in self.members)


class Family:
    """The models of one architecture, and their data."""

    def __init__(self, out: Path, group: str) -> None:
        self.group = group
        self.is_classifier = group == "minilm"
        self.folder = out / "tasks" / ("minilm" if self.is_classifier else "lm")
        self.base = self.folder / ("base" if self.is_classifier else f"{group}-base")
        self._data: train_tasks.Texts | train_tasks.Blocks = (
            train_tasks.Texts() if self.is_classifier else train_tasks.Blocks()
        )
        self.held_out = cache(self._held_out)

    def path(self, member: tuple[str, int]) -> Path:
        """The folder of a model."""
        task, seed = member
        return self.folder / (f"{task}-{seed}" if self.is_classifier else f"{self.group}-{task}-{seed}")

    def _held_out(self, member: tuple[str, int]) -> tuple[parents.Tensors, parents.Tensors]:
        if isinstance(self._data, train_tasks.Texts):
            return self._data.held_out(*member)
        return self._data.held_out(member[0])

    def opened(self) -> Checkpoint:
        """The base."""
        return open_checkpoint(self.base)

    def plan(self, members: Sequence[tuple[str, int]], choice: Choice) -> Merge:
        """What becomes of every tensor, as a recipe has it; without those that no model changed."""
        method = find_method(choice.method)
        weight = {"share": 1 / len(members)}.get(str(choice.weight), choice.weight)
        given = {"parameters": {"weight": weight}} if weight is not None else {}
        recipe: dict[str, Any] = {
            "merge_method": choice.method,
            "models": [{"model": str(self.path(member)), **given} for member in members],
            "output_dir": "merged",
        }
        if choice.parameters:
            recipe["parameters"] = dict(choice.parameters)
        if method.base is not Base.NONE:
            recipe["base_model"] = str(self.base)
        loaded = load_recipe(recipe)
        opened = open_recipe(loaded)
        merge = plan_merge(opened.moved([None] * len(members)), loaded)
        return replace(merge, infos={name: info for name, info in merge.infos.items() if name != FROZEN})

    def state(self, members: Sequence[tuple[str, int]], choice: Choice) -> dict[str, Tensor]:
        """The tensors of a merge."""
        return {**dict(self.opened().state_dict()), **dict(self.plan(members, choice).tensors())}

    def scores(
        self, state: Mapping[str, Tensor], members: Sequence[tuple[str, int]], *, validation: bool = False
    ) -> list[float]:
        """Accuracy under the head of each model, or bits per byte in its domain."""
        model = load_model(self.opened(), state_dict=dict(state)).eval()
        found = []
        for member in members:
            inputs = self.held_out(member)[0 if validation else 1]
            if self.is_classifier:
                found.append(self._accuracy(model, inputs, member))
            else:
                found.append(parents.measure(model, inputs, 25)["bits_per_byte"])
        return found

    @torch.no_grad()
    @torch.autocast("cpu", torch.bfloat16)
    def _accuracy(self, body: Any, inputs: parents.Tensors, member: tuple[str, int]) -> float:
        head = load_file(self.folder / "heads" / f"{self.path(member).name}.safetensors")
        right = 0
        by_length = inputs["attention_mask"].sum(1).argsort()
        for indices in by_length.split(40):
            batch = parents.select(inputs, indices)
            labels = batch.pop("labels")
            logits = torch.nn.functional.linear(body(**batch).pooler_output, head["weight"], head["bias"])
            right += int((logits.argmax(-1) == labels).sum())
        return right / len(by_length)


class NotMeasuredError(Exception):
    """A number is not known, and nothing is to be measured."""


class Measured:
    """What was measured, kept in a file that several runs may add to."""

    def __init__(self, out: Path, *, known: bool) -> None:
        self._is_finished = known
        self._path = out / "tasks" / "measured.json"
        self._known = self._read()

    def _read(self) -> dict[str, Any]:
        return json.loads(self._path.read_text()) if self._path.is_file() else {}

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """What is known, or is measured now."""
        if key not in self._known:
            self._known = self._read()
        if key not in self._known and self._is_finished:
            raise NotMeasuredError(key)
        if key not in self._known:
            found = measure()
            print(f"{key}: {found}", flush=True)
            self._known = {**self._read(), key: found}
            unfinished = self._path.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps(self._known, indent=0))
            unfinished.replace(self._path)
        return self._known[key]


class Benchmark:
    """Cases, merged and measured."""

    def __init__(self, out: Path, lm_seeds: Sequence[int], *, known: bool) -> None:
        self.lm_seeds = lm_seeds
        self.measured = Measured(out, known=known)
        self.family = cache(lambda group: Family(out, group))

    def of_merges(self, cases: Sequence[Case], label: str) -> list[list[float]]:
        """Scores of one method's merges, one list a case; of the first cases alone where later ones are not known."""
        found = []
        with suppress(NotMeasuredError):
            for case in cases:
                found.append(self.of_merge(case, label))
        return found

    def of_merge(self, case: Case, label: str) -> list[float]:
        """Scores of a merge, one a model."""
        family = self.family(case.group)
        tuned = label == CONTROL
        choice = Choice("task_arithmetic", 1.0, {"lambda": self.tuned(case)}) if tuned else CHOICES[label]
        key = f"{case.key} {choice.method} {choice.shown()}"
        return self.measured.get(key, lambda: family.scores(family.state(case.members, choice), case.members))

    def tuned(self, case: Case) -> float:
        """λ of task arithmetic that is best on validation data: the highest accuracy, or the fewest bits."""
        family = self.family(case.group)

        def scores(scale: float) -> list[float]:
            choice = Choice("task_arithmetic", 1.0, {"lambda": scale})
            return family.scores(family.state(case.members, choice), case.members, validation=True)

        means = {
            scale: statistics.mean(self.measured.get(f"{case.key} validation λ {scale}", lambda: scores(scale)))  # noqa: B023
            for scale in LAMBDAS
        }
        return max(means, key=means.__getitem__) if family.is_classifier else min(means, key=means.__getitem__)

    def of_single(self, group: str, member: tuple[str, int]) -> float:
        """What a model reaches on its own task."""
        family = self.family(group)
        key = f"{group}:{member[0]}-{member[1]} alone"
        state = open_checkpoint(family.path(member)).state_dict
        return float(self.measured.get(key, lambda: family.scores(dict(state()), [member])[0]))

    def of_base(self, group: str, member: tuple[str, int]) -> float:
        """What the base reaches under a model's head."""
        family = self.family(group)
        key = f"{group}:{member[0]}-{member[1]} base"
        return float(self.measured.get(key, lambda: family.scores(dict(family.opened().state_dict()), [member])[0]))

    def relative(self, case: Case, scores: Sequence[float]) -> list[float]:
        """Accuracy over that of the single model; of a language model the share of what the single one gains."""
        found = []
        for member, score in zip(case.members, scores, strict=True):
            single = self.of_single(case.group, member)
            if case.group == "minilm":
                found.append(score / single)
            else:
                base = self.of_base(case.group, member)
                found.append((base - score) / (base - single))
        return found

    def task_vectors(self, case: Case) -> dict[str, Any]:
        """What tells the case from others: the numbers that a dry run prints."""

        def found() -> dict[str, Any]:
            family = self.family(case.group)
            merge = family.plan(case.members, CHOICES["tsv_m"])
            assert merge.base is not None
            vectors = compare_task_vectors(merge.sources, merge.base, merge.infos, sample_bytes=None)
            return indicators(vectors)

        return dict(self.measured.get(f"{case.key} task vectors", found))


def indicators(vectors: TaskVectors) -> dict[str, Any]:
    """The numbers that are candidates for the rule."""
    rank = vectors.mean("stable_ranks")
    overlap, chance = vectors.mean("overlaps"), vectors.chance
    assert rank is not None and overlap is not None and chance is not None
    return {
        "change": vectors.mean("changes"),
        "cosine": vectors.mean("cosines"),
        "signs": vectors.mean("signs"),
        "overlap": (overlap - chance) / (1 - chance),
        "stable rank": rank,
        "spread": max(vectors.changes) / min(vectors.changes),
    }


def error(values: Sequence[float]) -> float:
    """Standard error of a mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def with_error(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """A mean and its standard error."""
    shown = f"{statistics.mean(values):{sign}.{digits}f}"
    return shown if len(values) < 2 else f"{shown} ± {error(values):.{digits}f}"


def above(control: Sequence[float], of_seeds: Sequence[Sequence[float]]) -> float:
    """How far a method is above the control, the mean over the seeds that it was measured for."""
    return statistics.mean(statistics.mean(scores) - other for scores, other in zip(of_seeds, control, strict=False))


def method_rows(
    scores: Mapping[str, Sequence[Sequence[float]]],
    columns: Sequence[str],
    mean: str,
    *,
    highest_first: bool,
    more: Callable[[Sequence[Sequence[float]]], dict[str, str]] = lambda of_seeds: {},
) -> list[dict[str, Any]]:
    """One row a method, the best first.

    Args:
        scores: Method → for each seed the scores of its columns; the control among them.
        columns: What is scored.
        mean: What the mean over the columns is called.
        highest_first: Whether a higher score is a better one.
        more: Cells in front of the columns, from a method's scores.
    """
    control = [statistics.mean(each) for each in scores[CONTROL]]
    rows = []
    for label, of_seeds in sorted(
        scores.items(), key=lambda item: (-1 if highest_first else 1) * above(control, item[1])
    ):
        means = [statistics.mean(each) for each in of_seeds]
        less = [mean - other for mean, other in zip(means, control, strict=False)]
        rows.append(
            {
                "method": label,
                "parameters": parameters_of(label),
                "seeds": len(of_seeds),
                mean: with_error(means),
                "less tuned task arithmetic": with_error(less, sign="+") if label != CONTROL else "–",
                **more(of_seeds),
                **{
                    name: f"{statistics.mean(column):.3f}"
                    for name, column in zip(columns, zip(*of_seeds, strict=True), strict=True)
                },
            }
        )
    return rows


def classifier_table(benchmark: Benchmark, cases: Sequence[Case]) -> str:
    """Normalised accuracy by method, one column a task."""
    tasks = [task for task, _ in cases[0].members]
    relative = {
        label: [
            benchmark.relative(case, scores)
            for case, scores in zip(cases, benchmark.of_merges(cases, label), strict=False)
        ]
        for label in (*CHOICES, CONTROL)
    }
    relative["base"] = [
        benchmark.relative(case, [benchmark.of_base(case.group, member) for member in case.members]) for case in cases
    ]
    relative = {label: of_seeds for label, of_seeds in relative.items() if of_seeds}
    rows = method_rows(relative, tasks, "mean of tasks", highest_first=True)
    singles = [
        {
            "task": task,
            "single model": with_error([benchmark.of_single("minilm", case.members[place]) for case in cases]),
            "base under its head": with_error([benchmark.of_base("minilm", case.members[place]) for case in cases]),
            "labels": train_tasks.TASKS[task].labels,
        }
        for place, task in enumerate(tasks)
    ]
    tuned = ", ".join(str(benchmark.tuned(case)) for case in cases[: len(relative[CONTROL])])
    return (
        f"{markdown(rows)}\n\nAccuracy of the merge over that of the single model; ± is the "
        f"standard error over the seeds. λ of the tuned task arithmetic, by seed: {tuned}.\n\n"
        f"Accuracy of the single models:\n\n{markdown(singles)}"
    )


def parameters_of(label: str) -> str:
    """The parameters of a row."""
    if label == CONTROL:
        return f"weight 1.0, lambda of {', '.join(map(str, LAMBDAS))} on validation data"
    return CHOICES[label].shown() if label in CHOICES else "–"


def language_table(benchmark: Benchmark, cases: Sequence[Case]) -> str:
    """Bits per byte by method, one column a domain."""
    domains = [domain for domain, _ in cases[0].members]
    found = {label: benchmark.of_merges(cases, label) for label in (*CHOICES, CONTROL)}
    scores = {label: of_seeds for label, of_seeds in found.items() if of_seeds}
    scores["base"] = [[benchmark.of_base(case.group, member) for member in case.members] for case in cases]
    scores["each single model on its own domain"] = [
        [benchmark.of_single(case.group, member) for member in case.members] for case in cases
    ]

    def kept(of_seeds: Sequence[Sequence[float]]) -> dict[str, str]:
        gains = [statistics.mean(benchmark.relative(case, each)) for case, each in zip(cases, of_seeds, strict=False)]
        return {"gain kept": with_error(gains, 2)}

    rows = method_rows(scores, domains, "bits per byte", highest_first=False, more=kept)
    tuned = ", ".join(str(benchmark.tuned(case)) for case in cases[: len(scores[CONTROL])])
    return (
        f"{markdown(rows)}\n\nBits per byte of held-out text, mean of the domains, seeds of one base; ± "
        "is the standard error over the seeds. *Gain kept* is what the merge gains over the base, as a share of what "
        f"the single model of that domain gains. λ of the tuned task arithmetic, by seed: {tuned}."
    )


def seed_cases(name: str, group: str, tasks: Sequence[str], seeds: Sequence[int]) -> list[Case]:
    """One case a seed."""
    return [Case(f"{name}, seed {seed}", group, tuple((task, seed) for task in tasks)) for seed in seeds]


def rule_cases(seeds: Sequence[int], lm_seeds: Sequence[int]) -> Iterator[tuple[Case, bool]]:
    """Cases that the rule is fitted on, and whether it is only checked on them: the last seed, and language models."""
    fitted = seeds[:-1]
    subsets = [DISTINCT, DISTINCT[:2], DISTINCT[3:], REDUNDANT, REDUNDANT[:2], ("tense", "movies", "amazon")]
    for seed in seeds:
        for tasks in subsets:
            yield (
                Case(f"{', '.join(tasks)}; seed {seed}", "minilm", tuple((task, seed) for task in tasks)),
                (seed not in fitted),
            )
    for task in ("movies",):
        for some in combinations(seeds, 2):
            name = f"{task}, seeds {some[0]} and {some[1]}"
            yield Case(name, "minilm", tuple((task, seed) for seed in some)), seeds[-1] in some
    domains = tuple(train_tasks.DOMAINS)
    for group in ("llama", "gpt2"):
        for seed in lm_seeds:
            for some in (domains, domains[:2]):
                name = f"{group}: {', '.join(some)}; seed {seed}"
                yield Case(name, group, tuple((domain, seed) for domain in some)), True


def rule_row(
    name: str, side: str, order: str, threshold: Threshold, groups: Mapping[str, Sequence[Outcome]]
) -> dict[str, str]:
    """How well one rule does, on what it was fitted on and on all else."""
    row = {"indicator": name, f"{SPECTRAL} where it is": side, "order": order}
    for group, outcomes in groups.items():
        row[f"{group}: right"] = f"{threshold.right(outcomes)} of {len(outcomes)}"
        row[f"{group}: gain"] = f"{threshold.reached(outcomes):+.3f}"
    return row


def rule_table(benchmark: Benchmark, seeds: Sequence[int]) -> str:
    """Indicators and outcome of every case, and how well one limit on each indicator tells the outcome."""
    rows, outcomes = [], []
    for case, is_held_out in rule_cases(seeds, benchmark.lm_seeds):
        try:
            numbers = benchmark.task_vectors(case)
            plain, spectral = (
                statistics.mean(benchmark.relative(case, benchmark.of_merge(case, label)))
                for label in (PLAIN, SPECTRAL)
            )
        except NotMeasuredError:
            continue
        kept_back = f"MiniLM, seed {seeds[-1]}" if case.group == "minilm" else case.group
        outcomes.append(Outcome(kept_back if is_held_out else "fit", numbers, spectral - plain))
        rows.append(
            {
                "models": case.name,
                "used to": "check" if is_held_out else "fit",
                **{name: f"{value:.3g}" for name, value in numbers.items()},
                PLAIN: f"{plain:.3f}",
                SPECTRAL: f"{spectral:.3f}",
                "gain": f"{spectral - plain:+.3f}",
            }
        )
    groups = {
        name: [each for each in outcomes if each.group == name] for name in dict.fromkeys(o.group for o in outcomes)
    }
    fit = groups["fit"]
    rules = []
    for name in outcomes[0].indicators:
        threshold = fitted(name, fit)
        side = f"{'below' if threshold.below else 'above'} {threshold.limit:.3g}"
        rules.append(rule_row(name, side, f"{ranked(name, fit):.2f}", threshold, groups))
    always = Threshold(next(iter(outcomes[0].indicators)), math.inf, below=True)
    rules.append(rule_row("none", "always", "–", always, groups))
    return (
        f"{markdown(rules)}\n\nA limit is fitted so that {SPECTRAL} on one side, and {PLAIN} on the other, gain most. "
        f"*Gain* is the mean over cases above {PLAIN} everywhere. *Order*: the chance that of two cases the one with "
        "the larger gain has the larger indicator; 0.5 tells nothing, 0 and 1 all.\n\n"
        f"All cases; {PLAIN} and {SPECTRAL} as in the tables above, of language models the share of the single models' "
        f"gain:\n\n{markdown(rows)}"
    )


SECTIONS: dict[str, Callable[[Benchmark, Sequence[int]], str]] = {
    "distinct": lambda benchmark, seeds: classifier_table(benchmark, seed_cases("distinct", "minilm", DISTINCT, seeds)),
    "redundant": lambda benchmark, seeds: classifier_table(
        benchmark, seed_cases("redundant", "minilm", REDUNDANT, seeds)
    ),
    "llama": lambda benchmark, seeds: language_table(
        benchmark, seed_cases("llama", "llama", tuple(train_tasks.DOMAINS), benchmark.lm_seeds)
    ),
    "gpt2": lambda benchmark, seeds: language_table(
        benchmark, seed_cases("gpt2", "gpt2", tuple(train_tasks.DOMAINS), benchmark.lm_seeds)
    ),
    "rule": rule_table,
}


def main() -> None:
    """Trains what is missing, measures what is not known, and writes the sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where models and numbers are kept")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="some sections")
    parser.add_argument(
        "--seeds", nargs="+", type=int, choices=train_tasks.MINILM_SEEDS, default=list(train_tasks.MINILM_SEEDS)
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument(
        "--lm-seeds", nargs="+", type=int, choices=train_tasks.LM_SEEDS, default=list(train_tasks.LM_SEEDS)
    )
    parser.add_argument("--known", action="store_true", help="measure nothing: write what an interrupted run found")
    arguments = parser.parse_args()
    parents.settle(arguments.threads)
    require_sections(*(f"which_method_{name}" for name in arguments.only))
    for group in () if arguments.known else train_tasks.GROUPS:
        if (
            group in arguments.only
            or "rule" in arguments.only
            or (group == "minilm" and {"distinct", "redundant"} & set(arguments.only))
        ):
            train_tasks.train(group, arguments.out, arguments.seeds if group == "minilm" else arguments.lm_seeds)
    benchmark = Benchmark(arguments.out, arguments.lm_seeds, known=arguments.known)
    for name in arguments.only:
        text = SECTIONS[name](benchmark, arguments.seeds)
        command = f"python benchmarks/which_method.py --out DIR --only {name}"
        if name in ("distinct", "redundant", "rule"):
            command += f" --seeds {' '.join(map(str, arguments.seeds))}"
        if name not in ("distinct", "redundant"):
            command += f" --lm-seeds {' '.join(map(str, arguments.lm_seeds))}"
        replace_section(f"which_method_{name}", f"`{command}`\n\n{text}")


if __name__ == "__main__":
    main()
