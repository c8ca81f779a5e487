"""One sweep of weight matching against the bare matrix products and assignments, and its cost against the width.

    python benchmarks/matching_speed.py [--folder DIR] [--size 1.1B] [--layers N] [--rounds 5] [--widths 256 … 8192]

The pair is made by `llama_pair`, two Llama-shaped bfloat16 checkpoints; the second is moved by a random transform of
every axis with noise as large as the weights, so that no assignment is a mere row maximum. A sweep is
`match_weights` with `Search(restarts=1, max_sweeps=1)` over all axes, with everything that belongs to it: reading,
casting, norms and objectives. Bare are the same matrix products on float32 matrices in memory, one of each shape times
its number, and the assignments of the largest matrices that the sweep solved, alone. Sweep and bare take turns. Writes
the section of this name of results/matching.md, and a plot beside RESULTS.md.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hf_llfc.alignment.gains as gains_module
from benchmarks import llama_pair
from benchmarks.results import RESULTS, markdown, replace_section
from hf_llfc import PermutationSpec
from hf_llfc.alignment import Parameters, Search, match_weights
from hf_llfc.alignment.assignment.assignment import assign, assign_with_gap
from hf_llfc.alignment.gains import CHUNK, Gains
from hf_llfc.alignment.groups import groups_of
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.parallel.workers import Workers
from hf_llfc.parents.specs import bind, spec_of

VOCABULARY = 1024
"""Of the models of the widths, so that the layers are what costs."""


@contextmanager
def matrices_kept() -> Iterator[dict[int, tuple[Tensor, list[int]]]]:
    """The first gain matrix of each size above a thousand that a sweep solves, and one entry for each."""
    kept: dict[int, tuple[Tensor, list[int]]] = {}

    def spy(gain: Tensor, *, solver: str) -> tuple[Tensor, float]:
        if gain.shape[0] > 1000:
            kept.setdefault(gain.shape[0], (gain.clone(), []))[1].append(1)
        return assign_with_gap(gain, solver=solver)

    gains_module.assign_with_gap = spy
    try:
        yield kept
    finally:
        gains_module.assign_with_gap = assign_with_gap


def products(parameters: Parameters) -> Counter[tuple[int, int]]:
    """The matrix products of a sweep: (width of the gains, rows summed over) → how many."""
    gains = Gains(parameters, parameters)
    found: Counter[tuple[int, int]] = Counter()
    for group in groups_of(parameters.binding):
        keys = gains.keys(group.axes)
        for key, elements in zip(keys, gains._elements(keys), strict=True):
            width = group.size * gains._width(key, group)
            found[width, round(elements) // width] += 1
    return found


def bare_products(shapes: Counter[tuple[int, int]]) -> float:
    """Seconds of the products, with matrices of the shapes in memory."""
    total = 0.0
    for (width, rows), number in shapes.items():
        part = min(rows, max(4096, CHUNK // width))
        left, right = torch.randn(part, width), torch.randn(part, width)
        into = torch.zeros(width, width)
        into.addmm_(left.T, right)
        start = time.perf_counter()
        whole = math.ceil(rows / part)
        for _ in range(min(whole, 8)):
            into.addmm_(left.T, right)
        total += (time.perf_counter() - start) / min(whole, 8) * rows / part * number
    return total


def timed_sweep(pair: tuple[Parameters, Parameters]) -> float:
    """Seconds of one sweep."""
    start = time.perf_counter()
    match_weights(*pair, search=Search(restarts=1, max_sweeps=1), workers=Workers(torch.get_num_threads()))
    return time.perf_counter() - start


def bare_assignments(kept: dict[int, tuple[Tensor, list[int]]]) -> float:
    """Seconds of the assignments, one of each size times its number."""
    total = 0.0
    for gain, calls in kept.values():
        start = time.perf_counter()
        assign(gain)
        total += (time.perf_counter() - start) * len(calls)
    return total


def pair_on_disk(folder: Path, size: str, layers: int | None) -> tuple[Parameters, Parameters]:
    """Two checkpoints of the size."""
    folders = llama_pair.make_pair(folder, size, layers)
    checkpoints = [open_checkpoint(each) for each in folders]
    spec = spec_of(checkpoints[0])
    moved = spec.random_alignment(torch.Generator().manual_seed(0))
    binding = bind(spec, checkpoints[1])
    one, other = (Parameters(bind(spec, each), each.read) for each in checkpoints)
    state = {name: with_noise(moved.read_aligned(name, binding, other.read)) for name in checkpoints[1].tensors}
    return one, Parameters(binding, state.__getitem__)


def with_noise(tensor: Tensor) -> Tensor:
    """The tensor with noise as large as itself."""
    generator = torch.Generator().manual_seed(tensor.numel())
    noise = torch.empty(tensor.shape, dtype=torch.float32).normal_(0, float(tensor.float().std()), generator=generator)
    return tensor + noise.to(tensor.dtype)


def pair_of_width(width: int) -> tuple[Parameters, Parameters]:
    """Two models of one layer in memory, bfloat16."""
    heads = max(4, width // 128)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    spec = PermutationSpec.from_config(config)
    key_width = 4 * (width // heads)
    layer = "model.layers.0."
    shapes = {"model.embed_tokens.weight": (VOCABULARY, width), "model.norm.weight": (width,)}
    shapes |= {f"{layer}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes |= {f"{layer}mlp.{name}_proj.weight": (width, width) for name in ("gate", "up", "down")}
    shapes |= {f"{layer}self_attn.{name}_proj.weight": (width, width) for name in ("q", "o")}
    shapes |= {f"{layer}self_attn.{name}_proj.weight": (key_width, width) for name in ("k", "v")}
    pair = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        state = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
        pair.append(Parameters.from_state_dict(spec, state))
    return pair[0], pair[1]


def plot(points: dict[int, float], exponent: float) -> Path:
    """Seconds against width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.5))
    axes.loglog(list(points), list(points.values()), "o-", label=f"one sweep, exponent {exponent:.2f}")
    axes.set_xticks(list(points), labels=[str(width) for width in points])
    axes.minorticks_off()
    axes.set_xlabel("width")
    axes.set_ylabel("seconds")
    axes.legend()
    figure.tight_layout()
    path = RESULTS.parent / "matching_speed.png"
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    """Measures both, writes the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the pair lies, or is made; a temporary folder if left out")
    parser.add_argument("--size", choices=llama_pair.SHAPES, default="1.1B")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096, 8192])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        pair = pair_on_disk(options.folder or Path(temporary), options.size, options.layers)
        shapes = products(pair[0])
        with matrices_kept() as kept:
            timed_sweep(pair)
        rounds = []
        for _ in range(options.rounds):
            rounds.append((timed_sweep(pair), bare_products(shapes), bare_assignments(kept)))
            print([f"{seconds:.1f}" for seconds in rounds[-1]], flush=True)
    sweep, product, assignment = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(whole / (bare + alone) for whole, bare, alone in rounds)
    row = {
        "pair": options.size + (f", {options.layers} layers" if options.layers else ""),
        "one sweep, s": f"{sweep:.1f}",
        "bare products, s": f"{product:.1f}",
        "bare assignments, s": f"{assignment:.1f}",
        "sweep ÷ bare": f"{ratio:.2f}",
    }
    text = (
        f"`python benchmarks/matching_speed.py`, medians of {options.rounds}, in turns, {torch.get_num_threads()} "
        f"threads; a sweep over all axes of two Llama-shaped bfloat16 models, norms and objectives included.\n\n"
        f"{markdown([row])}"
    )
    print(row)
    if options.widths:
        points = {}
        for width in options.widths:
            models = pair_of_width(width)
            repeats = options.rounds if width <= 2048 else 1
            points[width] = statistics.median(timed_sweep(models) for _ in range(repeats))
            print(width, f"{points[width]:.2f}", flush=True)
        # The small ones tell of fixed costs: the exponent is that of the upper half.
        upper = list(points.items())[len(points) // 2 :]
        (low, first), (high, last) = upper[0], upper[-1]
        exponent = math.log(last / first) / math.log(high / low) if high > low else float("nan")
        path = plot(points, exponent)
        table = markdown([{str(width): f"{seconds:.2f}" for width, seconds in points.items()}])
        text += (
            f"\n\nSeconds of a sweep against the width, one layer, hidden and intermediate alike ({path.name}); from "
            f"{low} to {high} they grow with the power {exponent:.2f}: 3 is that of the products.\n\n{table}"
        )
    replace_section("matching_speed", text)


if __name__ == "__main__":
    main()
