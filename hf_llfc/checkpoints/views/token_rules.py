"""What is said of single tokens of a vocabulary: whose row stands where models lack one, or in place of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hf_llfc.errors import suggest


@dataclass(frozen=True)
class RowSource:
    """A row of the embeddings.

    Attributes:
        model: Place among the models of the one whose row it is; None: a row of zeros.
        token: The token whose row it is; None: that of the token of the rule.
        token_id: The row, in place of the token.
    """

    model: int | None = None
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True)
class TokenRule:
    """What is said of one token.

    Attributes:
        source: Whose row it gets; None: as every other token.
        is_forced: Whether all models get that row, also those that have the token.
    """

    source: RowSource | None = None
    is_forced: bool = False


@dataclass(frozen=True)
class VocabularyRules:
    """What is said of a vocabulary beside whose it is.

    Attributes:
        tokens: Token → what is said of it; one that no tokenizer has is added.
        multiple: What the number of rows is to be a multiple of; None: there are as many as tokens.
        rows: Rows of the model whose tokens these are that stay, also those that are no token's.
    """

    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    multiple: int | None = None
    rows: int = 0

    def padded(self, size: int) -> int:
        """The number of rows for so many ids."""
        return size if self.multiple is None else -(-size // self.multiple) * self.multiple


def row_of(
    token: str, source: RowSource, vocabularies: Sequence[Mapping[str, int]], rows: Sequence[int], labels: Sequence[str]
) -> int | str:
    """Finds the row that a rule names.

    Args:
        token: The token of the rule.
        source: Whose row it is; of a model.
        vocabularies: Token → row of every model.
        rows: The number of rows of every model.
        labels: What the models are called.

    Returns:
        The row of that model; or what is wrong, with its path in a recipe.
    """
    assert source.model is not None
    label, known = labels[source.model], vocabularies[source.model]
    path = f"tokenizer.tokens.{token}.source"
    wanted = source.token if source.token is not None else token
    row = source.token_id if source.token_id is not None else known.get(wanted)
    if row is None:
        near = suggest(wanted, [other for other in known if other != token])
        return f"{path}: {label} has no token {wanted!r}{near}"
    if row >= rows[source.model]:
        return f"{path}: {label} has no row {row}; its embeddings have {rows[source.model]}"
    return row
