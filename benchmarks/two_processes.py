"""Two processes of a launcher against one, for matching and diagnosis; one thread of torch each.

    python benchmarks/two_processes.py [--rounds 5]

The pair is a Llama made here and the same moved by a random transform of every axis, with noise. Processes are started
with torch's launcher, one and two in turns. Seconds are those of the stage, from the moment when all processes have
opened the models to that when all have the result; starting Python and loading libraries takes the same with one and
with two, and is told beside it. Needs two free cores. Writes the section
`processes` of results/merging.md.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.results import markdown, replace_section
from hf_llfc.alignment.checkpoints import align_checkpoints
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.diagnostics.checkpoints import diagnose_checkpoints
from hf_llfc.diagnostics.streaming import Execution
from hf_llfc.evaluation import EvaluationConfig
from hf_llfc.parallel.processes import Processes
from hf_llfc.parents.data import open_data
from hf_llfc.parents.parent import Parent
from hf_llfc.parents.specs import spec_of
from hf_llfc.recipe import AlignSection, DiagnoseSection

SHAPES = {
    "matching": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16},
    "diagnosis": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8},
}
SAMPLES, LENGTH, BATCH = 48, 128, 4
ALPHAS = (0.25, 0.5, 0.75)
NOISE = 0.1
"""Of the moved model, in units of the spread of each tensor."""

BAR = 1.6


def main() -> None:
    """Measures and writes the section; under the launcher, does one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stage", nargs=2, metavar=("STAGE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.stage:
        run_stage(options.stage[0], Path(options.stage[1]))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for stage in SHAPES:
            make_pair(Path(folder) / stage, stage)
            runs: dict[int, list[dict]] = {1: [], 2: []}
            for _ in range(options.rounds):
                for count, found in runs.items():
                    found.append(launched(count, stage, Path(folder) / stage))
            one, two = (statistics.median(each["seconds"] for each in found) for found in runs.values())
            whole = [statistics.median(each["command"] for each in found) for found in runs.values()]
            results = {each["result"] for found in runs.values() for each in found}
            rows.append(
                {
                    "stage": stage,
                    "one process, s": f"{one:.2f}",
                    "two, s": f"{two:.2f}",
                    "one ÷ two": f"{one / two:.2f}",
                    "whole command, s": " / ".join(f"{seconds:.1f}" for seconds in whole),
                    "the same result": "bit for bit" if len(results) == 1 else "to rounding",
                }
            )
    replace_section(
        "processes",
        f"`python benchmarks/two_processes.py --rounds {options.rounds}`: medians of {options.rounds}, in turns, one "
        f"thread a process; to reach: {BAR} times as fast. Matching: a Llama of hidden size 1024 and four layers from "
        f"an uninformed start; diagnosis: three points of one of hidden size 512 and four layers, {SAMPLES} texts of "
        f"{LENGTH} bytes.\n\n{markdown(rows)}",
    )
    print(markdown(rows))


def make_pair(folder: Path, stage: str) -> None:
    """A random Llama, and the same in other coordinates with noise."""
    folder.mkdir()
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[stage], num_key_value_heads=4, vocab_size=257, max_position_embeddings=LENGTH)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "a")
    checkpoint = open_checkpoint(folder / "a")
    moved = spec_of(checkpoint).random_alignment(torch.Generator().manual_seed(1)).apply(dict(checkpoint.state_dict()))
    noisy = {
        name: tensor + NOISE * tensor.std() * torch.randn_like(tensor) if tensor.ndim > 1 else tensor
        for name, tensor in moved.items()
    }
    model.load_state_dict(noisy)
    model.save_pretrained(folder / "b")
    letters = torch.randint(97, 123, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(2))
    (folder / "texts.txt").write_text("\n".join("".join(map(chr, row)) for row in letters.tolist()))


def launched(count: int, stage: str, folder: Path) -> dict:
    """What one run under the launcher tells."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    began = time.perf_counter()
    done = subprocess.run(
        [*words, __file__, "--stage", stage, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return {**json.loads(done.stdout.splitlines()[-1]), "command": time.perf_counter() - began}


def run_stage(stage: str, folder: Path) -> None:
    """One stage, shared by the processes; the main one prints its seconds and a hash of its result."""
    with Processes() as processes:
        pair = [open_checkpoint(folder / name) for name in "ab"]
        data = open_data(
            EvaluationConfig(
                "text-generation",
                str(folder / "texts.txt"),
                tokenizer="bytes",
                max_length=LENGTH,
                batch_size=BATCH,
            ),
            pair[0],
        )
        if processes.is_main:  # it tells a run from another, and is known before the stage begins
            for each in pair:
                each.fingerprint()
        processes.barrier()
        began = time.perf_counter()
        if stage == "matching":
            options = AlignSection("weight_matching", max_sweeps=2)
            found = align_checkpoints(*pair, options, workers=processes.workers())
            result = b"".join(found.transforms[axis].perm.numpy().tobytes() for axis in sorted(found.transforms))
        else:
            section = DiagnoseSection(data.config, ALPHAS)
            report = diagnose_checkpoints(
                [Parent(each) for each in pair], data, section, execution=Execution(processes)
            )
            result = json.dumps([report.to_dict()[name] for name in ("path", "layers")]).encode()
        processes.barrier()
        seconds = time.perf_counter() - began
        if processes.is_main:
            print(json.dumps({"seconds": seconds, "result": hashlib.sha256(result).hexdigest()}))


if __name__ == "__main__":
    main()
