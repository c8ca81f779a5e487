"""What every merge method costs: the whole command beside mergekit's; spectral methods beside their decompositions.

    python benchmarks/merge_methods.py FOLDER --mergekit ~/mergekit/bin/mergekit-yaml [--size 1.1B] [--repeats 3]
    python benchmarks/merge_methods.py FOLDER --spectral [--size 1.1B --layers 2]

FOLDER takes a base, two models moved from it (6.6 GB at 1.1 B parameters) and the results. How time, processor time and
memory are measured, and how to get mergekit, is said in `merge_speed.py`. Methods and programs run in turns; a run that
was stopped goes on with its next command (FOLDER/methods.json, to be removed before a new one).

No program has the spectral methods, so each stands beside the decompositions that it cannot do without, timed alone on
matrices of the same sizes with one thread: eigenvectors of a product of every matrix with itself, or its Cholesky
factor, in float64, and the products themselves.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Trial:
    """A merge that both programs can do.

    Attributes:
        method: Value of `merge_method`.
        models: How many models are merged, the base not counted.
        base: Whether there is a base.
        of_models: Parameters that every model has, with one value for all.
        of_merge: Parameters of the whole merge.
    """

    method: str
    models: int
    base: bool
    of_models: dict[str, Any] = field(default_factory=dict)
    of_merge: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The method, with what makes it another case of it."""
        told = {"filter_wise", "select_topk", "nuslerp_flatten", "nuslerp_row_wise"}
        return " ".join([self.method, *(key for key in self.of_merge if key in told)])


