"""Do models prepare their inputs alike? Read from the files of tokenizers, processors and sentence-transformers.

A merge has one tokenizer and one processor. Where another parent was trained on other inputs (images of another mean,
text in lower case, another chat template), it gets inputs that it never saw.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hf_llfc.checkpoints.checkpoint import Checkpoint
from hf_llfc.checkpoints.companions import MODULES_FILE, TEMPLATES_FOLDER, by_name

_PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
)
_OF_SENTENCES = (MODULES_FILE, "config_sentence_transformers.json")
_BOOKKEEPING = re.compile(
    r".*(_class|_type|_version|_name_or_path|auto_map)|__version__|_.*|type|name|model_input_names"
)
_TOKENIZER = "tokenizer.json"
_TOKENIZER_SETTINGS = "tokenizer_config.json"
_SECTIONS = ("normalizer", "pre_tokenizer", "post_processor")
_OF_TOKENIZER = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "do_lower_case",
    "do_basic_tokenize",
    "keep_accents",
    "legacy",
    "split_special_tokens",
    "strip_accents",
    "tokenize_chinese_chars",
)
_TEMPLATE = "chat template"
_LARGEST = 60
"""Characters of a value in a message; of a longer one the digest is shown."""


def preparation_differences(checkpoints: Sequence[Checkpoint], *, templates: bool = True) -> list[str]:
    """Finds how models differ in what they do to an input before it is theirs.

    All are compared with the first. A file that one of the two lacks says nothing, but for chat templates and the
    modules of sentence-transformers.

    Args:
        checkpoints: Opened checkpoints; of a model in memory, the files beside it count where they are still there.
        templates: Whether chat templates are compared.

    Returns:
        One sentence a difference, with both values; none where inputs are prepared alike, as far as the files tell.
    """
    first, *others = checkpoints
    return [line for other in others for line in _differences(first, other, templates)]


def _differences(first: Checkpoint, other: Checkpoint, templates: bool) -> Iterator[str]:
    files_1, files_2 = (_files(each) for each in (first, other))
    names = [*files_1, *(name for name in files_2 if name not in files_1)]
    for name in names:
        one, two = files_1.get(name), files_2.get(name)
        if one is not None and two is not None and one.read_bytes() == two.read_bytes():
            continue
        if name == MODULES_FILE and (one is None or two is None):
            has, lacks = (first, other) if two is None else (other, first)
            yield f"{has.label} has the modules of a SentenceTransformer ({MODULES_FILE}), {lacks.label} has none"
        elif one is not None and two is not None:
            values_1, values_2 = _values(name, one), _values(name, two)
            for key, value in values_1.items():
                if key in values_2 and values_2[key] != value:
                    yield _told(f"{key} in {name}", other, values_2[key], first, value)
    template_1, template_2 = _template(files_1), _template(files_2)
    if templates and template_1 != template_2:
        yield _told(_TEMPLATE, other, template_2, first, template_1)


def _told(what: str, other: Checkpoint, value_2: Any, first: Checkpoint, value_1: Any) -> str:
    return f"{other.label}: {what} is {_short(value_2)}, but that of {first.label} is {_short(value_1)}"


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= _LARGEST:
        return text
    kind = f" of type {value['type']}" if isinstance(value, Mapping) and "type" in value else ""
    return f"one{kind} with SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _files(checkpoint: Checkpoint) -> dict[str, Path]:
    """The files that say how inputs are prepared, by their path below the folder."""
    everything = {**by_name(checkpoint.companion_files), **checkpoint.side_files}
    return {name: path for name, path in everything.items() if path.suffix in (".json", ".jinja") and path.is_file()}


def _values(name: str, path: Path) -> dict[str, Any]:
    """What a file says that changes inputs, key by key; nothing where it cannot be read."""
    content = _read(path)
    if name == _TOKENIZER and isinstance(content, Mapping):
        return _of_tokenizer(path)
    if name == _TOKENIZER_SETTINGS and isinstance(content, Mapping):
        return {key: content[key] for key in _OF_TOKENIZER if key in content}
    if name == MODULES_FILE and isinstance(content, list):
        return {"modules": [str(row.get("type")).rpartition(".")[2] for row in content if isinstance(row, Mapping)]}
    is_relevant = name in (*_PROCESSORS, *_OF_SENTENCES) or name.startswith("sentence_") or "/" in name
    if not isinstance(content, Mapping) or not is_relevant or name.startswith(TEMPLATES_FOLDER):
        return {}
    return dict(_flat(content))


def _of_tokenizer(path: Path) -> dict[str, Any]:
    """How text is cut, in the words of this version of tokenizers: others write the same otherwise."""
    try:
        content = json.loads(Tokenizer.from_file(str(path)).to_str())
    except Exception:  # tokenizers raises whatever it meets; comparing the vocabularies says so
        return {}
    model = {key: value for key, value in content["model"].items() if key != "vocab"}
    added = {token.pop("content"): token for token in content["added_tokens"]}
    flags = {f"added token {word!r}": {k: v for k, v in token.items() if k != "id"} for word, token in added.items()}
    return {**{key: content.get(key) for key in _SECTIONS}, "model": model, **flags}


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if _BOOKKEEPING.fullmatch(str(key)):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _template(files: Mapping[str, Path]) -> Any:
    """The chat templates of a tokenizer or processor, wherever they stand; None where there is none."""
    found = {
        name: files[name].read_text(encoding="utf-8", errors="replace") for name in files if name.endswith(".jinja")
    }
    for name in ("chat_template.json", _TOKENIZER_SETTINGS):
        content = _read(files[name]) if name in files else None
        template = content.get("chat_template") if isinstance(content, Mapping) else None
        if isinstance(template, str):
            found.setdefault("chat_template.jinja", template)
        elif isinstance(template, list):
            named = [each for each in template if isinstance(each, Mapping)]
            found |= {str(each.get("name")): str(each.get("template")) for each in named}
    texts = {name: str(text).strip() for name, text in found.items()}
    return next(iter(texts.values())) if len(texts) == 1 else texts or None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # who opens the tokenizer says so
        return None
