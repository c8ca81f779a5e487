"""Barriers of independent pairs: no alignment, permutations, all groups by weights, by activations, learned.

    python benchmarks/symmetries.py DIR [--only vit-128 gpt2 llama resnet mlp] [--pairs 3] [--steps 400] [--layers]

DIR is where `benchmarks/train_seeds.py` and, for the MLPs, `benchmarks/train_parents.py` put their models. The loss
barrier is the loss at the midpoint less the mean of the parents', on held-out data; the accuracy barrier of ResNets and
MLPs, which are judged by it, is at the worst of eleven points of the path. `--layers` shows LLFC of every
layer of the first pair before and after. Writes the sections symmetries_FAMILY of results/symmetries.md.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from time import perf_counter

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import train_parents as parents
from benchmarks import train_seeds
from benchmarks.results import markdown, replace_section, require_sections
from hf_llfc.alignment import Parameters, match_weights
from hf_llfc.alignment.activation_matching import match_activations
from hf_llfc.alignment.learned_matching import LEARNING_RATE, Learning, learn_matching
from hf_llfc.alignment.sources import ANCHORS, anchors_of
from hf_llfc.checkpoints import Checkpoint, open_checkpoint
from hf_llfc.checkpoints.models import load_model
from hf_llfc.diagnostics import LayerRow, diagnose_models, has_batch_norm, recompute_batch_norm
from hf_llfc.diagnostics.diagnose import barrier_height
from hf_llfc.diagnostics.objectives import TaskLoss
from hf_llfc.diagnostics.points import line
from hf_llfc.evaluation import EvaluationConfig, EvaluationData
from hf_llfc.parents.data import open_data
from hf_llfc.parents.fitting import in_groups
from hf_llfc.parents.specs import spec_of
from hf_llfc.recipe import AlignSection
from hf_llfc.symmetry import Alignment, PermutationSpec
from tests import real_data

PAIRS = ((1, 2), (3, 4), (5, 6))
MLP_PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))
TEST_BLOCKS = 200
CALIBRATION_BATCHES = 16
BATCH_NORM_BATCHES, BATCH_NORM_SIZE = 8, 256
LAYER_IMAGES, LAYER_BLOCKS = 1000, 60
CLASSIFIERS = (*train_seeds.VITS, "resnet", "mlp")
BY_ACCURACY = ("resnet", "mlp")
FAMILIES = (*CLASSIFIERS, *train_seeds.LANGUAGE_MODELS)
BATCH_SIZES = {**dict.fromkeys(CLASSIFIERS, 64), "mlp": 128, **dict.fromkeys(train_seeds.LANGUAGE_MODELS, 8)}


def pairs_of(family: str) -> Sequence[tuple[int, int]]:
    """The seeds of its pairs."""
    return MLP_PAIRS if family == "mlp" else PAIRS


@cache
def held_out(family: str) -> parents.Tensors:
    """All test images, or the first blocks of the Brown corpus, which no model was trained on."""
    if family in CLASSIFIERS:
        return parents.fashion_inputs("test")
    texts = parents.text_blocks(real_data.brown()["text"], " ")[:TEST_BLOCKS]
    ids = parents.byte_tokenizer()(texts, return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "labels": ids}


@cache
def training_data(family: str) -> parents.Tensors:
    """What the models were trained on."""
    if family in CLASSIFIERS:
        return parents.fashion_inputs("train")
    blocks = parents.text_blocks(real_data.brown()["text"], " ")
    ids = parents.byte_tokenizer()(
        blocks[train_seeds.TEST_BLOCKS : train_seeds.TEST_BLOCKS + train_seeds.TRAIN_BLOCKS], return_tensors="pt"
    )["input_ids"]
    return {"input_ids": ids, "labels": ids}


def training_batches(family: str, size: int | None = None) -> Iterator[parents.Tensors]:
    """The same in batches, as large as in training if not said otherwise, without end."""
    data, order = training_data(family), torch.Generator().manual_seed(0)
    while True:
        for indices in torch.randperm(len(data["labels"]), generator=order).split(size or BATCH_SIZES[family]):
            yield {name: value[indices] for name, value in data.items()}


def layer_data(folder: Path, family: str, checkpoint: Checkpoint, file: str = "test", **changes: int) -> EvaluationData:
    """Samples on which features are compared, or those from which batch normalization is recomputed."""
    data = folder / ("mlp" if family == "mlp" else "seeds") / "data"
    if family in CLASSIFIERS:
        options = {"samples": LAYER_IMAGES, "batch_size": 250, **changes}
        return open_data(EvaluationConfig("image-classification", str(data / f"{file}.parquet"), **options), checkpoint)
    texts = str(data / f"brown-{file}.jsonl")
    options = {"samples": LAYER_BLOCKS, "batch_size": 20, "max_length": parents.BLOCK_BYTES, **changes}
    return open_data(EvaluationConfig("text-generation", texts, blocks=False, **options), checkpoint)


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
        ends: The scores of both.
    """

    family: str
    a: Checkpoint
    b: Checkpoint
    state_a: dict[str, Tensor]
    state_b: dict[str, Tensor]
    data: parents.Tensors
    ends: tuple[dict[str, float], dict[str, float]]

    @classmethod
    def opened(cls, folder: Path, family: str, pair: tuple[int, int], groups: str) -> "Pair":
        """Two seeds of a family."""
        name = folder / ("mlp/seed" if family == "mlp" else f"seeds/{family}")
        a, b = in_groups([open_checkpoint(f"{name}-{seed}") for seed in pair], AlignSection(groups=groups))
        states, data = [dict(each.state_dict()) for each in (a, b)], held_out(family)
        first, second = (scores(a, state, data) for state in states)
        return cls(family, a, b, *states, data, (first, second))

    @property
    def spec(self) -> PermutationSpec:
        """Of both models."""
        return spec_of(self.a)

    @property
    def has_batch_norm(self) -> bool:
        """Whether running statistics have to be looked after."""
        return has_batch_norm(load_model(self.a))

    def parameters(self) -> list[Parameters]:
        """What weight matching reads."""
        return [Parameters.from_state_dict(self.spec, state) for state in (self.state_a, self.state_b)]

    def aligned(self, alignment: Alignment | None) -> Mapping[str, Tensor]:
        """The tensors of B as they are merged."""
        return self.state_b if alignment is None else alignment.apply(self.state_b)

    def barrier(self, alignment: Alignment | None = None, *, recomputed: bool = False) -> float:
        """The loss at the midpoint less the mean of the parents'."""
        return self.barrier_of(self.aligned(alignment), recomputed=recomputed)

    def barrier_of(self, of_b: Mapping[str, Tensor], *, recomputed: bool = False) -> float:
        """The same, given the tensors of B as they are merged."""
        return self.scores_at(0.5, of_b, recomputed=recomputed)["loss"] - sum(each["loss"] for each in self.ends) / 2

    def accuracy_barrier(self, alignment: Alignment | None = None, *, recomputed: bool = False) -> float:
        """In points: the most by which the accuracy on eleven points lies below that on the line between the ends."""
        of_b, region = self.aligned(alignment), line()
        found = {
            0.0: self.ends[1],
            1.0: self.ends[0],
            **{
                point.alpha: self.scores_at(point.alpha, of_b, recomputed=recomputed)
                for point in region.points
                if point.vertex is None
            },
        }
        return 100 * barrier_height(region.points, [1 - found[point.alpha]["accuracy"] for point in region.points])

    def scores_at(self, alpha: float, of_b: Mapping[str, Tensor], *, recomputed: bool) -> dict[str, float]:
        """Of the merge at a point of the path."""
        merged = {
            name: torch.lerp(of_b[name], value, alpha) if value.is_floating_point() else value
            for name, value in self.state_a.items()
        }
        return scores(self.a, merged, self.data, self.family if recomputed else None)


