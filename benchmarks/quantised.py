"""What merging quantised models costs: two of FP8 beside their twins in bfloat16, by the whole command.

    python benchmarks/quantised.py FOLDER [--size 1.1B] [--repeats 5]

FOLDER takes a pair of models in bfloat16 (see llama_pair.py), the same in FP8 with a scale for every block of 128 × 128
as DeepSeek's checkpoints have them, and the twins of these: what they are, dequantised and rounded to bfloat16; 11 GB.
The two merges are run in turns, each in a process of its own, as in merge_speed.py. Their results are compared: they
differ only by the rounding of the twins.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.merge_speed import merge_words, run

BLOCK = 128
LARGEST = 448.0
"""The largest number of FP8."""


def main() -> None:
    """Makes the models, merges them in turns, and writes the section."""
    from benchmarks.llama_pair import SHAPES, make_pair
    from benchmarks.results import markdown, replace_section, require_sections

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SHAPES, default="1.1B")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    require_sections("merge_quantised")
    quantised = [quantise(model) for model in make_pair(options.folder, options.size)]
    pairs = {"FP8, blocks of 128 × 128": quantised, "bfloat16": [twin(model) for model in quantised]}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in pairs}
    outs = {name: options.folder / f"out-{number}" for number, name in enumerate(pairs)}
    for number in range(options.repeats + 1):
        for name, (first, second) in pairs.items():
            shutil.rmtree(outs[name], ignore_errors=True)
            for model in (first, second):
                into_page_cache(weights_of(model))
            took = run(merge_words((first, second), outs[name]))
            # Not the first: the kernel of a virtual machine may pay for memory that was never touched.
            if number:
                found[name].append(took)
                print(name, took, flush=True)
    off = farthest(*outs.values())
    for out in outs.values():
        shutil.rmtree(out)
    middle = {name: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for name, runs in found.items()}
    rows = [
        {
            "parents": name,
            "GB of parents": f"{sum(weights_of(model).stat().st_size for model in pairs[name]) / 1e9:.2f}",
            "wall, s": f"{each['wall']:.2f}",
            "CPU, s": f"{each['cpu']:.2f}",
            "peak memory, GiB": f"{each['memory'] / 2**30:.2f}",
        }
        for name, each in middle.items()
    ]
    of_8, of_16 = middle.values()
    text = markdown(rows) + (
        f"\n\nFP8 ÷ bfloat16: {of_8['wall'] / of_16['wall']:.2f} of the wall, {of_8['cpu'] / of_16['cpu']:.2f} of the"
        f" CPU. Results differ by at most {off:.1e} of the largest number of a tensor: the twins are rounded to"
        " bfloat16 before they are summed, what is read of FP8 is not."
    )
    replace_section(
        "merge_quantised",
        f"`python benchmarks/quantised.py FOLDER --size {options.size} --repeats {options.repeats}`: two Llama-shaped"
        f" checkpoints of {options.size.replace('B', ' B')} parameters; in turns, medians, after a run that is not"
        f" counted; {os.cpu_count()} cores, files in the page cache.\n\n{text}",
    )
    print(text)


def weights_of(model: Path) -> Path:
    """The file of a model's weights."""
    return model / "model.safetensors"


def into_page_cache(path: Path) -> None:
    """Reads a file, so that whoever reads it next does not wait for the disk."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def quantise(model: Path) -> Path:
    """Writes a model in FP8, unless it is there: its layers' matrices, not the embeddings and not the head."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    target = model.with_name(f"{model.name}-fp8")
    if weights_of(target).exists():
        return target
    target.mkdir(exist_ok=True)
    tensors = {}
    with safe_open(weights_of(model), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            value = file.get_tensor(name)
            if not name.endswith("_proj.weight"):
                tensors[name] = value
                continue
            blocks = value.float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
            scales = blocks.abs().amax((1, 3)) / LARGEST
            codes = blocks / scales[:, None, :, None]
            tensors[name] = codes.reshape(value.shape).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, weights_of(target), metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (target / "config.json").write_text(json.dumps(config))
    return target


def twin(model: Path) -> Path:
    """Writes a quantised model as it is in bfloat16, unless it is there."""
    from hf_llfc.checkpoints import open_checkpoint, write_checkpoint

    target = model.with_name(f"{model.name}-twin")
    if weights_of(target).exists():
        return target
    target.mkdir(exist_ok=True)
    opened = open_checkpoint(model)
    write_checkpoint(target, opened.tensors, opened.state_dict(), config=opened.config)
    return target


def farthest(one: Path, other: Path) -> float:
    """By how much the tensors of two models differ, of the largest number of each."""
    from safetensors import safe_open

    off = 0.0
    with safe_open(weights_of(one), framework="pt") as first, safe_open(weights_of(other), framework="pt") as second:
        for name in first.keys():  # noqa: SIM118
            a, b = (file.get_tensor(name).float() for file in (first, second))
            off = max(off, float((a - b).abs().max() / b.abs().max()))
    return off


if __name__ == "__main__":
    main()
