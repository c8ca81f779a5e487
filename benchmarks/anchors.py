"""What anchors are worth to weight matching over all groups, and how much of a match is chance.

    python benchmarks/anchors.py DIR [--only vit-128 llama] [--pair 1 2]

DIR is where `benchmarks/train_seeds.py` put its models. Barriers by how often anchors count; then, for every kind of
weight, the cosine after matching beside that of weights shuffled at random, which have only their size in common.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.symmetries import FAMILIES, Pair
from hf_llfc.alignment import Parameters, match_weights

COUNTS = (1.0, 4.0, 16.0, 64.0)


def cosines(pair: Pair, of_b: dict[str, Tensor]) -> dict[str, float]:
    """Kind of weight → mean cosine of A and the matched B."""
    parameters = [Parameters.from_state_dict(pair.spec, state) for state in (pair.state_a, of_b)]
    moved = match_weights(*parameters).apply(of_b)
    kinds: dict[str, list[float]] = {}
    for name, value in pair.state_a.items():
        if value.ndim > 1:
            kind = " ".join(part for part in name.split(".")[-3:-1] if not part.isdigit())
            cosine = torch.cosine_similarity(value.double().flatten(), moved[name].double().flatten(), 0)
            kinds.setdefault(kind, []).append(float(cosine))
    return {kind: statistics.mean(values) for kind, values in kinds.items()}


def shuffled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every weight with its entries in random order and with random signs."""
    generator = torch.Generator().manual_seed(0)

    def of(value: Tensor) -> Tensor:
        order = torch.randperm(value.numel(), generator=generator)
        signs = torch.randint(0, 2, (value.numel(),), generator=generator) * 2 - 1
        return (value.flatten()[order] * signs).view(value.shape)

    return {name: of(value) if value.ndim > 1 else value for name, value in state.items()}


def main() -> None:
    """Prints two tables a family."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=["vit-128", "llama"])
    parser.add_argument("--pair", nargs=2, type=int, default=(1, 2))
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for family in options.only:
        pair = Pair.opened(options.folder, family, tuple(options.pair), "full")
        naive = pair.barrier()
        print(f"\n{family}, seeds {options.pair[0]} and {options.pair[1]}, barrier without alignment {naive:.3f}\n")
        print("| anchors count | barrier | of none |\n|---|---|---|")
        for count in COUNTS:
            barrier = pair.barrier(match_weights(*(each.with_anchors(count) for each in pair.parameters())))
            print(f"| {count:g} | {barrier:.3f} | {barrier / naive:.2f} |", flush=True)
        found, by_chance = cosines(pair, pair.state_b), cosines(pair, shuffled(pair.state_b))
        print("\n| weights | cosine, matched | of shuffled weights, matched |\n|---|---|---|")
        for kind, cosine in found.items():
            print(f"| {kind} | {cosine:.2f} | {by_chance[kind]:.2f} |")


if __name__ == "__main__":
    main()
