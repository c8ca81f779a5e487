"""A method goes by no more of its models than it says: changes alone, or their subspace alone."""

import pytest
import torch
from torch import Tensor

from hf_llfc.merging.methods import MERGE_METHODS, Base, Sees

ROWS, COLUMNS, MODELS = 24, 18, 2
TOLD = [method for method in MERGE_METHODS.values() if not method.importance]


def changes_of(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [0.05 * normal(ROWS, rank) @ normal(rank, COLUMNS) for _ in range(MODELS)]


def merged(name: str, changes: list[Tensor], base: Tensor) -> Tensor:
    """What a method makes of models with these changes of a base, less the base."""
    method = MERGE_METHODS[name]
    low, high = method.inputs
    changes = changes[: max(low, min(len(changes), high or MODELS))]
    given = {"weight": 1 / len(changes), "t": 0.3, "density": 0.5}
    known = {parameter.name for parameter in method.parameters}
    values = {key: value for key, value in given.items() if key in known}
    settings = method.settings(values, models=len(changes))
    beside = None if method.base is Base.NONE else base
    return method.merge([base + change for change in changes], beside, settings, torch.float64) - base


@pytest.mark.parametrize("method", TOLD, ids=lambda method: method.name)
def test_a_method_of_changes_does_not_see_the_base(method):
    base = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    changes = changes_of(COLUMNS)
    over_base, over_zero = (merged(method.name, changes, each) for each in (base, torch.zeros_like(base)))
    is_same = torch.allclose(over_base, over_zero, atol=1e-7)
    assert is_same == (method.sees is not Sees.WEIGHTS)


@pytest.mark.parametrize(
    "method", [each for each in TOLD if each.sees is Sees.SUBSPACE], ids=lambda method: method.name
)
def test_a_method_of_the_subspace_does_not_see_rotations_and_zeros_around(method):
    changes = changes_of(3)
    rows = torch.linalg.svd(torch.cat(changes, dim=1)).U[:, : 2 * 3]
    columns = torch.linalg.svd(torch.cat(changes)).Vh[: 2 * 3].T
    cores = [rows.T @ change @ columns for change in changes]
    whole = merged(method.name, changes, torch.zeros(ROWS, COLUMNS, dtype=torch.float64))
    core = merged(method.name, cores, torch.zeros(2 * 3, 2 * 3, dtype=torch.float64))
    assert torch.allclose(rows @ core @ columns.T, whole, atol=1e-9)
