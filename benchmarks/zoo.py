"""How many model types of transformers can be built tiny and run, and why the others cannot.

    python benchmarks/zoo.py [TYPE ...] [--check MODULE:FUNCTION] [--workers 2] [--out zoo.jsonl] [--page FILE.md]

Every type is built from its shrunken default config in a worker process, in float64 with random weights, and run once.
A type that crashes its worker, takes too long or too much memory costs that worker alone. `--check` names a function
that gets the model type, the model and its inputs, and returns what is wrong, facts for the row, or None.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SECONDS = 60
MEMORY = 8 * 2**30

# What becomes of a model type, from the furthest to the nearest failure.
STAGES = ("config", "class", "shrink", "build", "inputs", "forward", "finite", "check", "done")


def examine(model_type: str, check: str | None) -> dict[str, Any]:
    """One row of the table: how far a model type gets, and what stopped it."""
    import torch

    from tests import zoo
    from tests.zoo_table import reason_not_to_run

    torch.set_num_threads(1)
    result = zoo.zoo_result(model_type, dtype=torch.float64)
    row: dict[str, Any] = {"type": model_type, "stage": result.stage, "reason": result.reason}
    if result.model is None:
        return row
    row |= {"class": type(result.model).__name__, "parameters": sum(p.numel() for p in result.model.parameters())}
    if result.inputs is None:
        return row
    row["inputs"] = {name: list(value.shape) for name, value in result.inputs.items()}
    reason = reason_not_to_run(result.model, result.inputs)
    if reason is not None:
        return row | {"stage": "finite" if reason.startswith("no finite") else "forward", "reason": reason}
    if check is not None:
        module, _, function = check.partition(":")
        try:
            problem = getattr(import_module(module), function)(model_type, result.model, result.inputs)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if isinstance(problem, dict):
            row |= problem
        elif problem is not None:
            return row | {"stage": "check", "reason": str(problem)}
    return row | {"stage": "done", "reason": None}


def _serve(pipe: Connection, check: str | None) -> None:
    warnings.filterwarnings("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    import transformers

    import tests.zoo  # noqa: F401

    transformers.logging.set_verbosity_error()
    pipe.send(None)
    while True:
        model_type = pipe.recv()
        if model_type is None:
            return
        start = time.perf_counter()
        try:
            row = examine(model_type, check)
        except BaseException as error:
            row = {"type": model_type, "stage": "build", "reason": f"{type(error).__name__}: {error}"}
        pipe.send(row | {"seconds": round(time.perf_counter() - start, 2)})


class _Worker:
    def __init__(self, check: str | None):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, check), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()  # it is ready, so that its start does not count against the first type
        self.task: str | None = None
        self.since = 0.0

    def give(self, model_type: str) -> None:
        self.pipe.send(model_type)
        self.task, self.since = model_type, time.perf_counter()

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def rows(model_types: list[str], *, check: str | None = None, workers: int = 2) -> Iterator[dict[str, Any]]:
    """The rows of many model types, each isolated from the others."""
    todo = deque(model_types)
    pool = [_Worker(check) for _ in range(min(workers, len(todo)))]
    while todo or any(worker.task for worker in pool):
        for place, worker in enumerate(pool):
            if worker.task is None and todo:
                worker.give(todo.popleft())
            spent = time.perf_counter() - worker.since
            if worker.task is not None and spent > SECONDS:
                yield {"type": worker.task, "stage": "forward", "reason": f"more than {SECONDS} s", "seconds": spent}
                worker.end()
                pool[place] = _Worker(check)
        ready = wait([worker.pipe for worker in pool if worker.task is not None], timeout=1)
        for place, worker in enumerate(pool):
            if worker.pipe not in ready:
                continue
            try:
                yield worker.pipe.recv()
                worker.task = None
            except EOFError:
                worker.process.join()
                reason = f"the worker ended with exit code {worker.process.exitcode}"
                yield {"type": worker.task, "stage": "forward", "reason": reason, "seconds": 0.0}
                pool[place] = _Worker(check)
    for worker in pool:
        worker.end()


def _gist(reason: str) -> str:
    """Failures of one kind under one line: what is in quotes and numbers differ from type to type."""
    needs = re.search(r"requires the (\S+) library", reason)
    if needs:
        return f"needs the package {needs[1]}"
    if "no modelling class" in reason:
        return "no modelling class in transformers"
    line = reason.replace("\n", " ").split("small sizes: ")[-1].split("  widths")[0]
    line = re.sub(r"model type '[^']*': ", "", line)
    return re.sub(r"\d+", "#", line)[:110]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("types", nargs="*", help="model types; all registered ones by default")
    parser.add_argument("--check", metavar="MODULE:FUNCTION", help="a check of every model that runs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write one JSON object a model type")
    parser.add_argument(
        "--page", type=Path, help="write the page of model types (with --check tests.zoo_table:examine)"
    )
    options = parser.parse_args()

    from tests.zoo import zoo_types

    table = []
    for row in rows(options.types or zoo_types(), check=options.check, workers=options.workers):
        table.append(row)
        print(f"\r{len(table)} {row['type']}\033[K", end="", file=sys.stderr)
    print(file=sys.stderr)
    if options.out:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in sorted(table, key=lambda row: row["type"])))
    if options.page:
        from tests.zoo_page import page

        options.page.write_text(page(table))
    reached = Counter(STAGES.index(row["stage"]) for row in table)
    counts = {
        "registered": 0,
        "with a default config": STAGES.index("class"),
        "with a modelling class": STAGES.index("shrink"),
        "built under 5 M parameters": STAGES.index("inputs"),
        "inputs made": STAGES.index("forward"),
        "forward pass runs in float64": STAGES.index("finite"),
        "finite": STAGES.index("check"),
        "checked" if options.check else "done": STAGES.index("done"),
    }
    for label, least in counts.items():
        print(f"{sum(count for stage, count in reached.items() if stage >= least):5} {label}")
    print()
    groups: dict[tuple[str, str], list[str]] = {}
    for row in table:
        if row["stage"] != "done":
            groups.setdefault((row["stage"], _gist(row["reason"])), []).append(row["type"])
    for (stage, reason), types in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        print(f"{len(types):4} {stage:8} {reason}  [{', '.join(sorted(types))}]")


if __name__ == "__main__":
    main()
