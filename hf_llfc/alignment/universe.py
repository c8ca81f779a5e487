"""Many models in one space, the universe (Crisostomi et al., *C²M³*, NeurIPS 2024), over every group of transforms.

Each model i has transforms Tᵢ into a common space, and together they maximise

    F(T₁, …, T_N) = Σ_{i<j} ⟨Tᵢθᵢ, Tⱼθⱼ⟩.

Transforms keep norms, so that the largest F is also the smallest sum of squared distances between all pairs, and of
all models from their mean. From model j to model i leads Tᵢ⁻¹Tⱼ, whatever other models it goes through: around a cycle
of models the maps compose to the identity by construction. Those of pairs that are matched one by one do not.

With all other models held F is ⟨Σ_{j≠i} Tⱼθⱼ, Tᵢθᵢ⟩ and a constant: the objective of weight matching of model i against
the sum of the others, whose gains are the sums of theirs. A sweep matches every group of axes of every model once, and
no step lowers F. A common transform of all models leaves F as it is. It is chosen at the end so that one model, the
reference, is where it was; until then that one moves like any other, for to move one model is not to move all others
back, one at a time.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor

from hf_llfc.alignment.gains import CACHED, Gains, Key
from hf_llfc.alignment.groups import groups_of
from hf_llfc.alignment.search import DEFAULT_SEARCH, Search
from hf_llfc.alignment.sources import Parameters
from hf_llfc.alignment.weight_matching import (
    CONVERGED,
    Sweep,
    closeness,
    completed,
    differences,
    match_weights,
    of_solver,
    sweep_over,
)
from hf_llfc.errors import AlignmentError, raise_all
from hf_llfc.foundation.progress import Progress, silent
from hf_llfc.parallel.workers import ALONE, Workers
from hf_llfc.symmetry.spec import Alignment

logger = logging.getLogger(__name__)

# While one model is matched, sums of the others are kept up to so many bytes; what does not fit is summed when read.
KEPT = 1 << 30


def match_universe(
    models: Sequence[Parameters],
    *,
    search: Search = DEFAULT_SEARCH,
    reference: int = 0,
    starts: Sequence[Alignment] | None = None,
    workers: Workers = ALONE,
    progress: Progress = silent,
) -> list[Alignment]:
    """Finds transforms of all models together that bring their weights close to each other.

    The first start is the identity (or `starts`): fine-tunes of one base usually stay there, and if its first sweep
    moves nothing no other start is tried. In the next the universe grows: each model in turn is matched, as
    `match_weights` does, to the sum of those before it. Further starts do so in random order. The best objective wins.

    Args:
        models: Two or more, of one permutation spec.
        search: Starts, sweeps, seed and solver; a sweep visits every group of axes of every model.
        reference: Index of the model in whose coordinates the others come out. It changes nothing else.
        starts: Transforms to start from instead of the identity, one alignment a model.
        workers: Where groups are matched; the result does not depend on it.
        progress: Told the groups done and the groups of the model.

    Returns:
        One alignment a model, that of the reference the identity. The metadata are those of `match_weights`, of the
        model and the reference alone, with `sweeps` of F; `universe` holds, of all pairs, the number of `models`,
        `objective_before` and `objective_after`, F, and `cosine_before` and `cosine_after`, the means.

    Raises:
        AlignmentError: The models have different tensors, a weight is not finite, or `starts` move what the spec holds
            fixed.
    """
    problems = [problem for other in models[1:] for problem in differences(models[0], other)]
    raise_all(problems, AlignmentError, "the models hold different tensors")
    spec = models[0].binding.spec
    unmoved = [spec.identity_alignment() for _ in models]
    before_ij = _inner_products(models, unmoved, workers)
    universe = _Universe(models, search, workers, progress)
    generator = torch.Generator().manual_seed(search.seed)
    history: list[Sweep] = []
    best: _Ascent | None = None
    for number in range(search.restarts):
        if number == 0:
            label = "identity" if starts is None else "given"
            start = unmoved if starts is None else [completed(alignment, spec) for alignment in starts]
        else:
            order = (
                list(range(len(models))) if number == 1 else torch.randperm(len(models), generator=generator).tolist()
            )
            label, start = f"grown {number}", universe.grown(order)
        ascent = universe.ascend(label, start, generator, history)
        if best is None or ascent.objective > best.objective:
            best = ascent
        if number == 0 and starts is None and all(alignment.is_identity for alignment in ascent.alignments):
            break
    assert best is not None
    after_ij = _inner_products(models, best.alignments, workers)
    norms = [float(square) ** 0.5 for square in before_ij.diagonal()]
    of_all = _of_all(before_ij, after_ij)
    back = best.alignments[reference].inverse()
    return [
        (unmoved[index] if index == reference else alignment.then(back)).with_metadata(
            **of_solver(search.solver, best.gap, best.objective),
            method="weight_matching",
            **closeness(
                norms[reference], norms[index], float(before_ij[reference, index]), float(after_ij[reference, index])
            ),
            universe=of_all,
            converged=best.converged,
            restarts=search.restarts,
            seed=search.seed,
            sweeps=[asdict(sweep) for sweep in history],
        )
        for index, alignment in enumerate(best.alignments)
    ]


def closeness_of_all(
    models: Sequence[Parameters], alignments: Sequence[Alignment], workers: Workers = ALONE
) -> dict[str, float]:
    """Measures closeness of all models, reading their weights: `universe` in the metadata, whatever the method."""
    unmoved = [model.binding.spec.identity_alignment() for model in models]
    return _of_all(*(_inner_products(models, transforms, workers) for transforms in (unmoved, alignments)))


def _of_all(before_ij: Tensor, after_ij: Tensor) -> dict[str, float]:
    """Objective and mean cosine over all pairs of models, from their inner products before and after."""
    closeness: dict[str, float] = {"models": len(before_ij)}
    for when, products_ij in (("before", before_ij), ("after", after_ij)):
        closeness |= {f"objective_{when}": _over_pairs(products_ij), f"cosine_{when}": _mean_cosine(products_ij)}
    return closeness


@dataclass(frozen=True)
class _Ascent:
    """Where the sweeps of one start end."""

    alignments: Sequence[Alignment]
    objective: float
    converged: bool
    gap: float


@dataclass(frozen=True)
class _Universe:
    """The models, and how they are matched."""

    models: Sequence[Parameters]
    search: Search
    workers: Workers
    progress: Progress

    def grown(self, order: Sequence[int]) -> list[Alignment]:
        """Matches each model to the sum of those before it in some order."""
        alignments = [model.binding.spec.identity_alignment() for model in self.models]
        for count, index in enumerate(order[1:], start=1):
            alignments[index] = match_weights(
                self._sum(alignments, order[:count]),
                self.models[index],
                search=replace(self.search, restarts=DEFAULT_SEARCH.restarts),
                workers=self.workers,
                progress=self._progress_of(f"universe of {count} of {len(self.models)} models"),
            )
        return alignments

    def _progress_of(self, part: str) -> Progress:
        """The progress of a part of the work, told under its name."""

        def tell(step: str, done: int, total: int) -> None:
            self.progress(f"{part}: {step}", done, total)

        return tell

    def ascend(
        self, label: str, start: Sequence[Alignment], generator: torch.Generator, history: list[Sweep]
    ) -> _Ascent:
        """Sweeps over the models in random order until nothing improves."""
        alignments = list(start)
        spec = self.models[0].binding.spec
        groups = groups_of(self.models[0].binding)
        objective = _over_pairs(_inner_products(self.models, alignments, self.workers))
        gap = 0.0
        for sweep in range(1, self.search.max_sweeps + 1):
            rise = gap_here = 0.0
            order = torch.randperm(len(self.models), generator=generator).tolist()
            for count, index in enumerate(order, start=1):
                others = self._sum(alignments, [other for other in range(len(self.models)) if other != index])
                gains = Gains(others, self.models[index], workers=self.workers, solver=self.search.solver)
                transforms = dict(alignments[index].transforms)
                told = partial(self.progress, f"universe, {label} start, sweep {sweep}, model {count} of {len(order)}")
                of_model = sweep_over(groups, gains, transforms, generator, told)
                alignments[index] = Alignment(spec, transforms)
                rise, gap_here = rise + of_model[0], gap_here + of_model[1]
            objective, gap = objective + rise, max(gap, gap_here)
            moved = sum(count for alignment in alignments for count, _ in alignment.moved.values())
            history.append(Sweep(label, sweep, objective, moved))
            logger.info("%s start, sweep %d: objective %.6g, %d units moved", label, sweep, objective, moved)
            converged = rise <= CONVERGED * max(abs(objective), 1e-30)
            if converged:
                break
        objective = _over_pairs(_inner_products(self.models, alignments, self.workers))
        return _Ascent(alignments, objective, converged, gap)

    def _sum(self, alignments: Sequence[Alignment], indices: Sequence[int]) -> Parameters:
        return summed([self.models[index] for index in indices], [alignments[index] for index in indices])


def summed(models: Sequence[Parameters], alignments: Sequence[Alignment]) -> Parameters:
    """Sums the moved weights of some models, Σ Tᵢθᵢ, in float64.

    Args:
        models: One or more models with the same tensors.
        alignments: The transforms of each.

    Returns:
        Tensors by the names of the first model, summed when they are read and kept up to `KEPT` bytes.
    """
    first = models[0]
    kept: dict[str, Tensor] = {}
    changing = threading.Lock()

    def read(name: str) -> Tensor:
        if name in kept:
            return kept[name]
        bound = first.binding.tensors[name]
        moved = _moved((bound.spec.name, bound.index), models, alignments)
        total = next(moved).double()
        for tensor in moved:
            total = total + tensor.to(total.device)
        with changing:
            if total.nbytes + sum(tensor.nbytes for tensor in kept.values()) <= KEPT:
                kept[name] = total
        return total

    return Parameters(first.binding, read, f"the sum of {len(models)} models")


def _moved(key: Key, models: Sequence[Parameters], alignments: Sequence[Alignment]) -> Iterator[Tensor]:
    """Reads one tensor of every model, moved."""
    for model, alignment in zip(models, alignments, strict=True):
        yield model.aligned(model.keys[key], alignment)


def _inner_products(models: Sequence[Parameters], alignments: Sequence[Alignment], workers: Workers) -> Tensor:
    """Inner products ⟨Tᵢθᵢ, Tⱼθⱼ⟩ of all pairs of models over the tensors with a symmetric axis, float64 `[N, N]`.

    Raises:
        AlignmentError: A tensor holds NaN or Inf.
    """
    binding = models[0].binding
    keys = Gains(models[0], models[0]).keys(set(binding.spec.symmetric_axes))
    elements = [float(prod(binding.tensors[models[0].keys[key]].spec.shape(binding.sizes))) for key in keys]

    def products_of(key: Key) -> Tensor:
        rows = [tensor.reshape(-1).split(CACHED) for tensor in _moved(key, models, alignments)]
        products_ij = torch.zeros(len(models), len(models), dtype=torch.float64)
        for parts in zip(*rows, strict=True):
            part_ik = torch.stack([part.to(parts[0].device).double() for part in parts])
            products_ij += (part_ik @ part_ik.T).cpu()
        return products_ij

    products = workers.map(products_of, keys, costs=elements)
    problems = [
        f"{model.keys[key]} of {model.label or f'model {index}'}"
        for key, products_ij in zip(keys, products, strict=True)
        for index, model in enumerate(models)
        if not math.isfinite(products_ij[index, index])
    ]
    raise_all(problems, AlignmentError, "weight matching needs finite weights, NaN or Inf found")
    return sum(products, torch.zeros(len(models), len(models), dtype=torch.float64))


def _over_pairs(products_ij: Tensor) -> float:
    """Sum over all pairs of two different models; of inner products it is F."""
    return float(products_ij.triu(1).sum())


def _mean_cosine(products_ij: Tensor) -> float:
    """Mean cosine over all pairs of two different models."""
    norms = products_ij.diagonal().sqrt()
    scales = torch.outer(norms, norms)
    cosines = torch.where(scales > 0, products_ij / scales, 1.0)
    return _over_pairs(cosines) / (len(norms) * (len(norms) - 1) / 2)
