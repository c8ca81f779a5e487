"""From rows to model inputs: text by tokenizer or by byte, images by processor or by plain rescaling.

Shape legend: n samples, t tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase

from hf_llfc.errors import EvaluationError
from hf_llfc.foundation.model_names import existing
from hf_llfc.recipe.data import BYTES_TOKENIZER, EvaluationConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 512
IGNORED_LABEL = -100
"""The label of positions that are not predicted, as everywhere in transformers."""

REPLACED_BY_MASK, REPLACED_AT_RANDOM = 0.8, 0.1
"""Of the predicted tokens, the shares shown to the model as mask and as a random token (BERT; the rest is kept)."""

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class TokenRow:
    """One text as tokens.

    Args:
        ids: Token ids, (t,).
        types: Segment of each token, (t,), or None where the model has no segments.
        special: True at tokens that are not text, (t,).
        byte_counts: Bytes of UTF-8 that each token adds to the text, (t,), or None if the tokenizer cannot tell.
        truncated: Whether the text was longer than allowed.
    """

    ids: np.ndarray
    types: np.ndarray | None
    special: np.ndarray
    byte_counts: np.ndarray | None
    truncated: bool


@dataclass(frozen=True)
class ByteEncoder:
    """The UTF-8 bytes of a text are its token ids; rows are joined by a newline.

    Args:
        max_length: Tokens per sample at most.
        pad_id: Token id written where a sample has ended; never counts.
        mask_id: Token id shown in place of a masked token; bytes have none.
        separator_id: Token id between two rows that are joined.
        separator_bytes: Bytes of text that the separator stands for.
        vocabulary: A random token is below this.
    """

    max_length: int
    pad_id: int
    mask_id: int | None = None
    separator_id: int | None = ord("\n")
    separator_bytes: int = 1
    vocabulary: int = 256

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, truncate: bool = True
    ) -> list[TokenRow]:
        """Tokens of each text; a pair is joined by a newline."""
        joined = texts if pairs is None else [f"{text}\n{pair}" for text, pair in zip(texts, pairs, strict=True)]
        rows = []
        for text in joined:
            whole = np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)
            ids = whole[: self.max_length] if truncate else whole
            rows.append(TokenRow(ids, None, np.zeros(len(ids), dtype=bool), np.ones_like(ids), len(ids) < len(whole)))
        return rows


@dataclass(frozen=True)
class TokenizerEncoder:
    """A tokenizer of transformers; rows are joined by its end-of-text token, if it has one.

    Args:
        tokenizer: The tokenizer.
        max_length: Tokens per sample at most.
        pad_id: Token id written where a sample has ended; never counts.
        mask_id: Token id shown in place of a masked token, if the tokenizer has one.
        separator_id: Token id between two rows that are joined, or None.
        vocabulary: A random token is below this.
        separator_bytes: Bytes of text that the separator stands for.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    pad_id: int
    mask_id: int | None
    separator_id: int | None
    vocabulary: int
    separator_bytes: int = 0

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, truncate: bool = True
    ) -> list[TokenRow]:
        """Tokens of each text with the special tokens that the tokenizer adds."""
        limits: dict[str, Any] = {"truncation": True, "max_length": self.max_length} if truncate else {}
        encoded = self.tokenizer(
            list(texts),
            list(pairs) if pairs is not None else None,
            return_special_tokens_mask=True,
            return_offsets_mapping=self.tokenizer.is_fast,
            verbose=False,
            **limits,
        )
        # One row per sample even where a fast tokenizer would give the part cut off as rows of its own.
        rows = []
        for index, text in enumerate(texts):
            ids = np.asarray(encoded["input_ids"][index], dtype=np.int64)
            types = np.asarray(encoded["token_type_ids"][index]) if "token_type_ids" in encoded else None
            special = np.asarray(encoded["special_tokens_mask"][index], dtype=bool)
            byte_counts, truncated = None, truncate and len(ids) == self.max_length
            if self.tokenizer.is_fast:
                truncated = truncate and bool(encoded.encodings[index].overflowing)
                if pairs is None:
                    byte_counts = _bytes_per_token(text, encoded["offset_mapping"][index])
            rows.append(TokenRow(ids, types, special, byte_counts, truncated))
        return rows


