"""Which features of a model to compare, and hooks that hand them over.

Shape legend: n samples, t tokens, f features of one sample.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_llfc.diagnostics.features.kinds import KINDS, default_outputs
from hf_llfc.diagnostics.features.trial import INPUT_SUFFIX, LOGITS, Call, Layer, Trial, first_tensor
from hf_llfc.errors import EvaluationError, suggest


def select_layers(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], patterns: Sequence[str] | None = None
) -> tuple[Layer, ...]:
    """The layers to compare, in the order in which the model computes them; the logits come last.

    Args:
        model: Any model that takes the batch.
        batch: A batch whose first sample is used for a trial run.
        patterns: Names of modules as shell patterns (``*.mlp``, ``bert.encoder.layer.[0-3]``); ``:input`` at the end
            means what goes in (``*.down_proj:input``). Or words: ``blocks``, the output of every repeated block (in a
            model without blocks that of every activation function; without those the input of every linear
            map but the first), which is the default; ``attention`` and ``mlp``, what these parts of every block give;
            ``pre_activations``, what every activation function takes. A word comes before a module of that name.

    Returns:
        At least one layer.

    Raises:
        EvaluationError: A pattern matches no module that runs, or gives no features per sample.
    """
    trial = Trial.run(model, batch)
    chosen = (
        default_outputs(model, batch, trial.calls) if patterns is None else _matching(model, batch, trial, patterns)
    )
    layers = []
    for call in chosen:
        layer = trial.layer(call)
        if layer is not None:
            layers.append(layer)
        elif patterns is not None and not any(set(pattern) & set("*?[") or pattern in KINDS for pattern in patterns):
            raise EvaluationError(
                f"layer {trial.label(call)!r} gives a tensor of shape {tuple(call.tensor.shape)} for two samples, "
                "which does not divide into samples; choose other layers"
            )
    if patterns is not None and not layers:
        raise EvaluationError(f"layers {', '.join(patterns)}: no features per sample; choose other layers")
    if trial.logits is not None:
        axes = trial.token_axes("", 0, LOGITS, trial.logits.shape)
        layers.append(Layer(LOGITS, "", 0, LOGITS, axes or (), False))
    if not layers:
        raise EvaluationError(f"{type(model).__name__} has neither blocks nor activations nor logits; name its layers")
    return tuple(layers)


def _matching(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], trial: Trial, patterns: Sequence[str]
) -> list[Call]:
    matched: dict[tuple[str, int, str], Call] = {}
    for pattern in patterns:
        if pattern in KINDS:
            calls = KINDS[pattern](model, batch, trial.calls)
            if not calls:
                raise EvaluationError(
                    f"layers: {type(model).__name__} has no {pattern.replace('_', ' ')} that could be told by how it "
                    "runs; give patterns of module names"
                )
        else:
            calls = _named(trial, pattern)
        matched |= {call.key: call for call in calls}
    return [call for call in trial.calls if call.key in matched]


def _named(trial: Trial, pattern: str) -> list[Call]:
    side = "input" if pattern.endswith(INPUT_SUFFIX) else "output"
    name = pattern.removesuffix(INPUT_SUFFIX)
    # A name as a report writes it is taken literally, because its brackets are no pattern.
    literal = [call for call in trial.calls if trial.label(call) == pattern]
    calls = literal or [call for call in trial.calls if call.side == side and fnmatch.fnmatchcase(call.module, name)]
    if not calls and pattern != LOGITS:
        hint = suggest(name, [*KINDS, *(call.module for call in trial.calls)])
        raise EvaluationError(f"layers: no module that runs is called {pattern!r}{hint}")
    return calls


@contextmanager
def handing_over(
    model: PreTrainedModel, layers: Sequence[Layer], receive: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """Hands the tensor of every layer over while the model runs once inside.

    Args:
        model: The model that `select_layers` saw, or one of the same architecture.
        layers: The logits are left out: they are the model's output.
        receive: Called with the index of the layer and its tensor, at the moment the model computes it.
    """
    wanted: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for index, layer in enumerate(layers):
        if layer.side != LOGITS:
            wanted[layer.module, layer.side][layer.call] = index
    handles = []

    def hooks(calls: Mapping[int, int]) -> tuple[Callable[..., None], Callable[..., None]]:
        count = 0

        def hand_over(value: Any) -> None:
            nonlocal count
            number, count = count, count + 1
            if number in calls:
                tensor = first_tensor(value)
                assert tensor is not None, "the trial run found a tensor here"
                receive(calls[number], tensor)

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            hand_over([args, kwargs])

        def after(module: nn.Module, args: Any, output: Any) -> None:
            hand_over(output)

        return before, after

    try:
        for (name, side), calls in wanted.items():
            module = model.get_submodule(name)
            before, after = hooks(calls)
            if side == "input":
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def divide(
    features: torch.Tensor, layer: Layer, n: int, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A tensor whose first dimension is that of the samples.

    Args:
        features: Output of the layer for n samples.
        layer: Its `token_axes`.
        n: Number of samples.
        attention_mask: (n, t), or None where nothing is padded.

    Returns:
        The tensor and its dimensions over tokens.

    Raises:
        EvaluationError: The tensor does not divide into samples and tokens as it did in the trial run.
    """
    axes, divided = layer.token_axes, features
    if axes == (-1,):
        assert attention_mask is not None, "tokens without their own dimension are told apart by the mask"
        fits = features.shape[0] == attention_mask.numel()
        axes, divided = (1,), features.reshape(*attention_mask.shape, *features.shape[1:]) if fits else features
    else:
        fits = features.shape[0] == n
    if attention_mask is not None:
        fits = fits and all(divided.shape[axis] == attention_mask.shape[1] for axis in axes)
    if not fits:
        raise EvaluationError(
            f"layer {layer.label!r} gave a tensor of shape {tuple(features.shape)} for {n} samples, unlike in its "
            "trial run; choose other layers"
        )
    return divided, axes


