"""Valid inputs for any model, made from the signature of its forward pass and its config.

`_ALWAYS` says what an argument is filled with wherever a forward pass has it, `_IF_REQUIRED` what it is filled with
only where it has no default, `_OF_TYPE` what single model types want otherwise. Arguments of no table keep their
default. Only config and signature are read, and the number of image and audio features that the model's own
`get_image_features` and its like hand out, so that as many placeholder tokens stand in the text.

b batch, t tokens or frames, c channels, h height, w width, p patches, d width of a feature.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_llfc.adapters.derived.answers import run
from hf_llfc.adapters.derived.precision import full_precision
from hf_llfc.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_LENGTH = 12
_PADDED = 4
_FRAMES = 4  # of a video
_COPIED = 200_000_000  # parameters of the largest model that is built to count features
_GRID = (2, 3)  # merged patches of an image, down and across


@dataclass
class _Request:
    """What the builders of single arguments know."""

    model: PreTrainedModel
    arguments: dict[str, inspect.Parameter]
    generator: torch.Generator
    batch: int
    made: dict[str, Tensor] = field(default_factory=dict)

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def text(self) -> dict[str, Any]:
        try:
            return _values(self.config.get_text_config())
        except ValueError:  # an encoder and a decoder of text side by side
            return _values(self.config.get_text_config(encoder=True))

    @property
    def vision(self) -> dict[str, Any]:
        return _values(_part(self.config, ("vision", "image", "vit", "encoder", "backbone")))

    @property
    def audio(self) -> dict[str, Any]:
        return _values(_part(self.config, ("audio", "speech", "encoder")))

    def size(self, *names: str, default: Any = None) -> Any:
        """The first of some fields that this config or one of its parts has."""
        for name in names:
            for part in _parts(self.config):
                value = _values(part).get(name)
                if value is not None:
                    return value
        if default is None:
            raise SpecError(f"model type {self.config.model_type!r}: its config has none of {', '.join(names)}")
        return default

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.model.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def ones(self, *shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.long)


Builder = Callable[[_Request], "Tensor | None"]


def sample_inputs(model: PreTrainedModel, *, seed: int = 0, batch_size: int = 2) -> dict[str, Tensor]:
    """Valid inputs of a model's forward pass that exercise every part of it.

    Args:
        model: Any model of transformers; the values of its parameters do not matter.
        seed: Of the draw.
        batch_size: Rows; the last of several is padded where the model takes a mask.

    Returns:
        Arguments by name, on the CPU, floating-point ones in the model's dtype.

    Raises:
        SpecError: No inputs can be made for a model of this type.
    """
    arguments = dict(inspect.signature(model.forward).parameters)
    request = _Request(model, arguments, torch.Generator().manual_seed(seed), batch_size)
    own = _OF_TYPE.get(model.config.model_type, {})
    required = {
        name
        for name, argument in arguments.items()
        if argument.default is inspect.Parameter.empty
        and argument.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    }
    names = [*(name for name in own if name not in _ALWAYS), *_ALWAYS]
    names += [name for name in _IF_REQUIRED if name in required and name not in names]
    for name in names:
        builder = own[name] if name in own else _ALWAYS.get(name) or _IF_REQUIRED.get(name)
        if name not in arguments or builder is None:
            continue
        try:
            value = builder(request)
        except SpecError:
            raise
        except Exception as error:
            raise _failure(request, f"no value for {name}: {type(error).__name__}: {error}") from error
        if value is not None:
            request.made[name] = value
    missing = required - set(request.made)
    if missing:
        raise _failure(request, f"no value can be made for {', '.join(sorted(missing))}")
    if not request.made:
        raise _failure(request, f"none of its arguments can be made: {', '.join(arguments)}")
    return request.made


def forward(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point outputs of one pass in evaluation mode, without a cache.

    Args:
        model: Any model; it is left in evaluation mode.
        inputs: As `sample_inputs` makes them.

    Returns:
        Every floating-point tensor of the output by its path, for example ``"logits"`` or ``"backbone_features.1"``.
    """
    return dict(_tensors(run(model, inputs), ""))


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


def _failure(request: _Request, what: str) -> SpecError:
    return SpecError(f"model type {request.config.model_type!r}: {what} of {type(request.model).__name__}.forward")


