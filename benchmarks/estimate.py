"""What pairs of 7 B, 70 B and 405 B parameters need, on paper, from costs measured on this machine.

    python benchmarks/estimate.py [--folder DIR]

Counts come from the shapes alone: bytes, operations of one sweep of weight matching over every axis, assignments by
size. Costs are measured: seconds a byte of a whole merge (of a small pair, its files in the page cache), seconds an
operation of a float32 product, seconds of an exact assignment of the hardest kind at three sizes, with the exponent
fitted. Machines other than this one are assumptions, which the section states. Writes the section of this name of
results/merging.md.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hf_llfc
from benchmarks.assignment import gains
from benchmarks.llama_pair import make_pair
from benchmarks.results import markdown, replace_section
from hf_llfc.adapters import spec_for
from hf_llfc.alignment import Parameters
from hf_llfc.alignment.assignment.assignment import assign
from hf_llfc.alignment.gains import Gains
from hf_llfc.alignment.groups import groups_of
from hf_llfc.checkpoints.names import Layout, find_model_class

SHAPES = {
    "7 B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "heads": (32, 32, 32000)},
    "70 B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "heads": (64, 8, 128256)},
    "405 B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "heads": (128, 8, 128256)},
}
"""Llama 2 7B, Llama 3.1 70B and 405B."""

BYTES = 2
"""Of a weight in bfloat16."""

LAPTOP_CORES = 8
LAPTOP_DISK = 3e9
ACCELERATOR_OPERATIONS = 0.6 * 67e12
ACCELERATOR_DISK = 6e9
ACCELERATOR_CORES = 16
"""Bytes a second of the disks; operations a second in float32 at six tenths of what an H200 does without TF32."""

SIZES = (1024, 2048, 4096)
REPEATS = 3
TOKENS, POINTS = 64 * 512, 13
"""Of a diagnosis: 64 texts, eleven points between the parents and these."""


def main() -> None:
    """Measures, computes and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where the small pair is made; a temporary folder if left out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        per_byte = merge_cost(Path(options.folder or temporary))
    per_operation = operation_cost()
    times = {size: assignment_seconds(size) for size in SIZES}
    exponent, at_one = fitted(times)
    rows = [row(name, per_byte, per_operation, exponent, at_one) for name in SHAPES]
    measured = "; ".join(f"{size}: {seconds:.2f} s" for size, seconds in times.items())
    replace_section(
        "estimate",
        "`python benchmarks/estimate.py`. Measured here on one thread: a merge takes "
        f"{1e9 * per_byte:.2f} s a GB read and written, hashing of the inputs included; a float32 product "
        f"{per_operation * 1e12:.1f} s per 10¹² operations; exact assignments of the hardest kind {measured}, "
        f"growing as n^{exponent:.2f}. Everything below follows from these and from shapes. *Laptop*: "
        f"{LAPTOP_CORES} such cores and a disk of {LAPTOP_DISK / 1e9:.0f} GB/s. *Accelerator*: products at "
        f"{ACCELERATOR_OPERATIONS / 1e12:.0f}·10¹² operations a second (0.6 of an H200 in float32), "
        f"{ACCELERATOR_CORES} such cores for assignments and sums, a disk of {ACCELERATOR_DISK / 1e9:.0f} GB/s. One "
        "sweep over every axis; two to four are usual. Assignments are upper bounds: of fine-tunes of one base nearly "
        f"all are read off the rows' largest entries. A diagnosis is 2·parameters·tokens·{POINTS} operations on "
        f"{TOKENS} tokens.\n\n{markdown(rows)}",
    )
    print(markdown(rows))


def merge_cost(folder: Path) -> float:
    """Seconds of a whole merge for each byte read or written, on one thread."""
    pair = make_pair(folder, "0.1B")
    size = sum(path.stat().st_size for each in pair for path in each.glob("*.safetensors"))
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        hf_llfc.merge(pair, [0.3, 0.7], out=folder / "merged", overwrite=True)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) / (1.5 * size)


