"""The section `tokenizer` of a recipe: whose tokens the result has, and where the rows of some of them come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hf_llfc.errors import RecipeError
from hf_llfc.recipe.options import documented, option, settle

KINDS = ("zero", "model_token")


@documented
@dataclass(frozen=True)
class TokenSource:
    """Where the row of a token comes from, other than from the row that a model has for it."""

    kind: str = option("A row of zeros, or that of a token of a model.", choices=KINDS)
    model: str | None = option("The model, of model_token.", None, shown="none")
    token: str | None = option("Its token, of model_token.", None, shown="none")
    token_id: int | None = option("The id of its token, in place of the token.", None, at_least=0, shown="none")

    def __post_init__(self) -> None:
        settle(self, RecipeError, self._disagreements)

    def _disagreements(self) -> list[str]:
        given = {"model": self.model, "token": self.token, "token_id": self.token_id}
        if self.kind == "zero":
            return [f"{key}: has no meaning for zero" for key, value in given.items() if value is not None]
        problems = ["model: missing; model_token is the token of a model"] if self.model is None else []
        if self.token is None and self.token_id is None:
            problems.append("token: missing; give the token, or its `token_id`")
        if self.token is not None and self.token_id is not None:
            problems.append("token_id: the token is given twice, as `token` and as `token_id`; leave one out")
        return problems


@documented
@dataclass(frozen=True)
class TokenRule:
    """What is said of one token."""

    source: str | TokenSource | None = option(
        "Where models that lack the token take its row from: a model (or base), or one of the kinds below.",
        None,
        shown="as for all other tokens",
    )
    force: bool = option("All models take that row, also those that have the token.", False)

    def __post_init__(self) -> None:
        settle(self, RecipeError, self._disagreements)

    def _disagreements(self) -> list[str]:
        lacks_source = self.force and self.source is None
        return ["source: missing; `force` replaces the rows of all models by it"] if lacks_source else []


@documented
@dataclass(frozen=True)
class TokenizerSection:
    """The tokens of the result, and their rows in the embeddings."""

    source: int | str | None = option(
        "Whose tokens: union, base, a model or its index; the same as `tokenizer_source`.", None, shown="union"
    )
    tokens: Mapping[str, TokenRule] = option(
        "Rules of single tokens, by the token; one that no tokenizer has is added.",
        dict,
        reads=lambda value: value,  # the reader of recipes judges it
        shown="none",
    )
    pad_to_multiple_of: int | None = option(
        "Rows are added until their number is a multiple of this, each the mean of all others.",
        None,
        at_least=1,
        shown="none are added",
    )

    def __post_init__(self) -> None:
        settle(self, RecipeError)

    def renamed(self, names: Mapping[str, str]) -> TokenizerSection:
        """The same with models called otherwise.

        Args:
            names: Name before → name now; a model that is not among them keeps its own.
        """

        def renamed(source: str | TokenSource | None) -> str | TokenSource | None:
            if isinstance(source, TokenSource):
                return source if source.model is None else replace(source, model=names.get(source.model, source.model))
            return source if source is None else names.get(source, source)

        tokens = {token: replace(rule, source=renamed(rule.source)) for token, rule in self.tokens.items()}
        return replace(self, tokens=tokens)
