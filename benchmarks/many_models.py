"""Several independently trained models, averaged: not aligned, each onto the first, around a centre, in one universe.

    python benchmarks/many_models.py MODEL MODEL MODEL … --name NAME [--data fashion|brown] [--groups full]
        [--calibration FILE]

Measured on held-out data are the models, the middle of every pair, and the mean of all. A barrier is what a merge lies
above the mean of its models. For comparison every pair is also matched alone. With calibration data, whose labels are
not looked at, models are matched by activations, else by weights. Writes the section NAME of
results/many_models.md, where a new one gets its two markers first.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import mean
from time import perf_counter

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import train_parents as parents
from benchmarks.results import markdown, replace_section, require_sections
from hf_llfc.alignment.together import align_all
from hf_llfc.checkpoints import Checkpoint, open_checkpoint
from hf_llfc.checkpoints.models import load_model
from hf_llfc.evaluation import EvaluationConfig
from hf_llfc.foundation.choices import GROUPS, TOGETHER
from hf_llfc.parents.fitting import in_groups
from hf_llfc.recipe import AlignSection
from tests import mlp_model, real_data  # noqa: F401  the adapter of the MLP

TEST_BLOCKS = 200
CALIBRATION_SAMPLES = {"fashion": 1024, "brown": 128}
TITLES = {"reference": "each onto the first", "star": "star", "universe": "universe"}
# Quantity → how it is shown: factor, unit and digits.
QUANTITIES = {"error": (100, "points", 2), "loss": (1, "nats", 3)}

State = Mapping[str, Tensor]
Scores = Mapping[str, float]


def held_out(data: str) -> parents.Tensors:
    """All test images of Fashion-MNIST, or the first blocks of the Brown corpus, which no model was trained on."""
    if data == "fashion":
        return parents.fashion_inputs("test")
    texts = parents.text_blocks(real_data.brown()["text"], " ")[:TEST_BLOCKS]
    ids = parents.byte_tokenizer()(texts, return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "labels": ids}


def score_of_mean(checkpoint: Checkpoint, states: Sequence[State], data: parents.Tensors) -> Scores:
    """Loss, and of a classifier error, of the mean of some weights."""
    state = dict(states[0])
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            state[name] = (sum(each[name].double() for each in states) / len(states)).to(tensor.dtype)
    found = parents.measure(load_model(checkpoint, state_dict=state).eval(), data)
    return {"loss": found["loss"]} | ({"error": 1 - found["accuracy"]} if "accuracy" in found else {})


def barrier(merged: Scores, ends: Sequence[Scores], key: str) -> float:
    """What a merge lies above the mean of its models."""
    return merged[key] - mean(each[key] for each in ends)


def mean_cosine(states: Sequence[State]) -> float:
    """Of the weights of all pairs."""
    rows = torch.stack([torch.cat([tensor.double().flatten() for tensor in state.values()]) for state in states])
    rows = rows / rows.norm(dim=1, keepdim=True)
    return float((rows @ rows.T).triu(1).sum() / (len(rows) * (len(rows) - 1) / 2))


def row(
    title: str, ends: Sequence[Scores], edges: Sequence[Scores], of_all: Scores | None, cosine: str, seconds: float
) -> dict[str, str]:
    """A row of the table: the middles of all pairs, and the mean of all models where there is one."""
    columns = {"alignment": title}
    if "error" in ends[0]:
        columns["mean of all, accuracy"] = f"{1 - of_all['error']:.4f}" if of_all else "–"
    for key, (factor, unit, digits) in QUANTITIES.items():
        if key not in ends[0]:
            continue
        heights = [barrier(edge, pair, key) for edge, pair in zip(edges, combinations(ends, 2), strict=True)]
        at_all = [barrier(of_all, ends, key)] if of_all else []
        shown = {"mean of all": at_all, "middles of pairs, mean": [mean(heights)], "largest": [max(heights + at_all)]}
        for where, values in shown.items():
            columns[f"{key} barrier, {unit}: {where}"] = f"{factor * values[0]:.{digits}f}" if values else "–"
    return columns | {"mean cosine": cosine, "matching, seconds": f"{seconds:.0f}"}


def compare(names: Sequence[str], data: parents.Tensors, options: AlignSection) -> tuple[list[dict[str, str]], str]:
    """The rows of the table, and what the centre of the star is."""
    opened = in_groups([open_checkpoint(name) for name in names], options)
    first, count = opened[0], len(opened)
    states = [dict(each.state_dict()) for each in opened]
    ends = [score_of_mean(first, [state], data) for state in states]
    pairs = list(combinations(range(count), 2))

    def of_pairs(moved: Sequence[State]) -> list[Scores]:
        return [score_of_mean(first, [moved[i], moved[j]], data) for i, j in pairs]

    rows = [row("none", ends, of_pairs(states), score_of_mean(first, states, data), f"{mean_cosine(states):.4f}", 0.0)]
    alone, cosines, centre = [], [], ""
    start = perf_counter()
    for i, j in pairs:
        _, alignment = align_all(opened[i], [opened[i], opened[j]], options)
        both = [states[i], alignment.apply(states[j])]
        alone.append(both)
        cosines.append(mean_cosine(both))
    seconds = perf_counter() - start
    edges = [score_of_mean(first, both, data) for both in alone]
    rows.append(row("every pair alone", ends, edges, None, f"{mean(cosines):.4f}", seconds))
    for together in TOGETHER:
        start = perf_counter()
        found = align_all(first, opened, replace(options, together=together))
        seconds = perf_counter() - start
        moved = [
            state if alignment is None else alignment.apply(state)
            for alignment, state in zip(found, states, strict=True)
        ]
        cosine = f"{mean_cosine(moved):.4f}"
        rows.append(row(TITLES[together], ends, of_pairs(moved), score_of_mean(first, moved, data), cosine, seconds))
        if together == "star":
            centre = found[1].metadata["star"]["centre"]
    return rows, centre


def calibration(file: str, data: str) -> EvaluationConfig:
    """Samples on which activations are compared."""
    samples = CALIBRATION_SAMPLES[data]
    if data == "fashion":
        return EvaluationConfig("image-classification", file, samples=samples, batch_size=64)
    length = parents.BLOCK_BYTES
    return EvaluationConfig("text-generation", file, samples=samples, batch_size=8, max_length=length, blocks=False)


def main() -> None:
    """Measures, prints, and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders of checkpoints, the first is the reference")
    parser.add_argument("--name", required=True, help="of the section in results/many_models.md")
    parser.add_argument("--data", choices=("fashion", "brown"), default="fashion")
    parser.add_argument("--groups", choices=GROUPS, default="permutation")
    parser.add_argument("--restarts", type=int, default=2)
    parser.add_argument("--anchors", type=float, help="how often anchors count; as recipes have it if left out")
    parser.add_argument("--calibration", metavar="FILE", help="training images or texts, to match by activations")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    options = parser.parse_args()
    require_sections(options.name)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    how = AlignSection(groups=options.groups, restarts=options.restarts, anchors=options.anchors)
    if options.calibration:
        how = replace(how, method="activation_matching", calibration=calibration(options.calibration, options.data))
    rows, centre = compare(options.models, held_out(options.data), how)
    command = f"`python benchmarks/many_models.py {shlex.join(sys.argv[1:])}`"
    text = f"{command}\n\n{markdown(rows)}\n\nThe centre of the star is {Path(centre).name}."
    print(text)
    replace_section(options.name, text)


if __name__ == "__main__":
    main()
