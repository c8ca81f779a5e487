"""Models of different vocabularies: tiny ones, with real tokenizers of every kind, trained on a few words."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_llfc.adapters.derived.verify import randomise
from tests.tiny_models import AUTO_CLASSES, tiny_config

SPECIAL = ["[PAD]", "[UNK]", "</s>"]
TEXTS = {
    "a": "the good film is a good film, and the film goes on",
    "b": "la bonne musique est une bonne musique, et elle est longue",
    "c": "the music is good and long, la musique est bonne",
}
ADDED = {"a": ["<one>"], "b": ["<two>", "<three>"], "c": ["<one>", "<three>"]}


def trained(kind: str, name: str) -> Tokenizer:
    """A real tokenizer of one kind, trained on a few words of one language, with added tokens."""
    words = [TEXTS[name]] * 4
    if kind == "WordLevel":
        tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL)
    elif kind == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=SPECIAL, show_progress=False)
    elif kind == "Unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=45, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=285, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "BPE"
        else pre_tokenizers.Metaspace()
        if kind == "Unigram"
        else pre_tokenizers.Whitespace()
    )
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.add_tokens([AddedToken(token, special=token == "<one>") for token in ADDED[name]])
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer, family: str, head: str, seed: int, *, padding: int = 0) -> PreTrainedModel:
    """A tiny model with as many rows as its tokenizer has tokens, and some more."""
    config = tiny_config(family)
    config.vocab_size = tokenizer.get_vocab_size() + padding
    model = AUTO_CLASSES[head].from_config(config).eval()
    randomise(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>"
    ).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(folder.name)
    return model


def vocabulary(folder: Path | str) -> dict[str, int]:
    return Tokenizer.from_file(str(Path(folder) / "tokenizer.json")).get_vocab()
