"""Loss barriers of independently trained pairs: no alignment, permutations, all groups, and learned over all groups.

    python benchmarks/symmetries.py DIR [--only vit gpt2 llama] [--restarts 2] [--steps 400]

DIR is where `benchmarks/train_seeds.py` put its models. A barrier is the loss at the midpoint less the mean of the
parents', on held-out data.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter

import torch
import train_parents as parents
import train_seeds
import transformers
from torch import Tensor

from hf_llfc.alignment import Parameters, match_weights
from hf_llfc.alignment.learned_matching import Learning, learn_matching
from hf_llfc.checkpoints import Checkpoint, open_checkpoint
from hf_llfc.checkpoints.models import load_model
from hf_llfc.diagnostics.objectives import TaskLoss
from hf_llfc.recipe import AlignSection
from hf_llfc.specs import spec_of
from hf_llfc.stages import in_groups
from tests import real_data

PAIRS = ((1, 2), (3, 4), (5, 6))
TEST_BLOCKS = 200


def held_out(family: str) -> parents.Tensors:
    """All test images, or the first blocks of the Brown corpus, which no model was trained on."""
    if family == "vit":
        return parents.fashion_inputs("test")
    texts = parents.text_blocks(real_data.brown()["text"], " ")[:TEST_BLOCKS]
    ids = parents.byte_tokenizer()(texts, return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "labels": ids}


def training_batches(family: str) -> Iterator[parents.Tensors]:
    """What the models were trained on, in batches as then, without end."""
    if family == "vit":
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


def loss(checkpoint: Checkpoint, state: Mapping[str, Tensor], data: parents.Tensors) -> float:
    """Of weights in the class of a checkpoint."""
    model = load_model(checkpoint, state_dict=dict(state)).eval()
    with torch.no_grad():
        return parents.measure(model, data)["loss"]


def barriers(
    folder: Path, family: str, pair: tuple[int, int], restarts: int, steps: int
) -> dict[str, tuple[float, float]]:
    """Alignment → (barrier, seconds of matching)."""
    data = held_out(family)
    opened = [open_checkpoint(folder / "seeds" / f"{family}-{seed}") for seed in pair]
    found = {}
    for groups in ("permutation", "full"):
        a, b = in_groups(opened, AlignSection(groups=groups))
        state_a, state_b = dict(a.state_dict()), dict(b.state_dict())
        ends = (loss(a, state_a, data) + loss(b, state_b, data)) / 2

        def barrier(state: Mapping[str, Tensor]) -> float:
            middle = {
                name: (value + state[name]) / 2 if value.is_floating_point() else value
                for name, value in state_a.items()  # noqa: B023
            }
            return loss(a, middle, data) - ends  # noqa: B023

        if groups == "permutation":
            found["none"] = barrier(state_b), 0.0
        start = perf_counter()
        spec = spec_of(a)
        moves = [Parameters.from_state_dict(spec, state) for state in (state_a, state_b)]
        alignment = match_weights(*moves, restarts=restarts)
        found[groups] = barrier(alignment.apply(state_b)), perf_counter() - start
        if groups == "full" and steps:
            start = perf_counter()
            models = [load_model(each).eval() for each in (a, b)]
            objective = TaskLoss(models[0], "image-classification" if family == "vit" else "text-generation")
            alignment = learn_matching(
                *models, training_batches(family), spec, alignment, objective, learning=Learning(steps)
            )
            found["learned"] = barrier(alignment.apply(state_b)), perf_counter() - start
    return found


def main() -> None:
    """Prints a row a family and alignment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=("vit", "gpt2", "llama"), default=["vit", "gpt2", "llama"])
    parser.add_argument("--restarts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400, help="of learned matching; 0 to leave it out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print("| model | alignment | barrier, three pairs | mean ± standard error | of none | matching |")
    print("|---|---|---|---|---|---|")
    for family in options.only:
        rows = [barriers(options.folder, family, pair, options.restarts, options.steps) for pair in PAIRS]
        for name in rows[0]:
            values = [row[name][0] for row in rows]
            shares = [row[name][0] / row["none"][0] for row in rows]
            error = statistics.stdev(values) / len(values) ** 0.5
            seconds = statistics.median(row[name][1] for row in rows)
            print(
                f"| {family} | {name} | {', '.join(f'{value:.3f}' for value in values)} | "
                f"{statistics.mean(values):.3f} ± {error:.3f} | {statistics.mean(shares):.2f} | {seconds:.1f} s |",
                flush=True,
            )


if __name__ == "__main__":
    main()