def scores(
    checkpoint: Checkpoint, state: Mapping[str, Tensor], data: parents.Tensors, recomputed: str | None = None
) -> dict[str, float]:
    """Loss and accuracy of weights in the class of a checkpoint, if asked for with the statistics of batches."""
    model = load_model(checkpoint, state_dict=dict(state)).eval()
    if recomputed is not None:
        batches = islice(training_batches(recomputed, BATCH_NORM_SIZE), BATCH_NORM_BATCHES)
        recompute_batch_norm(model, ((batch, batch["labels"]) for batch in batches))
    return parents.measure(model, data)


def by_activations(pair: Pair) -> Alignment:
    """Activation matching over all groups on a few batches."""
    models = [load_model(each).eval() for each in (pair.a, pair.b)]
    batches = islice(training_batches(pair.family), CALIBRATION_BATCHES)
    unlabelled = ({name: value for name, value in batch.items() if name != "labels"} for batch in batches)
    return match_activations(*models, unlabelled, pair.spec)


def learned(pair: Pair, start: Alignment, learning: Learning) -> Alignment:
    """Learned matching over all groups, by the loss of the task."""
    models = [load_model(each).eval() for each in (pair.a, pair.b)]
    task = "image-classification" if pair.family in CLASSIFIERS else "text-generation"
    objective = TaskLoss(models[0], task)
    return learn_matching(*models, training_batches(pair.family), start, objective, learning=learning)