def _values(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a config, also under the standard names that its attribute map gives them."""
    values = dict(vars(config))
    for standard, own in config.attribute_map.items():
        values.setdefault(standard, values.get(own))
    return values


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    from transformers import PreTrainedConfig

    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _part(config: PreTrainedConfig, words: tuple[str, ...]) -> PreTrainedConfig:
    """The first sub-config whose field holds one of some words, or the config itself."""
    from transformers import PreTrainedConfig

    for word in words:
        for name, value in vars(config).items():
            if isinstance(value, PreTrainedConfig) and word in name:
                return value
    return config


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        return int(value["height"]), int(value["width"])
    if isinstance(value, list | tuple):
        return int(value[-2] if len(value) > 1 else value[0]), int(value[-1])
    return int(value), int(value)


# Text


def _special_tokens(config: PreTrainedConfig) -> set[int]:
    found = set()
    for part in _parts(config):
        for name, value in vars(part).items():
            if name.endswith(("token_id", "token_index")) and isinstance(value, int):
                found.add(value)
    return found


def _tokens(request: _Request, vocabulary: int, length: int) -> Tensor:
    """Token ids without special tokens, (b, t)."""
    special = _special_tokens(request.config)
    ordinary = torch.tensor([token for token in range(1, vocabulary) if token not in special])
    return ordinary[request.integers(0, len(ordinary), request.batch, length)]


def _input_ids(request: _Request) -> Tensor | None:
    if "inputs_embeds" in request.made:
        return None
    vocabulary = request.text.get("vocab_size") or request.size("vocab_size", "encoder_vocab_size", "src_vocab_size")
    ids = _tokens(request, vocabulary, _LENGTH)
    padding = request.text.get("pad_token_id")
    if request.batch > 1 and isinstance(padding, int) and 0 <= padding < vocabulary:
        ids[-1, -_PADDED:] = padding
    placeholders = _placeholders(request)
    return torch.cat((ids[:, :2], placeholders, ids[:, 2:]), dim=1) if placeholders.numel() else ids


# The features that stand for placeholder tokens: the method that makes them, and the fields that name the token,
# that before the features and that after them.
_MEDIA = (
    (
        "get_image_features",
        "pixel_values",
        ("image_token_id", "image_token_index", "media_placeholder_token_id"),
        ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index"),
        ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index"),
    ),
    (
        "get_video_features",
        "pixel_values_videos",
        ("video_token_id", "video_token_index"),
        ("vision_start_token_id", "video_start_token_id"),
        ("vision_end_token_id", "video_end_token_id"),
    ),
    (
        "get_audio_features",
        "input_features",
        ("audio_token_id", "audio_token_index"),
        ("audio_bos_token_id", "audio_start_token_id"),
        ("audio_eos_token_id", "audio_end_token_id"),
    ),
)


def _media_tokens(request: _Request) -> dict[str, Any]:
    """The fields of a config that has such tokens, or else of the first of its parts that has."""
    names = {name for row in _MEDIA for name in row[2]}
    found = (values for values in map(_values, _parts(request.config)) if any(values.get(name) for name in names))
    return next(found, {})


def _placeholders(request: _Request) -> Tensor:
    """As many tokens as there are image, video and audio features, in every row alike: (b, t)."""
    tokens: list[int] = []
    values = _media_tokens(request)
    for method, argument, names, before, after in _MEDIA:
        token = next((values[name] for name in names if isinstance(values.get(name), int)), None)
        if token is None or argument not in request.made:
            continue
        count = _feature_count(request, method)
        if count:
            start = [values[name] for name in before if isinstance(values.get(name), int)]
            end = [values[name] for name in after if isinstance(values.get(name), int)]
            tokens += [*start[:1], *[token] * count, *end[:1]]
    return torch.tensor(tokens, dtype=torch.long).expand(request.batch, -1)


def _feature_count(request: _Request, method: str) -> int:
    """How many features a model makes of the image, video or audio of one row."""
    model = request.model
    bound = _method(model, method)
    if bound is None:
        return 1  # older models put all features in the place of one token themselves
    if next(model.parameters()).is_meta:
        size = sum(parameter.numel() for parameter in model.parameters())
        if size > _COPIED:
            raise SpecError(
                f"model type {model.config.model_type!r}: how many features {method} makes is counted by running it, "
                f"and {size} parameters are too many for that; sample the inputs of a model of the shrunken config"
            )
        model = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype).eval()
        bound = _method(model, method)
        assert bound is not None, "a model of the same class has the same methods"
    taken = inspect.signature(bound).parameters
    anything = any(argument.kind is inspect.Parameter.VAR_POSITIONAL for argument in taken.values())
    given = {name: value for name, value in request.made.items() if name in taken or anything}
    with torch.no_grad(), full_precision(model.dtype):
        features: Any = bound(**given)
    if not isinstance(features, Tensor | list | tuple):
        features = features.pooler_output if features.get("pooler_output") is not None else features[0]
    elif isinstance(features, tuple) and features and isinstance(features[0], list | tuple):
        features = features[0]
    parts = [features] if isinstance(features, Tensor) else list(features)
    return sum(part.numel() // part.shape[-1] for part in parts) // request.batch


def _method(model: PreTrainedModel, name: str) -> Callable[..., Any] | None:
    """A method of a model or of the first of its parts that has it."""
    return next((getattr(module, name) for module in model.modules() if name in dir(type(module))), None)


def _attention_mask(request: _Request) -> Tensor | None:
    ids = request.made.get("input_ids")
    if ids is None:
        return None
    mask = torch.ones_like(ids)
    if request.batch > 1:
        mask[-1, -_PADDED:] = 0
    return mask


def _decoder_input_ids(request: _Request) -> Tensor:
    decoder = _values(request.config.get_text_config(decoder=True))
    vocabulary = decoder.get("decoder_vocab_size") or decoder.get("vocab_size")
    return _tokens(request, vocabulary or request.size("decoder_vocab_size", "tgt_vocab_size"), _LENGTH - 3)


def _token_type_ids(request: _Request) -> Tensor | None:
    kinds = request.text.get("type_vocab_size") or 0
    ids = request.made.get("input_ids")
    if ids is None:
        return None
    if kinds >= 2:
        return request.integers(0, kinds, *ids.shape)
    return _media_types(request) if "pixel_values" in request.made and not kinds else None


def _media_types(request: _Request) -> Tensor | None:
    """0 for text, 1 for images, 2 for videos, 3 for audio: (b, t)."""
    ids = request.made.get("input_ids")
    if ids is None:
        return None
    types = torch.zeros_like(ids)
    values = _media_tokens(request)
    for kind, (_, _, names, _, _) in enumerate(_MEDIA, start=1):
        token = next((values[name] for name in names if isinstance(values.get(name), int)), None)
        if token is not None:
            types[ids == token] = kind
    return types


def _boxes(request: _Request) -> Tensor | None:
    """Boxes of tokens on a page of 1000 × 1000, left, top, right, bottom: (b, t, 4)."""
    ids = request.made.get("input_ids")
    if ids is None:
        return None
    most = request.size("max_2d_position_embeddings", default=1000) // 2
    corner = request.integers(0, most // 2, *ids.shape, 2)
    return torch.cat((corner, corner + request.integers(1, most // 2, *ids.shape, 2)), dim=-1)


def _embeddings(request: _Request) -> Tensor:
    return request.normal(request.batch, _LENGTH, request.text["hidden_size"])


# Images and videos


def _channels(request: _Request) -> int:
    for values in (request.vision, _values(request.config)):
        for name in ("num_channels", "in_channels", "in_chans", "n_channels"):
            if isinstance(values.get(name), int):
                return int(values[name])
    return int(request.size("num_channels", default=3))


def _image_size(request: _Request) -> tuple[int, int]:
    return _pair(
        request.vision.get("image_size") or request.vision.get("input_size") or request.size("image_size", default=64)
    )


def _pixel_values(request: _Request) -> Tensor | None:
    if vars(request.config).get("vision_config", request) is None:
        return None
    if "image_grid_thw" in request.made or "grid_thw" in request.made:
        return _patches(request)
    return request.normal(request.batch, _channels(request), *_image_size(request))


def _video(request: _Request) -> Tensor | None:
    if "pixel_values" in request.made or "video_grid_thw" in request.arguments:
        return None
    frames = request.size("num_frames", "frames_per_clip", default=_FRAMES)
    return request.normal(request.batch, frames, _channels(request), *_image_size(request))


def _grid(request: _Request) -> Tensor | None:
    """Patches in time, down and across of one image a row: (b, 3)."""
    merge = request.size("spatial_merge_size", "merge_size", "merge_kernel_size", default=1)
    if not isinstance(merge, int):
        merge = merge[-1]
    if "image_grid_thw" in request.arguments and "grid_thw" in request.arguments:
        return None
    return torch.tensor([[1, _GRID[0] * merge, _GRID[1] * merge]] * request.batch)


def _patches(request: _Request) -> Tensor:
    """Flattened patches of all images of a grid: (p, d)."""
    grid = request.made.get("image_grid_thw", request.made.get("grid_thw"))
    assert grid is not None, "the grid is made before the patches"
    side = _pair(request.vision.get("patch_size") or request.size("patch_size"))
    depth = request.vision.get("temporal_patch_size") or request.vision.get("patch_temporal") or 1
    return request.normal(int(grid.prod(dim=1).sum()), _channels(request) * depth * side[0] * side[1])


def _hidden_states(request: _Request) -> Tensor:
    if "grid_thw" in request.made:
        return _patches(request)
    return request.normal(request.batch, _LENGTH, request.size("hidden_size"))


# Audio


def _waveform(request: _Request) -> Tensor:
    return request.normal(request.batch, 4000)


def _features(request: _Request) -> Tensor | None:
    """Log-mel features: (b, c, t) for encoders with a table of positions after two convolutions, else (b, t, c)."""
    names = ("num_mel_bins", "feature_size", "input_dim", "input_feat_size", "n_mels", "feat_in", "mel_bins")
    bins = request.audio.get("num_mel_bins") or request.size(*names, default=0)
    if not bins or vars(request.config).get("audio_config", request) is None:
        return None
    positions = request.audio.get("max_source_positions")
    if positions:
        return request.normal(request.batch, bins, 2 * positions)
    return request.normal(request.batch, 64, bins)


def _features_mask(request: _Request) -> Tensor | None:
    features = request.made.get("input_features")
    if features is None:
        return None
    frames = features.shape[-1 if request.audio.get("max_source_positions") else 1]
    return torch.ones(request.batch, frames, dtype=torch.bool)


# Time series


def _series(request: _Request) -> Tensor:
    values = _values(request.config)
    length = values["context_length"] + max(values.get("lags_sequence") or [0])
    channels = values.get("num_input_channels") or values.get("input_size") or 1
    shape = (
        (request.batch, length) if channels == 1 and "lags_sequence" in values else (request.batch, length, channels)
    )
    return request.normal(*shape)


def _time_features(request: _Request) -> Tensor:
    return request.normal(*request.made["past_values"].shape[:2], request.size("num_time_features"))


_ALWAYS: dict[str, Builder] = {
    "grid_thw": _grid,
    "image_grid_thw": _grid,
    "image_sizes": lambda request: None,
    "hidden_states": lambda request: _hidden_states(request) if "grid_thw" in request.made else None,
    "pixel_values": _pixel_values,
    "pixel_values_videos": _video,
    "input_values": _waveform,
    "input_features": _features,
    "input_features_mask": _features_mask,
    "feature_attention_mask": _features_mask,
    "past_values": _series,
    "input_ids": _input_ids,
    "attention_mask": _attention_mask,
    "token_type_ids": _token_type_ids,
    "mm_token_type_ids": _media_types,
    "bbox": _boxes,
    "decoder_input_ids": _decoder_input_ids,
}

_IF_REQUIRED: dict[str, Builder] = {
    "inputs_embeds": _embeddings,
    "hidden_states": _hidden_states,
    "past_time_features": _time_features,
    "past_observed_mask": lambda request: torch.ones_like(request.made["past_values"]),
    "qformer_input_ids": lambda request: request.integers(3, request.size("vocab_size"), request.batch, 5),
}

# What single model types want otherwise


def _images(count: int) -> Callable[[_Request], Tensor]:
    """Several images a row: (b, n, c, h, w)."""
    return lambda request: request.normal(request.batch, count, _channels(request), *_image_size(request))


def _frames(request: _Request) -> Tensor:
    return _images(request.size("num_frames", "frames_per_clip", default=_FRAMES))(request)


def _image_sizes(request: _Request) -> Tensor:
    return torch.tensor([_image_size(request)] * request.batch)


def _tiles(request: _Request) -> Tensor:
    """Tiles of images of which `image_sizes` says the size: (b, n, c, h, w)."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    side = _image_size(request)[0]
    pinpoints = request.size("image_grid_pinpoints")
    count = image_size_to_num_patches([side, side], pinpoints, side)
    return _images(count)(request)


def _patches_of(*leading: int, square: bool = False) -> Builder:
    """Patches in the order of a grid, flattened or square, with leading dimensions of size one."""

    def build(request: _Request) -> Tensor:
        patches = _patches(request)
        if square:
            side = _pair(request.vision.get("patch_size") or request.size("patch_size"))
            patches = patches.reshape(patches.shape[0], -1, *side)
        return patches.reshape(*leading, *patches.shape)

    return build


def _packed_patches(request: _Request) -> Tensor:
    """A fixed number of flattened patches of every image: (b, p, d)."""
    side = request.vision.get("patch_size") or request.size("patch_size")
    return request.normal(request.batch, _GRID[0] * _GRID[1] * 4, _channels(request) * side * side)


def _positioned_patches(request: _Request) -> Tensor:
    """Flattened patches after their row and column: (b, p, 2 + d)."""
    count = _GRID[0] * _GRID[1] * 4
    patches = request.normal(request.batch, count, request.size("patch_embed_hidden_size"))
    rows, columns = 2 * _GRID[0], 2 * _GRID[1]
    places = torch.cartesian_prod(torch.arange(1, rows + 1), torch.arange(1, columns + 1))
    return torch.cat((places.to(patches.dtype).expand(request.batch, -1, -1), patches), dim=-1)


def _packed_mask(request: _Request) -> Tensor:
    return request.ones(request.batch, _GRID[0] * _GRID[1] * 4)


def _spatial_shapes(request: _Request) -> Tensor:
    return torch.tensor([[2 * _GRID[0], 2 * _GRID[1]]] * request.batch)


def _mono(request: _Request) -> Tensor:
    return request.normal(request.batch, 1, 4000)


def _spectrogram(request: _Request) -> Tensor:
    return request.normal(request.batch, request.size("max_length"), request.size("num_mel_bins"))


def _channels_first(request: _Request) -> Tensor:
    return request.normal(request.batch, request.size("num_mel_bins"), 64)


def _frames_of(*names: str, length: int = 64) -> Builder:
    """Feature frames whose width is one of some fields: (b, t, c)."""
    return lambda request: request.normal(request.batch, length, request.size(*names))


def _visible(request: _Request) -> Tensor:
    """Which patches of a video are masked, equally many in every row: (b, p)."""
    side, patch = _image_size(request), _pair(request.size("patch_size"))
    frames = request.size("num_frames") // request.size("tubelet_size")
    masked = torch.zeros(frames * (side[0] // patch[0]) * (side[1] // patch[1]), dtype=torch.bool)
    masked[::2] = True
    return masked.expand(request.batch, -1).clone()


def _states(*names: str, length: int = _LENGTH) -> Builder:
    """Hidden states of another component: (b, t, c)."""
    return lambda request: request.normal(request.batch, length, request.size(*names))


def _merge_sizes(request: _Request) -> Tensor:
    return torch.full((request.batch,), request.size("spatial_merge_size", "merge_size", default=1))


def _with_question(request: _Request) -> Tensor:
    ids = _input_ids(request)
    assert ids is not None
    ids[:, 2] = request.size("question_token_id")
    return ids


def _codebooks(request: _Request) -> Tensor:
    """Codes of several codebooks, one row each: (b · n, t)."""
    shape = (request.batch * request.size("num_codebooks"), _LENGTH)
    return request.integers(0, request.size("vocab_size"), *shape)


def _image_tiles(request: _Request) -> Tensor:
    return request.normal(request.batch, 1, request.size("max_num_tiles"), _channels(request), *_image_size(request))


def _decoder_codebooks(request: _Request) -> Tensor:
    decoder = _values(_part(request.config, ("decoder",)))
    shape = (request.batch * decoder["num_codebooks"], _LENGTH)
    return request.integers(0, decoder["vocab_size"], *shape)


def _stacked(request: _Request) -> Tensor:
    """Frames that each hold several frames of log-mel features: (b, t, c)."""
    return request.normal(request.batch, 32, request.size("num_mel_bins") * request.size("num_stacked_frames"))


def _packed_strip(request: _Request) -> Tensor:
    """The patches of all images side by side in one strip: (1, c, h, w)."""
    side = request.size("patch_size")
    return request.normal(1, 3, side, side * request.batch * 16)


def _unified_audio(request: _Request) -> Tensor | None:
    width = request.size("audio_embed_dim", default=0)
    return request.normal(request.batch, 8, width) if width else None


def _placed_patches(request: _Request) -> Tensor | None:
    """36 flattened patches of every image: (b, p, d)."""
    if vars(request.config).get("vision_config", request) is None:
        return None
    return request.normal(request.batch, 36, 3 * request.size("patch_size") ** 2)


def _places(request: _Request) -> Tensor | None:
    """Column and row of every patch: (b, p, 2)."""
    if "pixel_values" in request.arguments and vars(request.config).get("vision_config", request) is None:
        return None
    return torch.cartesian_prod(torch.arange(6), torch.arange(6)).expand(request.batch, -1, -1)


_PLACED: dict[str, Builder | None] = {
    "pixel_values": _placed_patches,
    "image_position_ids": _places,
    "pixel_position_ids": _places,
    "pixel_values_videos": None,
}


def _first_token(request: _Request) -> Tensor:
    mask = torch.zeros(request.batch, _LENGTH, dtype=torch.long)
    mask[:, 0] = 1
    return mask


def _future(*names: str) -> Builder:
    """Values or features of the time steps to be predicted, as many as the config says."""

    def build(request: _Request) -> Tensor:
        width = [request.size(*names)] if names else []
        return request.normal(request.batch, request.size("prediction_length"), *width)

    return build


_FUTURE: dict[str, Builder | None] = {
    "future_values": _future(),
    "future_time_features": _future("num_time_features"),
}
_POINTS: dict[str, Builder | None] = {
    "input_points": lambda request: request.integers(0, 32, request.batch, 1, 2, 2).to(request.model.dtype),
    "input_labels": lambda request: torch.tensor([[[1, 0]]] * request.batch),
}
_PROTEIN: dict[str, Builder | None] = {
    "protein_input_ids": lambda request: request.integers(3, 20, request.batch, 10),
    "protein_attention_mask": lambda request: request.ones(request.batch, 10),
}


def _latents(request: _Request) -> Tensor:
    """Where the features of the image stand in the text: (b, t)."""
    mask = torch.zeros(request.batch, _LENGTH, dtype=torch.long)
    mask[:, 1 : 1 + request.size("latent_query_num")] = 1
    return mask


_TOKEN_GRID: dict[str, Builder | None] = {
    "image_grid_thw": lambda request: torch.tensor([[1, *_GRID]] * request.batch),
    "pixel_values": lambda request: request.normal(
        request.batch * _GRID[0] * _GRID[1], *[request.size("spatial_merge_size") * request.size("patch_size")] * 2, 3
    ),
}
_FOUR_STACKED: dict[str, Builder | None] = {
    "input_features": lambda request: request.normal(request.batch, 32, 4 * request.size("num_mel_bins"))
}
_CONCATENATED: dict[str, Builder | None] = {
    "feature_lens": lambda request: torch.full((request.batch,), 32),
    "aftercnn_lens": lambda request: torch.full((request.batch,), 16),
    "input_features": lambda request: request.normal(request.size("num_mel_bins"), 32 * request.batch),
}
_NAVIT: dict[str, Builder | None] = {
    "pixel_values": _packed_strip,
    "target_sizes": lambda request: torch.tensor([[4, 4]] * request.batch),
}
_SUBSAMPLED: dict[str, Builder | None] = {
    "input_features": lambda request: (
        request.normal(request.batch, 64, channels[0])
        if (channels := request.size("subsampling_conv_channels", default=()))
        else None
    )
}
_CODEC_WITH_FEATURES: dict[str, Builder | None] = {
    "input_values": lambda request: request.normal(request.batch, 1, 64 * 320),
    "input_features": _frames_of("feature_projection_input_dim"),
}
_SERIES: dict[str, Builder | None] = {
    "past_values": lambda request: request.normal(request.batch, request.size("context_length"))
}
_WITH_QFORMER: dict[str, Builder | None] = {
    "qformer_input_ids": lambda request: request.integers(
        3, _values(request.config.qformer_config)["vocab_size"], request.batch, 5
    ),
    "qformer_attention_mask": lambda request: request.ones(request.batch, 5),
}
_MLLAMA: dict[str, Builder | None] = {
    "pixel_values": _image_tiles,
    "aspect_ratio_ids": lambda request: request.ones(request.batch, 1),
    "aspect_ratio_mask": lambda request: request.ones(request.batch, 1, request.size("max_num_tiles")),
    "cross_attention_mask": lambda request: request.ones(request.batch, _LENGTH, 1, request.size("max_num_tiles")),
}
_CODEBOOKS: dict[str, Builder | None] = {"input_ids": _codebooks, "attention_mask": lambda request: None}
_PAIR_OF_IMAGES: dict[str, Builder | None] = {"pixel_values": _images(2)}
_IMAGE_LIST: dict[str, Builder | None] = {"pixel_values": _images(2)}
_TILES: dict[str, Builder | None] = {"image_sizes": _image_sizes, "pixel_values": _tiles}
_PATCHES: dict[str, Builder | None] = {
    "pixel_values": _packed_patches,
    "pixel_attention_mask": _packed_mask,
    "spatial_shapes": _spatial_shapes,
}
_POSITIONED: dict[str, Builder | None] = {"flattened_patches": _positioned_patches}
_FRAMES_OF_VIDEO: dict[str, Builder | None] = {"pixel_values": _frames}
_CHANNELS_FIRST: dict[str, Builder | None] = {"input_features": _channels_first}
_MONO: dict[str, Builder | None] = {"input_values": _mono}
_LAYOUT: dict[str, Builder | None] = {"image_sizes": _image_sizes}

_OF_TYPE: dict[str, dict[str, Builder | None]] = {
    "audio-spectrogram-transformer": {"input_values": _spectrogram},
    "autoformer": _FUTURE,
    "blip_2_qformer": {"query_embeds": _states("hidden_size"), "encoder_hidden_states": _states("encoder_hidden_size")},
    "bridgetower_vision_model": {"image": _pixel_values},
    "canary_decoder": {"encoder_hidden_states": _states("cross_attention_hidden_size", "hidden_size", "d_model")},
    "canine": {"input_ids": lambda request: request.integers(10, 1000, request.batch, 40)},
    "clap": {"input_features": lambda request: request.normal(request.batch, 1, 64, request.size("num_mel_bins"))},
    "clap_audio_model": {
        "input_features": lambda request: request.normal(request.batch, 1, 64, request.size("num_mel_bins"))
    },
    "clvp": {"input_features": lambda request: request.normal(request.batch, request.size("feature_size"), 64)},
    "colmodernvbert": _IMAGE_LIST,
    "dac": _MONO,
    "decision_transformer": {
        "states": _states("state_dim"),
        "actions": _states("act_dim"),
        "rewards": lambda request: request.normal(request.batch, _LENGTH, 1),
        "returns_to_go": lambda request: request.normal(request.batch, _LENGTH, 1),
        "timesteps": lambda request: torch.arange(_LENGTH).expand(request.batch, -1),
    },
    "deepseek_vl_hybrid": {
        "high_res_pixel_values": lambda request: request.normal(
            request.batch, 3, *_pair(_values(request.config.high_res_vision_config)["image_size"])
        )
    },
    "depth_pro": {"pixel_values": lambda request: request.normal(request.batch, 3, 128, 128)},
    "dia": {
        "input_ids": lambda request: request.integers(1, 90, request.batch, _LENGTH),
        "decoder_input_ids": lambda request: request.integers(
            0, 90, request.batch, _LENGTH, request.size("num_channels")
        ),
    },
    "dia_decoder": {
        "input_ids": lambda request: request.integers(0, 90, request.batch, _LENGTH, request.size("num_channels")),
        "attention_mask": None,
        "encoder_hidden_states": _states("cross_hidden_size"),
    },
    "diffusion_gemma": {
        "self_conditioning_logits": lambda request: request.normal(
            request.batch, _LENGTH - 3, request.text["vocab_size"]
        )
    },
    "efficientloftr": _PAIR_OF_IMAGES,
    "embedding_gemma2": {**_SUBSAMPLED, **_PLACED},
    "encodec": _MONO,
    "evolla": _PROTEIN,
    "EvollaModel": _PROTEIN,
    "fastspeech2_conformer_hifigan": {"spectrogram": _states("model_in_dim")},
    "flava": {"codebook_pixel_values": lambda request: request.normal(request.batch, 3, 64, 64)},
    "flava_multimodal_model": {"hidden_states": _states("hidden_size")},
    "florence_vision": {"hidden_states": _pixel_values},
    "fun_asr_nano": {"input_features": _stacked},
    "fun_asr_nano_encoder": {"input_features": _stacked},
    "fuyu": {"pixel_values": _packed_patches},
    "gemma3n_audio": {
        "audio_mel": _frames_of("input_feat_size"),
        "audio_mel_mask": lambda request: torch.zeros(request.batch, 64, dtype=torch.bool),
    },
    "gemma4": {**_SUBSAMPLED, **_PLACED},
    "gemma4_audio": _SUBSAMPLED,
    "gemma4_unified": {"input_features": _unified_audio, **_PLACED},
    "gemma4_vision": _PLACED,
    "glm_image_vqmodel": {"input": lambda request: request.normal(request.batch, request.size("hidden_size"), 4, 4)},
    "glmasr": _CHANNELS_FIRST,
    "glmasr_encoder": _CHANNELS_FIRST,
    "granite4_vision": _TILES,
    "granite_docling": {
        "pixel_values": _images(2),
        "pixel_attention_mask": lambda request: torch.ones(request.batch, 2, dtype=torch.bool),
    },
    "granite_speech": {"input_features": _frames_of("input_dim"), "input_features_mask": None},
    "granite_speech5_ctc": _FOUR_STACKED,
    "granite_speech5_encoder": _FOUR_STACKED,
    "granite_speech_encoder": {"hidden_states": _frames_of("input_dim")},
    "granite_speech_plus": {"input_features": _frames_of("input_dim"), "input_features_mask": None},
    "granite_speech_plus_encoder": {"hidden_states": _frames_of("input_dim")},
    "idefics": {
        "pixel_values": _images(1),
        "image_attention_mask": lambda request: request.ones(request.batch, _LENGTH, 1),
    },
    "idefics2": _IMAGE_LIST,
    "idefics2_perceiver": {
        "context": _states("hidden_size"),
        "attention_mask": lambda request: request.ones(request.batch, _LENGTH),
    },
    "idefics3": _IMAGE_LIST,
    "informer": _FUTURE,
    "inkling2": _TOKEN_GRID,
    "inkling2_vision": _TOKEN_GRID,
    "inkling_audio": {
        "audio_input_ids": lambda request: request.integers(
            0, request.size("mel_vocab_size"), request.batch, _LENGTH, request.size("n_mel_bins")
        )
    },
    "instructblip": _WITH_QFORMER,
    "instructblip_qformer": {
        "query_embeds": _states("hidden_size"),
        "attention_mask": None,
        "encoder_hidden_states": _states("encoder_hidden_size"),
    },
    "instructblipvideo": {**_FRAMES_OF_VIDEO, **_WITH_QFORMER},
    "instructblipvideo_qformer": {
        "query_embeds": _states("hidden_size"),
        "attention_mask": None,
        "encoder_hidden_states": _states("encoder_hidden_size"),
    },
    "kimi_k25": {"pixel_values": _patches_of(square=True)},
    "kimi_k25_vision": {"pixel_values": _patches_of(square=True)},
    "kosmos-2": {"image_embeds_position_mask": _latents},
    "kosmos-2.5": {**_POSITIONED, "image_embeds_position_mask": _latents},
    "kosmos_2_5_vision_model": _POSITIONED,
    "led": {"global_attention_mask": _first_token},
    "lfm2_vl": _PATCHES,
    "lightglue": _PAIR_OF_IMAGES,
    "lighton_ocr": _LAYOUT,
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "longformer": {"global_attention_mask": _first_token},
    "lxmert": {
        "visual_feats": _states("visual_feat_dim", length=5),
        "visual_pos": lambda request: torch.rand(
            request.batch, 5, 4, generator=request.generator, dtype=torch.float64
        ).to(request.model.dtype),
    },
    "mimi": _MONO,
    "mimi_decoder": {"latents": lambda request: request.normal(request.batch, request.size("hidden_size"), _LENGTH)},
    "mimi_encoder": _MONO,
    "minicpm_ocr_vision": _NAVIT,
    "minicpmv4_6_vision": _NAVIT,
    "minicpmv4_7_vision": _NAVIT,
    "mistral3": _LAYOUT,
    "mistral_large4": _LAYOUT,
    "mllama": _MLLAMA,
    "mllama_vision_model": _MLLAMA,
    "modernvbert": _IMAGE_LIST,
    "molmo2_vision": {"pixel_values": lambda request: request.normal(request.batch, 64, 48)},
    "muse_glimmer_assistant": {
        "noise_embeds": _states("hidden_size"),
        "context_hidden_states": lambda request: request.normal(
            request.batch, _LENGTH, request.size("hidden_size") * len(request.size("target_layer_ids"))
        ),
    },
    "muse_spark_audio": {"input_values": lambda request: request.normal(request.batch, 2 * 1920)},
    "musicgen": {"decoder_input_ids": _decoder_codebooks},
    "musicgen_decoder": _CODEBOOKS,
    "musicgen_melody": {"input_features": _frames_of("num_chroma"), "decoder_input_ids": _decoder_codebooks},
    "musicgen_melody_decoder": _CODEBOOKS,
    "nemotron_h_omni": {
        "image_grid_hw": _spatial_shapes,
        "pixel_values": lambda request: request.normal(
            4 * _GRID[0] * _GRID[1] * request.batch, 3 * request.size("patch_size") ** 2
        ),
    },
    "neomme": {"pixel_values": _packed_patches},
    "neucodec": _CODEC_WITH_FEATURES,
    "oneformer": {"task_inputs": lambda request: request.integers(1, 90, request.batch, request.size("task_seq_len"))},
    "paddleocr_vl": {"pixel_values": _patches_of(square=True)},
    "paddleocr_vl_vision": {"pixel_values": _patches_of(1, square=True)},
    "pe_audio": _MONO,
    "pe_audio_encoder": _MONO,
    "phi4_multimodal_audio": {
        "hidden_states": _frames_of("input_size"),
        "mask": lambda request: torch.ones(request.batch, 64, dtype=torch.bool),
    },
    "pi0": {"state": lambda request: request.normal(request.batch, request.size("max_state_dim"))},
    "pix2struct": _POSITIONED,
    "pix2struct_vision_model": _POSITIONED,
    "pocket_tts_audio_tokenizer": _MONO,
    "pocket_tts_audio_tokenizer_decoder": {
        "latents": lambda request: request.normal(request.batch, request.size("hidden_size"), _LENGTH)
    },
    "pocket_tts_audio_tokenizer_encoder": _MONO,
    "pop2piano": {"input_features": _frames_of("d_model"), "input_ids": None},
    "pp_formulanet_text": {"encoder_hidden_states": _states("d_model", "hidden_size")},
    "pp_ocrv5_mobile_rec": {"pixel_values": lambda request: request.normal(request.batch, 3, 48, 320)},
    "prompt_depth_anything": {"prompt_depth": lambda request: request.normal(request.batch, 1, 8, 8)},
    "qwen2_5_omni_audio_encoder": _CONCATENATED,
    "qwen2_5_omni_bigvgan": {
        "mel_spectrogram": lambda request: request.normal(request.batch, request.size("mel_dim"), _LENGTH)
    },
    "qwen3_omni_moe_audio_encoder": _CONCATENATED,
    "roc_bert": {
        "input_shape_ids": lambda request: _tokens(request, request.size("shape_vocab_size"), _LENGTH),
        "input_pronunciation_ids": lambda request: _tokens(request, request.size("pronunciation_vocab_size"), _LENGTH),
    },
    "sam": _POINTS,
    "sam_hq": _POINTS,
    "seggpt": {
        "prompt_pixel_values": _pixel_values,
        "prompt_masks": _pixel_values,
    },
    "siglip2": _PATCHES,
    "siglip2_vision_model": _PATCHES,
    "smolvlm": _IMAGE_LIST,
    "speech_to_text": {"input_features": _frames_of("input_feat_per_channel")},
    "speecht5_hifigan": {"spectrogram": _states("model_in_dim")},
    "splinter": {"input_ids": _with_question},
    "superglue": _PAIR_OF_IMAGES,
    "t5gemma2_decoder": {"encoder_hidden_states": _states("hidden_size")},
    "time_series_transformer": _FUTURE,
    "timesfm": _SERIES,
    "timesfm2_5": _SERIES,
    "timesformer": _FRAMES_OF_VIDEO,
    "trocr": {"encoder_hidden_states": _states("cross_attention_hidden_size", "d_model")},
    "tvp": {"pixel_values": _frames},
    "ultravbert": _IMAGE_LIST,
    "vibevoice_acoustic_tokenizer": _MONO,
    "vibevoice_acoustic_tokenizer_decoder": {
        "hidden_states": lambda request: request.normal(request.batch, request.size("hidden_size"), _LENGTH)
    },
    "vibevoice_acoustic_tokenizer_encoder": {"hidden_states": _mono},
    "video_llama_3": {"image_merge_sizes": _merge_sizes},
    "video_llama_3_vision": {"merge_sizes": _merge_sizes},
    "videomae": {"pixel_values": _frames, "bool_masked_pos": _visible},
    "visual_bert": {
        "visual_embeds": _states("visual_embedding_dim", length=5),
        "visual_attention_mask": lambda request: request.ones(request.batch, 5),
        "visual_token_type_ids": lambda request: request.ones(request.batch, 5),
    },
    "vivit": _FRAMES_OF_VIDEO,
    "voxtral_realtime": _CHANNELS_FIRST,
    "voxtral_realtime_encoder": _CHANNELS_FIRST,
    "wav2vec2-bert": {"input_features": _frames_of("feature_projection_input_dim")},
    "xclip": _FRAMES_OF_VIDEO,
    "xclip_vision_model": {
        "pixel_values": lambda request: request.normal(
            request.batch * request.size("num_frames"), 3, *_image_size(request)
        )
    },
    "xcodec": _MONO,
    "xcodec2": _CODEC_WITH_FEATURES,
}
