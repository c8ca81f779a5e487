"""How a reader of a card uses the model: a snippet that runs for its task and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_llfc.checkpoints.companions import MODULES_FILE

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TASK_OF_HEAD = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}
AUTO_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
}


def task_of(config: Mapping[str, Any]) -> str | None:
    """The pipeline tag that the architecture's head stands for, if it stands for one."""
    for architecture in config.get("architectures") or []:
        for head, task in TASK_OF_HEAD.items():
            if architecture.endswith(head):
                return task
    return None


def usage_snippet(folder: Path, config: Mapping[str, Any], task: str | None, model_id: str, *, of_bytes: bool) -> str:
    """Python that loads the model and applies it once.

    Args:
        folder: The checkpoint; which tokenizer or processor files it has decides the way.
        config: Its config.json.
        task: Its pipeline tag.
        model_id: What `from_pretrained` is to be given.
        of_bytes: Whether token ids are the text's UTF-8 bytes.

    Returns:
        A few lines of Python.
    """
    model = json.dumps(model_id, ensure_ascii=False)
    remote = ", trust_remote_code=True" if config.get("auto_map") else ""
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    has_processor = any((folder / name).is_file() for name in PROCESSOR_FILES)
    if (folder / MODULES_FILE).is_file():
        return (
            f"from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer({model}{remote})\n"
            'print(model.encode(["A sentence.", "Another one."]).shape)'
        )
    if not remote and not _is_known(config):
        name = str((config.get("architectures") or [""])[0])
        name = name if name.isidentifier() else "YourModel"
        return (
            f"from your_package import {name}  # the class that the parents were made with\n\n"
            f"model = {name}.from_pretrained({model})"
        )
    if has_tokenizer and task in ("text-classification", "token-classification"):
        return _pipeline(task, "classifier", model, remote, 'classifier("A sentence to classify.")')
    if has_tokenizer and task == "text-generation":
        return _pipeline(task, "generator", model, remote, 'generator("Once upon a time", max_new_tokens=40)')
    if has_tokenizer and task == "fill-mask":
        call = 'filler(f"The capital of France is {filler.tokenizer.mask_token}.")'
        return _pipeline(task, "filler", model, remote, call)
    if has_processor and task == "image-classification":
        return _pipeline(task, "classifier", model, remote, 'classifier("picture.png")')
    auto_class = AUTO_CLASSES.get(task or "", "AutoModel")
    load = f"model = {auto_class}.from_pretrained({model}{remote})\n"
    if task == "image-classification":
        size = config.get("image_size") or 32
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = f"(1, {config.get('num_channels', 3)}, {height}, {width})"
        return (
            f"import torch\nfrom transformers import {auto_class}\n\n{load}"
            f"pixel_values = torch.zeros{shape}  # images scaled as the parents' were in training\n"
            "print(model(pixel_values).logits.softmax(-1))"
        )
    if of_bytes:
        prompt = 'tokens = torch.tensor([list("Once upon a time".encode())])  # one token is one byte\n'
        use = "print(model(tokens).logits.softmax(-1))"
        if task == "text-generation":
            use = (
                "written = model.generate(tokens, max_new_tokens=80, do_sample=True)[0].tolist()\n"
                'print(bytes(token for token in written if token < 256).decode(errors="replace"))'
            )
        return f"import torch\nfrom transformers import {auto_class}\n\n{load}{prompt}{use}"
    if has_tokenizer:
        return (
            f"from transformers import AutoTokenizer, {auto_class}\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({model}{remote})\n{load}"
            'print(model(**tokenizer("A sentence.", return_tensors="pt")))'
        )
    return f"from transformers import {auto_class}\n\n{load}".rstrip()


def _pipeline(task: str, variable: str, model: str, remote: str, call: str) -> str:
    return f'from transformers import pipeline\n\n{variable} = pipeline("{task}", model={model}{remote})\nprint({call})'


def _is_known(config: Mapping[str, Any]) -> bool:
    """Whether stock transformers has this architecture."""
    from hf_llfc.adapters.registry import FAMILIES

    if config.get("model_type") in FAMILIES:
        return True  # and transformers, which takes a while to load, need not be asked
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return config.get("model_type") in CONFIG_MAPPING_NAMES
