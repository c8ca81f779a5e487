"""How long the command line takes to start, beside a bare Python.

    python benchmarks/startup.py [--rounds 11]

Every command runs in a process of its own, the commands in turn, the console script as an installer writes it. The
checkpoints are tiny and made here, so that `inspect` reads and prints little: what is left is what it loads. The bare
import of the model type's config class is what no `inspect` can go below. Writes the section of this
name of results/merging.md.
"""

import argparse
import os
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


def main() -> None:
    """Measures and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = commands_in(Path(folder))
        times: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(options.rounds + 1):
            for name, words in commands.items():
                seconds = wall(words)
                if turn:  # the first turn writes byte code and fills the page cache
                    times[name].append(seconds)
    medians = {name: statistics.median(each) for name, each in times.items()}
    bare = medians["python -c pass"]
    rows = [
        {"command": f"`{name}`", "wall, ms": f"{1e3 * each:.0f}", "÷ bare Python": f"{each / bare:.1f}"}
        for name, each in medians.items()
    ]
    ratio = medians["hf-llfc --help"] / bare
    replace_section(
        "startup",
        f"`python benchmarks/startup.py --rounds {options.rounds}`: medians of {options.rounds}, in turns. `--help` "
        f"takes {ratio:.1f} times a bare Python (to reach: {BAR}). The config class of Llama loads what compiles "
        f"and spreads models, whoever asks for it; that of BERT does not.\n\n{markdown(rows)}",
    )
    print(markdown(rows))


def commands_in(folder: Path) -> dict[str, list[str]]:
    """Name → words of every command, with what they read made in the folder."""
    make = (
        "import sys, transformers as t\n"
        "small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)\n"
        "t.BertForMaskedLM(t.BertConfig(**small)).save_pretrained(sys.argv[1] + '/BERT')\n"
        "t.LlamaForCausalLM(t.LlamaConfig(**small)).save_pretrained(sys.argv[1] + '/Llama')\n"
    )
    subprocess.run([sys.executable, "-c", make, str(folder)], check=True, capture_output=True)
    script = folder / "hf-llfc"
    script.write_text(SCRIPT, encoding="utf-8")
    python, hf_llfc = [sys.executable], [sys.executable, str(script)]
    found = {
        "python -c pass": [*python, "-c", "pass"],
        "hf-llfc --help": [*hf_llfc, "--help"],
        "hf-llfc merge --help": [*hf_llfc, "merge", "--help"],
        "hf-llfc mrege (wrong)": [*hf_llfc, "mrege"],
    }
    for name, config in CONFIGS.items():
        found[f"from transformers import {config}"] = [*python, "-c", f"from transformers import {config}"]
        found[f"hf-llfc inspect {name}"] = [*hf_llfc, "inspect", str(folder / name)]
    found["hf-llfc check --level 0 BERT BERT"] = [*hf_llfc, "check", "--level", "0", *[str(folder / "BERT")] * 2]
    return found


def wall(words: list[str]) -> float:
    """Seconds that a command takes, its output thrown away."""
    began = time.perf_counter()
    subprocess.run(words, cwd=ROOT, capture_output=True, check=False, env=environment())
    return time.perf_counter() - began


def environment() -> dict[str, str]:
    """One thread, and this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    main()
