"""What tells merges apart before they are made: how large the models' changes of their base are, and how alike.

τᵢ = θᵢ − θ₀ is a model's task vector. Everything comes from one pass over the weights, or over a random sample of the
tensors, with one tensor of each model in memory. docs/methods.md says what was measured of merges by these numbers.

Shape suffixes: `t` the models, `c` some elements of a tensor, `oi` outputs and inputs, `k` singular values.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from hf_llfc.checkpoints import TensorInfo
from hf_llfc.checkpoints.buffers import is_parameter
from hf_llfc.checkpoints.source import Source
from hf_llfc.errors import CheckpointError
from hf_llfc.foundation.progress import Progress, silent

CHUNK = 2**18
"""Elements of a tensor that are converted to float64 at a time."""

SAMPLE_BYTES = 2**29
"""Of all models together, that are read of a sample."""

DIRECTIONS = 16
"""Singular vectors of a matrix that are compared."""

MATRICES = 4
"""Matrices that are decomposed, at most: it costs more than all the rest."""

EXACT_SIZE = 256
"""Matrices whose smaller side is longer are decomposed by a randomised search, in float32: Halko et al., 2011."""

ITERATIONS = 3
"""Power iterations of a randomised search."""

NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest are rounding."""


@dataclass(frozen=True)
class TaskVectors:
    """How large the task vectors of some models are, and how alike.

    Attributes:
        models: What the models are called.
        changes: ‖τᵢ‖ / ‖θ₀‖, one a model.
        stable_ranks: ‖τᵢ‖²_F / ‖τᵢ‖²₂, the mean over matrices, one a model; None where no matrix was changed.
        pairs: The models of each pair, as places in `models`; the numbers below are one a pair.
        cosines: Of the two task vectors; 0 where one is zero.
        signs: Share of the elements that both changed which they changed in the same direction; None where there are
            none. Chance is 0.5.
        overlaps: ‖UᵀU'‖²_F / k with U and U' the first k singular vectors of both, the mean of left and right and over
            matrices: 1 of equal subspaces; None where no matrix was changed by both.
        chance: What `overlaps` would be of random subspaces.
        tensors: How many tensors were read, and how many there are.
        nbytes: How many bytes were read.
    """

    models: tuple[str, ...]
    changes: tuple[float, ...]
    stable_ranks: tuple[float | None, ...]
    pairs: tuple[tuple[int, int], ...]
    cosines: tuple[float, ...]
    signs: tuple[float | None, ...]
    overlaps: tuple[float | None, ...]
    chance: float | None
    tensors: tuple[int, int]
    nbytes: int

    def mean(self, name: str) -> float | None:
        """The mean over the models or pairs of what was found of one of the quantities; None where nothing was."""
        found = [value for value in getattr(self, name) if value is not None]
        return sum(found) / len(found) if found else None


@dataclass
class _Sums:
    """What is added up over tensors, for n models."""

    n: int
    base: float = 0.0
    products_tt: Tensor = field(init=False)
    agreeing_tt: Tensor = field(init=False)
    changed_tt: Tensor = field(init=False)
    ranks: list[list[float]] = field(init=False)
    overlaps: dict[tuple[int, int], list[float]] = field(init=False)
    chances: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.products_tt, self.agreeing_tt, self.changed_tt = torch.zeros(3, self.n, self.n, dtype=torch.float64)
        self.ranks = [[] for _ in range(self.n)]
        self.overlaps = {pair: [] for pair in combinations(range(self.n), 2)}


def gram(tensors: Sequence[Tensor]) -> Tensor:
    """Inner products of some tensors with each other, in float64.

    Args:
        tensors: Of one shape.

    Returns:
        As many rows and columns as there are tensors.
    """
    return sum(
        (rows_tc @ rows_tc.T for rows_tc in _rows(tensors)), torch.zeros((len(tensors),) * 2, dtype=torch.float64)
    )


def compare_task_vectors(
    models: Sequence[Source],
    base: Source,
    infos: Mapping[str, TensorInfo],
    *,
    sample_bytes: int | None = SAMPLE_BYTES,
    progress: Progress = silent,
) -> TaskVectors:
    """Compares what models have changed of their base, reading one tensor of each at a time.

    Args:
        models: The models, at least one.
        base: Their base model, in the same coordinates.
        infos: Name → dtype and shape of their tensors; buffers are left out.
        sample_bytes: Bytes to read of all models together, of tensors chosen at random, the same ones for the same
            names; one is always read. None reads all.
        progress: Shown meanwhile.

    Raises:
        CheckpointError: A tensor cannot be read or is not finite.
    """
    trained = [name for name, info in infos.items() if is_parameter(name, info)]
    chosen = _sample(trained, infos, len(models) + 1, sample_bytes)
    sums = _Sums(len(models))
    decomposed = set(_matrices(chosen, infos))
    nbytes = 0
    for done, name in enumerate(chosen):
        progress("comparing task vectors", done, len(chosen))
        tensors = [source.read(name) for source in (base, *models)]
        nbytes += sum(tensor.nbytes for tensor in tensors)
        _add(sums, tensors, name, [source.label for source in (base, *models)])
        if name in decomposed:
            _decompose(sums, tensors)
    norms = sums.products_tt.diagonal().sqrt().tolist()
    pairs = tuple(sums.overlaps)
    apart = [norms[i] * norms[j] for i, j in pairs]
    return TaskVectors(
        models=tuple(source.label for source in models),
        changes=tuple(norm / math.sqrt(sums.base) if sums.base else 0.0 for norm in norms),
        stable_ranks=tuple(_mean(ranks) for ranks in sums.ranks),
        pairs=pairs,
        cosines=tuple(
            float(sums.products_tt[pair]) / size if size else 0.0 for pair, size in zip(pairs, apart, strict=True)
        ),
        signs=tuple(
            float(1 + sums.agreeing_tt[pair] / sums.changed_tt[pair]) / 2 if sums.changed_tt[pair] else None
            for pair in pairs
        ),
        overlaps=tuple(_mean(sums.overlaps[pair]) for pair in pairs),
        chance=_mean(sums.chances),
        tensors=(len(chosen), len(trained)),
        nbytes=nbytes,
    )


