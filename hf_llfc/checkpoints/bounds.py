"""What a config.json may claim, given the tensors beside it: checked before anything of that size is built."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hf_llfc.errors import CheckpointError, raise_all

_COUNTS = re.compile(r"layer|block|depth|expert|stage|head|group|codebook")
_SIZES = re.compile(r"size|dim|len|position|token|window|start|width|_id|index|chunk")

ALWAYS_ALLOWED = 1024
"""A count up to this is never refused: tensors may be shared by layers, or hold many layers or experts each."""


def refuse_more_modules_than_tensors(where: str, raw: dict[str, Any], tensors: int) -> None:
    """Raises if a config counts more layers, experts or the like than there are tensors.

    A model of a million layers takes hours to build, even without memory for its weights.

    Args:
        where: The file, for messages.
        raw: The values in config.json.
        tensors: How many tensors the files hold.

    Raises:
        CheckpointError: Names every such count.
    """
    allowed = max(tensors, ALWAYS_ALLOWED)
    problems = [f"{path} is {value}" for path, value in _counts(raw, "") if value > allowed]
    raise_all(problems, CheckpointError, f"{where}: the files hold {tensors} tensors, too few for what it describes")


def _counts(values: dict[str, Any], path: str) -> Iterator[tuple[str, int]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _counts(value, f"{path}{key}.")
        elif _COUNTS.search(key) and not _SIZES.search(key):
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and not isinstance(number, bool):
                    yield f"{path}{key}", number
