"""The vocabulary of several models: one tokenizer, and each model's row for every token of it.

Either the tokenizer of one model, or the union of all, which knows every token of them. In the union the tokens of the
first model keep their ids, so that special tokens stay what its configs say; those that it lacks follow in the order of
the models and of their ids there. They join as what they are: pieces with their merges or scores, added tokens with
their flags. What happens to a text before it is cut into pieces is as in the first model.

Shape suffixes: `t` ids of the union.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from hf_llfc.checkpoints.checkpoint import Checkpoint
from hf_llfc.checkpoints.companions import added_beside, copy_companion, has_vocabulary
from hf_llfc.checkpoints.views.token_rules import VocabularyRules, row_of
from hf_llfc.errors import CheckpointError, raise_all

logger = logging.getLogger(__name__)

# Of embeddings that are not those of tokens.
_OTHER_SIZES = ("type_vocab_size",)

# The library takes memory for every id up to the largest, hundreds of times what a vocabulary has where one is damaged.
_LARGEST_ID = 10_000_000

LACKING = -1
"""Stands in place of a row where a model lacks a token."""

_TOKENIZER_FILE = "tokenizer.json"
_SETTINGS_FILE = "tokenizer_config.json"
# These say of the first model's tokens what tokenizer.json says of all.
_SUPERSEDED = ("merges.txt", "vocab.bpe", "bpe.codes", "added_tokens.json")
# What must be the same for a piece to mean the same, and what only decides how often it is found.
_SPELLING = ("type", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
_SPLITTING = ("normalizer", "pre_tokenizer", "decoder")

NO_RULES = VocabularyRules()

Description = dict[str, Any]
"""Content of tokenizer.json."""


class Vocabulary:
    """The tokens of the result, with the rows that several models have for them.

    Attributes:
        source: The model whose tokens these are; None: the union of all.
        tokens: Token → id.
        count: One more than the highest id, or the rows of the source that stay.
        kept_rows: Rows of the source that stay whether a token has them or not; 0 where only those of tokens do.
        counts: Rows of the embeddings of every model.
        size: Rows of the embeddings: `count`, and those that are added to make a multiple.
        rows: One a model: for every id its row there, or `LACKING`. Behind the models, one for each of `donors`.
        donors: Places among the models of those whose rows a rule names: they lend these beside their own.
        base: Place among the models of the one whose row stands in where another lacks it; None: the mean of all that
            have one.
        is_of_each: Whether every model has these tokens and this number of rows, and no rule says otherwise.
        digest: Tells this vocabulary from another.
        folder: Where the tokenizer lies; a folder that is made lasts as long as this object.
        companions: What lies there, and belongs beside the merged weights.
    """

    def __init__(
        self,
        models: Sequence[Checkpoint],
        base: int | None = None,
        *,
        source: Checkpoint | None = None,
        rules: VocabularyRules = NO_RULES,
    ) -> None:
        """Reads the tokenizers, and joins them where no model is named.

        Args:
            models: The first gives a union its ids, special tokens and chat template.
            base: See `Vocabulary.base`.
            source: See `Vocabulary.source`; one of the models, or another.
            rules: What is said of single tokens, and of the number of rows.

        Raises:
            CheckpointError: A model has no tokenizer that can be read, they cannot be joined, or a rule names a row
                that is not there.
        """
        labels = [model.label for model in models]
        descriptions = [_description(model) for model in models]
        given = _joined(descriptions, labels) if source is None else _description(source)
        described = _with_added(given, [token for token in rules.tokens if token not in _vocabulary(given)])
        self.source, self.base = source, base
        self.tokens: Mapping[str, int] = _vocabulary(described)
        self.count = max(1 + max(self.tokens.values()), rules.rows)
        self.size = rules.padded(self.count)
        counts = [rows_of(model) for model in models]
        self.kept_rows, self.counts = rules.rows, counts
        vocabularies = [_vocabulary(description) for description in descriptions]
        room = sum(counts) + len(rules.tokens) + (rows_of(source) if source is not None else 0)
        if self.count > room:  # a damaged id, for which no room is to be made
            raise CheckpointError(
                f"tokenizer_source: the union of the vocabularies reaches id {self.count - 1}, and the models have "
                f"{room} rows together; a tokenizer does not belong to its model, or is damaged"
            )
        rows = [self._rows_of(*each) for each in zip(vocabularies, counts, strict=True)]
        first = 0 if source is None else next((i for i, model in enumerate(models) if model is source), None)
        if first is not None:
            self._keep_rows_without_token(rows[first], counts[first])
        self._ruled_t = torch.zeros(self.size, dtype=torch.bool)
        self.donors, of_donors = self._apply(rules, rows, vocabularies, counts, labels)
        self.rows: Sequence[Tensor] = [*rows, *of_donors]
        self._judge_tokens_of_nobody(labels)
        is_wide = rules.multiple is None or counts[0] == self.size == self.count
        is_lent = any(len(self.lacking(index)) for index in range(len(models)))
        self.is_of_each = (
            is_wide and not is_lent and len({*counts}) == 1 and all(each == self.tokens for each in vocabularies)
        )
        text = json.dumps(described, ensure_ascii=False)
        said = [text, self.size, self.base, [rows_t.tolist() for rows_t in of_donors], self._ruled_t.tolist()]
        self.digest = hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()
        if source is not None and source.folder is not None and described == given:
            self.folder, self.companions = source.folder, source.companion_files
            return
        self.folder = Path(tempfile.mkdtemp(prefix="hf-llfc-vocabulary-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.companions = _written(self.folder, source or models[0], described, text)

    @property
    def added(self) -> int:
        """Rows that are added behind those of the tokens, to make a multiple."""
        return self.size - self.count

    def lacking(self, index: int) -> Tensor:
        """The ids that one of the models has no row for; rows that are added are not among them."""
        return (self.rows[index][: self.count] == LACKING).nonzero().flatten()

    def lenders(self, ids_t: Tensor) -> Sequence[Tensor]:
        """Finds the models whose rows stand in for those of a model that lacks some tokens.

        Args:
            ids_t: Ids of the vocabulary.

        Returns:
            One tensor a model, and behind the models one for each of `donors`: whether its row is one of those that are
            averaged. The base alone, where it has the token, else all models that have it; where a rule says whose row
            it is, that donor alone, or nobody.
        """
        has = [rows_t[ids_t] != LACKING for rows_t in self.rows]
        models, donors = has[: len(has) - len(self.donors)], has[len(has) - len(self.donors) :]
        if self.base is not None:
            by_base = models[self.base]
            models = [rows & (~by_base if index != self.base else True) for index, rows in enumerate(models)]
        return [*(rows & ~self._ruled_t[ids_t] for rows in models), *donors]

    def _apply(
        self,
        rules: VocabularyRules,
        rows: Sequence[Tensor],
        vocabularies: Sequence[Mapping[str, int]],
        counts: Sequence[int],
        labels: Sequence[str],
    ) -> tuple[list[int], list[Tensor]]:
        """The donors that rules name, and their rows; tokens whose row is forced are taken from the models' own."""
        of_donors: dict[int, Tensor] = {}
        problems = []
        for token, rule in rules.tokens.items():
            index = self.tokens[token]
            if rule.source is None:
                if all(rows_t[index] == LACKING for rows_t in rows):
                    problems.append(f"tokenizer.tokens.{token}: no model has this token; give it a `source`")
                continue
            self._ruled_t[index] = True
            if rule.source.model is not None:
                row = row_of(token, rule.source, vocabularies, counts, labels)
                if isinstance(row, str):
                    problems.append(row)
                    continue
                of_donors.setdefault(rule.source.model, torch.full((self.size,), LACKING))[index] = row
            if rule.is_forced:
                for rows_t in rows:
                    rows_t[index] = LACKING
        raise_all(problems, CheckpointError, "the tokens cannot be given their rows")
        return list(of_donors), list(of_donors.values())

    def _rows_of(self, vocabulary: Mapping[str, int], rows: int) -> Tensor:
        # A tokenizer may know more tokens than the model has rows.
        known = [
            (self.tokens[token], index) for token, index in vocabulary.items() if index < rows and token in self.tokens
        ]
        found_t = torch.full((self.size,), LACKING)
        if known:
            ids, own = torch.tensor(known).unbind(dim=1)
            found_t[ids] = own
        return found_t

    def _keep_rows_without_token(self, rows_t: Tensor, count: int) -> None:
        """An id below others that is no token of the model that gives the ids keeps the row that it has there."""
        used = set(self.tokens.values())
        for index in range(min(count, self.count)):
            if index not in used:
                rows_t[index] = index

    def _judge_tokens_of_nobody(self, labels: Sequence[str]) -> None:
        """Refuses a union with tokens that no model has a row for; of another vocabulary these are zero."""
        nowhere = torch.stack([rows_t[: self.count] == LACKING for rows_t in self.rows]).all(dim=0)
        nowhere &= ~self._ruled_t[: self.count]
        if not bool(nowhere.any()):
            return
        by_id = {index: token for token, index in self.tokens.items()}
        first = int(nowhere.nonzero()[0])
        what = f"{int(nowhere.sum())} of the {self.count} ids of the "
        which = f"{by_id.get(first, f'id {first}')!r} first"
        if self.source is not None:
            logger.warning(
                "tokenizer_source: no model has a row for %stokenizer of %s, %s; these rows are zero",
                what,
                self.source.label,
                which,
            )
            return
        raise CheckpointError(
            f"tokenizer_source: no model has a row for {what}union, {which}: the embeddings of {', '.join(labels)} "
            "have fewer rows than their tokenizers have tokens"
        )


