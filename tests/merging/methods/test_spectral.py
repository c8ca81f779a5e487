"""Methods that decompose matrices, against singular value decompositions and inverses in float64."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_llfc.merging.methods import find_method
from hf_llfc.merging.methods.decompositions import (
    OVERSAMPLING,
    WORTHWHILE,
    between_polar_factors,
    gram,
    inverse_root,
    singular,
)
from tests.merging.methods.cases import SPECTRAL, Case, exact, tensors

MATRICES = ((24, 40), (40, 24), (30, 30), (9, 40))


def decaying(rows, columns, generator, rate=0.9):
    """A matrix with singular values rate⁰, rate¹ and so on."""
    side = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, side, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, side, generator=generator, dtype=torch.float64)).Q
    return left * rate ** torch.arange(side, dtype=torch.float64) @ right.T


@pytest.mark.parametrize("kind", ["fine-tuned", "independent"])
@pytest.mark.parametrize("case", SPECTRAL, ids=str)
def test_values_are_those_of_the_formula(case, kind):
    method = find_method(case.method)
    for seed, shape in enumerate(MATRICES):
        base, models = tensors(kind, shape, case.models, seed)
        settings = case.settings()
        reference = exact(case, base, models, settings)
        wide = method.merge([model.double() for model in models], base.double(), settings)
        size = reference.abs().max().item()
        torch.testing.assert_close(wide, reference, rtol=0, atol=1e-8 * size)
        torch.testing.assert_close(method.merge(models, base, settings).double(), reference, rtol=0, atol=1e-7 * size)


def test_both_branches_of_ace_are_tried():
    differ = Case("ace", 2, {"refined_share": 0.3, "heterogeneity": 0.0})
    alike = Case("ace", 2, {"refined_share": 0.3, "heterogeneity": 10.0})
    base, models = tensors("fine-tuned", (24, 40), 2, 0)
    merged = [find_method("ace").merge(models, base, case.settings()) for case in (differ, alike)]
    assert (merged[0] - merged[1]).abs().max() > 1e-3


@pytest.mark.parametrize("case", SPECTRAL, ids=str)
def test_a_kernel_of_a_convolution_is_outputs_by_the_rest(case):
    method, settings = find_method(case.method), case.settings()
    base, models = tensors("fine-tuned", (8, 3, 5, 4), case.models, 0)
    as_matrices = method.merge([model.view(8, 60) for model in models], base.view(8, 60), settings)
    assert torch.equal(method.merge(models, base, settings), as_matrices.view(8, 3, 5, 4))


@pytest.mark.parametrize("shape", [(64,), (), (1, 48), (30, 1), (1, 5, 6)], ids=str)
@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "wudi", "ace"])
def test_what_is_no_matrix_gets_the_mean(method, shape):
    base, models = tensors("fine-tuned", shape, 3, 0)
    merged = find_method(method).merge(models, base, find_method(method).settings({"lambda": 1.5}, models=3))
    mean = sum(model.double() - base.double() for model in models) / 3
    torch.testing.assert_close(merged.double(), base.double() + 1.5 * mean, rtol=0, atol=3e-7)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "wudi", "ace"])
def test_models_equal_to_the_base_give_the_base(method):
    base, _ = tensors("fine-tuned", (24, 40), 1, 0)
    merged = find_method(method).merge([base, base.clone()], base, find_method(method).settings({}, models=2))
    assert torch.equal(merged, base)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "wudi", "ace"])
def test_one_model_without_a_change_does_no_harm(method):
    base, models = tensors("one changed", (24, 40), 2, 0)
    merged = find_method(method).merge(models, base, find_method(method).settings({}, models=2))
    assert merged.isfinite().all() and not torch.equal(merged, base)


def test_equal_task_vectors_leave_their_top_part():
    base, models = tensors("identical", (24, 40), 3, 0)
    merged = find_method("tsv_m").merge(models, base, find_method("tsv_m").settings({}, models=3)).double()
    left, values, right = torch.linalg.svd((models[0] - base).double(), full_matrices=False)
    top = left[:, :8] * values[:8] @ right[:8]
    torch.testing.assert_close(merged, base.double() + top, rtol=0, atol=1e-5)


def test_wudi_of_one_model_is_that_model():
    base, models = tensors("fine-tuned", (24, 40), 1, 0)
    merged = find_method("wudi").merge(models, base, find_method("wudi").settings({"epsilon": 1e-9}, models=1))
    torch.testing.assert_close(merged, models[0], rtol=0, atol=1e-6)


def test_wudi_is_the_minimum_of_its_loss(generator):
    """The gradient of Σ cᵢ‖(Δ − τᵢ)τᵢᵀ‖²_F vanishes at Δ."""
    base = torch.zeros(12, 10, dtype=torch.float64)
    models = [torch.randn(12, 10, generator=generator, dtype=torch.float64) for _ in range(3)]
    settings = find_method("wudi").settings({"epsilon": 1e-9}, models=3)
    change = find_method("wudi").merge(models, base, settings).requires_grad_()
    loss = sum((((change - model) @ model.T) ** 2).sum() / (model**2).sum() for model in models)
    (slope,) = torch.autograd.grad(loss, change)
    assert slope.abs().max() <= 1e-7


def blocks_of(matrix):
    """A matrix in blocks of rows, its longer side, and the length of the shorter one."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return lambda: iter(tall.split(7)), tall.shape[1]


