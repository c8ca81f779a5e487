"""The objective of matching by definition, and a toy spec small enough to try every transform."""

from collections.abc import Iterator, Mapping
from itertools import permutations, product

import torch
from torch import Tensor

from hf_llfc.alignment import Parameters
from hf_llfc.symmetry import Alignment, Permutation, PermutationSpec

# Experts once in names and once in a shape, heads in groups, an axis that one tensor holds twice.
TOY = PermutationSpec.from_lines(
    [
        "embed  5 residual",
        "up.<experts>  neurons[experts] residual",
        "down.<experts>  residual neurons[experts]",
        "router  experts residual",
        "query  (kv q[kv] 2) residual",
        "key  (kv 2) residual",
        "fused  experts wide + wide residual",
        "mean~  residual",
    ],
    sizes={"residual": 3, "experts": 2, "neurons": 3, "kv": 2, "q": 2, "wide": 4},
    symmetric=["residual", "experts", "neurons", "kv", "q", "wide"],
)
SQUARE = PermutationSpec.from_lines(
    ["square  residual residual", "bias  residual"], sizes={"residual": 5}, symmetric=["residual"]
)


def toy_state(seed: int, spec: PermutationSpec = TOY) -> dict[str, Tensor]:
    """Random tensors for every declaration."""
    random = torch.Generator().manual_seed(seed)
    sizes = {axis.name: axis.size for axis in spec.axes.values()}
    state = {}
    for tensor in spec.declarations:
        for index in product(*(range(sizes[axis]) for axis in tensor.name_axes)):
            state[tensor.name_at(index)] = torch.randn(tensor.shape(sizes), generator=random, dtype=torch.float64)
    return state


def parameters(spec: PermutationSpec, state: Mapping[str, Tensor]) -> Parameters:
    return Parameters.from_state_dict(spec, state)


def objective(a: Mapping[str, Tensor], b: Mapping[str, Tensor], alignment: Alignment) -> float:
    """Σ ⟨A, T·B⟩ over the tensors that hold a symmetric axis and are no statistics."""
    binding = alignment.spec.bind({name: tensor.shape for name, tensor in a.items()})
    moved = alignment.apply({name: tensor.double() for name, tensor in b.items()})
    symmetric = set(alignment.spec.symmetric_axes)
    return sum(
        float((a[name].double() * moved[name]).sum())
        for name, bound in binding.tensors.items()
        if not bound.spec.statistic and any(use.axis in symmetric for use in bound.spec.axes)
    )


def every_transform(spec: PermutationSpec, *axes: str) -> Iterator[dict[str, Permutation]]:
    """Every transform of some axes, in every combination."""
    choices = []
    for name in axes:
        axis = spec.axes[name]
        rows = [torch.tensor(row) for row in permutations(range(axis.size))]
        if axis.parent is None:
            choices.append([Permutation(row) for row in rows])
        else:
            several = product(rows, repeat=spec.axes[axis.parent].size)
            choices.append([Permutation(torch.stack(chosen)) for chosen in several])
    for combination in product(*choices):
        yield dict(zip(axes, combination, strict=True))


def with_transforms(alignment: Alignment, transforms: Mapping[str, Permutation]) -> Alignment:
    return Alignment(alignment.spec, {**alignment.transforms, **transforms})
