"""The files beside config and weights, and which of them go with a result.

Companions are what `from_pretrained` needs: tokenizer, processor, generation, templates, code. Beside them a result
keeps what makes a folder a SentenceTransformer, and licences. All else stays behind, and is named: other formats of
the weights, the state of a training run, and whatever nobody knows, which may be no one else's business.
"""

import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from hf_llfc.foundation.model_names import as_text

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

# Read by sentence-transformers: the modules of a model, each in a folder of its own, and their settings.
MODULES_FILE = "modules.json"
_OF_SENTENCES = (MODULES_FILE, "sentence_*_config.json", "config_sentence_transformers.json")

_LICENCES = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*", "COPYING*")

# What a result has of its own.
_REPLACED = (
    "config.json", "README.md", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin",
    "pytorch_model*.bin.index.json", "adapter_config.json", "adapter_model.bin", "llfc/*",
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


def side_names(names: Collection[str], modules: Any) -> list[str]:
    """Selects the files beside companions that go with a result: those of sentence-transformers, and licences.

    Args:
        names: Paths below the folder of the checkpoint, with `/`.
        modules: The content of `MODULES_FILE`; None where there is none.
    """
    rows = modules if isinstance(modules, list) else []
    paths = [str(row.get("path") or "").strip("/") for row in rows if isinstance(row, dict)]
    folders = [f"{path}/" for path in paths if path]
    patterns = (*_OF_SENTENCES, *_LICENCES) if isinstance(modules, list) else _LICENCES
    return [
        name
        for name in names
        if name.startswith(tuple(folders)) or any(_matches(name, pattern) for pattern in patterns)
    ]


def left_names(names: Iterable[str], carried: Collection[str]) -> list[str]:
    """Names the files that stay behind, those of a folder together; hidden ones are not counted.

    Args:
        names: Paths below the folder of the checkpoint, with `/`.
        carried: Those that go with a result.
    """
    left = [
        name
        for name in names
        if name not in carried
        and not any(part.startswith(".") for part in PurePosixPath(name).parts)
        and not any(_matches(name, pattern) for pattern in _REPLACED)
    ]
    folders = [name.partition("/")[0] for name in left if "/" in name]
    of_folders = [
        f"{folder}/" if folders.count(folder) > 1 else next(name for name in left if name.startswith(f"{folder}/"))
        for folder in dict.fromkeys(folders)
    ]
    return [as_text(name) for name in [*sorted(name for name in left if "/" not in name), *of_folders]]


def by_name(companions: Iterable[Path]) -> dict[str, Path]:
    """Path below the folder of a checkpoint → companion; templates lie in a folder of their own."""
    return {
        f"{path.parent.name}/{path.name}" if path.parent.name == TEMPLATES_FOLDER else path.name: path
        for path in companions
    }


def needed_code(companions: Mapping[str, Path]) -> dict[str, Path]:
    """The code among companions, if tokenizer or processor need it."""
    described = [path for name, path in companions.items() if name.endswith(".json")]
    if not any(b'"auto_map"' in path.read_bytes() for path in described):
        return {}
    return {name: companions[name] for name in code_names(companions)}


def is_licence(name: str) -> bool:
    """Whether a file says what may be done with a checkpoint."""
    return any(_matches(name, pattern) for pattern in _LICENCES)


def is_of_inputs(name: str) -> bool:
    """Whether a companion file belongs to the tokenizer or a processor, and so to whoever prepares the inputs."""
    return any(_matches(name, pattern) for pattern in _PATTERNS if pattern != "generation_config.json")


def copy_companion(companion: Path, folder: Path) -> None:
    """Copies a companion file to its place below the folder of a checkpoint."""
    for name, path in by_name([companion]).items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)


def _matches(name: str, pattern: str) -> bool:
    # A star does not reach into a folder.
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def added_beside(files: Mapping[str, Path], known: Collection[str]) -> dict[str, int]:
    """Tokens that are added to a tokenizer by files beside `tokenizer.json`, as transformers adds them.

    Args:
        files: Companions by name.
        known: The tokens of `tokenizer.json`, which counts for these.

    Returns:
        Token → id.
    """
    settings = read_values(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else None
    decoder = settings.get("added_tokens_decoder") if isinstance(settings, dict) else None
    if isinstance(decoder, dict):
        pairs = [(each.get("content"), index) for index, each in decoder.items() if isinstance(each, dict)]
    else:
        listed = read_values(files["added_tokens.json"]) if "added_tokens.json" in files else None
        pairs = list(listed.items()) if isinstance(listed, dict) else []
    return {
        token: int(index)
        for token, index in pairs
        if isinstance(token, str) and token not in known and str(index).isdigit()
    }


def read_values(path: Path) -> Any:
    """The content of a file; None where it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