@dataclass(frozen=True)
class Row:
    """What one alignment of one pair came to.

    Attributes:
        loss: Barrier in nats.
        accuracy: Barrier in points, where it is measured.
        seconds: Of matching.
    """

    loss: float
    accuracy: float | None
    seconds: float


@dataclass(frozen=True)
class Measured:
    """One pair over all alignments.

    Attributes:
        rows: Alignment → what it came to.
        layers: Alignment → LLFC of every layer at the midpoint, where that was asked for.
    """

    rows: dict[str, Row] = field(default_factory=dict)
    layers: dict[str, Sequence[LayerRow]] = field(default_factory=dict)


def measure(folder: Path, family: str, seeds: tuple[int, int], learning: Learning | None, layers: bool) -> Measured:
    """Aligns one pair in every way."""
    found = Measured()

    def add(name: str, pair: Pair, match: Callable[[], Alignment | None], shown: str = "") -> Alignment | None:
        start = perf_counter()
        alignment = match()
        seconds = perf_counter() - start
        for recomputed in (False, True) if pair.has_batch_norm else (False,):
            accuracy = pair.accuracy_barrier(alignment, recomputed=recomputed) if family in BY_ACCURACY else None
            title = f"{name}, BatchNorm recomputed" if recomputed else name
            found.rows[title] = Row(pair.barrier(alignment, recomputed=recomputed), accuracy, seconds)
        if layers and shown:
            found.layers[shown] = features(folder, pair, alignment)
        print(family, seeds, name, found.rows[name], flush=True)
        return alignment

    pair = Pair.opened(folder, family, seeds, "permutation")
    add("none", pair, lambda: None, "none")
    add("permutation", pair, lambda: match_weights(*pair.parameters()))
    full = Pair.opened(folder, family, seeds, "full")

    def matched(anchors: float) -> Alignment:
        return match_weights(*(each.with_anchors(anchors) for each in full.parameters()))

    count = anchors_of(full.spec)
    other = 1.0 if count > 1 else ANCHORS
    add(f"full, anchors count {'once' if other == 1 else f'{other:g} times'}", full, lambda: matched(other))
    by_weights = add("full", full, lambda: matched(count), "full")
    add("full, by activations", full, lambda: by_activations(full))
    if learning is not None:
        assert by_weights is not None
        title = f"learned, {learning.steps} steps"
        if learning.learning_rate != LEARNING_RATE:
            title += f" at a rate of {learning.learning_rate:g}"
        add(title, full, lambda: learned(full, by_weights, learning), "learned")
    return found


