"""Exact assignment against SciPy, lapx and OR-tools, by size and kind of matrix.

    pip install lapx ortools        # the peers that are not installed are left out
    python benchmarks/assignment.py [--sizes 768 3072 4096 8192] [--rounds 5] [--limit 60]

Gains are float32, as matching makes them at these widths, and converted for a peer that wants something else before its
clock starts. Kinds: a planted permutation under noise; a product of two Gaussian matrices; a product of two whose
directions decay as 1/k, the hardest. Solvers take turns; a solver that took longer than the limit at a smaller size of
the kind is left out at larger ones. Writes the section of this name of
results/matching.md, where rows of kinds and sizes that were not asked for stay.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.results import markdown, replace_section, table_of
from hf_llfc.alignment.assignment.assignment import assign, assign_with_gap

KINDS = ("planted", "product", "decaying")
OURS, NEAR = "ours, exact", "ours, solver: auction"
SMALL, OFTENER = 1024, 5
"""Up to this size, where a solver takes milliseconds, there are so many times more rounds."""

OR_TOOLS_SCALE = 10_000
"""OR-tools takes whole numbers: gains are rounded to this part of their standard deviation."""

Solver = Callable[[], object]


def gains(kind: str, size: int, generator: torch.Generator) -> Tensor:
    """A matrix of a kind, float32."""
    noise, other = (torch.randn(size, size, generator=generator) for _ in range(2))
    if kind == "planted":
        noise[torch.arange(size), torch.randperm(size, generator=generator)] += 6
        return noise
    if kind == "product":
        return noise @ other / size**0.5
    return (noise / torch.arange(1, size + 1)) @ other


def prepared(name: str, gain: Tensor) -> Solver:
    """A solver with the matrix as it wants it; it returns the columns, OR-tools the cost."""
    if name == OURS:
        return lambda: assign(gain)
    if name == NEAR:
        return lambda: assign_with_gap(gain, solver="auction")[0]
    if name == "SciPy":
        double = gain.double().numpy()
        return lambda: linear_sum_assignment(double, maximize=True)[1]
    if name == "lapx lapjvs":
        import lap

        cost = -gain.numpy()
        return lambda: lap.lapjvs(cost, return_cost=False)[1]
    return or_tools(gain)


def or_tools(gain: Tensor) -> Solver:
    """The cost-scaling flow of OR-tools; building its graph counts."""
    from ortools.graph.python.linear_sum_assignment import SimpleLinearSumAssignment

    size = gain.shape[0]
    cost = (-gain * (OR_TOOLS_SCALE / gain.std())).round().long().numpy().ravel()
    rows, columns = (axis.ravel() for axis in np.indices((size, size), dtype=np.int32))

    def solve() -> Tensor:
        problem = SimpleLinearSumAssignment()
        problem.add_arcs_with_cost(rows, columns, cost)
        assert problem.solve() == problem.OPTIMAL
        return torch.tensor([problem.right_mate(row) for row in range(size)])

    return solve


def peers() -> list[str]:
    """The solvers that are there."""
    modules = {"SciPy": "scipy", "lapx lapjvs": "lap", "OR-tools": "ortools"}
    return [name for name, module in modules.items() if importlib.util.find_spec(module)]


def main() -> None:
    """Runs all, writes the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[768, 3072, 4096, 8192])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds")
    options = parser.parse_args()
    solvers = [OURS, NEAR, *peers()]
    rows = {(row["kind"], int(row["n"])): row for row in table_of("assignment")}
    for kind in options.kinds:
        too_slow: set[str] = set()
        for size in options.sizes:
            gain = gains(kind, size, torch.Generator().manual_seed(size))
            seconds: dict[str, list[float]] = {}
            values: dict[str, float] = {}
            for number in range(options.rounds * (OFTENER if size <= SMALL else 1)):
                first = number % len(solvers)  # none is always the one that finds the caches of another
                for name in solvers[first:] + solvers[:first]:
                    # What takes long is not repeated: its spread does not matter.
                    if name in too_slow or (number and min(seconds[name]) > options.limit / 10):
                        continue
                    solve = prepared(name, gain)
                    start = time.perf_counter()
                    columns = solve()
                    seconds.setdefault(name, []).append(time.perf_counter() - start)
                    perm = torch.as_tensor(np.asarray(columns)).long()
                    values[name] = float(gain.double()[torch.arange(size), perm].sum())
            medians = {name: statistics.median(each) for name, each in seconds.items()}
            too_slow |= {name for name, each in medians.items() if each > options.limit / 4}
            best = min(each for name, each in medians.items() if name not in (OURS, NEAR))
            optimum = max(values.values())
            row = {"kind": kind, "n": size}
            row |= {name: f"{medians[name]:.3f}" if name in medians else "–" for name in solvers}
            row |= {
                "exact ÷ best peer": f"{medians[OURS] / best:.2f}",
                "exact, below the best value": f"{(optimum - values[OURS]) / optimum:.1e}",
                "auction, below it": f"{(optimum - values[NEAR]) / optimum:.1e}",
            }
            rows[kind, size] = row
            print(row, flush=True)
    replace_section(
        "assignment",
        f"`python benchmarks/assignment.py`, seconds, medians of up to {options.rounds} (n up to {SMALL}: "
        f"{OFTENER * options.rounds}), solvers in turns, {torch.get_num_threads()} threads of torch; float32 gains.\n\n"
        + markdown([rows[key] for key in sorted(rows, key=lambda key: (KINDS.index(key[0]), key[1]))]),
    )


if __name__ == "__main__":
    main()