def operation_cost() -> float:
    """Seconds of one addition or multiplication in a float32 product, on one thread."""
    factor = torch.rand(2048, 2048)
    return median_seconds(lambda: factor @ factor) / (2 * 2048**3)


def assignment_seconds(size: int) -> float:
    """Seconds of an exact assignment whose gains have a decaying spectrum, the hardest kind."""
    gain = gains("decaying", size, torch.Generator().manual_seed(size))
    return median_seconds(lambda: assign(gain))


def median_seconds(work) -> float:
    """Of a few repeats."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def fitted(times: dict[int, float]) -> tuple[float, float]:
    """Exponent and factor of the power law through the times, by least squares of logarithms."""
    logs = [(math.log(size), math.log(seconds)) for size, seconds in times.items()]
    slope, intercept = statistics.linear_regression(*zip(*logs, strict=True))
    return slope, math.exp(intercept)


def row(name: str, per_byte: float, per_operation: float, exponent: float, at_one: float) -> dict[str, str]:
    """What one pair needs."""
    parameters, widest, largest, operations, assigned = counts(name)
    moved = 3 * BYTES * parameters
    assigning = sum(at_one * size**exponent for size in assigned)
    longest = at_one * max(assigned) ** exponent
    arithmetic = moved * per_byte

    def matching(rate: float, cores: int) -> str:
        return duration(operations / rate + max(assigning / cores, longest))

    laptop = max(arithmetic / LAPTOP_CORES, moved / LAPTOP_DISK)
    other = max(arithmetic / ACCELERATOR_CORES, moved / ACCELERATOR_DISK)
    # A matrix of gains in float32, its parts, and what the assignment holds beside it; two tensors in float32.
    held = 4 * 4 * widest**2 + 2 * 4 * largest
    run = 2 * parameters * TOKENS * POINTS
    return {
        "pair of": name,
        "read + written, GB": f"{2 * BYTES * parameters / 1e9:.0f} + {BYTES * parameters / 1e9:.0f}",
        "merge: here / laptop / accelerator": f"{duration(arithmetic)} / {duration(laptop)} / {duration(other)}",
        "products of a sweep": f"{operations:.1e}",
        "widest axis": str(widest),
        "its assignment, exact": duration(longest),
        "matching: here / laptop / accelerator": " / ".join(
            (
                matching(1 / per_operation, 1),
                matching(LAPTOP_CORES / per_operation, LAPTOP_CORES),
                matching(ACCELERATOR_OPERATIONS, ACCELERATOR_CORES),
            )
        ),
        "matching, memory, GB": f"{held / 1e9:.1f}",
        "diagnosis: laptop / accelerator": (
            f"{duration(run * per_operation / LAPTOP_CORES)} / {duration(run / ACCELERATOR_OPERATIONS)}"
        ),
        "two models in memory, GB": f"{2 * BYTES * parameters / 1e9:.0f}",
    }


def counts(name: str) -> tuple[int, int, int, float, list[int]]:
    """Parameters, widest axis, elements of the largest tensor, operations of a sweep, sizes of its assignments."""
    shape = dict(SHAPES[name])
    heads, kv_heads, words = shape.pop("heads")
    config = LlamaConfig(**shape, num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=words)
    shapes = Layout(find_model_class("LlamaForCausalLM", config), config).shapes
    binding = spec_for(config).bind(shapes)
    model = Parameters(binding, lambda tensor: torch.empty(0))
    products, groups = Gains(model, model), groups_of(binding)
    elements = [math.prod(each) for each in shapes.values()]
    operations = sum(products.operations(group) for group in groups)
    sizes = [group.size for group in groups if group.moves]
    return sum(elements), max(sizes), max(elements), operations, sizes


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, two figures."""
    for unit, length in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2 * length or unit == "s":
            value = seconds / length
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
    raise AssertionError


if __name__ == "__main__":
    main()
