"""Builders of the values of single arguments, for `inputs`: from the config of a model to a tensor.

b batch, t tokens or frames, c channels, h height, w width, p patches, d width of a feature.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_llfc.adapters.derived.precision import full_precision
from hf_llfc.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LENGTH = 12
_PADDED = 4
_FRAMES = 4  # of a video
_COPIED = 200_000_000  # parameters of the largest model that is built to count features
GRID = (2, 3)  # merged patches of an image, down and across


@dataclass
class Request:
    """What the builders of single arguments know."""

    model: PreTrainedModel
    arguments: dict[str, inspect.Parameter]
    generator: torch.Generator
    batch: int
    made: dict[str, Tensor] = field(default_factory=dict)

    @property
    def config(self) -> PreTrainedConfig:
        """The model's config."""
        return self.model.config

    @property
    def text(self) -> dict[str, Any]:
        """The fields of the config of the text model."""
        try:
            return _values(self.config.get_text_config())
        except ValueError:  # an encoder and a decoder of text side by side
            return _values(self.config.get_text_config(encoder=True))

    @property
    def vision(self) -> dict[str, Any]:
        """The fields of the config of the vision model."""
        return _values(_part(self.config, ("vision", "image", "vit", "encoder", "backbone")))

    @property
    def audio(self) -> dict[str, Any]:
        """The fields of the config of the audio model."""
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

    def shape(self, text: str) -> list[int]:
        """Reads the sizes of a shape.

        Args:
            text: A word for each: a number, a field of the config (`d_model|hidden_size`: the first that there is,
                `vision_config.image_size`: of a part), `b` rows, `t` tokens, `c` channels, `p` patches, a product
                of these (`b*16`); `hw` is height and width.
        """
        sizes: list[int] = []
        for word in text.split():
            sizes += _image_size(self) if word == "hw" else [prod(map(self._entry, word.split("*")))]
        return sizes

    def _entry(self, word: str) -> int:
        if word.isdigit():
            return int(word)
        match word:
            case "b":
                return self.batch
            case "t":
                return LENGTH
            case "c":
                return _channels(self)
            case "p":
                return 4 * prod(GRID)
        part, _, field = word.rpartition(".")
        if part:
            return _pair(_values(vars(self.config)[part])[field])[0]
        return int(self.size(*word.split("|")))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers in the model's dtype."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.model.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers from `low` up to `high`."""
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)


Builder = Callable[[Request], "Tensor | None"]


def normal(shape: str) -> Builder:
    """Standard normal numbers of a shape, see `Request.shape`; none where a config lacks a last field with `?`."""

    def build(request: Request) -> Tensor | None:
        *sizes, last = shape.split()
        if not last.endswith("?"):
            return request.normal(*request.shape(shape))
        width = request.size(last[:-1], default=0)
        width = width[0] if isinstance(width, list | tuple) and width else width
        return request.normal(*request.shape(" ".join(sizes)), width) if width else None

    return build


def integers(low: int, high: int | str, shape: str) -> Builder:
    """Integers from `low` up to `high`, a number or the name of a field, of a shape."""
    return lambda request: request.integers(low, *request.shape(str(high)), *request.shape(shape))


def filled(value: int | bool, shape: str) -> Builder:
    """One value throughout a shape: a truth value or an integer."""
    return lambda request: torch.full(request.shape(shape), value)


def rows(*values: Any) -> Builder:
    """The same values for every row of a batch."""
    return lambda request: torch.tensor([list(values)] * request.batch)


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


def _tokens(request: Request, vocabulary: int, length: int) -> Tensor:
    """Token ids without special tokens, (b, t)."""
    special = _special_tokens(request.config)
    ordinary = torch.tensor([token for token in range(1, vocabulary) if token not in special])
    return ordinary[request.integers(0, len(ordinary), request.batch, length)]


def input_ids(request: Request) -> Tensor | None:
    """Token ids, the last row padded, with a place for every image and audio feature: (b, t)."""
    if "inputs_embeds" in request.made:
        return None
    vocabulary = request.text.get("vocab_size") or request.size("vocab_size", "encoder_vocab_size", "src_vocab_size")
    ids = _tokens(request, vocabulary, LENGTH)
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


def _media_tokens(request: Request) -> dict[str, Any]:
    """The fields of a config that has such tokens, or else of the first of its parts that has."""
    names = {name for row in _MEDIA for name in row[2]}
    found = (values for values in map(_values, _parts(request.config)) if any(values.get(name) for name in names))
    return next(found, {})


def _placeholders(request: Request) -> Tensor:
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


def _feature_count(request: Request, method: str) -> int:
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


