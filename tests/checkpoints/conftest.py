"""A saved tiny checkpoint with a tokenizer, for every test of this folder; and the double of the Hub."""

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.hub_double import hub
from tests.tiny_models import tiny_model

__all__ = ["hub"]

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film"]


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Transformers shows neither progress bars nor its tables."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def save_tokenizer(folder: Path, words: list[str] = WORDS) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Saves a tiny model with a tokenizer under a name and gives its folder; further arguments go to the saving."""

    def save_tiny(
        name: str = "a", family: str = "bert", head: str = "sequence-classification", seed: int = 0, **options
    ) -> Path:
        folder = tmp_path / name
        tiny_model(family, head, seed).save_pretrained(folder, **options)
        save_tokenizer(folder)
        return folder

    return save_tiny