def _sample(names: Sequence[str], infos: Mapping[str, TensorInfo], models: int, limit: int | None) -> list[str]:
    """Names of tensors that are read, in the order of the files."""
    if limit is None:
        return list(names)
    shuffled = sorted(names)
    random.Random(0).shuffle(shuffled)
    left = limit
    chosen: set[str] = set()
    for name in shuffled:
        if infos[name].nbytes * models <= left or (not chosen and name == shuffled[-1]):
            chosen.add(name)
            left -= infos[name].nbytes * models
    return [name for name in names if name in chosen]


def _matrices(names: Sequence[str], infos: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Names of the matrices that are decomposed: evenly spread, without the tables of vocabularies."""
    found = [
        name
        for name in names
        if len(infos[name].shape) > 1
        and min(sides := _sides(infos[name].shape)) >= 2 * DIRECTIONS
        and max(sides) <= 16 * min(sides)
    ]
    count = min(MATRICES, len(found))
    return (found[place * len(found) // count] for place in range(count))


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    """Outputs, and the rest."""
    return shape[0], math.prod(shape[1:])


def _rows(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Some elements of all tensors in float64, one tensor a row, until all were there."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), CHUNK):
        yield torch.stack([tensor[start : start + CHUNK].double() for tensor in flat])


def _add(sums: _Sums, tensors: Sequence[Tensor], name: str, labels: Sequence[str]) -> None:
    """Adds one tensor of the base and of every model."""
    for rows_tc in _rows(tensors):
        sums.base += float(rows_tc[0] @ rows_tc[0])
        tasks_tc = rows_tc[1:] - rows_tc[0]
        products_tt = tasks_tc @ tasks_tc.T
        if not bool(products_tt.isfinite().all()):
            broken = [bool(row_c.isfinite().all()) for row_c in rows_tc].index(False)
            raise CheckpointError(
                f"{name} of {labels[broken]}: some elements are NaN or infinite; the file is damaged or the training "
                "diverged: use another checkpoint or revision"
            )
        sums.products_tt += products_tt
        signs_tc = tasks_tc.sign().float()  # whole numbers, exact up to 2²⁴
        changed_tc = signs_tc.abs()
        sums.agreeing_tt += signs_tc @ signs_tc.T
        sums.changed_tt += changed_tc @ changed_tc.T


def _decompose(sums: _Sums, tensors: Sequence[Tensor]) -> None:
    """Adds the first singular vectors of one matrix."""
    sides = _sides(tensors[0].shape)
    found = []
    for place, tensor in enumerate(tensors[1:]):
        task_oi = tensor.reshape(sides).float() - tensors[0].reshape(sides).float()
        left_ok, values_k, right_ik = _leading(task_oi)
        found.append((left_ok, right_ik))
        if values_k.numel():
            sums.ranks[place].append(float(task_oi.double().square().sum()) / float(values_k[0]) ** 2)
    for (i, j), overlaps in sums.overlaps.items():
        count = min(found[i][0].shape[1], found[j][0].shape[1])
        if count:
            both = [
                (one[:, :count].T @ other[:, :count]).square().sum()
                for one, other in zip(found[i], found[j], strict=True)
            ]
            overlaps.append(float(sum(both)) / 2 / count)
            sums.chances.append(sum(count / side for side in sides) / 2)


def _leading(matrix_oi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular vectors, as columns, and values, without negligible ones."""
    if min(matrix_oi.shape) <= EXACT_SIZE:
        left_ok, values_k, right_ki = torch.linalg.svd(matrix_oi.double(), full_matrices=False)
        right_ik = right_ki.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left_ok, values_k, right_ik = torch.svd_lowrank(matrix_oi, q=2 * DIRECTIONS, niter=ITERATIONS)
    count = min(DIRECTIONS, int((values_k > NEGLIGIBLE * values_k[0]).sum()))
    return left_ok[:, :count], values_k[:count], right_ik[:, :count]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
