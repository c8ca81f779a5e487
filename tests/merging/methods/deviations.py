"""Prints how far every method is from mergekit's: `python -m tests.merging.methods.deviations`.

The distance from mergekit, and that of both from the float64 oracle, as shares of the largest entry of the result: the
largest over all cases, kinds and shapes of `cases`.
"""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from hf_llfc.merging.methods import MERGE_METHODS, find_method
from tests.merging.methods.cases import DETERMINISTIC, KINDS, RANDOM, SHAPES, SPECTRAL, exact, masks_of, tensors
from tests.merging.methods.test_against_mergekit import WITH_EQUALS, mergekit_stops, stable_sorts, theirs


def main() -> None:
    torch.set_num_threads(1)
    table: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for case in (*DETERMINISTIC, *RANDOM, *SPECTRAL):
        method = find_method(case.method)
        for kind in KINDS if case not in SPECTRAL else ("fine-tuned", "independent"):
            for seed, shape in enumerate(SHAPES if case not in SPECTRAL else SHAPES[:2]):
                if mergekit_stops(case, kind):
                    continue
                if case.method.startswith("della") and (not shape or 1 in shape[1:]):
                    continue  # mergekit divides by zero
                base, models = tensors(kind, shape, case.models, seed)
                settings = case.settings(seed=seed, tensor="weight")
                ours = method.merge(models, base if case.has_base else None, settings)
                reference = exact(case, base, models, settings)
                largest = reference.abs().max().item() or 1.0
                row = table[case.method]
                row[1] = max(row[1], (ours - reference).abs().max().item() / largest)
                if case in SPECTRAL:
                    continue
                with pytest.MonkeyPatch.context() as patch:
                    if kind in WITH_EQUALS:
                        stable_sorts(patch)
                    if case in RANDOM:
                        drawn = [mask for mask in masks_of(case, base, models, settings) if mask is not None]
                        patch.setattr(
                            torch,
                            "bernoulli",
                            lambda chances, drawn=drawn: torch.from_numpy(drawn.pop(0)).view(chances.shape).float(),
                        )
                    found = theirs(case, base, models)
                row[0] = max(row[0], (ours - found).abs().max().item() / largest)
                row[2] = max(row[2], (found - reference).abs().max().item() / largest)
    print(f"{'method':18} {'need':14} {'from mergekit':>13} {'ours, oracle':>13} {'mergekit, oracle':>16}")
    for name, method in MERGE_METHODS.items():
        if method.importance:
            continue  # it needs data
        distance, error, error_of_theirs = table[name]
        print(f"{name:18} {method.need.value:14} {distance:13.1e} {error:13.1e} {error_of_theirs:16.1e}")


if __name__ == "__main__":
    main()
