"""What merging costs: the whole command beside mergekit's, and the streaming part beside plain reads and writes.

    python benchmarks/merge_speed.py FOLDER --mergekit ~/mergekit/bin/mergekit-yaml [--repeats 5]
    python benchmarks/merge_speed.py FOLDER --sizes [--repeats 3]

FOLDER takes the models (4.4 GB for a pair of 1.1 B parameters; 23 GB for all sizes) and the results. mergekit 0.1.5
lives in an environment of its own: `python -m venv ~/mergekit; ~/mergekit/bin/pip install torch mergekit==0.1.5`.

Everything is run in turns, each in a process of its own; a run that was stopped goes on with its next turn
(FOLDER/rounds.json, to be removed before a new one). Time and CPU are those of the command with all processes that
it starts, from `wait4`. Memory is the peak of what its processes hold together (proportional set size, looked at ten
times a second), or of the largest of them alone (`wait4`) where that is more. The streaming part alone is timed inside
a process, like the reads and writes beside it. Programs may keep their compiled bytecode, as installed ones do.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WEIGHTS = (0.3, 0.7)
AT_ONCE = 1 << 20


def main() -> None:
    """Runs the commands in turns, or the sizes, and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mergekit", type=Path, help="the executable mergekit-yaml")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", action="store_true", help="cost against size instead")
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "WAY"), help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.measure)))
    elif options.one:
        print(json.dumps(inside(options.folder, *options.one)))
    elif options.sizes:
        by_size(options)
    else:
        beside_mergekit(options)


def beside_mergekit(options: argparse.Namespace) -> None:
    """Whole commands and their parts on the pair of 1.1 B parameters."""
    from benchmarks.llama_pair import make_pair
    from benchmarks.results import markdown, replace_section

    pair = make_pair(options.folder, "1.1B")
    recipe = options.folder / "mergekit.yaml"
    models = "".join(
        f"  - model: {model}\n    parameters: {{weight: {weight}}}\n"
        for model, weight in zip(pair, WEIGHTS, strict=True)
    )
    recipe.write_text(f"models:\n{models}merge_method: linear\ndtype: bfloat16\n")
    theirs, ours = options.folder / "out-mergekit", options.folder / "out-ours"
    commands = {"hf-llfc merge": merge_words(pair, ours)}
    if options.mergekit is not None:
        commands["mergekit-yaml"] = [str(options.mergekit), str(recipe), str(theirs), "--quiet"]
    kept = options.folder / "rounds.json"
    rounds = json.loads(kept.read_text()) if kept.exists() else []
    while len(rounds) < options.repeats:
        found: dict[str, Any] = {"whole": {}, "parts": {}}
        for name, words in commands.items():
            shutil.rmtree(theirs if "mergekit" in name else ours, ignore_errors=True)
            found["whole"][name] = run(words)
        for way in ("floor", "plain", "aligned"):
            found["parts"][way] = run_inside(options.folder, "1.1B", way)
        rounds.append(found)
        kept.write_text(json.dumps(rounds))
        print(found, flush=True)
    whole = {name: [each["whole"][name] for each in rounds] for name in commands}
    parts = {way: [each["parts"][way] for each in rounds] for way in rounds[0]["parts"]}
    off = {"hf-llfc merge": elements_off(pair, ours)}
    if options.mergekit is not None:
        off["mergekit-yaml"] = elements_off(pair, theirs)
    middle = {name: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for name, runs in whole.items()}
    rows = [
        {
            "command": name,
            "wall, s": f"{each['wall']:.1f}",
            "CPU, s": f"{each['cpu']:.1f}",
            "peak memory, GiB": f"{each['memory'] / 2**30:.2f}",
            "elements off the correctly rounded": f"{off[name]:.1e}" if off[name] else "0",
        }
        for name, each in middle.items()
    ]
    text = markdown(rows)
    if options.mergekit is not None:
        ratios = {key: middle["hf-llfc merge"][key] / middle["mergekit-yaml"][key] for key in ("wall", "cpu", "memory")}
        text += (
            f"\n\nhf-llfc ÷ mergekit: {ratios['wall']:.2f} of the wall, {ratios['cpu']:.2f} of the CPU, "
            f"{ratios['memory']:.2f} of the memory."
        )
    seconds = {way: statistics.median(runs) for way, runs in parts.items()}
    text += (
        f"\n\nThe streaming part alone: {seconds['plain']:.1f} s, reading both and writing one plainly "
        f"{seconds['floor']:.1f} s ({seconds['plain'] / seconds['floor']:.2f} ×); with a random alignment of every "
        f"axis applied {seconds['aligned']:.1f} s ({seconds['aligned'] / seconds['plain']:.2f} × that without)."
    )
    replace_section(
        "merge_speed",
        f"`python benchmarks/merge_speed.py FOLDER --mergekit … --repeats {options.repeats}`: two Llama-shaped "
        f"checkpoints of 1.1 B parameters, bfloat16, weights {WEIGHTS[0]}/{WEIGHTS[1]}; in turns, medians; "
        f"{os.cpu_count()} cores, files in the page cache. Our command also waits until its output is on the disk.\n\n"
        + text,
    )
    print(text)