def without_padding(divided: torch.Tensor, axes: Sequence[int], attention_mask: torch.Tensor) -> torch.Tensor:
    """Zeros at padded tokens.

    Args:
        divided: Features as `divide` gives them.
        axes: Its dimensions over tokens.
        attention_mask: (n, t).
    """
    for axis in axes:
        shape = [1] * divided.dim()
        shape[0], shape[axis] = attention_mask.shape
        divided = divided.masked_fill(attention_mask.reshape(shape) == 0, 0)
    return divided


def sample_vectors(
    features: torch.Tensor, layer: Layer, n: int, attention_mask: torch.Tensor | None, *, by_token: bool = False
) -> torch.Tensor:
    """One vector per sample, with zeros at padded tokens, which therefore count in no inner product.

    Args:
        features: Output of the layer for n samples.
        layer: Its `token_axes`.
        n: Number of samples.
        attention_mask: (n, t), or None where nothing is padded.
        by_token: One vector per token instead; needs a mask. A layer that has no dimension over tokens, or several, has
            one vector per sample then too, in the place of the first token.

    Returns:
        (n, f), or (n·t, f) by token, in the precision of the features.

    Raises:
        EvaluationError: The tensor does not divide into samples and tokens as it did in the trial run.
    """
    divided, axes = divide(features, layer, n, attention_mask)
    if attention_mask is not None:
        divided = without_padding(divided, axes, attention_mask)
    if not by_token:
        return divided.reshape(n, -1)
    assert attention_mask is not None, "tokens are told apart by the mask"
    tokens = attention_mask.shape[1]
    if len(axes) == 1:
        return divided.movedim(axes[0], 1).reshape(n * tokens, -1)
    vectors = divided.reshape(n, 1, -1)
    return torch.cat([vectors, vectors.new_zeros(n, tokens - 1, vectors.shape[-1])], dim=1).reshape(n * tokens, -1)
