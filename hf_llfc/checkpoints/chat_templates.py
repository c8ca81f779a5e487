"""The chat template of a result: that of most models, one of the formats that are in wide use, or one that is given."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hf_llfc.checkpoints.checkpoint import Checkpoint
from hf_llfc.checkpoints.companions import by_name, has_vocabulary
from hf_llfc.errors import CheckpointError
from hf_llfc.foundation.choices import AUTO

logger = logging.getLogger(__name__)

TEMPLATE_FILE = "chat_template.jinja"
SUPERSEDED = (TEMPLATE_FILE, "chat_template.json")
"""Files that hold a chat template; `from_pretrained` takes the first of them."""

_SETTINGS_FILE = "tokenizer_config.json"
_KEY = "chat_template"

_OF_ROLE = "messages | selectattr('role', 'equalto', 'system') | list"

TEMPLATES = {
    "chatml": (
        "{%- for message in messages %}"
        "{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
    "llama3": (
        "{{- bos_token }}"
        "{%- for message in messages %}"
        "{{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' }}"
        "{{- message['content'] | trim ~ '<|eot_id|>' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
    ),
    "mistral": (
        "{%- set has_system = messages[0]['role'] == 'system' %}"
        "{%- set turns = messages[1:] if has_system else messages %}"
        "{{- bos_token }}"
        "{%- for turn in turns %}"
        "{%- if turn['role'] != ('user' if loop.index0 is even else 'assistant') %}"
        "{{- raise_exception('user and assistant take turns, after one system message at most') }}"
        "{%- endif %}"
        "{%- if turn['role'] == 'user' %}"
        "{%- set before = messages[0]['content'] ~ '\\n\\n' if has_system and loop.first else '' %}"
        "{{- ' [INST] ' ~ before ~ turn['content'] ~ ' [/INST]' }}"
        "{%- else %}{{- ' ' ~ turn['content'] ~ eos_token }}{%- endif %}"
        "{%- endfor %}"
    ),
    "alpaca": (
        "{%- for message in " + _OF_ROLE + " %}"
        "{%- if loop.last %}{{- message['content'] | trim ~ '\\n\\n' }}{%- endif %}"
        "{%- endfor %}"
        "{%- set titles = {'user': 'Instruction', 'user_context': 'Input', 'assistant': 'Response'} %}"
        "{%- for message in messages if message['role'] in titles %}"
        "{{- '### ' ~ titles[message['role']] ~ ':\\n' ~ message['content'] | trim ~ '\\n\\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '### Response:\\n' }}{%- endif %}"
    ),
    "exaone": (
        "{%- if messages[0]['role'] != 'system' %}{{- '[|system|][|endofturn|]\\n' }}{%- endif %}"
        "{%- for message in messages %}"
        "{{- '[|' ~ message['role'] ~ '|]' ~ message['content'] }}"
        "{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '[|assistant|]' }}{%- endif %}"
    ),
}
"""Formats by name, as their models were trained with them."""


def find_template(asked: str, models: Sequence[Checkpoint], source: Checkpoint) -> str | None:
    """Finds the chat template that a recipe asks for.

    Args:
        asked: `auto`, the name of a format, or the text of a template.
        models: All models; of templates that equally many have, that of the first is taken.
        source: Whose tokenizer goes with the result.

    Returns:
        The text; None where no model has one, and the result has none either.

    Raises:
        CheckpointError: There is no tokenizer that it could go with, or it is no valid template.
    """
    if not has_vocabulary([path.name for path in source.companion_files]):
        if asked == AUTO and all(own_template(model) is None for model in models):
            logger.warning("chat_template: none of the models has one, and the result has none either")
            return None
        raise CheckpointError(
            f"chat_template: {source.label} has no tokenizer that it could go with; name a model with one as "
            "`tokenizer_source`, or remove the key"
        )
    if asked == AUTO:
        found = Counter(template for model in models if (template := own_template(model)) is not None)
        if not found:
            logger.warning("chat_template: none of the models has one, and the result has none either")
            return None
        return found.most_common(1)[0][0]
    template = TEMPLATES.get(asked, asked)
    _refuse_invalid(template)
    return template


def own_template(checkpoint: Checkpoint) -> str | None:
    """The chat template of a checkpoint, without space around it; None if it has none."""
    files = by_name(checkpoint.companion_files)
    if TEMPLATE_FILE in files:
        return files[TEMPLATE_FILE].read_text(encoding="utf-8").strip() or None
    for name in (_SETTINGS_FILE, "chat_template.json"):
        if name not in files:
            continue
        try:
            template = json.loads(files[name].read_text(encoding="utf-8")).get(_KEY)
        except (ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{checkpoint.label}: {name} cannot be read: {error}") from error
        if isinstance(template, list):  # several, by name
            template = {each.get("name"): each.get("template") for each in template}.get("default")
        if isinstance(template, str) and template.strip():
            return template.strip()
    return None


def set_template(folder: Path, template: str) -> None:
    """Puts a chat template in the place of what a folder has; see `SUPERSEDED` for files to be left out of it."""
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    settings = folder / _SETTINGS_FILE
    if settings.is_file():
        content = json.loads(settings.read_text(encoding="utf-8"))
        if content.pop(_KEY, None) is not None:
            settings.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _refuse_invalid(template: str) -> None:
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.parse(template.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    except TemplateSyntaxError as error:
        raise CheckpointError(f"chat_template: is no valid template at line {error.lineno}: {error.message}") from None