def rows_of(checkpoint: Checkpoint) -> int:
    """The number of rows of a model's embeddings, as its config says it.

    Raises:
        CheckpointError: It does not say it, or has several vocabularies.
    """
    config = text_config(checkpoint.config, checkpoint.label)
    named = config.attribute_map.get("vocab_size", "vocab_size")
    sizes = {
        key: value
        for key, value in config.to_dict().items()
        if key == named or ("vocab_size" in key and key not in _OTHER_SIZES)
    }
    if not isinstance(sizes.get(named), int) or len([size for size in sizes.values() if size is not None]) > 1:
        raise CheckpointError(
            f"{checkpoint.label}: the union of vocabularies needs a model of one vocabulary; its config names "
            f"{', '.join(sizes) or 'none'}"
        )
    return int(sizes[named])


def text_config(config: PreTrainedConfig, label: str) -> Any:
    """The part of a config that describes the language model, which may be all of it.

    Raises:
        CheckpointError: There are several.
    """
    try:
        return config.get_text_config()
    except ValueError as error:
        raise CheckpointError(f"{label}: has several vocabularies, which cannot be united") from error


def _description(checkpoint: Checkpoint) -> Description:
    files = {path.name: path for path in checkpoint.companion_files}
    try:
        if _TOKENIZER_FILE in files:
            raw = files[_TOKENIZER_FILE].read_text(encoding="utf-8")
            _refuse_damaged_ids(checkpoint.label, json.loads(raw))
            text = Tokenizer.from_str(raw).to_str()
        elif has_vocabulary(files):
            folder = next(iter(files.values())).parent
            slow = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            if not isinstance(slow, PreTrainedTokenizerFast):
                raise CheckpointError(
                    f"{checkpoint.label}: {type(slow).__name__} cannot be written as {_TOKENIZER_FILE}, which the "
                    "union of vocabularies needs"
                )
            text = slow.backend_tokenizer.to_str()
        else:
            raise CheckpointError(
                f"{checkpoint.label}: has no tokenizer, and the union of vocabularies needs that of every model; leave "
                "tokenizer_source out if the models share one"
            )
    except CheckpointError:
        raise
    except Exception as error:  # both libraries raise whatever they meet in a tokenizer's files
        raise CheckpointError(f"{checkpoint.label}: the tokenizer cannot be read: {error}") from error
    description: Description = json.loads(text)
    beside = added_beside(files, _vocabulary(description)) if _TOKENIZER_FILE in files else {}
    return _with_tokens(description, beside)