def test_negligible_directions_stay_out_of_polar_factors(generator):
    matrix = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    matrix = matrix @ torch.randn(3, 20, generator=generator, dtype=torch.float64)
    root, values = inverse_root(gram(*blocks_of(matrix)))
    torch.testing.assert_close(values.flip(0), torch.linalg.svdvals(matrix)[:3])
    found = torch.linalg.svdvals(matrix @ root)
    torch.testing.assert_close(found, torch.tensor([1.0] * 3 + [0.0] * 17, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("rows", "columns"), [(120, 200), (200, 120)])
@pytest.mark.parametrize("rate", [0.8, 0.97, 1.0])
def test_a_randomised_search_errs_by_no_more_than_it_says(rows, columns, rate, generator):
    matrix = decaying(rows, columns, generator, rate)
    count = 20
    exact_values = torch.linalg.svdvals(matrix)
    found = singular(*blocks_of(matrix), count, exact_size=64, seed=5)
    assert found.values_k.numel() == count
    norm = matrix.norm().item()
    # No value is too large, and all together they are too small by what was missed at most.
    assert (found.values_k <= exact_values[:count] * (1 + 1e-12)).all()
    lost = (exact_values[:count] ** 2 - found.values_k**2).sum().item()
    assert lost <= (found.missed * norm) ** 2 + 1e-12
    # What was missed is within the bound of Halko et al. for the expectation, theorem 10.5.
    best = exact_values[count:].norm().item()
    assert found.missed * norm <= math.sqrt(1 + count / (OVERSAMPLING - 1)) * best * (1 + 1e-9) + 1e-9
    identity = torch.eye(count, dtype=torch.float64)
    left = found.left(matrix if rows > columns else matrix.T)
    torch.testing.assert_close(left.T @ left, identity, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.right_ks @ found.right_ks.T, identity, rtol=0, atol=1e-7)
    assert found.values_k[0] == pytest.approx(exact_values[0].item(), rel=1e-2 if rate == 1.0 else 1e-6)


def test_a_search_for_many_directions_is_exact(generator):
    matrix = torch.randn(50, 80, generator=generator, dtype=torch.float64)
    found = singular(*blocks_of(matrix), int(WORTHWHILE * 50) + 1, exact_size=1, seed=0)
    assert found.missed == 0
    torch.testing.assert_close(found.values_k, torch.linalg.svdvals(matrix)[: found.values_k.numel()])


@pytest.mark.parametrize("method", ["tsv_m", "iso_cts", "ace"])
def test_randomised_and_exact_searches_agree_where_singular_values_fall(method, generator):
    base = torch.zeros(160, 200, dtype=torch.float64)
    models = [decaying(160, 200, generator, 0.85) for _ in range(4)]
    values = {} if method != "ace" else {"heterogeneity": 0.0}
    settings = [find_method(method).settings({"exact_size": size, **values}, models=4) for size in (64, 4096)]
    randomised, exactly = (find_method(method).merge(models, base, each) for each in settings)
    assert not torch.equal(randomised, exactly)
    torch.testing.assert_close(randomised, exactly, rtol=0, atol=1e-4 * exactly.abs().max().item())


@pytest.mark.parametrize("count", [6, 20])
def test_what_is_between_polar_factors_is_theirs(count, generator):
    left = torch.randn(40, count, generator=generator, dtype=torch.float64)
    right = torch.randn(count, 30, generator=generator, dtype=torch.float64)
    values = torch.rand(count, generator=generator, dtype=torch.float64)
    before = right.clone()
    found = left @ between_polar_factors(lambda: iter(left.split(7)), values, right)
    torch.testing.assert_close(found, polar(left) * values @ polar(right), rtol=0, atol=1e-10)
    assert torch.equal(right, before)


def polar(matrix):
    first, _, second = torch.linalg.svd(matrix, full_matrices=False)
    return first @ second


PEAK = """
import sys, torch
from pathlib import Path
from hf_llfc.merging.methods import find_method
from hf_llfc.merging.methods.parts import InMemory, merged_parts

method, settings = find_method("ace"), find_method("ace").settings({"heterogeneity": 0.0}, models=2)
base, *models = torch.randn(3, 6144, 512)

def held(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)

def merge(count):
    stream = InMemory([model[:count] for model in models], base[:count])
    for _ in merged_parts(method.prepared(stream, settings), stream):
        pass

merge(512)
before = held("VmRSS")
merge(6144)
print((held("VmHWM") - before) / 12288)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
def test_a_tall_matrix_takes_few_matrices_of_memory():
    """As large as the matrix in float32; the method that takes most of them."""
    said = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True).stdout
    assert float(said) < 9
