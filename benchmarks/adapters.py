"""What adapters cost: four LoRAs merged into one, and an adapter taken out of a fine-tune beside mergekit's.

    python benchmarks/adapters.py FOLDER [--mergekit ~/mergekit/bin/mergekit-extract-lora] [--repeats 3]

FOLDER takes the models (3 GB) and the results. Adapters have normal factors of rank 16 on every linear map of a
Llama-shaped base of 1.1 B parameters. The fine-tune, of 0.1 B, is moved by normal noise, whose singular values are as
close to each other as any: the hardest case for a search of the leading ones. mergekit as in merge_speed.py.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.llama_pair import config_of, make_models
from benchmarks.merge_speed import run
from benchmarks.results import markdown, replace_section
from hf_llfc.checkpoints import open_checkpoint
from hf_llfc.checkpoints.low_rank import LowRank
from hf_llfc.checkpoints.names import Layout, find_model_class
from hf_llfc.foundation.tensor_files import save_tensors
from hf_llfc.merging.low_rank import difference

COUNT, RANK, SPREAD = 4, 16, 0.02
ASKED = 32
"""Rank of the adapter that is extracted."""


def main() -> None:
    """Measures both, and writes their sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mergekit", type=Path, help="the executable mergekit-extract-lora")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("adapter_out", "extract"))
    options = parser.parse_args()
    if options.only != "extract":
        adapter_out(options)
    if options.only != "adapter_out":
        extract(options)


def adapter_out(options: argparse.Namespace) -> None:
    """Four adapters merged into one."""
    base = make_models(options.folder, "1.1B", 0)[0]
    adapters = [make_adapter(options.folder / f"lora-{seed}", base, seed) for seed in range(COUNT)]
    rows = []
    for name, words in (
        ("linear, rank auto", []),
        ("linear, rank 16", ["--rank", "16"]),
    ):
        out = options.folder / "out"
        command = [sys.executable, "-m", "hf_llfc", "merge", *map(str, adapters), "--save-as", "adapter"]
        found = []
        for _ in range(options.repeats):
            shutil.rmtree(out, ignore_errors=True)
            found.append(run([*command, *words, "--out", str(out), "--quiet"]))
        record = json.loads((out / "llfc" / "run.json").read_text())["adapter"]
        error = record["error"]
        rows.append({"merge": name, **middle(found), "relative error": "rounding" if error < 1e-6 else f"{error:.2g}"})
        if not words:
            rows[-1]["relative error"] += f", measured {measured_error(adapters, out):.1e}"
    text = markdown(rows)
    replace_section(
        "adapter_out",
        f"`python benchmarks/adapters.py FOLDER --only adapter_out --repeats {options.repeats}`: {COUNT} LoRAs of rank "
        f"{RANK} on all 154 linear maps of a Llama-shaped base of 1.1 B parameters, bfloat16; the whole command, "
        f"medians; limits set before: 10 s, 1 GiB.\n\n{text}",
    )
    print(text)


def extract(options: argparse.Namespace) -> None:
    """An adapter of a fine-tune, by us and by mergekit."""
    base, tuned = make_models(options.folder, "0.1B", 1)
    commands = {"hf-llfc extract": [sys.executable, "-m", "hf_llfc", "extract", str(base), str(tuned), "--quiet"]}
    commands["hf-llfc extract"] += ["--rank", str(ASKED), "--out"]
    if options.mergekit is not None:
        commands["mergekit-extract-lora"] = [str(options.mergekit), "--model", str(tuned), "--base-model", str(base)]
        commands["mergekit-extract-lora"] += ["--max-rank", str(ASKED), "--embed-lora", "--quiet", "--out-path"]
    rows = []
    for name, words in commands.items():
        out = options.folder / name.replace(" ", "-")
        found = []
        for _ in range(options.repeats if "hf-llfc" in name else 1):
            shutil.rmtree(out, ignore_errors=True)
            found.append(run([*words, str(out)]))
        rows.append({"command": name, **middle(found), "relative error": f"{extraction_error(base, tuned, out):.6f}"})
    text = markdown(rows)
    replace_section(
        "extract",
        f"`python benchmarks/adapters.py FOLDER --only extract --mergekit … --repeats {options.repeats}`: rank {ASKED} "
        "of a change by normal noise, Llama-shaped, 0.1 B parameters, bfloat16; mergekit once. The error is of the "
        f"change of all linear maps.\n\n{text}",
    )
    print(text)


def middle(found: list[dict[str, float]]) -> dict[str, str]:
    """Medians of some runs, in words."""
    wall, cpu, memory = (statistics.median(each[key] for each in found) for key in ("wall", "cpu", "memory"))
    return {"wall, s": f"{wall:.1f}", "CPU, s": f"{cpu:.1f}", "peak memory, GiB": f"{memory / 2**30:.2f}"}


def make_adapter(folder: Path, base: Path, seed: int) -> Path:
    """Writes an adapter of normal factors, unless it is there."""
    if (folder / "adapter_config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of("1.1B")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in Layout(find_model_class("LlamaForCausalLM", config), config).shapes.items():
        if name.endswith("_proj.weight"):
            path = f"base_model.model.{name.removesuffix('.weight')}"
            for factor, size in (("lora_A", (RANK, shape[1])), ("lora_B", (shape[0], RANK))):
                values = SPREAD * torch.randn(size, generator=generator)
                tensors[f"{path}.{factor}.weight"] = values.to(torch.bfloat16)
    save_tensors(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    settings |= {"target_modules": targets, "base_model_name_or_path": str(base.resolve())}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def products(adapter: Path, scale: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of a weight → its two factors, in float64."""
    from safetensors.torch import load_file

    state = load_file(adapter / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            scale * state[name.replace("lora_A", "lora_B")].double(),
            state[name].double(),
        )
        for name in state
        if name.endswith("lora_A.weight")
    }


def measured_error(adapters: list[Path], out: Path) -> float:
    """How far the mean of the products is from the product that was written, relative to the mean."""
    given, written = [products(each, 2.0) for each in adapters], products(out, 1.0)
    apart = size = 0.0
    for name, (left, right) in written.items():
        lefts, rights = zip(*(each[name] for each in given), strict=True)
        mean = LowRank(torch.cat(lefts, dim=1)[None] / len(given), torch.cat(rights)[None])
        apart += difference(mean, LowRank(left[None], right[None])) ** 2
        size += difference(mean, LowRank(0 * left[None], right[None])) ** 2
    return (apart / size) ** 0.5


def extraction_error(base: Path, tuned: Path, out: Path) -> float:
    """What an adapter lacks of the change of all linear maps, relative to the change."""
    config = json.loads((out / "adapter_config.json").read_text())
    written = products(out, config["lora_alpha"] / config["r"])
    one, other = open_checkpoint(base), open_checkpoint(tuned)
    apart = size = 0.0
    for name in one.tensors:
        if name.endswith("_proj.weight"):
            change = other.read(name).double() - one.read(name).double()
            left, right = written[name.removesuffix(".weight")]
            apart += float((change - left @ right).square().sum())
            size += float(change.square().sum())
    return (apart / size) ** 0.5


if __name__ == "__main__":
    main()