def _refuse_damaged_ids(label: str, description: Description) -> None:
    """Raises where the library would take memory for every id up to one that no tokenizer has."""
    largest = max(_vocabulary(description).values(), default=0)
    if largest > _LARGEST_ID:
        raise CheckpointError(
            f"{label}: {_TOKENIZER_FILE} reaches id {largest}, more than any vocabulary has; fetch or save it again"
        )


def _vocabulary(description: Description) -> dict[str, int]:
    """Token → id."""
    pieces = description["model"]["vocab"]
    if isinstance(pieces, list):
        pieces = {piece: index for index, (piece, _) in enumerate(pieces)}
    return {**pieces, **{token["content"]: token["id"] for token in description.get("added_tokens", ())}}


def _joined(descriptions: Sequence[Description], labels: Sequence[str]) -> Description:
    """The first tokenizer with the tokens of all others."""
    first = descriptions[0]
    problems = []
    for label, other in zip(labels[1:], descriptions[1:], strict=True):
        problems += [
            f"{label}: {key} of its tokenizer is {other['model'].get(key)!r}, that of {labels[0]} {value!r}"
            for key in _SPELLING
            if (value := first["model"].get(key)) != other["model"].get(key)
        ]
        differing = [key for key in _SPLITTING if first.get(key) != other.get(key)]
        if differing:
            logger.warning(
                "%s: its tokenizer has another %s than that of %s, by which text is cut: some of its tokens may not be "
                "found in a text any more",
                label,
                " and ".join(differing),
                labels[0],
            )
    raise_all(problems, CheckpointError, "tokenizer_source: the vocabularies of these models cannot be united")
    joined = deepcopy(first)
    known = _vocabulary(joined)
    following = 1 + max(known.values())
    for other in descriptions[1:]:
        flags = {token["content"]: token for token in other["added_tokens"]}
        for token, _ in sorted(_vocabulary(other).items(), key=lambda entry: entry[1]):
            if token in known:
                continue
            known[token] = following
            following += 1
            if token in flags:
                joined["added_tokens"].append({**flags[token], "id": known[token]})
        _join_pieces(joined["model"], other["model"], known)
    return joined


