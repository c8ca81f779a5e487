"""One vector of channels a sample: its features at the tokens that the head reads, or their mean over all places.

Vectors of this kind compare samples of different lengths, and have as many entries as a layer has channels. A head that
reads one token (the first, or the last) leaves the others of the last block without a meaning, so that their mean would
say nothing. Which tokens it reads is found by a trial: they are those whose change changes the logits.

Shape legend: n samples, t tokens, c channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hf_llfc.diagnostics.features.channels import channel_dimensions
from hf_llfc.diagnostics.features.layers import divide, handing_over, select_layers, without_padding
from hf_llfc.diagnostics.features.trial import LOGITS, Layer, Trial, of_another_length, two_copies
from hf_llfc.evaluation.models import forward_logits

ALL, FIRST, LAST = "all", "first", "last"
"""Which tokens a head reads."""


@dataclass(frozen=True)
class Vectors:
    """How the features of a layer become one vector a sample.

    Attributes:
        layer: The layer.
        channels: Dimension over channels, once the tensor is divided into samples.
        reads: `FIRST` or `LAST` token that is no padding, or the mean over `ALL` places.
    """

    layer: Layer
    channels: int
    reads: str = ALL

    def of(self, features: torch.Tensor, n: int, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The vectors of n samples, (n, c), in float32 or better.

        Args:
            features: Output of the layer.
            n: Number of samples.
            attention_mask: (n, t), or None where nothing is padded.

        Raises:
            EvaluationError: The tensor does not divide into samples as it did in the trial run.
        """
        places, axes = _channels_last(features, self, n, attention_mask)
        places = places.to(torch.promote_types(places.dtype, torch.float32))
        mask = attention_mask if axes else None
        if self.reads != ALL:
            return places[torch.arange(n, device=places.device), _read(self.reads, mask, places)]
        if mask is None:
            return places.flatten(1, -2).mean(dim=1) if places.dim() > 2 else places
        count = mask.sum(dim=1, keepdim=True) ** len(axes)
        others = places[0, ..., 0].numel() // mask.shape[1] ** len(axes)
        return without_padding(places, axes, mask).flatten(1, -2).sum(dim=1) / (count * others)


def sample_vectors_of(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], layers: Sequence[Layer], measure: str
) -> tuple[Vectors, ...]:
    """How the features of layers become one vector a sample.

    Args:
        model: The model, in evaluation mode.
        batch: A batch whose first sample is used for trial runs.
        layers: As `select_layers` gives them.
        measure: Name of the measure, for messages.

    Raises:
        EvaluationError: A layer has no channels.
    """
    trial = Trial.run(model, batch)
    inner = [layer for layer in select_layers(model, batch) if layer.label != LOGITS]
    known = list(dict.fromkeys([*inner, *(layer for layer in layers if layer.label != LOGITS)]))
    channels = dict(zip(known, channel_dimensions(model, trial, known, measure), strict=True))
    lengths = {layer: _length(trial, Vectors(layer, channels[layer])) for layer in known}
    last = inner[-1] if inner else None
    reads = ALL
    if last is not None and lengths[last] is not None:
        reads = _tokens_read(model, batch, Vectors(last, channels[last]))
    return tuple(
        Vectors(layer, 1)
        if layer.label == LOGITS
        else Vectors(layer, channels[layer], reads if last is not None and lengths[layer] == lengths[last] else ALL)
        for layer in layers
    )


def _channels_last(
    features: torch.Tensor, vectors: Vectors, n: int, mask: torch.Tensor | None
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A view of features, (n, …, c), with its dimensions over tokens."""
    divided, axes = divide(features, vectors.layer, n, mask)
    moved = tuple(axis - (axis > vectors.channels) for axis in axes if axis != vectors.channels)
    return divided.movedim(vectors.channels, -1), moved


def _read(reads: str, mask: torch.Tensor | None, places: torch.Tensor) -> torch.Tensor:
    """Index of the token that is read, one a sample."""
    n, length = places.shape[:2]
    if mask is None:
        return torch.full((n,), 0 if reads == FIRST else length - 1, device=places.device)
    present = (mask != 0).int()
    return present.argmax(dim=1) if reads == FIRST else length - 1 - present.flip(1).argmax(dim=1)


def _length(trial: Trial, vectors: Vectors) -> int | None:
    """Number of places of a layer that has one dimension over them; None for others."""
    layer = vectors.layer
    tensor = next(call.tensor for call in trial.calls if call.key == (layer.module, layer.call, layer.side))
    places, _ = _channels_last(tensor, vectors, 2, _nothing_hidden(trial.length, tensor))
    return places.shape[1] if places.dim() == 3 else None


def _nothing_hidden(length: int | None, like: torch.Tensor) -> torch.Tensor | None:
    """The attention mask of two samples without padding."""
    return None if length is None else torch.ones(2, length, dtype=torch.int64, device=like.device)


def _tokens_read(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], vectors: Vectors) -> str:
    """Which tokens of the last block the logits depend on."""
    copies = two_copies(batch)
    if "attention_mask" in copies and copies["attention_mask"].shape[1] == 1:
        copies = of_another_length(copies)
    length = copies["attention_mask"].shape[1] if "attention_mask" in copies else None
    logits = forward_logits(model, copies)
    if logits is None:
        return ALL
    for reads, others in ((FIRST, slice(1, None)), (LAST, slice(0, -1))):

        def disturb(index: int, tensor: torch.Tensor, others: slice = others) -> None:
            places, _ = _channels_last(tensor, vectors, 2, _nothing_hidden(length, tensor))
            noise = torch.randn(places[:, others].shape, generator=torch.Generator().manual_seed(0))
            places[:, others] = noise.to(places)

        with handing_over(model, [vectors.layer], disturb):
            disturbed = forward_logits(model, copies)
        assert disturbed is not None, "the model gave logits before"
        if disturbed.shape == logits.shape and torch.allclose(disturbed, logits, rtol=1e-5, atol=1e-6):
            return reads
    return ALL