_WEIGHT, _THINNED = {"weight": 0.5}, {"weight": 0.5, "density": 0.5}
TRIALS = (
    Trial("linear", 2, False, _WEIGHT),
    Trial("task_arithmetic", 2, True, _WEIGHT),
    Trial("passthrough", 1, False, {"scale": 0.5}),
    Trial("nearswap", 1, True, of_merge={"t": 0.001}),
    Trial("ram", 2, True),
    Trial("slerp", 1, True, of_merge={"t": 0.3}),
    Trial("nuslerp", 2, False, _WEIGHT),
    Trial("nuslerp", 2, False, _WEIGHT, {"nuslerp_flatten": False}),
    Trial("nuslerp", 2, False, _WEIGHT, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    Trial("multislerp", 2, False, _WEIGHT),
    Trial("karcher", 2, False),
    Trial("model_stock", 2, True),
    Trial("model_stock", 2, True, of_merge={"filter_wise": True}),
    Trial("ramplus_tl", 2, True),
    Trial("sce", 2, True),
    Trial("sce", 2, True, of_merge={"select_topk": 0.5}),
    Trial("ties", 2, True, _THINNED),
    Trial("dare_ties", 2, True, _THINNED),
    Trial("dare_linear", 2, True, _THINNED),
    Trial("breadcrumbs", 2, True, _THINNED),
    Trial("breadcrumbs_ties", 2, True, _THINNED),
    Trial("della", 2, True, _THINNED),
    Trial("della_linear", 2, True, _THINNED),
    Trial("arcee_fusion", 1, True),
)
SPECTRAL = tuple(Trial(method, 2, True) for method in ("tsv_m", "iso_c", "iso_cts", "wudi", "ace"))


def main() -> None:
    """Runs the commands in turns and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mergekit", type=Path, help="the executable mergekit-yaml")
    parser.add_argument("--size", default="1.1B", help="one of benchmarks/llama_pair.py")
    parser.add_argument("--layers", type=int, help="fewer than the size has")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--spectral", action="store_true", help="the methods that no other program has")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/results")
    parser.add_argument("--bare", nargs=2, metavar=("METHOD", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        print(json.dumps(bare(*options.bare)))
        return
    from benchmarks.llama_pair import make_models
    from benchmarks.results import require_sections

    require_sections(section_of(options))
    models = make_models(options.folder, options.size, 2, options.layers)
    trials = [
        trial
        for trial in (SPECTRAL if options.spectral else TRIALS)
        if not options.methods or trial.method in options.methods
    ]
    rounds = in_turns(options, trials, models)
    if options.spectral:
        rounds |= {"floor": in_turns(options, [TRIALS[0]], models)[f"ours {TRIALS[0].name}"]}
    text = spectral_table(trials, rounds, models) if options.spectral else table(trials, rounds)
    print(text)
    if options.write:
        write(options, text)


def in_turns(options: argparse.Namespace, trials: list[Trial], models: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """Runs every command as often as asked, and keeps what each took."""
    kept = options.folder / ("spectral.json" if options.spectral else "methods.json")
    rounds: dict[str, list[dict[str, Any]]] = json.loads(kept.read_text()) if kept.exists() else {}
    for number in range(options.repeats):
        for trial in trials:
            for program, words in commands(options, trial, models).items():
                done = rounds.setdefault(f"{program} {trial.name}", [])
                if len(done) <= number:
                    alone = program == "bare"
                    done.append(run_alone(words) if alone else run_once(words, options.folder / f"out-{program}"))
                    kept.write_text(json.dumps(rounds))
    return rounds


def commands(options: argparse.Namespace, trial: Trial, models: list[Path]) -> dict[str, list[str]]:
    """Program → the words that start it."""
    base, *others = models
    merged = others[: trial.models] if trial.base else models[: trial.models]
    found = {"ours": our_words(trial, merged, base, options.folder / "out-ours")}
    if options.spectral and trial in SPECTRAL:
        found["bare"] = [sys.executable, __file__, ".", "--bare", trial.method, str(base)]
    elif options.mergekit is not None and not options.spectral:
        recipe = options.folder / f"{trial.name.replace(' ', '-')}.yaml"
        recipe.write_text(json.dumps(their_recipe(trial, merged, base)))
        found["mergekit"] = [str(options.mergekit), str(recipe), str(options.folder / "out-mergekit"), "--quiet"]
    return found


def our_words(trial: Trial, merged: list[Path], base: Path, out: Path) -> list[str]:
    """The command of ours."""
    words = [sys.executable, "-m", "hf_llfc", "merge", *map(str, merged), "--align", "none", "--out", str(out)]
    words += ["--merge-method", trial.method]
    if trial.base:
        words += ["--base-model", str(base)]
    values = dict(trial.of_merge)
    for key, value in trial.of_models.items():
        if key == "weight":
            words += ["--weights", *[str(value)] * trial.models]
        else:
            values[key] = value
    for key, value in values.items():
        words += ["--parameter", f"{key}={json.dumps(value)}"]
    return words


def their_recipe(trial: Trial, merged: list[Path], base: Path) -> dict[str, Any]:
    """The same as a configuration of mergekit; JSON is YAML."""
    return {
        "merge_method": trial.method,
        "models": [{"model": str(model), "parameters": trial.of_models} for model in merged],
        **({"base_model": str(base)} if trial.base else {}),
        "parameters": trial.of_merge,
        "dtype": "bfloat16",
    }


def run_alone(words: list[str]) -> dict[str, Any]:
    """Runs this file for the decompositions of a method."""
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    return json.loads(done.stdout.splitlines()[-1])


def run_once(words: list[str], out: Path) -> dict[str, Any]:
    """Runs a command to its end, and removes what it wrote."""
    from benchmarks.merge_speed import run

    shutil.rmtree(out, ignore_errors=True)
    took = {**run(words), "load": os.getloadavg()[0]}
    shutil.rmtree(out, ignore_errors=True)
    print(f"{took['wall']:7.1f} s {took['cpu']:7.1f} s {took['memory'] / 2**30:6.2f} GiB  {' '.join(words[-12:])}")
    return took


def middle(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def table(trials: list[Trial], rounds: dict[str, list[dict[str, Any]]]) -> str:
    """A row a method, with ratios to mergekit where it ran too, and how many processes wanted to run meanwhile."""
    from benchmarks.results import markdown

    rows = []
    for trial in trials:
        ours = middle(rounds[f"ours {trial.name}"])
        row = {
            "method": trial.name,
            "wall, s": f"{ours['wall']:.1f}",
            "CPU, s": f"{ours['cpu']:.1f}",
            "memory, GiB": f"{ours['memory'] / 2**30:.2f}",
        }
        if f"mergekit {trial.name}" in rounds:
            theirs = middle(rounds[f"mergekit {trial.name}"])
            row |= {
                "mergekit: wall, s": f"{theirs['wall']:.1f}",
                "CPU, s ": f"{theirs['cpu']:.1f}",
                "memory, GiB ": f"{theirs['memory'] / 2**30:.2f}",
                "ours ÷ mergekit: wall": f"{ours['wall'] / theirs['wall']:.2f}",
                "CPU": f"{ours['cpu'] / theirs['cpu']:.2f}",
                "memory": f"{ours['memory'] / theirs['memory']:.3f}",
                "load": f"{ours['load']:.0f} / {theirs['load']:.0f}",
            }
        rows.append(row)
    return markdown(rows)


def bare(method: str, model: str) -> dict[str, float]:
    """Seconds of processor time of the decompositions alone; see the top of this file."""
    import torch

    from hf_llfc.checkpoints import open_checkpoint

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    taken: dict[tuple[int, ...], float] = {}
    total = 0.0
    for info in open_checkpoint(model).tensors.values():
        if len(info.shape) < 2:
            continue
        if info.shape not in taken:
            matrix_oi = torch.randn(info.shape, generator=generator, dtype=torch.float64)
            start = time.process_time()
            decompose(method, matrix_oi if info.shape[0] <= info.shape[1] else matrix_oi.T)
            taken[info.shape] = time.process_time() - start
        total += taken[info.shape]
    return {"seconds": total}


def decompose(method: str, short_si: Any) -> None:
    """What a method cannot do without for one matrix of two models, whose smaller side comes first."""
    import torch

    side = len(short_si)
    tasks = 2
    if method in ("wudi", "ace"):
        for _ in range(tasks):
            gram_ss = short_si @ short_si.T
            gram_ss @ short_si
        factor_ss = torch.linalg.cholesky(gram_ss)
        torch.cholesky_solve(short_si, factor_ss)
        return
    if method == "iso_c":
        _, vectors_ss = torch.linalg.eigh(short_si @ short_si.T)
        (vectors_ss @ vectors_ss.T) @ short_si
        return
    # Triples of every task, or of the sum and of every task; then both sides of all triples are made orthogonal.
    for _ in range(tasks + (method == "iso_cts")):
        _, vectors_ss = torch.linalg.eigh(short_si @ short_si.T)
        vectors_ss[:, : side // tasks].T @ short_si
    for _ in range(2):
        torch.linalg.eigh(short_si @ short_si.T)
    vectors_ss @ (vectors_ss @ short_si)


def spectral_table(trials: list[Trial], rounds: dict[str, list[dict[str, Any]]], models: list[Path]) -> str:
    """A row a method, with its ratio to the bare decompositions, and memory in largest tensors."""
    from benchmarks.results import markdown
    from hf_llfc.checkpoints import open_checkpoint

    largest = max(info.elements for info in open_checkpoint(str(models[0])).tensors.values()) * 4
    rows = []
    floor = middle(rounds["floor"])
    for trial in trials:
        ours, alone = middle(rounds[f"ours {trial.name}"]), middle(rounds[f"bare {trial.name}"])
        rows.append(
            {
                "method": trial.name,
                "wall, s": f"{ours['wall']:.1f}",
                "CPU, s": f"{ours['cpu']:.1f}",
                "bare decompositions, CPU, s": f"{alone['seconds']:.1f}",
                "ours ÷ bare": f"{(ours['cpu'] - floor['cpu']) / alone['seconds']:.2f}",
                "memory, GiB": f"{ours['memory'] / 2**30:.2f}",
                "largest tensors": f"{(ours['memory'] - floor['memory']) / largest:.1f}",
            }
        )
    return markdown(rows) + (
        f"\n\n{floor['cpu']:.1f} s of CPU and {floor['memory'] / 2**30:.2f} GiB, what a linear merge takes of the same "
        "models, are taken off for ratio and memory. The largest tensor, told as in float32, has "
        f"{largest / 2**20:.0f} MiB."
    )


def write(options: argparse.Namespace, text: str) -> None:
    """Puts the table into its section."""
    from benchmarks.results import replace_section

    name = section_of(options)
    words = f"--spectral --size {options.size}" if options.spectral else f"--mergekit … --size {options.size}"
    layers = "" if options.layers is None else f" --layers {options.layers}"
    layers += "" if options.methods is None else f" --methods {' '.join(options.methods)}"
    command = f"python benchmarks/merge_methods.py FOLDER {words}{layers} --repeats {options.repeats} --write"
    runs = "each once" if options.repeats == 1 else f"in turns, medians of {options.repeats}"
    replace_section(
        name,
        f"`{command}`: a Llama-shaped base and two models moved from it, bfloat16; {runs}; {os.cpu_count()} cores, "
        "files in the page cache. Where there is a load, the mean number of processes that wanted to run as ours and "
        f"mergekit began, it is CPU that compares, not wall.\n\n{text}",
    )


def section_of(options: argparse.Namespace) -> str:
    """The section that takes the table."""
    return "merge_methods_spectral" if options.spectral else "merge_methods"


if __name__ == "__main__":
    main()
