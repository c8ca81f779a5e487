"""How a user names a model: a folder, a Hub id, `id@revision`, or `base+adapter`."""

from __future__ import annotations

import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""A repository on the Hub with its owner."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[^\s+]+)?")


def is_hub_id(model: str) -> bool:
    """Whether a name is an id on the Hub, and no folder of that name exists here."""
    return HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def split_revision(model: str) -> tuple[str, str | None]:
    """Splits `id@revision`; a path that holds an @ stays whole."""
    model_id, at, revision = model.rpartition("@")
    return (model_id, revision) if at and revision and HUB_ID.fullmatch(model_id) else (model, None)


def split_adapter(model: str) -> tuple[str, str | None]:
    """Splits `base+adapter`; a folder whose name holds a plus stays whole.

    Args:
        model: As a user names it.

    Returns:
        The base and the adapter; the whole and None where it is not two names.
    """
    if "+" not in model or Path(model).expanduser().exists():
        return model, None

    def may_be_a_model(name: str) -> bool:
        return Path(name).expanduser().exists() or _HUB_NAME.fullmatch(name) is not None

    pluses = [index for index, letter in enumerate(model) if letter == "+"]
    pairs = [(model[:index], model[index + 1 :]) for index in pluses]
    fitting = [pair for pair in pairs if all(may_be_a_model(name) for name in pair)]
    if not fitting and len(pairs) == 1:
        return pairs[0]  # the error about the one that is missing names it
    return fitting[0] if fitting else (model, None)


def parts_of(model: str) -> list[str]:
    """The names in a model's name: one, or of `base+adapter` two."""
    base, adapter = split_adapter(model)
    return [base] if adapter is None else [base, adapter]