def by_size(options: argparse.Namespace) -> None:
    """Time and memory of the whole command against the number of parameters."""
    from benchmarks.llama_pair import SHAPES, make_pair
    from benchmarks.results import markdown, replace_section

    found: dict[str, list[dict[str, float]]] = {}
    for size in SHAPES:
        pair = make_pair(options.folder, size)
        for number in range(options.repeats + 1):
            out = options.folder / "out-ours"
            shutil.rmtree(out, ignore_errors=True)
            took = run(merge_words(pair, out))
            # Not the first: the kernel of a virtual machine may pay for memory that was never touched.
            if number:
                found.setdefault(size, []).append(took)
        shutil.rmtree(options.folder / "out-ours", ignore_errors=True)
        if size != "1.1B":
            shutil.rmtree(pair[0].parent)
    middle = {size: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for size, runs in found.items()}
    parameters = np.array([float(size.removesuffix("B")) for size in middle])
    cpu = np.array([each["cpu"] for each in middle.values()])
    law = power_law(parameters, cpu)
    rows = [
        {
            "parameters": size,
            "wall, s": f"{each['wall']:.1f}",
            "CPU, s": f"{each['cpu']:.1f}",
            "peak memory, GiB": f"{each['memory'] / 2**30:.3f}",
        }
        for size, each in middle.items()
    ]
    memory = [each["memory"] for each in middle.values()]
    text = markdown(rows) + (
        f"\n\nCPU seconds = {in_words(law)}, n in 10⁹ parameters, fitted by relative errors. Memory varies by "
        f"{100 * (max(memory) / min(memory) - 1):.0f} % over all sizes."
    )
    picture = plot(parameters, cpu, np.array([each["wall"] for each in middle.values()]), law)
    replace_section(
        "merge_sizes",
        f"`python benchmarks/merge_speed.py FOLDER --sizes --repeats {options.repeats}`, medians, `hf-llfc merge`, "
        "after a run that is not counted; "
        f"plot in `benchmarks/{picture.name}`.\n\n{text}",
    )
    print(text)


