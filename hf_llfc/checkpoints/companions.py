"""The files beside config and weights that `from_pretrained` needs: tokenizer, processor, generation, templates, code.

Weights of any kind, the parent's README and the state of a training run are not among them.
"""

import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

TEMPLATES_FOLDER = "additional_chat_templates"

_TOKENIZER_PATTERNS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "vocab.bpe", "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json",
    "encoder.json", "byte_maps.json", "merges.txt", "bpe.codes", "dict.txt", "emoji.json", "normalizer.json",
    "tekken.json", "tokenizer.model", "tokenizer.model.v*", "sentencepiece.model", "sentencepiece.bpe.model",
    "spiece.model", "spm.model", "spm_char.model", "source.spm", "target.spm", "prophetnet.tokenizer", "*.tiktoken",
    "chat_template.jinja", "chat_template.json", f"{TEMPLATES_FOLDER}/*.jinja",
)  # fmt: skip

_PATTERNS = (
    "generation_config.json", *_TOKENIZER_PATTERNS, "preprocessor_config.json", "processor_config.json",
    "image_processor_config.json", "video_preprocessor_config.json", "audio_tokenizer_config.json",
)  # fmt: skip

# What says how text becomes token ids; one of these is enough to compare two vocabularies.
_VOCABULARY_PATTERNS = (
    "tokenizer.json", "vocab*", "*vocab.json", "encoder.json", "byte_maps.json", "tekken.json", "*.model",
    "*.model.v*", "*.spm", "*.tokenizer", "*.tiktoken",
)  # fmt: skip


def companion_names(names: Iterable[str]) -> list[str]:
    """Selects the files that belong to a checkpoint besides config, weights and code.

    Args:
        names: Paths below the folder of the checkpoint, with `/`.
    """
    return [name for name in names if any(_matches(name, pattern) for pattern in _PATTERNS)]


def code_names(names: Iterable[str]) -> list[str]:
    """Selects the files with code that a config may refer to."""
    return [name for name in names if _matches(name, "*.py")]


def has_vocabulary(names: Iterable[str]) -> bool:
    """Whether a tokenizer can be made from these companion files."""
    return any(_matches(name, pattern) for name in names for pattern in _VOCABULARY_PATTERNS)


def is_of_tokenizer(name: str) -> bool:
    """Whether a companion file belongs to the tokenizer, as its chat templates do."""
    return any(_matches(name, pattern) for pattern in _TOKENIZER_PATTERNS)


def copy_companion(companion: Path, folder: Path) -> None:
    """Copies a companion file to its place below the folder of a checkpoint."""
    # Templates lie in a folder of their own; everything else beside the weights.
    below = companion.parent.name if companion.parent.name == TEMPLATES_FOLDER else ""
    (folder / below).mkdir(exist_ok=True)
    shutil.copyfile(companion, folder / below / companion.name)


def _matches(name: str, pattern: str) -> bool:
    # A star does not reach into a folder.
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)