def attention_mask(request: Request) -> Tensor | None:
    """Which tokens are not padding: (b, t)."""
    ids = request.made.get("input_ids")
    if ids is None:
        return None
    mask = torch.ones_like(ids)
    if request.batch > 1:
        mask[-1, -_PADDED:] = 0
    return mask


def ordinary_tokens(vocabulary: str) -> Builder:
    """Token ids below the value of a field."""
    return lambda request: _tokens(request, request.size(vocabulary), LENGTH)


def decoder_input_ids(request: Request) -> Tensor:
    """Token ids of the decoder, fewer than the encoder's: (b, t)."""
    decoder = _values(request.config.get_text_config(decoder=True))
    vocabulary = decoder.get("decoder_vocab_size") or decoder.get("vocab_size")
    return _tokens(request, vocabulary or request.size("decoder_vocab_size", "tgt_vocab_size"), LENGTH - 3)


def token_type_ids(request: Request) -> Tensor | None:
    """Segments of tokens, or their media: (b, t)."""
    kinds = request.text.get("type_vocab_size") or 0
    ids = request.made.get("input_ids")
    if ids is None:
        return None
    if kinds >= 2:
        return request.integers(0, kinds, *ids.shape)
    return media_types(request) if "pixel_values" in request.made and not kinds else None


def media_types(request: Request) -> Tensor | None:
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


