"""Whether the measures of a pair work on any model type: a check for benchmarks/zoo.py.

python benchmarks/zoo.py [TYPE …] --check tests.diagnostics.measures_zoo:examine --out measures.jsonl
"""

import copy
import dataclasses
import inspect
import math
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_llfc.adapters.derived.verify import randomise
from hf_llfc.diagnostics.features.layers import LOGITS, select_layers
from hf_llfc.diagnostics.features.vectors import sample_vectors_of
from hf_llfc.diagnostics.measures.additivity import Additivity
from hf_llfc.diagnostics.measures.commutativity import Commutativity
from hf_llfc.diagnostics.measures.geometry import Geometry
from hf_llfc.diagnostics.measures.settling import Lens
from hf_llfc.diagnostics.measures.stitching import changed_in_place, recorded, replaced
from hf_llfc.errors import EvaluationError
from hf_llfc.evaluation.models import evaluation_mode, model_inputs
from tests.tiny_models import FullDouble


def examine(model_type: str, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, Any] | str:
    """Facts about every measure of the model and another of random weights; a text if a number is wrong."""
    other = copy.deepcopy(model)
    randomise(other, torch.Generator().manual_seed(1))
    sample_ids = torch.arange(len(next(iter(inputs.values()))))
    facts: dict[str, Any] = {}
    with FullDouble(), evaluation_mode(model, other):
        for name, make in (
            ("additivity", lambda: Additivity(model, other, inputs, (0.5,))),
            ("commutativity", lambda: Commutativity(model, other, inputs)),
            ("geometry", lambda: Geometry(model, other, inputs)),
        ):
            try:
                measure = make()
                measure.add(inputs, sample_ids)
                rows = measure.rows(measure.sums)
            except EvaluationError as error:
                facts[name] = str(error)
                continue
            facts[name] = len(rows)
            if not all(math.isfinite(number) for row in rows for number in numbers(dataclasses.asdict(row))):
                return f"{name}: a number is not finite"
        try:
            facts["settling"] = len(Lens(model, inputs).layers)
        except EvaluationError as error:
            facts["settling"] = str(error)
        try:
            layers = [layer for layer in select_layers(model, inputs) if layer.label != LOGITS]
            facts["classes"] = sorted({each.reads for each in sample_vectors_of(model, inputs, layers, "classes")})
        except EvaluationError as error:
            return facts | {"stitching": str(error)}
        boundaries, _ = recorded(model, inputs, layers, changed_in_place(model, inputs))
        whole = output(model, inputs)
        facts["stitching"] = len(layers)
        for place, layer in enumerate(layers):
            if place not in boundaries:
                return f"stitching: {layer.label} was not reached"
            twin = copy.deepcopy(model)
            with replaced(twin, boundaries[place], layer):
                again = output(twin, inputs)
            if not torch.allclose(again, whole, rtol=1e-9, atol=1e-9, equal_nan=True):
                return (
                    f"stitching: with itself after {layer.label} the output moves by {(again - whole).abs().max():.1e}"
                )
            with replaced(other, boundaries[place], layer):
                output(other, inputs)
    return facts


def numbers(value: Any) -> list[float]:
    """Every number in nested values."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list | tuple):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, float) else []


def output(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first tensor that a model gives."""
    cached = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    given = model(**model_inputs(inputs, model), **cached)
    value = given[0] if not isinstance(given, torch.Tensor) else given
    while not isinstance(value, torch.Tensor):
        value = value[0]
    return value
