"""Heads by the distance of their circuits beside heads by weight matching: do both choose the same?

    python benchmarks/circuits.py DIR [--only vit-128 gpt2 llama]

DIR is where `benchmarks/train_seeds.py` put its models. Theus et al. (NeurIPS 2025) assign heads by
‖QK_i − QK_j‖² + ‖OV_i − OV_j‖², the distance of the maps that a head computes. Weight matching over all groups assigns
them by ⟨A, T·B⟩ of their balanced weights, with the best transform of their channels for each pair of heads. Both are
computed in the stream that weight matching found, and the first without forming a d × d matrix: ⟨QᵀK, Q'ᵀK'⟩ =
⟨Q·Q'ᵀ, K·K'ᵀ⟩. Also printed is the barrier where heads follow the circuits and their channels the heads.

Shape suffixes: h heads, c channels of a head, d the stream.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.symmetries import FAMILIES, PAIRS, Pair
from hf_llfc.alignment import Parameters, Search, match_weights
from hf_llfc.alignment.assignment.assignment import assign
from hf_llfc.alignment.sources import ANCHORS
from hf_llfc.symmetry import Alignment, Permutation


def heads(pair: Pair, state: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """Queries, keys, values and outputs of a layer as `[h, c, d]`, in float64; of grouped queries those of a group."""
    config = pair.a.config

    def named(*parts: str) -> Tensor:
        (name,) = (name for name in state if f".{layer}." in name and all(part in name for part in parts))
        return state[name].double()

    if pair.family.startswith("gpt2"):
        fused = named("attn.c_attn.weight").T.chunk(3)
        output = named("attn.c_proj.weight")
        count = config.n_head
    elif pair.family.startswith("llama"):
        fused = [named(f"self_attn.{each}_proj.weight") for each in "qkv"]
        output = named("self_attn.o_proj.weight").T
        count = config.num_key_value_heads
    else:
        fused = [named(f"attention.attention.{each}.weight") for each in ("query", "key", "value")]
        output = named("attention.output.dense.weight").T
        count = config.num_attention_heads
    return {name: each.reshape(count, -1, each.shape[-1]) for name, each in zip("qkvo", (*fused, output), strict=True)}


def similarity(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """⟨QK_i, QK_j⟩ + ⟨OV_i, OV_j⟩ `[h, h]`; of grouped queries the sum over the queries of a group, in order."""
    size = a["k"].shape[1]

    def of(many: str, one: str) -> Tensor:
        many_a, many_b = (each[many].unflatten(1, (-1, size)) for each in (a, b))
        grams = torch.einsum("igcd,jged->ijgce", many_a, many_b), torch.einsum("icd,jed->ijce", a[one], b[one])
        return torch.einsum("ijgce,ijce->ij", *grams)

    return of("q", "k") + of("o", "v")


def main() -> None:
    """Prints a row a family."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=["vit-128", "gpt2", "llama"])
    parser.add_argument("--pairs", type=int, choices=(1, 2, 3), default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print("| model | pair | layers in which both choose the same heads | barrier, by weights | by circuits |")
    print("|---|---|---|---|---|")
    for family in options.only:
        for seeds in PAIRS[: options.pairs]:
            pair = Pair.opened(options.folder, family, seeds, "full")
            anchored = [each.with_anchors(ANCHORS) for each in pair.parameters()]
            found = match_weights(*anchored)
            root = "kv" if family.startswith("llama") else "heads"
            of_heads = sorted(axis for axis in pair.spec.symmetric_axes if axis.split(".")[0] == root)
            spec = pair.spec.fix(*of_heads)
            rest = {axis: found.transforms[axis] for axis in spec.symmetric_axes if axis == "residual"}
            in_stream = Alignment(spec, {**spec.identity_alignment().transforms, **rest}).apply(pair.state_b)
            chosen = {
                axis: Permutation(assign(similarity(*(heads(pair, state, i) for state in (pair.state_a, in_stream)))))
                for i, axis in enumerate(of_heads)
            }
            same = sum(torch.equal(chosen[axis].perm, found.transforms[axis].perm) for axis in of_heads)
            moved = Alignment(pair.spec, {**pair.spec.identity_alignment().transforms, **chosen}).apply(in_stream)
            given = match_weights(
                *(
                    Parameters.from_state_dict(pair.spec.fix("residual", *of_heads), state)
                    for state in (pair.state_a, moved)
                ),
                search=Search(restarts=1),
            )
            barrier = pair.barrier(found)
            print(
                f"| {family} | {seeds[0]}, {seeds[1]} | {same} of {len(of_heads)} | {barrier:.3f} | "
                f"{pair.barrier_of(given.apply(moved)):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
