"""Tensors and settings that every merge method is tried on, and what the oracle and mergekit make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_llfc.merging.methods import Base, Settings, find_method
from hf_llfc.merging.methods.ranking import Draws, keep_by_rank
from tests.merging.methods import oracle

SHAPES = ((24, 40), (40, 24), (64,), (), (8, 3, 5, 4), (1, 48), (30, 1))
"""Matrices, a vector, a scalar, the kernel of a convolution, one row, one column."""

KINDS = ("fine-tuned", "independent", "rounded", "identical", "zero", "constant", "one changed")


@dataclass(frozen=True)
class Case:
    """One method with one choice of settings.

    Attributes:
        method: Its name.
        models: How many models are merged, the base not counted.
        values: Parameter → value.
        with_base: Whether there is a base; None takes what the method requires.
    """

    method: str
    models: int
    values: Mapping[str, Any] = field(default_factory=dict)
    with_base: bool | None = None

    @property
    def has_base(self) -> bool:
        return find_method(self.method).base is Base.REQUIRED if self.with_base is None else self.with_base

    def __str__(self) -> str:
        values = ",".join(f"{key}={value}" for key, value in self.values.items())
        return f"{self.method}-{self.models}{'+base' if self.with_base else ''}-{values}"

    def settings(self, **options: Any) -> Settings:
        return find_method(self.method).settings(self.values, models=self.models, **options)


def _thinned(method: str, **values: Any) -> Iterator[Case]:
    yield Case(method, 2, {"weight": [0.5, 0.5], **values})
    yield Case(method, 3, {"weight": [1.0, 0.3, 0.5], "density": [0.3, 0.5, 1.0], "normalize": True, **values})
    yield Case(method, 3, {"weight": [1.0, 0.3, 0.5], "density": 0.5, "normalize": False, "rescale": True, **values})
    yield Case(method, 2, {"weight": [0.71, -0.2], "density": 0.6, "lambda": 0.4, "rescale": False, **values})
    yield Case(method, 2, {"weight": [1.0, -1.0], "density": 0.4, "normalize": True, **values})
    yield Case(method, 4, {"weight": [0.25] * 4, "density": 0.2, "normalize": True, "lambda": 1.7, **values})
    yield Case(method, 1, {"weight": [0.8], "density": 0.5, "int8_mask": True, **values})


DETERMINISTIC = (
    Case("linear", 2, {"weight": [0.5, 0.5]}),
    Case("linear", 3, {"weight": [1.0, 0.3, 0.5]}),
    Case("linear", 3, {"weight": [1.0, 0.3, 0.5], "normalize": False}),
    Case("linear", 4, {"weight": [1.0, -0.5, 0.2, 0.9]}),
    Case("linear", 2, {"weight": [1.0, -1.0], "normalize": False}),
    Case("linear", 1, {"weight": [0.7]}),
    Case("passthrough", 1),
    Case("passthrough", 1, {"scale": [0.35]}),
    Case("passthrough", 1, {"scale": [0.0]}),
    *(Case("slerp", 1, {"t": t}) for t in (0.0, 0.3, 0.5, 1.0)),
    *(
        Case("nuslerp", 2, {"weight": weight, **flat}, base)
        for weight in ([1.0, 1.0], [0.2, 0.6], [1.0, -1.0])
        for flat in ({}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True})
        for base in (False, True)
    ),
    *(
        Case("multislerp", len(weight), {"weight": weight, **extra}, base)
        for weight in ([0.5, 0.5], [1.0, 0.2, 0.4], [0.1, 0.2, 0.3, 0.4])
        for extra in ({}, {"normalize_weights": False}, {"eps": 1e-5})
        for base in (False, True)
    ),
    Case("multislerp", 1, {"weight": [0.5]}, True),
    *(Case("karcher", count, extra) for count in (1, 2, 3, 4) for extra in ({}, {"max_iter": 2, "tol": 1e-3})),
    *(Case("model_stock", count, {"filter_wise": rows}) for count in (2, 3, 4) for rows in (False, True)),
    *(Case("nearswap", 1, {"t": t}) for t in (0.0, 1e-4, 0.01, 10.0)),
    Case("arcee_fusion", 1),
    *_thinned("task_arithmetic"),
    *_thinned("ties"),
    Case("ties", 2, {"weight": [0.5, 0.5], "density": 0.0}),
    Case("ties", 2, {"weight": [0.5, 0.5], "density": 1e-6}),
    *_thinned("breadcrumbs"),
    *_thinned("breadcrumbs", gamma=0.2),
    *_thinned("breadcrumbs_ties"),
    *_thinned("breadcrumbs_ties", gamma=[0.6] * 4),
    *(Case("sce", count, {"int8_mask": count == 2}) for count in (1, 2, 3, 4)),
    *(Case("sce", 3, {"select_topk": share}) for share in (0.0, 0.2, 0.75)),
    *(Case("ram", count, {"epsilon": epsilon}) for count in (1, 2, 3, 4) for epsilon in (1e-5, 0.01)),
    Case("ramplus_tl", 1),
    Case("ramplus_tl", 2),
    Case("ramplus_tl", 3, {"r": 0.5, "alpha": 1.5, "epsilon": 0.01}),
    Case("ramplus_tl", 4, {"epsilon": 0.01}),
)
"""Methods that mergekit has and that draw nothing."""

RANDOM = tuple(
    Case(case.method, case.models, {key: value for key, value in case.values.items() if key != "gamma"})
    for method in ("dare_linear", "dare_ties", "della", "della_linear")
    for case in _thinned(method)
)
"""Methods that mergekit has and that draw."""

SPECTRAL = (
    *(Case("tsv_m", count) for count in (1, 2, 3, 4)),
    Case("tsv_m", 2, {"lambda": 0.7}),
    *(Case("iso_c", count, {"lambda": scale}) for count in (1, 2, 3) for scale in (1.0, 1.4)),
    *(Case("iso_cts", count) for count in (1, 2, 3, 4)),
    *(Case("iso_cts", 2, {"common_space_fraction": share, "lambda": 1.3}) for share in (0.0, 0.5, 1.0)),
    *(Case("wudi", count, {"normalize": each}) for count in (1, 2, 3, 4) for each in (True, False)),
    Case("wudi", 2, {"epsilon": 0.1, "lambda": 0.5}),
    *(Case("ace", count, {"heterogeneity": limit}) for count in (2, 3, 4) for limit in (0.0, 10.0)),
    *(
        Case("ace", 3, {"heterogeneity": 0.0, **part})
        for part in ({"prior": 0.0}, {"center": False}, {"refined_share": 0.0}, {"epsilon": 0.5, "lambda": 0.6})
    ),
    Case("ace", 2, {"heterogeneity": 10.0, "prior": 3.0}),
)
"""Methods that decompose matrices, which no merging tool has."""


def _trimmed(case: Case) -> Case:
    """A case whose lists have as many values as models."""
    values = {key: value[: case.models] if isinstance(value, list) else value for key, value in case.values.items()}
    return Case(case.method, case.models, values, case.with_base)


DETERMINISTIC = tuple(_trimmed(case) for case in DETERMINISTIC)


def tensors(kind: str, shape: tuple[int, ...], count: int, seed: int) -> tuple[Tensor, list[Tensor]]:
    """A base and models, in float32."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(shape, generator=generator)

    base = noise()
    if kind == "fine-tuned":
        return base, [base + 0.02 * (i + 1) * noise() for i in range(count)]
    if kind == "independent":
        return base, [noise() for _ in range(count)]
    if kind == "rounded":  # to steps of 1/16, so that many magnitudes are equal
        return (base * 4).round() / 4, [(noise() * 16).round() / 16 for _ in range(count)]
    if kind == "identical":
        model = base + 0.1 * noise()
        return base, [model.clone() for _ in range(count)]
    if kind == "zero":
        return torch.zeros(shape), [torch.zeros(shape) for _ in range(count)]
    if kind == "constant":
        return torch.full(shape, 0.5), [torch.full(shape, 0.5 + 0.125 * (i + 1)) for i in range(count)]
    assert kind == "one changed"
    return base, [base + 0.05 * noise() if i == 0 else base.clone() for i in range(count)]


