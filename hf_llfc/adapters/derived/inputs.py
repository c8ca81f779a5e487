"""Valid inputs for any model, made from the signature of its forward pass and its config.

Only config and signature are read, so that a model on the meta device will do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_llfc.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_LENGTH = 12
_PADDED = 4


@dataclass
class _Request:
    """What the builders of single arguments know."""

    config: PreTrainedConfig
    arguments: dict[str, inspect.Parameter]
    dtype: torch.dtype
    generator: torch.Generator
    batch: int
    made: dict[str, Tensor] = field(default_factory=dict)

    def size(self, *names: str, default: Any = None) -> Any:
        """The first of some fields that this config or one of its parts has."""
        for part in _parts(self.config):
            for name in names:
                value = vars(part).get(name)
                if value is not None:
                    return value
        if default is None:
            raise SpecError(f"model type {self.config.model_type!r}: its config has none of {', '.join(names)}")
        return default

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    from transformers import PreTrainedConfig

    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _part(config: PreTrainedConfig, *words: str) -> PreTrainedConfig:
    """The first sub-config whose name in its parent holds one of some words, or the config itself."""
    from transformers import PreTrainedConfig

    for word in words:
        for name, value in vars(config).items():
            if isinstance(value, PreTrainedConfig) and word in name:
                return value
    return config


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, list | tuple):
        return (int(value[-2]), int(value[-1])) if len(value) > 1 else (int(value[0]), int(value[0]))
    if isinstance(value, dict):
        return int(value["height"]), int(value["width"])
    return int(value), int(value)


def _special_tokens(config: PreTrainedConfig) -> set[int]:
    found = set()
    for part in _parts(config):
        for name, value in vars(part).items():
            if name.endswith(("token_id", "token_index")) and isinstance(value, int):
                found.add(value)
    return found


def _tokens(request: _Request, vocabulary: int, length: int) -> Tensor:
    """Token ids without special tokens."""
    special = _special_tokens(request.config)
    ordinary = torch.tensor([token for token in range(1, vocabulary) if token not in special])
    return ordinary[request.integers(0, len(ordinary), request.batch, length)]


def _input_ids(request: _Request) -> Tensor:
    text = request.config.get_text_config()
    vocabulary = vars(text).get("vocab_size") or request.size("vocab_size", "encoder_vocab_size", "src_vocab_size")
    ids = _tokens(request, vocabulary, _LENGTH)
    padding = vars(text).get("pad_token_id")
    if request.batch > 1 and isinstance(padding, int) and 0 <= padding < vocabulary:
        ids[-1, -_PADDED:] = padding
    return ids


def _attention_mask(request: _Request) -> Tensor | None:
    ids = request.made.get("input_ids")
    if ids is None:
        return None
    mask = torch.ones_like(ids)
    if request.batch > 1:
        mask[-1, -_PADDED:] = 0
    return mask


def _decoder_input_ids(request: _Request) -> Tensor:
    decoder = request.config.get_text_config(decoder=True)
    vocabulary = vars(decoder).get("decoder_vocab_size") or vars(decoder).get("vocab_size")
    return _tokens(request, vocabulary or request.size("decoder_vocab_size", "tgt_vocab_size"), _LENGTH - 3)


def _token_type_ids(request: _Request) -> Tensor | None:
    kinds = request.size("type_vocab_size", default=0)
    if kinds < 2 or "input_ids" not in request.made:
        return None
    return request.integers(0, kinds, *request.made["input_ids"].shape)


def _pixel_values(request: _Request) -> Tensor:
    vision = _part(request.config, "vision", "image", "encoder", "backbone")
    values = vars(vision)
    channels = values.get("num_channels") or values.get("in_channels") or request.size("num_channels", default=3)
    size = values.get("image_size") or request.size("image_size", default=64)
    return request.normal(request.batch, channels if isinstance(channels, int) else 3, *_pair(size))


def _waveform(request: _Request) -> Tensor:
    return request.normal(request.batch, 4000)


def _features(request: _Request) -> Tensor:
    audio = _part(request.config, "audio", "encoder")
    bins = vars(audio).get("num_mel_bins") or request.size("num_mel_bins", "feature_size", "input_dim")
    return request.normal(request.batch, bins, 2 * request.size("max_source_positions", default=32))


# What an argument of a forward pass is filled with. Arguments of no builder keep their default.
_BUILDERS: dict[str, Callable[[_Request], Tensor | None]] = {
    "input_ids": _input_ids,
    "pixel_values": _pixel_values,
    "input_values": _waveform,
    "input_features": _features,
    "attention_mask": _attention_mask,
    "token_type_ids": _token_type_ids,
    "decoder_input_ids": _decoder_input_ids,
}


def sample_inputs(model: PreTrainedModel, *, seed: int = 0, batch_size: int = 2) -> dict[str, Tensor]:
    """Valid inputs of a model's forward pass that exercise every part of it.

    Args:
        model: Any model of transformers; its parameters are not read.
        seed: Of the draw.
        batch_size: Rows; the last of several is padded where the model takes a mask.

    Returns:
        Arguments by name, on the CPU, floating-point ones in the model's dtype.

    Raises:
        SpecError: No inputs can be made for a model of this type.
    """
    arguments = dict(inspect.signature(model.forward).parameters)
    request = _Request(model.config, arguments, model.dtype, torch.Generator().manual_seed(seed), batch_size)
    for name, builder in _BUILDERS.items():
        if name in arguments:
            try:
                value = builder(request)
            except SpecError:
                raise
            except Exception as error:
                raise SpecError(
                    f"model type {model.config.model_type!r}: no value for {name} of {type(model).__name__}: {error}"
                ) from error
            if value is not None:
                request.made[name] = value
    if not request.made:
        raise SpecError(
            f"model type {model.config.model_type!r}: {type(model).__name__} takes none of the inputs that can be made; "
            f"its arguments are {', '.join(arguments)}"
        )
    return request.made


def forward(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point outputs of one pass in evaluation mode, without a cache.

    Args:
        model: Any model; it is left in evaluation mode.
        inputs: As `sample_inputs` makes them.

    Returns:
        Every floating-point tensor of the output by its path, for example ``"encoder_last_hidden_state"`` or ``"0.1"``.
    """
    arguments = inspect.signature(model.forward).parameters
    options = {name: value for name, value in (("use_cache", False), ("return_dict", True)) if name in arguments}
    model.eval()
    with torch.no_grad():
        output = model(**inputs, **options)
    return dict(_tensors(output, ""))


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield path or "output", value
        return
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for name, inner in items:
        yield from _tensors(inner, f"{path}.{name}" if path else str(name))
