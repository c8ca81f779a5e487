"""Memory and time of a diagnosis with and without offload, on two Llama-shaped checkpoints made here.

    python benchmarks/offload.py [--layers 12] [--hidden 1024]

Each way runs in a process of its own. Memory is the largest anonymous memory of the process while it diagnoses, over
what it held before: pages of the mapped files, which the system takes back when it needs them, do not count.
Writes the section of this name of results/llfc.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hf_llfc
from benchmarks.results import markdown, replace_section
from hf_llfc.evaluation import EvaluationConfig

TEXTS = ["the features of the merged model are the blend of its parents' features, or they are not"] * 4


def main() -> None:
    """Makes the pair, measures both ways and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(measure(Path(options.one[0]), options.one[1] == "offload")))
        return
    with tempfile.TemporaryDirectory() as folder:
        parameters = make_pair(Path(folder), options)
        rows, reports = [], []
        for way in ("in memory", "offload"):
            words = [sys.executable, __file__, "--one", folder, way]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            reports.append(found.pop("numbers"))
            rows.append({"way": way, **{name: f"{value:.1f}" for name, value in found.items()}})
    apart = max(abs(one - other) for one, other in zip(*reports, strict=True))
    replace_section(
        "offload",
        f"`python benchmarks/offload.py --layers {options.layers} --hidden {options.hidden}`: {parameters / 1e6:.0f} M "
        f"parameters each, {4 * parameters / 1e9:.2f} GB in float32; three points, {len(TEXTS)} texts in one batch. "
        f"The largest difference of any number of the two reports is {apart:.1e}.\n\n{markdown(rows)}",
    )
    print(rows, apart)


def make_pair(folder: Path, options: argparse.Namespace) -> int:
    """Two random models that differ a little; returns their number of parameters."""
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "a")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    model.save_pretrained(folder / "b")
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    return model.num_parameters()


def measure(folder: Path, offload: bool) -> dict:
    """One diagnosis."""
    data = EvaluationConfig(
        task="text-generation",
        dataset=str(folder / "texts.txt"),
        tokenizer="bytes",
        blocks=False,
        max_length=64,
        batch_size=len(TEXTS),
    )
    before, peak, done = anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    report = hf_llfc.diagnose(folder / "a", folder / "b", data, alphas=[0.25, 0.5, 0.75], offload=offload)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    numbers = [value for row in report.layers for value in (row.llfc.mean, row.baseline.mean, row.coefficient.mean)]
    return {
        "peak, GB": (peak[0] - before) / 1e9,
        "seconds": seconds,
        "numbers": [*numbers, *(point.loss for point in report.path)],
    }


def anonymous() -> float:
    """Anonymous memory of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return float(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