TextEncoder = ByteEncoder | TokenizerEncoder


def _bytes_per_token(text: str, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """How many bytes of the text end with each token, so that the sum is that of the text.

    A character cut into several tokens counts at the first of them, a space that belongs to no token at the next.
    """
    ends_in_bytes = np.concatenate([[0], np.cumsum([len(character.encode("utf-8")) for character in text])])
    ends = np.array([end for _, end in spans], dtype=np.int64)
    reached = np.maximum.accumulate(ends_in_bytes[ends]) if len(ends) else ends
    return np.diff(reached, prepend=0)


def load_text_encoder(
    config: EvaluationConfig,
    source: str | Path | PreTrainedTokenizerBase | None,
    model_config: PretrainedConfig,
    *,
    trust_remote_code: bool = False,
) -> TextEncoder:
    """The encoder that the configuration asks for.

    Args:
        config: Its `tokenizer` and `max_length`.
        source: The model's folder or its tokenizer.
        model_config: Of the model; sizes of vocabulary and positions.
        trust_remote_code: Whether code that comes with the model's tokenizer may be run.

    Raises:
        EvaluationError: There is no tokenizer, or it does not fit the model.
    """
    text_config = model_config.get_text_config()
    # Configurations of user's own models may lack either; the families of transformers map theirs to these names.
    positions = getattr(text_config, "max_position_embeddings", None)
    vocabulary = getattr(text_config, "vocab_size", None)
    pad_of_model = getattr(text_config, "pad_token_id", None)
    if config.tokenizer == BYTES_TOKENIZER:
        if vocabulary is not None and vocabulary < 256:
            raise EvaluationError(f"tokenizer bytes needs a vocabulary of at least 256, the model has {vocabulary}")
        if config.task == "fill-mask":
            raise EvaluationError("tokenizer bytes has no mask token, which the task fill-mask needs")
        limit = _max_length(config, positions, None)
        return ByteEncoder(max_length=limit, pad_id=0 if pad_of_model is None else pad_of_model)
    tokenizer = _load_tokenizer(config, source, trust_remote_code)
    if config.task == "fill-mask" and tokenizer.mask_token_id is None:
        raise EvaluationError("the tokenizer has no mask token, which the task fill-mask needs")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else pad_of_model
    if pad_id is None and config.task == "text-classification" and config.batch_size > 1:
        raise EvaluationError(
            "neither tokenizer nor model has a padding token, so texts of different lengths cannot share a batch; "
            "set batch_size to 1, or pad_token in the tokenizer and pad_token_id in the model's config"
        )
    size = len(tokenizer) if vocabulary is None else min(len(tokenizer), vocabulary)
    return TokenizerEncoder(
        tokenizer,
        max_length=_max_length(config, positions, tokenizer.model_max_length),
        pad_id=0 if pad_id is None else pad_id,
        mask_id=tokenizer.mask_token_id,
        separator_id=tokenizer.eos_token_id,
        vocabulary=size,
    )


def _load_tokenizer(
    config: EvaluationConfig, source: str | Path | PreTrainedTokenizerBase | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    hint = "name one as tokenizer, or use tokenizer: bytes for a byte-level model"
    if config.tokenizer is None and isinstance(source, PreTrainedTokenizerBase):
        return source
    place = config.tokenizer if config.tokenizer is not None else source
    trusted = config.trust_remote_code or (trust_remote_code and config.tokenizer is None)
    if place is None or not isinstance(place, str | Path):
        raise EvaluationError(f"the model comes without a tokenizer; {hint}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place), trust_remote_code=trusted)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EvaluationError(f"no tokenizer can be loaded from {place} ({reason}); {hint}") from error
    # A folder with nothing but a config gives some families a tokenizer that knows its special tokens alone.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise EvaluationError(f"the tokenizer in {place} has no vocabulary; {hint}")
    return tokenizer


def _max_length(config: EvaluationConfig, positions: int | None, tokenizer_limit: int | None) -> int:
    limits = [limit for limit in (positions, tokenizer_limit) if limit is not None and limit > 0]
    if config.max_length is None:
        return min([DEFAULT_MAX_LENGTH, *limits])
    if positions is not None and config.max_length > positions:
        raise EvaluationError(f"max_length is {config.max_length}, but the model has {positions} positions")
    return config.max_length


def check_vocabulary(rows: Sequence[TokenRow], model_config: PretrainedConfig) -> None:
    """Raises if a token id lies outside the model's vocabulary, as with the tokenizer of another model."""
    vocabulary = getattr(model_config.get_text_config(), "vocab_size", None)
    highest = max((int(row.ids.max()) for row in rows if len(row.ids)), default=0)
    if vocabulary is not None and highest >= vocabulary:
        raise EvaluationError(
            f"the tokenizer gives token id {highest}, but the model's vocabulary has {vocabulary}; "
            "the tokenizer belongs to another model"
        )


def collate(rows: Sequence[TokenRow], pad_id: int) -> dict[str, torch.Tensor]:
    """One batch of token rows, padded on the right.

    Args:
        rows: At least one, of n.
        pad_id: What stands at padded positions of `input_ids`.

    Returns:
        `input_ids`, `attention_mask` and, where the rows have segments, `token_type_ids`, each int64 (n, t).
    """
    shape = (len(rows), max(len(row.ids) for row in rows))
    input_ids_nt = np.full(shape, pad_id, dtype=np.int64)
    attention_mask_nt = np.zeros(shape, dtype=np.int64)
    types_nt = np.zeros(shape, dtype=np.int64)
    for index, row in enumerate(rows):
        input_ids_nt[index, : len(row.ids)] = row.ids
        attention_mask_nt[index, : len(row.ids)] = 1
        if row.types is not None:
            types_nt[index, : len(row.ids)] = row.types
    batch = {"input_ids": torch.from_numpy(input_ids_nt), "attention_mask": torch.from_numpy(attention_mask_nt)}
    if rows[0].types is not None:
        batch["token_type_ids"] = torch.from_numpy(types_nt)
    return batch


def mask_tokens(
    row: TokenRow, *, sample_id: int, seed: int, fraction: float, mask_id: int, vocabulary: int
) -> tuple[TokenRow, np.ndarray]:
    """Hides some tokens of a sample, depending on nothing but the sample and the seed.

    Args:
        row: The sample.
        sample_id: Its number in the dataset.
        seed: Of the whole evaluation.
        fraction: Share of the tokens to predict; at least one is.
        mask_id: What replaces most of them.
        vocabulary: A random token is below this.

    Returns:
        The row as the model sees it, and the labels: the true id where it is predicted, else `IGNORED_LABEL`.
    """
    generator = np.random.default_rng([seed, sample_id])
    candidates = np.flatnonzero(~row.special)
    chosen = generator.choice(candidates, size=max(1, round(fraction * len(candidates))), replace=False)
    fate = generator.random(len(chosen))
    ids = row.ids.copy()
    labels = np.full_like(ids, IGNORED_LABEL)
    labels[chosen] = ids[chosen]
    ids[chosen[fate < REPLACED_BY_MASK]] = mask_id
    at_random = chosen[(fate >= REPLACED_BY_MASK) & (fate < REPLACED_BY_MASK + REPLACED_AT_RANDOM)]
    ids[at_random] = generator.integers(vocabulary, size=len(at_random))
    return TokenRow(ids, row.types, row.special, row.byte_counts, row.truncated), labels


class ImageEncoder(Protocol):
    """Turns images into `pixel_values`."""

    def encode(self, images: Sequence[Any]) -> torch.Tensor:
        """The pixel values of a batch, n images first."""
        ...


@dataclass(frozen=True)
class ProcessorEncoder:
    """An image processor of transformers."""

    processor: Any
    channels: int | None

    def encode(self, images: Sequence[Any]) -> torch.Tensor:
        """The pixel values that the processor makes of the images."""
        pictures = [_as_picture(image, self.channels) for image in images]
        try:
            return self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        except ValueError as error:
            raise EvaluationError(f"the image processor refuses an image: {error}") from error


@dataclass(frozen=True)
class PlainImageEncoder:
    """Pixels as they are, for a model without a processor.

    A picture becomes (channels, height, width) and is converted to grey or colour as the model's `num_channels`
    says; an array keeps its shape, but one of (height, width) gets a channel dimension in front if the model has
    `num_channels`. Pictures and integer arrays are multiplied by 1/255, floating-point arrays by nothing, unless
    `rescale_factor` says otherwise.
    """

    channels: int | None
    rescale_factor: float | None
    integers: bool

    def encode(self, images: Sequence[Any]) -> torch.Tensor:
        """The rescaled pixels, float32."""
        arrays = [self._array(image) for image in images]
        shapes = {array.shape for array in arrays}
        if len(shapes) > 1:
            raise EvaluationError(
                f"images have different shapes ({', '.join(map(str, sorted(shapes)))}) and the model has no processor "
                "that would resize them"
            )
        return torch.from_numpy(np.stack(arrays))

    def _array(self, image: Any) -> np.ndarray:
        from PIL.Image import Image

        if isinstance(image, Image):
            pixels = np.asarray(_as_picture(image, self.channels))
            pixels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
            factor = 1 / 255
        else:
            pixels = np.asarray(image)
            factor = 1 / 255 if self.integers else 1.0
            if pixels.ndim == 2 and self.channels is not None:
                pixels = pixels[None]
        if self.rescale_factor is not None:
            factor = self.rescale_factor
        return (pixels.astype(np.float64) * factor).astype(np.float32)


def _as_picture(image: Any, channels: int | None) -> Any:
    """A PIL image in the mode that the model's number of channels asks for."""
    from PIL import Image

    if image is None:
        raise EvaluationError("an image is missing")
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.dtype != np.uint8:
            if not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() > 255:
                raise EvaluationError("the model's image processor needs pixels that are whole numbers from 0 to 255")
            array = array.astype(np.uint8)
        if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3):
            array = np.moveaxis(array, 0, -1)
        image = Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)
    mode = {1: "L", 3: "RGB"}.get(channels) if channels is not None else None
    return image if mode is None or image.mode == mode else image.convert(mode)


def load_image_encoder(
    config: EvaluationConfig,
    source: Any,
    model_config: PretrainedConfig,
    *,
    integers: bool,
    trust_remote_code: bool = False,
) -> ImageEncoder:
    """The model's own image processor if it has one, else plain rescaling.

    Args:
        config: Its `rescale_factor`.
        source: The model's folder, its processor, or None.
        model_config: Of the model; its `num_channels`.
        integers: Whether the dataset's image column holds arrays of whole numbers.
        trust_remote_code: Whether code that comes with the processor may be run.

    Raises:
        EvaluationError: There is a processor that cannot be loaded, or a setting that it would ignore.
    """
    channels = model_config.to_dict().get("num_channels")
    processor = source
    if isinstance(source, str | Path):
        folder = existing(source)
        present = [file for file in PROCESSOR_FILES if folder is not None and (folder / file).is_file()]
        processor = None
        if present or folder is None or not folder.is_dir():
            try:
                processor = AutoImageProcessor.from_pretrained(
                    str(source), trust_remote_code=trust_remote_code or config.trust_remote_code
                )
            except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
                if present:
                    reason = str(error).strip().splitlines()[0]
                    raise EvaluationError(f"the image processor in {source} cannot be loaded: {reason}") from error
    if processor is None:
        return PlainImageEncoder(channels, config.rescale_factor, integers)
    if config.rescale_factor is not None:
        raise EvaluationError("rescale_factor is for models without an image processor; this model has one")
    return ProcessorEncoder(processor, channels)


def cut_into_blocks(ids: np.ndarray, length: int) -> int:
    """How many blocks of at most `length` tokens there are, the last of which has at least two."""
    blocks = math.ceil(len(ids) / length)
    return blocks - 1 if len(ids) % length == 1 else blocks
