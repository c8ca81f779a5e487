"""What weight matching undoes: from a learned alignment, one kind of axis after the other is matched by weights again.

    python benchmarks/rematched.py DIR [--only gpt2 vit-128 llama llama-short] [--steps 400]

DIR is that of `benchmarks/symmetries.py`; the pair is seeds 1 and 2. All other axes stay as they were learned, so that
the search is easy, most of it in closed form: where the barrier rises again, the similarity of weights is another aim
than a low barrier. Writes the section of this name of results/symmetries.md.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.many_models import mean_cosine
from benchmarks.results import markdown, replace_section
from benchmarks.symmetries import FAMILIES, PAIRS, Pair, learned
from hf_llfc.alignment import Parameters, Search, match_weights
from hf_llfc.alignment.learned_matching import Learning
from hf_llfc.alignment.sources import anchors_of
from hf_llfc.symmetry import Alignment, PermutationSpec


def matched_again(pair: Pair, of_b: Mapping[str, Tensor], spec: PermutationSpec) -> dict[str, Tensor]:
    """The tensors of B with the axes of a spec matched by weights, from where they are."""
    weight = anchors_of(pair.spec)
    both = [Parameters.from_state_dict(spec, dict(state)).with_anchors(weight) for state in (pair.state_a, of_b)]
    return match_weights(*both, search=Search(restarts=1)).apply(dict(of_b))


def measure(folder: Path, family: str, steps: int) -> list[dict[str, str]]:
    """The rows of a family."""
    pair = Pair.opened(folder, family, PAIRS[0], "full")
    spec = pair.spec
    rows = []

    def add(title: str, of_b: Mapping[str, Tensor]) -> None:
        cosine = mean_cosine([pair.state_a, {name: of_b[name] for name in pair.state_a}])
        rows.append(
            {
                "model": family,
                "alignment": title,
                "barrier": f"{pair.barrier_of(of_b):.3f}",
                "cosine of the weights": f"{cosine:.3f}",
            }
        )
        print(rows[-1], flush=True)

    weight = anchors_of(spec)
    by_weights = match_weights(*(each.with_anchors(weight) for each in pair.parameters()))
    add("by weights", by_weights.apply(pair.state_b))
    found: Alignment = learned(pair, by_weights, Learning(steps))
    of_b = found.apply(pair.state_b)
    add(f"learned, {steps} steps", of_b)
    kinds = sorted({axis.split(".")[0] for axis in spec.symmetric_axes})
    for kind in kinds:
        axes = [axis for axis in spec.symmetric_axes if axis.split(".")[0] == kind]
        add(f"then `{kind}` by weights", matched_again(pair, of_b, spec.keep(*axes)))
    add("then all but `residual` by weights", matched_again(pair, of_b, spec.fix("residual")))
    return rows


def main() -> None:
    """Measures family by family and writes the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=["gpt2", "vit-128", "llama", "llama-short"])
    parser.add_argument("--steps", type=int, default=400, help="of learned matching")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = [row for family in options.only for row in measure(options.folder, family, options.steps)]
    command = f"`python benchmarks/rematched.py {shlex.join(['DIR', *sys.argv[2:]])}`"
    replace_section("rematched", f"{command}: seeds 1 and 2, loss barrier at the midpoint in nats.\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
