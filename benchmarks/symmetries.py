"""Loss barriers of independent pairs: no alignment, permutations, all groups by weights, by activations, learned.

    python benchmarks/symmetries.py DIR [--only vit-128 gpt2 llama] [--pairs 3] [--steps 400]

DIR is where `benchmarks/train_seeds.py` put its models. A barrier is the loss at the midpoint less the mean of the
parents', on held-out data.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter

import torch
import train_parents as parents
import train_seeds
import transformers
from torch import Tensor

from hf_llfc.alignment import Parameters, match_weights
from hf_llfc.alignment.activation_matching import match_activations
from hf_llfc.alignment.learned_matching import Learning, learn_matching
from hf_llfc.alignment.sources import ANCHORS
from hf_llfc.checkpoints import Checkpoint, open_checkpoint
from hf_llfc.checkpoints.models import load_model
from hf_llfc.diagnostics.objectives import TaskLoss
from hf_llfc.recipe import AlignSection
from hf_llfc.specs import spec_of
from hf_llfc.stages import in_groups
from hf_llfc.symmetry import Alignment, PermutationSpec
from tests import real_data

PAIRS = ((1, 2), (3, 4), (5, 6))
TEST_BLOCKS = 200
CALIBRATION_BATCHES = 16
FAMILIES = (*train_seeds.VITS, *train_seeds.LANGUAGE_MODELS)


def held_out(family: str) -> parents.Tensors:
    """All test images, or the first blocks of the Brown corpus, which no model was trained on."""
    if family in train_seeds.VITS:
        return parents.fashion_inputs("test")
    texts = parents.text_blocks(real_data.brown()["text"], " ")[:TEST_BLOCKS]
    ids = parents.byte_tokenizer()(texts, return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "labels": ids}


def training_batches(family: str) -> Iterator[parents.Tensors]:
    """What the models were trained on, in batches as then, without end."""
    if family in train_seeds.VITS:
        data, size = parents.fashion_inputs("train"), 64
    else:
        blocks = parents.text_blocks(real_data.brown()["text"], " ")
        ids = parents.byte_tokenizer()(
            blocks[train_seeds.TEST_BLOCKS : train_seeds.TEST_BLOCKS + train_seeds.TRAIN_BLOCKS], return_tensors="pt"
        )["input_ids"]
        data, size = {"input_ids": ids, "labels": ids}, 8
    order = torch.Generator().manual_seed(0)
    while True:
        for indices in torch.randperm(len(data["labels"]), generator=order).split(size):
            yield {name: value[indices] for name, value in data.items()}


@dataclass(frozen=True)
class Pair:
    """Two models in the form in which they are aligned.

    Attributes:
        family: Of both.
        a: The reference.
        b: The model that moves.
        state_a: Its tensors.
        state_b: Of B.
        data: What losses are measured on.
        ends: The mean loss of the parents.
    """

    family: str
    a: Checkpoint
    b: Checkpoint
    state_a: dict[str, Tensor]
    state_b: dict[str, Tensor]
    data: parents.Tensors
    ends: float

    @classmethod
    def opened(cls, folder: Path, family: str, pair: tuple[int, int], groups: str) -> "Pair":
        """Two seeds of a family."""
        a, b = in_groups(
            [open_checkpoint(folder / "seeds" / f"{family}-{seed}") for seed in pair], AlignSection(groups=groups)
        )
        states, data = [dict(each.state_dict()) for each in (a, b)], held_out(family)
        ends = sum(loss(a, state, data) for state in states) / 2
        return cls(family, a, b, *states, data, ends)

    @property
    def spec(self) -> PermutationSpec:
        """Of both models."""
        return spec_of(self.a)

    def parameters(self) -> list[Parameters]:
        """What weight matching reads."""
        return [Parameters.from_state_dict(self.spec, state) for state in (self.state_a, self.state_b)]

    def barrier(self, alignment: Alignment | None = None) -> float:
        """The loss at the midpoint less the mean of the parents'."""
        return self.barrier_of(self.state_b if alignment is None else alignment.apply(self.state_b))

    def barrier_of(self, of_b: Mapping[str, Tensor]) -> float:
        """The same, given the tensors of B as they are merged."""
        middle = {
            name: (value + of_b[name]) / 2 if value.is_floating_point() else value
            for name, value in self.state_a.items()
        }
        return loss(self.a, middle, self.data) - self.ends


def loss(checkpoint: Checkpoint, state: Mapping[str, Tensor], data: parents.Tensors) -> float:
    """Of weights in the class of a checkpoint."""
    model = load_model(checkpoint, state_dict=dict(state)).eval()
    with torch.no_grad():
        return parents.measure(model, data)["loss"]


def by_activations(pair: Pair) -> Alignment:
    """Activation matching over all groups on a few batches."""
    models = [load_model(each).eval() for each in (pair.a, pair.b)]
    batches = islice(training_batches(pair.family), CALIBRATION_BATCHES)
    unlabelled = ({name: value for name, value in batch.items() if name != "labels"} for batch in batches)
    return match_activations(*models, unlabelled, pair.spec)


def learned(pair: Pair, start: Alignment, steps: int) -> Alignment:
    """Learned matching over all groups, by the loss of the task."""
    models = [load_model(each).eval() for each in (pair.a, pair.b)]
    task = "image-classification" if pair.family in train_seeds.VITS else "text-generation"
    objective = TaskLoss(models[0], task)
    return learn_matching(*models, training_batches(pair.family), pair.spec, start, objective, learning=Learning(steps))


def barriers(folder: Path, family: str, seeds: tuple[int, int], steps: int) -> dict[str, tuple[float, float]]:
    """Alignment → (barrier, seconds of matching)."""
    found = {}

    def measured(name: str, pair: Pair, match: Callable[[], Alignment]) -> Alignment:
        start = perf_counter()
        alignment = match()
        seconds = perf_counter() - start
        found[name] = pair.barrier(alignment), seconds
        return alignment

    pair = Pair.opened(folder, family, seeds, "permutation")
    found["none"] = pair.barrier(), 0.0
    measured("permutation", pair, lambda: match_weights(*pair.parameters()))
    full = Pair.opened(folder, family, seeds, "full")
    measured("full, anchors count once", full, lambda: match_weights(*full.parameters()))
    anchored = [each.with_anchors(ANCHORS) for each in full.parameters()]
    by_weights = measured("full", full, lambda: match_weights(*anchored))
    measured("full, by activations", full, lambda: by_activations(full))
    if steps:
        measured(f"learned, {steps} steps", full, lambda: learned(full, by_weights, steps))
    return found


def main() -> None:
    """Prints a row a family and alignment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=["vit-128", "gpt2", "llama"])
    parser.add_argument("--pairs", type=int, choices=(1, 2, 3), default=3, help="how many of the three")
    parser.add_argument("--steps", type=int, default=400, help="of learned matching; 0 to leave it out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print("| model | alignment | barrier, each pair | mean ± standard error | of none | matching |")
    print("|---|---|---|---|---|---|")
    for family in options.only:
        rows = [barriers(options.folder, family, pair, options.steps) for pair in PAIRS[: options.pairs]]
        for name in rows[0]:
            values = [row[name][0] for row in rows]
            shares = [row[name][0] / row["none"][0] for row in rows]
            error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
            seconds = statistics.median(row[name][1] for row in rows)
            print(
                f"| {family} | {name} | {', '.join(f'{value:.3f}' for value in values)} | "
                f"{statistics.mean(values):.3f}{error} | {statistics.mean(shares):.2f} | {seconds:.1f} s |",
                flush=True,
            )


if __name__ == "__main__":
    main()