def masks_of(case: Case, base: Tensor, models: list[Tensor], settings: Settings) -> list[np.ndarray | None]:
    """What a method keeps of every task vector: drawn as the package draws, or found by the oracle."""
    masks: list[np.ndarray | None] = []
    for index, (model, density) in enumerate(zip(models, settings.numbers("density"), strict=True)):
        change = (model - base).numpy()  # in float32, in which ranks are those of mergekit
        draws = Draws(settings.seed_of(index))
        if density >= 1 or case.method == "task_arithmetic":
            masks.append(None)
        elif case.method == "ties":
            masks.append(oracle.kept_largest(change, density))
        elif case.method.startswith("breadcrumbs"):
            masks.append(oracle.kept_between(change, density, settings.numbers("gamma")[index]))
        elif case.method.startswith("dare"):
            masks.append(draws.keep(density, base.numel()).view(base.shape).numpy().astype(float))
        else:
            epsilon = settings.numbers("epsilon")[index]
            magnitudes = (model - base).abs()
            rows = magnitudes.movedim(1, -1) if base.dim() > 2 else magnitudes
            columns = rows.shape[-1] if base.dim() > 1 else base.numel()
            kept = keep_by_rank(rows.reshape(-1, columns), density - epsilon, density + epsilon, draws)
            kept = kept.view(rows.shape).movedim(-1, 1) if base.dim() > 2 else kept.view(base.shape)
            masks.append(kept.numpy().astype(float))
    return masks


def exact(case: Case, base: Tensor, models: list[Tensor], settings: Settings) -> Tensor:
    """What the oracle says."""
    of_base, of_models = base.double().numpy(), oracle.arrays(models)
    values = {**settings.shared, **settings.of_models}
    if {"density", "weight"} <= values.keys():
        return oracle.as_tensor(
            oracle.thinned(
                of_models,
                of_base,
                masks_of(case, base, models, settings),
                weight=settings.numbers("weight"),
                elect=case.method in ("ties", "dare_ties", "breadcrumbs_ties", "della"),
                normalize=settings.switch("normalize"),
                rescale=settings.switch("rescale"),
                scale=settings.number("lambda"),
            )
        )
    values.pop("int8_mask", None)
    values.pop("exact_size", None)
    if "lambda" in values:
        values["scale"] = values.pop("lambda")
    if "common_space_fraction" in values:
        values["fraction"] = values.pop("common_space_fraction")
    function: Callable[..., Any] = vars(oracle)[case.method]
    return oracle.as_tensor(function(of_models, **({"base": of_base} if case.has_base else {}), **values))
