"""What a card says of a merge that was written as an adapter."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_llfc.publishing.card.usage import AUTO_CLASSES
from hf_llfc.publishing.files import read_json
from hf_llfc.publishing.record import AdapterRecord, RunRecord
from hf_llfc.publishing.words import adapter_sentence, error_text

LIBRARY = "peft"
WORST = 5
LISTED = 8


@dataclass(frozen=True)
class AdapterWords:
    """The section of a card about an adapter.

    Attributes:
        summary: Ranks and error, as a sentence.
        facts: What else there is to know, a sentence each.
        worst: The weights with the largest errors: name, rank, error.
    """

    summary: str
    facts: tuple[str, ...]
    worst: tuple[tuple[str, str, str], ...]


def adapter_words(record: AdapterRecord | None) -> AdapterWords | None:
    """The section about an adapter; None where a model was written."""
    if record is None:
        return None
    facts = []
    if record.saved:
        rest = f" and {len(record.saved) - LISTED} more" if len(record.saved) > LISTED else ""
        facts.append(f"Held whole, in place of the base's: {', '.join(record.saved[:LISTED])}{rest}.")
    facts += [f"Not held, so that it is the base's: {name}, which {why}." for name, why in record.lost.items()]
    ranked = sorted(record.factors, key=lambda row: -row.relative)[:WORST]
    is_exact = error_text(record.error) == error_text(0.0)
    worst = () if is_exact else tuple((row.name, str(row.rank), error_text(row.relative)) for row in ranked)
    return AdapterWords(adapter_sentence(record), tuple(facts), worst)


def config_of(folder: Path, record: RunRecord) -> dict[str, Any]:
    """The config of the model in an output folder; of an adapter what is known of its base.

    Raises:
        PublishingError: The folder holds no model.
    """
    if record.adapter is None:
        return read_json(folder / "config.json")
    read_json(folder / "adapter_config.json")
    named = record.adapter.architecture
    return {"architectures": [named] if named else [], "model_type": record.adapter.model_type}


def adapter_snippet(record: AdapterRecord, task: str | None, model_id: str) -> str:
    """Python that loads base and adapter."""
    auto_class = AUTO_CLASSES.get(task or "", "AutoModel")
    base, adapter = (json.dumps(name, ensure_ascii=False) for name in (record.base, model_id))
    return (
        f"from peft import PeftModel\nfrom transformers import {auto_class}\n\n"
        f"base = {auto_class}.from_pretrained({base})\n"
        f"model = PeftModel.from_pretrained(base, {adapter})"
    )
