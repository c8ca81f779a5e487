"""How long the command line takes to start, beside a bare Python and beside `import torch`.

    python benchmarks/startup.py [--rounds 11]

Every command runs in a process of its own, the commands in turn, the console script as an installer writes it. The
checkpoints are tiny and made here, so that a command reads and computes little: what is left is what it loads. Beside
the wall time there is the processor's, which other processes of the machine disturb less. Writes the section
of this name of results/merging.md.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.results import markdown, replace_section

SCRIPT = "import sys\nfrom hf_llfc.cli import main\nsys.exit(main())\n"
"""What pip writes for `[project.scripts]`."""

CONFIGS = {"BERT": "BertConfig", "Llama": "LlamaConfig"}

BAR = 5
"""`--help` may take this many times a bare Python."""

BAR_OF_TORCH = 2
"""`inspect`, `check` of headers and a merge without alignment may take this many times `import torch`."""


def main() -> None:
    """Measures and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = commands_in(Path(folder))
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for turn in range(options.rounds + 1):
            for name, words in commands.items():
                seconds = wall_and_processor(words)
                if turn:  # the first turn writes byte code and fills the page cache
                    times[name].append(seconds)
    walls = {name: statistics.median(wall for wall, _ in each) for name, each in times.items()}
    medians = {name: statistics.median(processor for _, processor in each) for name, each in times.items()}
    bare, torch = medians["python -c pass"], medians["python -c 'import torch'"]
    rows = [
        {
            "command": f"`{name}`",
            "wall, ms": f"{1e3 * walls[name]:.0f}",
            "processor, ms": f"{1e3 * each:.0f}",
            "÷ bare Python": f"{each / bare:.1f}",
            "÷ import torch": f"{each / torch:.2f}",
        }
        for name, each in medians.items()
    ]
    ratio = medians["hf-llfc --help"] / bare
    of_torch = (
        max(
            medians[name]
            for name in medians
            if name.startswith(("hf-llfc inspect", "hf-llfc check", "hf-llfc merge L"))
        )
        / torch
    )
    replace_section(
        "startup",
        f"`python benchmarks/startup.py --rounds {options.rounds}`: medians of {options.rounds}, in turns. `--help` "
        f"takes {ratio:.1f} times a bare Python (to reach: {BAR}); `inspect`, `check --level 0` and a merge without "
        f"alignment at most {of_torch:.2f} times `import torch` (to reach: {BAR_OF_TORCH}). Ratios are of processor "
        "time; the config classes of transformers, which these commands do without, are there for comparison."
        f"\n\n{markdown(rows)}",
    )
    print(markdown(rows))


def commands_in(folder: Path) -> dict[str, list[str]]:
    """Name → words of every command, with what they read made in the folder."""
    make = (
        "import sys, transformers as t\n"
        "small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)\n"
        "t.BertForMaskedLM(t.BertConfig(**small)).save_pretrained(sys.argv[1] + '/BERT')\n"
        "for name in ('Llama', 'Other'):\n"
        "    t.LlamaForCausalLM(t.LlamaConfig(**small)).save_pretrained(sys.argv[1] + '/' + name)\n"
    )
    subprocess.run([sys.executable, "-c", make, str(folder)], check=True, capture_output=True)
    script = folder / "hf-llfc"
    script.write_text(SCRIPT, encoding="utf-8")
    python, hf_llfc = [sys.executable], [sys.executable, str(script)]
    found = {
        "python -c pass": [*python, "-c", "pass"],
        "python -c 'import torch'": [*python, "-c", "import torch"],
        "hf-llfc --help": [*hf_llfc, "--help"],
        "hf-llfc merge --help": [*hf_llfc, "merge", "--help"],
        "hf-llfc mrege (wrong)": [*hf_llfc, "mrege"],
    }
    for name, config in CONFIGS.items():
        found[f"from transformers import {config}"] = [*python, "-c", f"from transformers import {config}"]
        found[f"hf-llfc inspect {name}"] = [*hf_llfc, "inspect", str(folder / name)]
        found[f"hf-llfc check --level 0 {name} {name}"] = [*hf_llfc, "check", "--level", "0", *[str(folder / name)] * 2]
    merge = ["merge", str(folder / "Llama"), str(folder / "Other"), "--out", str(folder / "merged"), "--overwrite"]
    found["hf-llfc merge Llama Other"] = [*hf_llfc, *merge]
    return found


def wall_and_processor(words: list[str]) -> tuple[float, float]:
    """Seconds that a command takes on the clock and of the processor, its output thrown away."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, cwd=ROOT, capture_output=True, check=False, env=environment())
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def environment() -> dict[str, str]:
    """One thread, and this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    main()