def _with_added(description: Description, tokens: Sequence[str]) -> Description:
    """A tokenizer that knows further tokens, at the ids behind all others."""
    following = 1 + max(_vocabulary(description).values())
    return _with_tokens(description, {token: following + place for place, token in enumerate(tokens)})


def _with_tokens(description: Description, tokens: Mapping[str, int]) -> Description:
    """A tokenizer that knows further tokens, at their ids."""
    if not tokens:
        return description
    widened = deepcopy(description)
    known = {**_vocabulary(widened), **tokens}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    for token, index in sorted(tokens.items(), key=lambda pair: pair[1]):
        widened["added_tokens"].append({"id": index, "content": token, **flags, "normalized": True})
    model = widened["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] += _scored(model["vocab"], {}, known)
    else:
        model["vocab"] = dict(known)
    return widened


def _join_pieces(model: dict[str, Any], other: Mapping[str, Any], known: Mapping[str, int]) -> None:
    """Adds the pieces of another model of text, with what puts them together, under ids that are known."""
    if isinstance(model["vocab"], list):
        model["vocab"] += _scored(model["vocab"], dict(other["vocab"]), known)
        return
    # Added tokens among them: one that is no piece would get the id after all pieces, when the file is read.
    model["vocab"] = dict(known)
    if "merges" in model:
        merges = [_pair(merge) for merge in model["merges"]]
        present = {tuple(merge) for merge in merges}
        # A merge later in the list is one of lower rank: those of the first model come before all others.
        model["merges"] = [*merges, *(pair for merge in other["merges"] if tuple(pair := _pair(merge)) not in present)]


def _pair(merge: str | Sequence[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def _scored(
    pieces: Sequence[Sequence[Any]], scores: Mapping[str, float], known: Mapping[str, int]
) -> Iterator[list[Any]]:
    """Yields the pieces that follow those of a unigram model, in which the position of a piece is its id."""
    by_id = {index: token for token, index in known.items()}
    lowest = min(score for _, score in pieces)
    for index in range(len(pieces), 1 + max(by_id)):
        if index not in by_id:
            raise CheckpointError(f"tokenizer_source: id {index} of the first model is no token, so none can follow it")
        # An added token is found before the pieces are, whatever its score.
        yield [by_id[index], scores.get(by_id[index], lowest)]


def _written(folder: Path, first: Checkpoint, joined: Description, text: str) -> tuple[Path, ...]:
    """Writes the tokenizer, beside all other companions of the first model.

    Raises:
        CheckpointError: transformers makes another tokenizer of it.
    """
    for path in first.companion_files:
        if path.name not in _SUPERSEDED and (path.name == _TOKENIZER_FILE or not has_vocabulary([path.name])):
            copy_companion(path, folder)
    (folder / _TOKENIZER_FILE).write_text(text, encoding="utf-8")
    settings = folder / _SETTINGS_FILE
    if settings.is_file():
        content = json.loads(settings.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in content:
            tokens = {str(token["id"]): dict(token) for token in joined["added_tokens"]}
            content["added_tokens_decoder"] = {index: token for index, token in tokens.items() if token.pop("id") >= 0}
            settings.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    companions = tuple(sorted(path for path in folder.rglob("*") if path.is_file()))
    first.config.save_pretrained(folder)  # where the settings name no class of tokenizers, the model type does
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        vocabulary = tokenizer.get_vocab()
    except Exception as error:  # the class of the tokenizer may raise anything
        raise CheckpointError(f"tokenizer_source: the union of the vocabularies cannot be loaded: {error}") from error
    expected = _vocabulary(joined)
    lost = [token for token, index in expected.items() if vocabulary.get(token) != index]
    if lost:
        raise CheckpointError(
            f"tokenizer_source: {type(tokenizer).__name__} of {first.label} does not keep {len(lost)} of the "
            f"{len(expected)} tokens of the union, {lost[0]!r} first; name a model first whose tokenizer is of a class "
            "that does"
        )
    if own := [token for token in vocabulary if token not in expected]:
        logger.warning(
            "%s adds %d tokens of its own to the union, %r first, for which the result has no rows",
            type(tokenizer).__name__,
            len(own),
            own[0],
        )
    return companions