def boxes(request: Request) -> Tensor | None:
    """Boxes of tokens on a page of 1000 × 1000, left, top, right, bottom: (b, t, 4)."""
    ids = request.made.get("input_ids")
    if ids is None:
        return None
    most = request.size("max_2d_position_embeddings", default=1000) // 2
    corner = request.integers(0, most // 2, *ids.shape, 2)
    return torch.cat((corner, corner + request.integers(1, most // 2, *ids.shape, 2)), dim=-1)


# Images and videos


def _channels(request: Request) -> int:
    for values in (request.vision, _values(request.config)):
        for name in ("num_channels", "in_channels", "in_chans", "n_channels"):
            if isinstance(values.get(name), int):
                return int(values[name])
    return int(request.size("num_channels", default=3))


def _image_size(request: Request) -> tuple[int, int]:
    height, width = _pair(
        request.vision.get("image_size") or request.vision.get("input_size") or request.size("image_size", default=64)
    )
    if request.vision.get("model_type") == "pixtral":  # takes any size up to that, at which attention fills memory
        largest = 8 * request.vision["patch_size"]
        return min(height, largest), min(width, largest)
    return height, width


def pixel_values(request: Request) -> Tensor | None:
    """An image a row, or its patches: (b, c, h, w) or (p, d)."""
    if vars(request.config).get("vision_config", request) is None:
        return None
    if "image_grid_thw" in request.made or "grid_thw" in request.made:
        return patches(request)
    return request.normal(request.batch, _channels(request), *_image_size(request))


def video(request: Request) -> Tensor | None:
    """Frames of a video in place of an image: (b, frames, c, h, w)."""
    if "pixel_values" in request.made or "video_grid_thw" in request.arguments:
        return None
    return normal(f"b {frame_count(request)} c hw")(request)


def frame_count(request: Request) -> int:
    """The frames of a video."""
    return int(request.size("num_frames", "frames_per_clip", default=_FRAMES))


def grid(request: Request) -> Tensor | None:
    """Patches in time, down and across of one image a row: (b, 3)."""
    merge = request.size("spatial_merge_size", "merge_size", "merge_kernel_size", default=1)
    if not isinstance(merge, int):
        merge = merge[-1]
    if "image_grid_thw" in request.arguments and "grid_thw" in request.arguments:
        return None
    return torch.tensor([[1, GRID[0] * merge, GRID[1] * merge]] * request.batch)


def patches(request: Request) -> Tensor:
    """Flattened patches of all images of a grid: (p, d)."""
    grid = request.made.get("image_grid_thw", request.made.get("grid_thw"))
    assert grid is not None, "the grid is made before the patches"
    side = _pair(request.vision.get("patch_size") or request.size("patch_size"))
    depth = request.vision.get("temporal_patch_size") or request.vision.get("patch_temporal") or 1
    return request.normal(int(grid.prod(dim=1).sum()), _channels(request) * depth * side[0] * side[1])


def hidden_states(request: Request) -> Tensor:
    """The residual stream, or patches of a grid: (b, t, d) or (p, d)."""
    if "grid_thw" in request.made:
        return patches(request)
    return request.normal(request.batch, LENGTH, request.size("hidden_size"))


# Audio


def features(request: Request) -> Tensor | None:
    """Log-mel features: (b, c, t) for encoders with a table of positions after two convolutions, else (b, t, c)."""
    names = ("num_mel_bins", "feature_size", "input_dim", "input_feat_size", "n_mels", "feat_in", "mel_bins")
    bins = request.audio.get("num_mel_bins") or request.size(*names, default=0)
    if not bins or vars(request.config).get("audio_config", request) is None:
        return None
    positions = request.audio.get("max_source_positions")
    if positions:
        return request.normal(request.batch, bins, 2 * positions)
    return request.normal(request.batch, 64, bins)


def features_mask(request: Request) -> Tensor | None:
    """Which frames of audio are not padding, all of them: (b, t)."""
    features = request.made.get("input_features")
    if features is None:
        return None
    frames = features.shape[-1 if request.audio.get("max_source_positions") else 1]
    return torch.ones(request.batch, frames, dtype=torch.bool)


# Time series


def series(request: Request) -> Tensor:
    """Past values of time series: (b, t) or (b, t, c)."""
    values = _values(request.config)
    length = values["context_length"] + max(values.get("lags_sequence") or [0])
    channels = values.get("num_input_channels") or values.get("input_size") or 1
    shape = (
        (request.batch, length) if channels == 1 and "lags_sequence" in values else (request.batch, length, channels)
    )
    return request.normal(*shape)


SPATIAL_SHAPES = rows(2 * GRID[0], 2 * GRID[1])


def image_sizes(request: Request) -> Tensor:
    """Height and width of every image: (b, 2)."""
    return torch.tensor([_image_size(request)] * request.batch)


def tiles(request: Request) -> Tensor | None:
    """Tiles of images of which `image_sizes` says the size: (b, n, c, h, w)."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    side = _image_size(request)[0]
    pinpoints = request.size("image_grid_pinpoints")
    count = image_size_to_num_patches([side, side], pinpoints, side)
    return normal(f"b {count} c hw")(request)


def patches_of(*leading: int, square: bool = False) -> Builder:
    """Patches in the order of a grid, flattened or square, with leading dimensions of size one."""

    def build(request: Request) -> Tensor:
        flat = patches(request)
        side = _pair(request.vision.get("patch_size") or request.size("patch_size"))
        return flat.reshape(*leading, len(flat), *((-1, *side) if square else flat.shape[1:]))

    return build


def positioned_patches(request: Request) -> Tensor:
    """Flattened patches after their row and column: (b, p, 2 + d)."""
    count = GRID[0] * GRID[1] * 4
    patches = request.normal(request.batch, count, request.size("patch_embed_hidden_size"))
    rows, columns = 2 * GRID[0], 2 * GRID[1]
    places = torch.cartesian_prod(torch.arange(1, rows + 1), torch.arange(1, columns + 1))
    return torch.cat((places.to(patches.dtype).expand(request.batch, -1, -1), patches), dim=-1)


def visible(request: Request) -> Tensor:
    """Which patches of a video are masked, equally many in every row: (b, p)."""
    side, patch = _image_size(request), _pair(request.size("patch_size"))
    frames = request.size("num_frames") // request.size("tubelet_size")
    masked = torch.zeros(frames * (side[0] // patch[0]) * (side[1] // patch[1]), dtype=torch.bool)
    masked[::2] = True
    return masked.expand(request.batch, -1).clone()


def merge_sizes(request: Request) -> Tensor:
    """How many patches of every image become one, per side: (b)."""
    return torch.full((request.batch,), request.size("spatial_merge_size", "merge_size", default=1))


def with_question(request: Request) -> Tensor:
    """Token ids with one that asks for an answer: (b, t)."""
    ids = input_ids(request)
    assert ids is not None
    ids[:, 2] = request.size("question_token_id")
    return ids


def decoder_codebooks(request: Request) -> Tensor:
    """Codes of the decoder's codebooks, one row each: (b · n, t)."""
    decoder = _values(_part(request.config, ("decoder",)))
    shape = (request.batch * decoder["num_codebooks"], LENGTH)
    return request.integers(0, decoder["vocab_size"], *shape)


def placed_patches(request: Request) -> Tensor | None:
    """36 flattened patches of every image: (b, p, d)."""
    if vars(request.config).get("vision_config", request) is None:
        return None
    return request.normal(request.batch, 36, 3 * request.size("patch_size") ** 2)


def places(request: Request) -> Tensor | None:
    """Column and row of every patch: (b, p, 2)."""
    if "pixel_values" in request.arguments and vars(request.config).get("vision_config", request) is None:
        return None
    return torch.cartesian_prod(torch.arange(6), torch.arange(6)).expand(request.batch, -1, -1)


def latents(request: Request) -> Tensor:
    """Where the features of the image stand in the text: (b, t)."""
    mask = torch.zeros(request.batch, LENGTH, dtype=torch.long)
    mask[:, 1 : 1 + request.size("latent_query_num")] = 1
    return mask
