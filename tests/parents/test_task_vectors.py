"""Task vectors are compared as NumPy compares them in float64, whatever is read at a time."""

from itertools import combinations
from math import inf, nan

import numpy as np
import pytest
import torch

from hf_llfc.checkpoints import TensorInfo
from hf_llfc.checkpoints.source import Source
from hf_llfc.errors import CheckpointError
from hf_llfc.parents import task_vectors
from hf_llfc.parents.task_vectors import DIRECTIONS, compare_task_vectors, gram

SHAPES = {"a.weight": (48, 64), "kernel.weight": (40, 5, 3, 3), "a.bias": (48,), "embed.weight": (900, 32)}


def models(count, seed=0, dtype=torch.float32):
    """A base and models that changed it, alike in part."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    common = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    changed = []
    for place in range(count):
        tensors = {}
        for name, shape in SHAPES.items():
            own = torch.randn(shape, generator=generator) * (place + 1)
            tensors[name] = (base[name].float() + 0.1 * (common[name] + own)).to(dtype)
        changed.append(tensors)
    return base, changed


def compared(base, changed, **settings):
    everyone = [
        Source(name, tensors.__getitem__)
        for name, tensors in zip(["base", "one", "two", "three"], [base, *changed], strict=False)
    ]
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in base.items()}
    return compare_task_vectors(everyone[1:], everyone[0], infos, sample_bytes=None, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [7, 2**18])
def test_numbers_are_those_of_float64(chunk, dtype, monkeypatch):
    monkeypatch.setattr(task_vectors, "CHUNK", chunk)
    base, changed = models(3, dtype=dtype)
    found = compared(base, changed)
    flat = [np.concatenate([each[name].double().numpy().ravel() for name in SHAPES]) for each in (base, *changed)]
    tasks = [each - flat[0] for each in flat[1:]]
    norms = [np.linalg.norm(task) for task in tasks]
    assert found.models == ("one", "two", "three") and found.pairs == ((0, 1), (0, 2), (1, 2))
    assert found.changes == pytest.approx([norm / np.linalg.norm(flat[0]) for norm in norms], rel=1e-12)
    for place, (i, j) in enumerate(combinations(range(3), 2)):
        assert found.cosines[place] == pytest.approx(tasks[i] @ tasks[j] / norms[i] / norms[j], abs=1e-12)
        both = (tasks[i] != 0) & (tasks[j] != 0)
        assert found.signs[place] == pytest.approx(
            np.mean(np.sign(tasks[i])[both] == np.sign(tasks[j])[both]), abs=1e-12
        )
    assert found.tensors == (4, 4) and found.nbytes == 4 * sum(tensor.nbytes for tensor in base.values())


def test_subspaces_are_those_of_a_singular_value_decomposition():
    base, changed = models(3)
    found = compared(base, changed)
    ranks, overlaps, chances = [[], [], []], [[], [], []], []
    for name in ("a.weight", "kernel.weight"):  # a table of a vocabulary is left out
        rows = SHAPES[name][0]
        parts = [
            np.linalg.svd((each[name].double() - base[name].double()).reshape(rows, -1).numpy()) for each in changed
        ]
        for rank, (_, values, _) in zip(ranks, parts, strict=True):
            rank.append((values**2).sum() / values[0] ** 2)
        for place, (i, j) in enumerate(combinations(range(3), 2)):
            left = parts[i][0][:, :DIRECTIONS].T @ parts[j][0][:, :DIRECTIONS]
            right = parts[i][2][:DIRECTIONS] @ parts[j][2][:DIRECTIONS].T
            overlaps[place].append(((left**2).sum() + (right**2).sum()) / 2 / DIRECTIONS)
        chances.append(np.mean([DIRECTIONS / parts[0][0].shape[0], DIRECTIONS / parts[0][2].shape[0]]))
    assert found.stable_ranks == pytest.approx([np.mean(each) for each in ranks], rel=1e-5)
    assert found.overlaps == pytest.approx([np.mean(each) for each in overlaps], rel=1e-5)
    assert found.chance == pytest.approx(np.mean(chances))
    assert found.mean("overlaps") == pytest.approx(np.mean(overlaps), rel=1e-5)


def test_large_matrices_are_searched_at_random(monkeypatch):
    """Where leading directions stand out, the search finds them."""
    generator = torch.Generator().manual_seed(0)
    strong = torch.randn(96, DIRECTIONS, generator=generator) @ torch.randn(DIRECTIONS, 80, generator=generator)
    base = {"weight": torch.zeros(96, 80)}
    changed = [{"weight": strong + 0.01 * torch.randn(96, 80, generator=generator)} for _ in range(2)]
    exact = compared(base, changed)
    monkeypatch.setattr(task_vectors, "EXACT_SIZE", 8)
    searched = compared(base, changed)
    assert exact.overlaps[0] > 0.99
    assert searched.overlaps == pytest.approx(exact.overlaps, abs=1e-3)
    assert searched.stable_ranks == pytest.approx(exact.stable_ranks, rel=1e-3)


def test_equal_and_unchanged_models_have_numbers_too():
    base, (one,) = models(1)
    found = compared(base, [one, one, base])
    assert found.cosines == pytest.approx([1, 0, 0]) and found.changes[2] == 0
    assert (found.signs[0], found.signs[1]) == (1, None)
    assert found.overlaps[0] == pytest.approx(1) and found.overlaps[1:] == (None, None)
    assert found.stable_ranks[0] > 1 and found.stable_ranks[2] is None
    alone = compared(base, [one])
    assert alone.pairs == () and alone.mean("cosines") is None
    assert alone.changes == pytest.approx(found.changes[:1])


@pytest.mark.parametrize("value", [nan, inf])
def test_a_damaged_model_is_named(value):
    base, changed = models(2)
    changed[1]["a.bias"][3] = value
    with pytest.raises(CheckpointError, match=r"a\.bias of two: some elements are NaN or infinite"):
        compared(base, changed)


def test_a_sample_is_bounded_and_always_the_same():
    names = [f"layers.{layer}.{kind}.weight" for layer in range(20) for kind in ("q", "k", "v")]
    infos = {name: TensorInfo(torch.float32, (32, 32)) for name in names} | {"ids": TensorInfo(torch.int64, (5,))}
    tensors = {name: torch.randn(32, 32) for name in names}
    read = []
    source = Source("model", lambda name: read.append(name) or tensors[name])
    limit = 2 * 10 * 32 * 32 * 4
    first = compare_task_vectors([source], source, infos, sample_bytes=limit)
    assert first.tensors == (10, 60) and first.nbytes == limit and len(set(read)) == 10
    assert len({name.split(".")[2] for name in read}) == 3, "all kinds of tensors"
    before = list(read)
    compare_task_vectors([source], source, dict(reversed(infos.items())), sample_bytes=limit)
    assert sorted(read[20:]) == sorted(before)
    smallest = compare_task_vectors([source], source, infos, sample_bytes=1)
    assert smallest.tensors == (1, 60)


def test_inner_products_are_summed_in_float64(monkeypatch):
    monkeypatch.setattr(task_vectors, "CHUNK", 10)
    tensors = [torch.randn(7, 9, generator=torch.Generator().manual_seed(seed)).half() for seed in range(3)]
    flat = np.stack([tensor.double().numpy().ravel() for tensor in tensors])
    np.testing.assert_allclose(gram(tensors).numpy(), flat @ flat.T, rtol=1e-14)