def features(folder: Path, pair: Pair, alignment: Alignment | None) -> Sequence[LayerRow]:
    """LLFC of every layer at the midpoint, the statistics of batch normalization recomputed."""
    models = [
        load_model(each, state_dict=dict(state)).eval()
        for each, state in ((pair.a, pair.state_a), (pair.b, pair.aligned(alignment)))
    ]
    statistics_of = None
    if pair.has_batch_norm:
        samples = BATCH_NORM_BATCHES * BATCH_NORM_SIZE
        statistics_of = layer_data(folder, pair.family, pair.a, "train", samples=samples, batch_size=BATCH_NORM_SIZE)
    data = layer_data(folder, pair.family, pair.a)
    return diagnose_models(models, data, region=line([0.5]), batch_norm_data=statistics_of).layers


def summary(values: Sequence[float], digits: int) -> str:
    """Mean and standard error."""
    mean = f"{statistics.mean(values):.{digits}f}"
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return mean if error is None else f"{mean} ± {error:.{digits}f}"


def barrier_table(measured: Sequence[Measured]) -> str:
    """A row an alignment."""
    rows = []
    for name in measured[0].rows:
        of_pairs = [each.rows[name] for each in measured]
        shares = [each.rows[name].loss / each.rows["none"].loss for each in measured]
        columns = {
            "alignment": name,
            "loss barrier, each pair": ", ".join(f"{each.loss:.3f}" for each in of_pairs),
            "mean ± standard error": summary([each.loss for each in of_pairs], 3),
            "of none": f"{statistics.mean(shares):.3f}",
        }
        if of_pairs[0].accuracy is not None:
            points = [each.accuracy for each in of_pairs]
            columns["accuracy barrier in points, each pair"] = ", ".join(f"{each:.2f}" for each in points)
            columns["its mean ± standard error"] = summary(points, 2)
        rows.append({**columns, "matching": f"{statistics.median(each.seconds for each in of_pairs):.1f} s"})
    return markdown(rows)


def layer_table(layers: Mapping[str, Sequence[LayerRow]]) -> str:
    """A row a layer, in every cell a value an alignment."""
    rows = []
    for of_layer in zip(*layers.values(), strict=True):
        values = {
            "1 − cos(merged, blend)": [f"{each.llfc.mean:.3f}" for each in of_layer],
            "1 − cos(A, B)": [f"{each.baseline.mean:.3f}" for each in of_layer],
            "ratio": ["–" if each.ratio is None else f"{each.ratio:.2f}" for each in of_layer],
            "coefficient": [f"{each.coefficient.mean:.2f}" for each in of_layer],
        }
        rows.append({"layer": of_layer[0].layer, **{name: " → ".join(each) for name, each in values.items()}})
    return markdown(rows)


def section(command: str, family: str, measured: Sequence[Measured]) -> str:
    """The section of a family."""
    text = f"{command}\n\n{barrier_table(measured)}"
    layers = measured[0].layers
    if layers:
        seeds = " and ".join(map(str, pairs_of(family)[0]))
        text += (
            f"\n\nLLFC at the midpoint of seeds {seeds}, in every cell {' → '.join(layers)}:\n\n{layer_table(layers)}"
        )
    return text


def main() -> None:
    """Measures family by family; prints every pair, and writes the section of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=["vit-128", "gpt2", "llama"])
    parser.add_argument("--pairs", type=int, choices=(1, 2, 3, 4), default=3, help="how many; only the MLPs have four")
    parser.add_argument("--steps", type=int, default=400, help="of learned matching; 0 to leave it out")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="of learned matching")
    parser.add_argument("--layers", action="store_true", help="LLFC per layer of the first pair")
    options = parser.parse_args()
    require_sections(*(f"symmetries_{family}" for family in options.only))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    learning = Learning(options.steps, options.learning_rate) if options.steps else None
    command = f"`python benchmarks/symmetries.py {shlex.join(['DIR', *sys.argv[2:]])}`"
    for family in options.only:
        measured = [
            measure(options.folder, family, pair, learning, options.layers and place == 0)
            for place, pair in enumerate(pairs_of(family)[: options.pairs])
        ]
        replace_section(f"symmetries_{family}", section(command, family, measured))


if __name__ == "__main__":
    main()
