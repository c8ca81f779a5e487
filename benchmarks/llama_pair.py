"""Two Llama-shaped bfloat16 checkpoints of any size, made up in seconds: a base, and the same with a little noise.

    python benchmarks/llama_pair.py FOLDER [--size 1.1B]

Shapes are those of TinyLlama (1.1B) and of narrower and wider ones; the weights are normal numbers, so that a merge of
them means nothing, and costs what one of trained models costs.
"""

import argparse
import json
import string
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hf_llfc.checkpoints import TensorInfo, write_checkpoint
from hf_llfc.checkpoints.names import Layout, find_model_class

SHAPES = {
    "0.1B": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 22, "heads": (8, 2)},
    "0.3B": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 22, "heads": (16, 4)},
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "heads": (32, 4)},
    "2.0B": {"hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 28, "heads": (40, 8)},
    "3.0B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "heads": (48, 8)},
}
SPREAD, STEP = 0.02, 0.001
"""Standard deviation of the weights, and of their distance between the two models."""


def config_of(size: str, layers: int | None = None) -> LlamaConfig:
    """The config of a size; fewer layers on request."""
    shape = dict(SHAPES[size])
    heads, kv_heads = shape.pop("heads")
    if layers is not None:
        shape["num_hidden_layers"] = layers
    return LlamaConfig(
        **shape,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=32000,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def make_pair(folder: Path, size: str, layers: int | None = None) -> tuple[Path, Path]:
    """Writes a base and one model moved from it below a folder, unless they are there.

    Returns:
        Their folders.
    """
    base, moved = make_models(folder, size, 1, layers)
    return base, moved


def make_models(folder: Path, size: str, count: int, layers: int | None = None) -> list[Path]:
    """Writes a base and models that are moved from it, each by noise of its own, unless they are there.

    Returns:
        Their folders, the base first.
    """
    config = config_of(size, layers)
    name = size if layers is None else f"{size}-{layers}-layers"
    shapes = Layout(find_model_class("LlamaForCausalLM", config), config).shapes
    infos = {tensor: TensorInfo(torch.bfloat16, shape) for tensor, shape in shapes.items()}
    folders = [folder / name / letter for letter in string.ascii_lowercase[: 1 + count]]
    for moved, target in enumerate(folders):
        if (target / "done.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)

        def tensors(moved: int = moved):
            base, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(moved)
            for tensor, info in infos.items():
                value = torch.empty(info.shape).normal_(0, SPREAD, generator=base)
                if moved:
                    value += torch.empty(info.shape).normal_(0, STEP, generator=noise)
                yield tensor, value.bfloat16()

        write_checkpoint(target, infos, tensors(), config=config)
        (target / "done.json").write_text(json.dumps({"size": size}))
    return folders


def main() -> None:
    """Makes a pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SHAPES, default="1.1B")
    options = parser.parse_args()
    print(*make_pair(options.folder, options.size))


if __name__ == "__main__":
    main()