def power_law(parameters: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """c, k and p of seconds = c + k·nᵖ."""
    from scipy.optimize import curve_fit

    start = (seconds.min(), seconds.max() / parameters.max(), 1.0)
    return curve_fit(lambda n, c, k, p: c + k * n**p, parameters, seconds, p0=start, sigma=seconds, maxfev=20000)[0]


def in_words(law: np.ndarray) -> str:
    """A law with its numbers."""
    return "{:.1f} + {:.1f} n^{:.2f}".format(*law)


def plot(parameters: np.ndarray, cpu: np.ndarray, wall: np.ndarray, law: np.ndarray) -> Path:
    """Seconds against parameters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from benchmarks.results import RESULTS

    figure, axes = pyplot.subplots(figsize=(5, 3.5))
    axes.plot(parameters, cpu, "o", label="CPU")
    axes.plot(parameters, wall, "s", label="wall")
    many = np.linspace(0, parameters.max(), 100)
    axes.plot(many, law[0] + law[1] * many ** law[2], "-", label=f"{in_words(law)} s")
    axes.set_xlabel("10⁹ parameters a model")
    axes.set_ylabel("seconds to merge two")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    path = RESULTS.parent / "merge_sizes.png"
    figure.savefig(path, dpi=120)
    return path


def merge_words(pair: tuple[Path, Path], out: Path) -> list[str]:
    """The command of ours."""
    words = [sys.executable, "-m", "hf_llfc", "merge", *map(str, pair), "--weights", *map(str, WEIGHTS)]
    return [*words, "--align", "none", "--out", str(out)]


def run(words: list[str]) -> dict[str, float]:
    """Runs a command to its end, and says what it took.

    A small process of its own starts it: what Linux tells of a command's peak counts what its parent held.
    """
    done = subprocess.run(
        [sys.executable, __file__, ".", "--measure", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def measured(words: list[str]) -> dict[str, float]:
    """Runs a command to its end, with nothing of earlier ones left to be written to the disk."""
    os.sync()
    ended = threading.Event()
    peak = 0

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.1):
            peak = max(peak, sum(held_by(pid) for pid in with_descendants(child.pid)))

    start = time.perf_counter()
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    watching = threading.Thread(target=watch)
    watching.start()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    ended.set()
    watching.join()
    if status:
        raise SystemExit(f"{' '.join(words)} failed")
    memory = max(peak, usage.ru_maxrss * 1024)
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "memory": memory}


def with_descendants(pid: int) -> list[int]:
    """A process and all that it has started, and they."""
    found = [pid]
    for parent in found:
        with suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def held_by(pid: int) -> int:
    """Bytes of memory that a process holds, of shared ones its part; 0 if it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def environment() -> dict[str, str]:
    """The environment, with this tree to be imported."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": str(ROOT)}


def run_inside(folder: Path, size: str, way: str) -> float:
    """One timing in a fresh process."""
    words = [sys.executable, __file__, str(folder), "--one", size, way]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment())
    return float(json.loads(done.stdout.splitlines()[-1]))


def inside(folder: Path, size: str, way: str) -> float:
    """Seconds of one way of making the weights of the child."""
    import torch

    from benchmarks.llama_pair import make_pair
    from hf_llfc.checkpoints.writing.shards import ShardFiles, ShardLayout
    from hf_llfc.merging import Merge, WeightSchedule, merge_streamed
    from hf_llfc.parallel.workers import Workers
    from hf_llfc.parents.parent import Parent
    from hf_llfc.parents.specs import open_weights, spec_of

    pair = make_pair(folder, size)
    os.sync()
    target = folder / "out-part"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    try:
        if way == "floor":
            start = time.perf_counter()
            plainly(pair, target / "child")
            return time.perf_counter() - start
        checkpoints = [open_weights(model) for model in pair]
        alignment = None
        if way == "aligned":
            alignment = spec_of(checkpoints[1]).random_alignment(torch.Generator().manual_seed(0))
        parents = [Parent(checkpoints[0]), Parent(checkpoints[1], alignment)]
        schedules = [WeightSchedule.constant(weight) for weight in WEIGHTS]
        infos = checkpoints[0].tensors
        merge = Merge.plan([parent.source for parent in parents], infos, schedules)
        start = time.perf_counter()
        with ShardFiles(target, ShardLayout.of(infos)).create() as files:
            merge_streamed(merge, files, workers=Workers(torch.get_num_threads()))
        return time.perf_counter() - start
    finally:
        shutil.rmtree(target)


def plainly(pair: tuple[Path, Path], target: Path) -> None:
    """Reads both files and writes one of their size."""
    room = memoryview(bytearray(AT_ONCE))
    with target.open("wb", buffering=0) as out:
        for model in pair:
            with (model / "model.safetensors").open("rb", buffering=0) as file:
                while count := file.readinto(room):
                    if model is pair[1]:
                        out.write(room[:count])


def elements_off(pair: tuple[Path, Path], merged: Path) -> float:
    """The share of elements that are not the float64 sum rounded once."""
    import torch

    from hf_llfc.checkpoints import open_checkpoint

    a, b, child = (open_checkpoint(model) for model in (*pair, merged))
    wrong = total = 0
    for name in child.tensors:
        x, y, found = (each.read(name).reshape(-1) for each in (a, b, child))
        for start in range(0, len(x), 1 << 22):
            part = slice(start, start + (1 << 22))
            exact = (WEIGHTS[0] * x[part].double() + WEIGHTS[1] * y[part].double()).numpy()
            wrong += int((rounded(exact) != found[part].view(torch.int16).numpy().view(np.uint16)).sum())
            total += len(exact)
    return wrong / total


def rounded(exact: np.ndarray) -> np.ndarray:
    """The bits of the bfloat16 numbers nearest to float64 numbers, ties to even, found with the two on either side."""
    below = (exact.astype(np.float32).view(np.uint32) & 0xFFFF0000).astype(np.uint32)
    # float32 may have rounded away from zero onto a bfloat16 number that lies beyond.
    beyond = np.abs(below.view(np.float32).astype(np.float64)) > np.abs(exact)
    below = np.where(beyond, below - np.uint32(0x10000), below).astype(np.uint32)
    above = (below + np.uint32(0x10000)).astype(np.uint32)
    to_below = np.abs(exact - below.view(np.float32).astype(np.float64))
    to_above = np.abs(above.view(np.float32).astype(np.float64) - exact)
    is_odd = (below >> 16) & 1
    up = (to_above < to_below) | ((to_above == to_below) & (is_odd == 1))
    return (np.where(up, above, below) >> 16).astype(np.uint16)


if __name__ == "__main__":
    main()
